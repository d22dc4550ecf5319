import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session, selectinload

from fleetapp.api import app
from fleetapp.models import Machine, MachineOrder, Plant
from iot_models import DeviceState, ShadowService
from iot_models.testing import SampleFleet


def call(
    url: str, *requests: tuple[str, str, dict[str, Any] | None], tenants: Sequence[bytes] = (b"acme",)
) -> list[tuple[int, Any]]:
    """Send requests to the application, as a server would, on the database at this URL."""

    async def send(method: str, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        answer: list[Any] = []
        request = {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        headers = [(b"content-type", b"application/json"), *((b"x-tenant-id", tenant) for tenant in tenants)]
        scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b""}

        async def receive() -> dict[str, Any]:
            return request

        async def collect(message: Any) -> None:
            answer.append(message)

        await app(scope, receive, collect)
        return answer[0]["status"], json.loads(answer[1]["body"])

    async def run() -> list[tuple[int, Any]]:
        app.state.url = url
        async with app.router.lifespan_context(app):
            return [await send(*request) for request in requests]

    return asyncio.run(run())


ORDER = {"product": "bolts", "quantity": 500}


def test_an_order_and_the_shadow_are_written_together(shadow_database: str) -> None:
    added, ordered, shown = call(
        shadow_database,
        ("POST", "/machines", {"plant": "berlin", "device_id": "press-1"}),
        ("POST", "/machines/1/orders", ORDER),
        ("GET", "/machines/1", None),
    )
    assert added == (201, {"id": 1})
    assert ordered == (201, {"desired_version": 1, "delta": {"order": ORDER}})
    assert shown == (200, {"plant": "berlin", "is_pending": True, "orders": [["bolts", 500, 1]]})


def test_an_order_that_the_shadow_refuses_is_not_written(shadow_database: str) -> None:
    _, refused, shown = call(
        shadow_database,
        ("POST", "/machines", {"plant": "berlin", "device_id": "press-1"}),
        ("POST", "/machines/1/orders", {"product": "x" * 40_000, "quantity": 1}),
        ("GET", "/machines/1", None),
    )
    assert refused[0] == 413
    assert shown == (200, {"plant": "berlin", "is_pending": False, "orders": []})


def test_another_tenants_machine_is_not_found(shadow_database: str) -> None:
    assert call(shadow_database, ("POST", "/machines/7/orders", ORDER))[0][0] == 404


def test_a_tenant_that_is_there_twice_is_a_bad_request(shadow_database: str) -> None:
    machine = ("POST", "/machines", {"plant": "berlin", "device_id": "press-1"})
    ((status, said),) = call(shadow_database, machine, tenants=(b"acme", b"globex"))
    assert (status, said) == (400, {"detail": "X-Tenant-Id must be there once"})


@pytest.mark.parametrize("load", [selectinload(Machine.device), selectinload(Machine.orders)])
def test_machines_and_devices_are_loaded_together(
    shadow_session: Session, shadow_fleet: SampleFleet, load: Any
) -> None:
    machine = Machine(plant=Plant(name="berlin"), tenant_id=shadow_fleet.tenant_id, device_id=shadow_fleet.pending)
    machine.orders = [MachineOrder(product="bolts", quantity=1, desired_version=4)]
    shadow_session.add(machine)
    shadow_session.commit()
    shadow_session.expunge_all()

    pending = select(Machine).join(Machine.device).where(DeviceState.is_pending).options(load)
    (found,) = shadow_session.scalars(pending)
    ShadowService(shadow_session, shadow_fleet.tenant_id).replace_reported(found.device_id, {}, acked_version=4)
    assert (found.device.is_pending, found.orders[0].quantity) == (False, 1)
