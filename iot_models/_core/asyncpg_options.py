"""A URL for libpq, as hosts of databases give it, put into the words of asyncpg."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

from iot_models._core.server_settings import settings_in

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from sqlalchemy import URL

# asyncpg knows these in a URL of its own only. It reads there what libpq reads.
_IN_A_DSN: Final = frozenset(
    {
        "sslcert",
        "sslcrl",
        "sslkey",
        "sslmode",
        "sslpassword",
        "sslrootcert",
        "ssl_max_protocol_version",
        "ssl_min_protocol_version",
    }
)
# asyncpg does nothing of this kind. So it does what these values ask for, and nothing of what the others ask for.
_NOTHING_TO_DO: Final[Mapping[str, frozenset[str]]] = {
    "channel_binding": frozenset({"disable", "prefer"}),
    "client_encoding": frozenset({"utf8", "UTF8", "utf-8", "UTF-8"}),
    "gssdelegation": frozenset({"0"}),
    "gssencmode": frozenset({"disable", "prefer"}),
    "keepalives": frozenset({"1"}),
    "load_balance_hosts": frozenset({"disable"}),
    "max_protocol_version": frozenset({"3.0", "3.2", "latest"}),
    "min_protocol_version": frozenset({"3.0"}),
    "replication": frozenset({"0", "false", "no", "off"}),
    "sslcertmode": frozenset({"allow"}),
    "sslcompression": frozenset({"0"}),
    "sslnegotiation": frozenset({"postgres"}),
    "sslsni": frozenset({"1"}),
}
# SQLAlchemy hands on what stands in a URL as text.
_NUMBERS: Final[Mapping[str, type[int | float]]] = {
    "command_timeout": float,
    "max_cacheable_statement_size": int,
    "max_cached_statement_lifetime": int,
    "statement_cache_size": int,
    "timeout": float,
}
_NOT_TEXT: Final = frozenset({"connection_class", "dsn", "loop", "record_class", "server_settings"})
_SQLALCHEMYS: Final = frozenset({"async_fallback", "host", "port", "prepared_statement_cache_size"})
_FOR_THE_SERVER: Final = frozenset({"application_name", "fallback_application_name", "options"})


def connect_arguments(url: URL, parameters: Collection[str]) -> tuple[URL, dict[str, Any]]:
    """Return the URL without its options for libpq, and the arguments of `asyncpg.connect` that mean the same.

    Args:
        url: A URL for libpq, or one with options of asyncpg and of SQLAlchemy.
        parameters: The parameters of `asyncpg.connect`. Older versions know fewer.

    Raises:
        ValueError: If asyncpg cannot do what an option asks for.
    """
    query = {name: values[-1] for name, values in url.normalized_query.items()}  # libpq takes the last
    dsn = {name: value for name, value in query.items() if name in _IN_A_DSN}
    arguments: dict[str, Any] = {}
    unknown: list[str] = []
    for option in query.keys() - _IN_A_DSN - _FOR_THE_SERVER - _SQLALCHEMYS:
        if not _is_done_by_doing_nothing(option, query[option]):
            name, value = _argument(option, query[option])
            if name in parameters and name not in _NOT_TEXT:
                arguments[name] = value
            else:
                unknown.append(option)
    if unknown:
        raise ValueError(
            f"asyncpg cannot do what the URL asks for with {', '.join(sorted(unknown))}: leave it out, or use "
            "postgresql+psycopg, which knows all options of libpq"
        )
    if dsn.get("sslrootcert") == "system":
        _require_full_check(dsn)
        arguments["ssl"] = True  # checks the host's certificate with the system's authorities
    elif dsn or {"service", "servicefile"} & arguments.keys():
        arguments["dsn"] = f"postgresql://?{urlencode(dsn)}".rstrip("?")
    settings = _settings(query)
    if settings:
        arguments["server_settings"] = settings
    return url.difference_update_query(query.keys() - _SQLALCHEMYS), arguments


def _is_done_by_doing_nothing(option: str, value: str) -> bool:
    if option == "hostaddr":  # empty addresses: each host is its own
        return not value.strip(",")
    return value in _NOTHING_TO_DO.get(option, ())


def _argument(option: str, value: str) -> tuple[str, object]:
    if option == "connect_timeout":
        seconds = _number(int, option, value)
        return "timeout", seconds if seconds > 0 else None
    if option == "sslnegotiation" and value == "direct":
        return "direct_tls", True
    if option in _NUMBERS:
        return option, _number(_NUMBERS[option], option, value)
    return "database" if option == "dbname" else option, value


def _number(kind: type[int | float], option: str, value: str) -> float:
    try:
        return kind(value)
    except ValueError as error:
        raise ValueError(f"{option} in the URL must be a number") from error


def _require_full_check(dsn: Mapping[str, str]) -> None:
    """Make sure that `sslrootcert=system` goes with what asyncpg can do then. libpq accepts `verify-full` only, too."""
    if dsn.keys() - {"sslmode", "sslrootcert"} or dsn.get("sslmode", "verify-full") != "verify-full":
        raise ValueError(
            "sslrootcert=system goes with sslmode=verify-full, and in asyncpg with no other option that begins with "
            "ssl: use postgresql+psycopg, or pass an SSLContext as `ssl` in connect_args"
        )


def _settings(query: Mapping[str, str]) -> dict[str, str]:
    names = [query[name] for name in ("application_name", "fallback_application_name") if name in query]
    return settings_in(query.get("options", "")) | ({"application_name": names[0]} if names else {})
