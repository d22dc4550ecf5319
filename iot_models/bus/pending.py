"""`watch_pending`: every device that has something to acknowledge, now and whenever there is something new.

What is given is read from the table each time (level-triggered), so that nothing can be missed: a notification only
says that it is worth while to look. One connection listens and reads.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast, overload

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from iot_models import tenancy
from iot_models._core import statements, validation
from iot_models._core.database_errors import explained
from iot_models._core.notifications import CHANNEL, topic
from iot_models._core.statement_names import METHOD
from iot_models.models import DeviceState
from iot_models.service import ShadowService

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Collection, Generator, Iterator, Sequence

    from sqlalchemy import Connection, Engine, Executable, Row
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from iot_models.shadow import Shadow

log = logging.getLogger(__name__)

# As SQLAlchemy names them.
_DRIVERS: Final = ("psycopg", "psycopg_async", "asyncpg")
_VERSIONS_AT_ONCE: Final = 5000
_SHADOWS_AT_ONCE: Final = 500
# Every role of a database may notify. What does not look like a topic of ours, and more than so many, is not kept.
_TOPIC_LENGTH: Final = len(topic(""))
_TOPICS_AT_ONCE: Final = 10_000
# Seconds. After a look there is a pause of this length, or of that of the look where that took longer: with many
# pending devices and many writers, looking takes half of a connection at most.
_PAUSE: Final = 0.05
_FIRST_RETRY: Final = 0.5
_LONGEST_RETRY: Final = 10.0


class _Given(NamedTuple):
    """What was given of a device: a version, and when, by a clock that nobody sets."""

    version: int
    at: float


@overload
def watch_pending(
    engine: AsyncEngine,
    tenant_id: str | None = None,
    *,
    poll: timedelta = ...,
    repeat_after: timedelta | None = ...,
    bind_tenant: bool = ...,
) -> AsyncGenerator[Shadow, None]: ...
@overload
def watch_pending(
    engine: Engine,
    tenant_id: str | None = None,
    *,
    poll: timedelta = ...,
    repeat_after: timedelta | None = ...,
    bind_tenant: bool = ...,
) -> Generator[Shadow, None, None]: ...
def watch_pending(
    engine: AsyncEngine | Engine,
    tenant_id: str | None = None,
    *,
    poll: timedelta = timedelta(seconds=30),
    repeat_after: timedelta | None = None,
    bind_tenant: bool = False,
) -> AsyncGenerator[Shadow, None] | Generator[Shadow, None, None]:
    """Give each device that has something to acknowledge: all of them first, then each new version once.

    Within a second where the writers notify (`ShadowService(..., notify=True)`), within `poll` where they do not. What
    is given is read from the table, and no notification, listener or connection that is lost loses a version. If the
    connection is lost, the watcher connects again by itself; the log says so. A version that is overtaken before it was
    given is left out; so is one that its device acknowledged, or that went with its device.

    The watcher keeps one connection of the engine's pool, and the version of each pending device in memory. While the
    caller works on a shadow, no transaction is open. Several watchers may run; each gives all devices. One that starts
    again gives everything that is pending again: at least once.

    Args:
        engine: An `AsyncEngine` for an async iterator, an `Engine` for one that blocks. Behind PgBouncer in transaction
            mode notifications do not arrive, and `poll` finds what is new.
        tenant_id: The tenant; None watches all of them, with a role that may read them all.
        poll: How long to wait for a notification before looking anyway.
        repeat_after: How long after it was given a version is given again, as long as it is pending and not refused;
            a quarter of that time more at most. None: never.
        bind_tenant: Whether to bind each transaction to the tenant, for row level security: see `iot_models.tenancy`.

    Yields:
        Shadows that are pending, in no order. A refused one is given once, and its `is_refused` is true.

    Raises:
        TypeError: If `engine` is no engine, `tenant_id` no string, or a time no timedelta.
        ValueError: If `tenant_id` is empty or cannot be stored as text; if a time is not above 0; if `bind_tenant` is
            set and no tenant given.
        sqlalchemy.exc.ProgrammingError: While it runs, if the database is not migrated or the role may not read.

    Example:
        >>> async for shadow in watch_pending(engine, "acme", repeat_after=timedelta(minutes=5)):
        ...     await client.publish(f"{shadow.device_id}/desired", json.dumps(shadow.to_dict()), retain=True)
    """
    validation.require_engine(engine, "AsyncEngine", "Engine")
    if tenant_id is not None:
        validation.require_tenant(tenant_id)
    elif bind_tenant:
        raise ValueError("bind_tenant needs a tenant_id: a watcher of all tenants reads with a role that sees them all")
    for name, value in (("poll", poll), ("repeat_after", repeat_after)):
        if value is not None and not validation.duration(name, value):
            raise ValueError(f"{name} must be above 0")
    if engine.dialect.driver not in _DRIVERS:
        raise TypeError(f"watch_pending listens by psycopg or asyncpg, not by {engine.dialect.driver}")
    watch = _Watch(tenant_id, poll, repeat_after, bind_tenant=bind_tenant)
    # A transaction for each look, also with an engine in AUTOCOMMIT mode: bind_tenant needs one.
    engine = engine.execution_options(isolation_level="READ COMMITTED")
    if hasattr(engine, "sync_engine"):
        return _watch_async(cast("AsyncEngine", engine), watch)
    return _watch_sync(cast("Engine", engine), watch)


class _Watch:
    """What a watcher looks for, what it has given, and when it looks again."""

    def __init__(
        self, tenant_id: str | None, poll: timedelta, repeat_after: timedelta | None, *, bind_tenant: bool
    ) -> None:
        self._tenant_id = tenant_id
        self._bind_tenant = bind_tenant
        self._repeat_after = repeat_after.total_seconds() if repeat_after else None
        self._interval = min(poll.total_seconds(), self._repeat_after / 4 if self._repeat_after else math.inf)
        # By tenant and device; of the pending ones only.
        self._given: dict[str, dict[str, _Given]] = {}
        self._topics: dict[str, str] = {}
        self._next_full_look = 0.0
        self._pause_until = 0.0
        self._retry = 0.0

    def new(self, connection: Connection, woken_by: Collection[str]) -> Iterator[list[Shadow]]:
        """The shadows to give now, in parts. Each part is read in a transaction of its own.

        Args:
            connection: In no transaction.
            woken_by: The topics of the notifications since the last look, of which `concerns` is true. Where it is not
                time to look at all tenants, only theirs are looked at.
        """
        began = time.monotonic()
        is_full = began >= self._next_full_look
        if is_full:
            self._given = {tenant_id: self._given.get(tenant_id, {}) for tenant_id in self._tenants(connection)}
            self._topics = {topic(tenant_id): tenant_id for tenant_id in self._given}
        elif not self._topics.keys() >= set(woken_by):  # a tenant that had nothing pending
            self._topics |= {topic(tenant_id): tenant_id for tenant_id in self._tenants(connection)}
        for name, tenant_id in list(self._topics.items()):
            if is_full or name in woken_by:
                yield from self._of_tenant(connection, tenant_id)
        ended = time.monotonic()
        if is_full:
            self._next_full_look = ended + self._interval
        self._pause_until = ended + max(_PAUSE, ended - began)

    def concerns(self, name: str) -> bool:
        """Whether a notification with this topic is of a tenant that is watched."""
        return len(name) == _TOPIC_LENGTH if self._tenant_id is None else name == topic(self._tenant_id)

    def look_at_all(self) -> None:
        """Look at all tenants next, without waiting for a notification."""
        self._next_full_look = 0.0

    def pause(self) -> float:
        """How many seconds to leave the database alone after a look."""
        return max(self._pause_until - time.monotonic(), 0.0)

    def patience(self) -> float:
        """How many seconds to wait for a notification before looking anyway."""
        return max(self._next_full_look - time.monotonic(), 0.0)

    def lost(self, error: Exception) -> float:
        """Take note of a failure; returns how many seconds to wait before the next attempt. The first is logged.

        Raises:
            Exception: The error, if trying again cannot help.
        """
        if not _passes(error):
            raise error
        if not self._retry:
            # In one line: SQLAlchemy's and libpq's messages have several.
            why = " ".join(str(error).split())
            log.warning("watch_pending: %s; it is tried again until the database answers", why)
        self._retry = min(max(self._retry * 2, _FIRST_RETRY), _LONGEST_RETRY)
        self._next_full_look = 0.0
        return self._retry

    def _tenants(self, connection: Connection) -> Iterator[str]:
        if self._tenant_id is not None:
            yield self._tenant_id
            return
        after: str | None = None
        while (after := self._next_tenant(connection, after)) is not None:
            yield after

    def _next_tenant(self, connection: Connection, after: str | None) -> str | None:
        with Session(connection) as session, session.begin():
            statement = statements.pending_tenant(after=after is not None)
            row = self._execute(session, statement, {} if after is None else {"after": after}).one_or_none()
        return None if row is None else cast("str", row[0])

    def _of_tenant(self, connection: Connection, tenant_id: str) -> Iterator[list[Shadow]]:
        given = self._given.setdefault(tenant_id, {})
        pending: set[str] = set()
        after: str | None = None
        while True:
            rows = self._versions(connection, tenant_id, after)
            versions = {row.device_id: row.desired_version for row in rows}
            pending |= versions.keys()
            new = [row.device_id for row in rows if self._is_to_be_given(given.get(row.device_id), row)]
            for start in range(0, len(new), _SHADOWS_AT_ONCE):
                part = new[start : start + _SHADOWS_AT_ONCE]
                shadows = self._shadows(connection, tenant_id, part)
                # Also those that have gone, or whose rows are no shadows: the log names each once.
                versions |= {shadow.device_id: shadow.desired_version for shadow in shadows}
                at = time.monotonic()
                given |= {device_id: _Given(versions[device_id], at) for device_id in part}
                yield shadows
            if len(rows) < _VERSIONS_AT_ONCE:
                break
            after = rows[-1].device_id
        for device_id in given.keys() - pending:
            del given[device_id]

    def _is_to_be_given(self, given: _Given | None, row: Row[Any]) -> bool:
        if given is None or given.version != row.desired_version:
            return True
        if self._repeat_after is None or row.is_refused:
            return False
        return time.monotonic() >= given.at + self._repeat_after

    def _versions(self, connection: Connection, tenant_id: str, after: str | None) -> Sequence[Row[Any]]:
        binds = {"tenant": tenant_id, "limit": _VERSIONS_AT_ONCE} | ({} if after is None else {"after": after})
        with Session(connection) as session, session.begin():
            if self._bind_tenant:
                tenancy.bind_tenant(session, tenant_id)
            rows: Sequence[Row[Any]]
            rows = self._execute(session, statements.pending_versions(after=after is not None), binds).all()
            return rows

    def _execute(self, session: Session, statement: Executable, binds: dict[str, Any]) -> Any:
        with explained():
            result = session.execute(
                statement,
                binds,
                execution_options={METHOD: "watch_pending"},
                bind_arguments={"mapper": DeviceState.__mapper__},
            )
        if self._retry:
            self._retry = 0.0
            log.warning("watch_pending: the database answers again; all that is pending is looked at")
        return result

    def _shadows(self, connection: Connection, tenant_id: str, device_ids: list[str]) -> list[Shadow]:
        with Session(connection) as session, session.begin():
            service = ShadowService(session, tenant_id, bind_tenant=self._bind_tenant)
            return [shadow for shadow in service.get_many(device_ids).values() if shadow.is_pending]


def _passes(error: Exception) -> bool:
    """Whether the same can succeed later: the server is away, restarts, or is too busy."""
    if isinstance(error, DBAPIError):
        return error.connection_invalidated or isinstance(error, (OperationalError, InterfaceError))
    return isinstance(error, (OSError, PoolTimeoutError))


async def _watch_async(engine: AsyncEngine, watch: _Watch) -> AsyncGenerator[Shadow, None]:
    while True:
        try:
            async with engine.connect() as connection:
                try:
                    listener = await _listen_async(connection, watch)
                    woken_by: set[str] = set()
                    while True:
                        parts = watch.new(cast("Connection", connection.sync_connection), woken_by)
                        while (part := await connection.run_sync(_next, parts)) is not None:
                            for shadow in part:
                                yield shadow
                        await asyncio.sleep(watch.pause())
                        woken_by = await listener.wait(watch)
                finally:
                    await connection.invalidate()  # closed: it listens
        except Exception as error:  # noqa: BLE001 - raised again, if it does not pass
            await asyncio.sleep(watch.lost(error))


def _watch_sync(engine: Engine, watch: _Watch) -> Generator[Shadow, None, None]:
    while True:
        try:
            with engine.connect() as connection:
                try:
                    connection.exec_driver_sql(f"LISTEN {CHANNEL}")
                    connection.commit()
                    driver: Any = connection.connection.driver_connection
                    woken_by: set[str] = set()
                    while True:
                        for part in watch.new(connection, woken_by):
                            yield from part
                        time.sleep(watch.pause())
                        woken_by = set()
                        while not woken_by and (patience := watch.patience()):
                            with _while_waiting():
                                notes = driver.notifies(timeout=patience, stop_after=1)
                                woken_by = {note.payload for note in notes if watch.concerns(note.payload)}
                finally:
                    connection.invalidate()  # closed: it listens
        except Exception as error:  # noqa: BLE001 - raised again, if it does not pass
            time.sleep(watch.lost(error))


def _next(_connection: Connection, parts: Iterator[list[Shadow]]) -> list[Shadow] | None:
    return next(parts, None)


async def _listen_async(connection: AsyncConnection, watch: _Watch) -> _PsycopgListener | _AsyncpgListener:
    driver: Any = (await connection.get_raw_connection()).driver_connection
    if connection.dialect.driver == "asyncpg":
        listener = _AsyncpgListener(driver, watch)
        with _while_waiting():
            await driver.add_listener(CHANNEL, listener.notice)
        return listener
    await connection.exec_driver_sql(f"LISTEN {CHANNEL}")
    await connection.commit()
    return _PsycopgListener(driver)


@contextmanager
def _while_waiting() -> Iterator[None]:
    """The driver's own errors, not SQLAlchemy's: all of them mean that the connection is of no use any more."""
    try:
        yield
    except Exception as error:
        raise ConnectionError(f"the connection that listens is lost: {error}") from error


class _PsycopgListener:
    def __init__(self, driver: Any) -> None:
        self._driver = driver

    async def wait(self, watch: _Watch) -> set[str]:
        """The topics of notifications; none, if it is time to look anyway."""
        while patience := watch.patience():
            with _while_waiting():
                notes = self._driver.notifies(timeout=patience, stop_after=1)
                if woken_by := {note.payload async for note in notes if watch.concerns(note.payload)}:
                    return woken_by
        return set()


class _AsyncpgListener:
    def __init__(self, driver: Any, watch: _Watch) -> None:
        self._driver = driver
        self._watch = watch
        self._woken_by: set[str] = set()
        self._something = asyncio.Event()
        driver.add_termination_listener(lambda _: self._something.set())

    def notice(self, _driver: object, _pid: int, _channel: str, payload: str) -> None:
        if not self._watch.concerns(payload):
            return
        self._woken_by.add(payload)
        if len(self._woken_by) > _TOPICS_AT_ONCE:
            self._woken_by.clear()
            self._watch.look_at_all()
        self._something.set()

    async def wait(self, watch: _Watch) -> set[str]:
        """As that of psycopg."""
        while patience := watch.patience():
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._something.wait()
            self._something.clear()
            woken_by, self._woken_by = self._woken_by, set()
            if self._driver.is_closed():
                raise ConnectionError("the connection that listens is lost")
            if woken_by:
                return woken_by
        return set()
