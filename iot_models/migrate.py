"""Migrations from code, and as `python -m iot_models.migrate`: without a checkout, without an ini file."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from alembic import command
from alembic.util import CommandError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from iot_models._migrations import comparison, runner

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy import Connection

    from iot_models._migrations.runner import Options, Target

_COMMAND: Final = "python -m iot_models.migrate"
_INTERRUPTED: Final = 130  # what a shell makes of Ctrl-C


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
    return _examine(url_or_engine, {}).problems


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
    return _sql(revision_range, {"shadow": shadow, "device_state": device_state, "lock_timeout": lock_timeout})


def _sql(revision_range: str, options: Options) -> str:
    first, _, last = revision_range.partition(":")
    if not (first and last):
        raise CommandError(f"{revision_range!r} is no range of revisions: write FROM:TO, as in 075:076 or 076:075")
    order = ["base", *runner.revisions()]
    start, end = (order.index(runner.resolve(name)) for name in (first, last))
    return runner.offline(command.upgrade if start <= end else command.downgrade, revision_range, options)


@dataclass(frozen=True, slots=True)
class _Findings:
    problems: list[str]
    verdict: str
    note: str | None


def _examine(target: Target, options: Options) -> _Findings:
    known = runner.revisions()
    head = known[-1]

    def examine(revision: str | None, connection: Connection) -> _Findings:
        database = f"database {connection.scalar(text('SELECT current_database()'))}"
        parked = comparison.parked_shadows(connection)
        below = revision in {None, *known[: known.index("076")]}
        stays = "the next upgrade puts them back" if below else "their devices are gone or have a newer shadow"
        return _Findings(
            problems=[
                *([] if revision == head else [f"{database} {_elsewhere(revision, known)}"]),
                *(f"{database}: {found}" for found in comparison.interrupted_rollback(connection)),
                *(comparison.differences(connection) if revision == head else []),
            ],
            verdict=f"{database} stands at head ({head}) and equals the models",
            note=None if parked is None else f"shadows parked in {comparison.PARKED}: {parked:,}; {stays}",
        )

    return runner.ask(target, options, examine)


def _elsewhere(revision: str | None, known: list[str]) -> str:
    if revision is None:
        return f"was never migrated by Alembic, head is {known[-1]}: run {_COMMAND} upgrade head"
    if revision in known:
        return f"stands at {revision}, head is {known[-1]}: run {_COMMAND} upgrade head"
    return (
        f"stands at {revision}, which is unknown here, where head is {known[-1]}: "
        "a newer iot_models migrated it, or the Alembic of another application"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 1 for a failure, 130 for Ctrl-C; 2 is argparse's, for misuse."""
    given = _parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, format="%(levelname)-5.5s [%(name)s] %(message)s")
    logging.getLogger("alembic").setLevel(given.level)
    options = dict(option.partition("=")[::2] for option in given.before + given.after)
    try:
        code, lines = given.run(given, options.pop("url", None), options)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: running the same command again goes on from there\n")
        return _INTERRUPTED
    except CommandError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except DBAPIError as error:
        sys.stderr.write(f"error: PostgreSQL says: {str(error.orig).strip()}\n")
        return 1
    sys.stdout.write(lines)
    return int(code)


# Each of these takes the command line, the URL and the other options; it gives the exit code and what to print.


def _run_move(given: argparse.Namespace, url: str | None, options: Options) -> tuple[int, str]:
    if given.sql:
        return 0, runner.offline(given.move, given.revision, options)
    runner.run(given.move, url, given.revision, options)
    return 0, ""


def _run_current(_: argparse.Namespace, url: str | None, options: Options) -> tuple[int, str]:
    revision = runner.ask(url, options, lambda revision, _: revision)
    return 0, f"{revision or '<base>'}{' (head)' if revision == runner.revisions()[-1] else ''}\n"


def _run_history(_: argparse.Namespace, __: str | None, ___: Options) -> tuple[int, str]:
    return 0, runner.history()


def _run_check(_: argparse.Namespace, url: str | None, options: Options) -> tuple[int, str]:
    findings = _examine(url, options)
    if findings.note:
        sys.stderr.write(f"note: {findings.note}\n")
    lines = findings.problems or [findings.verdict]
    return (1 if findings.problems else 0), "".join(f"{line}\n" for line in lines)


def _run_sql(given: argparse.Namespace, _: str | None, options: Options) -> tuple[int, str]:
    return 0, _sql(given.range, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_COMMAND,
        description="Migrate the table device_state while writers go on, and back. Any command may be run again.",
        epilog=f"""\
examples:
  {_COMMAND} upgrade head --url postgresql://deployer@db/iotcloud
  {_COMMAND} downgrade 075               shadows are parked; the next upgrade puts them back
  {_COMMAND} check || exit 1             in a deployment, before the new code starts
  {_COMMAND} sql 075:head | psql -v ON_ERROR_STOP=1

The URL comes from --url, else IOT_MODELS_DATABASE_URL, else DATABASE_URL.
Exit codes: 0 done, 1 refused or failed or a difference found, 2 wrong usage, 130 interrupted.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_options(parser, dest="before")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, summary: str, run: Callable[..., tuple[int, str]]) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary)
        _add_options(added, dest="after")
        added.set_defaults(run=run, level=logging.WARNING)
        return added

    up = add("upgrade", "bring the database up to a revision", _run_move)
    up.add_argument("revision", nargs="?", default="head", help="head (the default), 076, +1; FROM:TO with --sql")
    up.set_defaults(move=command.upgrade, level=logging.INFO)
    down = add("downgrade", "take the database back to a revision, and park the shadows", _run_move)
    down.add_argument("revision", help="075, -1, base; FROM:TO with --sql")
    down.set_defaults(move=command.downgrade, level=logging.INFO)
    for move in (up, down):
        move.add_argument("--sql", action="store_true", help="print the SQL, and ask no database")
    add("current", "print the revision at which the database stands", _run_current)
    add("history", "print the revisions, the newest first", _run_history)
    add("check", "say whether the database stands at head and equals the models: exit code 0 or 1", _run_check)
    offline = add("sql", "print the SQL from one revision to another, and ask no database", _run_sql)
    offline.add_argument("range", metavar="FROM:TO", help="075:076, base:head, or downwards: 076:075")
    for discarding in (down, offline):
        _add_option(discarding, "--shadow", "after", "discard", "throw the shadows away instead of parking them")
        _add_option(discarding, "--device-state", "after", "drop", "to base: drop the table though it holds rows")
    return parser


def _add_options(parser: argparse.ArgumentParser, dest: str) -> None:
    parser.set_defaults(**{dest: []})
    _add_option(parser, "--url", dest, "URL", "the database: postgresql://user:password@host:5432/database")
    _add_option(parser, "--lock-timeout", dest, "TIME", "how long one try for a lock may hold writers up (default 4s)")
    parser.add_argument(
        "-x", action="append", dest=dest, metavar="NAME=VALUE", help="an option as Alembic's own command takes it"
    )


def _add_option(parser: argparse.ArgumentParser, name: str, dest: str, value: str, meaning: str) -> None:
    """Another way to write `-x name=value`; alembic/env.py says which values there are."""
    written = f"{name.strip('-').replace('-', '_')}={{}}".format
    parser.add_argument(name, action="append", dest=dest, type=written, metavar=value, help=meaning)


if __name__ == "__main__":
    sys.exit(main())
