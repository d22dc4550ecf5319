"""One server for the whole run, and databases on it."""

from __future__ import annotations

import secrets
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest
from alembic_runs import upgrade
from postgres_server import NoServerError, PostgresServer, postgres_server
from sqlalchemy import Connection, Engine, NullPool, create_engine, make_url, text
from sqlalchemy.orm import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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


@contextmanager
def _databases(server: PostgresServer) -> Iterator[Callable[..., str]]:
    """Makes databases, each call another one, and drops them at the end; returns their URLs."""
    engine = create_engine(server.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    names: list[str] = []

    # template0: what a given server's owner put into template1 is not part of an empty database.
    def create(template: str = "template0") -> str:
        name = f"iot_models_test_{secrets.token_hex(8)}"
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template}"))
        names.append(name)
        return make_url(server.url).set(database=name).render_as_string(hide_password=False)

    try:
        yield create
    finally:
        with engine.connect() as connection:
            for name in names:
                connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture(scope="session")
def server(pytestconfig: pytest.Config) -> PostgresServer:
    """The server of this run."""
    return pytestconfig.stash[SERVER]


@pytest.fixture
def new_database(server: PostgresServer) -> Iterator[Callable[..., str]]:
    """Makes databases, empty or copies of the one named, and drops them after the test; returns their URLs."""
    with _databases(server) as create:
        yield create


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
    with _databases(server) as create:
        url = create()
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
    with _databases(server) as create:
        engine = create_engine(create(str(make_url(migrated_url).database)), pool_size=20)
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
        for (database,) in connection.execute(
            text("SELECT datname FROM pg_database WHERE datname LIKE 'iot_models_test%'")
        ):
            own = create_engine(make_url(server.url).set(database=database), poolclass=NullPool)
            with own.begin() as inside:
                inside.execute(text(f"DROP OWNED BY {role} CASCADE"))
        connection.execute(text(f"DROP ROLE {role}"))
