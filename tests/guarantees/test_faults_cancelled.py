"""An asyncio task that is cancelled wherever it waits: all or nothing, and no connection is left behind."""

from __future__ import annotations

import asyncio
import time
from itertools import count
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from iot_models import AsyncShadowService
from tests.databases.async_engines import async_engine, in_event_loop, url_for
from tests.databases.backends import await_connections
from tests.databases.devices import TENANT
from tests.guarantees.every_write import (
    ONE,
    PATCH_DESIRED,
    PATCH_DESIRED_MANY,
    REPLACE_DESIRED,
    REPLACE_REPORTED_MANY,
    START,
    Write,
    committed,
    each_of,
    each_write,
    fleet_in,
    put_back,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterator

    from sqlalchemy import URL, Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

    # Runs the work and breaks it off where it waits for the time of that number; whether it did, and how often it waited.
    BreakOff: TypeAlias = Callable[[Awaitable[Any], int], Awaitable[tuple[bool, int]]]

pytestmark = pytest.mark.repeats

PAUSE = 0.01  # what the server needs to answer one statement, with room


@pytest.fixture
def independent(engine: Engine) -> Iterator[Engine]:
    """Another way to the same database, with the fleet committed."""
    with fleet_in(engine):
        yield engine


@pytest.fixture
def url(driver: str, independent: Engine) -> URL:
    return url_for(driver, independent.url)


class Waits:
    """Awaits something; where it waits for the time of that number, from 0 on, something else is done first."""

    def __init__(self, awaitable: Awaitable[Any], number: int, then: Callable[[], object]) -> None:
        self._awaitable = awaitable
        self._number = number
        self._then = then
        self.seen = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._awaitable.__await__()
        thrown: BaseException | None = None
        while True:
            try:
                awaited = steps.send(None) if thrown is None else steps.throw(thrown)
            except StopIteration as done:
                return done.value
            if self.seen == self._number:
                self._then()
            self.seen += 1
            try:
                thrown = yield awaited  # asyncio sends None
            except BaseException as error:  # noqa: BLE001 - a cancellation above all
                thrown = error


async def cancel(work: Awaitable[Any], number: int, *, pause: float = 0) -> tuple[bool, int]:
    """Break off by `Task.cancel`, the loop standing still for the pause before."""
    task = asyncio.current_task()
    assert task is not None

    def then() -> None:
        time.sleep(pause)
        task.cancel()

    waits = Waits(work, number, then)
    try:
        await waits
    except asyncio.CancelledError:
        task.uncancel()
        return True, waits.seen
    return False, waits.seen


async def cancel_answered(work: Awaitable[Any], number: int) -> tuple[bool, int]:
    """Break off when the server has done what it was asked, and only the client does not know yet."""
    return await cancel(work, number, pause=PAUSE)


async def time_out(work: Awaitable[Any], number: int) -> tuple[bool, int]:
    """Break off by `asyncio.timeout`."""
    loop = asyncio.get_running_loop()
    scope = asyncio.timeout(None)
    waits = Waits(work, number, lambda: scope.reschedule(loop.time()))
    try:
        async with scope:
            await waits
    except TimeoutError:
        return True, waits.seen
    return False, waits.seen


async def write_in_a_transaction(engine: AsyncEngine, write: Write) -> None:
    async with AsyncSession(engine) as session, session.begin():
        await write(AsyncShadowService(session, TENANT))


async def write_alone(engine: AsyncEngine, write: Write) -> None:
    async with AsyncSession(engine) as session:
        await write(AsyncShadowService(session, TENANT))


async def broken_off_everywhere(
    url: URL, independent: Engine, write: Write, break_off: BreakOff, *, mode: str = "READ COMMITTED", warm: bool = True
) -> list[bool]:
    """Break the write off wherever it waits, one place after another; whether it was then done, for each place.

    The pool has one connection: one that is not given back is missed.
    """
    work = write_alone if mode == "AUTOCOMMIT" else write_in_a_transaction
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 2, "isolation_level": mode}
    done: list[bool] = []
    for number in count():
        async with async_engine(url, application_name="broken off", **options) as engine:
            if warm:
                async with AsyncSession(engine) as session:
                    await AsyncShadowService(session, TENANT).get(ONE)
            is_broken_off, waits = await break_off(work(engine, write), number)
            assert engine.sync_engine.pool.status().endswith("Current Checked out connections: 0")
            if waits <= number:  # there is no such place any more
                assert not is_broken_off
                break
            rows = committed(independent)
            assert rows in (START, write.done())
            done.append(rows != START)
            assert is_broken_off or done[-1]
            if done[-1]:
                put_back(independent)
            async with AsyncSession(engine) as session:  # the engine serves on
                assert (await AsyncShadowService(session, TENANT).get(ONE)).desired_version == 7
    assert committed(independent) == write.done()
    await_connections(independent, "broken off", 0)
    return done


@each_write
@in_event_loop
async def test_a_task_that_is_cancelled_wherever_it_waits_leaves_all_or_nothing(
    url: URL, independent: Engine, write: Write
) -> None:
    done = await broken_off_everywhere(url, independent, write, cancel)

    assert len(done) > write.statements  # the statements and the commit, at least
    assert not any(done[: write.statements])


@each_of(REPLACE_DESIRED, REPLACE_REPORTED_MANY)
@in_event_loop
async def test_a_task_that_is_cancelled_when_the_server_has_committed_has_written_though_nobody_was_told(
    url: URL, independent: Engine, write: Write
) -> None:
    done = await broken_off_everywhere(url, independent, write, cancel_answered)

    assert done[-1]
    assert sorted(done) == done  # nothing before the commit, everything from it on


@pytest.mark.parametrize("break_off", [cancel, cancel_answered])
@in_event_loop
async def test_in_autocommit_mode_a_cancelled_batch_is_done_whole_or_not_at_all(
    url: URL, independent: Engine, break_off: BreakOff
) -> None:
    done = await broken_off_everywhere(url, independent, PATCH_DESIRED_MANY, break_off, mode="AUTOCOMMIT")

    assert not done[0]
    assert done[-1]


@in_event_loop
async def test_a_timeout_wherever_a_task_waits_leaves_all_or_nothing(url: URL, independent: Engine) -> None:
    assert await broken_off_everywhere(url, independent, PATCH_DESIRED_MANY, time_out)


@in_event_loop
async def test_a_task_that_is_cancelled_while_it_connects_leaves_no_connection_behind(
    url: URL, independent: Engine
) -> None:
    done = await broken_off_everywhere(url, independent, REPLACE_DESIRED, cancel, warm=False)

    assert not done[0]
    assert done[-1]


@in_event_loop
async def test_a_task_that_is_cancelled_while_it_waits_for_the_pool_takes_nothing_from_the_others(
    url: URL, independent: Engine
) -> None:
    async with async_engine(url, pool_size=1, max_overflow=0, pool_timeout=5) as engine:
        async with AsyncSession(engine) as holder, holder.begin():
            await AsyncShadowService(holder, TENANT).patch_desired(ONE, {"new": 2})
            waiter = asyncio.create_task(write_in_a_transaction(engine, PATCH_DESIRED))
            await asyncio.sleep(0.02)
            waiter.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiter
        assert committed(independent) == PATCH_DESIRED.done()

        await write_in_a_transaction(engine, PATCH_DESIRED)
        assert engine.sync_engine.pool.status().endswith("Current Checked out connections: 0")
    assert committed(independent)[ONE].desired_version == 9
