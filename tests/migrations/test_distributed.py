"""The way of a migration where Citus has distributed `device_state`, on a PostgreSQL that only says so.

What Citus itself does with these statements is asked in tests/distributed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from alembic.util import CommandError
from sqlalchemy import NullPool, create_engine, event, text

from iot_models import migrate
from iot_models._migrations import operations
from tests.databases.backends import connected
from tests.databases.partitioned import RAW_075_PARTITIONED
from tests.databases.pretended_citus import pretend_citus, set_citus
from tests.migrations import raw_sql
from tests.migrations.commands import migrate as run
from tests.migrations.raw_sql import FLEET, PARKED, PLAIN_075, SHADOWS, VERSIONS, rows_of, run_sql, state, tables_of

if TYPE_CHECKING:
    from collections.abc import Callable

DISTRIBUTE = "SELECT create_distributed_table('device_state', 'tenant_id')"


@pytest.fixture
def fleet(new_database: Callable[[], str]) -> str:
    """A deployment before shadows, distributed."""
    url = new_database()
    pretend_citus(url)
    run_sql(url, PLAIN_075 + FLEET, DISTRIBUTE)
    return url


@pytest.fixture
def shadow_fleet(fleet: str) -> str:
    """The same at head, with shadows, a version and a refusal."""
    migrate.upgrade(fleet)
    run_sql(fleet, SHADOWS, VERSIONS)
    return fleet


def distributed(url: str) -> set[str]:
    return {row[0] for row in run_sql(url, "SELECT CAST(logicalrelid AS text) FROM pg_dist_partition")}


def test_the_history_is_distributed_beside_the_table(fleet: str) -> None:
    migrate.upgrade(fleet)
    assert distributed(fleet) == {"device_state", "device_shadow_history"}
    assert migrate.check(fleet) == []


def test_everything_is_parked_beside_the_table_and_put_back_to_the_last_digit(shadow_fleet: str) -> None:
    before, history = rows_of(shadow_fleet), rows_of(shadow_fleet, "device_shadow_history")
    for _ in range(2):
        migrate.downgrade(shadow_fleet, "075")
        assert distributed(shadow_fleet) == {
            "device_state", PARKED, "device_shadow_history_078", "device_state_refusals_079"
        }  # fmt: skip
        assert len(rows_of(shadow_fleet, PARKED)) == 4
        migrate.upgrade(shadow_fleet)
        assert rows_of(shadow_fleet) == before
        assert rows_of(shadow_fleet, "device_shadow_history") == history


def test_many_tenants_and_more_than_a_page_of_one_are_put_back(fleet: str) -> None:
    migrate.upgrade(fleet)
    run_sql(
        fleet,
        """
        INSERT INTO device_state (tenant_id, site_id, device_id, desired_state, desired_version, shadow_updated_at,
                                  refused_version, refusal)
        SELECT 't' || n % 7, 's', 'd' || n, '{"a": 1}', 3, now(), 3, 'no' FROM generate_series(1, 3000) n
        """,
    )
    before = rows_of(fleet)
    migrate.downgrade(fleet, "075")
    migrate.upgrade(fleet)
    assert rows_of(fleet) == before


def test_what_is_written_while_the_shadows_are_copied_is_parked(shadow_fleet: str) -> None:
    engine = create_engine(shadow_fleet, poolclass=NullPool)

    def write(_c: object, _cursor: object, statement: str, *_rest: object) -> None:
        if "LOCK TABLE device_state IN ACCESS EXCLUSIVE" in statement and PARKED in tables_of(shadow_fleet):
            run_sql(
                shadow_fleet,
                "UPDATE device_state SET desired_version = 70 WHERE device_id = 'd1'",
                "UPDATE device_state SET reported_state = '{}' WHERE device_id = 'd4'",  # as if never written
                "DELETE FROM device_state WHERE device_id = 'd2'",
                "UPDATE device_state SET desired_version = 1 WHERE device_id = 'd5'",
            )

    event.listen(engine, "before_cursor_execute", write)
    migrate.downgrade(engine, "075")
    versions = run_sql(shadow_fleet, f"SELECT device_id, desired_version FROM {PARKED} ORDER BY 1")
    assert versions == [("d1", 70), ("d3", 7), ("d5", 1)]


def test_an_interrupted_downgrade_is_seen_without_a_trigger_and_taken_back_by_the_next_upgrade(
    shadow_fleet: str,
) -> None:
    before = rows_of(shadow_fleet)
    raw_sql.interrupt_a_downgrade(create_engine(shadow_fleet, poolclass=NullPool))
    problems = migrate.check(shadow_fleet)
    assert any(f"was interrupted (table {PARKED})" in problem for problem in problems)
    migrate.upgrade(shadow_fleet)
    assert PARKED not in tables_of(shadow_fleet)
    assert rows_of(shadow_fleet) == before
    raw_sql.interrupt_a_downgrade(create_engine(shadow_fleet, poolclass=NullPool))
    migrate.downgrade(shadow_fleet, "075")
    migrate.upgrade(shadow_fleet)
    assert rows_of(shadow_fleet) == before


def test_without_shadows_nothing_is_left_parked(fleet: str) -> None:
    migrate.upgrade(fleet, "075")
    before = state(fleet)
    migrate.upgrade(fleet)
    migrate.downgrade(fleet, "075")
    assert state(fleet) == before


def test_printed_sql_does_the_same_in_both_directions_and_twice(shadow_fleet: str) -> None:
    before = rows_of(shadow_fleet)
    for revisions in ("head:075", "075:head", "head:075", "075:head"):
        done = raw_sql.psql(shadow_fleet, run("sql", revisions).out)
        assert done.returncode == 0, done.stderr
    assert rows_of(shadow_fleet) == before
    assert distributed(shadow_fleet) == {"device_state", "device_shadow_history"}
    assert migrate.check(shadow_fleet) == []


def test_shadows_can_be_discarded(shadow_fleet: str) -> None:
    migrate.downgrade(shadow_fleet, "075", shadow="discard")
    assert tables_of(shadow_fleet) == {"device_state", "alembic_version_iot_models"}


def test_the_lock_timeout_reaches_the_workers(fleet: str) -> None:
    engine = create_engine(fleet, poolclass=NullPool)
    found = []

    def look(connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        if "LOCK TABLE device_state" in statement:
            cursor = connection.connection.cursor()  # type: ignore[attr-defined]
            cursor.execute("SHOW citus.propagate_set_commands")
            found.append(cursor.fetchone()[0])

    event.listen(engine, "before_cursor_execute", look)
    migrate.upgrade(engine)
    assert set(found) == {"local"}


def test_a_lock_that_is_not_had_on_a_worker_is_named_as_one(fleet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "_FIRST_PAUSE", 0.01)
    said = "failure on connection marked as essential: 10.0.0.7:5432"
    run_sql(
        fleet,
        f"""CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql
              AS $$ BEGIN RAISE internal_error USING MESSAGE = '{said}'; END $$""",
        "CREATE TABLE held (id int)",
        "CREATE TRIGGER refuse BEFORE INSERT ON held EXECUTE FUNCTION refuse()",
    )
    with connected(fleet) as connection, connection.begin():

        def attempt() -> None:
            with connection.begin_nested():
                connection.execute(text("INSERT INTO held VALUES (1)"))

        with pytest.raises(CommandError) as caught:
            operations.patiently(connection, "held", attempt)
    assert "no lock on held after 5 tries" in str(caught.value)
    assert "held by: a transaction on a worker (the view citus_lock_waits names it; " + said in str(caught.value)


# What is said before any change.


def refused(url: str, said: str) -> None:
    before = state(url)
    with pytest.raises(CommandError) as caught:
        migrate.upgrade(url)
    assert said in str(caught.value)
    assert state(url) == before


@pytest.mark.parametrize(
    ("as_it_is", "said"),
    [
        (
            "partkey = 'device_id'",
            "device_state is distributed by device_id: SELECT undistribute_table('device_state')",
        ),
        ("partkey = NULL, partmethod = 'n'", "device_state is distributed by no column, and not by hash"),
        ("repmodel = 'c'", "by tenant_id, and not by hash with one copy of each row"),
    ],
)
def test_a_table_that_is_distributed_in_another_way_is_refused(fleet: str, as_it_is: str, said: str) -> None:
    set_citus(fleet, f"UPDATE pg_catalog.pg_dist_partition SET {as_it_is}")
    refused(fleet, said)


def test_a_distributed_table_that_is_partitioned_besides_is_refused(new_database: Callable[[], str]) -> None:
    url = new_database()
    pretend_citus(url)
    run_sql(url, RAW_075_PARTITIONED, DISTRIBUTE)
    refused(url, "its shards are in partitions: SELECT undistribute_table('device_state')")


def test_a_local_table_that_citus_only_knows_of_is_a_plain_one(fleet: str) -> None:
    set_citus(fleet, "UPDATE pg_catalog.pg_dist_partition SET partmethod = 'n', partkey = NULL, colocationid = 0")
    migrate.upgrade(fleet)
    migrate.downgrade(fleet, "075")
    assert distributed(fleet) == {"device_state"}


def test_a_parked_table_that_was_not_distributed_with_the_fleet_is_named(shadow_fleet: str) -> None:
    set_citus(shadow_fleet, "DELETE FROM pg_catalog.pg_dist_partition")
    migrate.downgrade(shadow_fleet, "077")
    run_sql(shadow_fleet, DISTRIBUTE)
    refused(
        shadow_fleet,
        "device_shadow_history_078 is not distributed as device_state is: "
        "SELECT create_distributed_table('device_shadow_history_078', 'tenant_id', colocate_with => 'device_state')",
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("DELETE FROM pg_dist_partition WHERE logicalrelid = 'device_shadow_history'::regclass",
         "SELECT create_distributed_table('device_shadow_history', 'tenant_id', colocate_with => 'device_state')"),
        ("DELETE FROM pg_dist_partition WHERE logicalrelid = 'device_state'::regclass",
         "device_shadow_history is distributed, and device_state is not"),
        ("UPDATE pg_dist_partition SET colocationid = 2 WHERE logicalrelid = 'device_state'::regclass",
         "device_shadow_history has the rows of a tenant on other machines than device_state"),
    ],
)  # fmt: skip
def test_check_says_where_a_table_is_not_beside_the_other_and_what_to_run(
    shadow_fleet: str, change: str, said: str
) -> None:
    set_citus(shadow_fleet, change)
    (problem,) = migrate.check(shadow_fleet)
    assert said in problem


@pytest.mark.parametrize(
    ("node", "at"), [("(0, '10.0.0.5', 5432)", "10.0.0.5:5432"), ("(3, 'a', 1)", "which it does not know")]
)
def test_a_worker_is_no_place_to_migrate_or_check(shadow_fleet: str, node: str, at: str) -> None:
    set_citus(shadow_fleet, "UPDATE pg_catalog.pg_dist_local_group SET groupid = 2")
    set_citus(shadow_fleet, f"INSERT INTO pg_catalog.pg_dist_node VALUES {node}")
    run_sql(shadow_fleet, "DROP TABLE alembic_version_iot_models")
    (problem,) = migrate.check(shadow_fleet)
    assert problem.endswith(f"is on a worker of a Citus cluster, and its revision on the coordinator: check {at}")
    refused(shadow_fleet, "this server is a worker of a Citus cluster, whose coordinator is " + at)


def test_a_table_of_a_worker_s_own_is_migrated(new_database: Callable[[], str]) -> None:
    url = new_database()
    pretend_citus(url)
    set_citus(url, "UPDATE pg_catalog.pg_dist_local_group SET groupid = 2")
    run_sql(url, PLAIN_075)
    migrate.upgrade(url)
    assert migrate.check(url) == []


def test_an_invalid_index_is_a_difference_with_what_mends_it(shadow_fleet: str) -> None:
    """Citus marks an index so that is to be built although it is there."""
    name = "idx_device_state_shadow_pending"
    run_sql(shadow_fleet, f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{name}'::regclass")
    (problem,) = migrate.check(shadow_fleet)
    assert f"REINDEX INDEX CONCURRENTLY {name} mends it" in problem
    run_sql_alone(shadow_fleet, f"REINDEX INDEX CONCURRENTLY {name}")
    assert migrate.check(shadow_fleet) == []


def run_sql_alone(url: str, statement: str) -> None:
    with create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text(statement))
