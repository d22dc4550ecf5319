"""Devices for tests, put down by plain inserts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import event, insert

from iot_models import DeviceState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Engine
    from sqlalchemy.orm import Session

from contextlib import contextmanager

TENANT = "acme"
DEVICE = "thermostat-1"


def add_device(session: Session, device_id: str = DEVICE, *, tenant_id: str = TENANT, **columns: Any) -> None:
    session.execute(
        insert(DeviceState).values(tenant_id=tenant_id, site_id="berlin", device_id=device_id, **columns),
    )


@contextmanager
def counted_statements(bind: Engine | Connection) -> Iterator[list[str]]:
    """The statements that reach the driver while the block runs."""
    seen: list[str] = []

    def record(_c: object, _cursor: object, statement: str, *_rest: object) -> None:
        seen.append(statement)

    event.listen(bind, "before_cursor_execute", record)
    try:
        yield seen
    finally:
        event.remove(bind, "before_cursor_execute", record)
