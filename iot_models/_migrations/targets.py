"""On what migrations run: an engine or a connection of the caller's, or an engine for a URL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

import sqlalchemy
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, NullPool, event

from iot_models._core.database_errors import hide_row
from iot_models.engine import database_url, import_driver, without_hstore

if TYPE_CHECKING:
    from collections.abc import Mapping

# None: the URL in the environment.
Target: TypeAlias = str | URL | Engine | Connection | None

_APPLICATION_NAME: Final = "iot_models alembic"


def resolve(target: Target, *, option: str, fallback: str | None = None) -> Engine | Connection:
    """The engine for a migration, or the caller's connection. It does not connect.

    Args:
        target: A URL, by the rules of `database_url`; None for the environment's; an engine, whose pool is used; or a
            connection.
        option: The option that gives a URL, for the messages: `-x url=...`.
        fallback: The URL if neither `target` nor the environment gives one.

    Raises:
        CommandError: If there is no URL, if it is not PostgreSQL's, or if its driver is async, unknown or not
            installed; or if the engine is async or for another database.
    """
    if isinstance(target, Engine | Connection) or hasattr(target, "run_sync") or hasattr(target, "sync_engine"):
        return _usable(target)
    try:
        url = database_url(target, fallback=fallback)
    except ValueError as error:
        raise CommandError(str(error) if target else f"{error}, or pass one ({option})") from error
    if url.get_dialect().is_async:
        raise CommandError(
            f"migrations run synchronously, and {url.drivername} is an async driver: write the URL as "
            "postgresql+psycopg://..., or without a driver. If DATABASE_URL is the service's, set "
            f"IOT_MODELS_DATABASE_URL or pass {option}"
        )
    try:
        import_driver(url)
    except ImportError as error:
        raise CommandError(str(error)) from error
    # In a database in SQL_ASCII psycopg would return bytes, and SQLAlchemy fail before anybody can say why.
    libpq = url.get_driver_name() in {"psycopg", "psycopg2"}
    arguments = {"application_name": _APPLICATION_NAME, **({"client_encoding": "utf8"} if libpq else {})}
    engine = sqlalchemy.create_engine(
        url, poolclass=NullPool, connect_args=arguments, hide_parameters=True, **without_hstore(url)
    )
    event.listen(engine, "handle_error", hide_row)
    return engine


def _usable(given: object) -> Engine | Connection:
    if isinstance(given, Connection):  # also what `run_sync` of an async connection passes
        usable: Engine | Connection = given
    elif isinstance(given, Engine) and not given.dialect.is_async:
        # It has the same pool. Migrations need transactions, even if the engine was created for AUTOCOMMIT.
        usable = given.execution_options(isolation_level="READ COMMITTED")
    else:
        raise CommandError(
            "migrations run synchronously: from asyncio, async with engine.connect() as connection: await "
            "connection.run_sync(migrate.upgrade); or pass a URL, by asyncio.to_thread(migrate.upgrade, url)"
        )
    if usable.dialect.name != "postgresql":
        raise CommandError(f"iot_models works on PostgreSQL; this engine is for {usable.dialect.name}")
    return usable


def schema_of(target: Engine | Connection, named: str | None) -> str | None:
    """The schema that the caller names, else the one to which an engine translates tables that name none.

    Raises:
        CommandError: If the two differ.
    """
    translated: Mapping[str | None, str | None] = target.get_execution_options().get("schema_translate_map") or {}
    schema = translated.get(None)
    if named is not None and schema not in (None, named):
        raise CommandError(
            f"schema {named!a} is asked for, but schema_translate_map of this engine says {schema!a}: name one of them"
        )
    return schema if named is None else named
