"""The Alembic operation `op.iot_models_ensure_index`: an index is built while writers go on.

`environment` imports this module, which registers it. It also works offline (`--sql`), where the database cannot be
asked.
"""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from alembic import context
from alembic.operations import MigrateOperation, Operations
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from iot_models._core.shown_names import escaped
from iot_models._migrations.expectations import find_index
from iot_models._migrations.operations import patiently
from iot_models._migrations.options import LOCK_TIMEOUT
from iot_models._migrations.places import Place, place
from iot_models._migrations.strangers import refusal_in_sql

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Engine, Pool

log = logging.getLogger("alembic.iot_models")

_PROGRESS_EVERY: Final = 2.0  # seconds


@Operations.register_operation("iot_models_ensure_index")
class EnsureIndex(MigrateOperation):
    """Build an index while writers go on."""

    def __init__(self, table: str, name: str, definition: str) -> None:
        self.table = table
        self.name = name
        self.definition = definition

    @classmethod
    def iot_models_ensure_index(cls, operations: Operations, table: str, name: str, definition: str) -> None:
        """Build an index CONCURRENTLY if it is missing. Call it inside `autocommit_block()`.

        An INVALID index, which an interrupted build leaves behind, is replaced. A valid one is kept. Where the table is
        partitioned, each partition gets its index in this way, and the table one that consists of them.

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
            DO $$
            DECLARE built_anew boolean := EXISTS (
              SELECT FROM pg_index WHERE indexrelid = to_regclass('{index.name}')::oid AND NOT indisvalid);
            BEGIN
              -- Citus marks a valid index of a distributed table INVALID if it is to be built although it is there.
              IF to_regclass('pg_catalog.pg_dist_partition') IS NOT NULL THEN
                built_anew := built_anew OR EXISTS (
                  SELECT FROM pg_catalog.pg_dist_partition p JOIN pg_index i ON i.indrelid = CAST(p.logicalrelid AS oid)
                   WHERE i.indexrelid = to_regclass('{index.name}')::oid);
              END IF;
              IF built_anew THEN
                DROP INDEX {index.name};
              END IF;
            END $$
        """)  # noqa: S608 - our names
        # Without a timeout: a cancelled build would leave an INVALID index, which IF NOT EXISTS would then keep.
        operations.execute("SET lock_timeout = 0")
        operations.execute(create)
        # What the preamble set. RESET would let the statements that follow wait as long as the session's default says.
        given = context.get_x_argument(as_dictionary=True)
        operations.execute(f"SET lock_timeout = '{given.get('lock_timeout', LOCK_TIMEOUT)}'")
        operations.execute(refusal_in_sql())  # anybody may have made the build wait
        return
    connection = operations.get_bind()
    found = find_index(connection, index.table, index.name)
    if found is not None and found.valid:
        return
    if place(connection, index.table) is Place.PARTITIONED:
        _build_on_partitions(connection, index)
        return
    _build(connection, index.name, create, replaced=None if found is None else index.name)


def _build(connection: Connection, name: str, create: str, *, replaced: str | None) -> None:
    timeout = connection.scalar(text("SHOW lock_timeout"))
    connection.execute(text("SET lock_timeout = 0"))  # as above; no writer waits for a concurrent build
    pid: int = connection.scalar(text("SELECT pg_backend_pid()")) or 0
    with _progress_of_builds(connection.engine, name, pid):
        if replaced is not None:
            log.warning("index %s is INVALID, left by an interrupted build: it is built again", replaced)
            connection.execute(text(f"DROP INDEX CONCURRENTLY IF EXISTS {replaced}"))
        connection.execute(text(create))
    connection.execute(text("SELECT set_config('lock_timeout', :timeout, false)"), {"timeout": timeout})


# The partitions at all levels, a table before its own partitions.
_PARTITIONS: Final = text("""
    SELECT CAST(relid AS text) AS name, CAST(parentrelid AS text) AS parent, isleaf AS is_leaf
      FROM pg_catalog.pg_partition_tree(to_regclass(CAST(:table AS text))) AS partition
     WHERE level > 0 ORDER BY level, 1
""")
# An index of a partition that is, or can be, a part of an index of its parent; one that is, or is valid, before others.
_PART: Final = text("""
    SELECT CAST(CAST(i.indexrelid AS regclass) AS text) AS name, i.indisvalid AS valid,
           h.inhparent IS NOT NULL AS attached
      FROM pg_index i LEFT JOIN pg_inherits h ON h.inhrelid = i.indexrelid
     WHERE i.indrelid = to_regclass(CAST(:table AS text))::oid AND NOT i.indisunique
       AND coalesce(h.inhparent = to_regclass(CAST(:whole AS text))::oid, true)
       AND regexp_replace(pg_get_indexdef(i.indexrelid), '^.* USING ', '')
         = regexp_replace(pg_get_indexdef(to_regclass(CAST(:whole AS text))::oid), '^.* USING ', '')
     ORDER BY 3 DESC, 2 DESC LIMIT 1
""")


def _build_on_partitions(connection: Connection, index: EnsureIndex) -> None:
    """Build an index of each partition CONCURRENTLY, and put them together. What was built already is used.

    PostgreSQL builds no index of a partitioned table concurrently. An index `ON ONLY` the table is empty and INVALID
    until each partition has its part; partitions that are added later get theirs from it. PostgreSQL chooses the names
    of the parts, as it will for those.
    """

    def briefly(table: str, statement: str) -> None:
        patiently(connection, table, lambda: connection.execute(text(statement)))

    using = f"USING {index.definition}"
    briefly(index.table, f"CREATE INDEX IF NOT EXISTS {index.name} ON ONLY {index.table} {using}")
    table = connection.scalar(text("SELECT CAST(to_regclass(CAST(:table AS text)) AS text)"), {"table": index.table})
    wholes = {table: index.name}
    for partition in connection.execute(_PARTITIONS, {"table": index.table}).all():
        asked = {"table": partition.name, "whole": wholes[partition.parent]}
        part = connection.execute(_PART, asked).one_or_none()
        if partition.is_leaf and (part is None or not part.valid):
            _build(
                connection,
                f"{index.name} of {partition.name}",
                f"CREATE INDEX CONCURRENTLY ON {partition.name} {using}",
                replaced=None if part is None else part.name,
            )
        elif part is None:
            briefly(partition.name, f"CREATE INDEX ON ONLY {partition.name} {using}")
        part = part if part is not None and part.valid else connection.execute(_PART, asked).one()
        if not part.attached:
            briefly(partition.name, f"ALTER INDEX {wholes[partition.parent]} ATTACH PARTITION {part.name}")
        wholes[partition.name] = part.name


# How far the build is, and whom it waits for: also before it has begun, when nobody else would name that.
_BUILD: Final = """
    SELECT pg_catalog.concat_ws(', ', coalesce(p.phase, 'not begun'),
             'block ' || CAST(p.blocks_done AS text) || ' of ' || CAST(p.blocks_total AS text),
             'waiting for ' || (
               SELECT string_agg(
                        CASE WHEN pid = 0 THEN (
                          SELECT pg_catalog.concat('the prepared transaction ', string_agg(quote_literal(gid), ', '),
                                                   ', which stays until ROLLBACK PREPARED')
                            FROM pg_prepared_xacts WHERE database = current_database())
                        ELSE pg_catalog.format('the transaction of pid %s, role %s, application %s', pid, usename,
                                               coalesce(nullif(application_name, ''), '?')) END, '; ')
                 FROM (SELECT DISTINCT pid FROM pg_catalog.unnest(pg_blocking_pids(building.pid)) AS b (pid)) AS holders
                      LEFT JOIN pg_stat_activity USING (pid)))
      FROM (VALUES ({pid})) AS building (pid) LEFT JOIN pg_stat_progress_create_index p ON p.pid = building.pid
"""


@contextmanager
def _progress_of_builds(engine: Engine, name: str, pid: int) -> Iterator[None]:
    """Log every two seconds how far the build of this session is, and whom it waits for."""
    done = threading.Event()

    def report() -> None:
        # A pool of its own: the caller's may have room for one connection only, and a wait for it would not end.
        pool = engine.pool.recreate()
        try:
            while not done.wait(_PROGRESS_EVERY):
                # Without a second connection there is no progress to log; the build goes on.
                with suppress(SQLAlchemyError, engine.dialect.loaded_dbapi.Error):
                    log.info("index %s: %s", name, escaped(_state_of_build(pool, pid)))
        finally:
            pool.dispose()

    if engine.dialect.is_async:  # its connections belong to the event loop, not to a thread
        yield
        return
    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        done.set()
        reporter.join(_PROGRESS_EVERY)  # the server may let it wait for a connection


def _state_of_build(pool: Pool, pid: int) -> str:
    connection = pool.connect()
    try:
        cursor = connection.cursor()
        cursor.execute(_BUILD.format(pid=pid))
        return str(*cursor.fetchall()[0])
    finally:
        connection.invalidate()
