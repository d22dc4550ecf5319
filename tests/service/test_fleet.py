"""Questions about the whole fleet: who is pending, who has drifted, how many stand how."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.orm import Session

from iot_models import DeviceState, ShadowService, SyncStatus, sync_status
from tests.databases.devices import TENANT, add_device
from tests.databases.statements import counted_statements
from tests.generated.documents import document_pairs
from tests.generated.examples import with_a_database

if TYPE_CHECKING:
    from sqlalchemy import Engine

NOW = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
on_generated_data = with_a_database(share=0.4)


@pytest.fixture
def service(session: Session) -> ShadowService:
    return ShadowService(session, TENANT)


@pytest.fixture
def backlog(session: Session) -> None:
    """Devices d0 to d9, every third one not acknowledged, and another tenant's."""
    for n in (4, 9, 0, 6, 2, 8, 3, 1, 7, 5):  # no order that an index or a scan would give by itself
        add_device(session, f"d{n}", desired_version=n, reported_version=n - (n % 3 == 0))
    add_device(session, "d3", tenant_id="globex", desired_version=1)


# Pending


@pytest.mark.usefixtures("backlog")
@pytest.mark.parametrize(("batch_size", "statements"), [(1, 5), (2, 3), (3, 2), (4, 2), (5, 1), (1000, 1)])
def test_iter_pending_walks_all_pages(
    session: Session, service: ShadowService, batch_size: int, statements: int
) -> None:
    with counted_statements(session.connection()) as seen:
        shadows = list(service.iter_pending(batch_size=batch_size))

    assert shadows == service.pending()
    assert [shadow.device_id for shadow in shadows] == ["d0", "d3", "d6", "d9"]
    assert len(seen) == statements


def test_iter_pending_of_nothing_is_empty(service: ShadowService) -> None:
    assert list(service.iter_pending()) == []


@pytest.mark.usefixtures("backlog")
def test_iter_pending_reads_a_page_when_it_is_reached_and_not_before(session: Session, service: ShadowService) -> None:
    with counted_statements(session.connection()) as seen:
        walk = service.iter_pending(batch_size=2)
        assert len(seen) == 0
        next(walk)
        next(walk)
        assert len(seen) == 1
        next(walk)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("batch_size", "error"),
    [(0, ValueError), (-1, ValueError), (2**63, ValueError), ("5", TypeError), (True, TypeError), (None, TypeError)],
)
def test_a_batch_size_that_makes_no_sense_is_refused_at_the_call(
    service: ShadowService, batch_size: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="batch_size must be "):
        service.iter_pending(batch_size=batch_size)


def test_whoever_iterates_may_write_and_commit(own_engine: Engine) -> None:
    with Session(own_engine) as session:
        session.execute(
            text("INSERT INTO device_state (tenant_id, site_id, device_id, desired_version) SELECT 'acme', 's', 'd' || n, 1 FROM generate_series(1, 50) n")
        )  # fmt: skip
        session.commit()
        service = ShadowService(session, TENANT)
        walked = []
        for shadow in service.iter_pending(batch_size=7):
            service.replace_reported(shadow.device_id, {}, acked_version=shadow.desired_version)
            session.commit()
            walked.append(shadow.device_id)

        assert len(walked) == len(set(walked)) == 50
        assert service.count_pending() == 0


def test_a_long_backlog_is_walked_as_a_short_one_is(session: Session, service: ShadowService) -> None:
    count = 10_003  # more than any page
    session.execute(
        text("INSERT INTO device_state (tenant_id, site_id, device_id, desired_version) SELECT 'acme', 's', md5(CAST(n AS text)), n % 30 FROM generate_series(1, :n) n"),
        {"n": count * 30 // 29 + 1},
    )  # fmt: skip

    walked = [shadow.device_id for shadow in service.iter_pending(batch_size=2500)]

    in_order = text("SELECT device_id FROM device_state WHERE desired_version > 0 ORDER BY device_id")
    assert walked == list(session.scalars(in_order))
    assert service.count_pending() == len(walked) >= count
    assert [shadow.device_id for shadow in service.pending(limit=2, after=walked[41])] == walked[42:44]
    assert service.pending(limit=0) == []


def test_the_questions_see_the_callers_own_uncommitted_writes(session: Session, service: ShadowService) -> None:
    device = DeviceState(tenant_id=TENANT, site_id="berlin", device_id="d")
    session.add(device)
    assert service.status_counts() == {SyncStatus.SYNCED: 0, SyncStatus.PENDING: 0, SyncStatus.STALE: 1}

    service.replace_desired_many({"d": {"a": 1}})
    assert (service.count_pending(), service.drifted()) == (1, [])
    assert [shadow.device_id for shadow in service.iter_pending()] == ["d"]

    service.replace_reported("d", {}, acked_version=1)
    assert service.count_pending() == 0
    assert service.drifted() == [service.get("d")]
    assert service.status_counts()[SyncStatus.SYNCED] == 1

    device.last_seen_at = NOW - timedelta(days=1)
    assert service.status_counts()[SyncStatus.STALE] == 1


# Drifted


def add_drifted(session: Session, device_id: str, **columns: Any) -> None:
    values: dict[str, Any] = {"desired_state": {"a": 1}, "desired_version": 1, "reported_version": 1} | columns
    add_device(session, device_id, **values)


def test_drifted_lists_this_tenants_devices_that_acknowledged_and_run_something_else(
    session: Session, service: ShadowService
) -> None:
    add_drifted(session, "d2", reported_state={"a": 2})
    add_drifted(session, "d1")
    add_drifted(session, "same", reported_state={"a": 1.0, "more": 1})
    add_drifted(session, "pending", desired_version=2)
    add_drifted(session, "ahead", reported_version=2)
    add_drifted(session, "null", desired_state={"a": None})
    add_drifted(session, "none", desired_state={})
    add_drifted(session, "order", desired_state={"a": [1, 2]}, reported_state={"a": [2, 1]})
    add_drifted(session, "inside", desired_state={"a": {"b": 1}}, reported_state={"a": {"b": 2, "more": 1}})
    add_drifted(session, "more-inside", desired_state={"a": {"b": 1}}, reported_state={"a": {"b": 1, "more": 1}})
    add_drifted(session, "in-array", desired_state={"a": [{"b": 1}]}, reported_state={"a": [{"b": 1, "more": 1}]})
    add_drifted(session, "theirs", tenant_id="globex")

    with counted_statements(session.connection()) as seen:
        shadows = service.drifted()

    drifted = ["d1", "d2", "in-array", "inside", "null", "order"]
    assert [shadow.device_id for shadow in shadows] == drifted
    assert shadows == list(service.get_many(drifted).values())
    assert len(seen) == 1


def test_pages_of_drifted_join_without_gap_or_repetition(session: Session, service: ShadowService) -> None:
    for n in (3, 1, 4, 0, 2):
        add_drifted(session, f"d{n}")

    first = service.drifted(limit=2)
    second = service.drifted(limit=2, after=first[-1].device_id)

    assert [shadow.device_id for shadow in first + second] == ["d0", "d1", "d2", "d3"]
    assert [shadow.device_id for shadow in service.drifted(after="d2~gone")] == ["d3", "d4"]
    assert service.drifted(after="d4") == []
    assert service.drifted(limit=0) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"limit": -1}, ValueError, "limit must be 0 or more"),
        ({"limit": "5"}, TypeError, "limit must be an int, got '5'"),
        ({"after": 5}, TypeError, "after must be a str, got 5"),
        ({"after": "a\0"}, ValueError, "after must be a device_id of a page before"),
    ],
)
def test_a_page_of_drifted_that_makes_no_sense_is_refused(
    service: ShadowService, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        service.drifted(**arguments)


@on_generated_data
@given(pairs=st.lists(st.tuples(document_pairs, st.integers(0, 2)), min_size=1, max_size=8))
def test_drifted_agrees_with_the_shadows_own_answer(
    session: Session, pairs: list[tuple[tuple[dict[str, Any], dict[str, Any]], int]]
) -> None:
    service = ShadowService(session, TENANT)
    with session.begin_nested() as fleet:
        for n, ((desired, reported), ahead) in enumerate(pairs):
            add_device(session, f"d{n}", desired_state=desired, reported_state=reported, desired_version=1, reported_version=ahead)  # fmt: skip

        shadows = service.get_many([f"d{n}" for n in range(len(pairs))]).values()
        assert service.drifted() == [shadow for shadow in shadows if shadow.is_drifted]
        fleet.rollback()


# Status counts


def test_all_three_counts_are_there_in_one_statement(session: Session, service: ShadowService) -> None:
    with counted_statements(session.connection()) as seen:
        counts = service.status_counts()

    assert counts == {SyncStatus.SYNCED: 0, SyncStatus.PENDING: 0, SyncStatus.STALE: 0}
    assert all(isinstance(status, SyncStatus) for status in counts)
    assert len(seen) == 1


def test_another_tenants_devices_are_not_counted(session: Session, service: ShadowService) -> None:
    add_device(session, tenant_id="globex")

    assert sum(service.status_counts().values()) == 0


def test_the_default_now_is_the_clock(session: Session, service: ShadowService) -> None:
    add_device(session, "fresh", last_seen_at=datetime.now(UTC) - timedelta(minutes=29))
    add_device(session, "silent", last_seen_at=datetime.now(UTC) - timedelta(minutes=31))

    assert service.status_counts() == {SyncStatus.SYNCED: 1, SyncStatus.PENDING: 0, SyncStatus.STALE: 1}


def test_a_now_that_is_no_moment_is_refused(service: ShadowService) -> None:
    with pytest.raises(ValueError, match="now must be timezone-aware"):
        service.status_counts(now=NOW.replace(tzinfo=None))
    with pytest.raises(TypeError, match="now must be a datetime, got '2026-11-01'"):
        service.status_counts(now="2026-11-01")  # type: ignore[arg-type]


near_the_threshold = st.integers(-2, 2).map(lambda microseconds: timedelta(microseconds=microseconds))
zones = st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=30)), timezone(-timedelta(hours=9))])


@on_generated_data
@given(
    devices=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 3), st.none() | near_the_threshold | st.timedeltas(-timedelta(2), timedelta(2))),
        max_size=10,
    ),
    stale_after=st.sampled_from([timedelta(0), timedelta(minutes=30), timedelta(days=40, microseconds=1), -timedelta(1)]),
    zone=zones,
)  # fmt: skip
def test_the_counts_are_what_sync_status_says_of_each_device(
    session: Session, devices: list[tuple[int, int, timedelta | None]], stale_after: timedelta, zone: timezone
) -> None:
    now = NOW.astimezone(zone)
    service = ShadowService(session, TENANT, stale_after=stale_after)
    with session.begin_nested() as fleet:
        expected: Counter[SyncStatus] = Counter()
        for n, (desired, reported, offset) in enumerate(devices):
            seen = None if offset is None else now - stale_after + offset
            add_device(session, f"d{n}", desired_version=desired, reported_version=reported, last_seen_at=seen)
            expected[sync_status(desired, reported, seen, now=now, stale_after=stale_after)] += 1

        assert service.status_counts(now=now) == {status: expected[status] for status in SyncStatus}
        assert (
            Counter(shadow.sync_status(now) for shadow in service.get_many(f"d{n}" for n in range(10)).values())
            == expected
        )
        fleet.rollback()
