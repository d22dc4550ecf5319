"""Tenants kept apart by PostgreSQL, from asyncio, on both asynchronous drivers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import insert, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from iot_models import AsyncShadowService, DeviceNotFound, DeviceState, tenancy
from iot_models.tenancy import bind_tenant
from tests.databases.async_engines import ASYNC_DRIVERS, async_engine, in_event_loop, url_for
from tests.databases.devices import DEVICE, TENANT
from tests.databases.tenants import OTHER, STRANGE, clear, isolate, login, two_tenants

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import URL, Engine

pytestmark = pytest.mark.repeats


@pytest.fixture(params=ASYNC_DRIVERS)
def url(request: pytest.FixtureRequest, engine: Engine, server_role: str) -> Iterator[URL]:
    two_tenants(engine)
    isolate(engine, server_role)
    yield url_for(str(request.param), login(engine, server_role))
    clear(engine)


async def seen(session: AsyncSession) -> list[str]:
    return list(await session.scalars(text("SELECT DISTINCT tenant_id FROM device_state ORDER BY 1")))


@in_event_loop
async def test_one_tenant_is_there_until_the_transaction_ends_and_none_in_the_next(url: URL) -> None:
    async with async_engine(url, pool_size=1, max_overflow=0) as engine:
        for tenant in [TENANT, OTHER] * 6:  # so often that the drivers prepare all of these statements
            async with AsyncSession(engine) as session:
                assert await seen(session) == []
                await session.run_sync(bind_tenant, tenant)
                assert await seen(session) == [tenant]
                with pytest.raises(RuntimeError, match=f"bound to tenant '{tenant}'"):
                    await session.run_sync(bind_tenant, "third")
                await session.commit()
                assert await seen(session) == []


@in_event_loop
async def test_the_service_binds_each_transaction_and_again_after_a_savepoint_took_it_away(url: URL) -> None:
    async with async_engine(url) as engine, AsyncSession(engine) as session:
        shadows = AsyncShadowService(session, TENANT, bind_tenant=True)
        assert (await shadows.patch_desired(DEVICE, {"a": 1})).desired == {"of": TENANT, "a": 1}
        await session.commit()
        savepoint = await session.begin_nested()
        assert [shadow.tenant_id async for shadow in shadows.iter_pending(batch_size=1)] == [TENANT]
        await savepoint.rollback()
        assert await shadows.count_pending() == 1

        with pytest.raises(DeviceNotFound):
            await AsyncShadowService(session, OTHER).get(DEVICE)
        with pytest.raises(RuntimeError, match="works for no other"):
            await AsyncShadowService(session, OTHER, bind_tenant=True).get(DEVICE)
        with pytest.raises(DBAPIError, match="violates row-level security policy"):
            await session.execute(insert(DeviceState).values(tenant_id=OTHER, site_id="s", device_id="new"))


@pytest.mark.parametrize("driver", ASYNC_DRIVERS)
@in_event_loop
async def test_the_owner_may_switch_it_off_and_on_from_asyncio(
    own_engine: Engine, server_role: str, driver: str
) -> None:
    two_tenants(own_engine)
    isolate(own_engine, server_role)
    async with (
        async_engine(url_for(driver, own_engine.url)) as owner,
        async_engine(url_for(driver, login(own_engine, server_role))) as app,
    ):
        for switch, tenants in ((tenancy.disable, [TENANT, OTHER]), (tenancy.enable, [])):
            async with owner.begin() as connection:
                await connection.run_sync(switch, server_role)
            async with AsyncSession(app) as session:
                assert await seen(session) == tenants


@in_event_loop
async def test_autocommit_mode_is_refused(url: URL) -> None:
    async with async_engine(url, isolation_level="AUTOCOMMIT") as engine, AsyncSession(engine) as session:
        with pytest.raises(RuntimeError, match="AUTOCOMMIT mode"):
            await AsyncShadowService(session, TENANT, bind_tenant=True).get(DEVICE)


@in_event_loop
async def test_a_tenant_may_have_any_id(url: URL, engine: Engine) -> None:
    with Session(engine) as session, session.begin():
        session.add_all(DeviceState(tenant_id=tenant, site_id="s", device_id=DEVICE) for tenant in STRANGE)

    async with async_engine(url) as app, AsyncSession(app) as asynchronous:
        for tenant in STRANGE:
            shadow = await AsyncShadowService(asynchronous, tenant, bind_tenant=True).get(DEVICE)
            assert shadow.tenant_id == tenant
            assert await seen(asynchronous) == [tenant]
            await asynchronous.commit()


@in_event_loop
async def test_many_tasks_of_two_tenants_on_few_connections_never_see_each_other(url: URL) -> None:
    async with async_engine(url, pool_size=2, max_overflow=0) as engine:

        async def serve(tenant: str) -> None:
            for turn in range(10):
                async with AsyncSession(engine) as session, session.begin():
                    shadows = AsyncShadowService(session, tenant, bind_tenant=True)
                    await shadows.patch_desired("thermostat-2", {"turn": turn})
                    assert await seen(session) == [tenant]

        await asyncio.gather(*(serve(tenant) for tenant in [TENANT, OTHER] * 3))
