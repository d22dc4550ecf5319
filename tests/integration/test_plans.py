"""How PostgreSQL carries out the statements that a fleet's size could make slow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from fleet import TENANT
from sqlalchemy import text

from iot_models import statements

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Engine, Executable

PENDING = "idx_device_state_shadow_pending"
PRIMARY_KEY = "device_state_pkey"


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
    explain = f"EXPLAIN (ANALYZE, FORMAT JSON) {compiled}"
    ((plan,),) = (connection.exec_driver_sql(explain, parameters).scalar_one(),)
    return set(_access(plan["Plan"]))


def _access(node: dict[str, Any]) -> Iterator[str]:
    if node["Actual Loops"] == 0:  # planned for another backlog, and not run
        return
    if "Index Name" in node:
        yield node["Index Name"]
    elif node.get("Relation Name") == "device_state" and node["Node Type"] == "Seq Scan":
        yield "Seq Scan"
    for inner in node.get("Plans", []):
        yield from _access(inner)


def test_the_partial_index_serves_the_pending_ones(fleet: Connection) -> None:
    assert access(fleet, statements.pending_count()) == {PENDING}
    assert access(fleet, statements.pending_page(after=False), limit=100) == {PENDING}
    assert access(fleet, statements.pending_page(after=False), limit=1000) == {PENDING}
    assert access(fleet, statements.pending_page(after=True), limit=100, after="8") == {PENDING}


def test_a_page_of_a_long_backlog_is_read_in_order_instead_of_sorted(fleet: Connection) -> None:
    fleet.execute(text("UPDATE device_state SET desired_version = 2"))
    fleet.execute(text("ANALYZE device_state"))

    assert PRIMARY_KEY in access(fleet, statements.pending_page(after=False), limit=100)
    assert PRIMARY_KEY in access(fleet, statements.pending_page(after=True), limit=100, after="8")


def test_the_primary_key_serves_single_devices_and_batches(fleet: Connection) -> None:
    ids = list(
        fleet.scalars(text("SELECT device_id FROM device_state WHERE device_id < '01' ORDER BY site_id LIMIT 100"))
    )
    one: dict[str, object] = {"device": ids[0], "document": "{}"}
    many: dict[str, object] = {"devices": ids, "documents": ["{}"] * len(ids)}
    ones = [1] * len(ids)

    for statement, binds in (
        (statements.one_shadow(), one),
        (statements.versions(), one),
        (statements.locked_document("desired_state"), one),
        (statements.write_desired(guarded=False), one),
        (statements.write_desired(guarded=True), one | {"expected": 1}),
        (statements.write_reported(acked=True, unchanged=True), one | {"acked": 1, "seen": "{}"}),
        (statements.many_shadows(), many),
        (statements.versions_of_many(), many),
        (statements.locked_versions(), many),
        (statements.locked_desired_documents(), many),
        (statements.write_desired_many(), many | {"expected": [None] * len(ids)}),
        (statements.write_reported_many(), many | {"desired": ones, "reported": ones, "acked": ones}),
    ):
        assert access(fleet, statement, **binds) == {PRIMARY_KEY}, statement
