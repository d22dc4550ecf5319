"""The options of a migration: `-x name=value` for Alembic's command, `--name value` for ours."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from alembic.util import CommandError

if TYPE_CHECKING:
    from collections.abc import Mapping

# As a caller gives them; None: not given.
Options: TypeAlias = "Mapping[str, str | None]"


class Option(NamedTuple):
    """One option: a pattern for its values, and the texts for its error message and its help."""

    pattern: str
    expected: str
    metavar: str
    help: str


LOCK_TIMEOUT: Final = "4s"
OPTIONS: Final = {
    "url": Option(
        r"(?s:.+)",  # any text: only database_url refuses a URL without showing its password
        "a database URL",
        "URL",
        "the database: postgresql://user:password@host:5432/database",
    ),
    "schema": Option(
        r"(?!pg_|information_schema$|(?s:.*)(://|password))(?s:.{1,63})",  # no URL, which an error would show
        "the name of a schema that is not PostgreSQL's own",
        "SCHEMA",
        "the schema of device_state (default: the first of the search path that has it, else the first)",
    ),
    "lock_timeout": Option(
        r"[1-9]\d*(ms|s|min)",
        "how long one try for a lock may hold writers up: 500ms, 4s",
        "TIME",
        f"how long one try for a lock may hold writers up (default {LOCK_TIMEOUT})",
    ),
    "shadow": Option(
        r"discard",
        "discard: a downgrade below 076 throws the shadows away",
        "discard",
        "throw the shadows away instead of parking them",
    ),
    "device_state": Option(
        r"drop",
        "drop: a downgrade to base drops the table with its rows",
        "drop",
        "to base: drop the table though it holds rows",
    ),
}


def require_known(given: Mapping[str, str]) -> None:
    """Refuse an unknown option or a value that an option does not take.

    Raises:
        CommandError: If there is one. The message says what would be right.
    """
    for name, value in given.items():
        # No value is shown, and no name that is none: it may be a URL with its password.
        if name not in OPTIONS:
            unknown = f"{name}: unknown" if name.isidentifier() else "NAME=VALUE is expected"
            raise CommandError(f"-x {unknown}; there are {', '.join(OPTIONS)}")
        if not re.fullmatch(OPTIONS[name].pattern, value):
            raise CommandError(f"-x {name}=...: expected {OPTIONS[name].expected}")
