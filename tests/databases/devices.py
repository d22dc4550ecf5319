"""Devices for tests, put down by plain inserts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import insert

from iot_models import DeviceState

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


TENANT = "acme"
DEVICE = "thermostat-1"


def add_device(session: Session, device_id: str = DEVICE, *, tenant_id: str = TENANT, **columns: Any) -> None:
    session.execute(
        insert(DeviceState).values(tenant_id=tenant_id, site_id="berlin", device_id=device_id, **columns),
    )
