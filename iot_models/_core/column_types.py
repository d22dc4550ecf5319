"""How the columns of `device_state` travel: as text, times that Python can hold, documents that no bad row can spoil.

In the schema and in expressions the types are SQLAlchemy's Text, TIMESTAMP and JSONB. `PlainText` changes how a value
is bound. The other two change how a value is read, for the ORM and for the service's statements alike: in SQL first, so
that no setting of the session (TimeZone, DateStyle) and no driver has a say, and a value that the driver would fail on
does not take its whole result with it.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import TIMESTAMP, Text, TypeDecorator, case, cast, extract, literal_column, type_coerce
from sqlalchemy.dialects.postgresql import JSONB

from iot_models._core.stored_json import read_json

if TYPE_CHECKING:
    from sqlalchemy import BindParameter, ColumnElement, Dialect
    from sqlalchemy.sql.operators import OperatorType
    from sqlalchemy.types import TypeEngine

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_IN_SQL: Final = literal_column("TIMESTAMPTZ '1970-01-01 00:00:00+00'", TIMESTAMP(timezone=True))
# Python's datetime holds the years 1 to 9999.
_FIRST: Final = literal_column("TIMESTAMPTZ '0001-01-01 00:00:00+00'", TIMESTAMP(timezone=True))
_BEHIND_LAST: Final = literal_column("TIMESTAMPTZ '10000-01-01 00:00:00+00'", TIMESTAMP(timezone=True))


def readable_time(time: ColumnElement[Any]) -> ColumnElement[bool]:
    """Python can hold this time: it is there, finite, and of the years 1 to 9999."""
    return (time >= _FIRST) & (time < _BEHIND_LAST)


class PlainText(TypeDecorator[str]):
    """A `text`, whose values are bound as `text`.

    SQLAlchemy binds a `varchar`. PostgreSQL has no operator for the two: it takes the one for text and text, or a
    better match, and a role that may create objects in a schema of the search path can make that.
    """

    impl = Text
    cache_ok = True

    def bind_expression(self, bindparam: BindParameter[str]) -> ColumnElement[str]:
        return cast(bindparam, Text)


class UTCTime(TypeDecorator[datetime]):
    """A `timestamptz`, read in UTC. A time that Python cannot hold (`infinity`, a year before 1) is read as None.

    Writing a naive datetime raises `ValueError`: PostgreSQL would take it for a time in the session's own time zone.
    """

    impl = TIMESTAMP(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        if isinstance(value, datetime) and value.utcoffset() is None:
            raise ValueError(
                f"a time must be timezone-aware, as datetime.now(timezone.utc) is; got the naive {value!r}"
            )
        return value

    def column_expression(self, column: ColumnElement[Any]) -> ColumnElement[Any]:
        # A number, exact to the microsecond: no time zone and no DateStyle has a part in it. Of an interval, because
        # the epoch of a time is a STABLE function, which Citus refuses in RETURNING.
        return type_coerce(case((readable_time(column), extract("epoch", column - _EPOCH_IN_SQL))), self)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return None if value is None else _EPOCH + timedelta(microseconds=int(value * 1_000_000))


class Document(TypeDecorator[dict[str, Any]]):
    """A `jsonb` that holds a JSON object, read by Python's json whatever the engine's own deserializer is.

    What raw SQL may have stored instead is read too, as what it is: null as None, an array as a list. A text that
    Python cannot parse (an integer of too many digits) stays the text.
    """

    # none_as_null: None is an absent document and breaks NOT NULL loudly, instead of being stored as JSON null.
    impl = JSONB(none_as_null=True)
    cache_ok = True

    def coerce_compared_value(self, op: OperatorType | None, value: object) -> TypeEngine[Any]:
        return self.impl_instance.coerce_compared_value(op, value)

    def column_expression(self, column: ColumnElement[Any]) -> ColumnElement[Any]:
        return type_coerce(cast(column, Text), self)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:  # noqa: ARG002
        return None if value is None else read_json(value)
