"""The command line of `python -m iot_models.testing.load`.

What a run needs is imported when it runs: a wrong command line is answered without SQLAlchemy.
"""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Final, NoReturn

if TYPE_CHECKING:
    from collections.abc import Sequence

_PROG: Final = "python -m iot_models.testing.load"
_EPILOG: Final = f"""\
examples:
  {_PROG} --devices 100000 --rate 5000
  {_PROG} --rate 20000 --tenants 8 --connections 8 --desired-rate 50 --json
  {_PROG} --throwaway --seconds 5              no database at hand: how it looks

The URL comes from --url, else IOT_MODELS_DATABASE_URL, else DATABASE_URL; the database has to be migrated. Another
schema: ?options=-csearch_path%3Diot in the URL.
Not for a database in production: it takes what the load takes. The devices are in tenants named load-..., and are
deleted at the end, also after Ctrl-C; the space that they took is free after the next (auto)vacuum.
Exit codes: 0 the rate was reached; 1 it was not, or an error; 2 wrong usage; 130 interrupted (128 + the signal)."""
_MAY_BE_SAID: Final = re.compile(
    r"(argument [^\s:]+: )?(expected one argument$|a (whole )?number .*|ignored explicit argument"
    r"|invalid choice(?=: (?s:.*)( \(choose from .*))|unrecognized arguments|not allowed with argument .*)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; argparse itself exits, with 2 for wrong usage and 0 after help."""
    given = _parser().parse_args(argv)
    from iot_models.testing.load import run  # noqa: PLC0415 - loads SQLAlchemy

    return run.run(given)


class _Parser(argparse.ArgumentParser):
    """It does not repeat what it is given: that may be a URL with its password."""

    def error(self, message: str) -> NoReturn:
        may_be_said = _MAY_BE_SAID.match(message)
        super().error("".join(filter(None, may_be_said.group(0, 4))) if may_be_said else "this is not understood")


def _whole(given: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", given) or not int(given):
        raise argparse.ArgumentTypeError("a whole number from 1 on is expected")
    return int(given)


def _number(given: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", given):
        raise argparse.ArgumentTypeError("a number is expected, such as 5000 or 0.5")
    return float(given)


def _positive(given: str) -> float:
    if not (number := _number(given)):
        raise argparse.ArgumentTypeError("a number above 0 is expected")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=_PROG,
        description=(
            "Write reports to a database of yours at a rate, through ReportBuffer, and say what it took:\n"
            "throughput, latency, and what the bottleneck is."
        ),
        epilog=_EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", help="the database: postgresql://user:password@host:5432/database")
    where.add_argument(
        "--throwaway",
        action="store_true",
        help="a server of its own, which does not wait for its disk and is gone afterwards",
    )
    parser.add_argument("--driver", choices=("psycopg", "asyncpg"), help="instead of the one that the URL names")
    for flag, metavar, kind, default, what in (
        ("--devices", "N", _whole, 10_000, "how many devices"),
        ("--rate", "N", _positive, 1000.0, "reports a second"),
        ("--seconds", "N", _positive, 60.0, "for how long"),
        ("--desired-rate", "N", _number, 0.0, "desired writes a second, each a transaction"),
        ("--keys", "N", _whole, 20, "keys of a document"),
        ("--tenants", "N", _whole, 1, "how many tenants share the devices; a tenant's batches are written in turn"),
        ("--connections", "N", _whole, 5, "size of the connection pool"),
        ("--max-batch", "N", _whole, 1000, "how many reports a batch has at most"),
        ("--max-delay-ms", "N", _number, 20.0, "how long a report waits for others at most"),
    ):
        parser.add_argument(flag, metavar=metavar, type=kind, default=default, help=f"{what} (default {default:g})")
    for flag, what in (
        ("--bind-tenant", "bind each transaction to its tenant, for row level security"),
        ("--json", "print one JSON document, for scripts"),
    ):
        parser.add_argument(flag, action="store_true", help=what)
    return parser
