"""Reading shadows, one, several, and those that are pending."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

from iot_models import DeviceNotFound, ShadowService, SyncStatus
from tests.databases.devices import DEVICE, TENANT, add_device
from tests.databases.statements import counted_statements

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


@pytest.fixture
def service(session: Session) -> ShadowService:
    return ShadowService(session, TENANT)


def test_a_device_without_a_shadow_yet_stands_at_version_zero(session: Session, service: ShadowService) -> None:
    add_device(session)

    shadow = service.get(DEVICE)

    assert (shadow.tenant_id, shadow.device_id) == (TENANT, DEVICE)
    assert (shadow.desired, shadow.reported) == ({}, {})
    assert (shadow.desired_version, shadow.reported_version) == (0, 0)
    assert (shadow.shadow_updated_at, shadow.last_seen_at) == (None, None)


def test_get_is_one_statement(session: Session, service: ShadowService) -> None:
    add_device(session)

    with counted_statements(session.connection()) as seen:
        service.get(DEVICE)
    assert len(seen) == 1


def test_times_come_back_with_their_zone(session: Session, service: ShadowService) -> None:
    add_device(session)

    shadow = service.replace_desired(DEVICE, {"a": 1})

    assert shadow.shadow_updated_at is not None
    assert shadow.shadow_updated_at.tzinfo is not None


@pytest.mark.parametrize("device_id", ["nobody", "", "a\0b", "\udfff"], ids=ascii)
def test_a_device_that_does_not_exist_is_not_found(service: ShadowService, device_id: str) -> None:
    with pytest.raises(DeviceNotFound):
        service.get(device_id)


def test_another_tenants_device_is_not_found(session: Session, service: ShadowService) -> None:
    add_device(session, "theirs", tenant_id="globex")

    with pytest.raises(DeviceNotFound):
        service.get("theirs")
    assert service.get_many(["theirs"]) == {}


def test_get_many_keeps_the_order_asked_for_and_leaves_out_what_is_absent(
    session: Session, service: ShadowService
) -> None:
    for device_id in "abc":
        add_device(session, device_id)

    with counted_statements(session.connection()) as seen:
        shadows = service.get_many(["c", "nobody", "a", "c", "x\0"])

    assert list(shadows) == ["c", "a"]
    assert shadows["a"] == service.get("a")
    assert len(seen) == 1


@pytest.mark.large
def test_get_many_takes_any_iterable_and_ten_thousand_ids(session: Session, service: ShadowService) -> None:
    session.execute(
        text("INSERT INTO device_state (tenant_id, site_id, device_id) SELECT 'acme', 's', 'd' || n FROM generate_series(1, 10000) n")
    )  # fmt: skip
    session.execute(text("ANALYZE device_state"))  # autovacuum may have seen it empty

    assert len(service.get_many(f"d{n}" for n in range(10_000))) == 9_999
    assert service.get_many([]) == {}


def test_get_many_refuses_one_string_and_ids_that_are_no_strings(service: ShadowService) -> None:
    with pytest.raises(TypeError, match="got the one string 'abc': put it in a list"):
        service.get_many("abc")
    with pytest.raises(TypeError, match="device_id must be a str, got 5"):
        service.get_many(["a", 5])  # type: ignore[list-item]


def test_the_services_threshold_reaches_its_shadows(session: Session) -> None:
    add_device(session, last_seen_at=text("now() - interval '1 hour'"))

    assert ShadowService(session, TENANT).get(DEVICE).sync_status() is SyncStatus.STALE
    patient = ShadowService(session, TENANT, stale_after=timedelta(days=1))
    assert patient.get(DEVICE).sync_status() is SyncStatus.SYNCED


@pytest.fixture
def backlog(session: Session) -> None:
    """Devices d0 to d9, every third one not acknowledged, and another tenant's."""
    for n in (4, 9, 0, 6, 2, 8, 3, 1, 7, 5):  # no order that an index or a scan would give by itself
        add_device(session, f"d{n}", desired_version=n, reported_version=n - (n % 3 == 0))
    add_device(session, "d3", tenant_id="globex", desired_version=1)


@pytest.mark.usefixtures("backlog")
def test_pending_lists_this_tenants_devices_that_have_not_acknowledged(service: ShadowService) -> None:
    assert [shadow.device_id for shadow in service.pending()] == ["d0", "d3", "d6", "d9"]
    assert service.count_pending() == 4
    assert all(shadow.is_pending for shadow in service.pending())


@pytest.mark.usefixtures("backlog")
def test_pages_of_pending_join_without_gap_or_repetition(service: ShadowService) -> None:
    first = service.pending(limit=2)
    second = service.pending(limit=2, after=first[-1].device_id)

    assert [shadow.device_id for shadow in first + second] == ["d0", "d3", "d6", "d9"]
    assert service.pending(limit=2, after=second[-1].device_id) == []


@pytest.mark.usefixtures("backlog")
def test_after_may_name_a_device_that_is_gone(service: ShadowService) -> None:
    assert [shadow.device_id for shadow in service.pending(after="d4")] == ["d6", "d9"]


@pytest.mark.usefixtures("backlog")
def test_a_limit_of_zero_gives_none(service: ShadowService) -> None:
    assert service.pending(limit=0) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"limit": -1}, ValueError, "limit must be 0 or more"),
        ({"limit": "5"}, TypeError, "limit must be an int, got '5'"),
        ({"limit": True}, TypeError, "limit must be an int, got True"),
        ({"limit": None}, TypeError, "limit must be an int, got None"),
        ({"after": 5}, TypeError, "after must be a str, got 5"),
        ({"after": "a\0"}, ValueError, "after must be a device_id of a page before"),
    ],
)
def test_a_page_that_makes_no_sense_is_refused(
    service: ShadowService, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        service.pending(**arguments)


@pytest.mark.parametrize("tenant_id", ["", "a\0", "\ud800"], ids=ascii)
def test_a_tenant_id_that_cannot_be_one_is_refused(session: Session, tenant_id: str) -> None:
    with pytest.raises(ValueError, match="tenant_id must be text that PostgreSQL can store"):
        ShadowService(session, tenant_id)


def test_a_tenant_id_that_is_no_text_is_refused(session: Session) -> None:
    with pytest.raises(TypeError, match="tenant_id must be a str, got None"):
        ShadowService(session, None)  # type: ignore[arg-type]
