"""Migrations from code, and as `python -m iot_models.migrate`: without a checkout, without an ini file."""

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
    """Bring the database up to a revision while writers go on; where it stands there already, nothing happens.

    Several processes may call it at once, as the replicas of a service do: one works, the others wait for it. Progress
    goes to the logger `alembic`; nothing is printed and no logging is configured.

    Args:
        url_or_engine: A URL (None: the environment's), by the rules of `iot_models.engine.database_url`; or an engine.
            Of an engine one connection is used and then closed: the pool gets none back with other settings.
        revision: As Alembic writes them: `head`, `076`, `+1`.
        lock_timeout: How long one of five tries for a lock may hold writers up: `500ms`, `10s`. None: 4 seconds.

    Raises:
        CommandError: From `alembic.util`: it was refused, or cannot be done now. The message says what to do.
        sqlalchemy.exc.DBAPIError: If PostgreSQL refuses a statement, for lack of a right for example.

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
    """Take the database back to a revision while writers go on. Nothing is lost but what is thrown away by name.

    Args:
        url_or_engine: As for `upgrade`.
        revision: As Alembic writes them: `075`, `-1`, `base`.
        shadow: `discard` throws the shadows away. None parks them, and the next upgrade puts them back.
        device_state: `drop` lets a downgrade to `base` drop a table that holds rows. None refuses that.
        lock_timeout: As for `upgrade`.

    Raises:
        CommandError: As for `upgrade`.
        sqlalchemy.exc.DBAPIError: As for `upgrade`.
    """
    options = {"shadow": shadow, "device_state": device_state, "lock_timeout": lock_timeout}
    runner.run(command.downgrade, url_or_engine, revision, options)


def current(url_or_engine: Target = None) -> str | None:
    """The revision at which the database stands; None before the first. A deployer at work is not waited for.

    Raises:
        CommandError: As for `upgrade`.
        sqlalchemy.exc.DBAPIError: As for `upgrade`.
    """
    return runner.ask(url_or_engine, {}, lambda revision, _: revision)


def check(url_or_engine: Target = None) -> list[str]:
    """What keeps the database from standing at head with a schema that equals the models, a sentence each.

    Empty if nothing does. What a team added of its own is no difference. The schema is compared at head only: anywhere
    else it has to differ. A deployer at work is not waited for, and no lock is taken that writers could wait behind.

    Raises:
        CommandError: As for `upgrade`; or the role lacks TEMP on the database, which comparing needs.
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
    """The SQL from one revision to another, up or down, for `psql -v ON_ERROR_STOP=1`. No database is asked.

    Args:
        revision_range: `FROM:TO`: `075:076`, `base:head`, `076:075`.
        shadow: As for `downgrade`.
        device_state: As for `downgrade`.
        lock_timeout: As for `upgrade`.

    Raises:
        CommandError: If it is no range of revisions, or an option is wrong.
    """
    return runner.sql(revision_range, {"shadow": shadow, "device_state": device_state, "lock_timeout": lock_timeout})


if __name__ == "__main__":
    sys.exit(main())
