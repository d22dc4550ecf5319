"""What to do about a database error: a sentence added to it; the error itself stays what it was."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.exc import DBAPIError, ProgrammingError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sqlalchemy.engine import ExceptionContext

LOCK_NOT_AVAILABLE: Final = "55P03"
READ_ONLY_SQL_TRANSACTION: Final = "25006"
INSUFFICIENT_PRIVILEGE: Final = "42501"

_UNMIGRATED: Final = "The database is not migrated: run `alembic upgrade head` against it."
_RUN_AGAIN: Final = (
    "Another transaction stood in the way, and nothing of this one is written: roll back, and run all of it again."
)
_UNREACHABLE: Final = "PostgreSQL cannot be reached: start it, or correct the engine's URL."
_REFUSED: Final = " If it refuses, it says why below."
_UNSUPPORTED_BY_PGBOUNCER: Final = "unsupported startup parameter"
_POOLER: Final = (
    "PgBouncer stands between this engine and PostgreSQL, and refuses a setting that the engine sends at connect: make "
    "the engine with create_engine(..., pgbouncer=True) or create_async_engine(..., pgbouncer=True). If it is made so, "
    "the setting comes from `options` in the URL, from connect_args or from a variable such as PGGEQO: remove it."
)
_CLIENT_ENCODING: Final = (
    "Text can be written and read only if the session's client_encoding is UTF8: make the engine with "
    "iot_models.engine.create_engine, which sets it."
)
# A constraint's error quotes the row, or the key that is there twice. The words are in the server's language. A key is
# shown if it is made of columns only, and of none that holds a document.
_KEY: Final = re.compile(r"[^()]*\((?!(?:.*, )?(?:desired_state|reported_state|state)\b)[\w, ]+\)=")
# asyncpg quotes the value of a parameter that it cannot encode, whatever hide_parameters says.
_ARGUMENT: Final = re.compile(
    r"(invalid input for query argument \$\d+(?: in element #\d+ of executemany\(\) sequence)?).*", re.DOTALL
)
_ABOUT_A_ROW: Final = ("23", "44")  # constraints, and the WITH CHECK OPTION of a view
# Values out of range or of the wrong form, constraints, the WITH CHECK OPTION of a view, RAISE in a trigger.
_OF_THE_DATA: Final = ("22", "23", "44", "P0")
_LOST: Final = (
    "The connection is lost, and its transaction is not committed: roll back, and run all of it again. In AUTOCOMMIT "
    "mode the last statement may be written: read before you write again."
)
# Of a cluster: this connection stands, and one between its nodes does not.
_NODE_LOST: Final = (
    "A node of the cluster is lost or restarts. If this was the COMMIT, or in AUTOCOMMIT mode, nobody knows whether it "
    "is written: repeat a desired write with the same request_id, which is done once, and a report as it is. Otherwise "
    "nothing of the transaction is written: roll back, and run all of it again."
)
_CONNECTION_EXCEPTION: Final = "08"
_LOST_AT_COMMIT: Final = (
    "The connection is lost at the end of the transaction. If this was COMMIT, nobody knows whether it is committed: "
    "repeat its desired writes with the same request_id, each is done once, and its reports as they are."
)
_BY_SQLSTATE: Final[Mapping[str | None, str]] = {
    "42P01": _UNMIGRATED,  # undefined_table
    "42703": _UNMIGRATED,  # undefined_column
    INSUFFICIENT_PRIVILEGE: (
        "The role of this engine needs SELECT, INSERT, UPDATE, DELETE on device_state, and SELECT, INSERT, DELETE on "
        "device_shadow_history: GRANT them as the owner. If row level security is on: see docs/tenancy.md."
    ),
    "22P05": (  # untranslatable_character
        "The encoding of the database, or the session's client_encoding, does not have a character of it: use a "
        "database with ENCODING 'UTF8', and an engine made with iot_models.engine.create_engine. Nothing of the "
        "statement is written: roll back, to the savepoint if there is one."
    ),
    READ_ONLY_SQL_TRANSACTION: (
        "This connection only reads (a standby, or default_transaction_read_only): write through an engine on the "
        "primary. A URL that names several hosts finds it with target_session_attrs=read-write."
    ),
    LOCK_NOT_AVAILABLE: (
        "Another transaction holds a row of this statement, or the table, for longer than lock_timeout. Nothing of the "
        "statement is written: roll back, to the savepoint if there is one, and try again."
    ),
    "57014": (  # query_canceled
        "Cancelled, or longer than statement_timeout: a row that is locked, or a batch that is too large. Nothing of "
        "the statement is written: roll back, to the savepoint if there is one, and try again."
    ),
    "54000": (  # program_limit_exceeded
        "The ids of this row are together longer than an index of PostgreSQL takes, 2,700 bytes: use shorter ones."
    ),
    "57P01": _NODE_LOST,  # admin_shutdown
    "57P02": _NODE_LOST,  # crash_shutdown
    "57P03": _NODE_LOST,  # cannot_connect_now
    "XX000": (  # internal_error: what Citus says where a node fails while it commits, or does not get a lock in time
        "An internal error of the server; its log says more. Where it is a cluster: " + _NODE_LOST
    ),
    "40P01": _RUN_AGAIN,  # deadlock_detected
    "40001": _RUN_AGAIN,  # serialization_failure
}


def sqlstate(error: DBAPIError) -> str | None:
    """The SQLSTATE of a database error; None where the server sent none, as for a lost connection."""
    state: str | None = getattr(error.orig, "sqlstate", None)
    return state


def is_of_the_data(error: Exception) -> bool:
    """Whether the database, or a trigger in it, refused values; the same statement with others can succeed."""
    if isinstance(error, DBAPIError):
        return (sqlstate(error) or "").startswith(_OF_THE_DATA)
    return isinstance(error, UnicodeError)  # psycopg's, if the session's encoding cannot express a text


@contextmanager
def explained() -> Iterator[None]:
    """Add the way out to an error of the database or its driver that leaves the `with` block, if one is known."""
    try:
        yield
    except DBAPIError as error:
        if hint := _hint(error):
            error.add_detail(hint)
        raise
    except OSError as error:  # asyncpg's, if no server answers
        error.add_note(_UNREACHABLE)
        raise
    except UnicodeError as error:  # psycopg's, if the session's encoding cannot express a text
        error.add_note(_CLIENT_ENCODING)
        raise


def explain_commit(context: ExceptionContext) -> None:
    """Add the way out to an error of COMMIT, which no call of ours stands around: what to do if nobody knows its end.

    A listener for SQLAlchemy's `handle_error`.
    """
    error = context.sqlalchemy_exception
    if context.statement is not None or context.connection is None or not isinstance(error, DBAPIError):
        return
    if hint := _LOST_AT_COMMIT if context.is_disconnect else _by_sqlstate(error):
        error.add_detail(hint)


def hide_row(context: ExceptionContext) -> None:
    """Take out of a server's error what may quote documents. Its message, SQLSTATE and hint stay.

    A constraint's DETAIL quotes the row. CONTEXT, QUERY and LINE may quote the parameters of the statement, or a
    statement that a trigger has made of the row. The drivers have them as attributes, too.

    A listener for SQLAlchemy's `handle_error`.
    """
    original: Any = context.original_exception
    diag: Any = getattr(original, "diag", None)
    # asyncpg's own: what SQLAlchemy has wrapped, or, while rows are streamed, the error itself.
    asyncpgs: Any = original.__cause__ or original
    if getattr(diag, "sqlstate", None):
        said = str(original)
        detail = _without_a_row(diag.sqlstate, diag.message_detail)
        kept = "\n".join(
            [
                diag.message_primary or "",
                *([f"DETAIL:  {detail}"] if detail else []),
                *([f"HINT:  {diag.message_hint}"] if diag.message_hint else []),
            ]
        )
        if hasattr(original, "_info"):  # psycopg's: what `diag` reads
            hidden = {"CONTEXT", "INTERNAL_QUERY", *([] if detail else ["MESSAGE_DETAIL"])}
            read = original.__reduce__()[2]["_info"]
            original._info = {field: value for field, value in read.items() if field.name not in hidden}  # noqa: SLF001
    elif argument := _ARGUMENT.search(str(asyncpgs)):
        said, kept = argument.group(), f"{argument.group(1)}: its value does not fit"
        asyncpgs.__cause__ = None  # quotes the value, too
        _replace(asyncpgs, said, kept)
    elif hasattr(asyncpgs, "internal_query"):
        said = str(asyncpgs)
        asyncpgs.detail = _without_a_row(asyncpgs.sqlstate, asyncpgs.detail)
        asyncpgs.context = asyncpgs.internal_query = None
        original.detail = asyncpgs.detail  # SQLAlchemy's copy
        kept = str(asyncpgs)
    else:  # the server has said nothing
        return
    for error in filter(None, (context.sqlalchemy_exception, original)):
        _replace(error, said, kept)


def _replace(error: BaseException, said: str, kept: str) -> None:
    if said:
        error.args = tuple(part.replace(said, kept) if isinstance(part, str) else part for part in error.args)


def _without_a_row(state: str | None, detail: str | None) -> str | None:
    about_a_row = (state or "").startswith(_ABOUT_A_ROW)
    return None if about_a_row and not _KEY.match(detail or "") else detail


def _hint(error: DBAPIError) -> str | None:
    if error.connection_invalidated:
        return _LOST
    if error.statement is None and not isinstance(error, ProgrammingError):  # while it connected
        return _POOLER if _UNSUPPORTED_BY_PGBOUNCER in str(error.orig) else _UNREACHABLE + _REFUSED
    return _by_sqlstate(error)


def _by_sqlstate(error: DBAPIError) -> str | None:
    state = sqlstate(error)
    return _NODE_LOST if (state or "").startswith(_CONNECTION_EXCEPTION) else _BY_SQLSTATE.get(state)
