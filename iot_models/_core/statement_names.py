"""Which method of the service a statement belongs to, for traces and `pg_stat_activity`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import event

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.engine.interfaces import ExecutionContext

# The execution option of each statement of the service; SQLAlchemy's event listeners find it in the context.
METHOD: Final = "iot_models_method"


def name_statements(engine: Engine) -> None:
    """Begin each statement of the service that this engine sends with a comment that names the method."""
    event.listen(engine, "before_cursor_execute", _name, retval=True)


def _name(
    _connection: object,
    _cursor: object,
    statement: str,
    parameters: Any,
    context: ExecutionContext | None,
    _many: bool,  # noqa: FBT001 - SQLAlchemy's signature
) -> tuple[str, Any]:
    method = context.execution_options.get(METHOD) if context is not None else None
    return (f"/* iot_models.{method} */ {statement}" if method else statement), parameters
