"""Where a table is: in one piece, in partitions of PostgreSQL, or distributed over machines by Citus.

Three things differ for a migration. An index of a partitioned table is built on each partition. A distributed table
has no triggers, and locks rows of one tenant at a time. And where `device_state` is distributed, our other tables have
to be distributed in the same way, with the rows of a tenant on the same machine.

Citus has its catalog in pg_catalog, where nobody but a superuser can make anything. Without Citus it is missing, so a
query that names it runs only after a look whether it is there; PL/pgSQL plans a statement when it comes to it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from sqlalchemy import text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection

# By what each of our tables is distributed, if `device_state` is.
COLUMN: Final = "tenant_id"


class Place(StrEnum):
    """Where a table is."""

    PLAIN = "plain"
    PARTITIONED = "partitioned"
    DISTRIBUTED = "distributed"


class Distribution(NamedTuple):
    """How Citus has a table.

    Attributes:
        column: The column that says on which machine a row is; None: there is none.
        hashed: Whether by its hash, and each row is on one machine: what our migrations know.
        group: Tables of the same group have equal values of that column on the same machine.
    """

    column: str | None
    hashed: bool
    group: int


def _has_citus(connection: Connection) -> bool:
    return bool(connection.scalar(text("SELECT to_regclass('pg_catalog.pg_dist_partition') IS NOT NULL")))


def distribution(connection: Connection, table: str) -> Distribution | None:
    """How Citus has a table; None if the table is PostgreSQL's alone, or is a local one that Citus only knows of."""
    if not _has_citus(connection):
        return None
    row = connection.execute(
        text("""
            SELECT pg_catalog.column_to_column_name(logicalrelid, partkey) AS distributed_by,
                   CAST(partmethod AS text) = 'h' AND CAST(repmodel AS text) = 's' AS hashed, colocationid
              FROM pg_catalog.pg_dist_partition
             WHERE CAST(logicalrelid AS oid) = to_regclass(CAST(:table AS text))::oid
               AND NOT (CAST(partmethod AS text) = 'n' AND colocationid = 0)
        """),
        {"table": table},
    ).one_or_none()
    return None if row is None else Distribution(*row)


def place(connection: Connection, table: str) -> Place:
    """Where a table is, or would be made."""
    if distribution(connection, table):
        return Place.DISTRIBUTED
    partitioned = connection.scalar(
        text("""
            SELECT EXISTS (SELECT FROM pg_class c
                            WHERE c.oid = to_regclass(CAST(:table AS text))::oid AND CAST(c.relkind AS text) = 'p')
        """),
        {"table": table},
    )
    return Place.PARTITIONED if partitioned else Place.PLAIN


def partitions(connection: Connection, table: str) -> Sequence[str]:
    """The partitions of a table, at all levels, as a statement names them; empty if it has none."""
    found: Sequence[str] = connection.scalars(
        text("""
            SELECT CAST(t.relid AS text) FROM pg_catalog.pg_partition_tree(to_regclass(CAST(:table AS text))) AS t
             WHERE t.level > 0 ORDER BY t.level, 1
        """),
        {"table": table},
    ).all()
    return found


def coordinator(connection: Connection) -> str | None:
    """Where the coordinator is, if this server is a worker of a Citus cluster; None if it is not."""
    if not _has_citus(connection):
        return None
    if connection.scalar(text("SELECT groupid = 0 FROM pg_catalog.pg_dist_local_group")):
        return None
    named: str | None = connection.scalar(
        text("""
            SELECT pg_catalog.format('%s:%s', nodename, nodeport) FROM pg_catalog.pg_dist_node WHERE groupid = 0
        """)
    )
    return named or "which it does not know"


def misplaced(connection: Connection, table: str, others: Sequence[str]) -> list[str]:
    """Where Citus has our tables otherwise than they have to be, with what mends it: a sentence for each."""
    first = distribution(connection, table)
    if first is not None and (first.column != COLUMN or not first.hashed):
        by = f"by {first.column}" if first.column else "by no column"
        kind = by if first.hashed else f"{by}, and not by hash with one copy of each row"
        mended = f"SELECT undistribute_table('{table}'), then SELECT create_distributed_table('{table}', '{COLUMN}')"
        return [f"{table} is distributed {kind}: {mended}"]
    if first is not None and partitions(connection, table):
        return [f"{table} is distributed, and its shards are in partitions: SELECT undistribute_table('{table}')"]
    found = []
    for other in others:
        there = distribution(connection, other)
        if there is not None and first is None:
            found.append(f"{other} is distributed, and {table} is not: SELECT undistribute_table('{other}')")
        elif there is None and first is not None:
            found.append(f"{other} is not distributed as {table} is: {distribute(other, beside=table)}")
        elif there is not None and first is not None and (there.group, there.column) != (first.group, first.column):
            found.append(
                f"{other} has the rows of a tenant on other machines than {table}: "
                f"SELECT undistribute_table('{other}'), then {distribute(other, beside=table)}"
            )
    return found


def distribute(table: str, beside: str) -> str:
    """The statement that distributes a table as the other one is."""
    return f"SELECT create_distributed_table('{table}', '{COLUMN}', colocate_with => '{beside}')"


def distributed_beside(table: str, beside: str) -> str:
    """SQL that distributes a table as the other one is, if that is distributed and this one is not."""
    return f"""
        DO $$ BEGIN
          IF to_regclass('pg_catalog.pg_dist_partition') IS NOT NULL THEN
            IF EXISTS (SELECT FROM pg_catalog.pg_dist_partition
                        WHERE CAST(logicalrelid AS oid) = to_regclass('{beside}')::oid
                          AND CAST(partmethod AS text) = 'h')
               AND NOT EXISTS (SELECT FROM pg_catalog.pg_dist_partition
                                WHERE CAST(logicalrelid AS oid) = to_regclass('{table}')::oid)
            THEN
              PERFORM pg_catalog.create_distributed_table('{table}', '{COLUMN}', colocate_with => '{beside}');
            END IF;
          END IF;
        END $$
    """  # noqa: S608 - our names


# A session's settings do not reach the workers; those of a transaction do, if Citus is told so.
LOCK_TIMEOUT_EVERYWHERE: Final = """
    DO $$ BEGIN
      IF to_regclass('pg_catalog.pg_dist_partition') IS NOT NULL THEN
        SET LOCAL citus.propagate_set_commands = 'local';
        EXECUTE 'SET LOCAL lock_timeout = ' || pg_catalog.quote_literal(pg_catalog.current_setting('lock_timeout'));
      END IF;
    END $$
"""
