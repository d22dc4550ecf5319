"""Tests as coroutines, with asyncio alone, and the drivers that they run on."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

from iot_models.engine import create_async_engine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from sqlalchemy import URL
    from sqlalchemy.ext.asyncio import AsyncEngine

_P = ParamSpec("_P")

ASYNC_DRIVERS = ("psycopg", "asyncpg")


def in_event_loop(test: Callable[_P, Coroutine[Any, Any, None]]) -> Callable[_P, None]:
    """The coroutine function as a test that pytest can call."""

    @wraps(test)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return call


def url_for(driver: str, url: URL) -> URL:
    """The URL of the same database for one of the drivers."""
    target = url.set(drivername=f"postgresql+{driver}")
    if driver == "asyncpg":  # knows none of libpq's other parameters
        target = target.set(query={name: target.query[name] for name in ("host", "port") if name in target.query})
    return target


@asynccontextmanager
async def async_engine(url: URL, **options: Any) -> AsyncIterator[AsyncEngine]:
    """Our async engine, disposed of at the end: each loop needs one of its own."""
    engine = create_async_engine(url, **options)
    try:
        yield engine
    finally:
        await engine.dispose()
