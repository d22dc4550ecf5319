"""Behind a real PgBouncer in transaction mode, with fewer servers than clients."""

from __future__ import annotations

import asyncio
import secrets
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from sqlalchemy import NullPool, make_url, text
from sqlalchemy import create_engine as create_plain_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from iot_models import AsyncShadowService, Report, ReportStatus, ShadowService
from iot_models.engine import create_async_engine, create_engine
from iot_models.testing import database
from tests.databases.async_engines import ASYNC_DRIVERS
from tests.databases.devices import TENANT, add_device
from tests.databases.engines import KINDS, Kind
from tests.databases.pgbouncer import PGBOUNCER, WHY_NOT, pgbouncer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import URL

    from iot_models.testing import PostgresServer

pytestmark = pytest.mark.skipif(PGBOUNCER is None, reason=WHY_NOT)

CLIENTS = 6  # of each engine; PgBouncer has two connections to the server
ROUNDS = 5
SETTINGS = ("DateStyle", "TimeZone", "client_encoding", "application_name")


@pytest.fixture(scope="module")
def strange(server: PostgresServer, migrated_url: str) -> Iterator[str]:
    """The URL of a database, whose settings no client of ours could work with."""
    with database(server, migrated_url) as url:
        engine = create_plain_engine(url, poolclass=NullPool)
        name = engine.url.database
        with engine.begin() as connection:
            connection.execute(text(f"ALTER DATABASE {name} SET DateStyle = 'German'"))
            connection.execute(text(f"ALTER DATABASE {name} SET TimeZone = 'America/New_York'"))
            connection.execute(text(f"ALTER DATABASE {name} SET statement_timeout = '7s'"))
            connection.execute(text(f"ALTER DATABASE {name} SET lock_timeout = '6s'"))
        yield url


@pytest.fixture(scope="module")
def behind(strange: str) -> Iterator[str]:
    """The URL of the same database through PgBouncer."""
    with pgbouncer(strange) as url:
        yield url


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, behind: str) -> Kind:
    return Kind(request.param, make_url(behind))


@pytest.fixture
def device(strange: str) -> str:
    name = secrets.token_hex(4)
    with Session(create_plain_engine(strange, poolclass=NullPool)) as session, session.begin():
        for number in range(CLIENTS):
            add_device(session, f"{name}-{number}")
    return name


# Without the argument.


def count_pending(url: URL, driver: str) -> None:
    async def ask() -> None:
        async with AsyncSession(create_async_engine(url)) as session:
            await AsyncShadowService(session, TENANT).count_pending()

    if driver in ASYNC_DRIVERS:
        asyncio.run(ask())
    with Session(create_engine(url)) as session:
        ShadowService(session, TENANT).count_pending()


@pytest.mark.parametrize("name", KINDS)
def test_without_the_argument_the_error_names_it(name: str, behind: str) -> None:
    if name == "asyncpg" and version("sqlalchemy").startswith("2.0."):
        pytest.skip("SQLAlchemy 2.0 raises what asyncpg raises at connect, which is no database error to it")
    with pytest.raises(DBAPIError) as caught:
        count_pending(Kind(name, make_url(behind)).url, name)

    message = str(caught.value)
    assert "unsupported startup parameter" in message
    assert "PgBouncer stands between this engine and PostgreSQL" in message
    assert "create_engine(..., pgbouncer=True)" in message
    assert "PostgreSQL cannot be reached" not in message


def test_a_variable_that_pgbouncer_refuses_is_mentioned(behind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGGEQO", "off")
    with Session(create_engine(behind, pgbouncer=True)) as session, pytest.raises(DBAPIError) as caught:
        ShadowService(session, TENANT).count_pending()
    assert "unsupported startup parameter: geqo" in str(caught.value)
    assert "a variable such as PGGEQO: remove it" in str(caught.value)


# With it.


def test_each_connection_has_our_settings_and_the_timeouts_of_the_server(kind: Kind) -> None:
    shown = kind.settings(*SETTINGS, "statement_timeout", "lock_timeout", pgbouncer=True)

    assert shown == {
        "DateStyle": "ISO, DMY",
        "TimeZone": "UTC",
        "client_encoding": "UTF8",
        "application_name": "iot_models",
        "statement_timeout": "7s",
        "lock_timeout": "6s",
    }
    assert kind.settings("application_name", application_name="fleet", pgbouncer=True) == {"application_name": "fleet"}


def test_pgoptions_is_not_sent(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGOPTIONS", "-c work_mem=5MB")
    assert kind.settings("DateStyle", pgbouncer=True) == {"DateStyle": "ISO, DMY"}


def test_the_settings_follow_the_client_from_server_to_server_and_reach_no_other_client(strange: str) -> None:
    """Clients with settings of their own take turns on one connection to the server."""
    with pgbouncer(strange, default_pool_size="1") as url:
        plain = psycopg.connect(url.replace("+psycopg", ""), autocommit=True, prepare_threshold=None)
        engine = create_engine(url, pgbouncer=True)
        seoul = create_engine(url, pgbouncer=True, connect_args={"prepare_threshold": 1})
        with plain, engine.connect() as ours, seoul.connect() as others:
            others.execution_options(isolation_level="AUTOCOMMIT").execute(text("SET TimeZone = 'Asia/Seoul'"))
            for _ in range(3):
                assert plain.execute("SHOW DateStyle").fetchall() == [("German, DMY",)]
                assert plain.execute("SHOW TimeZone").fetchall() == [("America/New_York",)]
                assert ours.scalar(text("SHOW DateStyle")) == "ISO, DMY"
                assert ours.scalar(text("SHOW TimeZone")) == "UTC"
                ours.commit()
                assert others.scalar(text("SHOW TimeZone")) == "Asia/Seoul"
        engine.dispose()
        seoul.dispose()


def test_no_statement_stays_prepared_on_the_server(strange: str) -> None:
    """Neither by its number of executions (psycopg prepares the sixth) nor by its driver (asyncpg prepares each)."""
    with pgbouncer(strange, default_pool_size="1") as url:
        for name in KINDS:
            left = Kind(name, make_url(url)).ask_each(
                *[lambda c: c.scalar(text("SELECT count(*) FROM pg_prepared_statements WHERE name > :a"), {"a": ""})]
                * 10,
                pgbouncer=True,
            )
            assert left == [0] * 10


def every_call(shadows: ShadowService, device: str, number: int) -> None:
    """One round of a client on its own device, by every method; a few of them read the other clients' devices, too."""
    version = shadows.get(device).desired_version
    assert shadows.patch_desired(device, {"number": number}).desired_version == version + 1
    assert shadows.replace_desired(device, {"n": number}, expected_version=version + 1).desired == {"n": number}
    assert device in {shadow.device_id for shadow in shadows.pending(limit=1000)}
    assert device in {shadow.device_id for shadow in shadows.iter_pending(batch_size=2)}
    assert shadows.replace_reported(device, {"n": number}, acked_version=version + 2).is_converged
    assert shadows.patch_reported(device, {"m": number}).reported == {"n": number, "m": number}
    assert shadows.replace_desired_many({device: {"n": 0}})[device].desired_version == version + 3
    assert shadows.patch_desired_many([device], {"n": 1})[device].desired_version == version + 4
    (outcome,) = shadows.replace_reported_many([Report(device, {"n": 0}, version + 4)])
    assert outcome.status is ReportStatus.ACCEPTED
    assert device in {shadow.device_id for shadow in shadows.drifted(limit=1000)}
    assert shadows.get_many([device])[device].reported == {"n": 0}
    assert shadows.count_pending() >= 0
    assert shadows.status_counts()


@pytest.mark.repeats
@pytest.mark.parametrize("isolation_level", ["READ COMMITTED", "AUTOCOMMIT"])
def test_the_service_works_for_more_clients_than_there_are_servers(
    isolation_level: str, behind: str, device: str
) -> None:
    engine = create_engine(behind, pgbouncer=True, pool_size=CLIENTS, isolation_level=isolation_level)
    bind = isolation_level != "AUTOCOMMIT"

    def client(number: int) -> None:
        for round_ in range(ROUNDS):
            with Session(engine) as session, session.begin():
                every_call(ShadowService(session, TENANT, bind_tenant=bind), f"{device}-{number}", round_)

    with ThreadPoolExecutor(CLIENTS) as pool:
        assert list(pool.map(client, range(CLIENTS))) == [None] * CLIENTS
    engine.dispose()


@pytest.mark.repeats
@pytest.mark.parametrize("isolation_level", ["READ COMMITTED", "AUTOCOMMIT"])
@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_the_async_service_works_for_more_clients_than_there_are_servers(
    driver: str, isolation_level: str, behind: str, device: str
) -> None:
    kind = Kind(driver, make_url(behind))
    bind = isolation_level != "AUTOCOMMIT"

    async def run() -> None:
        engine = create_async_engine(kind.url, pgbouncer=True, pool_size=CLIENTS, isolation_level=isolation_level)

        def call(session: Session, number: int, round_: int) -> None:
            every_call(ShadowService(session, TENANT, bind_tenant=bind), f"{device}-{number}", round_)

        async def client(number: int) -> None:
            for round_ in range(ROUNDS):
                async with AsyncSession(engine) as session, session.begin():
                    await session.run_sync(call, number, round_)

        await asyncio.gather(*map(client, range(CLIENTS)))
        await engine.dispose()

    asyncio.run(run())


def test_what_the_caller_passes_for_pgbouncer_wins(strange: str) -> None:
    """A newer PgBouncer keeps prepared statements: with it, a caller may want them."""
    given: dict[str, Any] = {"prepare_threshold": 0}
    engine = create_engine(strange, pgbouncer=True, connect_args=given, poolclass=NullPool)
    prepared = text("SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE :this")
    with engine.begin() as connection:
        assert connection.scalar(prepared, {"this": "%pg_prepared_statements%"}) == 1
    assert given == {"prepare_threshold": 0}
