"""The command line of `python -m iot_models.migrate`, which needs no checkout and no ini file."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from typing import TYPE_CHECKING, Any, Final, NoReturn

from alembic import command
from alembic.util import CommandError
from sqlalchemy.exc import DBAPIError

from iot_models._core.shown_names import escaped, looks_like_a_secret
from iot_models._migrations import runner
from iot_models._migrations.findings import COMMAND, examine
from iot_models._migrations.options import OPTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from iot_models._migrations.options import Options

_INTERRUPTED: Final = 130  # the exit code of a shell after Ctrl-C
_HOW_TO_FIT: Final = """\
if the upgrade says that device_state is not the table that it expects (X is a column, D a default):
  column X is missing           ALTER TABLE device_state ADD COLUMN X, with the expected definition
  another type is expected      ALTER TABLE device_state ALTER X TYPE: rewrites the table under a lock
  NOT NULL is expected          replace the NULLs, then ADD CONSTRAINT c CHECK (X IS NOT NULL) NOT VALID,
                                VALIDATE CONSTRAINT c, ALTER X SET NOT NULL
  its NOT NULL is NOT VALID     replace the NULLs, then ALTER TABLE device_state VALIDATE CONSTRAINT, as it says
  DEFAULT D is expected         ALTER TABLE device_state ALTER X SET DEFAULT D
  nondeterministic collation    ALTER TABLE device_state ALTER X TYPE text COLLATE "default", in a quiet hour
  another primary key           CREATE UNIQUE INDEX CONCURRENTLY i ON device_state (tenant_id, device_id), then
                                DROP CONSTRAINT of the old one, ADD PRIMARY KEY USING INDEX i
  another index has the name    ALTER INDEX ... RENAME TO ...; the upgrade builds the expected one
  no table                      a view or a foreign table cannot be migrated; a partitioned table can"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 1 for a failure, 130 for Ctrl-C. argparse exits with 2 itself."""
    given = _parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, format="%(levelname)-5.5s [%(name)s] %(message)s")
    logging.getLogger("alembic").setLevel(given.level)
    options = dict(option.partition("=")[::2] for option in given.before + given.after)
    try:
        code, lines = given.run(given, options.pop("url", None), options)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: run the same command again to continue from there\n")
        return _INTERRUPTED
    except CommandError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except DBAPIError as error:
        said = "\n".join(map(escaped, str(error.orig).strip().split("\n")))
        sys.stderr.write(f"error: PostgreSQL says: {said}\n")
        return 1
    sys.stdout.write(lines)
    return int(code)


# Each of these takes the parsed command line, the URL and the other options, and returns the exit code and the output.


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


def _run_check(given: argparse.Namespace, url: str | None, options: Options) -> tuple[int, str]:
    found = examine(url, options, roles=given.tenancy)
    sys.stderr.write("".join(f"note: {note}\n" for note in found.notes))
    lines = found.problems or [found.verdict]
    return (1 if found.problems else 0), "".join(f"{line}\n" for line in lines)


def _run_sql(given: argparse.Namespace, _: str | None, options: Options) -> tuple[int, str]:
    return 0, runner.sql(given.range, options)


# What argparse may say of a wrong command line. In any other words it repeats what was given.
_MAY_BE_SAID: Final = re.compile(
    r"(argument [^\s:]+: )?"
    r"(expected one argument$|ignored explicit argument|invalid choice(?=: (?s:.*)( \(choose from .*))"
    r"|unrecognized arguments|not a (revision|role): .*|the following arguments are required: .*)"
)


class _Parser(argparse.ArgumentParser):
    """It does not repeat what it is given: that may be a URL with its password."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        may_be_said = _MAY_BE_SAID.match(message)
        super().error("".join(filter(None, may_be_said.group(0, 3))) if may_be_said else "this is not understood")


def _revisions(given: str) -> str:
    if not re.fullmatch(r"[\w@+-]+(:[\w@+-]+)?", given):
        raise argparse.ArgumentTypeError("not a revision: write 076, head, +1 or -1, or a range FROM:TO")
    return given


def _role(given: str) -> str:
    if looks_like_a_secret(given):
        raise argparse.ArgumentTypeError("not a role: write its name")
    return given


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=COMMAND,
        description="Migrate the table device_state while writers go on, and back. Any command may be run again.",
        epilog=f"""\
examples:
  {COMMAND} upgrade head --url postgresql://deployer@db/iotcloud
  {COMMAND} downgrade 075               shadows are parked; the next upgrade puts them back
  {COMMAND} check || exit 1             in a deployment, before the new code starts
  {COMMAND} sql 075:head | psql -v ON_ERROR_STOP=1

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
    up.add_argument(
        "revision", nargs="?", type=_revisions, default="head", help="head (the default), 076, +1; FROM:TO with --sql"
    )
    up.set_defaults(move=command.upgrade, level=logging.INFO)
    up.formatter_class = argparse.RawDescriptionHelpFormatter
    up.epilog = _HOW_TO_FIT
    down = add("downgrade", "take the database back to a revision, and park the shadows", _run_move)
    down.add_argument("revision", type=_revisions, help="075, -1, base; FROM:TO with --sql")
    down.set_defaults(move=command.downgrade, level=logging.INFO)
    for move in (up, down):
        move.add_argument("--sql", action="store_true", help="print the SQL, and ask no database")
    add("current", "print the revision at which the database stands", _run_current)
    add("history", "print the revisions, the newest first", _run_history)
    checked = add(
        "check", "say whether the database stands at head and equals the models: exit code 0 or 1", _run_check
    )
    checked.add_argument(
        "--tenancy",
        action="append",
        default=[],
        metavar="ROLE",
        type=_role,
        help="and whether row level security limits this role to one tenant, as tenancy.enable left it",
    )
    offline = add("sql", "print the SQL from one revision to another, and ask no database", _run_sql)
    offline.add_argument("range", type=_revisions, metavar="FROM:TO", help="075:076, base:head, or downwards: 076:075")
    for discarding in (down, offline):
        _add_option(discarding, "shadow", "after")
        _add_option(discarding, "device_state", "after")
    return parser


def _add_options(parser: argparse.ArgumentParser, dest: str) -> None:
    parser.set_defaults(**{dest: []})
    for name in ("url", "schema", "lock_timeout"):
        _add_option(parser, name, dest)
    parser.add_argument(
        "-x", action="append", dest=dest, metavar="NAME=VALUE", help="an option as Alembic's own command takes it"
    )


def _add_option(parser: argparse.ArgumentParser, name: str, dest: str) -> None:
    """Add `--name value`, another way to write `-x name=value`."""
    option = OPTIONS[name]
    parser.add_argument(
        f"--{name.replace('_', '-')}",
        action="append",
        dest=dest,
        type=f"{name}={{}}".format,
        metavar=option.metavar,
        help=option.help,
    )
