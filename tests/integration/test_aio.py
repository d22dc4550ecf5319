"""`AsyncShadowService`: the same service, awaited, on both asynchronous drivers."""

from __future__ import annotations

import asyncio
import inspect
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import make_url, select, text
from sqlalchemy.exc import OperationalError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from iot_models import (
    AsyncShadowService,
    BatchRejected,
    DeviceNotFound,
    DeviceState,
    DocumentLimits,
    DocumentTooLarge,
    InvalidDocument,
    IotModelsError,
    LateReport,
    Report,
    RequestReused,
    Shadow,
    ShadowService,
    SyncStatus,
    UnknownVersion,
    VersionConflict,
    VersionNotKept,
)
from tests.databases.async_engines import async_engine, in_event_loop, url_for
from tests.databases.devices import DEVICE, TENANT, add_device
from tests.databases.statements import counted_statements

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from sqlalchemy import URL, Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

METHODS = [
    name for name, value in vars(ShadowService).items() if inspect.isfunction(value) and not name.startswith("_")
]
WRITERS = 8


@pytest.fixture
def url(driver: str, engine: Engine) -> URL:
    """A migrated database that the tests share and leave empty: nothing is committed here."""
    return url_for(driver, engine.url)


@pytest.fixture
def own_url(driver: str, own_engine: Engine) -> URL:
    """A database of this test's own with two devices committed."""
    with Session(own_engine) as session, session.begin():
        add_device(session)
        add_device(session, "thermostat-2")
    return url_for(driver, own_engine.url)


async def add(session: AsyncSession, device_id: str = DEVICE, **columns: Any) -> None:
    await session.run_sync(lambda sync_session: add_device(sync_session, device_id, **columns))


def committed(engine: Engine, device_id: str = DEVICE) -> Shadow:
    with Session(engine) as session:
        return ShadowService(session, TENANT).get(device_id)


# The methods and their signatures


def test_it_has_every_method_of_the_synchronous_service_and_no_other() -> None:
    ours = {name for name in vars(AsyncShadowService) if not name.startswith("_")}

    assert ours == {*METHODS, "tenant_id"}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_says_the_same_as_the_synchronous_one(method: str) -> None:
    ours, theirs = getattr(AsyncShadowService, method), getattr(ShadowService, method)

    assert ours.__doc__ == theirs.__doc__
    assert inspect.signature(ours).parameters == inspect.signature(theirs).parameters
    assert (ours.__module__, ours.__qualname__) == ("iot_models.aio", f"AsyncShadowService.{method}")


@pytest.mark.parametrize("method", sorted({*METHODS} - {"iter_pending"}))
def test_a_method_is_a_coroutine_function_with_the_same_result(method: str) -> None:
    ours, theirs = getattr(AsyncShadowService, method), getattr(ShadowService, method)

    assert inspect.iscoroutinefunction(ours)
    assert inspect.signature(ours).return_annotation == inspect.signature(theirs).return_annotation


def test_the_constructor_takes_the_same_arguments() -> None:
    ours, theirs = (inspect.signature(cls.__init__) for cls in (AsyncShadowService, ShadowService))

    assert list(ours.parameters) == list(theirs.parameters)
    for name in ("limits", "stale_after"):
        assert ours.parameters[name] == theirs.parameters[name]


# What it does


@in_event_loop
async def test_the_life_of_a_shadow(url: URL) -> None:
    async with async_engine(url) as engine, AsyncSession(engine) as session:
        await add(session)
        service = AsyncShadowService(session, TENANT)
        assert service.tenant_id == TENANT

        asked = await service.replace_desired(DEVICE, {"mode": "eco"}, expected_version=0)
        patched = await service.patch_desired(DEVICE, {"größe": 1.5, "fan": {"speed": 2}}, expected_version=1)
        assert patched.desired == asked.desired | {"größe": 1.5, "fan": {"speed": 2}}
        assert await service.pending(limit=1, after="a") == [patched]
        assert [shadow async for shadow in service.iter_pending()] == [patched]
        assert await service.count_pending() == 1

        await service.replace_reported(DEVICE, {"mode": "eco"}, acked_version=2)
        drifted = await service.patch_reported(DEVICE, {"fan": {"speed": 1}})
        assert await service.get(DEVICE) == drifted
        assert await service.get_many([DEVICE, "nobody"]) == {DEVICE: drifted}
        assert await service.drifted(limit=5) == [drifted]
        assert await service.count_pending() == 0
        assert (await service.status_counts())[SyncStatus.SYNCED] == 1


@in_event_loop
async def test_a_life_with_its_history(url: URL) -> None:
    async with async_engine(url) as engine, AsyncSession(engine, info={"iot_models.actor": "anna"}) as session:
        shadows = AsyncShadowService(session, TENANT)
        assert (await shadows.register(DEVICE, "berlin")).desired_version == 0
        await shadows.register_many({"other": "berlin"})
        written = await shadows.patch_desired(DEVICE, {"n": 1}, reason="why", request_id="r-1")
        assert await shadows.patch_desired(DEVICE, {"n": 1}, request_id="r-1") == written
        await shadows.replace_desired(DEVICE, {"n": 2}, request_id="r-2")
        with pytest.raises(RequestReused):
            await shadows.replace_desired(DEVICE, {"n": 3}, request_id="r-2")
        assert (await shadows.refuse_desired(DEVICE, 2, "no")).refusal == "no"
        assert ([shadow.device_id for shadow in await shadows.refused()], await shadows.count_refused()) == (
            [DEVICE],
            1,
        )
        restored = await shadows.restore_desired(DEVICE, 1)
        await shadows.remove(DEVICE, reason="scrapped")
        history = await shadows.history(DEVICE)
        again = await shadows.register(DEVICE, "berlin")

        assert (written.desired_version, restored.desired, restored.refusal) == (1, {"n": 1}, None)
        assert [(v.version, v.desired, v.actor, v.reason) for v in history] == [
            (4, None, "anna", "scrapped"),
            (3, {"n": 1}, "anna", None),
            (2, {"n": 2}, "anna", None),
            (1, {"n": 1}, "anna", "why"),
            (0, {}, None, None),
        ]
        assert (again.desired_version, again.is_pending) == (4, False)
        assert (await shadows.desired_at(DEVICE, 1)).request_id == "r-1"
        assert await shadows.prune_history(older_than=timedelta(days=1)) == 0
        with pytest.raises(VersionNotKept):
            await shadows.desired_at(DEVICE, 9)


@in_event_loop
async def test_a_fleet_in_one_call(url: URL) -> None:
    async with async_engine(url) as engine, AsyncSession(engine) as session:
        for device in ("a", "b", "c"):
            await add(session, device)
        service = AsyncShadowService(session, TENANT)

        replaced = await service.replace_desired_many({"a": {"n": 1}, "b": {"n": 2}}, expected_versions={"a": 0})
        patched = await service.patch_desired_many(["b", "c"], {"on": True})
        outcomes = await service.replace_reported_many(
            [Report("a", {"n": 1}, 1), Report("nobody", {}), Report("b", {}, 9), Report("c", {"bad": float("nan")})]
        )

        assert {device: shadow.desired for device, shadow in (replaced | patched).items()} == {
            "a": {"n": 1},
            "b": {"n": 2, "on": True},
            "c": {"on": True},
        }
        assert [outcome.status for outcome in outcomes] == ["accepted", "unknown_device", "unknown_version", "invalid"]
        assert await service.count_pending() == 2


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda s: s.get("nobody"), DeviceNotFound(TENANT, "nobody")),
        (lambda s: s.replace_desired(DEVICE, {}, expected_version=3), VersionConflict(DEVICE, 3, 7)),
        (lambda s: s.replace_reported(DEVICE, {}, acked_version=4), LateReport(DEVICE, 4, 5)),
        (lambda s: s.patch_reported(DEVICE, {}, acked_version=8), UnknownVersion(DEVICE, 8, 7)),
        (lambda s: s.patch_desired_many([DEVICE, "nobody"], {"a": 1}), BatchRejected),
        (lambda s: s.patch_desired(DEVICE, {"a": {"b": float("nan")}}), InvalidDocument),
        (lambda s: s.patch_desired(DEVICE, {"a": "x" * 100}), DocumentTooLarge),
        (lambda s: s.pending(limit=-1), ValueError),
        (lambda s: s.get(5), TypeError),
    ],
)
@in_event_loop
async def test_errors_are_those_of_the_synchronous_service_and_the_transaction_stays_usable(
    url: URL, call: Callable[[AsyncShadowService], Awaitable[object]], error: IotModelsError | type[Exception]
) -> None:
    async with async_engine(url) as engine, AsyncSession(engine) as session:
        await add(session, desired_version=7, reported_version=5)
        service = AsyncShadowService(session, TENANT, limits=DocumentLimits(max_bytes=80))
        before = await service.get(DEVICE)

        with pytest.raises(Exception) as caught:
            await call(service)

        assert type(caught.value) is (error if isinstance(error, type) else type(error))
        if isinstance(error, IotModelsError):
            assert caught.value.args == error.args
        assert caught.value.__cause__ is None
        assert await service.get(DEVICE) == before


def test_the_constructor_refuses_what_the_synchronous_one_refuses() -> None:
    with pytest.raises(ValueError, match="tenant_id must be text"):
        AsyncShadowService(AsyncSession(), "")


@in_event_loop
async def test_the_silence_that_makes_a_shadow_stale_is_the_callers(url: URL) -> None:
    async with async_engine(url) as engine, AsyncSession(engine) as session:
        await add(session, last_seen_at=datetime.now(UTC) - timedelta(minutes=5))

        for stale_after, status in ((timedelta(minutes=1), SyncStatus.STALE), (timedelta(hours=1), SyncStatus.SYNCED)):
            service = AsyncShadowService(session, TENANT, stale_after=stale_after)
            assert (await service.get(DEVICE)).sync_status() is status


@in_event_loop
async def test_an_object_loaded_in_the_session_shows_what_the_service_wrote(url: URL) -> None:
    async with async_engine(url) as engine, AsyncSession(engine) as session:
        await add(session)
        device = await session.get_one(DeviceState, (TENANT, DEVICE))
        device.status = "ONLINE"  # flushed by the write

        await AsyncShadowService(session, TENANT).patch_desired(DEVICE, {"a": 1})

        assert (device.desired_state, device.desired_version) == ({"a": 1}, 1)
        assert device not in session.dirty
        assert await session.scalar(select(DeviceState.status)) == "ONLINE"


@in_event_loop
async def test_it_never_commits(own_url: URL, own_engine: Engine) -> None:
    async with async_engine(own_url) as engine, AsyncSession(engine) as session:
        await AsyncShadowService(session, TENANT).replace_desired(DEVICE, {"a": 1})
        assert session.in_transaction()

    assert committed(own_engine).desired_version == 0


@in_event_loop
async def test_in_autocommit_mode_a_write_is_final_at_once(own_url: URL, own_engine: Engine) -> None:
    async with async_engine(own_url, isolation_level="AUTOCOMMIT") as engine, AsyncSession(engine) as session:
        await AsyncShadowService(session, TENANT).replace_desired(DEVICE, {"a": 1})
        assert committed(own_engine).desired == {"a": 1}


@in_event_loop
async def test_an_unmigrated_database_is_an_error_that_says_what_to_run(
    url: URL,
) -> None:
    async with async_engine(url) as engine, AsyncSession(engine) as session:
        await session.execute(text("ALTER TABLE device_state RENAME TO another"))
        with pytest.raises(ProgrammingError, match="run `alembic upgrade head`"):
            await AsyncShadowService(session, TENANT).get(DEVICE)


# Pages


async def _pages(engine: AsyncEngine, batch_size: int) -> AsyncIterator[tuple[AsyncSession, Shadow]]:
    async with AsyncSession(engine, expire_on_commit=False) as session:
        async for shadow in AsyncShadowService(session, TENANT).iter_pending(batch_size=batch_size):
            yield session, shadow


@pytest.fixture
def five_pending(own_engine: Engine, driver: str) -> URL:
    with Session(own_engine) as session, session.begin():
        for n in range(5):
            add_device(session, f"d{n}", desired_version=1)
    return url_for(driver, own_engine.url)


@pytest.mark.parametrize("batch_size", [2, 5])
@in_event_loop
async def test_the_caller_may_write_and_commit_while_it_iterates(five_pending: URL, batch_size: int) -> None:
    seen = []
    async with async_engine(five_pending) as engine:
        async for session, shadow in _pages(engine, batch_size):
            seen.append(shadow.device_id)
            await AsyncShadowService(session, TENANT).replace_reported(shadow.device_id, {}, acked_version=1)
            await session.commit()

        async with AsyncSession(engine) as session:
            assert await AsyncShadowService(session, TENANT).count_pending() == 0
    assert seen == ["d0", "d1", "d2", "d3", "d4"]


@in_event_loop
async def test_one_statement_reads_a_page_and_only_when_it_is_asked_for(five_pending: URL) -> None:
    async with async_engine(five_pending) as engine, AsyncSession(engine) as session:
        with counted_statements(engine.sync_engine) as statements:
            shadows = AsyncShadowService(session, TENANT).iter_pending(batch_size=2)
            asked = [len(statements) async for _ in shadows]

    assert asked == [1, 1, 2, 2, 3]


@in_event_loop
async def test_whoever_stops_in_the_middle_leaves_nothing_open(five_pending: URL) -> None:
    async with async_engine(five_pending, pool_size=1, max_overflow=0, pool_timeout=1) as engine:
        async with AsyncSession(engine) as session:
            async for shadow in AsyncShadowService(session, TENANT).iter_pending(batch_size=2):
                if shadow.device_id == "d2":
                    break
            assert await AsyncShadowService(session, TENANT).count_pending() == 5
        async with AsyncSession(engine) as session:
            assert await AsyncShadowService(session, TENANT).count_pending() == 5


@in_event_loop
async def test_a_wrong_batch_size_is_refused_at_the_call(url: URL) -> None:
    async with async_engine(url) as engine, AsyncSession(engine) as session:
        with pytest.raises(ValueError, match="batch_size"):
            AsyncShadowService(session, TENANT).iter_pending(batch_size=0)


# Several tasks


@in_event_loop
async def test_patches_of_many_tasks_all_take_effect(own_url: URL, own_engine: Engine) -> None:
    rounds = 5

    async def write(engine: AsyncEngine, n: int) -> None:
        for turn in range(rounds):
            async with AsyncSession(engine) as session, session.begin():
                await AsyncShadowService(session, TENANT).patch_desired(DEVICE, {f"task-{n}": {f"turn-{turn}": turn}})

    async with async_engine(own_url, pool_size=WRITERS) as engine:
        await asyncio.gather(*(write(engine, n) for n in range(WRITERS)))

    shadow = committed(own_engine)
    assert shadow.desired == {f"task-{n}": {f"turn-{turn}": turn for turn in range(rounds)} for n in range(WRITERS)}
    assert shadow.desired_version == WRITERS * rounds


@in_event_loop
async def test_of_many_tasks_with_one_version_exactly_one_wins(own_url: URL, own_engine: Engine) -> None:
    async def write(engine: AsyncEngine, n: int) -> Shadow:
        async with AsyncSession(engine) as session, session.begin():
            return await AsyncShadowService(session, TENANT).replace_desired(DEVICE, {"by": n}, expected_version=0)

    async with async_engine(own_url, pool_size=WRITERS) as engine:
        results = await asyncio.gather(*(write(engine, n) for n in range(WRITERS)), return_exceptions=True)

    (winner,) = (result for result in results if isinstance(result, Shadow))
    assert sum(isinstance(result, VersionConflict) for result in results) == WRITERS - 1
    assert committed(own_engine) == winner


@in_event_loop
async def test_while_one_task_waits_for_a_lock_the_loop_serves_the_others(own_url: URL, own_engine: Engine) -> None:
    async with async_engine(own_url) as engine, AsyncSession(engine) as first, AsyncSession(engine) as second:
        await AsyncShadowService(first, TENANT).patch_desired(DEVICE, {"first": 1})
        blocked = asyncio.create_task(AsyncShadowService(second, TENANT).patch_desired(DEVICE, {"second": 2}))
        await waiting(own_engine, 1)

        await first.commit()  # on the same loop: had it stood still, nobody would ever get here
        await blocked
        await second.commit()

    assert committed(own_engine).desired == {"first": 1, "second": 2}


@pytest.mark.parametrize("how", ["cancel", "timeout"])
@in_event_loop
async def test_a_cancelled_write_is_rolled_back_and_the_pool_serves_on(
    own_url: URL, own_engine: Engine, how: str
) -> None:
    async def write(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session, session.begin():
            service = AsyncShadowService(session, TENANT)
            await service.replace_desired("thermostat-2", {"before": "the lock"})
            await service.patch_desired(DEVICE, {"behind": "the lock"})

    async with async_engine(own_url, pool_size=1, max_overflow=0, pool_timeout=2) as engine:
        with own_engine.begin() as holder:
            holder.execute(text(f"SELECT FROM device_state WHERE device_id = '{DEVICE}' FOR UPDATE"))
            if how == "cancel":
                task = asyncio.create_task(write(engine))
                await waiting(own_engine, 1)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(write(engine), 0.2)

            await waiting(own_engine, 0)  # the server gave up too
            async with AsyncSession(engine) as session:  # while the lock is still held
                for device in (DEVICE, "thermostat-2"):
                    assert (await AsyncShadowService(session, TENANT).get(device)).desired_version == 0

        await write(engine)
        assert engine.sync_engine.pool.status().endswith("Current Checked out connections: 0")

    assert committed(own_engine).desired == {"behind": "the lock"}
    assert committed(own_engine, "thermostat-2").desired == {"before": "the lock"}


async def waiting(engine: Engine, backends: int) -> None:
    """Return as soon as so many backends of this database wait for a lock."""
    waiting = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    async with asyncio.timeout(5):
        while True:
            with engine.connect() as connection:
                if connection.scalar(waiting) == backends:
                    return
            await asyncio.sleep(0.01)


@in_event_loop
async def test_a_server_that_is_not_there_is_an_error_that_says_so_whatever_the_driver_raises() -> None:
    for driver in ("psycopg", "asyncpg"):
        url = make_url(f"postgresql+{driver}://nobody@127.0.0.1:1/nothing")
        async with async_engine(url) as engine, AsyncSession(engine) as session:
            with pytest.raises((OperationalError, OSError)) as caught:
                await AsyncShadowService(session, TENANT).get(DEVICE)
        said = [str(caught.value), *getattr(caught.value, "__notes__", ())]
        assert any("cannot be reached: start it, or correct the engine's URL" in words for words in said)
