"""What is asked about a device in SQL: pending, drifted, its delta, its sync status, and whether a report is accepted.

Each rule stands here once, for statements and for the hybrids of the model, and once in Python, for values that are
loaded already. The tests compare the two.

| in SQL | in Python |
|---|---|
| `pending` | `Shadow.is_pending` |
| `delta`, `drifted` | `twin.compute_delta`, `Shadow.is_drifted` |
| `sync_status` | `twin.sync_status` |
| `accepted` | `report_rules.judge` |

The functions take the columns of a table, an alias or a CTE, or the attributes of a mapped class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Text, and_, case, column, false, func, literal_column, null, select
from sqlalchemy.dialects.postgresql import JSONB

from iot_models._core.column_types import readable_time

if TYPE_CHECKING:
    from datetime import datetime, timedelta

    from sqlalchemy import ColumnElement, SQLColumnExpression

_OBJECT: Final = literal_column("'object'", Text)
# Written out: two bound values would be two expressions to GROUP BY.
_EMPTY: Final = literal_column("'{}'::jsonb", JSONB)


def readable(device: Any) -> ColumnElement[bool]:
    """Both sections are JSON objects. SQL by hand can store others; `stored_json.why_no_document` is Python's rule."""
    desired, reported = func.jsonb_typeof(device.desired_state), func.jsonb_typeof(device.reported_state)
    return (desired == _OBJECT) & (reported == _OBJECT)


def pending(device: Any) -> ColumnElement[bool]:
    """The device has yet to acknowledge the newest version. These are the words of the partial indexes' predicate."""
    condition: ColumnElement[bool] = device.desired_version > device.reported_version
    return condition


def delta(device: Any) -> ColumnElement[dict[str, Any]]:
    """The top-level keys of desired that reported lacks or holds with another value, with the desired value.

    NULL where a section is no JSON object.
    """
    # Both documents are taken apart once. `reported -> key` for each key would take reported apart as often.
    wanted, actual = (
        func.jsonb_each(section).table_valued("key", column("value", JSONB), name=name)
        for section, name in ((device.desired_state, "wanted"), (device.reported_state, "actual"))
    )
    missing = (
        select(func.coalesce(func.pg_catalog.jsonb_object_agg(wanted.c.key, wanted.c.value), _EMPTY))
        .select_from(wanted.outerjoin(actual, actual.c.key == wanted.c.key))
        # An absent key has SQL's NULL, a null is JSON's: a null that reported lacks is in the delta too.
        .where(actual.c.value.is_distinct_from(wanted.c.value))
        .correlate_except(wanted, actual)
        .scalar_subquery()
    )
    # Equal documents are spared the subquery: most of a fleet. The conditions also tell a SELECT of the delta alone
    # which table it is from; the subquery's own names do not count for that.
    return case(
        (~readable(device), null()),
        (device.desired_state == device.reported_state, _EMPTY),
        else_=missing,
    )


def drifted(device: Any) -> ColumnElement[bool]:
    """The device acknowledged the newest version, and its delta is not empty. One that is not `readable` is not."""
    # Of a key that both have, || takes the right one's value.
    together = device.reported_state.op("||", return_type=JSONB())(device.desired_state)
    lacks = together != device.reported_state
    return and_(
        device.desired_version == device.reported_version,
        device.desired_state != device.reported_state,  # equal documents are spared the look at each key
        case((readable(device), lacks), else_=false()),  # CASE, because AND does not say what is evaluated first
    )


def sync_status(
    device: Any, now: SQLColumnExpression[datetime], stale_after: SQLColumnExpression[timedelta]
) -> ColumnElement[str]:
    """`stale`, `synced` or `pending`, as text. A time that Python cannot hold counts as none, as it is read."""
    # CASE: before PostgreSQL 17, `now - infinity` is an error.
    silence = case((readable_time(device.last_seen_at), now - device.last_seen_at))
    stale = silence.is_(None) | (silence > stale_after)
    return case(
        (stale, literal_column("'stale'", Text)),
        (device.desired_version == device.reported_version, literal_column("'synced'", Text)),
        else_=literal_column("'pending'", Text),
    )


def accepted(acked: SQLColumnExpression[int], device: Any) -> ColumnElement[bool]:
    """A report that acknowledges this version is neither late nor of a version that was never asked for."""
    return acked.between(device.reported_version, device.desired_version)
