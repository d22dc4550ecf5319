"""Which sessions the service works in, and what is refused before anything is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from iot_models import AsyncShadowService, DeviceState, Report, ShadowService
from iot_models.engine import create_async_engine
from tests.databases.devices import DEVICE, TENANT, add_device

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine


@pytest.fixture
def committed(own_engine: Engine) -> Engine:
    with Session(own_engine) as session, session.begin():
        add_device(session)
    return own_engine


def test_a_scoped_session_is_used_by_each_call_as_it_is_then(committed: Engine) -> None:
    registry = scoped_session(sessionmaker(committed))
    service = ShadowService(registry, TENANT)
    device = registry.get_one(DeviceState, (TENANT, DEVICE))

    service.patch_desired(DEVICE, {"a": 1})
    assert device.desired_version == 1
    with registry.begin_nested() as savepoint:
        service.replace_reported_many([Report(DEVICE, {"a": 1}, 1)])
        savepoint.rollback()
    assert (device.desired_version, device.reported_version) == (1, 0)
    registry.commit()
    registry.remove()

    assert service.get(DEVICE).desired == {"a": 1}  # in another session of the same registry
    registry.remove()


REFUSED: dict[str, tuple[Callable[[Engine], Any], str]] = {
    "an engine": (lambda engine: engine, r"pass Session\(engine\)"),
    "a session factory": (sessionmaker, "call it, and pass what it returns"),
    "an async session": (lambda engine: AsyncSession(create_async_engine(engine.url)), "use AsyncShadowService"),
    "an async registry": (
        lambda engine: async_scoped_session(async_sessionmaker(create_async_engine(engine.url)), lambda: 1),
        "call it, and give the AsyncSession to AsyncShadowService",
    ),
    "nothing": (lambda _: None, "None: pass SQLAlchemy's Session"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_session_is_refused_with_what_to_pass(committed: Engine, what: str) -> None:
    make, way = REFUSED[what]
    with pytest.raises(TypeError, match=f"session must be a Session or a scoped_session, got .*{way}"):
        ShadowService(make(committed), TENANT)


def test_a_connection_is_refused_with_what_to_pass(committed: Engine) -> None:
    with committed.connect() as connection, pytest.raises(TypeError, match=r"pass Session\(connection\)"):
        ShadowService(connection, TENANT)  # type: ignore[arg-type]


def test_the_async_service_takes_no_other_session(committed: Engine) -> None:
    with Session(committed) as session, pytest.raises(TypeError, match="use ShadowService for it"):
        AsyncShadowService(session, TENANT)  # type: ignore[arg-type]


def test_documents_are_compared_with_values_in_a_query(committed: Engine) -> None:
    with Session(committed) as session:
        ShadowService(session, TENANT).replace_desired(DEVICE, {"fan": {"speed": 3}})
        speed = DeviceState.desired_state["fan"]["speed"]
        assert session.scalars(select(DeviceState.device_id).where(speed.as_integer() == 3)).all() == [DEVICE]
        assert session.scalars(select(DeviceState.device_id).where(DeviceState.desired_state == {"a": 1})).all() == []
        assert session.scalar(select(DeviceState.desired_state["fan"])) == {"speed": 3}
