"""pytest fixtures for applications that use iot_models: databases at head, a session that is undone, a small fleet.

pytest imports this module at every start, so it stands beside the package, whose import takes SQLAlchemy's time, and
imports it where a fixture is asked for. No server starts before that.

It asserts nothing, and so may be imported before pytest gets to it: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine
    from sqlalchemy.orm import Session

    from iot_models.testing import PostgresServer
    from iot_models.testing.sample_fleet import SampleFleet

_USED = pytest.StashKey[str]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name the server that the run used, if it used one."""
    if _USED in config.stash:
        terminalreporter.write_line(f"shadow_server: {config.stash[_USED]}")


@pytest.fixture(scope="session")
def shadow_server(pytestconfig: pytest.Config) -> Iterator[PostgresServer]:
    """The PostgreSQL of this run: the one at IOT_MODELS_TEST_DATABASE_URL, else a container, else the throwaway one."""
    from iot_models.testing import NoServerError, postgres_server  # noqa: PLC0415

    with ExitStack() as stack:
        try:
            server = stack.enter_context(postgres_server())
        except NoServerError as error:
            raise pytest.fail.Exception(str(error), pytrace=False) from None  # the message is all there is to see
        pytestconfig.stash[_USED] = server.description
        yield server


@pytest.fixture(scope="session")
def shadow_template(shadow_server: PostgresServer) -> Iterator[str]:
    """URL of a database at head, which all others are copied from. Override it to add tables of your own."""
    from iot_models import migrate, testing  # noqa: PLC0415

    with testing.database(shadow_server) as url:
        migrate.upgrade(url)
        yield url


@pytest.fixture
def shadow_database(shadow_server: PostgresServer, shadow_template: str) -> Iterator[str]:
    """URL of a database of this test's own, for what has to be committed: an application under test, async code."""
    from iot_models import testing  # noqa: PLC0415

    with testing.database(shadow_server, shadow_template) as url:
        yield url


@pytest.fixture(scope="session")
def shadow_engine(shadow_server: PostgresServer, shadow_template: str) -> Iterator[Engine]:
    """An engine on the database that the tests of this run share, and leave as they found it."""
    from iot_models import testing  # noqa: PLC0415
    from iot_models.engine import create_engine  # noqa: PLC0415

    with testing.database(shadow_server, shadow_template) as url:
        # Whoever stops at a debugger's prompt lets the transaction wait.
        engine = create_engine(url, idle_in_transaction_session_timeout=None)
        yield engine
        engine.dispose()


@pytest.fixture
def shadow_session(shadow_engine: Engine) -> Iterator[Session]:
    """A session whose commits and rollbacks end savepoints; all that it did is undone after the test."""
    from sqlalchemy.orm import Session  # noqa: PLC0415

    with shadow_engine.connect() as connection, connection.begin() as transaction:
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            yield session
        transaction.rollback()


@pytest.fixture
def shadow_fleet(shadow_session: Session) -> SampleFleet:
    """Ten devices in `shadow_session`, one in each state for each of two tenants; their names."""
    from iot_models.testing.sample_fleet import add_sample_fleet  # noqa: PLC0415

    fleet = add_sample_fleet(shadow_session)
    shadow_session.commit()  # ends a savepoint: the fleet stays where the test rolls back
    return fleet
