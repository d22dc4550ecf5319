"""The databases that a migration starts from.

Making and dropping a database takes longer than emptying one. So an empty database is emptied again after a test and
given to another one, unless the test changed more than its schema `public`. A migrated one is a copy: to migrate takes
longer than that.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError

from iot_models._migrations import obstacles
from iot_models.testing import PostgresServer, database
from tests.databases.alembic_runs import upgrade
from tests.migrations.raw_sql import FLEET, RAW_075, SHADOWS, run_sql

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_EMPTY = text("""
    SELECT NOT EXISTS (SELECT FROM pg_namespace WHERE nspname <> 'information_schema' AND nspname NOT LIKE 'pg\\_%')
       AND NOT EXISTS (SELECT FROM pg_event_trigger)
       AND NOT EXISTS (SELECT FROM pg_default_acl)
       AND NOT EXISTS (SELECT FROM pg_db_role_setting WHERE setdatabase = d.oid)
       AND datacl IS NULL
      FROM pg_database d WHERE datname = current_database()
""")
_END_OTHERS = text("""
    SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
     WHERE datname = current_database() AND usename = current_user AND pid <> pg_backend_pid()
""")


@pytest.fixture(autouse=True)
def _strangers_are_looked_for_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 20 ms on a machine that is busy makes half of a migration; `tests/security` is what tries it."""
    monkeypatch.setattr(obstacles, "_FRESH_SECONDS", 0.5)


@pytest.fixture(scope="session")
def _emptied_databases() -> list[str]:
    return []


@pytest.fixture(scope="session")
def _databases_of_this_run() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def make_empty(
    server: PostgresServer, _emptied_databases: list[str], _databases_of_this_run: ExitStack
) -> Iterator[Callable[[], str]]:
    """Gives empty databases, for this test alone; returns their URLs."""
    given: list[str] = []

    def give() -> str:
        if not _emptied_databases:
            _emptied_databases.append(_databases_of_this_run.enter_context(database(server)))
        given.append(_emptied_databases.pop())
        return given[-1]

    yield give
    _emptied_databases += filter(_empty_again, given)


def _empty_again(url: str) -> bool:
    """Empty a database; whether it is then as PostgreSQL makes one."""
    engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            connection.execute(_END_OTHERS)
            connection.execute(text("SET lock_timeout = '5s'"))
            connection.execute(text("DROP SCHEMA public CASCADE"))
            is_empty = bool(connection.scalar(_EMPTY))
            connection.execute(text("CREATE SCHEMA public AUTHORIZATION pg_database_owner"))
            connection.execute(text("GRANT USAGE ON SCHEMA public TO public"))
            connection.execute(text("COMMENT ON SCHEMA public IS 'standard public schema'"))
            return is_empty
    except DBAPIError:
        return False


@pytest.fixture
def empty(make_empty: Callable[[], str]) -> str:
    """An empty database."""
    return make_empty()


@pytest.fixture
def raw_fleet(empty: str) -> str:
    """A deployment before shadows, made by raw SQL, with ten devices. Alembic has not been here."""
    run_sql(empty, RAW_075 + FLEET)
    return empty


@pytest.fixture
def at_head(new_database: Callable[..., str], migrated_url: str) -> str:
    """A migrated database without devices."""
    return new_database(migrated_url)


@pytest.fixture(scope="session")
def _migrated_fleet(server: PostgresServer) -> Iterator[str]:
    with database(server) as url:
        run_sql(url, RAW_075 + FLEET)
        upgrade(url)
        run_sql(url, SHADOWS)
        yield url


@pytest.fixture
def shadow_fleet_at_head(new_database: Callable[..., str], _migrated_fleet: str) -> str:
    """The same ten devices, migrated; four of them have a shadow."""
    return new_database(_migrated_fleet)
