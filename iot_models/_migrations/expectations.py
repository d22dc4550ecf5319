"""Alembic operations with which a revision checks the database before it changes anything.

`op.iot_models_table_exists` and `op.iot_models_expect_table`. `iot_models._migrations.operations` imports this module,
which registers them.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from alembic import context
from alembic.operations import MigrateOperation, Operations
from alembic.util import CommandError
from sqlalchemy import text

from iot_models._migrations.history import added, revisions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sqlalchemy import Connection

    # (type, NOT NULL, default), in PostgreSQL's own words
    Column = tuple[str, bool, str | None]
    Columns = Mapping[str, Column]

UNEXPECTED: Final = "{table} is not the table that this migration expects"
REMEDY: Final = (
    "change the table so that it fits (python -m iot_models.migrate upgrade --help shows how), then run the same "
    "command again"
)


@Operations.register_operation("iot_models_table_exists")
class TableExists(MigrateOperation):
    """Whether a table exists. Offline nothing is known, and the answer is no."""

    def __init__(self, table: str) -> None:
        self.table = table

    @classmethod
    def iot_models_table_exists(cls, operations: Operations, table: str) -> bool:
        """Whether the search path has a table, a view or another relation of that name; offline False."""
        found: bool = operations.invoke(cls(table))
        return found


@Operations.implementation_for(TableExists)
def _table_exists(operations: Operations, operation: TableExists) -> bool:
    if operations.get_context().as_sql:
        return False
    found = operations.get_bind().scalar(
        text("SELECT to_regclass(CAST(:table AS text)) IS NOT NULL"), {"table": operation.table}
    )
    return bool(found)


@Operations.register_operation("iot_models_expect_table")
class ExpectTable(MigrateOperation):
    """Refuse to go on if a table is not the expected one."""

    def __init__(self, table: str, **expected: Any) -> None:
        self.table = table
        self.expected = expected

    @classmethod
    def iot_models_expect_table(
        cls,
        operations: Operations,
        table: str,
        *,
        required: Columns | None = None,
        primary_key: Sequence[str] | None = None,
        added_since: str | None = None,
    ) -> None:
        """Compare a table with what a revision expects. Nothing is changed; offline nothing is compared.

        What the table has besides was added by a team and is not a difference.

        Args:
            operations: Alembic's; callers leave it out.
            table: Its name.
            required: The columns that must exist.
            primary_key: The columns of the primary key, in order.
            added_since: A revision. It and all later revisions declare in `ADDS` which columns and indexes they add to
                this table. These may be missing, and an index may be INVALID; but a column or an index that has such a
                name and another definition is a difference. So what would stop a later revision is refused before
                the first revision changes anything.

        Raises:
            CommandError: If the table differs. The message lists every difference.
        """
        columns, indexes = _additions(table, added_since) if added_since else ({}, {})
        operations.invoke(
            cls(
                table,
                required=required or {},
                optional=columns,
                primary_key=list(primary_key or ()),
                indexes=indexes,
            )
        )


def _additions(table: str, since: str) -> tuple[dict[str, Column], dict[str, str]]:
    """The columns and the indexes that a revision and all later ones declare for a table, the oldest first."""
    columns: dict[str, Column] = {}
    indexes: dict[str, str] = {}
    scripts = revisions(context.script)
    first = next(index for index, script in enumerate(scripts) if script.revision == since)
    for script in scripts[first:]:
        columns |= added(script, "columns", table)
        indexes |= added(script, "indexes", table)
    return columns, indexes


# Printed SQL knows no partitions, and PostgreSQL builds the index of all of them under a lock only.
_NOT_PARTITIONED: Final = """
    DO $$ BEGIN
      IF EXISTS (SELECT FROM pg_class c
                  WHERE c.oid = to_regclass('{table}')::oid AND CAST(c.relkind AS text) = 'p') THEN
        RAISE EXCEPTION
          '{table} is partitioned, and printed SQL builds no indexes on partitions: migrate it online';
      END IF;
    END $$
"""


@Operations.implementation_for(ExpectTable)
def _expect_table(operations: Operations, operation: ExpectTable) -> None:
    if operations.get_context().as_sql:
        operations.execute(_NOT_PARTITIONED.format(table=operation.table))
        return
    found = list(differences(operations.get_bind(), operation.table, **operation.expected))
    if found:
        lines = "\n".join(f"  - {difference}" for difference in found)
        unexpected = UNEXPECTED.format(table=operation.table)
        raise CommandError(f"{unexpected}; nothing was changed:\n{lines}\n{REMEDY[0].upper()}{REMEDY[1:]}.")


def differences(
    connection: Connection,
    table: str,
    *,
    required: Columns = MappingProxyType({}),
    optional: Columns = MappingProxyType({}),
    primary_key: Sequence[str] = (),
    indexes: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[str]:
    """How a table differs from the expected one, a sentence each: `op.iot_models_expect_table` has the arguments.

    The columns in `optional` and the indexes may be missing.
    """
    # CAST: a driver may return the type "char" as bytes.
    kind = connection.scalar(
        text("SELECT CAST(relkind AS text) FROM pg_class WHERE oid = to_regclass(CAST(:table AS text))::oid"),
        {"table": table},
    )
    if kind is None:
        yield "it does not exist"
        return
    if kind not in {"r", "p"}:
        yield f"it is no table (pg_class.relkind is {kind!r}, expected 'r', or 'p' for a partitioned one)"
        return
    actual = {
        row.name: (row.type, row.not_null, row.default)
        for row in connection.execute(
            text("""
                SELECT a.attname AS name, format_type(a.atttypid, a.atttypmod) AS type, a.attnotnull AS not_null,
                       pg_get_expr(d.adbin, d.adrelid) AS default
                  FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
                 WHERE a.attrelid = to_regclass(CAST(:table AS text))::oid AND a.attnum > 0 AND NOT a.attisdropped
            """),
            {"table": table},
        )
    }
    for name in required:
        if name not in actual:
            yield f"column {name} is missing: expected {_describe(required[name])}"
    for name, column in {**optional, **required}.items():
        if name in actual and actual[name] != column:
            yield f"column {name} is {_describe(actual[name])}: expected {_describe(column)}"
    yield from unfit(connection, table, [name for name in actual if name in required or name in optional])
    if primary_key:
        yield from _key_difference(connection, table, primary_key)
    yield from index_differences(connection, table, indexes)


def index_differences(connection: Connection, table: str, indexes: Mapping[str, str]) -> Iterator[str]:
    """How the indexes of a table differ from the expected ones, a sentence each; the table itself may be missing."""
    for name, definition in indexes.items():
        row = find_index(connection, table, name)
        if row is not None and not row.ours:
            yield f"the name of index {name} is taken by {row.taken_by}"
        elif row is not None and row.valid and row.definition != definition:
            yield f"index {name} is {row.definition}: expected {definition}"


def unfit(connection: Connection, table: str, columns: Sequence[str]) -> Iterator[str]:
    """What is wrong with columns whose type, NOT NULL and default are the expected ones, a sentence each.

    A NOT NULL that is NOT VALID (PostgreSQL 18) stands beside rows with NULL. With a nondeterministic collation, two
    different ids are one to PostgreSQL and two to Python.
    """
    yield from connection.scalars(
        text("""
            SELECT pg_catalog.format('column %s may hold NULL, because its NOT NULL is NOT VALID: replace the '
                                     'NULLs, then ALTER TABLE %s VALIDATE CONSTRAINT %I',
                                     a.attname, k.conrelid::regclass, k.conname)
              FROM pg_constraint k JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = k.conkey[1]
             WHERE k.conrelid = to_regclass(CAST(:table AS text))::oid
               AND CAST(k.contype AS text) = 'n' AND NOT k.convalidated
               AND a.attname = ANY (CAST(:columns AS text[]))
            UNION ALL
            SELECT pg_catalog.format('column %s has the nondeterministic collation %s, for which different texts are '
                                     'equal: ALTER TABLE %s ALTER %I TYPE text COLLATE "default"',
                          a.attname, CAST(a.attcollation AS regcollation), a.attrelid::regclass, a.attname)
              FROM pg_attribute a JOIN pg_collation l ON l.oid = a.attcollation
             WHERE a.attrelid = to_regclass(CAST(:table AS text))::oid AND NOT l.collisdeterministic
               AND a.attname = ANY (CAST(:columns AS text[]))
             ORDER BY 1
        """),
        {"table": table, "columns": [*columns]},
    )


def _key_difference(connection: Connection, table: str, expected: Sequence[str]) -> Iterator[str]:
    actual = connection.scalars(
        text("""
            SELECT a.attname
              FROM pg_index i, pg_catalog.unnest(i.indkey) WITH ORDINALITY AS k(attnum, place)
              JOIN pg_attribute a ON a.attnum = k.attnum
             WHERE i.indrelid = to_regclass(CAST(:table AS text))::oid AND i.indisprimary AND a.attrelid = i.indrelid
             ORDER BY k.place
        """),
        {"table": table},
    ).all()
    if list(actual) != list(expected):
        yield f"the primary key is ({', '.join(actual)}): expected ({', '.join(expected)})"


def _describe(column: Column) -> str:
    kind, not_null, default = column
    return f"{kind}{' NOT NULL' if not_null else ''}{f' DEFAULT {default}' if default is not None else ''}"


def find_index(connection: Connection, table: str, name: str) -> Any:
    """What has that name in the schema of the table, or in that in which it will be made; None if nothing has it.

    Its `ours` says whether it is an index of this table, of which there are `valid` and `definition`. If it is not,
    `taken_by` says what it is.
    """
    return connection.execute(
        text("""
            SELECT i.indisvalid AS valid, coalesce(i.indrelid = to_regclass(CAST(:table AS text))::oid, false) AS ours,
                   regexp_replace(pg_get_indexdef(i.indexrelid), '^.* USING ', '') AS definition,
                   CASE WHEN i.indrelid IS NULL
                        THEN pg_catalog.pg_describe_object(CAST('pg_class' AS regclass), c.oid, 0)
                        ELSE 'another table''s' END AS taken_by
              FROM pg_class c LEFT JOIN pg_index i ON i.indexrelid = c.oid
             WHERE c.relname = CAST(:name AS text) AND c.relnamespace = coalesce(
                     (SELECT t.relnamespace FROM pg_class t WHERE t.oid = to_regclass(CAST(:table AS text))::oid),
                     (SELECT n.oid FROM pg_namespace n WHERE n.nspname = current_schema()))
        """),
        {"table": table, "name": name},
    ).one_or_none()
