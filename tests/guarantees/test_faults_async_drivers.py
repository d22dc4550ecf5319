"""Lost connections and a full pool on both asynchronous drivers: other errors than psycopg's own, the same guarantees."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, InvalidRequestError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession

from iot_models import AsyncShadowService
from tests.databases.async_engines import async_engine, in_event_loop, url_for
from tests.databases.backends import cut, unlocked
from tests.databases.devices import TENANT
from tests.databases.statements import at_statement
from tests.guarantees.every_write import (
    BATCHES,
    ONE,
    PATCH_DESIRED,
    START,
    WRITES,
    committed,
    each_mode,
    fleet_in,
    put_back,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import URL, Engine

    from tests.guarantees.every_write import Write

pytestmark = pytest.mark.repeats


@pytest.fixture
def independent(engine: Engine) -> Iterator[Engine]:
    """Another way to the same database, with the fleet committed."""
    with fleet_in(engine):
        yield engine


@pytest.fixture
def url(driver: str, independent: Engine) -> URL:
    return url_for(driver, independent.url)


@each_mode
@in_event_loop
async def test_a_connection_cut_before_any_statement_of_a_write_leaves_nothing_written(
    url: URL, independent: Engine, mode: str
) -> None:
    """In AUTOCOMMIT mode the first statement of a registration is done, and the second only reads."""
    async with async_engine(url, isolation_level=mode, pool_size=1, max_overflow=0, pool_timeout=1) as engine:
        places = [(write, number) for write in WRITES for number in range(write.statements)]
        for write, number in places:
            async with AsyncSession(engine) as session:
                service = AsyncShadowService(session, TENANT)
                with at_statement(engine.sync_engine, number, cut(independent)) as begun:
                    with pytest.raises(DBAPIError, match="The connection is lost") as caught:
                        await write(service)
                    assert len(begun) == number + 1
                assert caught.value.connection_invalidated
                with pytest.raises(PendingRollbackError, match="rolled back"):
                    await service.get(ONE)

                await session.rollback()

                assert (await service.get(ONE)).desired_version == 7
            assert committed(independent) == write.ended_before(number, is_committed=mode == "AUTOCOMMIT")
            put_back(independent)

        for write in WRITES:
            async with AsyncSession(engine) as session, session.begin():
                await write(AsyncShadowService(session, TENANT))
            assert committed(independent) == write.done()
            put_back(independent)


@in_event_loop
async def test_a_connection_cut_before_the_commit_leaves_nothing_written(url: URL, independent: Engine) -> None:
    async with async_engine(url, pool_size=1, max_overflow=0, pool_timeout=1) as engine:
        for write in WRITES:
            async with AsyncSession(engine) as session:
                await write(AsyncShadowService(session, TENANT))
                await session.run_sync(lambda sync: cut(independent)(sync.connection()))
                with pytest.raises(DBAPIError) as caught:
                    await session.commit()
                assert caught.value.connection_invalidated
                with pytest.raises(InvalidRequestError):
                    await AsyncShadowService(session, TENANT).get(ONE)
                await session.rollback()
                assert committed(independent) == START

                await write(AsyncShadowService(session, TENANT))
                await session.commit()
            assert committed(independent) == write.done()
            put_back(independent)


@in_event_loop
async def test_an_iteration_that_loses_its_connection_ends_with_an_error_and_goes_on_behind_the_last_device(
    url: URL, independent: Engine
) -> None:
    async def read(service: AsyncShadowService, into: list[str]) -> None:
        async for shadow in service.iter_pending(batch_size=2):
            into.append(shadow.device_id)  # noqa: PERF401 - what came before the error counts

    met: list[str] = []
    async with async_engine(url) as engine, AsyncSession(engine) as session:
        service = AsyncShadowService(session, TENANT)
        with at_statement(engine.sync_engine, 1, cut(independent)), pytest.raises(DBAPIError) as caught:
            await read(service, met)
        assert caught.value.connection_invalidated
        assert met == ["a", "b"]

        await session.rollback()
        met += [shadow.device_id for shadow in await service.pending(after=met[-1])]
    assert met == ["a", "b", "c", "d"]


@each_mode
@in_event_loop
async def test_a_batch_that_times_out_at_a_locked_row_writes_nothing_and_frees_the_rows_before_it(
    url: URL, independent: Engine, mode: str
) -> None:
    async with async_engine(url, isolation_level=mode) as engine, AsyncSession(engine) as session:
        await session.execute(text("SET lock_timeout = '50ms'"))
        await session.commit()
        for write in BATCHES:
            with independent.begin() as theirs:
                theirs.execute(text("SELECT FROM device_state WHERE device_id = 'b' FOR UPDATE"))
                with pytest.raises(DBAPIError, match="canceling statement due to lock timeout") as caught:
                    await write(AsyncShadowService(session, TENANT))
                assert getattr(caught.value.orig, "sqlstate", None) == "55P03"
                assert "longer than lock_timeout" in str(caught.value)
                assert not caught.value.connection_invalidated
                assert unlocked(independent) == "acd"
                assert committed(independent) == START
                await session.rollback()

            await write(AsyncShadowService(session, TENANT))
            await session.commit()
            assert committed(independent) == write.done()
            put_back(independent)


@in_event_loop
async def test_a_savepoint_around_a_batch_keeps_what_the_transaction_wrote_before(
    url: URL, independent: Engine
) -> None:
    async def attempt(session: AsyncSession, write: Write) -> None:
        async with session.begin_nested():
            await write(AsyncShadowService(session, TENANT))

    async with async_engine(url) as engine, AsyncSession(engine) as session, session.begin():
        await session.execute(text("SET lock_timeout = '20ms'"))
        await AsyncShadowService(session, TENANT).replace_desired("d", {"new": 2})
        with independent.begin() as theirs:
            theirs.execute(text("SELECT FROM device_state WHERE device_id = 'b' FOR UPDATE"))
            for write in BATCHES:
                with pytest.raises(DBAPIError, match="lock timeout"):
                    await attempt(session, write)
        assert committed(independent) == START

    assert committed(independent) == START | {"d": START["d"].asked({"new": 2})}


@in_event_loop
async def test_a_full_pool_is_an_error_for_the_task_that_waits_and_the_others_lose_nothing(
    url: URL, independent: Engine
) -> None:
    async with (
        async_engine(url, pool_size=1, max_overflow=0, pool_timeout=0.05) as engine,
        AsyncSession(engine) as first,
        AsyncSession(engine) as second,
    ):
        await PATCH_DESIRED(AsyncShadowService(first, TENANT))
        with pytest.raises(PoolTimeoutError, match="QueuePool limit of size 1 overflow 0 reached"):
            await PATCH_DESIRED(AsyncShadowService(second, TENANT))
        await first.commit()
        assert committed(independent) == PATCH_DESIRED.done()

        await PATCH_DESIRED(AsyncShadowService(second, TENANT))
        await second.commit()
    assert committed(independent)[ONE].desired_version == 9


@in_event_loop
async def test_more_tasks_than_connections_wait_for_their_turn_and_all_write(url: URL, independent: Engine) -> None:
    async with async_engine(url, pool_size=2, max_overflow=0, pool_timeout=10) as engine:

        async def write(number: int) -> None:
            async with AsyncSession(engine) as session, session.begin():
                await AsyncShadowService(session, TENANT).patch_desired(ONE, {f"task-{number}": number})

        await asyncio.gather(*map(write, range(20)))

    row = committed(independent)[ONE]
    assert row.desired == {"old": 1} | {f"task-{number}": number for number in range(20)}
    assert row.desired_version == 27
