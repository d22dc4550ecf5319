"""How PostgreSQL carries out the statements that a fleet's size could make slow."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.dialects.postgresql import asyncpg

from iot_models._core import desired_statements, history_statements, statements
from iot_models.testing import throwaway
from tests.databases import partitioned
from tests.databases.alembic_runs import upgrade
from tests.databases.devices import TENANT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Engine, Executable

pytestmark = pytest.mark.repeats

PENDING = "idx_device_state_shadow_pending"
PENDING_IN_ORDER = "idx_device_state_shadow_pending_device"
PRIMARY_KEY = "device_state_pkey"
REQUEST = "idx_device_shadow_history_request"


# Half of the devices are one tenant's, the others those of 500.
LOAD = text("""
    INSERT INTO device_state (tenant_id, site_id, device_id, desired_version, reported_version)
    SELECT CASE WHEN n % 2 = 0 THEN 'acme' ELSE 'tenant-' || n % 1000 END, 's', md5(CAST(n AS text)), 1,
           CASE WHEN n % 1000 < :pending THEN 0 ELSE 1 END
      FROM generate_series(1, 40000) n
""")


@pytest.fixture
def fleet(own_engine: Engine) -> Iterator[Connection]:
    """50,000 devices, analysed, one in a hundred pending."""
    with own_engine.connect() as connection:
        connection.execute(
            text("""INSERT INTO device_state (tenant_id, site_id, device_id, desired_version, reported_version)
                    SELECT 'acme', 's', md5(CAST(n AS text)), 1, CASE WHEN n % 100 = 0 THEN 0 ELSE 1 END
                    FROM generate_series(1, 50000) n""")
        )
        connection.execute(text("ANALYZE device_state"))
        yield connection


def access(connection: Connection, statement: Executable, **binds: object) -> set[str]:
    """The indexes by which the very statement reached `device_state` when it ran, and `Seq Scan` if it read it all."""
    compiled = statement.compile(dialect=connection.dialect)  # type: ignore[attr-defined]
    parameters = compiled.construct_params({"tenant": TENANT, **binds})
    explained = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {compiled}", parameters).scalar_one()
    reads = [
        node
        for node in nodes(_plan(connection, explained))
        if re.fullmatch("(.*Index|Index Only|Seq) Scan", node["Node Type"])
    ]
    return {node.get("Index Name", node["Node Type"]) for node in reads}


def nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for inner in node.get("Plans", []):
        yield from nodes(inner)


# Pages that are first and later ones, and longer than what the planner may take the backlog for.
PAGES: list[dict[str, object]] = [
    {"limit": limit} | ({"after": after} if after else {})
    for limit in (1, 100, 1000, 10_000)
    for after in (None, "0", "8", "f")
]


def page_plan(connection: Connection, **binds: object) -> list[dict[str, Any]]:
    """The nodes by which PostgreSQL ran a page of pending, prepared as psycopg does it, but for LIMIT and its value."""
    plan = prepared_plan(connection, statements.pending_page(after="after" in binds), **binds)
    return [node for node in nodes(plan) if node["Node Type"] not in {"Limit", "Result", "Append", "Merge Append"}]


def prepared_plan(connection: Connection, statement: Executable, **binds: object) -> dict[str, Any]:
    """How the very statement ran, prepared as psycopg does it from the sixth time on."""
    compiled = statement.compile(dialect=asyncpg.dialect())  # type: ignore[attr-defined, no-untyped-call]
    values = compiled.construct_params({"tenant": TENANT} | binds)
    arguments = ", ".join(literal(values[name]) for name in compiled.positiontup)
    connection.exec_driver_sql(f"PREPARE statement AS {compiled}")
    explain = f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE statement ({arguments})"
    plan = _plan(connection, connection.exec_driver_sql(explain).scalar_one())
    connection.exec_driver_sql("DEALLOCATE statement")
    return plan


def _plan(connection: Connection, explained: object) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(partitioned.names_of_the_whole(connection, json.dumps(explained)))[0]["Plan"]
    return plan


def by_device(ids: list[str]) -> dict[str, object]:
    """What a batch of desired documents binds: JSON objects by device, as texts."""
    return {
        "devices": ids,
        "documents": json.dumps({device_id: {} for device_id in ids}),
        "expected": "{}",
    }


def literal(value: object) -> str:
    if isinstance(value, list):
        return "'{" + ", ".join("NULL" if item is None else f'"{item}"' for item in value) + "}'"
    return "NULL" if value is None else f"'{value}'"


@pytest.mark.parametrize("analysed", [True, False], ids=["analysed", "never analysed"])
@pytest.mark.parametrize("pending", [1, 900], ids=["few pending", "most pending"])
@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
def test_a_page_of_pending_is_read_in_order_whatever_the_planner_knows(
    own_engine: Engine, mode: str, pending: int, *, analysed: bool
) -> None:
    with own_engine.connect() as connection:
        # In the transaction of the load: autovacuum, which analyses too, is to leave the table alone.
        for table in partitioned.STORED:
            connection.execute(text(f"ALTER TABLE {table} SET (autovacuum_enabled = off)"))
        connection.execute(LOAD, {"pending": pending})
        if analysed:
            connection.execute(text("ANALYZE device_state"))
        connection.execute(text(f"SET plan_cache_mode = {mode}"))

        for binds in PAGES:
            ran = {(node["Node Type"], node.get("Index Name")) for node in page_plan(connection, **binds)}
            assert ran == {("Index Scan", PENDING_IN_ORDER)}, binds


def test_a_page_reads_its_own_devices_and_no_more_of_the_backlog(fleet: Connection) -> None:
    fleet.execute(text("UPDATE device_state SET desired_version = 2"))

    for binds in ({"limit": 100}, {"limit": 100, "after": "8"}):
        reads = page_plan(fleet, **binds)
        assert 100 <= sum(read["Actual Rows"] for read in reads) < 100 + len(reads)  # each partition has one at hand
        assert not any(read.get("Rows Removed by Filter") for read in reads)


def test_at_076_a_page_is_what_it_is_at_head_only_slower(fleet: Connection) -> None:
    def pages() -> list[list[tuple[Any, ...]]]:
        return [
            [
                tuple(row)
                for row in fleet.execute(statements.pending_page(after="after" in binds), {"tenant": TENANT} | binds)
            ]
            for binds in PAGES
        ]

    before = pages()
    fleet.execute(text(f"DROP INDEX {PENDING_IN_ORDER}"))

    assert pages() == before
    assert [len(page) for page in before[:9:4]] == [1, 100, 500]


def test_a_partial_index_serves_the_count_of_pending_ones(fleet: Connection) -> None:
    assert access(fleet, statements.pending_count()) in ({PENDING}, {PENDING_IN_ORDER})


@pytest.fixture
def alone() -> Iterator[Connection]:
    """A migrated database on a server of its own, where nobody else has a transaction open.

    PostgreSQL looks again at what it may clean up only when the oldest transaction of the whole server has changed: a
    long one, in another test's database, too, keeps old versions where the new ones should go.
    """
    with throwaway.postgres() as server:
        upgrade(server.url)
        engine = create_engine(server.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text("ALTER TABLE device_state SET (autovacuum_enabled = off)"))
            yield connection


def test_a_heartbeat_touches_no_index(alone: Connection) -> None:
    """In a fleet just loaded, too, where pages are as full as they may be."""
    alone.execute(
        text("""INSERT INTO device_state (tenant_id, site_id, device_id, desired_state, reported_state)
                SELECT 'acme', 's', CAST(n AS text), document, document
                  FROM generate_series(1, 2000) n, LATERAL (
                    SELECT jsonb_object_agg('setting_' || k, n * k) AS document
                      FROM generate_series(1, 10 + n % 41) k) made""")
    )
    alone.execute(
        text("""DO $$ BEGIN
                  FOR n IN 1..2000 LOOP
                    UPDATE device_state SET last_heartbeat_at = now(), last_seen_at = now()
                     WHERE tenant_id = 'acme' AND device_id = CAST(n * 7 % 2000 + 1 AS text);
                    COMMIT;
                  END LOOP;
                END $$""")
    )
    alone.execute(text("SELECT pg_stat_force_next_flush()"))
    updated, hot = alone.execute(
        text("SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'device_state'")
    ).one()

    assert updated == 2000
    assert hot > 0.9 * updated


def test_the_primary_key_serves_single_devices_and_batches(fleet: Connection) -> None:
    ids = list(
        fleet.scalars(text("SELECT device_id FROM device_state WHERE device_id < '01' ORDER BY site_id LIMIT 100"))
    )
    written = {"author": None, "why": None}
    one: dict[str, object] = {"device": ids[0], "document": "{}", "request": "r", "version": 1, **written}
    many: dict[str, object] = {"devices": ids, "documents": ["{}"] * len(ids), **written}
    ones = [1] * len(ids)

    for statement, binds in (
        (statements.one_shadow(), one),
        (statements.versions(), one),
        (statements.locked_document("desired_state"), one),
        (desired_statements.write_desired(guarded=False), one),
        (desired_statements.write_desired(guarded=True, once=True), one | {"expected": 1}),
        (desired_statements.write_desired(guarded=True, recorded=False), one | {"expected": 1}),
        (desired_statements.restore_desired(guarded=False, once=True), one),
        (desired_statements.remove(guarded=False), one | {"device": ids[1]}),
        (desired_statements.record_removals(), many | {"read_at": "{}"}),
        (desired_statements.registered(), many),
        (desired_statements.behind(), many | {"inserted": "{}"}),
        (desired_statements.go_on(), many | {"inserted": "{}"}),
        (history_statements.version_of_device(), one),
        (history_statements.versions_kept(), one),
        (
            statements.write_reported(acked=True, if_converged=False, unchanged=True),
            one | {"acked": 1, "seen": "{}"},
        ),
        (statements.write_reported(acked=False, if_converged=True, unchanged=False), one),
        (statements.many_shadows(), many),
        (statements.versions_of_many(), many),
        (statements.locked_devices(), many),
        (statements.locked_devices("desired_state", "reported_state"), many),
        (desired_statements.write_desired_many(), many | by_device(ids)),
        (statements.write_reported_many(), many | {"acked": ones}),
        (
            statements.write_reported_many(if_converged=True),
            many | {"acked": [None] * len(ids), "if_converged": [True] * len(ids)},
        ),
        (
            statements.write_reported_many(refuses=True),
            many | {"acked": [None] * len(ids), "refused": [2] * len(ids), "refusals": ["no"] * len(ids)},
        ),
        (statements.write_reported_many(decided=True), many | {"acked": ones, "desired": ones, "reported": ones}),
        (
            statements.write_reported_many(decided=True, unchanged=True),
            many | {"acked": ones, "desired": ones, "reported": ones, "seen": ["{}"] * len(ids)},
        ),
    ):
        reached = access(fleet, statement, **binds)
        assert {name for name in reached if "history" not in name} == {PRIMARY_KEY}, statement


@pytest.mark.parametrize("analysed", [True, False], ids=["analysed", "never analysed"])
@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
def test_what_a_batch_costs_grows_with_its_devices_and_not_with_their_square(
    own_engine: Engine, mode: str, *, analysed: bool
) -> None:
    ids = [f"device-{n}" for n in range(1000)]
    known = {"devices": ids, "documents": ["{}"] * len(ids), "author": None, "why": None}
    with own_engine.connect() as connection:
        connection.execute(
            text("""INSERT INTO device_state (tenant_id, site_id, device_id, desired_version, reported_version)
                    SELECT 'acme', 's', 'device-' || n, 2, 2 FROM generate_series(0, 19999) n""")
        )
        if analysed:
            connection.execute(text("ANALYZE device_state"))
        connection.execute(text(f"SET plan_cache_mode = {mode}"))

        for statement, binds in (
            (statements.many_shadows(), {}),
            (statements.versions_of_many(), {}),
            (statements.locked_devices(), {}),
            (statements.locked_devices("desired_state", "reported_state"), {}),
            (desired_statements.write_desired_many(), by_device(ids)),
            (desired_statements.write_desired_many(recorded=False), by_device(ids)),
            (statements.write_reported_many(), {"acked": [3] * len(ids)}),
            (
                statements.write_reported_many(if_converged=True),
                {"acked": [None] * len(ids), "if_converged": [True] * len(ids)},
            ),
            (
                statements.write_reported_many(decided=True, unchanged=True),
                {
                    "acked": [4] * len(ids),
                    "desired": [4] * len(ids),
                    "reported": [4] * len(ids),
                    "seen": ["{}"] * len(ids),
                },
            ),
        ):
            plan = prepared_plan(connection, statement, **(known | binds))
            compared = sum(
                node.get(f"Rows Removed by {kind}", 0) * node["Actual Loops"]
                for node in nodes(plan)
                for kind in ("Join Filter", "Filter")
            )
            assert plan["Actual Rows"] == len(ids)
            assert compared <= len(ids), statement


def test_each_index_of_the_history_serves_its_query(own_engine: Engine) -> None:
    with own_engine.connect() as connection:
        connection.execute(
            text("""INSERT INTO device_shadow_history (tenant_id, device_id, desired_version, desired_state, written_at, request_id)
                    SELECT 'acme', 'd' || n % 500, n / 500, '{}', now() - n * INTERVAL '1 minute', 'r' || n
                      FROM generate_series(1, 30000) n""")
        )
        connection.execute(text("ANALYZE device_shadow_history"))
        one = {"device": "d7", "request": "r7", "version": 7}
        old = {"age": timedelta(days=20), "limit": 100, "mark": -2}

        assert access(connection, history_statements.request_done(), **one) == {REQUEST, "device_shadow_history_pkey"}
        page = access(connection, history_statements.history_page(before=False), **one, limit=5)
        assert {name for name in page if "history" in name} == {"device_shadow_history_pkey"}
        assert access(connection, history_statements.prune_history(keep=1), **old) == {
            "idx_device_shadow_history_written", "device_shadow_history_pkey"
        }  # fmt: skip


def test_a_page_of_drifted_devices_uses_an_index_that_a_team_makes(own_engine: Engine) -> None:
    page = Path(__file__).parents[2] / "docs" / "performance.md"
    (index,) = re.findall(r"^CREATE INDEX CONCURRENTLY (?s:.*?);$", page.read_text(), re.MULTILINE)
    with own_engine.connect() as connection:
        connection.execute(
            text("""INSERT INTO device_state (tenant_id, site_id, device_id, desired_state, reported_state)
                    SELECT 'acme', 's', 'device-' || n, '{"m": 1}', jsonb_build_object('m', CASE WHEN n = 7 THEN 2 ELSE 1 END, 'uptime', n)
                      FROM generate_series(1, 5000) n""")
        )
        connection.execute(text(index.replace("CONCURRENTLY ", "")))
        connection.execute(text("ANALYZE device_state"))

        plan = prepared_plan(connection, statements.drifted_page(after=False), limit=100)

    assert {
        node.get("Index Name") for node in nodes(plan) if "Scan" in node["Node Type"] and node.get("Relation Name")
    } == {"idx_device_state_drifted"}
    assert plan["Actual Rows"] == 1


@pytest.mark.parametrize("analysed", [True, False], ids=["analysed", "never analysed"])
@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
def test_a_page_of_changes_reads_its_own_versions_in_order_and_no_others(
    own_engine: Engine, mode: str, *, analysed: bool
) -> None:
    with own_engine.connect() as connection:
        for tenant, where in (("acme", "n % 2 = 0"), ("globex", "n % 2 = 1")):
            connection.execute(
                text(f"""INSERT INTO device_shadow_history (tenant_id, device_id, desired_version, desired_state, written_at, transaction_id)
                         SELECT '{tenant}', 'd' || n % 500, n / 500, '{{}}', now(), 3 + n / 1000
                           FROM generate_series(1, 60000) n WHERE {where}""")
            )
        if analysed:
            connection.execute(text("ANALYZE device_shadow_history"))
        connection.execute(text(f"SET plan_cache_mode = {mode}"))
        place = {"transaction": 33, "device": "d7", "version": 1}
        for foreign, binds in ((True, {}), (True, place), (False, place)):
            statement = history_statements.changes_page(foreign=foreign, after=bool(binds))
            plan = prepared_plan(connection, statement, limit=100, **binds)
            reads = [node for node in nodes(plan) if node.get("Relation Name") == "device_shadow_history"]
            used = {node["Index Name"] for node in reads}
            assert used <= {"idx_device_shadow_history_changes", "device_shadow_history_pkey"}, reads
            assert plan["Actual Rows"] == 100
            assert sum(node["Actual Rows"] + node.get("Rows Removed by Filter", 0) for node in reads) == 100, reads
