"""A device says that it will not apply the newest version, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select, text

from iot_models import (
    DeviceNotFound,
    DeviceState,
    InvalidVersion,
    LateReport,
    Report,
    ReportOutcome,
    ReportStatus,
    ShadowService,
    UnknownVersion,
)
from tests.databases.devices import DEVICE, TENANT, add_device
from tests.databases.statements import counted_statements

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

WHY = "mode 'turbo' is not supported"


@pytest.fixture
def service(session: Session) -> ShadowService:
    add_device(session, desired_state={"mode": "turbo"}, desired_version=7, reported_version=5)
    return ShadowService(session, TENANT)


def test_a_refused_device_is_pending_and_says_why(session: Session, service: ShadowService) -> None:
    with counted_statements(session.connection()) as statements:
        shadow = service.refuse_desired(DEVICE, 7, WHY)

    assert len(statements) == 1
    assert (shadow.is_refused, shadow.refusal, shadow.is_pending, shadow.reported_version) == (True, WHY, True, 5)
    assert shadow.refused_at == shadow.last_seen_at == session.scalar(text("SELECT now()"))
    assert shadow == service.get(DEVICE)
    assert shadow.to_dict()["refusal"] == WHY
    assert shadow.explain().startswith(
        f"{DEVICE} is pending: version 7 is refused (\"{WHY}\", the device is at 5), and 'mode' differs, last seen at"
    )


def test_a_refused_device_is_found_and_counted_until_desired_is_written_again(
    session: Session, service: ShadowService
) -> None:
    add_device(session, "other", desired_version=1)
    add_device(session, "third", desired_version=1)
    add_device(session, tenant_id="globex", desired_version=7, refused_version=7, refusal="theirs")
    service.refuse_desired(DEVICE, 7, WHY)
    service.refuse_desired("other", 1, "no")

    assert [shadow.device_id for shadow in service.refused()] == ["other", DEVICE]
    assert [shadow.device_id for shadow in service.refused(limit=1, after="other")] == [DEVICE]
    assert (service.count_refused(), service.count_pending()) == (2, 3)
    mapped = select(DeviceState.device_id).where(DeviceState.is_refused, DeviceState.tenant_id == TENANT)
    assert set(session.scalars(mapped)) == {"other", DEVICE}
    assert session.get_one(DeviceState, (TENANT, DEVICE)).is_refused
    assert not session.get_one(DeviceState, (TENANT, "third")).is_refused

    service.patch_desired(DEVICE, {"mode": "eco"})
    session.get_one(DeviceState, (TENANT, "other")).desired_state = {}
    session.flush()

    assert (service.refused(), service.count_refused()) == ([], 0)
    assert service.get(DEVICE).refusal is None
    assert not session.get_one(DeviceState, (TENANT, "other")).is_refused
    columns = text(
        "SELECT count(refused_version), count(refusal), count(refused_at) FROM device_state WHERE tenant_id = 'acme'"
    )
    assert session.execute(columns).one() == (0, 0, 0)


def test_a_device_that_applies_the_version_in_the_end_is_refused_no_more(service: ShadowService) -> None:
    service.refuse_desired(DEVICE, 7, WHY)
    assert service.replace_reported(DEVICE, {"mode": "auto"}).refusal == WHY
    assert service.replace_reported(DEVICE, {"mode": "turbo"}, acked_version=7).refusal is None
    assert service.count_refused() == 0


def test_the_newer_of_two_refusals_counts(service: ShadowService) -> None:
    service.refuse_desired(DEVICE, 7, WHY)
    assert service.refuse_desired(DEVICE, 7, "too hot now").refusal == "too hot now"


def test_a_refusal_of_an_older_or_of_an_acknowledged_version_is_late(service: ShadowService) -> None:
    for version in (0, 5, 6):
        with pytest.raises(LateReport) as caught:
            service.refuse_desired(DEVICE, version, WHY)
        assert (caught.value.acked, caught.value.current) == (version, 7)
    service.replace_reported(DEVICE, {}, acked_version=7)
    with pytest.raises(LateReport, match="acknowledged version 7 before it refused it"):
        service.refuse_desired(DEVICE, 7, WHY)
    assert service.count_refused() == 0


def test_a_late_refusal_never_ends_the_life_of_a_newer_version(service: ShadowService) -> None:
    service.replace_desired(DEVICE, {"mode": "eco"})
    with pytest.raises(LateReport):
        service.refuse_desired(DEVICE, 7, WHY)
    shadow = service.get(DEVICE)
    assert (shadow.refusal, shadow.last_seen_at) == (None, None)


@pytest.mark.parametrize("version", [8, 2**31, 2**62])
def test_a_refusal_of_what_was_never_asked_is_unknown(service: ShadowService, version: int) -> None:
    with pytest.raises(UnknownVersion):
        service.refuse_desired(DEVICE, version, WHY)


def test_a_refusal_of_nothing_that_is_there_is_refused(service: ShadowService) -> None:
    with pytest.raises(DeviceNotFound):
        service.refuse_desired("nobody", 7, WHY)
    for version in (None, -1, "7", True):
        with pytest.raises(InvalidVersion):
            service.refuse_desired(DEVICE, version, WHY)  # type: ignore[arg-type]


# In batches.


def report(**more: Any) -> Report:
    return Report(DEVICE, {"mode": "auto"}, **more)


@pytest.mark.parametrize("method", ["replace_reported_many", "patch_reported_many"])
def test_a_batch_takes_refusals_with_the_documents(session: Session, service: ShadowService, method: str) -> None:
    add_device(session, "other", desired_version=3, refused_version=3, refusal="kept")
    reports = [report(acked_version=6, refused_version=7, refusal=WHY), Report("other", {"n": 1})]

    outcomes = getattr(service, method)(reports)

    assert outcomes == [
        ReportOutcome(DEVICE, ReportStatus.ACCEPTED, 7, 6),
        ReportOutcome("other", ReportStatus.ACCEPTED, 3, 0),
    ]
    shadow = service.get(DEVICE)
    assert (shadow.refusal, shadow.reported, shadow.reported_version) == (WHY, {"mode": "auto"}, 6)
    assert shadow.refused_at == session.scalar(text("SELECT now()"))
    assert service.get("other").refusal == "kept"


@pytest.mark.parametrize("method", ["replace_reported_many", "patch_reported_many"])
@pytest.mark.parametrize(
    ("refused", "status"),
    [(6, ReportStatus.LATE), (5, ReportStatus.LATE), (8, ReportStatus.UNKNOWN_VERSION), (-1, ReportStatus.INVALID)],
)
def test_a_refusal_in_a_batch_is_judged_as_by_itself_and_the_whole_report_with_it(
    service: ShadowService, method: str, refused: int, status: ReportStatus
) -> None:
    before = service.get(DEVICE)
    (outcome,) = getattr(service, method)([report(refused_version=refused, refusal=WHY)])
    assert outcome.status is status
    assert service.get(DEVICE) == before


@pytest.mark.parametrize(
    "more",
    [
        {"refused_version": 7},
        {"refused_version": 7, "refusal": ""},
        {"refused_version": 7, "refusal": "x" * 1001},
        {"refused_version": 7, "refusal": "a\0b"},
        {"refused_version": 7, "refusal": 5},
        {"refusal": WHY},
        {"refused_version": 7, "refusal": WHY, "acked_version": 7},
        {"refused_version": 7, "refusal": WHY, "ack_if_converged": True},
    ],
)
def test_a_report_that_refuses_without_saying_why_or_acknowledges_what_it_refuses_is_invalid(
    service: ShadowService, more: dict[str, Any]
) -> None:
    assert service.replace_reported_many([report(**more)]) == [ReportOutcome(DEVICE, ReportStatus.INVALID, 7, 5)]
    assert service.get(DEVICE).last_seen_at is None


def test_reports_of_one_device_refuse_and_apply_one_after_another(service: ShadowService) -> None:
    refuses = report(refused_version=7, refusal=WHY)
    assert [o.status.value for o in service.replace_reported_many([refuses, report()])] == ["accepted"] * 2
    assert service.get(DEVICE).refusal == WHY
    outcomes = service.replace_reported_many([refuses, report(acked_version=7), refuses])
    assert [o.status.value for o in outcomes] == ["accepted", "accepted", "late"]
    assert service.get(DEVICE).refusal is None
