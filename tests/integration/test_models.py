"""The models and the migrated schema are one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fleet import DEVICE, TENANT
from schema_dump import dump
from sqlalchemy import create_engine
from sqlalchemy.exc import IntegrityError

from iot_models import Base, DeviceState

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.orm import Session


def test_create_all_gives_the_schema_that_the_migrations_give(
    new_database: Callable[[], str], migrated_url: str
) -> None:
    url = new_database()
    engine = create_engine(url)
    Base.metadata.create_all(engine)
    engine.dispose()

    assert dump(url) == dump(migrated_url)


def test_a_device_needs_no_more_than_its_ids_and_site(session: Session) -> None:
    device = DeviceState(tenant_id=TENANT, site_id="berlin", device_id=DEVICE)
    session.add(device)
    session.flush()

    assert (device.status, device.state, device.last_seen_at) == ("OFFLINE", {}, None)
    assert (device.desired_state, device.desired_version, device.reported_version) == ({}, 0, 0)
    assert device.last_state_change_at.tzinfo is not None


def test_none_as_a_document_is_never_stored_as_json_null(session: Session) -> None:
    device = DeviceState(tenant_id=TENANT, site_id="berlin", device_id=DEVICE, desired_state=None)
    session.add(device)
    session.flush()
    assert device.desired_state == {}  # absent in an INSERT: the default

    device.reported_state = None  # type: ignore[assignment]
    with pytest.raises(IntegrityError, match="reported_state"):
        session.flush()


def test_a_device_shows_its_ids(session: Session) -> None:
    device = DeviceState(tenant_id=TENANT, site_id="berlin", device_id=DEVICE)
    session.add(device)

    assert repr(device) == "DeviceState(tenant_id='acme', device_id='thermostat-1')"
