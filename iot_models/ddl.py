"""Alembic operations for a table that is in use: what revisions call as `op.lock_table(...)` and so on.

`alembic/env.py` imports this module, which registers them; a revision itself imports nothing from the package. Each
works offline (`--sql`) too, where nothing can be asked of the database.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from alembic.operations import MigrateOperation, Operations
from alembic.util import CommandError
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sqlalchemy import Connection, Engine

    # name: (type, NOT NULL, default), in PostgreSQL's own words
    Columns = Mapping[str, tuple[str, bool, str | None]]

log = logging.getLogger("alembic.iot_models")

TRIES: Final = 5
_FIRST_PAUSE: Final = 0.5  # seconds, doubled after each try: whoever queued behind us goes first
_PROGRESS_EVERY: Final = 2.0  # seconds
_LOCK_NOT_AVAILABLE: Final = "55P03"


@Operations.register_operation("lock_table")
class LockTable(MigrateOperation):
    """Take a lock for the rest of the transaction, or give up without having changed anything."""

    def __init__(self, table: str, mode: str) -> None:
        self.table = table
        self.mode = mode

    @classmethod
    def lock_table(cls, operations: Operations, table: str, mode: str) -> None:
        """Take the lock `mode` on `table`, tried up to five times with a growing pause, `lock_timeout` each.

        While a lock is waited for, writers queue behind it: hence many short waits and no long one.

        Raises:
            CommandError: If it could not be had. The message says who stands in the way and what to do.
        """
        operations.invoke(cls(table, mode))


@Operations.implementation_for(LockTable)
def _lock_table(operations: Operations, lock: LockTable) -> None:
    statement = f"LOCK TABLE {lock.table} IN {lock.mode} MODE"
    if operations.get_context().as_sql:
        operations.execute(statement)
        return
    connection = operations.get_bind()
    began = time.monotonic()
    pause = _FIRST_PAUSE
    holders = ""
    for attempt in range(1, TRIES + 1):
        try:
            with connection.begin_nested():
                connection.execute(text(statement))
        except OperationalError as error:
            if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
                raise
        else:
            return
        waited = time.monotonic() - began
        holders = _lock_holders(connection, lock.table)
        log.warning("%s is in use (%s): try %d of %d, %.1f s so far", lock.table, holders, attempt, TRIES, waited)
        if attempt < TRIES:
            time.sleep(pause)
            pause *= 2
    timeout = connection.scalar(text("SHOW lock_timeout"))
    raise CommandError(
        f"no lock on {lock.table} after {TRIES} tries of {timeout} in {time.monotonic() - began:.1f} s; this step "
        f"changed nothing. In the way: {holders}. End that transaction, or run the same command again at a quieter "
        "moment, or with a longer -x lock_timeout=10s (writers may then have to wait that long)."
    )


def _lock_holders(connection: Connection, table: str) -> str:
    rows = connection.execute(
        text("""
            SELECT DISTINCT a.pid, coalesce(nullif(a.application_name, ''), a.usename) AS who, a.state,
                   round(extract(epoch FROM clock_timestamp() - a.xact_start)) AS seconds
              FROM pg_locks l JOIN pg_stat_activity a USING (pid)
             WHERE l.relation = to_regclass(:table) AND l.granted AND l.pid <> pg_backend_pid()
             ORDER BY seconds DESC NULLS LAST LIMIT 3
        """),
        {"table": table},
    )
    return "; ".join(f"pid {row.pid} ({row.who}, {row.state}, for {row.seconds} s)" for row in rows) or "nobody now"


@Operations.register_operation("table_exists")
class TableExists(MigrateOperation):
    """Whether a table is there; offline, whether the database may be taken to have it: no."""

    def __init__(self, table: str) -> None:
        self.table = table

    @classmethod
    def table_exists(cls, operations: Operations, table: str) -> bool:
        """Whether the search path finds a table, view or the like of that name; False offline."""
        found: bool = operations.invoke(cls(table))
        return found


@Operations.implementation_for(TableExists)
def _table_exists(operations: Operations, operation: TableExists) -> bool:
    if operations.get_context().as_sql:
        return False
    found = operations.get_bind().scalar(text("SELECT to_regclass(:table) IS NOT NULL"), {"table": operation.table})
    return bool(found)


@Operations.register_operation("expect_table")
class ExpectTable(MigrateOperation):
    """Refuse to go on where a table is not the expected one."""

    def __init__(self, table: str, **expected: Any) -> None:
        self.table = table
        self.expected = expected

    @classmethod
    def expect_table(
        cls,
        operations: Operations,
        table: str,
        *,
        required: Columns | None = None,
        optional: Columns | None = None,
        primary_key: Sequence[str] | None = None,
        indexes: Mapping[str, str] | None = None,
    ) -> None:
        """Compare a table with what a revision expects; nothing is changed. Offline it passes.

        What the table has besides is a team's own and no difference.

        Args:
            operations: Alembic's; callers leave it out.
            table: Its name.
            required: Columns that must be there.
            optional: Columns that, where they are there, must be these.
            primary_key: The columns of the primary key, in order.
            indexes: Definitions from `USING` on, as `pg_get_indexdef` writes them. An index may be missing or INVALID.

        Raises:
            CommandError: If it differs, with every difference.
        """
        operations.invoke(
            cls(
                table,
                required=required or {},
                optional=optional or {},
                primary_key=list(primary_key or ()),
                indexes=indexes or {},
            )
        )


@Operations.implementation_for(ExpectTable)
def _expect_table(operations: Operations, operation: ExpectTable) -> None:
    if operations.get_context().as_sql:
        return
    found = list(_differences(operations.get_bind(), operation.table, **operation.expected))
    if found:
        lines = "\n".join(f"  - {difference}" for difference in found)
        raise CommandError(
            f"{operation.table} is not the table that this migration expects; nothing was changed:\n{lines}\n"
            "Change the table so that it fits (docs/migrations.md shows how), then run the same command again."
        )


def _differences(
    connection: Connection,
    table: str,
    *,
    required: Columns,
    optional: Columns,
    primary_key: list[str],
    indexes: Mapping[str, str],
) -> Iterator[str]:
    kind = connection.scalar(text("SELECT relkind FROM pg_class WHERE oid = to_regclass(:table)"), {"table": table})
    if kind != "r":
        yield f"it is no plain table (pg_class.relkind is {kind!r}, expected 'r')"
        return
    actual = {
        row.name: (row.type, row.not_null, row.default)
        for row in connection.execute(
            text("""
                SELECT a.attname AS name, format_type(a.atttypid, a.atttypmod) AS type, a.attnotnull AS not_null,
                       pg_get_expr(d.adbin, d.adrelid) AS default
                  FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
                 WHERE a.attrelid = to_regclass(:table) AND a.attnum > 0 AND NOT a.attisdropped
            """),
            {"table": table},
        )
    }
    for name, column in {**required, **optional}.items():
        if name not in actual:
            if name in required:
                yield f"column {name} is missing: expected {_describe(column)}"
        elif actual[name] != column:
            yield f"column {name} is {_describe(actual[name])}: expected {_describe(column)}"
    if primary_key:
        yield from _key_difference(connection, table, primary_key)
    for name, definition in indexes.items():
        row = _index(connection, table, name)
        if row is not None and not row.ours:
            yield f"the name of index {name} is taken by another table's"
        elif row is not None and row.valid and row.definition != definition:
            yield f"index {name} is {row.definition}: expected {definition}"


def _key_difference(connection: Connection, table: str, expected: list[str]) -> Iterator[str]:
    actual = connection.scalars(
        text("""
            SELECT a.attname
              FROM pg_index i, unnest(i.indkey) WITH ORDINALITY AS k(attnum, place)
              JOIN pg_attribute a ON a.attnum = k.attnum
             WHERE i.indrelid = to_regclass(:table) AND i.indisprimary AND a.attrelid = i.indrelid
             ORDER BY k.place
        """),
        {"table": table},
    ).all()
    if list(actual) != expected:
        yield f"the primary key is ({', '.join(actual)}): expected ({', '.join(expected)})"


def _describe(column: tuple[str, bool, str | None]) -> str:
    kind, not_null, default = column
    return f"{kind}{' NOT NULL' if not_null else ''}{f' DEFAULT {default}' if default is not None else ''}"


def _index(connection: Connection, table: str, name: str) -> Any:
    return connection.execute(
        text("""
            SELECT i.indisvalid AS valid, i.indrelid = to_regclass(:table) AS ours,
                   regexp_replace(pg_get_indexdef(i.indexrelid), '^.* USING ', '') AS definition
              FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
              JOIN pg_class t ON t.oid = to_regclass(:table) AND t.relnamespace = c.relnamespace
             WHERE c.relname = :name
        """),
        {"table": table, "name": name},
    ).one_or_none()


@Operations.register_operation("ensure_index")
class EnsureIndex(MigrateOperation):
    """Build an index while writers go on."""

    def __init__(self, table: str, name: str, definition: str) -> None:
        self.table = table
        self.name = name
        self.definition = definition

    @classmethod
    def ensure_index(cls, operations: Operations, table: str, name: str, definition: str) -> None:
        """Build an index CONCURRENTLY where it is missing; call it inside `autocommit_block()`.

        An INVALID one, which an interrupted build leaves behind, is replaced; a valid one is kept.

        Args:
            operations: Alembic's; callers leave it out.
            table: The table.
            name: The index.
            definition: From `USING` on: `btree (tenant_id)`.
        """
        operations.invoke(cls(table, name, definition))


@Operations.implementation_for(EnsureIndex)
def _ensure_index(operations: Operations, index: EnsureIndex) -> None:
    create = f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {index.name} ON {index.table} USING {index.definition}"
    if operations.get_context().as_sql:
        operations.execute(f"""
            DO $$ BEGIN
              IF EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass('{index.name}') AND NOT indisvalid) THEN
                DROP INDEX {index.name};
              END IF;
            END $$
        """)
        # A cancelled build would leave an INVALID index, which IF NOT EXISTS then keeps: wait as long as it takes.
        operations.execute("SET lock_timeout = 0")
        operations.execute(create)
        operations.execute("RESET lock_timeout")
        return
    connection = operations.get_bind()
    found = _index(connection, index.table, index.name)
    if found is not None and found.valid:
        return
    timeout = connection.scalar(text("SHOW lock_timeout"))
    connection.execute(text("SET lock_timeout = 0"))  # as above; a concurrent build holds no writer up
    with _progress_of_builds(connection.engine, index.name):
        if found is not None:
            log.warning("index %s is INVALID, left by an interrupted build: building it again", index.name)
            connection.execute(text(f"DROP INDEX CONCURRENTLY IF EXISTS {index.name}"))
        connection.execute(text(create))
    connection.execute(text("SELECT set_config('lock_timeout', :timeout, false)"), {"timeout": timeout})


@contextmanager
def _progress_of_builds(engine: Engine, name: str) -> Iterator[None]:
    """Log how far the build is, every two seconds, from a connection of its own."""
    done = threading.Event()

    def report() -> None:
        while not done.wait(_PROGRESS_EVERY):
            with engine.connect() as connection:
                for row in connection.execute(
                    text("""
                        SELECT phase, blocks_done, blocks_total, current_locker_pid AS waits_for
                          FROM pg_stat_progress_create_index WHERE datname = current_database()
                    """)
                ):
                    waits = f", waiting for the transaction of pid {row.waits_for}" if row.waits_for else ""
                    log.info(
                        "index %s: %s, block %d of %d%s", name, row.phase, row.blocks_done, row.blocks_total, waits
                    )

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        done.set()
        reporter.join()
