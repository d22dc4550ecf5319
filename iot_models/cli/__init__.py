"""The operator's command `iot-models`, or `python -m iot_models`: reads and writes shadows by `ShadowService`.

This module knows the command line only. What a command needs is imported when it runs: a wrong command line is answered
without SQLAlchemy, and only `migrate` loads Alembic.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

from iot_models._core.shown_names import looks_like_a_secret

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_PROG: Final = "iot-models"
_TENANT_VARIABLE: Final = "IOT_MODELS_TENANT"
_INTERRUPTED: Final = 130  # the exit code of a shell after Ctrl-C
_PIPE_CLOSED: Final = 141  # and after a program that wrote to a pipe which nobody reads any more
_EPILOG: Final = f"""\
examples:
  export {_TENANT_VARIABLE}=acme IOT_MODELS_DATABASE_URL=postgresql://operator@db/iotcloud
  {_PROG} show t-1                        how it stands, in one sentence, and its documents
  {_PROG} history t-1                     who wrote what, when and why
  {_PROG} diff t-1 6 7                    what version 7 changed
  {_PROG} restore t-1 6 --reason "7 does not boot"
  {_PROG} pending --json | jq -r '.[].device_id'

`{_PROG} COMMAND --help` says more. The URL comes from --url, else IOT_MODELS_DATABASE_URL, else DATABASE_URL.
A command that writes shows what would change and asks, and then writes on top of what it showed only.
Exit codes: 0 done; 1 refused by the service or the database, or declined; 2 wrong usage; 130 interrupted."""
# What argparse says before it repeats what was given.
_REPEATING: Final = re.compile(r"(unrecognized arguments|invalid choice|ignored explicit argument)(?s:.*)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; argparse itself exits, with 2 for wrong usage and 0 after help."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments:
        _parser().print_help(sys.stderr)
        return 2
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer goes nowhere. Otherwise Python complains about it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except OSError as error:  # of the output: a full disk
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\n")  # the shell's prompt begins a line of its own
        return _INTERRUPTED
    return code


def _run(arguments: list[str]) -> int:
    if arguments[0] == "migrate":
        from iot_models import migrate  # noqa: PLC0415 - loads Alembic

        return migrate.main(arguments[1:])
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.command == "migrate":
        parser.error(f"the options of migrate stand behind it: {_PROG} migrate COMMAND --url URL")
    # An error about the device would repeat it, and the history would keep it.
    for name, value in vars(given).items():
        if name != "url" and isinstance(value, str) and looks_like_a_secret(value):
            of = name.replace("_", " ")
            parser.error(f"the {of} looks like the URL of a database, or a password: pass a URL as --url")
    if not given.tenant:
        parser.error(f"the tenant is missing: pass --tenant, or set {_TENANT_VARIABLE}")
    if given.writes and not given.yes and not (sys.stdin and sys.stdin.isatty()):
        parser.error(f"{given.command} asks before it writes, and there is no terminal to ask on: pass --yes")
    from iot_models.cli import commands  # noqa: PLC0415 - loads SQLAlchemy

    return commands.run(given)


class _Parser(argparse.ArgumentParser):
    """It does not repeat what it is given: that may be a URL with its password, or a document."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        super().error(_REPEATING.sub(rf"\1: {self.prog} --help says what there is", message))


def _whole(least: int) -> Any:
    def read(given: str) -> int:
        # The service refuses what is too large, and says so. int() refuses thousands of digits by another error.
        if not re.fullmatch(r"[0-9]{1,30}", given) or int(given) < least:
            raise argparse.ArgumentTypeError(f"a whole number from {least} on is expected")
        return int(given)

    return read


def _document(given: str) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON value")

    try:
        document: Any = json.loads(given, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(document, dict):
        raise argparse.ArgumentTypeError("""a JSON object is expected, such as '{"mode": "eco"}'""")
    return cast("dict[str, Any]", document)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=_PROG, description="Read and write the shadows of one tenant's devices.", epilog=_EPILOG)
    _add_common(parser)
    parser.set_defaults(url=None, tenant=os.environ.get(_TENANT_VARIABLE), json=False, bind_tenant=False, writes=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="command")

    def add(name: str, summary: str, example: str, *positionals: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary, epilog=f"example:\n  {_PROG} {example}")
        for positional in positionals:
            added.add_argument(positional, **_POSITIONALS[positional])
        _add_common(added)
        return added

    add("show", "how a device stands, and why", "show t-1", "device")
    for name, which in (
        ("pending", "have yet to acknowledge the newest version"),
        ("drifted", "acknowledged the newest version and run something else"),
        ("refused", "refuse the newest version, and why"),
    ):
        page = add(name, f"the devices that {which}", f"{name} --limit 20 --after t-1")
        _add_limit(page)
        page.add_argument("--after", metavar="DEVICE", help="those behind this one: the last one of the page before")
    add("counts", "how many devices are synced, pending, stale and refused", "counts --json")
    history = add(
        "history", "the versions of a device, the newest first: who, when, why", "history t-1 --limit 10", "device"
    )
    _add_limit(history)
    history.add_argument(
        "--before", metavar="VERSION", type=_whole(0), help="those before this one: the last one of the page before"
    )
    add("diff", "what version V2 of a device added, removed and changed over V1", "diff t-1 6 7", "device", "v1", "v2")
    restore = add(
        "restore",
        "make a device what it was at an earlier version, as a new version",
        'restore t-1 6 --reason "7 does not boot"',
        "device",
        "version",
    )
    patch = add(
        "patch",
        "apply an RFC 7396 merge patch to what a device should be; null removes a key",
        """patch t-1 '{"mode": "eco", "fan": {"speed": null}}' --reason "quiet at night\"""",
        "device",
        "patch",
    )
    register = add(
        "register", "make a device; one that is there stays as it is", "register t-9 berlin", "device", "site"
    )
    remove = add("remove", "delete a device; its history stays", "remove t-9 --reason scrapped", "device")
    _add_write_options(restore, "reason", "expected_version", "request_id")
    _add_write_options(patch, "reason", "expected_version", "request_id")
    _add_write_options(register)
    _add_write_options(remove, "reason", "expected_version")
    commands.add_parser(
        "migrate",
        help="migrate the database: all that stands behind it goes to `python -m iot_models.migrate`",
    ).add_argument("rest", nargs=argparse.REMAINDER)
    return parser


_POSITIONALS: Final[dict[str, dict[str, Any]]] = {
    "device": {"metavar": "DEVICE", "help": "the id of the device; -- before one that begins with -"},
    "site": {"metavar": "SITE", "help": "the id of the site where it stands"},
    "version": {"metavar": "VERSION", "type": _whole(0), "help": "a version that `history` lists"},
    "v1": {"metavar": "V1", "type": _whole(0), "help": "the version to compare with"},
    "v2": {"metavar": "V2", "type": _whole(0), "help": "the version to look at"},
    "patch": {"metavar": "JSON", "type": _document, "help": "the patch, a JSON object"},
}
_WRITE_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "reason": {"metavar": "TEXT", "help": "why, for the history"},
    "expected_version": {
        "metavar": "VERSION",
        "type": _whole(0),
        "help": "write on top of this version only (default: the one that is shown)",
    },
    "request_id": {
        "metavar": "ID",
        "help": "an id of this request: repeated with it, the command writes nothing twice",
    },
}


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command, which may stand before the command or behind it.

    They have no default here: that of a command would replace what stands before it.
    """
    parser.add_argument(
        "--url", default=argparse.SUPPRESS, help="the database: postgresql://user:password@host:5432/database"
    )
    parser.add_argument(
        "--tenant", default=argparse.SUPPRESS, help=f"the tenant whose devices these are (default: {_TENANT_VARIABLE})"
    )
    for flag, effect in (
        ("--json", "print one JSON document, for scripts"),
        ("--bind-tenant", "bind each transaction to the tenant, for row level security"),
    ):
        parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=effect)


def _add_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", metavar="N", type=_whole(1), default=100, help="how many at most (default 100)")


def _add_write_options(parser: argparse.ArgumentParser, *names: str) -> None:
    parser.set_defaults(writes=True)
    parser.add_argument("--yes", action="store_true", help="write without asking")
    parser.add_argument("--actor", metavar="NAME", help="who writes, for the history (default: who is logged in)")
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}", **_WRITE_OPTIONS[name])
