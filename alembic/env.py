"""How Alembic runs these migrations: options, settings, one deployer at a time, a transaction for each revision."""

from __future__ import annotations

from contextlib import contextmanager
from logging.config import fileConfig
from typing import TYPE_CHECKING

from alembic import context
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from iot_models._migrations import version_table
from iot_models._migrations.autogenerate import include_ours
from iot_models._migrations.deployers import wait_for_other_deployers
from iot_models._migrations.environment import given_back, look_ahead, preamble, ready
from iot_models._migrations.history import revisions
from iot_models._migrations.obstacles import refuse_another_version_table
from iot_models._migrations.operations import (
    ensure_version_table,
    keep_for_the_owner,
    naming_who_was_waited_for,
    undo_interrupted_downgrade,
)
from iot_models._migrations.options import require_known
from iot_models._migrations.search_path import narrowed
from iot_models._migrations.strangers import VERSION_TABLE
from iot_models._migrations.targets import resolve, schema_of
from iot_models.engine import shown
from iot_models.models import DEFINED

if TYPE_CHECKING:
    from collections.abc import Iterator

config = context.config
if config.config_file_name is not None:
    fileConfig(config.config_file_name, disable_existing_loggers=False)


def _options() -> dict[str, str]:
    given = context.get_x_argument(as_dictionary=True)
    require_known(given)
    return given


def _target(options: dict[str, str]) -> Engine | Connection:
    given: Engine | Connection | None = config.attributes.get("target")  # from iot_models.migrate
    if given is not None:
        return given
    # Raw, because an error of the parser would quote a URL whose % is not doubled.
    raw = config.file_config.get(config.config_ini_section, "sqlalchemy.url", raw=True, fallback=None)
    return resolve(options.get("url"), option="-x url=...", fallback=raw and raw.replace("%%", "%"))


@contextmanager
def _connection(target: Engine | Connection) -> Iterator[Connection]:
    if isinstance(target, Connection):
        with given_back(target):
            yield target
        return
    try:
        connection = target.connect()
    except OperationalError as error:
        raise CommandError(
            f"cannot reach {shown(target.url)}: {str(error.orig).strip()}\n"
            "Start the server, or correct the URL (-x url=..., IOT_MODELS_DATABASE_URL, DATABASE_URL)."
        ) from error
    with connection:
        try:
            yield connection
        finally:
            connection.invalidate()  # ends its settings and locks: it does not return to a pool


def _run(connection: Connection, options: dict[str, str]) -> None:
    scripts = revisions(context.script)
    table = version_table.find(connection, scripts)
    schema = connection.scalar(text("SELECT CAST(current_schema() AS text)"))
    connection.rollback()
    _configure(connection, schema, table)
    if _migrates():
        migration = context.get_context()
        if not migration.purge:  # `alembic stamp --purge`
            version_table.refuse_unknown(migration.get_current_heads(), scripts)
        stays_or_rises = look_ahead(migration, options)
        connection.rollback()
        taken_over = table != VERSION_TABLE
        if taken_over:
            version_table.take_over(connection)
        ensure_version_table(connection)
        keep_for_the_owner(migration)
        connection.commit()
        if taken_over:
            _configure(connection, schema, VERSION_TABLE)
        if stays_or_rises:
            undo_interrupted_downgrade(context.get_context())
            connection.commit()
    with context.begin_transaction():
        context.run_migrations()


def _configure(connection: Connection, schema: str | None, table: str) -> None:
    # A transaction for each revision: an interrupted upgrade keeps the revisions that are finished.
    context.configure(
        connection=connection,
        target_metadata=DEFINED.metadata,
        transaction_per_migration=True,
        version_table=table,
        version_table_schema=schema,
        include_object=include_ours,
    )


def _migrates() -> bool:
    """Whether the command changes the database (upgrade, downgrade, stamp) or only reads it (current, check)."""
    try:
        context.get_revision_argument()
    except KeyError:
        return False
    return True


def _run_online() -> None:
    options = _options()
    target = _target(options)
    schema = schema_of(target, options.get("schema"))
    try:
        with _connection(target) as connection, ready(connection, options | ({"schema": schema} if schema else {})):
            refuse_another_version_table(connection)
            with narrowed(connection):
                connection.rollback()
                if _migrates():
                    wait_for_other_deployers(connection)
                with naming_who_was_waited_for(connection):
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
    # The SQL is always PostgreSQL's, so printing it needs no URL.
    context.configure(
        dialect_name="postgresql", literal_binds=True, transaction_per_migration=True, version_table=VERSION_TABLE
    )
    for statement in preamble(_options()):
        context.execute(statement)
    context.run_migrations()


if context.is_offline_mode():
    _print_sql()
else:
    _run_online()
