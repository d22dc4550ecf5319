"""What many devices report, in one call."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, inspect, select, text
from sqlalchemy.orm import Session

from iot_models import (
    DeviceNotFound,
    DeviceState,
    DocumentLimits,
    LateReport,
    Report,
    ReportOutcome,
    ReportStatus,
    ShadowService,
    UnknownVersion,
)
from tests.databases.devices import TENANT, add_device
from tests.databases.statements import before_statement, counted_statements
from tests.generated.examples import with_a_database

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

ACCEPTED, STALE, UNKNOWN_DEVICE, UNKNOWN_VERSION, INVALID = ReportStatus


@pytest.fixture
def service(session: Session) -> ShadowService:
    """Devices a, b and c at desired version 7 that acknowledged 5, and another tenant's a and z."""
    for device_id in "abc":
        add_device(session, device_id, desired_version=7, reported_version=5, reported_state={"old": 1})
    add_device(session, "a", tenant_id="globex")
    add_device(session, "z", tenant_id="globex")
    return ShadowService(session, TENANT)


def table(session: Session) -> dict[tuple[str, str], Any]:
    """Every row, by plain SQL."""
    result = session.execute(text("SELECT * FROM device_state ORDER BY tenant_id, device_id")).all()
    return {(row.tenant_id, row.device_id): row for row in result}


def test_one_outcome_per_report_in_order_and_a_bad_one_stops_no_other(session: Session, service: ShadowService) -> None:
    before = table(session)

    outcomes = service.replace_reported_many(
        [
            Report("c", {"n": 1}, 7),
            Report("z", {"theirs": 1}),
            Report("b", {"x": float("nan")}),
            Report("nobody", {}),
            Report("b", {"late": 1}, 4),
            Report("b", {"never": 1}, 8),
            Report("a", {"n": 2}),
            Report("nobody", {"x": "\0"}),
            Report(5, {}),  # type: ignore[arg-type]
            Report("a\0", {}),
            Report("c", {"n": 3}, "7"),  # type: ignore[arg-type]
        ]
    )

    assert outcomes == [
        ReportOutcome("c", ACCEPTED, 7, 7),
        ReportOutcome("z", UNKNOWN_DEVICE, None, None),
        ReportOutcome("b", INVALID, 7, 5),
        ReportOutcome("nobody", UNKNOWN_DEVICE, None, None),
        ReportOutcome("b", STALE, 7, 5),
        ReportOutcome("b", UNKNOWN_VERSION, 7, 5),
        ReportOutcome("a", ACCEPTED, 7, 5),
        ReportOutcome("nobody", INVALID, None, None),
        ReportOutcome(5, INVALID, None, None),  # type: ignore[arg-type]
        ReportOutcome("a\0", UNKNOWN_DEVICE, None, None),
        ReportOutcome("c", INVALID, 7, 7),
    ]
    after = table(session)
    changed = {key for key, row in after.items() if row != before[key]}
    assert changed == {(TENANT, "a"), (TENANT, "c")}
    now = session.scalar(select(func.now()))
    a, c = after[TENANT, "a"], after[TENANT, "c"]
    assert (a.reported_state, a.reported_version, a.last_seen_at) == ({"n": 2}, 5, now)
    assert (c.reported_state, c.reported_version, c.last_seen_at) == ({"n": 1}, 7, now)
    assert (a.desired_version, a.desired_state, a.shadow_updated_at) == (7, {}, None)


def test_of_several_reports_of_a_device_the_last_accepted_one_stays(service: ShadowService) -> None:
    outcomes = service.replace_reported_many(
        [Report("a", {"n": n}, acked) for n, acked in enumerate((6, 5, 7, None, 6, 8, -1))]
    )

    assert [outcome.status for outcome in outcomes] == [
        ACCEPTED, STALE, ACCEPTED, ACCEPTED, STALE, UNKNOWN_VERSION, INVALID
    ]  # fmt: skip
    assert [outcome.reported_version for outcome in outcomes] == [6, 6, 7, 7, 7, 7, 7]
    assert (service.get("a").reported, service.get("a").reported_version) == ({"n": 3}, 7)


def test_after_a_restore_that_left_desired_behind_reports_are_unknown_or_late_but_never_lost_without_a_version(
    session: Session, service: ShadowService
) -> None:
    add_device(session, "restored", desired_version=3, reported_version=9)

    outcomes = service.replace_reported_many([Report("restored", {"v": acked}, acked) for acked in (9, 3, None)])

    assert [outcome.status for outcome in outcomes] == [UNKNOWN_VERSION, STALE, ACCEPTED]
    assert {(outcome.desired_version, outcome.reported_version) for outcome in outcomes} == {(3, 9)}
    assert service.get("restored").reported == {"v": None}


def test_documents_are_stored_as_they_were_given(service: ShadowService) -> None:
    documents: list[dict[str, Any]] = [
        {"x": [1, None, "\\\"{},'%s NULL"]},
        {"é😀": 10**40 + 1, "float": 0.1, "e": 1e22},
        {},
    ]

    service.replace_reported_many([Report(*each) for each in zip("abc", documents, strict=True)])

    assert [service.get(device_id).reported for device_id in "abc"] == documents


def test_an_empty_batch_and_one_without_any_possible_device_are_no_statement(
    session: Session, service: ShadowService
) -> None:
    with counted_statements(session.connection()) as seen:
        assert service.replace_reported_many([]) == []
        (outcome,) = service.replace_reported_many([Report("a\0", {})])
    assert outcome.status is UNKNOWN_DEVICE
    assert seen == []


def test_what_is_no_report_is_a_mistake_and_nothing_is_sent(session: Session, service: ShadowService) -> None:
    with counted_statements(session.connection()) as seen, pytest.raises(TypeError, match="must be Report objects"):
        service.replace_reported_many([Report("a", {}), ("b", {})])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="reports must be iterable, a list for instance, got None"):
        service.replace_reported_many(None)  # type: ignore[arg-type]
    assert seen == []


def test_the_limits_are_the_services(session: Session, service: ShadowService) -> None:
    small = ShadowService(session, TENANT, limits=DocumentLimits(max_bytes=10))

    outcomes = small.replace_reported_many([Report("a", {"x": "y" * 20}), Report("b", {"x": 1})])

    assert [outcome.status for outcome in outcomes] == [INVALID, ACCEPTED]
    assert service.get("a").reported == {"old": 1}


@pytest.mark.repeats
@pytest.mark.parametrize("count", [1, 10, 1000])
def test_the_number_of_statements_does_not_grow_with_the_batch(
    session: Session, service: ShadowService, count: int
) -> None:
    session.execute(
        text("INSERT INTO device_state (tenant_id, site_id, device_id) SELECT 'acme', 's', 'd' || n FROM generate_series(1, :n) n"),
        {"n": count},
    )  # fmt: skip
    reports = [Report(f"d{n}", {"n": n}, 0) for n in range(1, count + 1)]

    with counted_statements(session.connection()) as accepted:
        service.replace_reported_many(reports)
    with counted_statements(session.connection()) as refused:
        service.replace_reported_many([Report(report.device_id, {}, 1) for report in reports])
    with counted_statements(session.connection()) as twice:
        service.replace_reported_many([*reports, reports[0]])
    loaded = session.scalars(select(DeviceState)).all()
    with counted_statements(session.connection()) as shown:
        service.replace_reported_many(reports)

    assert [len(seen) for seen in (accepted, refused, twice, shown)] == [1, 2, 2, 2]
    assert len(loaded) == count + 5


@pytest.mark.large
def test_twenty_thousand_reports_of_a_thousand_devices(session: Session, service: ShadowService) -> None:
    session.execute(
        text("INSERT INTO device_state (tenant_id, site_id, device_id) SELECT 'acme', 's', 'd' || n FROM generate_series(0, 999) n")
    )  # fmt: skip

    outcomes = service.replace_reported_many(Report(f"d{n % 1000}", {"n": n}) for n in range(20_000))

    assert [outcome.device_id for outcome in outcomes[:3]] == ["d0", "d1", "d2"]
    assert {outcome.status for outcome in outcomes} == {ACCEPTED}
    last = text("SELECT count(*) FROM device_state WHERE CAST(reported_state -> 'n' AS int) >= 19000")
    assert session.scalar(last) == 1000


@pytest.mark.large
def test_ten_thousand_devices_in_one_call_with_late_foreign_and_broken_reports_among_them(
    session: Session, service: ShadowService
) -> None:
    session.execute(
        text("""INSERT INTO device_state (tenant_id, site_id, device_id, desired_version, reported_version)
                SELECT 'acme', 's', 'd' || n, 2, CASE WHEN n % 10 = 3 THEN 2 ELSE 0 END FROM generate_series(0, 9999) n""")
    )  # fmt: skip
    session.execute(text("ANALYZE device_state"))  # autovacuum may have seen it empty
    kinds: list[Callable[[int], Report]] = [
        lambda n: Report(f"d{n}", {"x": float("inf")}, 1),
        lambda n: Report(f"foreign{n}", {}, 1),
        lambda n: Report(f"d{n}", {}, 3),
    ]

    outcomes = service.replace_reported_many(
        [kinds[n % 10](n) if n % 10 < 3 else Report(f"d{n}", {"n": n}, 1) for n in range(10_000)]
    )

    expected = [INVALID, UNKNOWN_DEVICE, UNKNOWN_VERSION, STALE] + [ACCEPTED] * 6
    assert [outcome.status for outcome in outcomes] == expected * 1000
    written = text("SELECT count(*) FROM device_state WHERE reported_version = 1 AND last_seen_at = now()")
    assert session.scalar(written) == 6000


# The same as one after another

device_ids: st.SearchStrategy[Any] = st.sampled_from(["a", "b", "c", "a", "b", "foreign", "nobody", "x\0"])
versions: st.SearchStrategy[Any] = (
    st.none() | st.integers(0, 4) | st.sampled_from([-1, "7", True, 2.0, 2**31, 2**63 - 1, 2**63])
)
contents: st.SearchStrategy[Any] = st.sampled_from([{}, {"a": 1}, {"a": [None, {"b": "é"}]}, {"n": 2}]) | st.sampled_from(
    [{"a": "\0"}, {"a": float("nan")}, {1: 2}, None, [], {"long": "x" * 100}]
)  # fmt: skip


def one_after_another(service: ShadowService, reports: list[Report]) -> list[ReportOutcome]:
    outcomes = []
    for report in reports:
        try:
            service.replace_reported(report.device_id, report.reported, acked_version=report.acked_version)
            status = ACCEPTED
        except DeviceNotFound:
            status = UNKNOWN_DEVICE
        except LateReport:
            status = STALE
        except UnknownVersion:
            status = UNKNOWN_VERSION
        except (TypeError, ValueError):
            status = INVALID
        shadow = service.get_many([report.device_id]).get(report.device_id)
        stands = (shadow.desired_version, shadow.reported_version) if shadow else (None, None)
        outcomes.append(ReportOutcome(report.device_id, status, *stands))
    return outcomes


@with_a_database(share=0.75)
@given(
    standings=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=3, max_size=3),
    reports=st.lists(st.builds(Report, device_ids, contents, versions), max_size=12),
)
def test_a_batch_does_what_the_single_reports_do_one_after_another(
    session: Session, standings: list[tuple[int, int]], reports: list[Report]
) -> None:
    service = ShadowService(session, TENANT, limits=DocumentLimits(max_bytes=60))
    # Where a device can not exist at all, a single report says so before it looks at the document; a batch after.
    reports = [report for report in reports if report.device_id != "x\0" or report.reported == {}]
    with session.begin_nested() as fleet:
        for device_id, (desired, reported) in zip("abc", standings, strict=True):
            add_device(session, device_id, desired_version=desired, reported_version=reported)
        add_device(session, "foreign", tenant_id="globex")

        with session.begin_nested() as singly:
            expected = one_after_another(service, reports)
            rows = table(session)
            singly.rollback()

        assert service.replace_reported_many(reports) == expected
        assert table(session) == rows
        fleet.rollback()


# In the caller's session


def test_loaded_objects_show_what_was_reported(session: Session, service: ShadowService) -> None:
    written, refused = (session.get_one(DeviceState, (TENANT, device_id)) for device_id in "ab")

    service.replace_reported_many([Report("a", {"n": 1e22}, 6), Report("b", {"n": 2}, 8), Report("c", {})])

    with counted_statements(session.connection()) as seen:
        assert (written.reported_state, written.reported_version) == ({"n": 10**22}, 6)
        assert (refused.reported_state, refused.reported_version) == ({"old": 1}, 5)
    assert seen == []
    assert written.last_seen_at == session.scalar(select(func.now()))
    assert not session.dirty


def test_changes_of_the_callers_that_are_not_flushed_are_kept(session: Session, service: ShadowService) -> None:
    device = session.get_one(DeviceState, (TENANT, "a"))
    with session.no_autoflush:
        device.status = "ONLINE"
        device.desired_state = {"mine": 1}
        service.replace_reported_many([Report("a", {"n": 1})])
        assert (device.status, device.desired_state, device.reported_state) == ("ONLINE", {"mine": 1}, {"n": 1})
        assert inspect(device).attrs.desired_state.history.has_changes()


# Others at the same time


def test_in_autocommit_mode_a_report_is_judged_again_when_its_device_was_written_in_between(own_engine: Engine) -> None:
    with Session(own_engine) as session, session.begin():
        for device_id in "abcd":
            add_device(session, device_id, desired_version=2, reported_version=0)

    def overtake() -> None:
        with Session(own_engine) as other, other.begin():
            theirs = ShadowService(other, TENANT)
            theirs.replace_reported("b", {"theirs": 1}, acked_version=2)
            theirs.replace_desired("c", {})
            other.execute(text("DELETE FROM device_state WHERE device_id = 'd'"))

    with Session(own_engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        loaded = session.get_one(DeviceState, (TENANT, "b"))
        service = ShadowService(session, TENANT)
        before_statement(service, 2, overtake)
        outcomes = service.replace_reported_many(
            [Report(device_id, {"n": n}, acked) for n, acked in enumerate((1, 3)) for device_id in "dcba"]
        )

    assert outcomes == [
        ReportOutcome("d", UNKNOWN_DEVICE, None, None),
        ReportOutcome("c", ACCEPTED, 3, 1),
        ReportOutcome("b", STALE, 2, 2),
        ReportOutcome("a", ACCEPTED, 2, 1),
        ReportOutcome("d", UNKNOWN_DEVICE, None, None),
        ReportOutcome("c", ACCEPTED, 3, 3),
        ReportOutcome("b", UNKNOWN_VERSION, 2, 2),
        ReportOutcome("a", UNKNOWN_VERSION, 2, 1),
    ]
    with Session(own_engine) as session:
        shadows = ShadowService(session, TENANT).get_many(list("abcd"))
    assert {device_id: shadow.reported for device_id, shadow in shadows.items()} == {
        "a": {"n": 0}, "b": {"theirs": 1}, "c": {"n": 1}
    }  # fmt: skip
    assert loaded.reported_version == 0  # not written by this batch: what was loaded stays what it was


def test_in_autocommit_mode_a_refused_report_whose_device_catches_up_is_judged_by_what_it_says_now(
    own_engine: Engine,
) -> None:
    with Session(own_engine) as session, session.begin():
        for device_id in "ab":
            add_device(session, device_id, desired_version=2, reported_version=0)

    def catch_up() -> None:
        with Session(own_engine) as other, other.begin():
            ShadowService(other, TENANT).replace_desired("a", {})

    with Session(own_engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        service = ShadowService(session, TENANT)
        before_statement(service, 2, catch_up)
        outcomes = service.replace_reported_many([Report("a", {"n": 1}, 3), Report("b", {"n": 1}, 2)])

    assert outcomes == [ReportOutcome("a", ACCEPTED, 3, 3), ReportOutcome("b", ACCEPTED, 2, 2)]


def test_batches_whose_refused_reports_cross_wait_for_each_other_and_never_deadlock(own_engine: Engine) -> None:
    """Who is refused is locked by the first statement too: asking why takes no lock out of order."""
    fleet = [f"d{n}" for n in range(10)]
    with Session(own_engine) as session, session.begin():
        for device_id in fleet:
            add_device(session, device_id, desired_version=1)
    start = threading.Barrier(4)

    def work(n: int) -> set[ReportStatus]:
        order = random.Random(n)  # noqa: S311 - no secret
        found = set()
        start.wait()
        for _ in range(40):
            refused = set(order.sample(fleet, 5))
            with Session(own_engine) as session, session.begin():
                batch = [Report(d, {}, 2 if d in refused else 1) for d in order.sample(fleet, len(fleet))]
                found |= {outcome.status for outcome in ShadowService(session, TENANT).replace_reported_many(batch)}
        return found

    with ThreadPoolExecutor(4) as pool:
        assert set.union(*pool.map(work, range(4))) == {ACCEPTED, UNKNOWN_VERSION}


@pytest.mark.repeats
@pytest.mark.parametrize("mode", ["READ COMMITTED", "AUTOCOMMIT"])
def test_of_batches_that_race_the_newest_acknowledged_version_stays(own_engine: Engine, mode: str) -> None:
    writers, newest = 6, 30
    engine = own_engine.execution_options(isolation_level=mode)
    fleet = [f"d{n}" for n in range(30)]
    with Session(own_engine) as session, session.begin():
        for device_id in fleet:
            add_device(session, device_id, desired_version=newest)
    start = threading.Barrier(writers)

    def work(n: int) -> list[ReportOutcome]:
        order = random.Random(n)  # noqa: S311 - no secret
        outcomes = []
        start.wait()
        for acked in range(n + 1, newest + 1, writers):
            with Session(engine) as session, session.begin():
                batch = [Report(device_id, {"acked": acked}, acked) for device_id in order.sample(fleet, len(fleet))]
                outcomes += ShadowService(session, TENANT).replace_reported_many(batch)
        return outcomes

    with ThreadPoolExecutor(writers) as pool:
        outcomes = [outcome for some in pool.map(work, range(writers)) for outcome in some]

    assert {outcome.status for outcome in outcomes} <= {ACCEPTED, STALE}
    with Session(own_engine) as session:
        shadows = ShadowService(session, TENANT).get_many(fleet).values()
    assert {shadow.reported_version for shadow in shadows} == {newest}
    assert all(shadow.reported == {"acked": newest} for shadow in shadows)


def test_a_batch_that_the_database_suppresses_is_an_error_and_no_endless_loop(
    session: Session, service: ShadowService
) -> None:
    session.execute(text("CREATE FUNCTION pg_temp.skip() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"))
    session.execute(
        text("CREATE TRIGGER skip BEFORE UPDATE ON device_state FOR EACH ROW EXECUTE FUNCTION pg_temp.skip()")
    )

    with pytest.raises(RuntimeError, match=r"^'b', 'a' of the batch: .* look for a trigger"):
        service.replace_reported_many([Report("b", {}), Report("a", {}), Report("nobody", {})])
