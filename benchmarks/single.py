"""One device at a time, one client: the time of each way to write and to read a shadow."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING, Any

import asyncpg
from by_hand import asyncpg_works, by_core, by_driver_sql, by_psycopg, pgbench
from fleet_data import DEVICES, DOCUMENT, PATCH, TENANT, Devices, each_timed, engine_of, load, plain
from orm import by_orm
from rounds import Figure, Progress, interleaved
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from iot_models import AsyncShadowService, ShadowService
from iot_models.engine import create_async_engine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fleet_data import Works
    from sqlalchemy import Engine

SECTION = "one device"


def measure(url: str, setting: str, *, tools: Path, rounds: int, progress: Progress) -> list[Figure]:
    figures: list[Figure] = []
    with ExitStack() as stack:
        contenders = (
            pgbench(url, tools)
            | by_psycopg(stack, url)
            | by_driver_sql(stack, url)
            | by_core(stack, url)
            | by_orm(stack, url)
            | _ours(stack, url)
            | _asynchronous(stack, url)
        )
        prefixes = {prefix for prefix, _ in contenders.values()}
        for prefix in sorted(prefixes):
            load(url, DEVICES, prefix=f"{prefix}-")
        for work in ("get", "replace desired", "patch desired", "report"):
            turns = {name: works[work] for name, (_, works) in contenders.items() if work in works}
            for contender, measured in interleaved(turns, rounds, progress, f"{work}, {setting}").items():
                figures.append(Figure(SECTION, work, contender, setting, "s", measured))
    return figures


def _ours(stack: ExitStack, url: str) -> Works:
    found: Works = {}
    options: dict[str, bool]
    for name, prefix, autocommit, long, options in (
        ("ours, session per write", "per", False, False, {}),
        ("ours, session per write, AUTOCOMMIT", "perauto", True, False, {}),
        ("ours, long session", "long", False, True, {}),
        ("ours, long session, notify", "notify", False, True, {"notify": True}),
        ("ours, long session, AUTOCOMMIT", "longauto", True, True, {}),
        ("ours, long session, AUTOCOMMIT, no history", "nohistory", True, True, {"history": False}),
    ):
        engine = engine_of(stack, url, autocommit=autocommit)
        works = (
            _long(stack.enter_context(Session(engine)), Devices(prefix), commit=not autocommit, **options)
            if long
            else _per_write(engine, Devices(prefix))
        )
        found[name] = (prefix, works)
    return found


def _long(session: Session, devices: Devices, *, commit: bool, **options: bool) -> dict[str, Callable[[], float]]:
    service = ShadowService(session, TENANT, **options)
    end = session.commit if commit else lambda: None

    def get() -> None:
        service.get(devices.next())
        end()

    def replace() -> None:
        device = devices.next()
        devices.versions[device] = service.replace_desired(
            device, DOCUMENT, expected_version=devices.versions[device]
        ).desired_version
        end()

    def patch() -> None:
        device = devices.next()
        devices.versions[device] = service.patch_desired(device, PATCH).desired_version
        end()

    def report() -> None:
        service.replace_reported(devices.next(), DOCUMENT, acked_version=2)
        end()

    return each_timed(get, replace, patch, report)


def _per_write(engine: Engine, devices: Devices) -> dict[str, Callable[[], float]]:
    def get() -> None:
        with Session(engine) as session:
            ShadowService(session, TENANT).get(devices.next())

    def replace() -> None:
        device = devices.next()
        with Session(engine) as session, session.begin():
            devices.versions[device] = (
                ShadowService(session, TENANT)
                .replace_desired(device, DOCUMENT, expected_version=devices.versions[device])
                .desired_version
            )

    def patch() -> None:
        device = devices.next()
        with Session(engine) as session, session.begin():
            devices.versions[device] = ShadowService(session, TENANT).patch_desired(device, PATCH).desired_version

    def report() -> None:
        with Session(engine) as session, session.begin():
            ShadowService(session, TENANT).replace_reported(devices.next(), DOCUMENT, acked_version=2)

    return each_timed(get, replace, patch, report)


def _asynchronous(stack: ExitStack, url: str) -> Works:
    """One task. The event loop is started once before the turns, so that its start is not measured."""
    runner = stack.enter_context(asyncio.Runner())
    resources = AsyncExitStack()
    runner.run(resources.__aenter__())
    stack.callback(lambda: runner.run(resources.aclose()))
    found: Works = {}

    connection = runner.run(asyncpg.connect(plain(url)))
    resources.push_async_callback(connection.close)
    found["asyncpg by hand, autocommit"] = ("asyncpg", _turns(runner, asyncpg_works(connection, Devices("asyncpg"))))
    for driver in ("psycopg", "asyncpg"):
        address = make_url(url).set(drivername=f"postgresql+{driver}")
        engine = create_async_engine(address, isolation_level="AUTOCOMMIT")
        resources.push_async_callback(engine.dispose)
        session = runner.run(resources.enter_async_context(AsyncSession(engine, expire_on_commit=False)))
        name = f"ours, async ({driver}), long session, AUTOCOMMIT"
        found[name] = (f"async{driver}", _turns(runner, _async_works(session, Devices(f"async{driver}"))))
    return found


def _turns(runner: asyncio.Runner, works: dict[str, Any], seconds: float = 0.05) -> dict[str, Callable[[], float]]:
    def turn_of(once: Callable[[], Any]) -> Callable[[], float]:
        repeats = 0

        async def some(count: int) -> float:
            started = time.perf_counter()
            for _ in range(count):
                await once()
            return (time.perf_counter() - started) / count

        def turn() -> float:
            nonlocal repeats
            if not repeats:
                runner.run(some(1))
                repeats = max(1, round(seconds / runner.run(some(5))))
            return runner.run(some(repeats))

        return turn

    return {work: turn_of(once) for work, once in works.items()}


def _async_works(session: AsyncSession, devices: Devices) -> dict[str, Any]:
    service = AsyncShadowService(session, TENANT)

    async def get() -> None:
        await service.get(devices.next())

    async def replace() -> None:
        device = devices.next()
        shadow = await service.replace_desired(device, DOCUMENT, expected_version=devices.versions[device])
        devices.versions[device] = shadow.desired_version

    async def patch() -> None:
        device = devices.next()
        devices.versions[device] = (await service.patch_desired(device, PATCH)).desired_version

    async def report() -> None:
        await service.replace_reported(devices.next(), DOCUMENT, acked_version=2)

    return {"get": get, "replace desired": replace, "patch desired": patch, "report": report}
