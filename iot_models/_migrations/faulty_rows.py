"""Rows that are no shadows: raw SQL or another program wrote them, and ShadowService never does.

A section may be no JSON object, such as the JSON null that SQLAlchemy's default JSON column stores for None. A device
may have acknowledged a version that was never written, because its handler stored whatever the device said.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from iot_models._core.database_errors import LOCK_NOT_AVAILABLE, sqlstate
from iot_models._migrations.comparison import TABLE

if TYPE_CHECKING:
    from sqlalchemy import Connection

_QUERY_CANCELED: Final = "57014"
# How long a look at the whole table may take, and how many rows are looked at if that is not enough.
_SECONDS: Final = 3
_ROWS: Final = 10_000

_FAULTS: Final = {
    # What a fault is called, the rows that have it, and what mends them. A mended desired section is a desired write.
    "desired_state is no JSON object": (
        "jsonb_typeof(desired_state) <> 'object'",
        (
            "desired_state = '{}', desired_version = greatest(desired_version, reported_version) + 1, "
            "shadow_updated_at = now()"
        ),
    ),
    "reported_state is no JSON object": ("jsonb_typeof(reported_state) <> 'object'", "reported_state = '{}'"),
    # Nobody knows what such a device has applied. At 0 it is pending if there is anything to apply.
    "reported_version is greater than desired_version": (
        "reported_version > desired_version",
        "reported_version = 0",
    ),
}
_USED: Final = ("desired_state", "reported_state", "desired_version", "reported_version")


def faulty_rows(connection: Connection) -> list[str]:
    """How many rows of `device_state` are no shadows, and what mends them: a sentence for each fault.

    At most three seconds are spent on the whole table. If it is larger, ten thousand rows are looked at, and each
    sentence says so. Nothing is said if the table has no shadows, or if the role cannot read all of it.
    """
    if not connection.scalar(
        text("""
            SELECT count(*) = :columns AND bool_and(has_column_privilege(attrelid, attnum, 'SELECT'))
                   AND NOT pg_catalog.row_security_active(to_regclass(CAST(:table AS text))::oid)
              FROM pg_attribute
             WHERE attrelid = to_regclass(CAST(:table AS text))::oid AND NOT attisdropped
               AND attname = ANY (CAST(:names AS text[]))
        """),
        {"table": TABLE, "names": [*_USED], "columns": len(_USED)},
    ):
        return []
    counts = _counts(connection, TABLE, limit=f"{_SECONDS}s")
    where = f"of {TABLE}"
    if counts is None:
        sample = f"(SELECT {', '.join(_USED)} FROM {TABLE} LIMIT {_ROWS}) AS sample"  # noqa: S608 - our names
        counts = _counts(connection, sample, limit="0") or [0] * len(_FAULTS)
        where = (
            f"among the {_ROWS:,} rows of {TABLE} that were looked at (the whole table takes longer than {_SECONDS} s)"
        )
    return [
        f"{count:,} rows {where} are no shadows, because {fault}: UPDATE {TABLE} SET {mend} WHERE {condition};"  # noqa: S608
        for count, (fault, (condition, mend)) in zip(counts, _FAULTS.items(), strict=True)
        if count
    ]


def _counts(connection: Connection, source: str, *, limit: str) -> list[int] | None:
    """The number of rows with each fault; None if that takes too long, or if the table is locked."""
    numbers = ", ".join(f"count(*) FILTER (WHERE {condition})" for condition, _ in _FAULTS.values())
    try:
        with connection.begin_nested() as savepoint:
            connection.execute(
                text("SELECT set_config('statement_timeout', :limit, true), set_config('lock_timeout', '1s', true)"),
                {"limit": limit},
            )
            counts = [*connection.execute(text(f"SELECT {numbers} FROM {source}")).one()]  # noqa: S608 - ours
            savepoint.rollback()  # the settings end with it
    except DBAPIError as error:
        if sqlstate(error) not in {_QUERY_CANCELED, LOCK_NOT_AVAILABLE}:
            raise
        return None
    return counts
