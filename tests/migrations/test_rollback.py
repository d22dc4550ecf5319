"""`alembic downgrade`: no shadow is lost unless an option says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from alembic.util import CommandError

from iot_models.testing import database
from tests.databases.alembic_runs import downgrade, upgrade
from tests.databases.schema_dump import dump
from tests.migrations.commands import alembic
from tests.migrations.raw_sql import (
    ADD_SHADOW,
    PARKED,
    RAW_075,
    SHADOW_COLUMNS,
    as_role,
    revision_of,
    rows_of,
    run_sql,
    tables_of,
)
from tests.migrations.revisions import HEAD

if TYPE_CHECKING:
    from iot_models.testing import PostgresServer

KEYED = f"tenant_id, device_id, {SHADOW_COLUMNS}"


@pytest.fixture(scope="module")
def raw_075(server: PostgresServer) -> str:
    """The dump of the deployment before any shadow."""
    with database(server) as url:
        run_sql(url, RAW_075)
        return dump(url)


@pytest.fixture
def url(shadow_fleet_at_head: str) -> str:
    """Ten devices at head, four of which have a shadow."""
    return shadow_fleet_at_head


def columns_of(url: str) -> list[str]:
    return [
        name
        for (name,) in run_sql(
            url, "SELECT column_name FROM information_schema.columns WHERE table_name = 'device_state'"
        )
    ]


def shadows(url: str) -> list[str]:
    return rows_of(url, columns=KEYED)


@pytest.mark.repeats
def test_if_no_shadow_was_ever_written_a_downgrade_leaves_exactly_the_schema_of_075(
    raw_fleet: str, raw_075: str
) -> None:
    before = rows_of(raw_fleet)
    upgrade(raw_fleet)

    downgrade(raw_fleet, "075")

    assert dump(raw_fleet) == raw_075
    assert rows_of(raw_fleet) == before


@pytest.mark.repeats
def test_shadows_come_back_bit_by_bit_and_the_parked_table_is_gone(url: str, raw_075: str, migrated_url: str) -> None:
    before, rows = shadows(url), rows_of(url)

    downgrade(url, "075")
    assert tables_of(url) == {"alembic_version_iot_models", "device_state", PARKED}
    assert len(rows_of(url, PARKED)) == 4
    assert dump(url).startswith(raw_075.split("ALTER TABLE ONLY", maxsplit=1)[0].rstrip())
    assert not set(SHADOW_COLUMNS.split(", ")) & set(columns_of(url))
    upgrade(url)

    assert shadows(url) == before
    assert rows_of(url) == rows
    assert dump(url) == dump(migrated_url)


@pytest.mark.repeats
def test_writes_and_deletions_between_downgrade_and_upgrade_are_kept(url: str) -> None:
    before = set(shadows(url))
    downgrade(url, "075")
    run_sql(url, """
        UPDATE device_state SET status = 'STALE', state = '{"new": true}' WHERE device_id = 'd1';
        DELETE FROM device_state WHERE device_id IN ('d2', 'd9');
        INSERT INTO device_state (tenant_id, site_id, device_id) VALUES ('acme', 's', 'new');
    """)  # fmt: skip

    run = alembic("upgrade", "head", DATABASE_URL=url)

    assert run.code == 0, run.err
    assert run_sql(url, "SELECT status, state FROM device_state WHERE device_id = 'd1'") == [("STALE", {"new": True})]
    now = set(shadows(url))
    assert {row.split(",")[1] for row in before - now} == {"d2", "d9"}
    assert {row.split(",")[1] for row in now - before} == {"new"}
    # d2 was deleted, and its shadow with it.
    assert PARKED not in tables_of(url)


@pytest.mark.repeats
def test_a_device_that_is_removed_and_registered_again_during_a_rollback_has_no_shadow(url: str) -> None:
    before = shadows(url)
    downgrade(url, "075")
    tenant = run_sql(url, "DELETE FROM device_state WHERE device_id = 'd2' RETURNING tenant_id")[0][0]
    run_sql(url, f"INSERT INTO device_state (tenant_id, site_id, device_id) VALUES ('{tenant}', 's', 'd2')")

    upgrade(url)

    changed = {*before} ^ {*shadows(url)}
    assert {row.split(",")[1] for row in changed} == {"d2"}
    assert f"({tenant},d2,{{}},{{}},0,0,)" in changed
    assert PARKED not in tables_of(url)


@pytest.mark.repeats
def test_the_shadow_of_a_device_that_is_renamed_during_a_rollback_goes_with_it(url: str) -> None:
    before = shadows(url)
    downgrade(url, "075")
    run_sql(url, "UPDATE device_state SET device_id = 'renamed' WHERE device_id = 'd2'")

    upgrade(url)

    assert shadows(url) == sorted(row.replace(",d2,", ",renamed,") for row in before)


@pytest.mark.repeats
def test_truncate_does_not_leave_the_shadows_of_devices_that_are_gone(url: str) -> None:
    downgrade(url, "075")
    with pytest.raises(Exception, match="cannot truncate a table referenced in a foreign key constraint"):
        run_sql(url, "TRUNCATE device_state")

    run_sql(url, f"TRUNCATE device_state, {PARKED}")
    upgrade(url)
    assert PARKED not in tables_of(url)


@pytest.mark.repeats
def test_a_table_that_was_parked_before_it_had_a_foreign_key_gets_one_at_the_next_downgrade(url: str) -> None:
    downgrade(url, "075")
    run_sql(
        url,
        f"ALTER TABLE {PARKED} DROP CONSTRAINT {PARKED}_tenant_id_device_id_fkey",
        "DELETE FROM device_state WHERE device_id = 'd1'",
    )
    upgrade(url)
    assert [row.split(",")[1] for row in rows_of(url, PARKED)] == ["d1"]

    downgrade(url, "075")
    assert {row.split(",")[1] for row in rows_of(url, PARKED)} == {"d2", "d3", "d4"}
    run_sql(url, "DELETE FROM device_state")
    assert rows_of(url, PARKED) == []


@pytest.mark.repeats
def test_a_parked_shadow_does_not_overwrite_a_newer_one(url: str) -> None:
    downgrade(url, "075")
    run_sql(
        url,
        ADD_SHADOW,
        """UPDATE device_state SET desired_state = '{"newer": 1}', desired_version = 1 WHERE device_id = 'd1'""",
    )
    upgrade(url)
    assert len(rows_of(url, PARKED)) == 1
    before = shadows(url)

    downgrade(url, "075")
    upgrade(url)

    assert shadows(url) == before
    assert any("newer" in row for row in before)


@pytest.mark.repeats
def test_shadows_are_discarded_only_with_the_option(url: str, raw_075: str) -> None:
    run = alembic("-x", "shadow=discard", "downgrade", "075", DATABASE_URL=url)

    assert run.code == 0, run.err
    assert dump(url) == raw_075
    upgrade(url)
    assert run_sql(url, "SELECT sum(desired_version) FROM device_state") == [(0,)]


@pytest.mark.repeats
@pytest.mark.parametrize("option", ["shadow=park", "shadow=", "shadow", "shadwo=discard", "device_state=yes", "lock_timeout=0", "lock_timeout=4", "lock_timeout=4s; DROP TABLE x"])  # fmt: skip
def test_an_option_that_is_misspelt_is_refused_and_not_ignored(url: str, option: str) -> None:
    before = rows_of(url)

    run = alembic("-x", option, "downgrade", "075", DATABASE_URL=url)

    assert run.code != 0
    assert f"-x {option.split('=', maxsplit=1)[0]}" in run.out + run.err
    assert rows_of(url) == before


def test_a_downgrade_to_base_refuses_to_drop_rows_unless_an_option_says_so(url: str) -> None:
    before = len(rows_of(url))
    with pytest.raises(CommandError, match=r"device_state holds 10 rows.*-x device_state=drop"):
        downgrade(url, "base")
    assert len(rows_of(url)) == before
    assert revision_of(url) == HEAD
    assert PARKED not in tables_of(url)

    run = alembic("-x", "device_state=drop", "downgrade", "base", DATABASE_URL=url)
    assert run.code == 0, run.err
    assert tables_of(url) == {"alembic_version_iot_models"}


@pytest.mark.repeats
def test_a_downgrade_to_base_refuses_to_drop_parked_shadows_too(url: str) -> None:
    downgrade(url, "075")
    # As logical replication does it, without a cascade.
    run_sql(url, "SET session_replication_role = replica; DELETE FROM device_state")

    with pytest.raises(CommandError, match="device_state_shadow_076 holds 4 rows"):
        downgrade(url, "base")
    assert len(rows_of(url, PARKED)) == 4


def test_a_downgrade_to_base_drops_an_empty_table(at_head: str) -> None:
    downgrade(at_head, "base")

    assert tables_of(at_head) == {"alembic_version_iot_models"}


@pytest.mark.repeats
def test_another_table_with_the_name_of_the_parked_one_stops_the_downgrade(url: str) -> None:
    downgrade(url, "076")
    run_sql(url, f"CREATE TABLE {PARKED} (note text)")
    before = rows_of(url)
    with pytest.raises(
        CommandError, match=r"device_state_shadow_076 is not the table.*(?s:.)*column desired_state is missing"
    ):
        downgrade(url, "075")
    assert rows_of(url) == before


@pytest.mark.repeats
def test_a_downgrade_fails_if_a_policy_hides_rows_from_it(url: str, server_role: str) -> None:
    downgrade(url, "076")
    before = rows_of(url)
    run_sql(url, f"""
        ALTER TABLE device_state OWNER TO {server_role};
        ALTER TABLE alembic_version_iot_models OWNER TO {server_role};
        ALTER SCHEMA public OWNER TO {server_role};
        ALTER TABLE device_state ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
        CREATE POLICY one ON device_state USING (device_id = 'd1');
    """)  # fmt: skip

    with pytest.raises(CommandError, match="row-level security policy"):
        downgrade(as_role(url, server_role), "075")
    assert rows_of(url) == before


@pytest.mark.repeats
def test_a_trigger_that_suppresses_updates_does_not_lose_parked_shadows(url: str) -> None:
    downgrade(url, "075")
    parked = rows_of(url, PARKED)
    run_sql(url, """
        CREATE FUNCTION own_skip() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
        CREATE TRIGGER own_skip BEFORE UPDATE ON device_state FOR EACH ROW EXECUTE FUNCTION own_skip();
    """)  # fmt: skip

    with pytest.raises(
        CommandError, match="a trigger or rule on device_state keeps parked shadows from being put back"
    ):
        upgrade(url)
    assert rows_of(url, PARKED) == parked

    run_sql(url, "ALTER TABLE device_state DISABLE TRIGGER own_skip")
    upgrade(url)
    assert PARKED not in tables_of(url)
    assert len({row for row in shadows(url) if "52.12345678901234567890" in row}) == 3
