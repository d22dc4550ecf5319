"""The engines that the package makes, asked in the same way whatever their driver."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import text

from iot_models.engine import create_engine
from tests.databases.async_engines import ASYNC_DRIVERS, async_engine, url_for

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy import URL, Connection

    Work = Callable[[], object]

T = TypeVar("T")
KINDS = ("sync", *ASYNC_DRIVERS)


class Kind:
    """A synchronous or an async engine, asked in the same way: by a synchronous function of a connection."""

    def __init__(self, name: str, url: URL) -> None:
        self.asynchronous = name in ASYNC_DRIVERS
        self.url = url_for(name if self.asynchronous else "psycopg", url)

    def ask(self, question: Callable[[Connection], T], *, url: URL | None = None, **options: Any) -> T:
        (answer,) = self.ask_each(question, url=url, **options)
        return answer

    def ask_each(
        self, *questions: Callable[[Connection], T], url: URL | None = None, between: Work = int, **options: Any
    ) -> list[T]:
        """The answers, each on a connection newly taken from the pool; `between` runs before each but the first."""
        if self.asynchronous:
            return asyncio.run(_ask_async(url or self.url, questions, between, options))
        return _ask_sync(url or self.url, questions, between, options)

    def settings(self, *names: str, **options: Any) -> dict[str, str]:
        return self.ask(lambda c: {name: str(c.scalar(text(f"SHOW {name}"))) for name in names}, **options)


async def _ask_async(
    url: URL, questions: Sequence[Callable[[Connection], T]], between: Work, options: dict[str, Any]
) -> list[T]:
    answers: list[T] = []
    async with async_engine(url, **options) as engine:
        for question in questions:
            if answers:
                between()
            async with engine.connect() as connection:
                answers.append(await connection.run_sync(question))
    return answers


def _ask_sync(
    url: URL, questions: Sequence[Callable[[Connection], T]], between: Work, options: dict[str, Any]
) -> list[T]:
    answers: list[T] = []
    engine = create_engine(url, **options)
    try:
        for question in questions:
            if answers:
                between()
            with engine.connect() as connection:
                answers.append(question(connection))
    finally:
        engine.dispose()
    return answers
