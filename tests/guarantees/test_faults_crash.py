"""A server that crashes: what was committed is there afterwards, nothing else is, and engines and sessions go on."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import NullPool, make_url, text
from sqlalchemy import create_engine as plain_engine
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from iot_models import AsyncShadowService, ShadowService
from iot_models.engine import create_engine
from tests.databases.alembic_runs import upgrade
from tests.databases.async_engines import ASYNC_DRIVERS, async_engine, in_event_loop, url_for
from tests.databases.backends import await_lock_waits
from tests.databases.devices import TENANT
from tests.databases.durable_server import durable_postgres
from tests.guarantees.every_write import (
    AGAIN,
    BATCH,
    BATCHES,
    ONE,
    PRUNE_HISTORY,
    REFUSE_DESIRED,
    REMOVE,
    REPLACE_DESIRED,
    START,
    committed,
    fleet_in,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from sqlalchemy import Engine

    from tests.databases.durable_server import DurableServer

pytestmark = pytest.mark.repeats

DESIRED_WRITES = len([write for write in AGAIN if write.section == "desired"])
REQUESTS = len([write for write in AGAIN if "request_id" in write.keywords])


@pytest.fixture(scope="module")
def server() -> Iterator[DurableServer]:
    """A server of this module's own, migrated; it runs before each test and after it."""
    with durable_postgres() as server:
        upgrade(server.url)
        yield server
        server.stop("immediate")


@pytest.fixture
def independent(server: DurableServer) -> Iterator[Engine]:
    """An engine that keeps no connection, with the fleet committed."""
    server.start()  # where a test failed between its stop and its start
    with fleet_in(plain_engine(server.url, poolclass=NullPool)) as engine:
        yield engine


@pytest.fixture
def engine_of(server: DurableServer) -> Iterator[Callable[..., Engine]]:
    """Makes engines with our settings."""
    engines: list[Engine] = []

    def make(**options: Any) -> Engine:
        engines.append(create_engine(server.url, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.dispose()


def crash(server: DurableServer, how: str) -> None:
    if how == "immediate shutdown":
        server.stop("immediate")
    else:
        server.kill()


@pytest.mark.parametrize(("mode", "how"), [("READ COMMITTED", "immediate shutdown"), ("AUTOCOMMIT", "kill -9")])
def test_after_a_crash_all_that_was_acknowledged_is_there_and_nothing_else(
    server: DurableServer, independent: Engine, engine_of: Callable[..., Engine], mode: str, how: str
) -> None:
    acknowledged = engine_of(isolation_level=mode)
    with Session(acknowledged) as session, Session(engine_of()) as open_session:
        for write in (REFUSE_DESIRED, *AGAIN):
            write(ShadowService(session, TENANT))
            session.commit()
        before = committed(independent)
        assert before[ONE].desired_version == 7 + DESIRED_WRITES
        for write in (*AGAIN, PRUNE_HISTORY, REMOVE):
            write(ShadowService(open_session, TENANT))

        crash(server, how)
        server.start()

        assert committed(independent) == before
        with pytest.raises(DBAPIError) as caught:  # no commit may claim what is gone
            open_session.commit()
        assert caught.value.connection_invalidated
        open_session.rollback()
        assert committed(independent) == before

        for write in (*AGAIN, PRUNE_HISTORY, REMOVE):
            write(ShadowService(open_session, TENANT))
        open_session.commit()
    left = committed(independent)[ONE]
    # A request is done once.
    assert (left.is_there, max(left.history)) == (False, 7 + 2 * DESIRED_WRITES - REQUESTS + 1)


def test_batches_that_a_crash_meets_in_the_middle_are_not_written(
    server: DurableServer, independent: Engine, engine_of: Callable[..., Engine]
) -> None:
    def run(position: int) -> None:
        engine = engine_of(isolation_level=["READ COMMITTED", "AUTOCOMMIT"][position % 2])
        with Session(engine) as session:
            BATCHES[position // 2](ShadowService(session, TENANT))
            session.commit()

    with ThreadPoolExecutor(6) as pool, independent.connect() as theirs:
        theirs.execute(text("SELECT FROM device_state WHERE device_id = 'b' FOR UPDATE"))
        runs = [pool.submit(run, position) for position in range(6)]
        await_lock_waits(independent, 6)
        server.stop("immediate")
        errors = [run.exception(timeout=10) for run in runs]
        theirs.invalidate()

    assert all(isinstance(error, DBAPIError) and error.connection_invalidated for error in errors)
    server.start()
    assert committed(independent) == START


def test_while_the_server_is_down_a_call_says_so_and_once_it_is_up_the_same_session_works(
    server: DurableServer, independent: Engine, engine_of: Callable[..., Engine]
) -> None:
    with Session(engine_of()) as session:
        service = ShadowService(session, TENANT)
        service.get(ONE)
        session.rollback()
        server.stop()
        try:
            with pytest.raises(OperationalError, match="PostgreSQL cannot be reached: start it"):
                REPLACE_DESIRED(service)
        finally:
            server.start()

        REPLACE_DESIRED(service)  # with no rollback: there never was a transaction
        session.commit()
    assert committed(independent) == REPLACE_DESIRED.done()


@pytest.mark.parametrize("driver", ASYNC_DRIVERS)
@in_event_loop
async def test_after_a_restart_the_pools_of_the_async_drivers_serve_on(
    server: DurableServer, independent: Engine, driver: str
) -> None:
    async with async_engine(url_for(driver, make_url(server.url))) as engine:
        async with AsyncSession(engine) as session:
            await AsyncShadowService(session, TENANT).get(ONE)
        server.stop("immediate")
        try:
            async with AsyncSession(engine) as session:
                with pytest.raises((DBAPIError, OSError)):  # asyncpg's own error is an OSError
                    await REPLACE_DESIRED(AsyncShadowService(session, TENANT))
        finally:
            server.start()

        async with AsyncSession(engine) as session, session.begin():
            await REPLACE_DESIRED(AsyncShadowService(session, TENANT))
    assert committed(independent) == REPLACE_DESIRED.done()


def test_a_crash_under_load_loses_no_acknowledged_write_and_tears_none(
    server: DurableServer, independent: Engine, engine_of: Callable[..., Engine]
) -> None:
    """Each writer counts up its own key, in two devices at once, and retries a number until it is acknowledged."""
    writers = 4
    engine = engine_of(pool_size=writers)
    acknowledged = [0] * writers
    failures = [0] * writers
    is_up, enough = threading.Event(), threading.Event()

    def write(writer: int) -> None:
        while True:
            number = acknowledged[writer] + 1
            try:
                with Session(engine) as session, session.begin():
                    ShadowService(session, TENANT).patch_desired_many(["a", "c"], {f"writer-{writer}": number})
            except DBAPIError:
                failures[writer] += 1
                assert is_up.wait(30)
            else:
                acknowledged[writer] = number
                if enough.is_set():
                    return

    def await_progress(runs: list[Future[None]]) -> None:
        goals = [number + 5 for number in acknowledged]
        while any(number < goal for number, goal in zip(acknowledged, goals, strict=True)):
            assert not any(run.done() for run in runs)
            time.sleep(0.005)

    with ThreadPoolExecutor(writers) as pool:
        runs = [pool.submit(write, writer) for writer in range(writers)]
        try:
            await_progress(runs)
            server.stop("immediate")
            server.start()
            is_up.set()
            await_progress(runs)
        finally:
            enough.set()
        for run in runs:
            run.result(timeout=30)

    assert all(failures)
    rows = committed(independent)
    assert rows["a"] == rows["c"]
    assert rows["a"].desired == {"old": 1} | {f"writer-{writer}": acknowledged[writer] for writer in range(writers)}
    # A retried number may have been written twice: its commit was done, and the server gone before it could say so.
    written = rows["a"].desired_version - 7
    assert sum(acknowledged) <= written <= sum(acknowledged) + sum(failures)


def test_without_synchronous_commit_a_crash_may_lose_the_last_writes_but_tears_none(
    server: DurableServer, independent: Engine, engine_of: Callable[..., Engine]
) -> None:
    engine = engine_of(connect_args={"options": "-c synchronous_commit=off"})
    writes = 40
    with Session(engine) as session:
        for number in range(1, writes + 1):
            documents = {device_id: {"number": number} for device_id in BATCH}
            ShadowService(session, TENANT).replace_desired_many(documents)
            session.commit()

        server.stop("immediate")
        server.start()

    rows = committed(independent)
    survived = rows["a"].desired_version - 7
    assert 0 <= survived <= writes
    row = START["a"]
    for number in range(1, survived + 1):
        row = row.asked({"number": number})
    assert rows == START | dict.fromkeys(BATCH, row)
