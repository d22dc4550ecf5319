"""The settings of a session that our statements depend on, whatever the server, the role and the environment say."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# DateStyle: psycopg reads times in ISO only. TimeZone: in another one, the first and the last day that Python knows
# cannot be read.
PINNED: Final[Mapping[str, str]] = {"DateStyle": "ISO", "TimeZone": "UTC"}
# psycopg and asyncpg send and read text in this encoding; in another one, some of it cannot be sent.
CLIENT_ENCODING: Final = "utf8"

_NAMES_OF_UTF8: Final = frozenset({"utf8", "unicode"})
_ORDERS_OF_DATES: Final = frozenset({"dmy", "european", "euro", "mdy", "noneuro", "noneuropean", "us", "ymd"})


def settings_in(options: str) -> dict[str, str]:
    r"""Read the settings in libpq's `options`, as the server does; their names are in lower case.

    Example:
        >>> settings_in(r"-c DateStyle=ISO,\ DMY --work-mem=5MB")
        {'datestyle': 'ISO, DMY', 'work_mem': '5MB'}
    """
    return dict(_settings_in(options))


def _settings_in(options: str) -> Iterator[tuple[str, str]]:
    words = (re.sub(r"\\(.)", r"\1", word) for word in re.findall(r"(?:\\.|[^\s\\])+", options))
    for word in words:
        setting = next(words, "") if word == "-c" else re.sub("^(-c|--)", "", word)
        name, _, value = setting.partition("=")
        yield name.replace("-", "_").lower(), value


def require_readable(settings: Mapping[str, str]) -> None:
    """Make sure that no setting keeps our statements from reading what the server sends.

    Args:
        settings: By name, in any case.

    Raises:
        ValueError: If one of them does.
    """
    for name, value in settings.items():
        words = set(re.split(r"[\s,]+", value.strip().lower()))
        if name.lower() == "datestyle" and "iso" not in words and not words <= _ORDERS_OF_DATES:
            raise ValueError(
                "DateStyle must be ISO, because psycopg reads times in no other style: leave it out of the URL and of "
                "connect_args"
            )
        if name.lower() == "client_encoding" and re.sub(r"[\W_]", "", value.lower()) not in _NAMES_OF_UTF8:
            raise ValueError(
                "client_encoding must be UTF8, because in another encoding some documents cannot be sent or read: "
                "leave it out of the URL and of connect_args"
            )


def pinned(settings: Mapping[str, str]) -> dict[str, str]:
    """Return the settings to give each connection: ours, but not the time zone if the caller sets one.

    Args:
        settings: What the caller sets, by name, in any case. `require_readable` has accepted it.
    """
    theirs = {name.lower() for name in settings}
    return {name: value for name, value in PINNED.items() if name != "TimeZone" or "timezone" not in theirs}
