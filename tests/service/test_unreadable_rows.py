"""A row that SQL by hand left without a shadow is that device's error, and no other device's."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from iot_models import (
    AsyncShadowService,
    BatchRejected,
    DeviceState,
    Report,
    ReportStatus,
    ShadowService,
    SyncStatus,
    UnreadableShadow,
)
from tests.databases.async_engines import ASYNC_DRIVERS, async_engine, in_event_loop, url_for
from tests.databases.devices import TENANT, add_device

if TYPE_CHECKING:
    from sqlalchemy import Engine

NO_DOCUMENTS = {
    "null": "is no JSON object but null",
    "[]": "is no JSON object but an array",
    "1": "is no JSON object but a number",
    '"text"': "is no JSON object but a string",
    '{"n": ' + "9" * 5000 + "}": "Python cannot hold a number in it",
}
SECTIONS = ("desired_state", "reported_state")


@pytest.fixture
def service(session: Session) -> ShadowService:
    """Four devices, all pending; a, c and d have a shadow."""
    for device_id in "abcd":
        add_device(session, device_id, desired_state={"x": 1}, reported_state={"x": 1}, desired_version=1)
    return ShadowService(session, TENANT)


def spoil(session: Session, section: str, value: str, device_id: str = "b") -> None:
    statement = text(f"UPDATE device_state SET {section} = CAST(:value AS jsonb) WHERE device_id = :device")
    session.execute(statement, {"value": value, "device": device_id})


@pytest.mark.parametrize("value", NO_DOCUMENTS)
@pytest.mark.parametrize("section", SECTIONS)
def test_reading_one_is_an_error_that_names_the_device_the_section_and_the_value(
    service: ShadowService, session: Session, section: str, value: str
) -> None:
    spoil(session, section, value)
    with pytest.raises(
        UnreadableShadow, match=f"device 'b' of tenant 'acme' is no shadow: {section} {NO_DOCUMENTS[value]}"
    ):
        service.get("b")
    assert service.get("a").desired == {"x": 1}


@pytest.mark.parametrize("value", NO_DOCUMENTS)
@pytest.mark.parametrize("section", SECTIONS)
def test_pages_counts_and_iterations_go_on_without_it_and_the_log_names_it(
    service: ShadowService, session: Session, section: str, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(session, section, value)
    with caplog.at_level(logging.WARNING, "iot_models"):
        pages = [
            service.pending(limit=2),
            service.pending(limit=2, after="c"),
            list(service.iter_pending(batch_size=1)),
        ]
    assert ["".join(shadow.device_id for shadow in page) for page in pages] == ["ac", "d", "acd"]
    assert "device 'b' of tenant 'acme'" in caplog.text
    assert list(service.get_many(list("abcd"))) == ["a", "c", "d"]
    assert service.count_pending() == 4
    assert service.status_counts()[SyncStatus.STALE] == 4

    session.execute(text("UPDATE device_state SET reported_version = 1"))
    session.execute(text("""UPDATE device_state SET reported_state = '{"x": 2}' WHERE device_id IN ('a', 'd')"""))
    assert [shadow.device_id for shadow in service.drifted(limit=2)] == ["a", "d"]
    if value.startswith("{"):
        return  # PostgreSQL can hold such a number, and answers for it
    query = select(DeviceState.device_id).order_by("device_id")
    assert session.scalars(query.where(DeviceState.is_drifted)).all() == ["a", "d"]
    query_of_deltas = select(DeviceState.device_id, DeviceState.delta)
    deltas = {row.device_id: row.delta for row in session.execute(query_of_deltas)}
    assert (deltas["a"], deltas["c"]) == ({"x": 1}, {})
    assert deltas["b"] is None


@pytest.mark.parametrize("value", NO_DOCUMENTS)
def test_a_patch_of_what_is_no_document_is_refused_and_writes_nothing(
    service: ShadowService, session: Session, value: str
) -> None:
    for section in SECTIONS:
        spoil(session, section, value)
    with pytest.raises(UnreadableShadow, match="device 'b'"):
        service.patch_desired("b", {"y": 1})
    with pytest.raises(UnreadableShadow, match="device 'b'"):
        service.patch_reported("b", {"y": 1})
    with pytest.raises(BatchRejected) as caught:
        service.patch_desired_many(["a", "b"], {"y": 1})
    assert isinstance(caught.value.errors["b"], UnreadableShadow)
    assert list(caught.value.errors) == ["b"]
    assert service.get("a").desired_version == 1


@pytest.mark.parametrize("value", NO_DOCUMENTS)
def test_replacing_mends_it_and_no_write_that_took_effect_ends_in_an_error(
    service: ShadowService, session: Session, value: str
) -> None:
    for section in SECTIONS:
        spoil(session, section, value)
    written = service.replace_desired("b", {"y": 1})
    assert (written.desired, written.reported, written.desired_version) == ({"y": 1}, {}, 2)
    assert service.replace_reported("b", {"y": 2}, acked_version=2).delta == {"y": 1}
    assert service.get("b").is_drifted

    for section in SECTIONS:
        spoil(session, section, value)
    assert service.replace_desired_many({"b": {"y": 1}})["b"].reported == {}
    assert service.replace_reported_many([Report("b", {"y": 1}, 3)])[0].status is ReportStatus.ACCEPTED
    assert service.get("b").is_converged


@pytest.mark.parametrize("driver", ASYNC_DRIVERS)
@in_event_loop
async def test_both_async_drivers_read_past_it(own_engine: Engine, driver: str) -> None:
    with Session(own_engine) as session, session.begin():
        for device_id, value in zip("abcdef", ["{}", *NO_DOCUMENTS], strict=True):
            add_device(session, device_id, desired_version=1)
            spoil(session, "reported_state", value, device_id)
        session.execute(text("UPDATE device_state SET last_seen_at = 'infinity' WHERE device_id = 'a'"))
    async with async_engine(url_for(driver, own_engine.url)) as engine, AsyncSession(engine) as async_session:
        service = AsyncShadowService(async_session, TENANT)
        assert [(shadow.device_id, shadow.last_seen_at) for shadow in await service.pending()] == [("a", None)]
        with pytest.raises(UnreadableShadow):
            await service.get("b")
        assert (await service.status_counts())[SyncStatus.STALE] == 6


# Times that Python, or the driver in some time zones, cannot hold; Azure writes the first for "never".
TIMES: dict[str, datetime | None] = {
    "0001-01-01 00:00:00+00": datetime.min.replace(tzinfo=UTC),
    "9999-12-31 23:59:59.999999+00": datetime.max.replace(tzinfo=UTC),
    "0044-03-15 12:00:00+00 BC": None,
    "10000-01-01 00:00:00+00": None,
    "infinity": None,
    "-infinity": None,
}


@pytest.mark.parametrize("zone", ["UTC", "America/Los_Angeles", "Pacific/Auckland"])
@pytest.mark.parametrize("time", TIMES)
def test_a_time_is_read_in_every_time_zone_and_as_none_where_python_cannot_hold_it(
    service: ShadowService, session: Session, time: str, zone: str
) -> None:
    session.execute(text(f"SET LOCAL TimeZone = '{zone}'"))
    binds = {"time": time}
    session.execute(text("UPDATE device_state SET last_seen_at = :time, shadow_updated_at = :time"), binds)
    expected = TIMES[time]
    for shadow in (service.get("a"), service.pending()[0], next(service.iter_pending())):
        assert (shadow.last_seen_at, shadow.shadow_updated_at) == (expected, expected)
        shadow.explain()
        shadow.to_dict()
    device = session.get_one(DeviceState, (TENANT, "c"))
    assert device.last_seen_at == expected
    counts = service.status_counts()
    assert sum(counts.values()) == 4
    assert counts[service.get("a").sync_status()] == 4


def test_in_autocommit_mode_a_write_over_such_a_time_is_answered(own_engine: Engine) -> None:
    with Session(own_engine) as session, session.begin():
        add_device(session, "a")
        session.execute(text("UPDATE device_state SET last_seen_at = '0001-01-01 00:00:00+00'"))
    engine = own_engine.execution_options(isolation_level="AUTOCOMMIT")
    with Session(engine) as session:
        session.execute(text("SET TimeZone = 'America/Los_Angeles'"))
        assert ShadowService(session, TENANT).patch_desired("a", {"x": 1}).desired_version == 1


# Versions ahead: handlers that store whatever version a device sends.


def test_a_reported_version_ahead_is_brought_back_by_the_next_desired_write(
    service: ShadowService, session: Session
) -> None:
    session.execute(text("UPDATE device_state SET desired_version = 0, reported_version = 999"))
    device = session.get_one(DeviceState, (TENANT, "d"))
    device.desired_state = {"y": 1}
    session.flush()
    written = [
        service.replace_desired("a", {"y": 1}),
        service.patch_desired_many(["b"], {"y": 1})["b"],
        service.replace_desired_many({"c": {"y": 1}})["c"],
        service.get("d"),
    ]
    assert [(shadow.desired_version, shadow.reported_version) for shadow in written] == [(1, 0)] * 4
    assert [shadow.device_id for shadow in service.pending()] == list("abcd")
    assert service.replace_reported("a", {"y": 1}, acked_version=1).reported_version == 1


@pytest.mark.parametrize("hybrid", [DeviceState.is_drifted, DeviceState.delta, DeviceState.is_pending])
def test_hybrids_can_be_grouped_and_ordered_by(service: ShadowService, session: Session, hybrid: Any) -> None:
    counted = session.execute(select(hybrid, func.count()).group_by(hybrid).order_by(hybrid)).all()
    assert sum(row[1] for row in counted) == 4
    assert service.count_pending() == 4


def test_the_time_of_a_write_never_falls_and_no_time_from_the_far_future_stays(own_engine: Engine) -> None:
    with Session(own_engine) as session, session.begin():
        add_device(session, "a")
        add_device(session, "ahead", last_seen_at=datetime.now(UTC) + timedelta(days=9000))
    with Session(own_engine) as early, early.begin():
        early.scalar(select(func.now()))  # its transaction begins
        with Session(own_engine) as late, late.begin():
            service = ShadowService(late, TENANT)
            service.replace_desired("a", {})
            first = service.replace_reported("a", {})
        service = ShadowService(early, TENANT)
        service.replace_desired("a", {})
        second = service.replace_reported("a", {})
        assert service.replace_reported_many([Report("a", {})])[0].status is ReportStatus.ACCEPTED
        assert early.get_one(DeviceState, (TENANT, "a")).last_seen_at == first.last_seen_at
        assert first.last_seen_at
        assert first.shadow_updated_at
        assert second.last_seen_at
        assert second.shadow_updated_at
        assert second.last_seen_at >= first.last_seen_at
        assert second.shadow_updated_at >= first.shadow_updated_at
        ahead = service.replace_reported("ahead", {}).last_seen_at
        assert ahead
        assert ahead <= datetime.now(UTC) + timedelta(minutes=2)


@pytest.mark.parametrize("name", ["last_seen_at", "shadow_updated_at", "last_heartbeat_at", "last_state_change_at"])
@pytest.mark.usefixtures("service")
def test_a_naive_time_is_refused_by_the_flush(session: Session, name: str) -> None:
    device = session.get_one(DeviceState, (TENANT, "a"))
    setattr(device, name, datetime(2026, 1, 1, 12))  # noqa: DTZ001 - the fault
    with pytest.raises(Exception, match="a time must be timezone-aware"):
        session.flush()


@pytest.mark.parametrize("style", ["German", "SQL, DMY", "Postgres, MDY"])
def test_times_are_written_and_read_whatever_the_sessions_date_style_is(
    service: ShadowService, session: Session, style: str
) -> None:
    session.execute(text(f"SET LOCAL DateStyle = '{style}'"))
    written = service.replace_reported("a", {}).last_seen_at
    assert written == service.get("a").last_seen_at == session.get_one(DeviceState, (TENANT, "a")).last_seen_at
    assert written
    assert abs(written - datetime.now(UTC)) < timedelta(minutes=5)
