"""One server for the whole run, and databases on it."""

from __future__ import annotations

import logging
import secrets
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from alembic_runs import upgrade
from sqlalchemy import Connection, Engine, NullPool, create_engine, make_url, text
from sqlalchemy.orm import Session

from iot_models.testing import NoServerError, PostgresServer, database, postgres_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# pytest's own tool for trying plugins; and our plugin, be the entry point installed or not.
pytest_plugins = ["pytester", "pytest_iot_models"]

SERVER = pytest.StashKey[PostgresServer]()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Start the server before anything else and name it in the first line, with -q too."""
    config = session.config
    if config.option.collectonly:
        return
    stack = ExitStack()
    config.add_cleanup(stack.close)
    try:
        config.stash[SERVER] = stack.enter_context(postgres_server())
    except NoServerError as error:
        raise pytest.UsageError(str(error)) from error
    config.get_terminal_writer().line(config.stash[SERVER].description)


@pytest.fixture(autouse=True)
def _alembic_logs_as_before() -> Iterator[None]:
    """The migrate command sets how much is logged for the process that it has to itself; here other tests follow."""
    logger = logging.getLogger("alembic")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def server(pytestconfig: pytest.Config) -> PostgresServer:
    """The server of this run."""
    return pytestconfig.stash[SERVER]


@pytest.fixture
def new_database(server: PostgresServer) -> Iterator[Callable[..., str]]:
    """Makes databases, empty or copies of the one at a URL, and drops them after the test; returns their URLs."""
    with ExitStack() as stack:
        yield lambda template=None: stack.enter_context(database(server, template))


@pytest.fixture
def connection(server: PostgresServer) -> Iterator[Connection]:
    """A connection that sees no tables of ours, to ask PostgreSQL what it computes; rolled back after the test."""
    engine = create_engine(server.url, poolclass=NullPool)
    with engine.connect() as connection:
        yield connection
        connection.rollback()


@pytest.fixture(scope="session")
def migrated_url(server: PostgresServer) -> Iterator[str]:
    """A database at head that nobody stays connected to: others are copied from it."""
    with database(server) as url:
        upgrade(url)
        yield url


@pytest.fixture(scope="session")
def engine(server: PostgresServer, migrated_url: str) -> Iterator[Engine]:
    """An engine on a migrated database that the tests share and leave empty."""
    yield from _engine(server, migrated_url)


@pytest.fixture
def own_engine(server: PostgresServer, migrated_url: str) -> Iterator[Engine]:
    """An engine on a migrated database of this test's own, for data that has to be committed."""
    yield from _engine(server, migrated_url)


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    """A session inside a transaction that is rolled back after the test; its commits end savepoints only."""
    with engine.connect() as connection, connection.begin() as transaction:
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            yield session
        transaction.rollback()


def _engine(server: PostgresServer, migrated_url: str) -> Iterator[Engine]:
    with database(server, migrated_url) as url:
        engine = create_engine(url, pool_size=20)
        yield engine
        engine.dispose()


@pytest.fixture
def server_role(server: PostgresServer) -> Iterator[str]:
    """A role that may log in and is no superuser, so that row level security applies to it."""
    role = f"iot_models_test_{secrets.token_hex(4)}"
    engine = create_engine(server.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE ROLE {role} LOGIN PASSWORD '{role}'"))
        yield role
        for (name,) in connection.execute(
            text("SELECT datname FROM pg_database WHERE datname LIKE 'iot_models_test%'")
        ):
            own = create_engine(make_url(server.url).set(database=name), poolclass=NullPool)
            with own.begin() as inside:
                inside.execute(text(f"DROP OWNED BY {role} CASCADE"))
        connection.execute(text(f"DROP ROLE {role}"))
