"""Migrations from code, and as `python -m iot_models.migrate`. Neither needs a checkout or an ini file."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

from alembic import command

from iot_models._migrations import findings, runner
from iot_models._migrations.command_line import main

if TYPE_CHECKING:
    from iot_models._migrations.targets import Target

__all__ = ["check", "current", "downgrade", "main", "sql", "upgrade"]


def upgrade(url_or_engine: Target = None, revision: str = "head", *, lock_timeout: str | None = None) -> None:
    """Upgrade the database to a revision while writers go on. If it is at that revision already, nothing happens.

    Several processes may call this at the same time, as the replicas of a service do: one upgrades, and the others wait
    for it. Progress goes to the logger `alembic`. Nothing is printed, and logging is not configured.

    Args:
        url_or_engine: A URL (None: the environment's), by the rules of `iot_models.engine.database_url`; or an engine.
            Of an engine one connection is used and then closed, so that no connection with other settings returns to
            its pool.
        revision: As in Alembic: `head`, `076`, `+1`.
        lock_timeout: How long writers may have to wait for one of five tries for a lock: `500ms`, `10s`. None: 4
            seconds.

    Raises:
        CommandError: From `alembic.util`: the upgrade is refused, or cannot run now. The message says what to do.
        sqlalchemy.exc.DBAPIError: If PostgreSQL refuses a statement, for example because a privilege is missing.

    Example:
        >>> from iot_models import migrate
        >>> migrate.upgrade("postgresql://deployer@db/iotcloud", "head")
    """
    runner.run(command.upgrade, url_or_engine, revision, {"lock_timeout": lock_timeout})


def downgrade(
    url_or_engine: Target,
    revision: str,
    *,
    shadow: Literal["discard"] | None = None,
    device_state: Literal["drop"] | None = None,
    lock_timeout: str | None = None,
) -> None:
    """Downgrade the database to a revision while writers go on. It loses only what an argument tells it to discard.

    Args:
        url_or_engine: As for `upgrade`.
        revision: As in Alembic: `075`, `-1`, `base`.
        shadow: `discard` discards the shadows. None parks them, and the next upgrade puts them back.
        device_state: `drop` lets a downgrade to `base` drop a table that has rows. None refuses that.
        lock_timeout: As for `upgrade`.

    Raises:
        CommandError: As for `upgrade`.
        sqlalchemy.exc.DBAPIError: As for `upgrade`.
    """
    options = {"shadow": shadow, "device_state": device_state, "lock_timeout": lock_timeout}
    runner.run(command.downgrade, url_or_engine, revision, options)


def current(url_or_engine: Target = None) -> str | None:
    """The revision of the database; None before the first. Another deployer is not waited for.

    Raises:
        CommandError: As for `upgrade`.
        sqlalchemy.exc.DBAPIError: As for `upgrade`.
    """
    return runner.ask(url_or_engine, {}, lambda revision, _: revision)


def check(url_or_engine: Target = None) -> list[str]:
    """Why the database is not at head or its schema does not equal the models, a sentence each; empty if all is well.

    What a team added to the table is not a difference. The schema is compared at head only, because at any other
    revision it has to differ. Another deployer is not waited for, and no lock is taken that a writer could wait for.

    Raises:
        CommandError: As for `upgrade`; or if the role lacks TEMP on the database, which the comparison needs.
        sqlalchemy.exc.DBAPIError: As for `upgrade`.
    """
    return findings.examine(url_or_engine, {}).problems


def sql(
    revision_range: str,
    *,
    shadow: Literal["discard"] | None = None,
    device_state: Literal["drop"] | None = None,
    lock_timeout: str | None = None,
) -> str:
    """The SQL from one revision to another, up or down, for `psql -v ON_ERROR_STOP=1`. It needs no database.

    Args:
        revision_range: `FROM:TO`: `075:076`, `base:head`, `076:075`.
        shadow: As for `downgrade`.
        device_state: As for `downgrade`.
        lock_timeout: As for `upgrade`.

    Raises:
        CommandError: If it is not a range of revisions, or an option is wrong.
    """
    return runner.sql(revision_range, {"shadow": shadow, "device_state": device_state, "lock_timeout": lock_timeout})


if __name__ == "__main__":
    sys.exit(main())
