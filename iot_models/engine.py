"""Engines with the settings that a service needs, and database URLs: where they come from and what they mean."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy
from sqlalchemy import URL, event, make_url
from sqlalchemy.exc import ArgumentError

from iot_models._core import statement_names
from iot_models._core.asyncpg_options import connect_arguments
from iot_models._core.database_errors import explain_commit, hide_row
from iot_models._core.server_settings import CLIENT_ENCODING, pinned, require_readable, settings_in
from iot_models._core.validation import storable_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

URL_VARIABLES = ("IOT_MODELS_DATABASE_URL", "DATABASE_URL")

_WRITE_IT_AS: Final = "write it as postgresql://user:password@host:5432/database"
_APPLICATION_NAME: Final = "iot_models"
_STATEMENT_TIMEOUT: Final = timedelta(seconds=30)
_LOCK_TIMEOUT: Final = timedelta(seconds=10)
_IDLE_IN_TRANSACTION_TIMEOUT: Final = timedelta(seconds=60)

# Options of libpq that the `repr` of an engine would show. That of a URL hides the password only.
_SECRETS: Final = frozenset({"oauth_client_secret", "scram_client_key", "scram_server_key", "sslpassword"})
# One of the hosts in a URL: a name or an address, perhaps with a port; or a socket's folder or abstract name.
_HOST: Final = re.compile(r"(\w[\w.-]*(:\d*)?|\[?[\da-fA-F:.]+(%\w+)?\]?|[/@][^@]*)?")
_PORTS: Final = re.compile(r"[\d,]*", re.ASCII)

# Compact UTF-8: the form in which documents are measured. NaN is not JSON: it is refused here, with ValueError, and not
# by the server.
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def create_engine(
    url: str | URL | None = None,
    *,
    application_name: str = _APPLICATION_NAME,
    statement_timeout: timedelta | None = _STATEMENT_TIMEOUT,
    lock_timeout: timedelta | None = _LOCK_TIMEOUT,
    idle_in_transaction_session_timeout: timedelta | None = _IDLE_IN_TRANSACTION_TIMEOUT,
    pgbouncer: bool = False,
    **options: Any,
) -> Engine:
    """SQLAlchemy's `create_engine` with the URL rules of `database_url` and the settings that a service needs.

    The settings are: `pool_pre_ping`, so that no call fails because the server was restarted; an application name; the
    three timeouts; `hide_parameters`, so that no document stands in an error or in a log, because it may hold a secret
    of the device; a JSON serializer that writes compact UTF-8 and refuses NaN. What the caller passes comes first, in
    `options` or in the URL (`?application_name=...`, `?options=-c statement_timeout=5s`); the other settings stay.

    Each connection has `client_encoding=UTF8`, `DateStyle=ISO` and `TimeZone=UTC`, whatever the server, the role and
    the environment say: in other ones, some values cannot be written or read. Only another TimeZone is accepted, in the
    URL or in `connect_args`. A database in SQL_ASCII is refused when the engine connects.

    Choose the transaction mode by what belongs together:

    * Several statements that succeed or fail together: the default, `with Session(engine) as session, session.begin()`.
    * One service call and nothing else (a device's report, a read): `isolation_level="AUTOCOMMIT"` saves `BEGIN` and
      `COMMIT`, two round trips of four (the ping and the statement remain). That is half of the time over a network,
      and a sixth on the server's own host. Each call is then committed at once, and a rollback undoes nothing. A
      service that does both shares one pool by `engine.execution_options(isolation_level="AUTOCOMMIT")`.

    Behind PgBouncer in transaction mode, pass `pgbouncer=True`. PgBouncer keeps `client_encoding`, `DateStyle`,
    `TimeZone` and `application_name` for each client: they are set as above. It keeps no other settings: it refuses
    them at connect, and later they would reach other clients. So the timeouts are **not** set: set them with
    `ALTER ROLE ... SET`. PGOPTIONS is not sent. Statements are not prepared.

    Args:
        url: A PostgreSQL URL. None: the environment's, see `database_url`.
        application_name: The name of these connections in `pg_stat_activity` and in the server's log, if neither the
            URL nor PGAPPNAME sets one.
        statement_timeout: The server cancels a statement that takes longer (30 s). None leaves this to the server, zero
            switches it off.
        lock_timeout: The server cancels a statement that waits longer for a lock, such as that of a row which another
            transaction is writing (10 s). None and zero as above.
        idle_in_transaction_session_timeout: The server ends a connection whose open transaction does nothing for longer
            (60 s): its locks would block other transactions, and it would keep vacuum from cleaning up. None and zero
            as above.
        pgbouncer: Whether PgBouncer in transaction mode stands between the engine and the server.
        options: Options of SQLAlchemy's `create_engine`: `pool_size`, `isolation_level`, `connect_args`, `echo` and so
            on.

    Raises:
        ImportError: If the driver that the URL names is not installed. The message says what to do.
        ValueError: If there is no URL, if it is not PostgreSQL's, or if its driver is unknown or async. If the URL or
            `connect_args` set another `client_encoding` or `DateStyle`. If a timeout is passed with `pgbouncer`.

    Example:
        >>> engine = create_engine(pool_size=10, statement_timeout=timedelta(seconds=5))
        >>> reports = engine.execution_options(isolation_level="AUTOCOMMIT")
    """
    target = database_url(url)
    if target.get_dialect().is_async:
        raise ValueError(f"{target.drivername} is an async driver: use create_async_engine, or postgresql+psycopg")
    import_driver(target)
    timeouts = _timeouts(statement_timeout, lock_timeout, idle_in_transaction_session_timeout, pgbouncer=pgbouncer)
    target, connect_args, settings = _for_libpq(target, application_name, timeouts, options, pgbouncer=pgbouncer)
    engine = sqlalchemy.create_engine(target, **_with_defaults(target, options, connect_args))
    _prepare_connections(engine, settings)
    return engine


def create_async_engine(
    url: str | URL | None = None,
    *,
    application_name: str = _APPLICATION_NAME,
    statement_timeout: timedelta | None = _STATEMENT_TIMEOUT,
    lock_timeout: timedelta | None = _LOCK_TIMEOUT,
    idle_in_transaction_session_timeout: timedelta | None = _IDLE_IN_TRANSACTION_TIMEOUT,
    pgbouncer: bool = False,
    **options: Any,
) -> AsyncEngine:
    """The same for asyncio: psycopg's async mode, or asyncpg if the URL names it (`postgresql+asyncpg://`).

    All that `create_engine` says holds here too. In a URL for asyncpg, libpq's options are understood (`sslmode`,
    `sslrootcert`, `options`, `connect_timeout`, `target_session_attrs` and so on) where asyncpg can do what they ask
    for.

    Raises:
        ImportError: If greenlet or asyncpg is missing. The message says what to install.
        ValueError: As `create_engine`. If the driver has no async mode, or if asyncpg cannot do what an option in the
            URL asks for.

    Example:
        >>> engine = create_async_engine(pool_size=10)
        >>> async with AsyncSession(engine, expire_on_commit=False) as session, session.begin():
        ...     shadow = await AsyncShadowService(session, "acme").get("thermostat-1")
    """
    target = database_url(url)
    _require("greenlet", "async")
    if not target.get_dialect().get_async_dialect_cls(target).is_async:
        raise ValueError(f"{target.drivername} has no async mode: use postgresql+psycopg, or postgresql+asyncpg")
    from sqlalchemy.ext import asyncio  # noqa: PLC0415 - needs greenlet, which synchronous use does not

    timeouts = _timeouts(statement_timeout, lock_timeout, idle_in_transaction_session_timeout, pgbouncer=pgbouncer)
    if target.get_driver_name() == "asyncpg":
        target, connect_args, settings = _for_asyncpg(target, application_name, timeouts, options, pgbouncer=pgbouncer)
    else:
        target, connect_args, settings = _for_libpq(target, application_name, timeouts, options, pgbouncer=pgbouncer)
    engine = asyncio.create_async_engine(target, **_with_defaults(target, options, connect_args))
    _prepare_connections(engine.sync_engine, settings)
    return engine


def _require(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"create_async_engine needs {package}: pip install 'iot-models[{extra}]'") from error


def import_driver(url: URL) -> None:
    """Load the driver that a URL names.

    Raises:
        ImportError: If it is not installed, or if it is psycopg and there is no libpq. The message says what to do.
    """
    try:
        url.get_dialect().import_dbapi()
    except ImportError as error:
        way_out = (
            "pip install 'iot-models[binary]'"
            if url.get_driver_name() == "psycopg"
            else "write the URL as postgresql+psycopg://..., or install that driver"
        )
        raise ImportError(f"{url.drivername}: {error}; {way_out}") from error


def _timeouts(
    statement: timedelta | None, lock: timedelta | None, idle: timedelta | None, *, pgbouncer: bool
) -> dict[str, str]:
    """The timeouts that the caller wants, in milliseconds. Rounded up, because 0 would switch a timeout off."""
    wanted = {
        "statement_timeout": (statement, _STATEMENT_TIMEOUT),
        "lock_timeout": (lock, _LOCK_TIMEOUT),
        "idle_in_transaction_session_timeout": (idle, _IDLE_IN_TRANSACTION_TIMEOUT),
    }
    if pgbouncer:
        passed = [name for name, (value, default) in wanted.items() if value is not None and value is not default]
        if passed:
            raise ValueError(
                f"{', '.join(passed)}: PgBouncer in transaction mode keeps no such setting for a client: leave it out, "
                "and set it with ALTER ROLE ... SET"
            )
        return {}
    return {
        name: str(math.ceil(value / timedelta(milliseconds=1)))
        for name, (value, _) in wanted.items()
        if value is not None
    }


def without_hstore(url: URL) -> dict[str, Any]:
    """The option that keeps SQLAlchemy from looking for the type hstore on psycopg's first connection.

    It compares an oid with a regtype, for which the catalog has no operator: a stranger's would be called.
    """
    return {"use_native_hstore": False} if url.get_driver_name() in {"psycopg", "psycopg2"} else {}


def _with_defaults(url: URL, options: Mapping[str, Any], connect_args: Mapping[str, Any]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"pool_pre_ping": True, "hide_parameters": True, "json_serializer": _encode}
    return {**defaults, **without_hstore(url), **options, "connect_args": connect_args}


def _for_libpq(
    url: URL, application_name: str, timeouts: Mapping[str, str], options: Mapping[str, Any], *, pgbouncer: bool
) -> tuple[URL, dict[str, Any], dict[str, str]]:
    """The URL without secret options, the `connect_args`, and the settings for `_prepare_connections`.

    Raises:
        ValueError: If the caller sets what `create_engine` does not accept.
    """
    given: Mapping[str, Any] = options.get("connect_args") or {}
    theirs = [*url.normalized_query.get("options", ()), *filter(None, [given.get("options")])]
    settings = settings_in(" ".join(theirs))
    require_readable(settings)
    encodings = url.normalized_query.get("client_encoding", ())
    for encoding in filter(None, [*encodings, given.get("client_encoding"), options.get("client_encoding")]):
        require_readable({"client_encoding": encoding})
    secret = {name: values[-1] for name, values in url.normalized_query.items() if name in _SECRETS}
    # libpq takes the name only if nothing else sets application_name, PGAPPNAME included.
    connect_args = {
        "fallback_application_name": application_name,
        **secret,
        **given,
        "client_encoding": CLIENT_ENCODING,
    }
    if pgbouncer:
        never = {} if url.get_driver_name() == "psycopg2" else {"prepare_threshold": None}  # psycopg2 never prepares
        # Also if there are no options: libpq would read PGOPTIONS.
        connect_args = never | connect_args | {"options": " ".join(theirs)}
    else:
        # The server takes the last value of a setting. libpq reads PGOPTIONS only if there are no options.
        ours = [f"-c {name}={value}" for name, value in timeouts.items()]
        merged = " ".join([*ours, *(theirs or filter(None, [os.environ.get("PGOPTIONS")]))])
        if merged:
            connect_args["options"] = merged
    return url.difference_update_query(secret), connect_args, pinned(settings)


def _for_asyncpg(
    url: URL, application_name: str, timeouts: Mapping[str, str], options: Mapping[str, Any], *, pgbouncer: bool
) -> tuple[URL, dict[str, Any], dict[str, str]]:
    """The URL that SQLAlchemy understands, the `connect_args`, and the settings for `_prepare_connections`.

    Raises:
        ValueError: If the caller sets what `create_async_engine` does not accept.
    """
    connect = _require("asyncpg", "asyncpg").connect
    given: Mapping[str, Any] = options.get("connect_args") or {}
    target, arguments = connect_arguments(url, inspect.signature(connect).parameters)
    theirs = arguments.get("server_settings", {}) | (given.get("server_settings") or {})
    require_readable(theirs)
    # PgBouncer compares client_encoding with PostgreSQL's name for it. asyncpg has another name: this saves a SET in
    # each transaction.
    ours = {"application_name": application_name, "client_encoding": "UTF8", **timeouts}
    # A statement without a name and without a cache is sent in one piece with its execution: PgBouncer hands both to
    # the same server, also in AUTOCOMMIT mode. Statements with unique names would fail there, and stay on the server.
    unnamed = {
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        "prepared_statement_name_func": lambda: "",
    }
    connect_args = (unnamed if pgbouncer else {}) | arguments | dict(given) | {"server_settings": ours | theirs}
    return target, connect_args, pinned(theirs)


def _prepare_connections(engine: Engine, settings: Mapping[str, str]) -> None:
    """Give each new connection the settings, and refuse a database whose text has no known encoding.

    Not by libpq's `options`: PGDATESTYLE and PGTZ would win over them, and PgBouncer refuses them.
    """
    columns = [f"pg_catalog.set_config('{name}', '{value}', false)" for name, value in settings.items()]
    statement = f"SELECT pg_catalog.current_setting('server_encoding'), {', '.join(columns)}"

    event.listen(engine, "handle_error", hide_row)
    event.listen(engine, "handle_error", explain_commit)

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: object) -> None:
        autocommit, connection.autocommit = connection.autocommit, True  # a rollback would undo the settings
        cursor = connection.cursor()
        cursor.execute(statement)
        encoding = cursor.fetchone()[0]
        cursor.close()
        connection.autocommit = autocommit
        if encoding == "SQL_ASCII":
            connection.close()
            raise ValueError(
                "the database has the encoding SQL_ASCII, in which PostgreSQL does not know what a character is: make "
                "a database with ENCODING 'UTF8', and move the data there"
            )


def normalize_url(url: str | URL) -> URL:
    """The URL with psycopg 3 as its driver if it names none (`postgres://`, `postgresql://`).

    A URL that names a driver keeps it.

    Example:
        >>> str(normalize_url("postgres://iot@db/iotcloud"))
        'postgresql+psycopg://iot@db/iotcloud'

    Raises:
        ValueError: If it is not a URL, if it is for another database than PostgreSQL, or if it names a driver that
            SQLAlchemy does not know. The message hides the password.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # ValueError: the port is not a number
        # Without the URL, and without SQLAlchemy's error, which quotes it in 2.0: no password can be found in it.
        raise ValueError(f"not a database URL: {_WRITE_IT_AS}") from None
    if "@" in (parsed.host or "") or re.search(r"[=@#;&:/\s]", parsed.database or ""):
        # Without the URL again: what looks like its host or its database is a part of a password, or holds one.
        raise ValueError(f"not a database URL: {_WRITE_IT_AS}, with @ in a user or password written as %40")
    host, port = (",".join(parsed.normalized_query.get(name, ())) for name in ("host", "port"))
    if not _plain_host(host) or not _PORTS.fullmatch(port):
        raise ValueError(f"not a database URL, because of its option host or port: {_WRITE_IT_AS}")
    if "password" in parsed.query:  # psycopg and asyncpg take it before the other
        parsed = parsed.set(password=parsed.normalized_query["password"][-1]).difference_update_query(["password"])
    if not all(map(storable_text, _texts(parsed))):
        raise ValueError(f"not a database URL, because it contains NUL or a lone surrogate: {_WRITE_IT_AS}")
    if parsed.drivername in {"postgres", "postgresql"}:
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() != "postgresql":
        raise ValueError(f"iot_models works on PostgreSQL; this URL names {parsed.drivername!r}")
    try:
        parsed.get_dialect()
    except (ArgumentError, ImportError, ValueError) as error:  # ValueError: two drivers
        raise ValueError(
            f"{parsed.drivername}: {error}; write the URL as postgresql+psycopg://..., or without a driver"
        ) from error
    return parsed


def shown(url: URL) -> str:
    """Where a URL leads, as people may see it: host, port and database, and nothing else of it.

    Errors and logs show a URL by this function only. A secret can be the password, and also an option of libpq or a
    part of `options`.

    Example:
        >>> shown(make_url("postgresql://iot:secret@db/iotcloud?sslpassword=secret"))
        'database iotcloud at db:5432'
    """
    query = url.normalized_query
    host, port = url.host or ",".join(query.get("host", ())), str(url.port or ",".join(query.get("port", ())))
    where = (host or "(default host)") if _plain_host(host) else "(no plain host)"
    return f"database {url.database or '(default)'} at {where}{f':{port}' if port and _PORTS.fullmatch(port) else ''}"


def _plain_host(host: str) -> bool:
    return all(map(_HOST.fullmatch, host.split(",")))


def _texts(url: URL) -> Iterator[str]:
    """Every text in a URL, unescaped."""
    yield from (str(part) for part in url[:-1])
    for name, values in url.normalized_query.items():
        yield from (name, *values)


def database_url(explicit: str | URL | None = None, *, fallback: str | None = None) -> URL:
    """The URL to use: `explicit`, else `IOT_MODELS_DATABASE_URL`, else `DATABASE_URL`, else `fallback`.

    An empty value counts as absent.

    Raises:
        ValueError: If there is none (the message lists the ways to give one), or if `normalize_url` refuses it.
    """
    candidates = (explicit, *(os.environ.get(name) for name in URL_VARIABLES), fallback)
    for candidate in candidates:
        if candidate:
            return normalize_url(candidate)
    raise ValueError(
        "no database URL: set IOT_MODELS_DATABASE_URL (or DATABASE_URL) to postgresql://user:password@host:5432/database"
    )


def name_statements(engine: Engine | AsyncEngine) -> None:
    """Begin each statement of `ShadowService` on this engine with a comment: `/* iot_models.patch_desired_many */`.

    So a trace, `pg_stat_activity` and the server's log say which method a statement belongs to; without it all batches
    begin with `WITH`. Off unless called, because it also is in the names that tools group statements by.

    Without comments, a listener of SQLAlchemy's `before_cursor_execute` finds the name of the method in
    `context.execution_options["iot_models_method"]`.

    Args:
        engine: Any engine, also one that `iot_models.engine` did not make.

    Example:
        >>> engine = create_engine()
        >>> name_statements(engine)
    """
    statement_names.name_statements(engine if isinstance(engine, sqlalchemy.Engine) else engine.sync_engine)
