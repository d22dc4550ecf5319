"""Nothing is lost, whoever else writes: many processes, and a proof from what they were told and what is there."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from tests.guarantees.load.history import keep_history, read_fleet
from tests.guarantees.load.many_writers import SERIALIZATION, Findings, Load
from tests.guarantees.load.record import KINDS, NOTHING_OLD, READ, STANDS, WRITTEN
from tests.guarantees.load.workload import DEVICES, TENANTS
from tests.guarantees.load.writer import GONE, ROLLED_BACK, UNGUARDED, Plan

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import Engine

pytestmark = pytest.mark.repeats

PROCESSES = 4
ENOUGH = 500  # acknowledged units of work: every call and every refusal is among them many times
_DONE = {WRITTEN, READ, STANDS, NOTHING_OLD}
MOST_SECONDS = 90  # on a machine that has much else to do


def run(engine: Engine, folder: Path, isolation: str, *, longest: int) -> Findings:
    """Let writers loose on a migrated database, and check what they leave behind."""
    keep_history(engine, [(tenant, device) for tenant in TENANTS for device in DEVICES])
    with engine.connect() as connection:
        before = read_fleet(connection)
    url = engine.url.render_as_string(hide_password=False)
    load = Load(Plan(url, "ci", str(folder), isolation, seed=76, hostile=False, longest=longest), PROCESSES)
    began = time.monotonic()
    with load.writers():
        while load.count()["acknowledged"] < ENOUGH and time.monotonic() < began + MOST_SECONDS:
            time.sleep(0.1)
    return load.findings(before)


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_the_records_of_many_writers_and_the_rows_tell_one_story(
    own_engine: Engine, tmp_path: Path, isolation: str
) -> None:
    findings = run(own_engine, tmp_path, isolation, longest=4)

    assert findings.violations == []
    # In the stricter levels a loser learns of it by SQLSTATE 40001, as PostgreSQL has it; the transaction left nothing.
    assert (findings.errors[SERIALIZATION] > 0) == (isolation != "READ COMMITTED")
    # Nothing of this is proved by writers that had nothing to do: every call was taken, and refused where it can be.
    answers = findings.answers()
    assert {kind for kind, status in answers if status in _DONE} == set(KINDS)
    assert {"VersionConflict", "LateReport", "UnknownVersion"} <= {status for _, status in answers}
    assert ("refuse_desired", "LateReport") in answers
    # Requests were repeated, by their writer and by others.
    requests = findings.requests()
    assert requests.total() > len(requests)


def test_writers_whose_transactions_are_one_call_each_never_deadlock(own_engine: Engine, tmp_path: Path) -> None:
    findings = run(own_engine, tmp_path, "READ COMMITTED", longest=1)

    assert findings.violations == []
    assert set(findings.errors) <= {ROLLED_BACK, UNGUARDED, GONE, "StaleDataError"}
    assert sum(len(operation.entries) > 1 for unit in findings.units for operation in unit.operations) > 50
