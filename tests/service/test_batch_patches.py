"""What many devices report in patches, in one call: a gateway that speaks for its children."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from iot_models import DeviceState, DocumentLimits, Report, ReportOutcome, ReportStatus, ShadowService
from tests.databases.devices import TENANT, add_device
from tests.databases.statements import before_statement, counted_statements

if TYPE_CHECKING:
    from sqlalchemy import Engine

START: dict[str, Any] = {"old": 1, "fan": {"speed": 1, "auto": True}}


@pytest.fixture
def service(session: Session) -> ShadowService:
    """Devices a, b and c at desired version 7 that acknowledged 5, and another tenant's a."""
    for device_id in "abc":
        add_device(session, device_id, desired_version=7, reported_version=5, reported_state=START)
    add_device(session, "a", tenant_id="globex", reported_state=START)
    return ShadowService(session, TENANT)


def test_each_patch_is_merged_and_a_bad_one_stops_no_other(session: Session, service: ShadowService) -> None:
    outcomes = service.patch_reported_many(
        [
            Report("c", {"old": None, "fan": {"speed": 2}}, 7),
            Report("b", {"x": float("nan")}),
            Report("nobody", {}),
            Report("b", {"late": 1}, 4),
            Report("a", {"never": 1}, 8),
            Report("a", [1]),  # type: ignore[arg-type]
            Report("b", {}),
        ]
    )

    assert [(outcome.device_id, outcome.status) for outcome in outcomes] == [
        ("c", "accepted"),
        ("b", "invalid"),
        ("nobody", "unknown_device"),
        ("b", "late"),
        ("a", "unknown_version"),
        ("a", "invalid"),
        ("b", "accepted"),
    ]
    assert outcomes[0] == ReportOutcome("c", ReportStatus.ACCEPTED, 7, 7)
    assert service.get("c").reported == {"fan": {"speed": 2, "auto": True}}
    assert (service.get("a").reported, service.get("b").reported) == (START, START)
    assert (service.get("a").last_seen_at, service.get("b").last_seen_at is not None) == (None, True)
    assert ShadowService(session, "globex").get("a").reported == START


def test_several_patches_of_one_device_are_merged_one_after_another(service: ShadowService) -> None:
    outcomes = service.patch_reported_many(
        [
            Report("a", {"fan": {"speed": 2, "auto": None}}),
            Report("a", {"fan": None}, 6),
            Report("a", {"fan": {"speed": 3}}),
            Report("a", {"fan": {"speed": 9}}, 5),
        ]
    )

    assert [outcome.status for outcome in outcomes] == ["accepted", "accepted", "accepted", "late"]
    assert service.get("a").reported == {"old": 1, "fan": {"speed": 3}}
    assert service.get("a").reported_version == 6


def test_a_batch_is_two_statements_and_one_without_any_possible_device_is_none(
    session: Session, service: ShadowService
) -> None:
    with counted_statements(session.connection()) as seen:
        service.patch_reported_many([Report(device_id, {"n": n}) for n in range(9) for device_id in "abc"])
    assert len(seen) == 2
    with counted_statements(session.connection()) as seen:
        assert service.patch_reported_many([]) == []
        (outcome,) = service.patch_reported_many([Report("a\0", {})])
    assert outcome.status is ReportStatus.UNKNOWN_DEVICE
    assert seen == []


def test_limits_are_measured_after_the_merge(session: Session, service: ShadowService) -> None:
    small = ShadowService(session, TENANT, limits=DocumentLimits(max_bytes=60))

    outcomes = small.patch_reported_many(
        [Report("a", {"more": "x" * 30}), Report("a", {"old": None, "more": "x" * 5}), Report("b", {"fan": None})]
    )

    assert [outcome.status for outcome in outcomes] == ["invalid", "accepted", "accepted"]
    assert service.get("a").reported == {"fan": START["fan"], "more": "xxxxx"}


def test_a_stored_section_that_is_no_object_is_that_devices_error_and_the_log_says_so(
    session: Session, service: ShadowService, caplog: pytest.LogCaptureFixture
) -> None:
    session.execute(text("UPDATE device_state SET reported_state = 'null' WHERE device_id = 'b'"))

    with caplog.at_level(logging.WARNING):
        outcomes = service.patch_reported_many([Report(device_id, {"n": 1}, 7) for device_id in "abc"])

    assert [outcome.status for outcome in outcomes] == ["accepted", "invalid", "accepted"]
    assert outcomes[1] == ReportOutcome("b", ReportStatus.INVALID, 7, 5)
    assert "'b'" in caplog.text
    assert "is no JSON object but null" in caplog.text
    (mended,) = service.replace_reported_many([Report("b", {"n": 1}, 7)])
    assert mended.status is ReportStatus.ACCEPTED


def test_a_number_that_a_float_would_round_stays_as_it_is_stored(session: Session, service: ShadowService) -> None:
    session.execute(text("""UPDATE device_state SET reported_state = '{"exact": 0.1234567890123456789}'"""))

    service.patch_reported_many([Report("a", {"n": 1}), Report("a", {"n": 2})])

    stored = session.scalar(
        text("SELECT CAST(reported_state AS text) FROM device_state WHERE (tenant_id, device_id) = ('acme', 'a')")
    )
    assert stored == '{"n": 2, "exact": 0.1234567890123456789}'


def test_loaded_objects_show_what_was_patched(session: Session, service: ShadowService) -> None:
    device = session.get_one(DeviceState, (TENANT, "a"))

    service.patch_reported_many([Report("a", {"fan": None}, 7)])

    assert (device.reported_state, device.reported_version) == ({"old": 1}, 7)


def test_in_autocommit_mode_what_another_wrote_since_the_read_is_merged_with(own_engine: Engine) -> None:
    with Session(own_engine) as session, session.begin():
        for device_id in "ab":
            add_device(session, device_id, desired_version=7, reported_version=5, reported_state=START)

    def theirs() -> None:
        with Session(own_engine) as other, other.begin():
            ShadowService(other, TENANT).patch_reported("a", {"theirs": 1})

    with Session(own_engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        service = ShadowService(session, TENANT)
        before_statement(service, 2, theirs)
        outcomes = service.patch_reported_many([Report(device_id, {"ours": 1}, 6) for device_id in "ab"])
        shadow = service.get("a")

    assert [outcome.status for outcome in outcomes] == ["accepted", "accepted"]
    assert shadow.reported == START | {"ours": 1, "theirs": 1}
