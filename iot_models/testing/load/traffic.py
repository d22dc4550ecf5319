"""Reports and desired writes, each begun when it is due, whether those before it have ended or not (an open loop).

A closed loop, which begins the next one when the last has ended, slows down with the database and then measures it when
it is not busy ("coordinated omission"). Here a latency is counted from the time at which the write was due.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from iot_models._core.database_errors import explained, sqlstate
from iot_models.aio import AsyncShadowService
from iot_models.bus import ReportBuffer
from iot_models.reports import Report, ReportStatus
from iot_models.testing.load.meters import Latencies, PoolClock
from iot_models.testing.load.observation import difference
from iot_models.testing.load.plan import device_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

    from sqlalchemy.ext.asyncio import AsyncEngine

    from iot_models.testing.load.meters import LoopClock
    from iot_models.testing.load.observation import Observer
    from iot_models.testing.load.output import Progress
    from iot_models.testing.load.plan import Plan

_TICK: Final = 0.002  # seconds between two looks at what is due, at least
_AT_ONCE: Final = 1000  # how many are begun in one tick: the event loop has other work
# How many may be under way. What is due besides is begun later, and its latency counted from when it was due.
_REPORTS_UNDER_WAY: Final = 10_000
_DESIRED_UNDER_WAY: Final = 1000
_TELL: Final = 0.25
_DRAIN: Final = 30.0  # seconds for what is under way at the end: longer than a statement may take
_AT_AN_END: Final = timedelta(seconds=5)  # and for batches, after an interruption


class Stream:
    """Writes of one kind at a rate.

    Attributes:
        due: How many were due.
        unsent: How many of them were never begun, because too many were under way.
        done: How many were done.
        done_in_time: How many of them before the end.
        refused: How many had another outcome, by its name.
        errors: How many ended in an error, by its SQLSTATE, or by its class where the server sent none.
        unanswered: How many were not answered in time after the end.
        latencies: Of those that were done.
    """

    def __init__(self, rate: float, under_way: int, write: Callable[[int], Awaitable[ReportStatus]]) -> None:
        self._rate = rate
        self._under_way = under_way
        self._write = write
        self._tasks: set[asyncio.Task[None]] = set()
        self.due = self.unsent = self.done = self.done_in_time = self.unanswered = 0
        self.refused: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.latencies = Latencies()

    async def run(self, start: float, seconds: float) -> None:
        """Begin each write when it is due, from `start` on by the event loop's time."""
        loop = asyncio.get_running_loop()
        self.due = self.unsent = math.ceil(self._rate * seconds)
        begun = 0
        passed = 0.0
        while self.due and passed < seconds:
            passed = min(loop.time() - start, seconds)
            room = min(self._under_way - len(self._tasks), _AT_ONCE)
            for n in range(begun, min(int(passed * self._rate) + 1, self.due, begun + room)):
                self._tasks.add(loop.create_task(self._one(n, start + n / self._rate)))
                begun += 1
            self.unsent = self.due - begun
            is_next = min(begun / self._rate, seconds)
            await asyncio.sleep(max(start + is_next - loop.time(), _TICK))
        self.done_in_time = self.done

    async def _one(self, n: int, due: float) -> None:
        try:
            outcome = await self._write(n)
        except Exception as error:  # noqa: BLE001 - it is counted
            self.errors[(isinstance(error, DBAPIError) and sqlstate(error)) or type(error).__name__] += 1
        else:
            if outcome is ReportStatus.ACCEPTED:
                self.latencies.add(asyncio.get_running_loop().time() - due)
                self.done += 1
            else:
                self.refused[outcome.value] += 1
        finally:
            self._tasks.discard(asyncio.current_task())

    async def finish(self) -> None:
        """Wait for what is under way."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_DRAIN)
        self.unanswered = len(self._tasks)

    def cancel(self) -> None:
        """Take back what is under way."""
        for task in self._tasks:
            task.cancel()


class Traffic:
    """The load on a database, through `ReportBuffer` and `AsyncShadowService`, and what was measured meanwhile.

    Attributes:
        reports: The reports.
        desired: The desired writes.
        batches: How many transactions wrote the reports.
        pool: How busy the connections were.
        seconds: How long it was measured: until the last report was due.
        cpu: Seconds of processor time of this process in this time.
        busy: Seconds in which the event loop had something to do.
        wal: Bytes of WAL that the server wrote in this time; None if the role may not ask.
    """

    def __init__(self, engine: AsyncEngine, plan: Plan, clock: LoopClock, observer: Observer) -> None:
        self._plan = plan
        self._clock = clock
        self._observer = observer
        self._engine = engine
        self._versions: dict[int, int] = {}  # by device, where it is not the first one
        reports_engine = engine.execution_options()
        event.listen(reports_engine.sync_engine, "commit", self._count_batch)
        self._buffer = ReportBuffer(
            reports_engine,
            max_batch=plan.max_batch,
            max_delay=plan.max_delay,
            max_waiting=_REPORTS_UNDER_WAY,
            drain_timeout=_AT_AN_END,
            bind_tenant=plan.bind_tenant,
        )
        self.reports = Stream(plan.rate, _REPORTS_UNDER_WAY, self._report)
        self.desired = Stream(plan.desired_rate, _DESIRED_UNDER_WAY, self._write_desired)
        self.pool = PoolClock(engine, plan.connections)
        self.batches = 0
        self.seconds = self.cpu = self.busy = 0.0
        self.wal: int | None = None

    async def run(self, progress: Progress) -> None:
        """Put the load on the database for as long as the plan says.

        Raises:
            sqlalchemy.exc.DBAPIError: What the database says when it is connected to. Errors of writes are counted.
        """
        async with self._buffer:
            await self._warm_up()
            progress.begin("writing", self._plan.seconds)
            try:
                async with self._measured(), _meanwhile(self._observer.watch()), _meanwhile(self._tell(progress)):
                    now = asyncio.get_running_loop().time()
                    await asyncio.gather(
                        self.reports.run(now, self._plan.seconds), self.desired.run(now, self._plan.seconds)
                    )
                await asyncio.gather(self.reports.finish(), self.desired.finish())
            finally:
                self.reports.cancel()
                self.desired.cancel()

    async def _warm_up(self) -> None:
        """Open all connections, and have the statements made."""
        with explained():
            async with AsyncExitStack() as connections:
                for _ in range(self._plan.connections):
                    await connections.enter_async_context(self._engine.connect())
            await self._report(0)

    @asynccontextmanager
    async def _measured(self) -> AsyncIterator[None]:
        wal = await self._observer.wal()
        start, cpu, idle = time.perf_counter(), time.process_time(), self._clock.idle
        self.batches = 0
        self.pool.start()
        yield
        self.pool.stop()
        self.seconds = time.perf_counter() - start
        self.cpu = time.process_time() - cpu
        self.busy = self.seconds - (self._clock.idle - idle)
        self.wal = difference(await self._observer.wal(), wal)

    async def _tell(self, progress: Progress) -> None:
        loop = asyncio.get_running_loop()
        start = loop.time()
        while True:
            await asyncio.sleep(_TELL)
            passed = loop.time() - start
            progress.at(min(passed, self._plan.seconds), f"{self.reports.done / passed:,.0f} reports/s")

    async def _report(self, n: int) -> ReportStatus:
        device = self._plan.device(n)
        # What it acknowledges is nothing new, unless its desired document was written meanwhile.
        report = Report(device_id(device), {**self._plan.document, "n": n}, self._versions.get(device, 1))
        return (await self._buffer.report(self._plan.tenant_of(device), report)).status

    async def _write_desired(self, n: int) -> ReportStatus:
        device = self._plan.device(n)
        tenant_id = self._plan.tenant_of(device)
        async with AsyncSession(self._engine) as session, session.begin():
            service = AsyncShadowService(session, tenant_id, actor="load", bind_tenant=self._plan.bind_tenant)
            shadow = await service.patch_desired(device_id(device), {"n": n})
        self._versions[device] = max(shadow.desired_version, self._versions.get(device, 1))
        return ReportStatus.ACCEPTED

    def _count_batch(self, _: Any) -> None:
        self.batches += 1


@asynccontextmanager
async def _meanwhile(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Do something that has no end while the block runs."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
