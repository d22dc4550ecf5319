"""Writing the desired document of one device."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, func, select, text, update
from sqlalchemy.orm import Session

from iot_models import (
    DeviceNotFound,
    DeviceState,
    DocumentLimits,
    DocumentTooLarge,
    InvalidVersion,
    ShadowService,
    VersionConflict,
)
from iot_models._core.equality import json_equal
from tests.databases.devices import DEVICE, TENANT, add_device
from tests.databases.statements import counted_statements

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

    from iot_models import Shadow

    Write = Callable[..., Shadow]

SEEN = text("'2026-01-02 03:04:05+00'::timestamptz")


@pytest.fixture
def service(session: Session) -> ShadowService:
    add_device(
        session, desired_state={"mode": "eco", "fan": {"speed": 1, "auto": True}}, desired_version=7, last_seen_at=SEEN
    )
    return ShadowService(session, TENANT)  # fmt: skip


@pytest.fixture(params=["replace_desired", "patch_desired"])
def write(request: pytest.FixtureRequest, service: ShadowService) -> Write:
    method: Write = getattr(service, request.param)
    return method


def row(session: Session, device_id: str = DEVICE) -> dict[str, Any]:
    """The row as the database has it, by plain SQL."""
    result = session.execute(text("SELECT * FROM device_state WHERE device_id = :id"), {"id": device_id})
    return dict(result.mappings().one())


def test_every_write_raises_the_version_by_one_and_stamps_the_shadow(session: Session, write: Write) -> None:
    before = row(session)

    shadow = write(DEVICE, {"mode": "heat"})

    now = session.scalar(select(func.now()))
    assert (shadow.desired_version, shadow.shadow_updated_at) == (8, now)
    assert shadow == ShadowService(session, TENANT).get(DEVICE)
    written = {"desired_state", "desired_version", "shadow_updated_at"}
    assert {name for name, value in row(session).items() if value != before[name]} == written


def test_a_write_that_changes_nothing_raises_the_version_too(service: ShadowService) -> None:
    same = service.get(DEVICE).desired

    assert service.replace_desired(DEVICE, same).desired_version == 8
    assert service.patch_desired(DEVICE, {}).desired_version == 9
    assert service.get(DEVICE).desired == same


def test_replace_makes_the_document_the_whole_document(service: ShadowService) -> None:
    assert service.replace_desired(DEVICE, {"a": {"b": [1, None]}}).desired == {"a": {"b": [1, None]}}


def test_patch_merges_as_rfc_7396_says(service: ShadowService) -> None:
    patched = service.patch_desired(DEVICE, {"mode": None, "fan": {"auto": None, "level": 3}, "led": {"on": None}})

    assert patched.desired == {"fan": {"speed": 1, "level": 3}, "led": {}}


def test_the_current_expected_version_writes(write: Write) -> None:
    assert write(DEVICE, {"mode": "heat"}, expected_version=7).desired_version == 8


@pytest.mark.parametrize("expected", [0, 6, 8, 2**31, 2**63 - 1])
def test_any_other_expected_version_is_a_conflict_and_writes_nothing(
    session: Session, write: Write, expected: int
) -> None:
    before = row(session)

    with pytest.raises(VersionConflict) as caught:
        write(DEVICE, {"mode": "heat"}, expected_version=expected)

    assert (caught.value.device_id, caught.value.expected, caught.value.actual) == (DEVICE, expected, 7)
    assert row(session) == before


@pytest.mark.parametrize("device_id", ["nobody", "", "a\0b", "\ud800", "x' OR '1'='1"], ids=ascii)
def test_a_device_that_does_not_exist_is_not_found(session: Session, write: Write, device_id: str) -> None:
    for expected_version in (None, 0):
        with pytest.raises(DeviceNotFound) as caught:
            write(device_id, {"a": 1}, expected_version=expected_version)
        assert (caught.value.tenant_id, caught.value.device_id) == (TENANT, device_id)
    assert session.scalar(select(func.count()).select_from(DeviceState)) == 1


def test_another_tenants_device_is_not_found_and_not_written(session: Session, write: Write) -> None:
    add_device(session, "theirs", tenant_id="globex")
    before = row(session, "theirs")

    with pytest.raises(DeviceNotFound):
        write("theirs", {"a": 1})

    assert row(session, "theirs") == before


def test_a_device_of_the_same_id_in_another_tenant_is_left_alone(session: Session, write: Write) -> None:
    add_device(session, DEVICE, tenant_id="globex")

    write(DEVICE, {"a": 1})

    assert ShadowService(session, "globex").get(DEVICE).desired_version == 0


@pytest.mark.parametrize("version", ["7", 7.0, True, -1, 2**63])
def test_an_expected_version_that_is_no_version_is_refused_by_name(
    session: Session, write: Write, version: Any
) -> None:
    with pytest.raises(InvalidVersion, match=r"expected_version must be .*") as caught:
        write(DEVICE, {"a": 1}, expected_version=version)
    assert repr(version) in str(caught.value)
    assert row(session)["desired_version"] == 7


def test_a_device_id_that_is_no_text_is_refused(write: Write) -> None:
    with pytest.raises(TypeError, match="device_id must be a str, got 5"):
        write(5, {"a": 1})


def test_a_replacement_is_one_statement(session: Session, service: ShadowService) -> None:
    with counted_statements(session.connection()) as seen:
        service.replace_desired(DEVICE, {"a": 1})
        service.replace_desired(DEVICE, {"a": 1}, expected_version=8)
    assert len(seen) == 2


def test_a_patch_is_two_statements(session: Session, service: ShadowService) -> None:
    with counted_statements(session.connection()) as seen:
        service.patch_desired(DEVICE, {"a": 1})
    assert len(seen) == 2


def test_the_size_is_measured_after_the_merge_and_a_patch_that_shrinks_is_accepted(session: Session) -> None:
    add_device(session, desired_state={"a": "x" * 50})
    service = ShadowService(session, TENANT, limits=DocumentLimits(max_bytes=60))

    with pytest.raises(DocumentTooLarge):
        service.patch_desired(DEVICE, {"b": "y" * 20})
    assert service.get(DEVICE).desired_version == 0
    assert service.patch_desired(DEVICE, {"a": None, "b": "y" * 40}).desired == {"b": "y" * 40}


def test_a_patch_larger_than_a_document_may_be_is_accepted_where_the_result_is_not(session: Session) -> None:
    add_device(session, desired_state={f"k{n}": n for n in range(20)})
    service = ShadowService(session, TENANT, limits=DocumentLimits(max_bytes=170))

    assert service.patch_desired(DEVICE, {f"k{n}": None for n in range(20)}).desired == {}


def test_numbers_come_back_as_the_numbers_that_they_were(service: ShadowService) -> None:
    document = {"big": 10**40, "float": 0.1, "tiny": 5e-324, "huge": 1.7976931348623157e308, "int": -7, "e": 1e22}

    assert json_equal(service.replace_desired(DEVICE, document).desired, document)
    assert json_equal(service.patch_desired(DEVICE, {"int": 8}).desired, document | {"int": 8})


def test_a_patch_keeps_long_integers_whatever_the_engines_own_json_deserializer_makes_of_them(
    own_engine: Engine,
) -> None:
    lossy = create_engine(own_engine.url, json_deserializer=lambda text: json.loads(text, parse_int=float))
    with Session(lossy) as session:
        add_device(session, desired_state={"serial": 2**70 + 1})
        ShadowService(session, TENANT).patch_desired(DEVICE, {"a": 1})
        stored = session.scalar(text("SELECT desired_state ->> 'serial' FROM device_state"))
    lossy.dispose()

    assert stored == str(2**70 + 1)


def test_text_that_looks_like_sql_or_a_placeholder_is_stored_as_it_is(service: ShadowService) -> None:
    document = {"%(a)s": "%s %% :name", ":tenant": "'; DROP TABLE device_state; --", "__proto__": {"$1": '"'}}

    assert service.replace_desired(DEVICE, document).desired == document


def test_a_version_from_before_an_out_of_band_write_is_a_conflict(session: Session, service: ShadowService) -> None:
    version = service.get(DEVICE).desired_version
    session.execute(update(DeviceState).values(desired_version=DeviceState.desired_version + 1))

    with pytest.raises(VersionConflict):
        service.patch_desired(DEVICE, {"mode": "heat"}, expected_version=version)
