"""What Alembic compares: for a team all but ours, and for us only ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from iot_models._migrations.comparison import HISTORY
from iot_models._migrations.dependents import PARKED, PARKED_HISTORY, PARKED_REFUSALS
from iot_models._migrations.strangers import VERSION_TABLE
from iot_models.models import DEFINED

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.sql.schema import SchemaItem

_ALONE: Final = frozenset({HISTORY, PARKED, PARKED_HISTORY, PARKED_REFUSALS, VERSION_TABLE})
_COLUMNS: Final = frozenset(column.name for column in DEFINED.columns)
_INDEXES: Final = frozenset(str(index.name) for index in DEFINED.indexes)
_KEY: Final = frozenset(column.name for column in DEFINED.primary_key)


def include_object(
    object: SchemaItem,  # noqa: A002 - Alembic passes it by this name
    name: str | None,
    type_: str,
    reflected: bool,  # noqa: ARG001, FBT001 - Alembic's signature
    compare_to: SchemaItem | None,
) -> bool:
    """Leave what this package brings out of a team's `alembic revision --autogenerate` and `alembic check`.

    For `context.configure(include_object=...)` in a team's env.py. Left out are `device_state` with our columns,
    indexes and key, the history, what is parked, and the version table, in any schema. What the team added to
    `device_state` is compared if its metadata has the table, by a class that extends `DeviceState`.

    Args:
        object: The table, column, index or constraint.
        name: Its name.
        type_: `table`, `column`, `index`, `unique_constraint` or `foreign_key_constraint`.
        reflected: Whether it was found in the database, and not in the metadata.
        compare_to: Its counterpart on the other side; None if there is none.

    Returns:
        Whether Alembic compares it.
    """
    if type_ == "table":
        return name not in _ALONE and (not _is_ours(object) or compare_to is not None)
    table = getattr(object, "table", None)
    if table is None or not _is_ours(table):
        return True
    return name not in {"column": _COLUMNS, "index": _INDEXES}.get(type_, frozenset())


def including(hook: Callable[..., bool]) -> Callable[..., bool]:
    """A team's own `include_object`, asked for everything that ours does not leave out.

    Example:
        >>> context.configure(include_object=migrate.including(include_object), ...)
    """

    def include(object: SchemaItem, *arguments: Any) -> bool:  # noqa: A002 - as above
        return include_object(object, *arguments) and hook(object, *arguments)

    return include


def include_ours(_object: SchemaItem, name: str | None, type_: str, *_rest: Any) -> bool:
    """What `alembic check` of our own history compares: not the tables of the application beside it."""
    return type_ != "table" or name in {DEFINED.name, HISTORY}


def _is_ours(table: Any) -> bool:
    """A team may have another table of that name, in another schema."""
    return table.name == DEFINED.name and {*table.columns.keys()} >= _KEY | {"site_id"}
