"""One server for the whole run, started when the first test asks for it, and databases on it.

A test of pure functions asks for none of these fixtures, and a run of such tests starts no server. What a test needs,
from the cheapest on: `connection` (PostgreSQL computes something), `session` (a transaction on a migrated database that
is rolled back), `own_engine` (a migrated database in which to commit), `new_database` (an empty one).

In a parallel run (`-n`, pytest-xdist) the workers share the server, and each has databases of its own.
"""

from __future__ import annotations

import logging
import os
import secrets
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import coverage
import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings
from sqlalchemy import Connection, Engine, NullPool, create_engine, make_url, text
from sqlalchemy.orm import Session

from iot_models.testing import NoServerError, PostgresServer, database, postgres_server
from tests.databases import partitioned
from tests.databases.alembic_runs import upgrade
from tests.databases.async_engines import ASYNC_DRIVERS
from tests.databases.in_memory import temporary_files_in_memory
from tests.databases.reuse import ReusedDatabase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# pytest's own tool for trying plugins; and our plugin, be the entry point installed or not.
pytest_plugins = ["pytester", "pytest_iot_models"]

# How long an example takes says something about the machine, and nothing about the product.
settings.register_profile("full", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", settings.get_profile("full"), max_examples=10)
settings.load_profile("full")  # unless --hypothesis-profile names the other

SERVER = pytest.StashKey[PostgresServer]()
SERVER_OF_WORKERS = "server"
LOCK_TABLES = """
    DO $$ DECLARE name regclass; BEGIN
      FOR name IN SELECT c.oid FROM pg_class c WHERE c.relkind IN ('r', 'p') AND c.oid >= 16384 ORDER BY c.oid LOOP
        EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', name);
      END LOOP;
    END $$
"""


def pytest_configure(config: pytest.Config) -> None:
    """Let the servers of this run, whoever starts them, write to memory. The workers of a parallel run inherit it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        stack = ExitStack()
        config.add_cleanup(stack.close)
        stack.enter_context(temporary_files_in_memory())


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Start the server before the first worker of a parallel run, and tell each worker where it is."""
    config: pytest.Config = node.config
    if SERVER not in config.stash:
        stack = ExitStack()
        config.add_cleanup(stack.close)
        try:
            config.stash[SERVER] = stack.enter_context(postgres_server())
        except NoServerError as error:
            raise pytest.UsageError(str(error)) from error
    server = config.stash[SERVER]
    node.workerinput[SERVER_OF_WORKERS] = (str(server.url), server.description)


@pytest.hookimpl(trylast=True)  # after pytest-randomly has shuffled them
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the properties, and what is large, as tests that run code which others cover, too; let those run last.

    What is made once in a process, as a statement is, is made where it is measured then. First come those that only run
    other processes: they take longest, and one of them at the end would let the other workers wait. Of a parallel run
    each worker takes an equal part of the list, from its beginning.
    """
    for item in items:
        # Hypothesis sets a marker of its own, but later.
        if is_hypothesis_test(getattr(item, "obj", None)) or item.get_closest_marker("large"):
            item.add_marker("repeats")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    turns = [0 if "packaging" in item.path.parts else 1 + bool(item.get_closest_marker("repeats")) for item in items]
    kinds = [[item for item, turn in zip(items, turns, strict=True) if turn == kind] for kind in range(3)]
    items[:] = [
        item
        for worker in range(workers)
        for kind in kinds
        for item in kind[len(kind) * worker // workers : len(kind) * (worker + 1) // workers]
    ]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Measure no coverage in a test that is marked `repeats`, nor in its processes: coverage makes Python half as fast."""
    measuring = coverage.Coverage.current()
    if measuring is None or not item.get_closest_marker("repeats"):
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # what processes are measured by
        measuring.stop()
        try:
            return (yield)
        finally:
            measuring.start()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name the server that the run used, if it used one; with -q too."""
    if SERVER in config.stash:
        terminalreporter.write_line(f"server: {config.stash[SERVER].description}")


@pytest.fixture(scope="session")
def server(pytestconfig: pytest.Config) -> Iterator[PostgresServer]:
    """The server of this run."""
    shared = getattr(pytestconfig, "workerinput", {}).get(SERVER_OF_WORKERS)
    with ExitStack() as stack:
        try:
            server = PostgresServer(*shared) if shared else stack.enter_context(postgres_server())
        except NoServerError as error:  # no test that follows would find one
            pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
        pytestconfig.stash[SERVER] = server
        yield server


@pytest.fixture(autouse=True)
def _alembic_logs_as_before() -> Iterator[None]:
    """The migrate command sets how much is logged for the process that it has to itself; here other tests follow."""
    logger = logging.getLogger("alembic")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def new_database(server: PostgresServer) -> Iterator[Callable[..., str]]:
    """Makes databases, empty or copies of the one at a URL, and drops them after the test; returns their URLs."""
    with ExitStack() as stack:
        yield lambda template=None: stack.enter_context(database(server, template))


@pytest.fixture(params=ASYNC_DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    """Each asynchronous driver in turn."""
    return str(request.param)


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
        if partitioned.ASKED_FOR:
            raw = create_engine(url, poolclass=NullPool)
            with raw.begin() as connection:
                connection.connection.cursor().execute(partitioned.RAW_075_PARTITIONED)
        upgrade(url)
        yield url


@pytest.fixture(scope="session")
def plain_migrated_url(server: PostgresServer, migrated_url: str) -> Iterator[str]:
    """The same with `device_state` in one piece: what `create_all` and an upgrade of nothing make."""
    if not partitioned.ASKED_FOR:
        yield migrated_url
        return
    with database(server) as url:
        upgrade(url)
        yield url


@pytest.fixture(scope="session")
def engine(server: PostgresServer, migrated_url: str) -> Iterator[Engine]:
    """An engine on a migrated database that the tests share and leave empty."""
    with database(server, migrated_url) as url:
        engine = create_engine(url, pool_size=20)
        yield engine
        engine.dispose()


@pytest.fixture(scope="session")
def _reused_database(server: PostgresServer, migrated_url: str) -> Iterator[ReusedDatabase]:
    with ReusedDatabase(server, migrated_url) as reused:
        yield reused


@pytest.fixture
def own_engine(_reused_database: ReusedDatabase) -> Iterator[Engine]:
    """An engine on a migrated, empty database that only this test uses, for data that has to be committed."""
    with _reused_database.clean() as url:
        engine = create_engine(url, pool_size=20)
        yield engine
        engine.dispose()


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    """A session inside a transaction that is rolled back after the test; its commits end savepoints only."""
    with engine.connect() as connection, connection.begin() as transaction:
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            yield session
        transaction.rollback()


@pytest.fixture
def server_role(server: PostgresServer) -> Iterator[str]:
    """A role that may log in and is no superuser, so that row level security applies to it."""
    role = f"iot_models_test_{secrets.token_hex(4)}"
    engine = create_engine(server.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE ROLE {role} LOGIN PASSWORD '{role}'"))
        yield role
        # Only where it owns or was granted something: other databases are other tests' at this very moment.
        for name in connection.scalars(
            text("""
                SELECT datname FROM pg_database WHERE oid IN (
                    SELECT dbid FROM pg_shdepend
                     WHERE refclassid = 'pg_authid'::regclass AND refobjid = CAST(:role AS regrole))"""),
            {"role": role},
        ):
            own = create_engine(make_url(server.url).set(database=name), poolclass=NullPool)
            with own.begin() as inside:
                # The tables first: otherwise it changes rows of the catalog and then waits for a table that autovacuum
                # holds, which waits for the same rows.
                inside.execute(text(LOCK_TABLES))
                inside.execute(text(f"DROP OWNED BY {role} CASCADE"))
        connection.execute(text(f"DROP ROLE {role}"))
