"""The statements that reach the driver: which they are, and what happens just before one of them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import event

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Connection, Engine

    from iot_models import ShadowService


@contextmanager
def counted_statements(bind: Engine | Connection) -> Iterator[list[str]]:
    """The statements that reach the driver while the block runs."""
    seen: list[str] = []

    def record(_c: object, _cursor: object, statement: str, *_rest: object) -> None:
        seen.append(statement)

    event.listen(bind, "before_cursor_execute", record)
    try:
        yield seen
    finally:
        event.remove(bind, "before_cursor_execute", record)


@contextmanager
def at_statement(engine: Engine, number: int, do: Callable[[Connection], None]) -> Iterator[list[str]]:
    """Do something just before the statement of that number is sent, from 0 on; gives the statements begun."""
    begun: list[str] = []

    def count(connection: Connection, _cursor: object, statement: str, *_rest: object) -> None:
        begun.append(statement)
        if len(begun) == number + 1:
            do(connection)

    event.listen(engine, "before_cursor_execute", count)
    try:
        yield begun
    finally:
        event.remove(engine, "before_cursor_execute", count)


def before_statement(service: ShadowService, number: int, act: Callable[[], object]) -> None:
    """Let somebody else act right before the service's statement of that number."""
    real = service._execute  # noqa: SLF001 - the seam between two statements
    sent: list[object] = []

    def execute(method: str, statement: Any, binds: Any) -> Any:
        sent.append(statement)
        if len(sent) == number:
            act()
        return real(method, statement, binds)

    service._execute = execute  # type: ignore[method-assign]  # noqa: SLF001
