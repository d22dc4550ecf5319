"""A `device_state` that a team has partitioned: adopted, migrated up and down, parked and put back, checked."""

from __future__ import annotations

import re
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic.util import CommandError
from sqlalchemy import NullPool, create_engine, event, text

from iot_models import migrate
from iot_models._migrations import operations
from tests.databases import partitioned
from tests.databases.alembic_runs import CHECKOUT, downgrade, upgrade
from tests.databases.backends import connected
from tests.databases.partitioned import LEAVES, RAW_075_PARTITIONED
from tests.databases.schema_dump import dump
from tests.migrations import raw_sql
from tests.migrations.commands import migrate as run
from tests.migrations.raw_sql import (
    FLEET,
    PARKED,
    SHADOWS,
    VERSIONS,
    as_role,
    rows_of,
    run_sql,
    state,
    tables_of,
)

PENDING = "idx_device_state_shadow_pending"


class CutError(Exception):
    """The migration ends here."""


@pytest.fixture
def fleet(empty: str) -> str:
    """A deployment before shadows, with partitions, and partitions of one of them."""
    run_sql(empty, RAW_075_PARTITIONED + FLEET)
    return empty


@pytest.fixture
def shadow_fleet(fleet: str) -> str:
    """The same at head, with shadows, a version and a refusal."""
    upgrade(fleet)
    run_sql(fleet, SHADOWS, VERSIONS)
    return fleet


def indexes_of(url: str, table: str) -> list[tuple[str, bool]]:
    """The indexes of a table: from USING on, and whether each is valid and belongs to one of the whole table."""
    return run_sql(
        url,
        f"""SELECT regexp_replace(pg_get_indexdef(i.indexrelid), '^.* USING ', ''), i.indisvalid AND c.relispartition
              FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE i.indrelid = '{table}'::regclass ORDER BY 1""",
    )


def fillfactors(url: str) -> dict[str, object]:
    names = ", ".join(f"'{leaf}'" for leaf in LEAVES)
    return dict(run_sql(url, f"SELECT relname, reloptions FROM pg_class WHERE relname IN ({names}) ORDER BY 1"))


def test_a_partitioned_table_is_adopted_and_ends_with_every_row_and_index(fleet: str) -> None:
    before = rows_of(fleet)
    upgrade(fleet)
    assert migrate.check(fleet) == []
    assert [row.split(",(")[0][:20] for row in rows_of(fleet)] == [row[:20] for row in before]
    whole = {definition for definition, _ in indexes_of(fleet, "device_state")}
    for leaf in LEAVES:
        assert {definition for definition, _ in indexes_of(fleet, leaf)} == whole
        assert all(joined for _, joined in indexes_of(fleet, leaf))
    assert fillfactors(fleet) == {leaf: ["fillfactor=75"] for leaf in LEAVES}


def test_a_partition_that_is_added_later_has_all_of_it(empty: str) -> None:
    run_sql(
        empty,
        RAW_075_PARTITIONED.partition("CREATE TABLE device_state_p0")[0].replace("BY HASH", "BY LIST"),
        "CREATE TABLE acme PARTITION OF device_state FOR VALUES IN ('acme')",
    )
    upgrade(empty)
    run_sql(empty, "CREATE TABLE globex PARTITION OF device_state FOR VALUES IN ('globex')")
    assert indexes_of(empty, "globex") == indexes_of(empty, "acme")
    run_sql(empty, FLEET, SHADOWS)
    assert migrate.check(empty) == []
    before = rows_of(empty)
    downgrade(empty, "075")
    assert len(rows_of(empty, PARKED)) == 4
    run_sql(empty, "CREATE TABLE initech PARTITION OF device_state FOR VALUES IN ('initech')")
    upgrade(empty)
    assert rows_of(empty) == before


def test_shadows_history_and_refusals_are_parked_and_put_back_to_the_last_digit(shadow_fleet: str) -> None:
    before, history = rows_of(shadow_fleet), rows_of(shadow_fleet, "device_shadow_history")
    downgrade(shadow_fleet, "075")
    assert len(rows_of(shadow_fleet, PARKED)) == 4
    upgrade(shadow_fleet)
    assert rows_of(shadow_fleet) == before
    assert rows_of(shadow_fleet, "device_shadow_history") == history
    assert PARKED not in tables_of(shadow_fleet)


def test_going_back_leaves_the_partitioned_table_of_075(fleet: str) -> None:
    upgrade(fleet, "075")
    before = state(fleet)
    upgrade(fleet)
    downgrade(fleet, "075")
    assert state(fleet) == before


def test_a_team_s_own_fillfactor_of_a_partition_is_kept(fleet: str) -> None:
    run_sql(fleet, "ALTER TABLE device_state_p0 SET (fillfactor = 60)")
    upgrade(fleet)
    downgrade(fleet, "075")
    assert fillfactors(fleet) == {**dict.fromkeys(LEAVES), "device_state_p0": ["fillfactor=60"]}


def test_a_write_while_the_shadows_are_copied_is_parked_whichever_way_it_names_the_table(shadow_fleet: str) -> None:
    engine = create_engine(shadow_fleet, poolclass=NullPool)
    written = []

    def write(_c: object, _cursor: object, statement: str, *_rest: object) -> None:
        if "ENABLE ALWAYS TRIGGER" in statement:
            written.append(True)
        elif written == [True] and "WITH page" in statement:
            written.append(True)
            run_sql(shadow_fleet, "UPDATE device_state SET desired_version = 70 WHERE device_id = 'd1'")
            for leaf in LEAVES:
                run_sql(shadow_fleet, f"UPDATE {leaf} SET desired_version = 80 WHERE device_id = 'd2'")

    event.listen(engine, "before_cursor_execute", write)
    migrate.downgrade(engine, "075")
    versions = run_sql(shadow_fleet, f"SELECT device_id, desired_version FROM {PARKED} ORDER BY 1")
    assert versions == [("d1", 70), ("d2", 80), ("d3", 7), ("d4", 0)]


@pytest.mark.parametrize("after", ["ON ONLY device_state USING", "CONCURRENTLY ON device_state_p1", "ATTACH PARTITION"])
def test_an_interrupted_build_goes_on_where_it_was(fleet: str, after: str) -> None:
    engine = create_engine(fleet, poolclass=NullPool)

    def cut(_c: object, _cursor: object, statement: str, *_rest: object) -> None:
        if after in statement and ("shadow_pending " in statement or "desired_version > reported" in statement):
            raise CutError

    event.listen(engine, "after_cursor_execute", cut)
    with pytest.raises(CutError):
        migrate.upgrade(engine)
    upgrade(fleet)
    assert migrate.check(fleet) == []


def test_an_invalid_index_of_a_partition_is_built_again(fleet: str) -> None:
    upgrade(fleet, "076")
    downgrade(fleet, "075")
    engine = create_engine(fleet, poolclass=NullPool)
    made = threading.Event()

    def spoil(_c: object, _cursor: object, statement: str, *_rest: object) -> None:
        if "CONCURRENTLY ON device_state_p1" in statement and not made.is_set():
            made.set()
            run_sql(
                fleet,
                "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'device_state_p1_tenant_id_idx'::regclass",
            )
            raise CutError

    event.listen(engine, "after_cursor_execute", spoil)
    with pytest.raises(CutError):
        migrate.upgrade(engine)
    upgrade(fleet)
    assert migrate.check(fleet) == []


def test_a_lock_on_one_partition_is_waited_for_in_tries_and_its_holder_named(
    fleet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "_FIRST_PAUSE", 0.01)
    upgrade(fleet, "075")
    with connected(fleet) as holder:
        holder.execute(text("SELECT * FROM device_state_p1"))
        pid = holder.scalar(text("SELECT pg_backend_pid()"))
        with pytest.raises(CommandError, match=rf"no lock on device_state .*pid {pid} "):
            migrate.upgrade(fleet, lock_timeout="50ms")
    upgrade(fleet)
    assert migrate.check(fleet) == []


def test_writers_of_the_table_go_on_while_the_indexes_are_built(fleet: str) -> None:
    """Each build waits for this writer, and lets others through."""
    upgrade(fleet, "076")
    with ThreadPoolExecutor(1) as pool, connected(fleet) as writer:
        writer.execute(text("UPDATE device_state_p0 SET state = '{}'"))
        building = pool.submit(upgrade, fleet)
        while not run_sql(fleet, "SELECT pid FROM pg_stat_progress_create_index"):
            run_sql(fleet, "UPDATE device_state SET site_id = 's' WHERE device_id = 'd9'")
        writer.rollback()
        building.result(timeout=60)
    assert migrate.check(fleet) == []


# What would stop it is said before.

STOPS = {
    "CREATE VIEW v AS SELECT desired_state FROM device_state_p1": "view v (DROP VIEW v)",
    "CREATE INDEX own ON device_state_p2a (desired_version)": "index own (DROP INDEX own)",
    "CREATE INDEX own ON device_state (desired_version)": "index own (DROP INDEX own)",
    "ALTER TABLE device_state ADD CONSTRAINT positive CHECK (desired_version >= 0)": "constraint positive",
}


@pytest.mark.parametrize("made", STOPS)
def test_what_depends_on_a_partition_stops_a_downgrade_before_any_change(shadow_fleet: str, made: str) -> None:
    run_sql(shadow_fleet, made)
    before = state(shadow_fleet)
    with pytest.raises(CommandError) as caught:
        migrate.downgrade(shadow_fleet, "075")
    assert STOPS[made] in str(caught.value)
    assert str(caught.value).count("\n  - ") == 1  # once, and nothing that a partition has from the table
    assert state(shadow_fleet) == before


def test_a_partition_of_another_owner_is_named(fleet: str, server_role: str) -> None:
    run_sql(
        fleet,
        f"GRANT USAGE, CREATE ON SCHEMA public TO {server_role}",
        *(f"ALTER TABLE {table} OWNER TO {server_role}" for table in ("device_state", *LEAVES[1:], "device_state_p2")),
    )
    with pytest.raises(CommandError, match="it does not own device_state_p0"):
        migrate.upgrade(as_role(fleet, server_role))


def test_a_right_to_make_triggers_on_a_partition_stops_putting_back(shadow_fleet: str, server_role: str) -> None:
    downgrade(shadow_fleet, "075")
    run_sql(shadow_fleet, f"GRANT TRIGGER ON device_state_p0 TO {server_role}")
    with pytest.raises(CommandError, match="REVOKE TRIGGER ON device_state_p0 FROM"):
        migrate.upgrade(shadow_fleet)


def test_an_index_that_a_partition_lacks_is_a_difference_with_its_remedy(shadow_fleet: str) -> None:
    run_sql(
        shadow_fleet,
        f"DROP INDEX {PENDING}",
        f"CREATE INDEX {PENDING} ON ONLY device_state (tenant_id) WHERE desired_version > reported_version",
    )
    (problem,) = migrate.check(shadow_fleet)
    assert f"index {PENDING} is INVALID" in problem
    assert f"ALTER INDEX {PENDING} ATTACH PARTITION" in problem


def test_an_index_that_the_table_lacks_is_named_with_the_way_to_it(shadow_fleet: str) -> None:
    run_sql(shadow_fleet, f"DROP INDEX {PENDING}")
    (problem,) = migrate.check(shadow_fleet)
    whole = re.search(rf"CREATE INDEX {PENDING} ON ONLY device_state USING [^;]*?(?=, then)", problem)
    assert whole is not None
    run_sql(shadow_fleet, whole[0])
    for table in ("device_state_p0", "device_state_p1", "device_state_p2"):
        run_sql(shadow_fleet, whole[0].replace(f"{PENDING} ON ONLY device_state", f"own_{table} ON {table}"))
        run_sql(shadow_fleet, f"ALTER INDEX {PENDING} ATTACH PARTITION own_{table}")
    assert "then CREATE INDEX CONCURRENTLY on each partition" in problem
    assert migrate.check(shadow_fleet) == []


def test_printed_sql_refuses_the_upgrade_before_any_change_and_does_the_downgrade(shadow_fleet: str) -> None:
    done = raw_sql.psql(shadow_fleet, run("sql", "head:075").out)
    assert done.returncode == 0, done.stderr
    before = dump(shadow_fleet)
    done = raw_sql.psql(shadow_fleet, run("sql", "075:head").out)
    assert (
        "device_state is partitioned, and printed SQL builds no indexes on partitions: migrate it online" in done.stderr
    )
    assert dump(shadow_fleet) == before
    upgrade(shadow_fleet)
    assert run_sql(shadow_fleet, "SELECT sum(desired_version) FROM device_state") == [(21,)]


# The way of the runbook.


@partitioned.needs_one_piece("the way to it begins with a plain one")
def test_the_runbook_partitions_a_plain_table_while_devices_report(shadow_fleet_at_head: str) -> None:
    url = shadow_fleet_at_head
    page = (
        (CHECKOUT / "docs" / "migrations.md").read_text().partition("### From a plain table")[2].partition("\n## ")[0]
    )
    make, fill, swap = (textwrap.dedent(block) for block in re.findall(r"```sql\n(.*?)```", page, re.DOTALL))
    for step, meanwhile in (
        (make, "UPDATE device_state SET site_id = 'moved' WHERE device_id IN ('d1', 'd2')"),
        (fill, "DELETE FROM device_state WHERE device_id = 'd3'"),
        (fill, "UPDATE device_state SET desired_version = 8 WHERE device_id = 'd2'"),
    ):
        done = raw_sql.psql(url, step)
        assert done.returncode == 0, done.stderr
        run_sql(url, meanwhile)
    before = rows_of(url)
    done = raw_sql.psql(url, swap)
    assert done.returncode == 0, done.stderr
    assert migrate.check(url) == []
    assert rows_of(url) == before
    assert run_sql(url, "SELECT relkind = 'p' FROM pg_class WHERE oid = 'device_state'::regclass") == [(True,)]
    run_sql(url, "DROP SCHEMA device_state_next, device_state_before CASCADE")
    downgrade(url, "075")
    upgrade(url)
    assert rows_of(url) == before


# The history.


def test_a_partitioned_history_is_parked_and_taken_back_with_its_partitions(shadow_fleet: str) -> None:
    run_sql(
        shadow_fleet,
        """
        ALTER TABLE device_shadow_history RENAME TO history_p0;
        CREATE TABLE device_shadow_history (LIKE history_p0 INCLUDING DEFAULTS INCLUDING COMMENTS)
          PARTITION BY HASH (tenant_id);
        COMMENT ON TABLE device_shadow_history IS 'The desired documents of device_state, a row for each version. Never changed.';
        ALTER INDEX idx_device_shadow_history_request RENAME TO history_p0_request;
        ALTER INDEX idx_device_shadow_history_written RENAME TO history_p0_written;
        ALTER INDEX idx_device_shadow_history_changes RENAME TO history_p0_changes;
        ALTER INDEX device_shadow_history_pkey RENAME TO history_p0_pkey;
        ALTER TABLE device_shadow_history ADD PRIMARY KEY (tenant_id, device_id, desired_version);
        CREATE UNIQUE INDEX idx_device_shadow_history_request ON device_shadow_history (tenant_id, device_id, request_id)
          WHERE request_id IS NOT NULL;
        CREATE INDEX idx_device_shadow_history_written ON device_shadow_history (tenant_id, written_at);
        CREATE INDEX idx_device_shadow_history_changes
          ON device_shadow_history (tenant_id, transaction_id, device_id, desired_version);
        ALTER TABLE device_shadow_history ATTACH PARTITION history_p0 FOR VALUES WITH (MODULUS 1, REMAINDER 0);
        """,
    )
    assert migrate.check(shadow_fleet) == []
    rows = rows_of(shadow_fleet, "device_shadow_history")
    downgrade(shadow_fleet, "077")
    assert "versions parked in device_shadow_history_078: 1" in run("check", IOT_MODELS_DATABASE_URL=shadow_fleet).err
    upgrade(shadow_fleet)
    assert rows_of(shadow_fleet, "history_p0") == rows
    assert migrate.check(shadow_fleet) == []


def test_a_device_renamed_or_removed_while_parked_takes_its_shadow_with_it(shadow_fleet: str) -> None:
    downgrade(shadow_fleet, "075")
    run_sql(shadow_fleet, "DELETE FROM device_state WHERE device_id = 'd1'")
    run_sql(shadow_fleet, "UPDATE device_state SET tenant_id = 'other', device_id = 'e2' WHERE device_id = 'd2'")
    upgrade(shadow_fleet)
    found = run_sql(shadow_fleet, "SELECT tenant_id, device_id FROM device_state WHERE desired_version = 7 ORDER BY 2")
    assert found == [("globex", "d3"), ("other", "e2")]
