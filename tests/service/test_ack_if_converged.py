"""Devices that send no version: a report acknowledges the newest one if it leaves the device converged."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from iot_models import DeviceNotFound, DeviceState, InvalidVersion, Report, ReportOutcome, ReportStatus, ShadowService
from tests.databases.backends import await_lock_waits
from tests.databases.devices import DEVICE, TENANT, add_device
from tests.databases.statements import counted_statements

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

    Document = dict[str, Any]

DESIRED: Document = {"fan": {"speed": 3}, "hours": [6, 22], "note": None}


def _one(service: ShadowService, document: Document) -> None:
    service.replace_reported(DEVICE, document, ack_if_converged=True)


def _patch(service: ShadowService, document: Document) -> None:
    service.patch_reported(DEVICE, document, ack_if_converged=True)


def _batch(service: ShadowService, document: Document) -> None:
    service.replace_reported_many([Report(DEVICE, document, ack_if_converged=True), Report("other", {})])


def _twice(service: ShadowService, document: Document) -> None:
    service.replace_reported_many([Report(DEVICE, {}), Report(DEVICE, document, ack_if_converged=True)])


def _patches(service: ShadowService, document: Document) -> None:
    service.patch_reported_many([Report(DEVICE, document, ack_if_converged=True)])


WAYS = {"one": _one, "patch": _patch, "batch": _batch, "batch, twice": _twice, "batch of patches": _patches}
each_way = pytest.mark.parametrize("report", WAYS.values(), ids=WAYS)


@pytest.fixture
def service(session: Session) -> ShadowService:
    """A device at desired version 7 that acknowledged 5."""
    add_device(session, desired_state=DESIRED, desired_version=7, reported_version=5)
    add_device(session, "other")
    return ShadowService(session, TENANT)


# A merge patch sets no null, so what is reported already has it where a case needs it.
@each_way
@pytest.mark.parametrize(
    ("document", "acknowledged"),
    [
        (DESIRED, True),
        ({"fan": {"speed": 3.0, "rpm": 900}, "hours": [6, 22], "note": None, "firmware": "4.2"}, True),
        ({"fan": {"speed": 3}, "hours": [6, 22]}, False),
        ({"fan": {"speed": 3}, "hours": [22, 6], "note": None}, False),
        ({"fan": {"speed": 3}, "hours": [6, 22, 6], "note": None, "more": 1}, False),
        ({"fan": {"speed": True}, "hours": [6, 22], "note": None}, False),
        ({}, False),
    ],
    ids=str,
)
def test_the_newest_version_is_acknowledged_where_reported_has_all_that_it_asks(
    session: Session,
    service: ShadowService,
    report: Callable[[ShadowService, Document], None],
    document: Document,
    *,
    acknowledged: bool,
) -> None:
    if "note" in document:
        service.replace_reported(DEVICE, {"note": None})

    report(service, {key: value for key, value in document.items() if report not in {_patch, _patches} or value})

    shadow = service.get(DEVICE)
    assert shadow.reported == document
    assert shadow.reported_version == (7 if acknowledged else 5)
    assert shadow.is_converged is acknowledged
    assert session.scalar(text("SELECT reported_version FROM device_state WHERE device_id = 'other'")) == 0


@each_way
def test_what_was_acknowledged_stays_so_when_the_device_goes_astray(
    service: ShadowService, report: Callable[[ShadowService, Document], None]
) -> None:
    _one(service, DESIRED)

    report(service, {"fan": {"speed": 1}})

    shadow = service.get(DEVICE)
    assert (shadow.reported_version, shadow.is_pending, shadow.is_drifted) == (7, False, True)


@each_way
def test_a_version_ahead_that_others_stored_is_brought_back_by_a_device_that_is_converged(
    session: Session, service: ShadowService, report: Callable[[ShadowService, Document], None]
) -> None:
    session.execute(text("UPDATE device_state SET reported_version = 999, reported_state = '{\"note\": null}'"))

    report(service, DESIRED if report not in {_patch, _patches} else {"fan": {"speed": 3}, "hours": [6, 22]})

    assert service.get(DEVICE).reported_version == 7


@each_way
@pytest.mark.parametrize("desired", ["null", "[]", "1", '"fan"'])
def test_what_is_no_desired_document_is_never_acknowledged(
    session: Session, service: ShadowService, report: Callable[[ShadowService, Document], None], desired: str
) -> None:
    session.execute(text("UPDATE device_state SET desired_state = CAST(:desired AS jsonb)"), {"desired": desired})

    report(service, {"fan": {"speed": 3}})

    assert session.scalar(text("SELECT reported_version FROM device_state WHERE desired_version = 7")) == 5


def test_it_is_one_statement_and_loaded_objects_show_the_version(session: Session, service: ShadowService) -> None:
    device = session.get_one(DeviceState, (TENANT, DEVICE))
    with counted_statements(session.connection()) as seen:
        shadow = service.replace_reported(DEVICE, DESIRED, ack_if_converged=True)

    assert len(seen) == 1
    assert (shadow.reported_version, device.reported_version, device.is_converged) == (7, 7, True)


@pytest.mark.parametrize("method", ["replace_reported", "patch_reported"])
def test_a_report_acknowledges_in_one_way(service: ShadowService, method: str) -> None:
    before = service.get(DEVICE)
    write = getattr(service, method)

    with pytest.raises(ValueError, match=r"got acked_version=7 and ack_if_converged=True. Pass the version"):
        write(DEVICE, DESIRED, acked_version=7, ack_if_converged=True)
    with pytest.raises(InvalidVersion):
        write(DEVICE, DESIRED, acked_version=-1, ack_if_converged=True)
    with pytest.raises(TypeError, match="ack_if_converged must be a bool, got 'no'"):
        write(DEVICE, DESIRED, ack_if_converged="no")
    with pytest.raises(DeviceNotFound):
        write("nobody", DESIRED, ack_if_converged=True)
    assert service.get(DEVICE) == before


@pytest.mark.parametrize("method", ["replace_reported_many", "patch_reported_many"])
def test_in_a_batch_a_report_that_acknowledges_in_both_ways_is_invalid(service: ShadowService, method: str) -> None:
    both = Report(DEVICE, DESIRED, 7, ack_if_converged=True)
    odd = Report(DEVICE, DESIRED, ack_if_converged="no")  # type: ignore[arg-type]

    outcomes = getattr(service, method)([both, odd, Report("other", {"a": 1})])

    assert [outcome.status for outcome in outcomes] == [ReportStatus.INVALID, ReportStatus.INVALID, "accepted"]
    assert outcomes[0] == ReportOutcome(DEVICE, ReportStatus.INVALID, 7, 5)
    assert service.get(DEVICE).reported == {}


def test_reports_of_one_device_are_judged_by_what_those_before_them_acknowledged(service: ShadowService) -> None:
    outcomes = service.replace_reported_many(
        [
            Report(DEVICE, {"fan": {}}, ack_if_converged=True),
            Report(DEVICE, DESIRED | {"fw": 1}, ack_if_converged=True),
            Report(DEVICE, {"late": 1}, 6),
            Report(DEVICE, {"fan": {"speed": 9}}),
        ]
    )

    assert [(outcome.status, outcome.reported_version) for outcome in outcomes] == [
        ("accepted", 5),
        ("accepted", 7),
        ("late", 7),
        ("accepted", 7),
    ]
    assert service.get(DEVICE).reported == {"fan": {"speed": 9}}


@each_way
@pytest.mark.parametrize("mode", ["READ COMMITTED", "AUTOCOMMIT"])
@pytest.mark.parametrize(
    ("before", "after", "reported"),
    [
        ({"fan": {"speed": 1}}, {"fan": {"speed": 2}}, {"fan": {"speed": 1, "rpm": 9}}),
        # Each contains the other, for a look that takes arrays for sets.
        ({"g": {"hours": [1, 2]}}, {"g": {"hours": [2, 1]}}, {"g": {"hours": [1, 2], "on": True}}),
        ({"g": {"members": ["a", "b"]}}, {"g": {"members": ["a"]}}, {"g": {"members": ["a", "b"], "name": "hall"}}),
    ],
    ids=str,
)
def test_a_version_whose_document_was_not_compared_is_never_acknowledged(
    own_engine: Engine,
    mode: str,
    report: Callable[[ShadowService, Document], None],
    before: Document,
    after: Document,
    reported: Document,
) -> None:
    """An operator writes version 1, and before that is committed, the device reports what version 0 or 1 asks."""
    asked = {"before": before, "after": after}
    with Session(own_engine) as session, session.begin():
        for device_id in (DEVICE, "other"):
            add_device(session, device_id, desired_state=before if device_id == DEVICE else {})

    def reporting() -> None:
        with Session(own_engine.execution_options(isolation_level=mode)) as session, session.begin():
            report(ShadowService(session, TENANT), reported)

    for name, version in (("after", 1), ("before", 2)):
        with ThreadPoolExecutor(1) as pool:
            with Session(own_engine) as session, session.begin():
                ShadowService(session, TENANT).replace_desired(DEVICE, asked[name])
                pending = pool.submit(reporting)
                await_lock_waits(own_engine, 1)
            pending.result(timeout=30)
        with Session(own_engine) as session:
            shadow = ShadowService(session, TENANT).get(DEVICE)
        assert shadow.reported == reported
        assert (shadow.desired_version, shadow.reported_version) == (version, version if name == "before" else 0)
