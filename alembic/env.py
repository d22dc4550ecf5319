"""How Alembic runs these migrations: options, settings, one deployer at a time, a transaction for each revision."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from logging.config import fileConfig
from typing import TYPE_CHECKING

from alembic import context
from alembic.operations import Operations
from alembic.runtime.migration import RevisionStep
from alembic.util import CommandError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from iot_models._core.database_errors import LOCK_NOT_AVAILABLE, sqlstate
from iot_models._migrations.comparison import TABLE
from iot_models._migrations.deployers import wait_for_other_deployers
from iot_models._migrations.obstacles import (
    Plan,
    look_again,
    obstacles,
    refuse,
    refuse_another_version_table,
    refuse_strangers,
    warnings,
)

# Importing it registers what the revisions use, too.
from iot_models._migrations.operations import LockTable, ensure_version_table, undo_interrupted_downgrade
from iot_models._migrations.options import LOCK_TIMEOUT, require_known
from iot_models._migrations.session import set_all
from iot_models._migrations.strangers import refusal_in_sql
from iot_models._migrations.targets import engine_for
from iot_models.engine import shown
from iot_models.models import DEFINED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Engine

log = logging.getLogger("alembic.iot_models")
config = context.config
if config.config_file_name is not None:
    fileConfig(config.config_file_name, disable_existing_loggers=False)


def _options() -> dict[str, str]:
    given = context.get_x_argument(as_dictionary=True)
    require_known(given)
    return given


def _engine(options: dict[str, str]) -> Engine:
    given: Engine | None = config.attributes.get("engine")  # from iot_models.migrate
    if given is not None:
        return given
    # Raw, because an error of the parser would quote a URL whose % is not doubled.
    raw = config.file_config.get(config.config_ini_section, "sqlalchemy.url", raw=True, fallback=None)
    return engine_for(options.get("url"), option="-x url=...", fallback=raw and raw.replace("%%", "%"))


@contextmanager
def _connection(options: dict[str, str]) -> Iterator[Connection]:
    engine = _engine(options)
    try:
        connection = engine.connect()
    except OperationalError as error:
        raise CommandError(
            f"cannot reach {shown(engine.url)}: {str(error.orig).strip()}\n"
            "Start the server, or correct the URL (-x url=..., IOT_MODELS_DATABASE_URL, DATABASE_URL)."
        ) from error
    with connection:
        refuse_strangers(connection)
        look_again(connection)
        refuse_another_version_table(connection)
        connection.execute(text(set_all(options.get("lock_timeout", LOCK_TIMEOUT))))
        connection.commit()
        try:
            yield connection
        finally:
            connection.invalidate()  # ends its settings and locks: it does not return to a pool


def _run(connection: Connection, options: dict[str, str]) -> None:
    # A transaction for each revision: an interrupted upgrade keeps the revisions that are finished.
    context.configure(connection=connection, target_metadata=DEFINED.metadata, transaction_per_migration=True)
    if _migrates():
        stays_or_rises = _look_ahead(connection, options)
        ensure_version_table(connection)
        if stays_or_rises:
            undo_interrupted_downgrade(context.get_context())
    with context.begin_transaction():
        context.run_migrations()


def _look_ahead(connection: Connection, options: dict[str, str]) -> bool:
    """Refuse, before the first revision changes anything, what one of the revisions would refuse or fail at.

    Returns:
        Whether the database stays where it is or goes up; no for a downgrade and for `stamp`.

    Raises:
        CommandError: With everything that was found.
    """
    migration = context.get_context()
    steps = [*migration.opts["fn"](migration.get_current_heads(), migration)]
    moves = [step for step in steps if isinstance(step, RevisionStep)]  # `stamp` changes nothing
    if moves:
        plan = Plan(
            scripts=[step.revision for step in moves],
            upgrade=moves[0].is_upgrade,
            discard=options.get("shadow") == "discard",
            drop=options.get("device_state") == "drop",
        )
        try:
            found = obstacles(connection, plan)
        except DBAPIError as error:
            if sqlstate(error) != LOCK_NOT_AVAILABLE:
                raise
            connection.rollback()
            Operations(migration).invoke(LockTable(TABLE, "ACCESS SHARE"))  # tries again, and names the holder
            found = obstacles(connection, plan)
        refuse(found)
        for warning in warnings(connection, plan):
            log.warning("%s", warning)
    connection.rollback()
    return not steps or bool(moves and moves[0].is_upgrade)


def _migrates() -> bool:
    """Whether the command changes the database (upgrade, downgrade, stamp) or only reads it (current, check)."""
    try:
        context.get_revision_argument()
    except KeyError:
        return False
    return True


def _run_online() -> None:
    options = _options()
    try:
        with _connection(options) as connection:
            if _migrates():
                wait_for_other_deployers(connection)
            _run(connection, options)
    except SQLAlchemyError as error:
        lost = _disconnect(error)
        if lost is None:
            raise
        raise CommandError(
            f"the connection was lost: {str(lost.orig).strip()}\n"
            "Run the same command again when the server is back: it continues from there."
        ) from error


def _disconnect(error: BaseException | None) -> DBAPIError | None:
    """The error that says that the connection is lost. Errors of the clean-up after it may come first."""
    while error is not None:
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            return error
        error = error.__context__
    return None


def _print_sql() -> None:
    lock_timeout = _options().get("lock_timeout", LOCK_TIMEOUT)
    # The SQL is always PostgreSQL's, so printing it needs no URL.
    context.configure(dialect_name="postgresql", literal_binds=True, transaction_per_migration=True)
    context.execute(f"SET lock_timeout = '{lock_timeout}'")
    context.execute(refusal_in_sql())
    # No query, whose result psql would print.
    context.execute(f"DO $$ BEGIN\n  PERFORM {set_all(lock_timeout).removeprefix('SELECT ')};\nEND $$")
    context.run_migrations()


if context.is_offline_mode():
    _print_sql()
else:
    _run_online()
