"""A `device_state` that Citus has distributed: migrated up and down, online and by printed SQL, and checked."""

from __future__ import annotations

import threading

import pytest
from alembic.util import CommandError
from sqlalchemy import text
from sqlalchemy.orm import Session

from iot_models import ShadowService, migrate
from iot_models._migrations import operations
from tests.databases.backends import connected
from tests.distributed.conftest import execute
from tests.migrations import raw_sql
from tests.migrations.commands import migrate as run
from tests.migrations.raw_sql import FLEET, PARKED, RAW_076, SHADOWS, VERSIONS, rows_of, run_sql

PENDING = "idx_device_state_shadow_pending"


@pytest.fixture
def shadow_fleet(fleet: str) -> str:
    """The fleet at head, with shadows, a version and a refusal."""
    migrate.upgrade(fleet)
    execute(fleet, *(statement for statement in (SHADOWS + VERSIONS).split(";") if statement.strip()))
    return fleet


def groups(url: str) -> dict[object, object]:
    """The tables of this schema that are distributed, and with which others their rows are together."""
    return dict(
        execute(
            url,
            """SELECT CAST(c.relname AS text), colocationid FROM pg_dist_partition JOIN pg_class c ON c.oid = logicalrelid
                WHERE c.relnamespace = CAST(current_schema() AS regnamespace)""",
        )  # type: ignore[arg-type]
    )


def test_an_upgrade_distributes_the_history_beside_the_table(fleet: str) -> None:
    before = rows_of(fleet, columns="tenant_id, device_id, state, last_seen_at")
    migrate.upgrade(fleet)
    assert migrate.check(fleet) == []
    assert rows_of(fleet, columns="tenant_id, device_id, state, last_seen_at") == before
    found = groups(fleet)
    assert set(found) == {"device_state", "device_shadow_history"}
    assert len({*found.values()}) == 1


def test_everything_is_parked_and_put_back_to_the_last_digit_twice(shadow_fleet: str) -> None:
    before, history = rows_of(shadow_fleet), rows_of(shadow_fleet, "device_shadow_history")
    for _ in range(2):
        migrate.downgrade(shadow_fleet, "075")
        assert len(groups(shadow_fleet)) == 4
        assert len({*groups(shadow_fleet).values()}) == 1
        assert len(rows_of(shadow_fleet, PARKED)) == 4
        migrate.upgrade(shadow_fleet)
        assert rows_of(shadow_fleet) == before
        assert rows_of(shadow_fleet, "device_shadow_history") == history
        assert migrate.check(shadow_fleet) == []


def test_printed_sql_does_so_too_in_both_directions_and_twice(shadow_fleet: str) -> None:
    before = rows_of(shadow_fleet)
    for revisions in ("head:075", "075:head", "head:075", "075:head"):
        done = raw_sql.psql(shadow_fleet, run("sql", revisions).out)
        assert done.returncode == 0, done.stderr
    assert rows_of(shadow_fleet) == before
    assert migrate.check(shadow_fleet) == []


def test_printed_sql_leaves_no_index_invalid_that_is_there_already(schema: str) -> None:
    run_sql(schema, RAW_076)
    execute(schema, "SELECT create_distributed_table('device_state', 'tenant_id', shard_count => 4)", FLEET)
    migrate.upgrade(schema, "075")
    done = raw_sql.psql(schema, run("sql", "075:head").out)
    assert done.returncode == 0, done.stderr
    assert migrate.check(schema) == []


def test_writers_lose_nothing_while_the_shadows_are_parked_and_put_back(shadow_fleet: str) -> None:
    """One writer of desired documents until its columns are gone; its last version is the parked one."""
    written = 0
    stop = threading.Event()

    def write() -> None:
        nonlocal written
        with connected(shadow_fleet, isolation_level="AUTOCOMMIT") as connection:
            while not stop.is_set():
                try:
                    connection.execute(
                        text(
                            "UPDATE device_state SET desired_version = :n WHERE (tenant_id, device_id) = ('acme', 'd2')"
                        ),
                        {"n": written + 1},
                    )
                except Exception:  # noqa: BLE001 - the column has gone
                    return
                written += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        migrate.downgrade(shadow_fleet, "075")
    finally:
        stop.set()
        writer.join()
    assert execute(shadow_fleet, f"SELECT desired_version FROM {PARKED} WHERE device_id = 'd2'") == [(written,)]
    migrate.upgrade(shadow_fleet)
    assert execute(shadow_fleet, "SELECT desired_version FROM device_state WHERE device_id = 'd2'") == [(written,)]


def test_an_interrupted_downgrade_is_finished_or_taken_back(shadow_fleet: str) -> None:
    before = rows_of(shadow_fleet)
    with connected(shadow_fleet) as connection:
        raw_sql.interrupt_a_downgrade(connection.engine)
    assert any("was interrupted" in problem for problem in migrate.check(shadow_fleet))
    migrate.upgrade(shadow_fleet)
    assert PARKED not in groups(shadow_fleet)
    assert rows_of(shadow_fleet) == before


def test_a_lock_held_through_a_worker_is_given_up_in_time_and_named(
    fleet: str, worker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "_FIRST_PAUSE", 0.01)
    with connected(worker) as holder:
        holder.execute(text("UPDATE device_state SET state = '{}' WHERE tenant_id = 'acme'"))
        with pytest.raises(CommandError, match=r"no lock on device_state .* a transaction on a worker"):
            migrate.upgrade(fleet, lock_timeout="200ms")
        holder.rollback()
    migrate.upgrade(fleet)
    assert migrate.check(fleet) == []


def test_a_worker_says_where_to_ask(shadow_fleet: str, worker: str) -> None:
    at = execute(shadow_fleet, "SELECT nodename || ':' || nodeport FROM pg_dist_node WHERE groupid = 0")[0][0]
    (problem,) = migrate.check(worker)
    assert problem.endswith(f"is on a worker of a Citus cluster, and its revision on the coordinator: check {at}")
    with pytest.raises(CommandError, match=f"whose coordinator is {at}; nothing was changed. Migrate there"):
        migrate.upgrade(worker)


def test_unsafe_triggers_change_nothing(shadow_fleet: str) -> None:
    before = rows_of(shadow_fleet)
    unsafe = f"{shadow_fleet}%20-ccitus.enable_unsafe_triggers%3Don"
    migrate.downgrade(unsafe, "075")
    assert execute(shadow_fleet, "SELECT tgname FROM pg_trigger WHERE tgname LIKE 'device_state_shadow%'") == []
    migrate.upgrade(unsafe)
    assert rows_of(shadow_fleet) == before
    assert migrate.check(unsafe) == []


def test_an_index_that_citus_marked_invalid_is_mended_as_check_says(shadow_fleet: str) -> None:
    execute(
        shadow_fleet,
        f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {PENDING} ON device_state (tenant_id) "
        "WHERE desired_version > reported_version",
    )
    (problem,) = migrate.check(shadow_fleet)
    assert f"REINDEX INDEX CONCURRENTLY {PENDING} mends it" in problem
    execute(shadow_fleet, f"REINDEX INDEX CONCURRENTLY {PENDING}")
    assert migrate.check(shadow_fleet) == []


def test_a_history_that_was_not_distributed_is_named_with_the_statement_that_does(schema: str) -> None:
    migrate.upgrade(schema)
    execute(schema, "SELECT create_distributed_table('device_state', 'tenant_id', shard_count => 4)")
    (problem,) = migrate.check(schema)
    execute(schema, problem.partition(": ")[2])
    assert migrate.check(schema) == []


def test_rights_and_policies_reach_the_history(fleet: str) -> None:
    execute(
        fleet,
        "ALTER TABLE device_state ENABLE ROW LEVEL SECURITY",
        "CREATE POLICY one ON device_state USING (tenant_id = current_setting('app.tenant', true))",
        "GRANT SELECT, UPDATE ON device_state TO pg_monitor",
    )
    migrate.upgrade(fleet)
    granted = execute(
        fleet,
        """SELECT string_agg(a.privilege_type, ',' ORDER BY 1) FROM pg_class c, aclexplode(c.relacl) a
            WHERE c.oid = 'device_shadow_history'::regclass AND a.grantee = 'pg_monitor'::regrole""",
    )
    assert granted == [("INSERT,SELECT",)]
    assert execute(fleet, "SELECT polname FROM pg_policy WHERE polrelid = 'device_shadow_history'::regclass") == [
        ("one",)
    ]


def test_the_service_works_after_it(fleet: str) -> None:
    migrate.upgrade(fleet)
    with connected(fleet) as connection, Session(connection) as session:
        shadows = ShadowService(session, "acme")
        assert shadows.replace_desired("d2", {"mode": "eco"}).desired_version == 1
        assert [version.version for version in shadows.history("d2")] == [1, 0]
        session.commit()
