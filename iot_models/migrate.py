"""Migrations from code, and as `python -m iot_models.migrate`. Neither needs a checkout or an ini file."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

from alembic import command

from iot_models._migrations import findings, runner
from iot_models._migrations.autogenerate import include_object, including
from iot_models._migrations.command_line import main
from iot_models._migrations.environment import guarded

if TYPE_CHECKING:
    from iot_models._migrations.targets import Target

__all__ = ["check", "current", "downgrade", "guarded", "include_object", "including", "main", "sql", "upgrade"]


def upgrade(
    target: Target = None, revision: str = "head", *, schema: str | None = None, lock_timeout: str | None = None
) -> None:
    """Upgrade the database to a revision while writers go on. If it is at that revision already, nothing happens.

    Several processes may call this at the same time, as the replicas of a service do: one upgrades, and the others wait
    for it. Progress goes to the logger `alembic`. Nothing is printed, and logging is not configured.

    Args:
        target: A URL (None: the environment's), by the rules of `iot_models.engine.database_url`; an engine, of
            which one connection is used and then closed, so that no connection with other settings returns to its
            pool; or a connection that is not in a transaction, which has its own settings again afterwards. From
            asyncio: `await connection.run_sync(migrate.upgrade)`.
        revision: As in Alembic: `head`, `076`, `+1`.
        schema: The schema of `device_state`. None: what `schema_translate_map` of the engine says, else the first
            schema of the search path that has the table, else the first.
        lock_timeout: How long writers may have to wait for one of five tries for a lock: `500ms`, `10s`. None: 4
            seconds.

    Raises:
        CommandError: From `alembic.util`: the upgrade is refused, or cannot run now. The message says what to do.
        sqlalchemy.exc.DBAPIError: If PostgreSQL refuses a statement, for example because a privilege is missing.

    Example:
        >>> from iot_models import migrate
        >>> migrate.upgrade("postgresql://deployer@db/iotcloud", "head")
    """
    runner.run(command.upgrade, target, revision, {"schema": schema, "lock_timeout": lock_timeout})


def downgrade(
    target: Target,
    revision: str,
    *,
    schema: str | None = None,
    shadow: Literal["discard"] | None = None,
    device_state: Literal["drop"] | None = None,
    lock_timeout: str | None = None,
) -> None:
    """Downgrade the database to a revision while writers go on. It loses only what an argument tells it to discard.

    Args:
        target: As for `upgrade`.
        revision: As in Alembic: `075`, `-1`, `base`.
        schema: As for `upgrade`.
        shadow: `discard` discards the shadows. None parks them, and the next upgrade puts them back.
        device_state: `drop` lets a downgrade to `base` drop a table that has rows. None refuses that.
        lock_timeout: As for `upgrade`.

    Raises:
        CommandError: As for `upgrade`.
        sqlalchemy.exc.DBAPIError: As for `upgrade`.
    """
    options = {"schema": schema, "shadow": shadow, "device_state": device_state, "lock_timeout": lock_timeout}
    runner.run(command.downgrade, target, revision, options)


def current(target: Target = None, *, schema: str | None = None) -> str | None:
    """The revision of the database; None before the first. Another deployer is not waited for.

    Args:
        target: As for `upgrade`.
        schema: As for `upgrade`.

    Raises:
        CommandError: As for `upgrade`.
        sqlalchemy.exc.DBAPIError: As for `upgrade`.
    """
    return runner.ask(target, {"schema": schema}, lambda revision, _: revision)


def check(target: Target = None, *, schema: str | None = None) -> list[str]:
    """Why the database is not at head or its schema does not equal the models, a sentence each; empty if all is well.

    What a team added to the table is not a difference. The schema is compared at head only, because at any other
    revision it has to differ. Another deployer is not waited for, and no lock is taken that a writer could wait for.

    Args:
        target: As for `upgrade`.
        schema: As for `upgrade`.

    Raises:
        CommandError: As for `upgrade`; or if the role lacks TEMP on the database, which the comparison needs.
        sqlalchemy.exc.DBAPIError: As for `upgrade`.
    """
    return findings.examine(target, {"schema": schema}).problems


def sql(
    revision_range: str,
    *,
    schema: str | None = None,
    shadow: Literal["discard"] | None = None,
    device_state: Literal["drop"] | None = None,
    lock_timeout: str | None = None,
) -> str:
    """The SQL from one revision to another, up or down, for `psql -v ON_ERROR_STOP=1`. It needs no database.

    Args:
        revision_range: `FROM:TO`: `075:076`, `base:head`, `076:075`.
        schema: As for `upgrade`; None: what the search path says where the SQL runs.
        shadow: As for `downgrade`.
        device_state: As for `downgrade`.
        lock_timeout: As for `upgrade`.

    Raises:
        CommandError: If it is not a range of revisions, or an option is wrong.
    """
    options = {"schema": schema, "shadow": shadow, "device_state": device_state, "lock_timeout": lock_timeout}
    return runner.sql(revision_range, options)


if __name__ == "__main__":
    sys.exit(main())
