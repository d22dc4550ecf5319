"""Writing what a device reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import func, select, text

from iot_models import DeviceNotFound, DocumentLimits, DocumentTooLarge, LateReport, ShadowService, UnknownVersion
from tests.databases.devices import DEVICE, TENANT, add_device
from tests.databases.statements import counted_statements

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.orm import Session

    from iot_models import Shadow

    Write = Callable[..., Shadow]


@pytest.fixture
def service(session: Session) -> ShadowService:
    """A device at desired version 7 that acknowledged 5."""
    add_device(session, reported_state={"mode": "eco", "fan": {"speed": 1}}, desired_version=7, reported_version=5)
    return ShadowService(session, TENANT)


@pytest.fixture(params=["replace_reported", "patch_reported"])
def write(request: pytest.FixtureRequest, service: ShadowService) -> Write:
    method: Write = getattr(service, request.param)
    return method


def row(session: Session, device_id: str = DEVICE) -> dict[str, Any]:
    """The row as the database has it, by plain SQL."""
    result = session.execute(text("SELECT * FROM device_state WHERE device_id = :id"), {"id": device_id})
    return dict(result.mappings().one())


def test_a_report_without_a_version_changes_the_document_and_last_seen_only(session: Session, write: Write) -> None:
    before = row(session)

    shadow = write(DEVICE, {"mode": "heat"})

    assert shadow.last_seen_at == session.scalar(select(func.now()))
    assert shadow.reported["mode"] == "heat"
    assert shadow == ShadowService(session, TENANT).get(DEVICE)
    changed = {name for name, value in row(session).items() if value != before[name]}
    assert changed == {"reported_state", "last_seen_at"}


@pytest.mark.parametrize("acked", [5, 6, 7])
def test_an_acknowledged_version_from_the_last_one_to_the_newest_is_kept(
    session: Session, write: Write, acked: int
) -> None:
    shadow = write(DEVICE, {"mode": "heat"}, acked_version=acked)

    assert (shadow.reported_version, shadow.desired_version) == (acked, 7)
    assert row(session)["shadow_updated_at"] is None


@pytest.mark.parametrize("acked", [0, 4])
def test_a_late_report_never_overwrites_newer_state(session: Session, write: Write, acked: int) -> None:
    before = row(session)

    with pytest.raises(LateReport) as caught:
        write(DEVICE, {"mode": "old"}, acked_version=acked)

    assert (caught.value.device_id, caught.value.acked, caught.value.current) == (DEVICE, acked, 5)
    assert row(session) == before


@pytest.mark.parametrize("acked", [8, 2**31, 2**63 - 1])
def test_a_version_that_was_never_asked_is_refused(session: Session, write: Write, acked: int) -> None:
    before = row(session)

    with pytest.raises(UnknownVersion) as caught:
        write(DEVICE, {"mode": "heat"}, acked_version=acked)

    assert (caught.value.device_id, caught.value.acked, caught.value.desired) == (DEVICE, acked, 7)
    assert row(session) == before


def test_after_a_restore_that_left_desired_behind_a_report_is_unknown_not_late(session: Session) -> None:
    add_device(session, desired_version=3, reported_version=9)

    with pytest.raises(UnknownVersion):
        ShadowService(session, TENANT).replace_reported(DEVICE, {}, acked_version=8)


def test_replace_makes_the_report_the_whole_document(service: ShadowService) -> None:
    assert service.replace_reported(DEVICE, {"a": None}).reported == {"a": None}


def test_patch_merges_as_rfc_7396_says(service: ShadowService) -> None:
    patched = service.patch_reported(DEVICE, {"mode": None, "fan": {"rpm": 900}})

    assert patched.reported == {"fan": {"speed": 1, "rpm": 900}}


@pytest.mark.parametrize("device_id", ["nobody", "a\0b"], ids=ascii)
def test_a_device_that_does_not_exist_is_not_found(write: Write, device_id: str) -> None:
    for acked_version in (None, 0):
        with pytest.raises(DeviceNotFound):
            write(device_id, {"a": 1}, acked_version=acked_version)


def test_another_tenants_device_is_not_found_and_not_written(session: Session, write: Write) -> None:
    add_device(session, "theirs", tenant_id="globex")
    before = row(session, "theirs")

    with pytest.raises(DeviceNotFound):
        write("theirs", {"a": 1})

    assert row(session, "theirs") == before


@pytest.mark.parametrize(
    ("version", "error"), [("7", TypeError), (6.0, TypeError), (True, TypeError), (-1, ValueError), (2**63, ValueError)]
)
def test_an_acknowledged_version_that_is_no_version_is_refused_by_name(
    session: Session, write: Write, version: Any, error: type[Exception]
) -> None:  # fmt: skip
    with pytest.raises(error, match="acked_version must be ") as caught:
        write(DEVICE, {"a": 1}, acked_version=version)
    assert repr(version) in str(caught.value)
    assert row(session)["last_seen_at"] is None


def test_a_replacement_is_one_statement_and_a_patch_two(session: Session, service: ShadowService) -> None:
    with counted_statements(session.connection()) as seen:
        service.replace_reported(DEVICE, {"a": 1})
        service.replace_reported(DEVICE, {"a": 1}, acked_version=6)
    assert len(seen) == 2

    with counted_statements(session.connection()) as seen:
        service.patch_reported(DEVICE, {"a": 1}, acked_version=7)
    assert len(seen) == 2


def test_the_size_is_measured_after_the_merge(session: Session) -> None:
    add_device(session, reported_state={"a": "x" * 50})
    service = ShadowService(session, TENANT, limits=DocumentLimits(max_bytes=60))

    with pytest.raises(DocumentTooLarge):
        service.patch_reported(DEVICE, {"b": "y" * 20})
    assert service.get(DEVICE).last_seen_at is None


@pytest.mark.parametrize("method", ["patch_desired", "patch_reported"])
def test_a_patch_changes_what_it_names_and_nothing_else_to_the_last_digit(session: Session, method: str) -> None:
    add_device(session)
    stored = """{"lat": 52.12345678901234567890, "list": [{"x": 0.1000000000000000000001}], "huge": 1e400,
                 "huge_and_a_half": 1e310, "tiny": 1e-330, "neat": 21.50, "text": "\\\\u00001.5", "quote": "\\"\\\\u0000"}"""
    session.execute(
        text("UPDATE device_state SET desired_state = CAST(:d AS jsonb), reported_state = CAST(:d AS jsonb)"),
        {"d": stored},
    )
    section = method.replace("patch_", "") + "_state"

    getattr(ShadowService(session, TENANT), method)(DEVICE, {"b": 1})

    untouched = session.scalar(text(f"SELECT {section} - 'b' = CAST(:d AS jsonb) FROM device_state"), {"d": stored})
    assert untouched
    assert session.scalar(text(f"SELECT {section} -> 'b' FROM device_state")) == 1
