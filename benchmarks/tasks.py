"""Many tasks at the same time on one event loop: reports per second."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import asyncpg
import psycopg
from by_hand import REPORT, numbered
from fleet_data import DOCUMENT, TENANT, load, plain
from rounds import Figure, Progress, interleaved
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncSession

from iot_models import AsyncShadowService
from iot_models.engine import create_async_engine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SECTION = "tasks"
TASKS = (1, 8, 32)
DEVICES = 4_000
SECONDS = 0.2

Once = "Callable[[str], Awaitable[Any]]"


def measure(url: str, setting: str, rounds: int, progress: Progress) -> list[Figure]:
    """Measure operations per second. Each task has its own connection and reports for its own devices."""
    load(url, DEVICES)
    contenders = {
        "asyncpg by hand": _asyncpg,
        "psycopg by hand": _psycopg,
        "ours (asyncpg), long sessions": partial(_ours, driver="asyncpg", long=True),
        "ours (asyncpg), session per write": partial(_ours, driver="asyncpg", long=False),
        "ours (psycopg), long sessions": partial(_ours, driver="psycopg", long=True),
        "ours (psycopg), session per write": partial(_ours, driver="psycopg", long=False),
    }
    figures: list[Figure] = []
    with asyncio.Runner() as runner:
        for tasks in TASKS:
            turns = {
                name: lambda start=start, tasks=tasks: runner.run(_turn(start, url, tasks))
                for name, start in contenders.items()
            }
            label = f"reports, {tasks} tasks, {setting}"
            name_of = "1 task" if tasks == 1 else f"{tasks} tasks"
            for name, measured in interleaved(turns, rounds, progress, label).items():
                figures.append(Figure(SECTION, f"report, {setting}", name, name_of, "operations/s", measured))
    return figures


async def _turn(start: Any, url: str, tasks: int) -> float:
    async with start(url, tasks) as works:
        await asyncio.gather(*(_repeat(once, number, tasks, 0.05) for number, once in enumerate(works)))  # warm up
        started = time.perf_counter()
        done = await asyncio.gather(*(_repeat(once, number, tasks, SECONDS) for number, once in enumerate(works)))
        return sum(done) / (time.perf_counter() - started)


async def _repeat(once: Once, number: int, tasks: int, seconds: float) -> int:
    devices = [f"device-{n:07}" for n in range(number, DEVICES, tasks)]
    until = time.perf_counter() + seconds
    done = 0
    while time.perf_counter() < until:
        await once(devices[done % len(devices)])
        done += 1
    return done


@asynccontextmanager
async def _asyncpg(url: str, tasks: int) -> AsyncIterator[list[Once]]:
    statement = numbered(REPORT)

    async def once(connection: asyncpg.Connection, device: str) -> None:
        row = list(await connection.fetchrow(statement, json.dumps(DOCUMENT), 2, TENANT, device, 2))
        row[2:4] = json.loads(row[2]), json.loads(row[3])  # psycopg and SQLAlchemy decode documents too

    connections = [await asyncpg.connect(plain(url)) for _ in range(tasks)]
    try:
        yield [partial(once, connection) for connection in connections]
    finally:
        for connection in connections:
            await connection.close()


@asynccontextmanager
async def _psycopg(url: str, tasks: int) -> AsyncIterator[list[Once]]:
    async def once(connection: psycopg.AsyncConnection, device: str) -> None:
        cursor = await connection.execute(REPORT, (json.dumps(DOCUMENT), 2, TENANT, device, 2))
        assert await cursor.fetchone()

    connections = [await psycopg.AsyncConnection.connect(plain(url), autocommit=True) for _ in range(tasks)]
    try:
        yield [partial(once, connection) for connection in connections]
    finally:
        for connection in connections:
            await connection.close()


@asynccontextmanager
async def _ours(url: str, tasks: int, *, driver: str, long: bool) -> AsyncIterator[list[Once]]:
    address = make_url(url).set(drivername=f"postgresql+{driver}")
    engine = create_async_engine(address, isolation_level="AUTOCOMMIT", pool_size=tasks)

    async def per_write(device: str) -> None:
        async with AsyncSession(engine, expire_on_commit=False) as session:
            await AsyncShadowService(session, TENANT).replace_reported(device, DOCUMENT, acked_version=2)

    async def once(service: AsyncShadowService, device: str) -> None:
        await service.replace_reported(device, DOCUMENT, acked_version=2)

    async with AsyncExitStack() as stack:
        stack.push_async_callback(engine.dispose)
        if not long:
            yield [per_write] * tasks
            return
        sessions = [await stack.enter_async_context(AsyncSession(engine, expire_on_commit=False)) for _ in range(tasks)]
        yield [partial(once, AsyncShadowService(session, TENANT)) for session in sessions]
