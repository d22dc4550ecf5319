"""The engine on which migrations run: the caller's, or one for a URL."""

from __future__ import annotations

from typing import Final, TypeAlias

import sqlalchemy
from alembic.util import CommandError
from sqlalchemy import URL, Engine, NullPool

from iot_models.engine import database_url, import_driver, without_hstore

# None: the URL in the environment.
Target: TypeAlias = str | URL | Engine | None

_APPLICATION_NAME: Final = "iot_models alembic"


def engine_for(target: Target, *, option: str, fallback: str | None = None) -> Engine:
    """The engine for a migration. It does not connect.

    Args:
        target: A URL, by the rules of `database_url`; None for the environment's; or an engine, whose pool is used.
        option: The option that gives a URL, for the messages: `-x url=...`.
        fallback: The URL if neither `target` nor the environment gives one.

    Raises:
        CommandError: If there is no URL, if it is not PostgreSQL's, or if its driver is async, unknown or not
            installed; or if the engine is async or for another database.
    """
    if isinstance(target, Engine) or hasattr(target, "sync_engine"):
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
    return sqlalchemy.create_engine(
        url, poolclass=NullPool, connect_args=arguments, hide_parameters=True, **without_hstore(url)
    )


def _usable(engine: object) -> Engine:
    if not isinstance(engine, Engine) or engine.dialect.is_async:
        raise CommandError(
            "migrations run synchronously, and this engine is an async one: pass a URL, "
            "engine.url.set(drivername='postgresql+psycopg'); from asyncio, by asyncio.to_thread(migrate.upgrade, url)"
        )
    if engine.dialect.name != "postgresql":
        raise CommandError(f"iot_models works on PostgreSQL; this engine is for {engine.dialect.name}")
    # It has the same pool. Migrations need transactions, even if the engine was created for AUTOCOMMIT.
    return engine.execution_options(isolation_level="READ COMMITTED")
