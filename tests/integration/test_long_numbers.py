"""Numbers that PostgreSQL writes out: what was read is equal, can be written back, and does not grow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from iot_models import AsyncShadowService, DeviceState, DocumentLimits, ShadowService
from tests.databases.async_engines import ASYNC_DRIVERS, async_engine, in_event_loop, url_for
from tests.databases.devices import DEVICE, TENANT, add_device
from tests.reference.documents import size

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.orm import Session

# What is written, and what is read: of the same type, but for the floats that an integer of 64 bits holds as well.
NUMBERS: list[tuple[int | float, int | float]] = [
    (1e22, 1e22),
    (1e23, 1e23),
    (-1e20, -1e20),
    (1.7976931348623157e308, 1.7976931348623157e308),
    (-1.7976931348623157e308, -1.7976931348623157e308),
    (float(2**64), float(2**64)),
    (1e16, 10**16),
    (-(2.0**63), -9223372036854776000.0),
    (2**64 - 1, 2**64 - 1),
    (2**64, 2**64),
    (10**18, 10**18),
    (10**30 + 1, 10**30 + 1),
    (-(2**63), -(2**63)),
    (5e-324, 5e-324),
    (0.1, 0.1),
]
WRITTEN = {"sentinels": [written for written, _ in NUMBERS]}
READ = {"sentinels": [read for _, read in NUMBERS]}
STORED = text("SELECT CAST(desired_state AS text), CAST(reported_state AS text) FROM device_state")


def as_read(document: dict[str, Any]) -> list[str]:
    """With their types: 1 and 1.0 are two things here."""
    return [repr(number) for number in document["sentinels"]]


def test_the_service_reads_what_it_wrote_and_writes_it_back(session: Session) -> None:
    add_device(session)
    service = ShadowService(session, TENANT, limits=DocumentLimits(max_bytes=size(WRITTEN)))

    service.replace_desired(DEVICE, WRITTEN)
    service.replace_reported(DEVICE, WRITTEN, ack_if_converged=True)
    shadow = service.get(DEVICE)
    stored = session.execute(STORED).one()
    assert as_read(shadow.desired) == as_read(shadow.reported) == as_read(READ)
    assert (shadow.is_converged, shadow.reported_version, shadow.delta) == (True, 1, {})

    service.replace_desired(DEVICE, shadow.desired)
    service.patch_reported(DEVICE, {"n": None})
    assert session.execute(STORED).one() == stored
    service.patch_desired(DEVICE, shadow.desired)
    assert session.execute(STORED).one() == stored


def test_an_object_reads_what_the_service_wrote_and_writes_it_back(session: Session) -> None:
    add_device(session, desired_state=WRITTEN, reported_state=WRITTEN)
    device = session.get_one(DeviceState, (TENANT, DEVICE))
    stored = session.execute(STORED).one()

    assert as_read(device.desired_state) == as_read(device.reported_state) == as_read(READ)
    device.desired_state["sentinels"].append(1)
    session.flush()
    device.desired_state = {"sentinels": device.desired_state["sentinels"][:-1]}
    session.flush()
    assert session.execute(STORED).one() == stored


@pytest.mark.parametrize("driver", ASYNC_DRIVERS)
@in_event_loop
async def test_the_other_drivers_read_the_same(engine: Engine, driver: str) -> None:
    async with async_engine(url_for(driver, engine.url)) as other, AsyncSession(other) as session:
        session.add(DeviceState(tenant_id=TENANT, site_id="berlin", device_id=DEVICE))
        service = AsyncShadowService(session, TENANT)
        await service.replace_desired(DEVICE, WRITTEN)
        assert as_read((await service.get(DEVICE)).desired) == as_read(READ)
        session.expunge_all()
        device = await session.get_one(DeviceState, (TENANT, DEVICE))
        assert as_read(device.desired_state) == as_read(READ)
        await session.rollback()
