"""What to do about a database error: a sentence added to it; the error itself stays what it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sqlalchemy.exc import DBAPIError

if TYPE_CHECKING:
    from collections.abc import Mapping

LOCK_NOT_AVAILABLE: Final = "55P03"
READ_ONLY_SQL_TRANSACTION: Final = "25006"
INSUFFICIENT_PRIVILEGE: Final = "42501"

_UNMIGRATED: Final = "The database is not migrated: run `alembic upgrade head` against it."
_RUN_AGAIN: Final = (
    "Another transaction stood in the way, and nothing of this one is written: roll back, and run all of it again."
)
_UNREACHABLE: Final = "PostgreSQL cannot be reached: start it, or correct the engine's URL."
_REFUSED: Final = " If it refuses, it says why below."
_LOST: Final = (
    "The connection is lost, and its transaction is not committed: roll back, and run all of it again. In AUTOCOMMIT "
    "mode the last statement may be written: read before you write again."
)
_BY_SQLSTATE: Final[Mapping[str | None, str]] = {
    "42P01": _UNMIGRATED,  # undefined_table
    "42703": _UNMIGRATED,  # undefined_column
    "25006": (  # read_only_sql_transaction
        "This connection only reads (a standby, or default_transaction_read_only): write through an engine on the "
        "primary. A URL that names several hosts finds it with target_session_attrs=read-write."
    ),
    "55P03": (  # lock_not_available
        "Another transaction holds a row of this statement for longer than lock_timeout. Nothing of the statement is "
        "written: roll back, to the savepoint if there is one, and try again."
    ),
    "57014": (  # query_canceled
        "Cancelled, or longer than statement_timeout: a row that is locked, or a batch that is too large. Nothing of "
        "the statement is written: roll back, to the savepoint if there is one, and try again."
    ),
    "40P01": _RUN_AGAIN,  # deadlock_detected
    "40001": _RUN_AGAIN,  # serialization_failure
}


def sqlstate(error: DBAPIError) -> str | None:
    """The SQLSTATE of a database error; None where the server sent none, as for a lost connection."""
    state: str | None = getattr(error.orig, "sqlstate", None)
    return state


def add_hint(error: DBAPIError | OSError) -> None:
    """Add the way out, if one is known. asyncpg raises OSError where no server answers."""
    if not isinstance(error, DBAPIError):
        error.add_note(_UNREACHABLE)
        return
    if error.connection_invalidated:
        hint: str | None = _LOST
    elif error.statement is None:  # failed before any statement
        hint = _UNREACHABLE + _REFUSED
    else:
        hint = _BY_SQLSTATE.get(getattr(error.orig, "sqlstate", None))
    if hint:
        error.add_detail(hint)
