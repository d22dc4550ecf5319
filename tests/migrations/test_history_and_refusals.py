"""Revisions 078 and 079: the history and the refusals come, go with a rollback, and come back with the next upgrade."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
from alembic.util import CommandError
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.orm import Session

from iot_models import ShadowService, migrate
from tests.databases import partitioned
from tests.databases.alembic_runs import downgrade, upgrade
from tests.databases.schema_dump import dump
from tests.migrations.raw_sql import as_role, psql, rows_of, run_sql, state, tables_of

if TYPE_CHECKING:
    from collections.abc import Callable

HISTORY = "device_shadow_history"
PARKED_HISTORY = "device_shadow_history_078"
PARKED_REFUSALS = "device_state_refusals_079"
REFUSED = "tenant_id, device_id, refused_version, refusal, refused_at"


@pytest.fixture
def url(shadow_fleet_at_head: str) -> str:
    """Devices with a history; two refused their newest version, one an older one."""
    engine = create_engine(shadow_fleet_at_head, poolclass=NullPool)
    with Session(engine) as session, session.begin():
        for tenant, device in (("globex", "d1"), ("acme", "d2"), ("globex", "d3")):
            service = ShadowService(session, tenant, actor="anna")
            service.patch_desired(device, {"mode": "turbo"}, reason="faster", request_id="r-1")
            service.refuse_desired(device, 8, f"not by {device}")
        ShadowService(session, "globex").replace_reported("d3", {}, acked_version=8)
        ShadowService(session, "acme").register("gone", "s")
        ShadowService(session, "acme").remove("gone")
    return shadow_fleet_at_head


def refusals(url: str) -> list[str]:
    """Each device's, and whether it counts."""
    counts = "refused_version = desired_version AND desired_version > reported_version AS counts"
    return rows_of(url, columns=f"{REFUSED}, {counts}")


@pytest.mark.repeats
@pytest.mark.parametrize("revision", ["078", "077", "075"])
def test_a_rollback_and_the_upgrade_after_it_lose_no_version_and_no_refusal(url: str, revision: str) -> None:
    before, history, schema = rows_of(url), rows_of(url, HISTORY), dump(url)

    downgrade(url, revision)
    assert len(rows_of(url, PARKED_REFUSALS)) == 2
    assert rows_of(url, HISTORY if revision == "078" else PARKED_HISTORY) == history
    upgrade(url)

    assert rows_of(url, HISTORY) == history
    # A refusal that does not count any more, of an acknowledged version, is not kept.
    changed = {*before} ^ {*rows_of(url)}
    assert {row.split(",")[2] for row in changed} == {"d3"}
    assert dump(url) == schema
    assert tables_of(url) == {"alembic_version_iot_models", "device_state", HISTORY}


def test_without_a_version_or_a_refusal_a_rollback_leaves_no_table(shadow_fleet_at_head: str) -> None:
    downgrade(shadow_fleet_at_head, "077")
    assert tables_of(shadow_fleet_at_head) == {"alembic_version_iot_models", "device_state"}


@pytest.mark.repeats
@partitioned.needs_one_piece("printed SQL refuses it")
def test_both_ways_by_printed_sql_end_in_the_same_result(url: str, make_empty: Callable[[], str]) -> None:
    other = make_empty()
    migrate.upgrade(other)
    run_sql(
        other,
        f"INSERT INTO device_state {_values(url, 'device_state')}",
        f"INSERT INTO {HISTORY} {_values(url, HISTORY)}",
    )
    assert state(other) == state(url)
    for command, revisions in (("downgrade", "079:077"), ("upgrade", "077:079")):
        getattr(migrate, command)(url, revisions[-3:])
        printed = psql(other, migrate.sql(revisions))
        assert printed.returncode == 0, printed.stderr
        assert state(other)[0] == state(url)[0]
        assert {t: rows for t, rows in state(other)[1].items() if "version" not in t} == {
            t: rows for t, rows in state(url)[1].items() if "version" not in t
        }


def _values(url: str, table: str) -> str:
    rows = ", ".join("'" + row.replace("'", "''") + "'" for row in rows_of(url, table))
    return f"SELECT (r::{table}).* FROM unnest(ARRAY[{rows}]) r"


@pytest.mark.repeats
def test_what_is_written_during_the_rollback_counts_and_the_refusal_before_it_does_not(url: str) -> None:
    downgrade(url, "078")
    run_sql(url, "UPDATE device_state SET desired_version = 9, shadow_updated_at = now() WHERE device_id = 'd1'")
    upgrade(url)
    assert [row.split(",")[1] for row in refusals(url) if row.endswith("t)")] == ["d2"]
    assert PARKED_REFUSALS not in tables_of(url)


@pytest.mark.repeats
def test_a_device_that_is_removed_and_made_again_during_the_rollback_has_refused_nothing(url: str) -> None:
    downgrade(url, "078")
    run_sql(url, """
        DELETE FROM device_state WHERE device_id IN ('d1', 'd2');
        INSERT INTO device_state (tenant_id, site_id, device_id, desired_version) VALUES ('globex', 's', 'd1', 8);
    """)  # fmt: skip
    upgrade(url)
    assert [row for row in refusals(url) if row.endswith("t)")] == []
    assert PARKED_REFUSALS not in tables_of(url)


@pytest.mark.repeats
def test_discarding_throws_away_history_and_refusals_too(url: str) -> None:
    migrate.downgrade(url, "075", shadow="discard")
    assert tables_of(url) == {"alembic_version_iot_models", "device_state"}


@pytest.mark.repeats
def test_dropping_the_table_drops_what_was_parked(url: str) -> None:
    downgrade(url, "075")
    with pytest.raises(CommandError, match="holds 10 rows"):
        migrate.downgrade(url, "base")
    migrate.downgrade(url, "base", device_state="drop")
    assert tables_of(url) == {"alembic_version_iot_models"}


@pytest.mark.repeats
def test_rows_that_stay_locked_keep_their_refusals_parked_until_the_command_is_run_again(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    downgrade(url, "078")
    monkeypatch.setattr("time.sleep", lambda _: None)
    with create_engine(url, poolclass=NullPool).begin() as other:
        other.execute(text("SELECT FROM device_state WHERE device_id = 'd1' FOR NO KEY UPDATE"))
        other.execute(text("SAVEPOINT s"))
        with pytest.raises(CommandError, match=r"1 rows of device_state stayed locked|no lock on device_state"):
            migrate.upgrade(url, lock_timeout="50ms")
    migrate.upgrade(url)
    assert len([row for row in refusals(url) if row.endswith("t)")]) == 2


@pytest.mark.repeats
def test_check_says_what_is_parked(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    downgrade(url, "077")
    assert migrate.main(["check", "--url", url]) == 1
    said = capsys.readouterr().err
    assert f"versions parked in {PARKED_HISTORY}: 8; the next upgrade puts them back" in said
    assert f"refusals parked in {PARKED_REFUSALS}: 2; the next upgrade puts them back" in said


# The rights.


def rights(url: str, role: str) -> str | None:
    query = f"""SELECT string_agg(privilege_type, ',' ORDER BY privilege_type)
                  FROM information_schema.role_table_grants WHERE grantee = '{role}' AND table_name = '{HISTORY}'"""
    ((found,),) = run_sql(url, query)
    return found if found is None else str(found)


@pytest.mark.repeats
@pytest.mark.parametrize(
    ("granted", "expected"),
    [
        ("GRANT SELECT, INSERT, UPDATE, DELETE ON device_state", "DELETE,INSERT,SELECT"),
        ("GRANT SELECT ON device_state", "SELECT"),
        ("GRANT SELECT, UPDATE (desired_state) ON device_state", "INSERT,SELECT"),
        ("GRANT SELECT, UPDATE (reported_state) ON device_state", "SELECT"),
        ("GRANT ALL ON device_state", "DELETE,INSERT,SELECT"),
        ("ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES", None),
    ],
)
def test_who_has_a_right_on_the_shadows_has_it_on_their_history_and_nobody_else_has(
    shadow_fleet_at_head: str, server_role: str, granted: str, expected: str | None
) -> None:
    url = shadow_fleet_at_head
    downgrade(url, "077")
    run_sql(url, f"{granted} TO {server_role}")
    upgrade(url)
    assert rights(url, server_role) == expected

    run_sql(url, f"INSERT INTO {HISTORY} VALUES ('acme', 'd', 1, '{{}}', now())")
    downgrade(url, "077")
    with pytest.raises(Exception, match="permission denied"):
        run_sql(as_role(url, server_role), f"SELECT FROM {PARKED_HISTORY}")
    upgrade(url)
    assert rights(url, server_role) == expected


@pytest.mark.repeats
def test_policies_are_copied_and_what_cannot_be_is_named(
    shadow_fleet_at_head: str, server_role: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = shadow_fleet_at_head
    downgrade(url, "077")
    run_sql(url, f"""
        ALTER TABLE device_state ENABLE ROW LEVEL SECURITY;
        CREATE POLICY "all of them" ON device_state FOR SELECT TO {server_role}, PUBLIC USING (true);
        CREATE POLICY mine ON device_state AS RESTRICTIVE TO {server_role} USING (tenant_id = 'acme') WITH CHECK (true);
        CREATE POLICY sites ON device_state TO {server_role} USING (site_id = 's0');
        GRANT SELECT ON device_state TO {server_role};
    """)  # fmt: skip
    upgrade(url)
    copied = [line for line in dump(url).splitlines() if "POLICY" in line and HISTORY in line]
    assert [line.split()[2] for line in copied] == ['"all', "mine"]
    assert f"policies of device_state are not on {HISTORY}" in caplog.text
    assert "does: sites. Create such policies there" in caplog.text
    run_sql(url, f"INSERT INTO {HISTORY} VALUES ('acme', 'd', 1, '{{}}', now()), ('globex', 'd', 1, '{{}}', now())")
    assert run_sql(as_role(url, server_role), f"SELECT tenant_id FROM {HISTORY}") == [("acme",)]


@pytest.mark.repeats
def test_where_a_restrictive_policy_cannot_be_copied_nobody_sees_more_than_before(
    shadow_fleet_at_head: str, server_role: str
) -> None:
    url = shadow_fleet_at_head
    downgrade(url, "077")
    run_sql(url, f"""
        ALTER TABLE device_state ENABLE ROW LEVEL SECURITY;
        CREATE POLICY everything ON device_state TO {server_role} USING (true);
        CREATE POLICY one_site ON device_state AS RESTRICTIVE TO {server_role} USING (site_id = 's0');
        GRANT SELECT ON device_state TO {server_role};
    """)  # fmt: skip
    upgrade(url)
    run_sql(url, f"INSERT INTO {HISTORY} VALUES ('acme', 'd', 1, '{{}}', now())")
    assert run_sql(as_role(url, server_role), f"SELECT FROM {HISTORY}") == []


# What stands in the way.


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (f"CREATE TABLE {HISTORY} (id int)", f"{HISTORY} is not the table that this migration expects"),
        (f"CREATE VIEW {HISTORY} AS SELECT 1", "it is no table"),
        (f"CREATE TYPE {HISTORY} AS ENUM ()", "a table's name is taken by type"),
    ],
)
def test_another_object_of_that_name_is_refused_before_any_change(raw_fleet: str, made: str, said: str) -> None:
    run_sql(raw_fleet, made)
    before = state(raw_fleet)
    with pytest.raises(CommandError, match=said):
        migrate.upgrade(raw_fleet)
    assert state(raw_fleet) == before


@pytest.mark.repeats
def test_a_view_of_the_history_is_named_before_a_rollback(url: str) -> None:
    run_sql(url, f"CREATE VIEW v AS SELECT * FROM {HISTORY}")
    before = state(url)
    with pytest.raises(CommandError, match=rf"(?s)depend on {HISTORY}, which this downgrade takes away.*DROP VIEW v"):
        migrate.downgrade(url, "077")
    assert state(url) == before


@pytest.mark.repeats
def test_a_history_that_was_made_while_another_was_parked_is_joined_with_it(url: str) -> None:
    history = rows_of(url, HISTORY)
    downgrade(url, "077")
    run_sql(url, f"CREATE TABLE {HISTORY} (LIKE {PARKED_HISTORY} INCLUDING ALL)",
            f"INSERT INTO {HISTORY} VALUES ('acme', 'other', 1, '{{}}', '2026-01-01')")  # fmt: skip
    upgrade(url)
    assert len(rows_of(url, HISTORY)) == len(history) + 1
    assert PARKED_HISTORY not in tables_of(url)


@pytest.mark.repeats
def test_old_code_during_the_rollback_leaves_a_gap_and_nothing_stands_for_it(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    downgrade(url, "077")
    run_sql(url, "UPDATE device_state SET desired_state = '{\"old\": 1}', desired_version = 10 WHERE device_id = 'd1'")
    with caplog.at_level(logging.INFO):
        upgrade(url)
    with Session(create_engine(url, poolclass=NullPool)) as session:
        service = ShadowService(session, "globex")
        service.patch_desired("d1", {})
        assert [v.version for v in service.history("d1")] == [11, 10, 8, 7]
        assert service.history("d1")[1].actor is None
