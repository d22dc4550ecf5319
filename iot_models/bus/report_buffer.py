"""`ReportBuffer`: reports of many callers, written a batch at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Final, NamedTuple

from iot_models._core import validation
from iot_models._core.database_errors import is_of_the_data
from iot_models._core.documents import DocumentLimits
from iot_models.aio import AsyncShadowService
from iot_models.reports import Report

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from sqlalchemy.ext.asyncio import AsyncEngine

    from iot_models.reports import ReportOutcome

# So many batches of different tenants are written at once where the engine's pool does not say how many connections
# it keeps.
_AT_ONCE: Final = 5


class _Waiting(NamedTuple):
    """A report that is not written yet, when it came (the event loop's time), and what its caller waits for."""

    report: Report
    since: float
    outcome: asyncio.Future[ReportOutcome]


class _Queue:
    """The waiting reports of one tenant, in the order in which they came, and the task that writes them."""

    def __init__(self) -> None:
        self.waiting: deque[_Waiting] = deque()
        self.is_due = asyncio.Event()  # a batch is full, or the buffer closes
        self.writer: asyncio.Task[None] | None = None


class ReportBuffer:
    """Writes the reports of many callers in batches, and gives each caller the outcome of its own after the commit.

    One transaction for each message is what makes a bridge slow. Here a report waits until `max_batch` reports of its
    tenant have come or `max_delay` is over, and `ShadowService.replace_reported_many` writes them together. While one
    batch of a tenant is written, the next one gathers: the reports of a device are written in the order in which
    `report` was called.

    Nothing is dropped. Where `max_waiting` reports wait already, `report` waits for room. A database error reaches the
    callers of the batch that met it and no others; they can report again, since a report that is written twice is
    written once. A report that the database refuses for what it holds (a CHECK constraint of your own, say) is found by
    writing the batch in parts, and is the only one that fails.

    For one event loop, and to be used by `async with`. From threads: `asyncio.run_coroutine_threadsafe`.

    Args:
        engine: The engine, psycopg's or asyncpg's. Each batch is a transaction of its own, also if the engine is in
            AUTOCOMMIT mode. As many tenants are written at once as the pool keeps connections.
        max_batch: How many reports a batch has at most.
        max_delay: How long a report waits for others at most, while no batch of its tenant is being written.
        max_waiting: How many reports wait, or are being written, at most.
        drain_timeout: How long the end of the block waits for what is not written yet.
        limits: How large and how deep a document may be.
        bind_tenant: Whether to bind each transaction to its tenant, for row level security: see `iot_models.tenancy`.

    Raises:
        TypeError: If `engine` is no `AsyncEngine`, a number no int, or a time no timedelta.
        ValueError: If `max_batch` or `max_waiting` is below 1, or a time is negative.

    Example:
        >>> async with ReportBuffer(engine) as buffer:
        ...     async for message in client.messages:
        ...         tasks.create_task(answer(buffer, message))
        ...
        ... async def answer(buffer, message):
        ...     outcome = await buffer.report("acme", Report("thermostat-1", {"target_c": 21.5}, acked_version=2))
    """

    def __init__(  # noqa: PLR0913 - keywords
        self,
        engine: AsyncEngine,
        *,
        max_batch: int = 1000,
        max_delay: timedelta = timedelta(milliseconds=20),
        max_waiting: int = 10_000,
        drain_timeout: timedelta = timedelta(seconds=30),
        limits: DocumentLimits = DocumentLimits(),  # noqa: B008 - frozen
        bind_tenant: bool = False,
    ) -> None:
        validation.require_engine(engine, "AsyncEngine")
        self._engine = engine.execution_options(isolation_level="READ COMMITTED")
        self._max_batch = validation.whole("max_batch", max_batch, least=1)
        self._max_delay = validation.duration("max_delay", max_delay).total_seconds()
        self._drain_timeout = validation.duration("drain_timeout", drain_timeout)
        self._room = asyncio.Semaphore(validation.whole("max_waiting", max_waiting, least=1))
        size = getattr(engine.pool, "size", None)
        self._connections = asyncio.Semaphore(max(size(), 1) if size else _AT_ONCE)
        self._limits = limits
        self._bind_tenant = bind_tenant
        self._queues: dict[str, _Queue] = {}
        self._is_open = False

    async def __aenter__(self) -> Self:
        self._is_open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write what is waiting, however the block ended; what is not written in time fails with `TimeoutError`."""
        self._is_open = False
        writers = [queue.writer for queue in self._queues.values() if queue.writer]
        for queue in self._queues.values():
            queue.is_due.set()
        try:
            if writers:
                await asyncio.wait(writers, timeout=self._drain_timeout.total_seconds())
        finally:
            for writer in writers:
                writer.cancel()  # of those that are done, nothing

    async def report(self, tenant_id: str, report: Report) -> ReportOutcome:
        """Write one report with others, and return what became of it, once that is committed.

        A caller that is cancelled takes its report back, unless the batch is being written; no other one notices.

        Raises:
            TypeError: If `tenant_id` is no string, or `report` no `Report`.
            ValueError: If `tenant_id` is empty or cannot be stored as text.
            RuntimeError: Outside of the buffer's `async with` block.
            TimeoutError: If the block ended, and the report was not written in time after it. Report again.
            sqlalchemy.exc.DBAPIError: What the database or its driver said to the batch. Report again, if it is one
                that passes.
        """
        validation.require_tenant(tenant_id)
        if not isinstance(report, Report):
            raise TypeError(f"report must be a Report, got <{type(report).__name__}>")
        async with self._room:
            if not self._is_open:
                raise RuntimeError("the buffer is closed: report inside of `async with ReportBuffer(...) as buffer`")
            loop = asyncio.get_running_loop()
            waiting = _Waiting(report, loop.time(), loop.create_future())
            queue = self._queues.setdefault(tenant_id, _Queue())
            queue.waiting.append(waiting)
            if queue.writer is None:
                queue.writer = loop.create_task(self._write_all(tenant_id, queue), name=f"ReportBuffer {tenant_id}")
            elif len(queue.waiting) >= self._max_batch:
                queue.is_due.set()
            return await waiting.outcome

    async def _write_all(self, tenant_id: str, queue: _Queue) -> None:
        """Write the reports of a tenant, a batch after the other, until none is left."""
        batch: list[_Waiting] = []
        try:
            while queue.waiting:
                await self._until_due(queue)
                async with self._connections:
                    batch = self._next_batch(queue)
                    await self._write(tenant_id, batch)
        except asyncio.CancelledError:
            for waiting in (*batch, *queue.waiting):
                if not waiting.outcome.done():
                    waiting.outcome.set_exception(TimeoutError("the report was not written in time: report again"))
            raise
        finally:
            del self._queues[tenant_id]

    async def _until_due(self, queue: _Queue) -> None:
        is_full = len(queue.waiting) >= self._max_batch
        if is_full or not self._is_open:
            return
        queue.is_due.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout_at(queue.waiting[0].since + self._max_delay):
                await queue.is_due.wait()

    def _next_batch(self, queue: _Queue) -> list[_Waiting]:
        batch: list[_Waiting] = []
        while queue.waiting and len(batch) < self._max_batch:
            waiting = queue.waiting.popleft()
            if not waiting.outcome.done():  # its caller was cancelled
                batch.append(waiting)
        return batch

    async def _write(self, tenant_id: str, batch: Sequence[_Waiting]) -> None:
        if not batch:
            return
        try:
            outcomes = await self._written(tenant_id, [waiting.report for waiting in batch])
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the callers'
            if len(batch) > 1 and is_of_the_data(error):
                half = len(batch) // 2
                await self._write(tenant_id, batch[:half])
                await self._write(tenant_id, batch[half:])
                return
            for waiting in batch:
                if not waiting.outcome.done():
                    waiting.outcome.set_exception(error)
        else:
            for waiting, outcome in zip(batch, outcomes, strict=True):
                if not waiting.outcome.done():
                    waiting.outcome.set_result(outcome)

    async def _written(self, tenant_id: str, reports: Sequence[Report]) -> list[ReportOutcome]:
        from sqlalchemy.ext.asyncio import AsyncSession  # noqa: PLC0415 - needs greenlet, which watch_pending does not

        async with AsyncSession(self._engine) as session, session.begin():
            service = AsyncShadowService(session, tenant_id, limits=self._limits, bind_tenant=self._bind_tenant)
            return await service.replace_reported_many(reports)
