"""Several writers at once, on committed data."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from iot_models import LateReport, Report, Shadow, ShadowService, VersionConflict
from tests.databases.devices import DEVICE, TENANT, add_device
from tests.databases.statements import counted_statements

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

pytestmark = pytest.mark.repeats

WRITERS = 8


@pytest.fixture
def fleet(own_engine: Engine) -> Engine:
    """A database of this test's own, with one device committed."""
    with Session(own_engine) as session, session.begin():
        add_device(session)
    return own_engine


def at_once(work: Callable[[int], object]) -> list[object]:
    """What each of the writers got, an error included."""
    start = threading.Barrier(WRITERS)

    def one(n: int) -> object:
        start.wait()
        try:
            return work(n)
        except (LateReport, VersionConflict) as error:
            return error

    with ThreadPoolExecutor(WRITERS) as pool:
        return list(pool.map(one, range(WRITERS)))


def shadow(engine: Engine) -> Shadow:
    with Session(engine) as session:
        return ShadowService(session, TENANT).get(DEVICE)


@pytest.mark.parametrize("method", ["replace_desired", "patch_desired"])
@pytest.mark.parametrize("mode", ["READ COMMITTED", "AUTOCOMMIT"])
def test_of_many_writers_with_one_version_exactly_one_wins(fleet: Engine, mode: str, method: str) -> None:
    engine = fleet.execution_options(isolation_level=mode)

    def write(n: int) -> object:
        with Session(engine) as session, session.begin():
            return getattr(ShadowService(session, TENANT), method)(DEVICE, {"by": n}, expected_version=0)

    results = at_once(write)

    (winner,) = (result for result in results if isinstance(result, Shadow))
    losers = [result for result in results if isinstance(result, VersionConflict)]
    assert len(losers) == WRITERS - 1
    assert {(loser.expected, loser.actual) for loser in losers} == {(0, 1)}
    assert shadow(fleet) == winner


@pytest.mark.parametrize("mode", ["READ COMMITTED", "AUTOCOMMIT"])
@pytest.mark.parametrize(("method", "section"), [("patch_desired", "desired"), ("patch_reported", "reported")])
def test_concurrent_patches_without_a_version_all_take_effect(
    fleet: Engine, mode: str, method: str, section: str
) -> None:
    engine = fleet.execution_options(isolation_level=mode)
    rounds = 10

    def write(n: int) -> None:
        for turn in range(rounds):
            with Session(engine) as session, session.begin():
                getattr(ShadowService(session, TENANT), method)(DEVICE, {f"writer-{n}": {f"turn-{turn}": turn}})

    at_once(write)

    expected = {f"writer-{n}": {f"turn-{turn}": turn for turn in range(rounds)} for n in range(WRITERS)}
    assert getattr(shadow(fleet), section) == expected
    assert shadow(fleet).desired_version == (WRITERS * rounds if section == "desired" else 0)


@pytest.mark.parametrize("method", ["replace_reported", "patch_reported"])
def test_of_reports_that_race_the_newest_acknowledged_version_stays(fleet: Engine, method: str) -> None:
    with Session(fleet) as session, session.begin():
        for _ in range(WRITERS):
            ShadowService(session, TENANT).replace_desired(DEVICE, {})

    def report(n: int) -> None:
        with Session(fleet) as session, session.begin():
            getattr(ShadowService(session, TENANT), method)(DEVICE, {"version": n + 1}, acked_version=n + 1)

    at_once(report)

    assert shadow(fleet).reported_version == WRITERS
    assert shadow(fleet).reported == {"version": WRITERS}


def test_a_desired_write_and_a_report_at_once_are_both_kept(fleet: Engine) -> None:
    def write(n: int) -> None:
        with Session(fleet) as session, session.begin():
            service = ShadowService(session, TENANT)
            if n % 2:
                service.patch_reported(DEVICE, {f"r{n}": n})
            else:
                service.patch_desired(DEVICE, {f"d{n}": n})

    at_once(write)

    assert shadow(fleet).desired == {f"d{n}": n for n in range(0, WRITERS, 2)}
    assert shadow(fleet).reported == {f"r{n}": n for n in range(1, WRITERS, 2)}


@pytest.mark.parametrize(
    ("method", "arguments", "change"),
    [
        ("replace_desired", {"expected_version": 1}, "desired_version = 1"),
        ("replace_reported", {"acked_version": 1}, "desired_version = 1"),
    ],
)
def test_a_version_that_arrives_between_the_write_and_the_diagnosis_lets_the_write_through(
    fleet: Engine, method: str, arguments: dict[str, Any], change: str
) -> None:
    """The first UPDATE misses; before the service asks why, somebody else commits the very version it waited for."""
    with Session(fleet) as session, session.begin():
        service = ShadowService(session, TENANT)
        asked: list[str] = []
        real = service._versions  # noqa: SLF001 - the seam between the two statements

        def versions_after_a_commit(method: str, device_id: str) -> Any:
            asked.append(device_id)
            with fleet.begin() as other:
                other.execute(text(f"UPDATE device_state SET {change}"))
            return real(method, device_id)

        service._versions = versions_after_a_commit  # type: ignore[method-assign]  # noqa: SLF001
        getattr(service, method)(DEVICE, {"a": 1}, **arguments)

    assert asked == [DEVICE]
    assert shadow(fleet).desired_version == (2 if method == "replace_desired" else 1)


def test_a_patch_in_autocommit_mode_merges_again_when_somebody_wrote_in_between(fleet: Engine) -> None:
    """The lock ends with its statement there: the guard on what was read is what keeps the other's write."""
    for method, other in (("patch_desired", "replace_desired"), ("patch_reported", "replace_reported")):
        with Session(fleet.execution_options(isolation_level="AUTOCOMMIT")) as session:
            service = ShadowService(session, TENANT)
            asked: list[str] = []
            real = service._locked  # noqa: SLF001 - the seam between the two statements

            def locked_then_overtaken(method: str, section: Any, device_id: str) -> Any:
                seen = real(method, section, device_id)  # noqa: B023 - called in this turn only
                if not asked:  # noqa: B023
                    with Session(fleet) as theirs, theirs.begin():
                        getattr(ShadowService(theirs, TENANT), other)(DEVICE, {"theirs": 1})  # noqa: B023
                asked.append(section)  # noqa: B023
                return seen

            service._locked = locked_then_overtaken  # type: ignore[method-assign]  # noqa: SLF001
            result = getattr(service, method)(DEVICE, {"ours": 1})

        assert len(asked) == 2
        assert (result.desired if method == "patch_desired" else result.reported) == {"theirs": 1, "ours": 1}


def test_a_patch_waits_for_a_transaction_that_wrote_and_then_merges_in_two_statements(fleet: Engine) -> None:
    first = Session(fleet)
    ShadowService(first, TENANT).patch_desired(DEVICE, {"first": 1})
    statements: list[str] = []

    def second() -> Shadow:
        with Session(fleet) as session, session.begin():
            with counted_statements(session.connection()) as seen:
                shadow = ShadowService(session, TENANT).patch_desired(DEVICE, {"second": 2})
            statements.extend(seen)
            return shadow

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(second)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.2)
        first.commit()
        assert waiting.result(timeout=10).desired == {"first": 1, "second": 2}
    first.close()
    assert len(statements) == 2


@pytest.mark.parametrize(
    "write",
    [
        lambda service: service.replace_desired(DEVICE, {}),
        lambda service: service.patch_desired(DEVICE, {}),
        lambda service: service.replace_reported(DEVICE, {}),
        lambda service: service.patch_reported(DEVICE, {}),
        lambda service: service.replace_desired_many({DEVICE: {}}),
        lambda service: service.patch_desired_many([DEVICE], {}),
        lambda service: service.replace_reported_many([Report(DEVICE, {})]),
        lambda service: service.replace_reported_many([Report(DEVICE, {}), Report(DEVICE, {})]),
    ],
)
def test_a_row_that_refers_to_a_device_is_inserted_beside_an_open_write_of_it(
    fleet: Engine, write: Callable[[ShadowService], object]
) -> None:
    refer = text("INSERT INTO machine VALUES (:tenant, :device)")
    with fleet.begin() as connection:
        connection.execute(
            text("""CREATE TABLE IF NOT EXISTS machine (
                      tenant_id text, device_id text,
                      FOREIGN KEY (tenant_id, device_id) REFERENCES device_state (tenant_id, device_id))""")
        )
    with Session(fleet) as writing, fleet.connect() as other:
        write(ShadowService(writing, TENANT))
        other.execute(text("SET LOCAL lock_timeout = '1s'"))
        other.execute(refer, {"tenant": TENANT, "device": DEVICE})
        other.rollback()
        writing.rollback()
    with fleet.begin() as connection:
        connection.execute(text("DROP TABLE machine"))
