"""The history of desired versions: who wrote what, when and why; and how an earlier one is restored."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from iot_models import (
    DesiredVersion,
    DeviceNotFound,
    DeviceState,
    InvalidVersion,
    Report,
    ShadowHistory,
    ShadowService,
    UnreadableShadow,
    VersionConflict,
    VersionNotKept,
)
from tests.databases.devices import DEVICE, TENANT, add_device
from tests.databases.statements import counted_statements

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

WRITTEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def service(session: Session) -> ShadowService:
    add_device(session, desired_state={"mode": "eco"}, desired_version=7, shadow_updated_at=WRITTEN)
    return ShadowService(session, TENANT, actor="anna")


def told(service: ShadowService, device_id: str = DEVICE) -> list[tuple[Any, ...]]:
    return [(v.version, v.desired, v.actor, v.reason) for v in service.history(device_id)]


def recorded(session: Session) -> list[int]:
    """The versions in the table itself, by plain SQL."""
    return list(
        session.scalars(text("SELECT desired_version FROM device_shadow_history WHERE desired_version >= 0 ORDER BY 1"))
    )


def test_each_way_to_write_desired_records_its_version_in_the_statements_that_it_had_before(
    session: Session, service: ShadowService
) -> None:
    ways: list[tuple[int, Callable[[], object]]] = [
        (1, lambda: service.replace_desired(DEVICE, {"n": 8}, reason="one")),
        (2, lambda: service.patch_desired(DEVICE, {"n": 9}, reason="two")),
        (1, lambda: service.replace_desired_many({DEVICE: {"n": 10}}, reason="three")),
        (2, lambda: service.patch_desired_many([DEVICE], {"n": 11}, reason="four")),
        (1, lambda: service.restore_desired(DEVICE, 9, reason="five")),
    ]
    for expected, way in ways:
        with counted_statements(session.connection()) as statements:
            way()
        assert len(statements) == expected

    assert told(service) == [
        (12, {"n": 9}, "anna", "five"),
        (11, {"n": 11}, "anna", "four"),
        (10, {"n": 10}, "anna", "three"),
        (9, {"n": 9}, "anna", "two"),
        (8, {"n": 8}, "anna", "one"),
        (7, {"mode": "eco"}, None, None),
    ]
    assert [v.written_at == session.scalar(text("SELECT now()")) for v in service.history(DEVICE)] == [True] * 5 + [
        False
    ]
    assert service.history(DEVICE)[-1].written_at == WRITTEN


def test_a_flush_records_the_version_and_takes_its_author_from_the_session(session: Session) -> None:
    add_device(session)
    session.info.update({"iot_models.actor": "ops", "iot_models.reason": "a ticket"})
    device = session.get_one(DeviceState, (TENANT, DEVICE))
    device.desired_state["mode"] = "heat"

    with counted_statements(session.connection()) as statements:
        session.flush()

    assert len(statements) == 1
    assert told(ShadowService(session, TENANT)) == [(1, {"mode": "heat"}, "ops", "a ticket"), (0, {}, None, None)]
    ShadowService(session, TENANT).patch_desired(DEVICE, {})
    assert told(ShadowService(session, TENANT))[0] == (2, {"mode": "heat"}, "ops", "a ticket")
    ShadowService(session, TENANT, actor="anna").patch_desired(DEVICE, {}, reason="mine")
    assert told(ShadowService(session, TENANT))[0] == (3, {"mode": "heat"}, "anna", "mine")


@pytest.mark.parametrize(
    ("info", "error"), [({"iot_models.actor": 7}, TypeError), ({"iot_models.reason": ""}, ValueError)]
)
def test_a_flush_refuses_an_author_that_cannot_be_stored(
    session: Session, info: dict[str, object], error: type[Exception]
) -> None:
    add_device(session)
    device = session.get_one(DeviceState, (TENANT, DEVICE))
    session.info.update(info)
    device.desired_state["mode"] = "heat"
    with pytest.raises(error, match=r"session.info\['iot_models"):
        session.flush()


def test_reports_and_heartbeats_leave_no_version(session: Session, service: ShadowService) -> None:
    service.replace_reported(DEVICE, {"mode": "eco"}, acked_version=7)
    service.patch_reported_many([Report(DEVICE, {"on": True})])
    service.refuse_desired(DEVICE, 7, "no") if service.get(DEVICE).is_pending else None
    session.get_one(DeviceState, (TENANT, DEVICE)).status = "ONLINE"
    session.flush()

    assert recorded(session) == []


def test_the_version_that_a_device_is_at_is_in_its_history_before_anything_is_recorded(
    session: Session, service: ShadowService
) -> None:
    (only,) = service.history(DEVICE)

    assert only == DesiredVersion(TENANT, DEVICE, 7, {"mode": "eco"}, WRITTEN, None, None, None)
    assert service.desired_at(DEVICE, 7) == only
    assert hash(only) == hash(service.desired_at(DEVICE, 7))
    add_device(session, "new")
    assert told(service, "new") == [(0, {}, None, None)]
    assert service.history("new")[0].written_at is None


def test_versions_of_code_that_knows_no_history_are_missing_and_nothing_stands_for_them(
    session: Session, service: ShadowService
) -> None:
    service.replace_desired(DEVICE, {"n": 8})
    session.execute(text("UPDATE device_state SET desired_state = '{\"n\": 10}', desired_version = 10"))
    assert told(service)[0] == (10, {"n": 10}, None, None)

    service.replace_desired(DEVICE, {"n": 11})

    assert [v.version for v in service.history(DEVICE)] == [11, 10, 8, 7]
    with pytest.raises(VersionNotKept, match=r"no document of version 9 .* versions from 7 to 11"):
        service.desired_at(DEVICE, 9)


def test_pages_of_the_history_go_from_the_newest_to_the_oldest(service: ShadowService) -> None:
    for n in range(8, 12):
        service.replace_desired(DEVICE, {"n": n})

    pages = [service.history(DEVICE, limit=2)]
    while pages[-1]:
        pages.append(service.history(DEVICE, limit=2, before=pages[-1][-1].version))

    assert [[v.version for v in page] for page in pages] == [[11, 10], [9, 8], [7], []]
    assert service.history(DEVICE, limit=0) == []


def test_a_version_becomes_a_dict_for_an_http_api(service: ShadowService) -> None:
    service.replace_desired(DEVICE, {"n": 8}, reason="why", request_id="r")
    assert service.desired_at(DEVICE, 7).to_dict() == {
        "device_id": DEVICE,
        "version": 7,
        "desired": {"mode": "eco"},
        "written_at": "2026-01-02T03:04:05+00:00",
        "actor": None,
        "reason": None,
        "request_id": None,
    }
    assert service.desired_at(DEVICE, 8).to_dict()["request_id"] == "r"


def test_the_same_version_of_another_tenant_or_device_is_another_one(session: Session, service: ShadowService) -> None:
    add_device(session, tenant_id="globex", desired_version=7, desired_state={"their": 1})
    add_device(session, "other", desired_version=7, desired_state={"other": 1})
    theirs = ShadowService(session, "globex")
    theirs.replace_desired(DEVICE, {"their": 2})
    service.replace_desired("other", {"other": 2})

    assert told(service) == [(7, {"mode": "eco"}, None, None)]
    with pytest.raises(VersionNotKept):
        service.restore_desired(DEVICE, 8)
    assert theirs.desired_at(DEVICE, 8).desired == {"their": 2}
    with pytest.raises(DeviceNotFound):
        ShadowService(session, "nobody").history(DEVICE)


def test_a_restored_document_is_a_new_version_to_the_last_digit(session: Session, service: ShadowService) -> None:
    session.execute(text("UPDATE device_state SET desired_state = '{\"n\": 0.12345678901234567890123}'"))
    service.replace_desired(DEVICE, {"n": 0})

    shadow = service.restore_desired(DEVICE, 7, expected_version=8)

    assert (shadow.desired_version, shadow.is_pending) == (9, True)
    stored = session.scalar(text("SELECT desired_state::text FROM device_state"))
    assert stored == '{"n": 0.12345678901234567890123}'
    assert session.scalar(text("SELECT count(*) FROM device_shadow_history WHERE desired_version = 9")) == 1


def test_what_is_restored_is_shown_by_the_objects_that_are_loaded(session: Session, service: ShadowService) -> None:
    device = session.get_one(DeviceState, (TENANT, DEVICE))
    service.replace_desired(DEVICE, {"n": 8})
    service.restore_desired(DEVICE, 7)
    assert (device.desired_state, device.desired_version) == ({"mode": "eco"}, 9)
    device.desired_state["mode"] = "heat"
    session.flush()
    assert service.get(DEVICE).desired_version == 10


@pytest.mark.parametrize("version", [6, 8, 9, 2**40, 2**62])
def test_a_version_that_is_not_kept_is_refused_with_what_is_and_nothing_is_written(
    session: Session, service: ShadowService, version: int
) -> None:
    for call in (service.desired_at, service.restore_desired):
        with pytest.raises(VersionNotKept) as caught:
            call(DEVICE, version)
        assert (caught.value.oldest, caught.value.newest) == (7, 7)
    assert recorded(session) == []
    assert service.get(DEVICE).desired_version == 7


def test_a_restore_that_is_overtaken_writes_nothing(service: ShadowService) -> None:
    service.replace_desired(DEVICE, {"n": 8})
    with pytest.raises(VersionConflict):
        service.restore_desired(DEVICE, 7, expected_version=7)
    assert service.get(DEVICE).desired == {"n": 8}


@pytest.mark.parametrize("version", [-1, "7", 7.0, True, None, 2**63])
def test_what_is_no_version_is_refused(service: ShadowService, version: Any) -> None:
    for call in (service.desired_at, service.restore_desired):
        with pytest.raises(InvalidVersion, match="version must be an integer"):
            call(DEVICE, version)
    if version is not None:
        with pytest.raises(InvalidVersion, match="before must be an integer"):
            service.history(DEVICE, before=version)


def test_a_device_that_never_was_has_no_history(service: ShadowService) -> None:
    with pytest.raises(DeviceNotFound):
        service.history("nobody")
    with pytest.raises(VersionNotKept, match="none is kept"):
        service.desired_at("nobody", 1)
    with pytest.raises(DeviceNotFound):
        service.restore_desired("nobody", 1)
    assert service.history("nobody", before=9) == []


def test_a_version_that_is_no_document_spoils_no_other(
    session: Session, service: ShadowService, caplog: pytest.LogCaptureFixture
) -> None:
    session.execute(text("UPDATE device_state SET desired_state = 'null'"))
    with caplog.at_level(logging.WARNING):
        service.replace_desired(DEVICE, {"n": 8})

        assert told(service) == [(8, {"n": 8}, "anna", None)]
    assert "desired_state of version 7 is no JSON object but null" in caplog.text
    for call in (service.desired_at, service.restore_desired):
        with pytest.raises(UnreadableShadow, match="version 7 is no JSON object but null"):
            call(DEVICE, 7)
    assert service.get(DEVICE).desired_version == 8


def test_a_refused_write_leaves_no_version(session: Session, service: ShadowService) -> None:
    with pytest.raises(VersionConflict):
        service.replace_desired(DEVICE, {}, expected_version=6)
    with pytest.raises(Exception, match="nothing was written"):
        service.replace_desired_many({DEVICE: {}, "nobody": {}})
    assert recorded(session) == []


def test_a_rollback_takes_the_version_back(session: Session, service: ShadowService) -> None:
    with session.begin_nested() as savepoint:
        service.replace_desired(DEVICE, {"n": 8})
        savepoint.rollback()
    assert recorded(session) == []
    assert told(service) == [(7, {"mode": "eco"}, None, None)]


@pytest.mark.usefixtures("service")
def test_a_service_without_history_writes_as_ever_and_leaves_no_version(session: Session) -> None:
    plain = ShadowService(session, TENANT, history=False)
    plain.replace_desired(DEVICE, {"n": 8})
    plain.patch_desired(DEVICE, {"m": 9})
    plain.replace_desired_many({DEVICE: {"n": 10}})
    plain.patch_desired_many([DEVICE], {"m": 11})

    assert (plain.get(DEVICE).desired_version, recorded(session)) == (11, [])
    for name in ("reason", "request_id"):
        with pytest.raises(ValueError, match=f"{name} is kept in the history, and this service was made with"):
            plain.replace_desired(DEVICE, {}, **{name: "x"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reason is kept in the history"):
        plain.replace_desired_many({DEVICE: {}}, reason="x")
    # What reads the history writes it, and so does what would let a message into the next life.
    plain.restore_desired(DEVICE, 11)
    assert recorded(session) == [11, 12]
    plain.remove(DEVICE)
    assert plain.register(DEVICE, "berlin").desired_version == 13


@pytest.mark.parametrize(
    ("bad", "error"),
    [(7, TypeError), (b"x", TypeError), ("", ValueError), (" \n", ValueError), ("x" * 1001, ValueError),
     ("a\0b", ValueError), ("\ud800", ValueError)],
)  # fmt: skip
def test_an_actor_a_reason_or_a_request_that_cannot_be_stored_is_refused_before_anything_is_sent(
    session: Session, service: ShadowService, bad: Any, error: type[Exception]
) -> None:
    calls: dict[str, Callable[[], object]] = {
        "actor": lambda: ShadowService(session, TENANT, actor=bad),
        "reason": lambda: service.replace_desired(DEVICE, {}, reason=bad),
        "request_id": lambda: service.patch_desired(DEVICE, {}, request_id=bad),
    }
    with counted_statements(session.connection()) as statements:
        for name, call in calls.items():
            with pytest.raises(error, match=f"{name} must be"):
                call()
        with pytest.raises(error, match="reason must be"):
            service.replace_desired_many({DEVICE: {}}, reason=bad)
        with pytest.raises(error, match="reason must be"):
            service.remove(DEVICE, reason=bad)
        with pytest.raises(error, match="reason must be"):
            service.refuse_desired(DEVICE, 7, bad)
    assert statements == []


def test_the_longest_that_is_accepted_is_stored(session: Session, service: ShadowService) -> None:
    longest = "🌡" * 255
    ShadowService(session, TENANT, actor=longest).replace_desired(DEVICE, {}, reason="🌡" * 1000, request_id=longest)
    (newest, *_) = service.history(DEVICE)
    assert (newest.actor, newest.reason, newest.request_id) == (longest, "🌡" * 1000, longest)


# Pruning.


def aged(session: Session, service: ShadowService, versions: int = 5) -> None:
    """Versions 7 to 11, each a day older than the next."""
    for n in range(8, 7 + versions):
        service.replace_desired(DEVICE, {"n": n})
    session.execute(
        text("UPDATE device_shadow_history SET written_at = now() - (12 - desired_version) * INTERVAL '1 day'")
    )


@pytest.mark.parametrize(
    ("days", "keep", "left"),
    [(0, 1, [11]), (0, 3, [9, 10, 11]), (2, 1, [10, 11]), (9, 1, [7, 8, 9, 10, 11]), (0, 0, [])],
)
def test_pruning_deletes_what_is_old_and_never_the_newest_ones(
    session: Session, service: ShadowService, days: int, keep: int, left: list[int]
) -> None:
    aged(session, service)
    add_device(session, tenant_id="globex")
    ShadowService(session, "globex").replace_desired(DEVICE, {})

    with counted_statements(session.connection()) as statements:
        deleted = service.prune_history(older_than=timedelta(days=days), keep=keep)

    assert (deleted, len(statements)) == (5 - len(left), 1)
    assert (
        list(
            session.scalars(
                select(ShadowHistory.desired_version)
                .filter_by(tenant_id=TENANT)
                .where(ShadowHistory.desired_version >= 0)  # not the mark of the pruning
                .order_by(ShadowHistory.desired_version)
            )
        )
        == left
    )
    assert len(ShadowService(session, "globex").history(DEVICE)) == 2
    assert told(service)[0][:2] == (11, {"n": 11})


def test_pages_of_pruning_delete_the_oldest_first_until_nothing_is_left_to_delete(
    session: Session, service: ShadowService
) -> None:
    aged(session, service)
    assert service.prune_history(older_than=timedelta(0), limit=3) == 3
    assert recorded(session) == [10, 11]
    assert service.prune_history(older_than=timedelta(0), limit=3) == 1
    assert service.prune_history(older_than=timedelta(0), limit=3) == 0


def test_the_state_before_the_first_recorded_write_is_as_old_as_that_write(session: Session) -> None:
    add_device(session)
    service = ShadowService(session, TENANT)
    service.replace_desired(DEVICE, {"n": 1})
    assert service.prune_history(older_than=timedelta(days=1)) == 0
    assert service.prune_history(older_than=timedelta.max) == 0
    session.execute(
        text("UPDATE device_shadow_history SET written_at = now() - INTERVAL '2 days' WHERE desired_version = 1")
    )
    assert service.prune_history(older_than=timedelta(days=1)) == 1
    assert recorded(session) == [1]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"older_than": timedelta(seconds=-1)}, ValueError), ({"older_than": 5}, TypeError),
     ({"older_than": timedelta(), "keep": -1}, ValueError), ({"older_than": timedelta(), "limit": -1}, ValueError),
     ({"older_than": timedelta(), "keep": True}, TypeError)],
)  # fmt: skip
def test_pruning_by_what_is_no_age_or_number_is_refused(
    service: ShadowService, arguments: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match="must be"):
        service.prune_history(**arguments)


def test_two_writers_at_once_record_each_version_once(own_engine: Engine) -> None:
    with Session(own_engine) as session, session.begin():
        add_device(session)
    with Session(own_engine) as first, Session(own_engine) as second:
        ShadowService(first, TENANT).replace_desired(DEVICE, {"n": 1})
        first.commit()
        ShadowService(second, TENANT).replace_desired(DEVICE, {"n": 2})
        second.commit()
        assert recorded(first) == [0, 1, 2]


def test_a_row_of_the_history_says_which_it_is(session: Session, service: ShadowService) -> None:
    service.replace_desired(DEVICE, {"n": 8})
    row = session.get_one(ShadowHistory, (TENANT, DEVICE, 8))
    assert repr(row) == f"ShadowHistory(tenant_id='{TENANT}', device_id='{DEVICE}', desired_version=8)"


def test_what_is_set_beside_desired_is_written_too(session: Session, service: ShadowService) -> None:
    device = session.get_one(DeviceState, (TENANT, DEVICE))
    device.desired_state["n"] = 8
    device.reported_version, device.refusal = 3, "kept"
    session.flush()
    assert (service.get(DEVICE).desired_version, service.get(DEVICE).reported_version) == (8, 3)
    assert session.scalar(text("SELECT refusal FROM device_state")) == "kept"
