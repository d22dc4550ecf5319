"""How Alembic reaches the database: options, settings, one deployer at a time, a transaction for each revision."""

from __future__ import annotations

import logging
import re
import time
from contextlib import contextmanager
from logging.config import fileConfig
from typing import TYPE_CHECKING

from alembic import context
from alembic.util import CommandError
from sqlalchemy import Engine, NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

import iot_models._migrations.operations  # noqa: F401 - registers the operations that revisions use
from iot_models.engine import database_url, import_driver, masked
from iot_models.models import Base

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection

log = logging.getLogger("alembic.iot_models")
config = context.config
if config.config_file_name is not None:
    fileConfig(config.config_file_name, disable_existing_loggers=False)

# What -x takes, and what each may say.
OPTIONS = {
    "url": (r"(?s:.+)", "a database URL"),  # whatever it is: only database_url can refuse it without showing a password
    "lock_timeout": (r"[1-9]\d*(ms|s|min)", "how long one try for a lock may hold writers up: 500ms, 4s"),
    "shadow": (r"discard", "discard: a downgrade below 076 throws the shadows away"),
    "device_state": (r"drop", "drop: a downgrade to base drops the table with its rows"),
}
LOCK_TIMEOUT = "4s"
# Any number will do, as long as all deployers of these migrations use the same one ("iot_mode" in ASCII).
ADVISORY_LOCK = 0x696F745F6D6F6465
POLL_SECONDS = 0.2
REPORT_SECONDS = 5


def _options() -> dict[str, str]:
    given = context.get_x_argument(as_dictionary=True)
    for name, value in given.items():
        if name not in OPTIONS:
            raise CommandError(f"-x {name}: unknown; there are {', '.join(OPTIONS)}")
        pattern, meaning = OPTIONS[name]
        if not re.fullmatch(pattern, str(value)):
            raise CommandError(f"-x {name}={value}: expected {meaning}")
    return given


def _engine(options: dict[str, str]) -> Engine:
    given = config.attributes.get("engine")
    if isinstance(given, Engine):
        return given
    try:
        url = database_url(options.get("url"), fallback=config.get_main_option("sqlalchemy.url"))
    except ValueError as error:
        raise CommandError(f"{error}, or pass -x url=...") from error
    if url.get_dialect().is_async:
        raise CommandError(
            f"migrations run synchronously, and {url.drivername} is an async driver: write the URL as "
            "postgresql+psycopg://..., or without a driver (in IOT_MODELS_DATABASE_URL, or as -x url=..., where "
            "DATABASE_URL is the service's)"
        )
    try:
        import_driver(url)
    except ImportError as error:
        raise CommandError(str(error)) from error
    return create_engine(url, poolclass=NullPool, connect_args={"application_name": "iot_models alembic"})


@contextmanager
def _connection(options: dict[str, str]) -> Iterator[Connection]:
    engine = _engine(options)
    try:
        connection = engine.connect()
    except OperationalError as error:
        raise CommandError(
            f"cannot reach {masked(engine.url)}: {str(error.orig).strip()}\n"
            "Start the server, or correct the URL (-x url=..., IOT_MODELS_DATABASE_URL, DATABASE_URL)."
        ) from error
    with connection:
        settings = {
            "lock_timeout": options.get("lock_timeout", LOCK_TIMEOUT),
            "statement_timeout": "0",  # a role's default is made for requests, not for building an index
            "idle_in_transaction_session_timeout": "0",
            # Where a policy would hide rows from us, fail rather than park or restore only those that we see.
            "row_security": "off",
        }
        for name, value in settings.items():
            connection.execute(text("SELECT set_config(:name, :value, false)"), {"name": name, "value": value})
        connection.commit()
        try:
            yield connection
        finally:
            connection.invalidate()  # settings and locks end with this connection: it goes back to no pool


def _wait_for_other_deployers(connection: Connection) -> None:
    """Take the advisory lock, which ends with the connection. By polling: waiting deadlocks with an index build."""
    began = time.monotonic()
    report_at = began
    while not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": ADVISORY_LOCK}):
        connection.commit()  # an open transaction would be what the other's index build waits for
        if time.monotonic() >= report_at:
            log.info("another deployer is migrating this database: waiting, %.0f s so far", time.monotonic() - began)
            report_at += REPORT_SECONDS
        time.sleep(POLL_SECONDS)
    connection.commit()


def _run(connection: Connection) -> None:
    # A transaction for each revision: an interrupted upgrade keeps the revisions that were finished.
    context.configure(connection=connection, target_metadata=Base.metadata, transaction_per_migration=True)
    with context.begin_transaction():
        context.run_migrations()


def _migrates() -> bool:
    """Whether the command changes the database (upgrade, downgrade, stamp), or only looks (current, check)."""
    try:
        context.get_revision_argument()
    except KeyError:
        return False
    return True


def _run_online() -> None:
    try:
        with _connection(_options()) as connection:
            if _migrates():
                _wait_for_other_deployers(connection)
            _run(connection)
    except SQLAlchemyError as error:
        lost = _disconnect(error)
        if lost is None:
            raise
        raise CommandError(
            f"the connection was lost: {str(lost.orig).strip()}\n"
            "Run the same command again when the server is back: it goes on from where it was."
        ) from error


def _disconnect(error: BaseException | None) -> DBAPIError | None:
    """The error that says that the connection is gone, behind those that its clean-up met."""
    while error is not None:
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            return error
        error = error.__context__
    return None


def _print_sql() -> None:
    lock_timeout = _options().get("lock_timeout", LOCK_TIMEOUT)
    # The SQL is for PostgreSQL whatever the URL: printing it needs none.
    context.configure(dialect_name="postgresql", literal_binds=True, transaction_per_migration=True)
    context.execute(f"SET lock_timeout = '{lock_timeout}'")
    context.run_migrations()


if context.is_offline_mode():
    _print_sql()
else:
    _run_online()
