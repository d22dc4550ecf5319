"""What an env.py has to do for these revisions: ours does it, and a team's by `migrate.guarded`.

Every promise of the migrations rests on this: the search path, strangers, the settings of the session, one deployer at
a time, a transaction for each revision, and a look ahead before the first of them changes anything.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, cast

from alembic import context
from alembic.operations import MigrateOperation, Operations
from alembic.runtime.migration import RevisionStep
from alembic.util import CommandError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from iot_models._core.database_errors import LOCK_NOT_AVAILABLE, sqlstate
from iot_models._migrations import history
from iot_models._migrations import indexes as _indexes  # noqa: F401 - it registers what the revisions use
from iot_models._migrations.comparison import TABLE
from iot_models._migrations.deployers import stop_being_a_deployer, wait_for_other_deployers
from iot_models._migrations.obstacles import (
    Obstacle,
    Plan,
    looking_again,
    obstacles,
    refuse,
    refuse_strangers,
    warnings,
)

# Importing it registers what the revisions use, too.
from iot_models._migrations.operations import (
    LockTable,
    keep_for_the_owner,
    naming_who_was_waited_for,
    rights_taken_in_sql,
    undo_interrupted_downgrade,
)
from iot_models._migrations.options import LOCK_TIMEOUT, require_known
from iot_models._migrations.search_path import in_sql, refuse_unusual_path, set_path
from iot_models._migrations.session import SETTINGS, set_all
from iot_models._migrations.strangers import refusal_in_sql

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from alembic.runtime.migration import MigrationContext
    from sqlalchemy import Connection

log = logging.getLogger("alembic.iot_models")

# In `connection.info`: this session is ready for our revisions. In the options of a run: what stops them was asked.
_READY: Final = "iot_models.migrations.ready"
_LOOKED: Final = "iot_models.migrations.looked"
_FOR_REVISIONS: Final = ("lock_timeout", "shadow", "device_state")


@contextmanager
def ready(connection: Connection, options: Mapping[str, str], *besides: str) -> Iterator[None]:
    """Make a session fit for our revisions: nobody's code runs but ours, and no setting is in their way.

    `besides` are names of tables that are used besides ours.

    Raises:
        CommandError: If the schema is missing, or strangers have names that the revisions use.
    """
    set_path(connection, options.get("schema"))
    refuse_strangers(connection, *besides)
    with looking_again(connection):
        connection.execute(text(set_all(options.get("lock_timeout", LOCK_TIMEOUT))))
        connection.commit()
        info = connection.info  # of a connection that was lost it cannot be had any more
        info[_READY] = True
        try:
            yield
        finally:
            info.pop(_READY)


@contextmanager
def given_back(connection: Connection) -> Iterator[None]:
    """Give a connection of the caller's back as it was: its settings and isolation level, and no lock of ours.

    Raises:
        CommandError: If it is in a transaction.
    """
    if connection.in_transaction():
        raise CommandError(
            "this connection is in a transaction, and a migration commits more than once: pass one on which nothing "
            "has run yet, or end its transaction first"
        )
    try:
        refuse_unusual_path(connection)
    finally:
        connection.rollback()
    level = "AUTOCOMMIT" if connection.connection.autocommit else connection.get_isolation_level()
    translated = connection.get_execution_options().get("schema_translate_map")
    before = connection.execute(
        text("SELECT name, current_setting(name) AS value FROM pg_settings WHERE name = ANY (CAST(:names AS text[]))"),
        {"names": ["search_path", "lock_timeout", "deadlock_timeout", *SETTINGS]},
    ).all()
    connection.rollback()
    connection.execution_options(isolation_level="READ COMMITTED", schema_translate_map=None)
    try:
        yield
    finally:
        try:
            connection.rollback()
            stop_being_a_deployer(connection)
            connection.execute(
                text("""
                    SELECT pg_catalog.count(pg_catalog.set_config(was.name, was.value, false))
                      FROM ROWS FROM (pg_catalog.unnest(CAST(:names AS text[])),
                                      pg_catalog.unnest(CAST(:values AS text[]))) AS was (name, value)
                     WHERE pg_catalog.current_setting(was.name) <> was.value
                """),
                {"names": [row.name for row in before], "values": [row.value for row in before]},
            )
            connection.commit()
            connection.execution_options(isolation_level=level, schema_translate_map=translated)
        except SQLAlchemyError:  # it was lost, or its settings cannot be had back
            connection.invalidate()
            connection.rollback()


@contextmanager
def guarded(connection: Connection) -> Iterator[None]:
    """Let an env.py of your own run the revisions of this package with all their promises.

    For a team that has `iot_models:alembic/versions` in its `version_locations`. While it lasts, the session waits for
    a lock at most as long as `-x lock_timeout` says (4 seconds), waits for other deployers, and has no other timeout;
    that holds for your own revisions, too. Then the connection is as it was before.

    Args:
        connection: One that is not in a transaction. Its search path begins with the schema of `device_state`.

    Raises:
        CommandError: From `alembic.util`, before anything is changed: the connection is in a transaction, the search
            path leads elsewhere, strangers have names that the revisions use, or an option is wrong.

    Example:
        >>> with migrate.guarded(connection):
        ...     context.configure(connection=connection, target_metadata=metadata, transaction_per_migration=True)
        ...     with context.begin_transaction():
        ...         context.run_migrations()
    """
    options = _options()
    with given_back(connection):
        schemas = text("SELECT CAST(current_schemas(false) AS text[])")
        before = connection.scalar(schemas)
        with ready(connection, options, "alembic_version"):
            after = connection.scalar(schemas)
            if after != before:
                fact = f"the search path is {_path(before)}, and these revisions work in {_path(after)}"
                remedy = (
                    f"set it to {_path(after)} for this database or role (in the URL: "
                    f"?options=-c search_path={','.join(after or ())}), for your revisions, too"
                )
                refuse([Obstacle(fact, (), remedy)])
            connection.rollback()
            wait_for_other_deployers(connection)
            with naming_who_was_waited_for(connection):
                yield


def _path(schemas: Sequence[str] | None) -> str:
    return ", ".join(schemas or ()) or "empty"


def _options() -> dict[str, str]:
    """Ours of what the command line gives by -x. A team has options of its own."""
    given = {
        name: value for name, value in context.get_x_argument(as_dictionary=True).items() if name in _FOR_REVISIONS
    }
    require_known(given)
    return given


def look_ahead(migration: MigrationContext, options: Mapping[str, str]) -> bool:
    """Refuse, before the first of our revisions changes anything, what one of them would refuse or fail at.

    Returns:
        Whether the database stays where it is or goes up; no for a downgrade and for `stamp`.

    Raises:
        CommandError: With everything that was found.
    """
    connection = cast("Connection", migration.connection)  # None offline only
    migration.opts[_LOOKED] = True
    heads = () if migration.purge else migration.get_current_heads()
    steps = [*migration.opts["fn"](heads, migration)]
    moves = [step for step in steps if isinstance(step, RevisionStep) and history.ours(step.revision)]
    if moves:
        plan = Plan(
            scripts=[step.revision for step in moves],
            upgrade=moves[0].is_upgrade,
            discard=options.get("shadow") == "discard",
            drop=options.get("device_state") == "drop",
        )
        try:
            with connection.begin_nested():
                found = obstacles(connection, plan)
        except DBAPIError as error:
            if sqlstate(error) != LOCK_NOT_AVAILABLE:
                raise
            Operations(migration).invoke(LockTable(TABLE, "ACCESS SHARE"))  # tries again, and names the holder
            found = obstacles(connection, plan)
        refuse(found)
        for warning in warnings(connection, plan):
            log.warning("%s", warning)
    return not steps or bool(moves and moves[0].is_upgrade)


@Operations.register_operation("iot_models_begin")
class Begin(MigrateOperation):
    """What each revision does first, in whichever environment it runs."""

    def __init__(self, needs: str) -> None:
        self.needs = needs

    @classmethod
    def iot_models_begin(cls, operations: Operations, needs: str) -> None:
        """Make sure that this revision keeps its promises here, and that nothing would stop those that follow.

        Args:
            operations: Alembic's; callers leave it out.
            needs: The error message for an environment that does not do what `guarded` does.

        Raises:
            CommandError: Before anything is changed: with `needs`, or with what would stop one of the revisions of
                this run.
        """
        operations.invoke(cls(needs))


@Operations.implementation_for(Begin)
def _begin(operations: Operations, begin: Begin) -> None:
    migration = operations.get_context()
    if migration.opts.get(_LOOKED):  # our own env.py, or not the first revision of this run
        return
    options = _options()
    if migration.as_sql:
        migration.opts[_LOOKED] = True
        for statement in preamble(options):
            operations.execute(statement)
        return
    connection = operations.get_bind()
    if not (
        connection.info.get(_READY)
        and migration.opts.get("transaction_per_migration")
        and not migration._in_external_transaction  # noqa: SLF001 - Alembic says it nowhere else
    ):
        raise CommandError(begin.needs)
    stays_or_rises = look_ahead(migration, options)
    keep_for_the_owner(migration)
    with migration.autocommit_block():  # ends the transaction: who writes a parked table waits for it no longer
        pass
    if stays_or_rises:
        undo_interrupted_downgrade(migration)


def preamble(options: Mapping[str, str]) -> Iterator[str]:
    """The statements by which printed SQL begins: what `ready` does where a database can be asked."""
    lock_timeout = options.get("lock_timeout", LOCK_TIMEOUT)
    yield f"SET lock_timeout = '{lock_timeout}'"
    yield in_sql(options.get("schema"))
    yield from rights_taken_in_sql()
    yield refusal_in_sql()
    # No query, whose result psql would print.
    yield f"DO $$ BEGIN\n  PERFORM {set_all(lock_timeout).removeprefix('SELECT ')};\nEND $$"
