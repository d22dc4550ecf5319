"""What is asked about a device in SQL: pending, converged, drifted, its delta, its sync status; what a report may do.

Each rule stands here once, for statements and for the hybrids of the model, and once in Python, for values that are
loaded already. The tests compare the two.

| in SQL | in Python |
|---|---|
| `pending` | `Shadow.is_pending` |
| `refused` | `Shadow.is_refused` |
| `delta` | `twin.compute_delta` |
| `converged`, `drifted` | `twin.compute_nested_delta` is empty, `Shadow.is_drifted` |
| `sync_status` | `twin.sync_status` |
| `accepted`, `refusable` | `report_rules.judge` |

The functions take the columns of a table, an alias or a CTE, or the attributes of a mapped class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Boolean, Text, and_, case, column, func, literal_column, null, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from iot_models._core.column_types import readable_time

if TYPE_CHECKING:
    from datetime import datetime, timedelta

    from sqlalchemy import ColumnElement, SQLColumnExpression
    from sqlalchemy.sql.compiler import SQLCompiler

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


def refused(device: Any) -> ColumnElement[bool]:
    """The device will not apply the newest version. These are the words of a partial index's predicate.

    A refusal is over with the next desired write, and where the device acknowledges the version in the end.
    """
    condition: ColumnElement[bool] = device.refused_version == device.desired_version
    return condition & pending(device)


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


def converged(desired: SQLColumnExpression[Any], reported: SQLColumnExpression[Any]) -> ColumnElement[bool]:
    """Reported has all that desired asks, at any depth.

    Inside objects only what desired names counts; arrays are compared whole. False where one of the documents is no
    JSON object, NULL where one is NULL. Nothing in it is less than IMMUTABLE, so it may also stand in a function that
    an index uses; but not in a statement that may wait for the row: see `statements._judged`.
    """
    return _Converged(desired, reported)


class _Converged(FunctionElement[bool]):
    type = Boolean()
    inherit_cache = True


# Containment decides where desired has no array: it takes arrays for sets, and compares each element with each. Else ||
# may decide, which is exact for the top level, and then the documents are compared pair by pair. `pair` holds a desired
# and a reported value that are different; two objects are taken apart, and any other pair says that something is
# lacking. What || '{}' gives is in memory: of the stored value itself, -> would decompress the whole document for each
# key.
_CONVERGED: Final = """
CASE
  WHEN {desired} IS NULL OR {reported} IS NULL THEN NULL
  WHEN jsonb_typeof({desired}) <> 'object' OR jsonb_typeof({reported}) <> 'object' THEN false
  WHEN NOT {desired} @? 'strict $.** ? (@.type() == "array")'::jsonpath THEN {reported} @> {desired}
  WHEN {reported} || {desired} = {reported} THEN true
  ELSE NOT EXISTS (
    WITH RECURSIVE pair (wanted, actual) AS (
        SELECT {desired}, {reported} || '{{}}'::jsonb
      UNION ALL
        SELECT member.value, pair.actual -> member.key
        FROM pair
        CROSS JOIN LATERAL jsonb_each(
          CASE
            WHEN jsonb_typeof(pair.wanted) = 'object' AND jsonb_typeof(pair.actual) = 'object' THEN pair.wanted
            ELSE '{{}}'::jsonb
          END
        ) AS member (key, value)
        WHERE pair.actual -> member.key IS DISTINCT FROM member.value
    )
    SELECT FROM pair WHERE jsonb_typeof(wanted) <> 'object' OR jsonb_typeof(actual) IS DISTINCT FROM 'object'
  )
END
"""


@compiles(_Converged)
def _converged_as_sql(element: _Converged, compiler: SQLCompiler, **kw: Any) -> str:
    desired, reported = (compiler.process(document, **kw) for document in element.clauses)
    return _CONVERGED.format(desired=desired, reported=reported)


def drifted(device: Any) -> ColumnElement[bool]:
    """The device acknowledged the newest version, and yet is not converged. One that is not `readable` is not.

    The first and the third are the predicate of an index that a team may make: docs/performance.md says what it costs.
    """
    reported = device.reported_state
    return and_(
        device.desired_version == device.reported_version,
        device.desired_state != reported,  # equal documents are spared the rest
        reported.op("||")(device.desired_state) != reported,  # and those whose top level has all that desired asks
        readable(device),
        ~converged(device.desired_state, device.reported_state),
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


def refusable(version: SQLColumnExpression[int], device: Any) -> ColumnElement[bool]:
    """A device may refuse this version: it is the newest one, and not acknowledged."""
    newest: ColumnElement[bool] = version == device.desired_version
    return newest & pending(device)
