"""`watch_pending`: every device that has something to acknowledge, now and whenever there is something new."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from contextlib import aclosing, asynccontextmanager, closing
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine as sqlalchemy_create_engine
from sqlalchemy import event, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Session

from iot_models import DeviceState, ShadowService, tenancy
from iot_models._core.notifications import topic
from iot_models.bus import pending, watch_pending
from iot_models.engine import create_engine
from tests.databases.async_engines import async_engine, in_event_loop
from tests.databases.backends import end_backend
from tests.databases.devices import TENANT, add_device
from tests.databases.statements import counted_statements

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from sqlalchemy import URL, Engine

    from iot_models import Shadow

LONG = timedelta(hours=1)
SHORT = timedelta(milliseconds=50)


def write(fleet: Engine, *device_ids: str, tenant_id: str = TENANT, notify: bool = True) -> None:
    with Session(fleet) as session, session.begin():
        service = ShadowService(session, tenant_id, notify=notify)
        for device_id in device_ids:
            service.patch_desired(device_id, {"n": 1})


def end_listener(fleet: Engine) -> None:
    """End the connection that listens, as a restart or a firewall does, once it waits."""
    statement = text(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        " AND application_name = 'iot_models' AND state = 'idle'"
    )
    with fleet.connect() as connection:
        pids = connection.scalars(statement).all()
    for pid in pids:
        end_backend(fleet, pid)


def acknowledge(fleet: Engine, device_id: str, version: int) -> None:
    with Session(fleet) as session, session.begin():
        ShadowService(session, TENANT).replace_reported(device_id, {}, acked_version=version)


async def given(shadows: AsyncGenerator[Shadow, None], count: int) -> list[tuple[str, int]]:
    """The next so many devices and versions, sorted; they come within ten seconds."""
    async with asyncio.timeout(10):
        return sorted(
            [(shadow.device_id, shadow.desired_version) for shadow in [await anext(shadows) for _ in range(count)]]
        )


async def nothing_more(shadows: AsyncGenerator[Shadow, None], fleet: Engine) -> None:
    """A device that is written afterwards is the next one."""
    write(fleet, "c")
    assert [name for name, _ in await given(shadows, 1)] == ["c"]


@asynccontextmanager
async def watching(
    url: URL, tenant_id: str | None = TENANT, **options: Any
) -> AsyncIterator[AsyncGenerator[Shadow, None]]:
    async with (
        async_engine(url) as engine,
        aclosing(watch_pending(engine, tenant_id, **({"poll": LONG} | options))) as shadows,
    ):
        yield shadows


@in_event_loop
async def test_all_that_is_pending_comes_first_and_then_each_new_version_once(url: URL, fleet: Engine) -> None:
    write(fleet, "a", "b", notify=False)
    async with watching(url) as shadows:
        assert await given(shadows, 2) == [("a", 1), ("b", 1)]
        write(fleet, "b")
        assert await given(shadows, 1) == [("b", 2)]
        write(fleet, "a", "a", "a")
        assert await given(shadows, 1) == [("a", 4)]
        await nothing_more(shadows, fleet)


@in_event_loop
async def test_a_device_that_is_pending_again_is_given_again(url: URL, fleet: Engine) -> None:
    async with watching(url) as shadows:
        write(fleet, "a")
        assert await given(shadows, 1) == [("a", 1)]
        acknowledge(fleet, "a", 1)
        write(fleet, "a")
        assert await given(shadows, 1) == [("a", 2)]


@in_event_loop
async def test_without_a_notification_what_is_new_comes_within_poll(url: URL, fleet: Engine) -> None:
    async with watching(url, poll=SHORT) as shadows:
        write(fleet, "a", notify=False)
        assert await given(shadows, 1) == [("a", 1)]
        write(fleet, "a", notify=False)
        assert await given(shadows, 1) == [("a", 2)]


@in_event_loop
async def test_a_version_that_is_not_acknowledged_is_given_again_after_repeat_after(url: URL, fleet: Engine) -> None:
    write(fleet, "a", "b")
    async with watching(url, repeat_after=timedelta(milliseconds=400)) as shadows:
        assert await given(shadows, 2) == [("a", 1), ("b", 1)]
        acknowledge(fleet, "b", 1)
        assert await given(shadows, 2) == [("a", 1), ("a", 1)]


@in_event_loop
async def test_a_refused_version_is_given_and_not_repeated(url: URL, fleet: Engine) -> None:
    write(fleet, "a", "b")
    with Session(fleet) as session, session.begin():
        ShadowService(session, TENANT).refuse_desired("a", 1, "too hot")
    async with watching(url, repeat_after=SHORT) as shadows:
        assert await given(shadows, 2) == [("a", 1), ("b", 1)]
        assert await given(shadows, 3) == [("b", 1)] * 3


@in_event_loop
async def test_a_tenant_is_watched_alone_and_the_notifications_of_others_are_no_reason_to_look(
    url: URL, fleet: Engine
) -> None:
    with Session(fleet) as session, session.begin():
        add_device(session, "a", tenant_id="other")
    async with async_engine(url) as engine, aclosing(watch_pending(engine, TENANT, poll=LONG)) as shadows:
        write(fleet, "a")
        assert await given(shadows, 1) == [("a", 1)]
        next_one = asyncio.create_task(given(shadows, 1))
        with counted_statements(engine.sync_engine) as statements:
            for _ in range(5):
                await asyncio.to_thread(write, fleet, "a", tenant_id="other")
            await asyncio.sleep(0.2)
            assert statements == []
        await asyncio.to_thread(write, fleet, "b")
        assert await next_one == [("b", 1)]


@in_event_loop
async def test_without_a_tenant_all_of_them_are_watched_those_too_that_come_later(url: URL, fleet: Engine) -> None:
    with Session(fleet) as session, session.begin():
        add_device(session, "x", tenant_id="other")
        add_device(session, "y", tenant_id="a third one")
    write(fleet, "a")
    write(fleet, "x", tenant_id="other")
    async with watching(url, None) as shadows:
        assert await given(shadows, 2) == [("a", 1), ("x", 1)]
        write(fleet, "y", tenant_id="a third one")
        assert await given(shadows, 1) == [("y", 1)]
        write(fleet, "x", tenant_id="other")
        assert await given(shadows, 1) == [("x", 2)]


@in_event_loop
async def test_a_watcher_whose_connection_is_cut_connects_again_misses_nothing_and_says_so_once(
    url: URL, fleet: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending, "_FIRST_RETRY", 0.05)
    write(fleet, "a")
    async with watching(url) as shadows:
        assert await given(shadows, 1) == [("a", 1)]
        next_one = asyncio.create_task(given(shadows, 1))
        await asyncio.to_thread(end_listener, fleet)
        await asyncio.to_thread(write, fleet, "b", notify=False)
        assert await next_one == [("b", 1)]
        write(fleet, "b")
        assert await given(shadows, 1) == [("b", 2)]

    said = [record.message for record in caplog.records if record.name == "iot_models.bus.pending"]
    assert len(said) == 2
    assert "tried again until the database answers" in said[0]
    assert "answers again" in said[1]


@in_event_loop
async def test_a_database_that_is_down_for_a_while_is_said_once_and_waited_for(
    url: URL, fleet: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending, "_FIRST_RETRY", 0.01)
    monkeypatch.setattr(pending, "_LONGEST_RETRY", 0.02)
    write(fleet, "a")
    async with async_engine(url) as engine:
        attempts = [asyncio.Event() for _ in range(6)]
        coming = iter(attempts)

        def lead_nowhere(_dialect: object, _record: object, _args: object, options: dict[str, Any]) -> None:
            next(coming, attempts[5]).set()
            options["host"] = "/nowhere"

        event.listen(engine.sync_engine, "do_connect", lead_nowhere)
        async with aclosing(watch_pending(engine, TENANT, poll=LONG)) as shadows:
            first = asyncio.create_task(given(shadows, 1))
            async with asyncio.timeout(10):
                await attempts[5].wait()
            assert not first.done()
            event.remove(engine.sync_engine, "do_connect", lead_nowhere)
            assert await first == [("a", 1)]

    said = [record for record in caplog.records if record.name == "iot_models.bus.pending"]
    assert [record.levelno for record in said] == [logging.WARNING] * 2
    assert not any("\n" in record.message for record in said)


@in_event_loop
async def test_what_cannot_pass_by_itself_is_raised(url: URL, server_role: str) -> None:
    async with watching(url.set(username=server_role, password=server_role)) as shadows:
        with pytest.raises(ProgrammingError, match="GRANT them as the owner"):
            await anext(shadows)


@in_event_loop
async def test_several_watchers_each_give_everything(url: URL, fleet: Engine) -> None:
    write(fleet, "a")
    async with watching(url) as one, watching(url) as other:
        assert await given(one, 1) == await given(other, 1) == [("a", 1)]
        write(fleet, "b")
        assert await given(one, 1) == await given(other, 1) == [("b", 1)]


@in_event_loop
async def test_under_row_level_security_a_watcher_is_bound_to_its_tenant(
    url: URL, fleet: Engine, server_role: str
) -> None:
    with fleet.begin() as connection:
        connection.execute(text(f"GRANT SELECT, UPDATE ON device_state TO {server_role}"))
        tenancy.enable(connection, server_role)
    write(fleet, "a")
    async with watching(url.set(username=server_role, password=server_role), bind_tenant=True) as shadows:
        assert await given(shadows, 1) == [("a", 1)]


@in_event_loop
async def test_a_row_that_holds_no_shadow_is_named_once_and_stops_no_other(
    url: URL, fleet: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    write(fleet, "a", "b")
    with fleet.begin() as connection:
        connection.execute(text("UPDATE device_state SET desired_state = '[]' WHERE device_id = 'a'"))
    async with watching(url, poll=SHORT) as shadows:
        assert await given(shadows, 1) == [("b", 1)]
        write(fleet, "b")
        assert await given(shadows, 1) == [("b", 2)]
    assert sum("left out" in record.message for record in caplog.records) == 1


@in_event_loop
async def test_many_pending_devices_come_in_parts_and_none_is_left_out(
    url: URL, fleet: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending, "_VERSIONS_AT_ONCE", 20)
    monkeypatch.setattr(pending, "_SHADOWS_AT_ONCE", 7)
    names = [f"device-{n:02}" for n in range(60)]
    with Session(fleet) as session, session.begin():
        session.add_all(DeviceState(tenant_id=TENANT, site_id="s", device_id=name) for name in names)
        session.flush()
        ShadowService(session, TENANT).patch_desired_many(names, {"n": 1})
    async with watching(url) as shadows:
        assert await given(shadows, 60) == [(name, 1) for name in names]
        await nothing_more(shadows, fleet)


@in_event_loop
async def test_what_was_given_is_forgotten_when_it_is_no_longer_pending(url: URL, fleet: Engine) -> None:
    write(fleet, "a", "b")
    async with async_engine(url) as engine, engine.connect() as connection:
        watch = pending._Watch(TENANT, SHORT, None, bind_tenant=False)  # noqa: SLF001 - its memory
        await connection.run_sync(lambda sync: list(watch.new(sync, ())))
        assert set(watch._given[TENANT]) == {"a", "b"}  # noqa: SLF001
        acknowledge(fleet, "a", 1)
        await connection.run_sync(lambda sync: list(watch.new(sync, {topic(TENANT)})))
        assert set(watch._given[TENANT]) == {"b"}  # noqa: SLF001


def test_with_an_engine_that_blocks_it_is_an_iterator_that_blocks(
    fleet: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending, "_FIRST_RETRY", 0.05)
    write(fleet, "a")
    engine = create_engine(fleet.url)
    with closing(watch_pending(engine, TENANT, poll=timedelta(seconds=20))) as shadows:
        assert next(shadows).device_id == "a"
        writer = threading.Timer(0.2, write, (fleet, "b"))
        writer.start()
        assert next(shadows).device_id == "b"
        writer.join()
        cutter = threading.Timer(0.2, end_listener, (fleet,))
        cutter.start()
        write(fleet, "c", notify=False)
        assert next(shadows).device_id == "c"
        cutter.join()
    engine.dispose()
    assert sum("answers again" in record.message for record in caplog.records) <= 1


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"tenant_id": 7}, TypeError, "tenant_id must be a str"),
        ({"tenant_id": ""}, ValueError, "tenant_id must be text"),
        ({"poll": 30}, TypeError, "poll must be a timedelta, got 30"),
        ({"poll": timedelta()}, ValueError, "poll must be above 0"),
        ({"repeat_after": -SHORT}, ValueError, "repeat_after must be 0 or more"),
        ({"bind_tenant": True}, ValueError, "bind_tenant needs a tenant_id"),
    ],
)
def test_arguments_that_mean_nothing_are_refused_at_once(
    wrong: dict[str, Any], error: type[Exception], words: str, engine: Engine
) -> None:
    with pytest.raises(error, match=words):
        watch_pending(engine, **wrong)


def test_what_is_no_engine_is_refused_with_what_to_pass(engine: Engine) -> None:
    url: Any = engine.url
    with pytest.raises(TypeError, match="engine must be an AsyncEngine or an Engine, got <URL>"):
        watch_pending(url)


class Driver:
    """An asyncpg connection, as far as a listener asks for one."""

    def add_termination_listener(self, _listener: object) -> None:
        pass

    def is_closed(self) -> bool:
        return False


@pytest.mark.parametrize("tenant_id", [TENANT, None])
@in_event_loop
async def test_what_others_send_on_the_channel_does_not_gather_in_a_watcher_that_is_slow(tenant_id: str | None) -> None:
    watch = pending._Watch(tenant_id, LONG, None, bind_tenant=False)  # noqa: SLF001 - no server is that fast
    watch._next_full_look = math.inf  # noqa: SLF001
    listener = pending._AsyncpgListener(Driver(), watch)  # noqa: SLF001

    def send(*payloads: str) -> None:
        for payload in payloads:
            listener.notice(None, 1, "", payload)

    send(*(f"junk {n}" for n in range(30_000)), topic(TENANT))
    assert await listener.wait(watch) == {topic(TENANT)}

    send(*map(topic, map(str, range(10_001))))
    assert len(listener._woken_by) <= 1  # noqa: SLF001
    # With too many tenants to remember, all of them are looked at.
    assert watch.patience() == (0 if tenant_id is None else math.inf)


def test_a_driver_that_cannot_listen_is_refused() -> None:
    with pytest.raises(TypeError, match="listens by psycopg or asyncpg, not by pysqlite"):
        watch_pending(sqlalchemy_create_engine("sqlite://"))
