"""`ShadowService(notify=True)`: a desired write wakes those who wait, and says to nobody whose it is."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from iot_models import AsyncShadowService, ShadowService
from iot_models._core.notifications import CHANNEL, topic
from tests.databases.async_engines import async_engine, in_event_loop
from tests.databases.devices import TENANT
from tests.databases.statements import counted_statements

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import URL, Engine


@contextmanager
def listening(fleet: Engine) -> Iterator[Callable[[], list[str]]]:
    """What has been notified so far, each time that it is asked."""
    engine = fleet.execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        connection.exec_driver_sql(f"LISTEN {CHANNEL}")
        yield lambda: [note.payload for note in driver.notifies(timeout=0.05)]
        connection.invalidate()


def test_a_transaction_notifies_once_for_a_tenant_however_often_it_writes(fleet: Engine) -> None:
    with listening(fleet) as notifications:
        with counted_statements(fleet) as statements, Session(fleet) as session, session.begin():
            service = ShadowService(session, TENANT, notify=True)
            for device_id in "aba":
                service.patch_desired(device_id, {"n": 1})
        assert sum("pg_notify" in statement for statement in statements) == 1
        assert notifications() == [topic(TENANT)]


def test_in_autocommit_mode_each_write_notifies(fleet: Engine) -> None:
    with listening(fleet) as notifications:
        with Session(fleet.execution_options(isolation_level="AUTOCOMMIT")) as session:
            service = ShadowService(session, TENANT, notify=True)
            service.replace_desired("a", {})
            service.patch_desired_many(["a", "b"], {"n": 1})
        assert notifications() == [topic(TENANT)] * 2


def test_a_write_behind_a_savepoint_that_was_rolled_back_notifies(fleet: Engine) -> None:
    with listening(fleet) as notifications:
        with Session(fleet) as session, session.begin():
            service = ShadowService(session, TENANT, notify=True)
            with session.begin_nested() as savepoint:
                service.replace_desired("a", {})
                savepoint.rollback()
            service.replace_desired("b", {})
        assert notifications() == [topic(TENANT)]


def test_every_way_to_write_what_a_device_should_be_notifies_and_nothing_else_does(fleet: Engine) -> None:
    writes: dict[str, Callable[[ShadowService], object]] = {
        "replace_desired": lambda service: service.replace_desired("a", {"n": 1}),
        "patch_desired": lambda service: service.patch_desired("a", {"n": 2}),
        "restore_desired": lambda service: service.restore_desired("a", 1),
        "replace_desired_many": lambda service: service.replace_desired_many({"a": {"n": 3}}),
        "patch_desired_many": lambda service: service.patch_desired_many(["a"], {"n": 4}),
    }
    for name, desired_write in writes.items():
        with listening(fleet) as notifications:
            with Session(fleet) as session, session.begin():
                desired_write(ShadowService(session, TENANT, notify=True))
            assert notifications() == [topic(TENANT)], name
    with listening(fleet) as notifications:
        with Session(fleet) as session, session.begin():
            service = ShadowService(session, TENANT, notify=True)
            service.replace_reported("a", {}, acked_version=1)
            service.register("d", "berlin")
            service.remove("d")
            ShadowService(session, TENANT).replace_desired("a", {})
        assert notifications() == []


@in_event_loop
async def test_the_async_service_notifies_too(url: URL, fleet: Engine) -> None:
    with listening(fleet) as notifications:
        async with async_engine(url) as engine, AsyncSession(engine) as session, session.begin():
            await AsyncShadowService(session, TENANT, notify=True).replace_desired("a", {})
        assert notifications() == [topic(TENANT)]


def test_a_notification_does_not_show_who_the_tenant_is() -> None:
    assert TENANT not in topic(TENANT)
    assert topic(TENANT) != topic("other")
