"""The processes of a PostgreSQL server: which one serves a connection, how to end it, how to wait for what it does."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import NullPool, create_engine, text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Connection, Engine


@contextmanager
def connected(url: str, **options: Any) -> Iterator[Connection]:
    """A connection of its own to a database; closed after the block."""
    engine = create_engine(url, poolclass=NullPool, **options)
    with engine.connect() as connection:
        yield connection


def cut(by: Engine) -> Callable[[Connection], None]:
    """What ends a connection from the server's side, as an operator, a failover or a proxy does."""
    return lambda connection: end_backend(by, backend_pid(connection))


def backend_pid(connection: Connection) -> int:
    """The process that serves this connection, of whichever driver; asks the server nothing."""
    driver: Any = connection.connection.driver_connection
    pid: int = driver.get_server_pid() if hasattr(driver, "get_server_pid") else driver.info.backend_pid
    return pid


def end_backend(by: Engine, pid: int) -> None:
    """End that process of the server; return once it has gone."""
    with by.connect() as connection:
        assert connection.scalar(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
    await_end(by, pid)  # pg_terminate_backend can wait too, but looks every 100 ms only


def unlocked(by: Engine) -> str:
    """The devices whose rows nobody holds a lock on, their names in one word."""
    statement = text("SELECT device_id FROM device_state ORDER BY device_id FOR UPDATE SKIP LOCKED")
    with by.connect() as connection:
        return "".join(connection.scalars(statement))


def await_end(by: Engine, pid: int) -> None:
    """Return as soon as that process of the server has gone."""
    _await(by, "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = :pid", pid=pid)


def await_lock_waits(by: Engine, backends: int) -> None:
    """Return as soon as so many backends of this database wait for a lock."""
    _await(
        by,
        "SELECT count(*) = :backends FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock'",
        backends=backends,
    )


def await_connections(by: Engine, application: str, backends: int) -> None:
    """Return as soon as an application has so many connections."""
    condition = "SELECT count(*) = :backends FROM pg_stat_activity WHERE application_name = :application"
    _await(by, condition, application=application, backends=backends)


def _await(by: Engine, condition: str, **binds: object) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with by.connect() as connection:  # a transaction each: within one, the statistics stand still
            if connection.scalar(text(condition), binds):
                return
        time.sleep(0.002)
    raise TimeoutError(f"not so after 10 seconds: {condition} with {binds}")
