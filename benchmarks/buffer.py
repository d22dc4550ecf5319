"""Reports of 256 tasks on one event loop: `ReportBuffer` and a call for each report, reports per second and latency."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from functools import partial
from statistics import median, quantiles
from typing import TYPE_CHECKING

from fleet_data import DOCUMENT, TENANT, load
from rounds import Figure, Progress, interleaved
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncSession

from iot_models import AsyncShadowService, Report
from iot_models.bus import ReportBuffer
from iot_models.engine import create_async_engine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from sqlalchemy.ext.asyncio import AsyncEngine

    from iot_models import ReportOutcome

    Start = Callable[..., AbstractAsyncContextManager[Callable[[str], Awaitable[ReportOutcome | None]]]]

SECTION = "buffer"
TASKS = 256
DEVICES = 8_192
CONNECTIONS = 10
SECONDS = 1.0
MAX_DELAY = 0.02  # seconds; the default of ReportBuffer
LATENCY = "latency, 99th percentile"
BATCH = "a batch, written"


def name_of(driver: str, start: Start) -> str:
    return f"ours ({driver}), {'ReportBuffer' if start is _buffered else 'a call for each report'}"


def measure(url: str, setting: str, rounds: int, progress: Progress) -> list[Figure]:
    """Each of 256 tasks reports for its own devices, one report after the other, through a pool of 10 connections."""
    load(url, DEVICES)
    seconds: dict[str, dict[str, list[float]]] = {LATENCY: {}, BATCH: {}}
    figures: list[Figure] = []
    with asyncio.Runner() as runner:
        turns = {
            name_of(driver, start): partial(_run, runner, start, url, driver, seconds)
            for driver in ("psycopg", "asyncpg")
            for start in (_calls, _buffered)
        }
        for name, measured in interleaved(turns, rounds, progress, f"reports, {TASKS} tasks, {setting}").items():
            figures.append(Figure(SECTION, f"reports, {TASKS} tasks", name, setting, "operations/s", measured))
    # The first turn of each warms up.
    for work, found in seconds.items():
        for name, measured in found.items():
            figures.append(Figure(SECTION, work, name, setting, "s", tuple(measured[1:])))
    return figures


def _run(
    runner: asyncio.Runner, start: Start, url: str, driver: str, seconds: dict[str, dict[str, list[float]]]
) -> float:
    contender = name_of(driver, start)
    taken: list[float] = []
    written: list[float] = []
    per_second = runner.run(_turn(start, url, driver, taken, written))
    seconds[LATENCY].setdefault(contender, []).append(quantiles(taken, n=100)[98])
    if written:
        seconds[BATCH].setdefault(contender, []).append(median(written))
    return per_second


async def _turn(start: Start, url: str, driver: str, taken: list[float], written: list[float]) -> float:
    engine = create_async_engine(
        make_url(url).set(drivername=f"postgresql+{driver}"), pool_size=CONNECTIONS, max_overflow=0, pool_timeout=120
    )
    try:
        async with start(engine, written) as once:
            await asyncio.gather(*(_repeat(once, number, 0.2, []) for number in range(TASKS)))  # warm up
            written.clear()
            started = time.perf_counter()
            await asyncio.gather(*(_repeat(once, number, SECONDS, taken) for number in range(TASKS)))
            return len(taken) / (time.perf_counter() - started)
    finally:
        await engine.dispose()


async def _repeat(
    once: Callable[[str], Awaitable[ReportOutcome | None]], number: int, seconds: float, taken: list[float]
) -> None:
    devices = [f"device-{n:07}" for n in range(number, DEVICES, TASKS)]
    until = time.perf_counter() + seconds
    turn = 0
    while (began := time.perf_counter()) < until:
        await once(devices[turn % len(devices)])
        taken.append(time.perf_counter() - began)
        turn += 1


@asynccontextmanager
async def _calls(engine: AsyncEngine, _written: list[float]) -> AsyncIterator[Callable[[str], Awaitable[None]]]:
    autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")

    async def once(device: str) -> None:
        async with AsyncSession(autocommit) as session:
            await AsyncShadowService(session, TENANT).replace_reported(device, DOCUMENT, acked_version=2)

    yield once


class _Timed(ReportBuffer):
    """Notes how long each batch takes to be written."""

    def __init__(self, engine: AsyncEngine, written: list[float]) -> None:
        super().__init__(engine)
        self._seconds = written

    async def _written(self, tenant_id: str, reports: Sequence[Report]) -> list[ReportOutcome]:
        began = time.perf_counter()
        outcomes = await super()._written(tenant_id, reports)
        self._seconds.append(time.perf_counter() - began)
        return outcomes


@asynccontextmanager
async def _buffered(
    engine: AsyncEngine, written: list[float]
) -> AsyncIterator[Callable[[str], Awaitable[ReportOutcome]]]:
    async with _Timed(engine, written) as buffer:

        async def once(device: str) -> ReportOutcome:
            outcome = await buffer.report(TENANT, Report(device, DOCUMENT, 2))
            assert outcome.status == "accepted"
            return outcome

        yield once
