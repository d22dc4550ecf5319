"""Every call of the service on a distributed table gives what it gives on a plain one: both drivers, both modes."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console
from rich.table import Table
from sqlalchemy import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from iot_models import IotModelsError, ShadowService
from iot_models.engine import create_async_engine, create_engine
from tests.distributed.calls import CALLS, TRANSACTIONAL

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

    from tests.distributed.calls import Call

MODES = ("READ COMMITTED", "AUTOCOMMIT")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("driver", ["psycopg", "psycopg async", "asyncpg"])
def test_every_call_gives_what_it_gives_on_a_plain_table(
    plain_url: str, distributed_url: str, driver: str, mode: str
) -> None:
    tenant_id = f"{driver} {mode}"
    run = _run if driver == "psycopg" else _run_async
    plain, distributed = (run(url, driver.partition(" ")[0], mode, tenant_id) for url in (plain_url, distributed_url))

    table = Table("call", "plain", "distributed", title=f"{driver}, {mode}: {len(plain)} calls")
    different = [name for name in plain if plain[name] != distributed[name]]
    for name in different:
        table.add_row(name, str(plain[name])[:300], str(distributed[name])[:300])
    if not different:
        table.add_row("no difference", "", "")
    Console(width=160).print(table)
    assert different == []


def test_every_method_of_the_service_is_among_the_calls() -> None:
    methods = {name for name, value in vars(ShadowService).items() if inspect.isfunction(value) and name[0] != "_"}
    named = {name.split(",")[0].split(" ")[0] for name in CALLS}

    assert methods <= named


def test_transactions_over_two_tenants_and_rollbacks_hold(distributed_url: str) -> None:
    engine = create_engine(distributed_url)
    tenants = [f"two-{n}" for n in range(8)]  # on several nodes
    with Session(engine) as session, session.begin():
        for tenant_id in tenants:
            ShadowService(session, tenant_id).register("a", "s")
            ShadowService(session, tenant_id).replace_desired("a", {"n": 1})
    with Session(engine) as session:
        for tenant_id in tenants:
            ShadowService(session, tenant_id).replace_desired("a", {"n": 2})
        session.rollback()
    with Session(engine) as session:
        assert {str(ShadowService(session, tenant_id).get("a").desired) for tenant_id in tenants} == {"{'n': 1}"}
    engine.dispose()


def _calls(mode: str) -> dict[str, Call]:
    return {**CALLS, **(TRANSACTIONAL if mode != "AUTOCOMMIT" else {})}


def _run(url: str, _driver: str, mode: str, tenant_id: str) -> dict[str, Any]:
    engine = create_engine(url, isolation_level=mode)
    try:
        return {name: _outcome(engine, call, tenant_id) for name, call in _calls(mode).items()}
    finally:
        engine.dispose()


def _outcome(engine: Engine, call: Call, tenant_id: str) -> Any:
    with Session(engine) as session:
        try:
            outcome = call(ShadowService(session, tenant_id, actor="anna"), session)
            session.commit()
        except (IotModelsError, DBAPIError) as error:
            return _comparable(error)
        return _comparable(outcome)


def _run_async(url: str, driver: str, mode: str, tenant_id: str) -> dict[str, Any]:
    async def run() -> dict[str, Any]:
        engine = create_async_engine(make_url(url).set(drivername=f"postgresql+{driver}"), isolation_level=mode)
        try:
            return {name: await _outcome_async(engine, call, tenant_id) for name, call in _calls(mode).items()}
        finally:
            await engine.dispose()

    return asyncio.run(run())


async def _outcome_async(engine: AsyncEngine, call: Call, tenant_id: str) -> Any:
    async with AsyncSession(engine, expire_on_commit=False) as session:
        try:
            outcome = await session.run_sync(lambda sync: call(ShadowService(sync, tenant_id, actor="anna"), sync))
            await session.commit()
        except (IotModelsError, DBAPIError) as error:
            return _comparable(error)
        return _comparable(outcome)


def _comparable(value: Any) -> Any:
    """The outcome without what differs from one run to the next: times."""
    if isinstance(value, IotModelsError):
        return type(value).__name__, str(value)
    if isinstance(value, DBAPIError):
        return type(value).__name__, str(value.orig).split("\n")[0]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _comparable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _comparable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_comparable(item) for item in value]
    return "a time" if isinstance(value, datetime) else value
