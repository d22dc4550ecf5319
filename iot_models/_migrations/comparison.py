"""How the tables in a database differ from those that the models describe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from alembic.util import CommandError
from sqlalchemy import MetaData, text
from sqlalchemy.exc import DBAPIError

from iot_models._core.database_errors import (
    INSUFFICIENT_PRIVILEGE,
    LOCK_NOT_AVAILABLE,
    READ_ONLY_SQL_TRANSACTION,
    sqlstate,
)
from iot_models._migrations.places import Place, place
from iot_models.models import DEFINED
from iot_models.models import HISTORY as DEFINED_HISTORY

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Connection, Table

TABLE: Final = DEFINED.name
HISTORY: Final = DEFINED_HISTORY.name
COLUMNS: Final = tuple(column.name for column in DEFINED.columns)
KEY: Final = tuple(column.name for column in DEFINED.primary_key)
_TEMPORARY: Final = MetaData(naming_convention=DEFINED.metadata.naming_convention)
# Each table, and the same as a temporary one.
_TABLES: Final = [(table, table.to_metadata(_TEMPORARY, schema="pg_temp")) for table in (DEFINED, DEFINED_HISTORY)]

_NEEDS_TEMP: Final = "comparing needs temporary tables: ask the primary, as a role that has TEMP on the database"
_REFUSALS: Final[Mapping[str | None, str]] = {
    READ_ONLY_SQL_TRANSACTION: _NEEDS_TEMP,  # on a standby
    INSUFFICIENT_PRIVILEGE: _NEEDS_TEMP,
    LOCK_NOT_AVAILABLE: (
        f"{TABLE} is locked by another session, a deployer at its last step or VACUUM FULL: ask again in a moment"
    ),
}

# A primary key is compared by its columns, everything else by its name, too. NOT NULL is compared with its column:
# PostgreSQL 18 also lists it as a constraint, which is left out here.
_ITEMS: Final = text("""
    SELECT 'column ' || CAST(a.attname AS text) AS item,
           pg_catalog.concat(format_type(a.atttypid, a.atttypmod), CASE WHEN a.attnotnull THEN ' NOT NULL' END,
                  ' DEFAULT ' || pg_get_expr(d.adbin, d.adrelid)) AS definition
      FROM pg_attribute a LEFT JOIN pg_attrdef d ON (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
     WHERE a.attrelid = CAST(:table AS oid) AND a.attnum > 0 AND NOT a.attisdropped
    UNION ALL
    SELECT 'the comment on the table', pg_catalog.quote_literal(description)
      FROM pg_catalog.obj_description(CAST(:table AS oid), 'pg_class') AS description WHERE description IS NOT NULL
    UNION ALL
    SELECT 'the comment on column ' || CAST(attname AS text),
           pg_catalog.quote_literal(pg_catalog.col_description(attrelid, attnum))
      FROM pg_attribute
     WHERE attrelid = CAST(:table AS oid) AND attnum > 0 AND pg_catalog.col_description(attrelid, attnum) IS NOT NULL
    UNION ALL
    SELECT CASE CAST(contype AS text) WHEN 'p' THEN 'the primary key' ELSE 'constraint ' || CAST(conname AS text) END,
           pg_catalog.replace(pg_get_constraintdef(oid), 'PRIMARY KEY ', '')
      FROM pg_constraint
     WHERE conrelid = CAST(:table AS oid) AND CAST(contype AS text) <> 'n'
    UNION ALL
    SELECT 'index ' || CAST(c.relname AS text),
           pg_catalog.concat(CASE WHEN NOT i.indisvalid THEN 'INVALID ' END, CASE WHEN i.indisunique THEN 'UNIQUE ' END,
                  substring(pg_get_indexdef(i.indexrelid) FROM ' USING (.*)$'))
      FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
     WHERE i.indrelid = CAST(:table AS oid) AND NOT i.indisprimary
""")


def differences(connection: Connection) -> list[str]:
    """How our tables differ from the models, a sentence for each difference; empty if they do not.

    Compared are the columns with type, NOT NULL and default, the comments, the primary key, and the indexes. What the
    table has besides was added by a team and is not a difference.

    Alembic's comparison does not see all of these. So the models' table is created as a temporary table, in a savepoint
    that is rolled back, and PostgreSQL describes both tables. No writer waits for this.

    Raises:
        CommandError: If temporary tables cannot be created, because the role lacks TEMP on the database or because this
            is a standby; or if the table is locked in ACCESS EXCLUSIVE mode for longer than a second.
    """
    return [line for table, temporary in _TABLES for line in _differences(connection, table, temporary)]


def _differences(connection: Connection, table: Table, temporary: Table) -> list[str]:
    found = connection.scalar(text("SELECT to_regclass(CAST(:table AS text))::oid"), {"table": table.name})
    if found is None:
        return [f"table {table.name} is missing"]
    try:
        with connection.begin_nested() as savepoint:
            # To print the predicate of an index, PostgreSQL locks the table, and so waits behind an ALTER TABLE that
            # waits itself.
            connection.execute(text("SET LOCAL lock_timeout = '1s'"))
            actual = _items(connection, found)
            temporary.create(connection, checkfirst=False)
            made = connection.scalar(
                text("SELECT to_regclass(CAST(:table AS text))::oid"), {"table": temporary.fullname}
            )
            expected = _items(connection, made)
            savepoint.rollback()
    except DBAPIError as error:
        refusal = _REFUSALS.get(sqlstate(error))
        if refusal is None:
            raise
        raise CommandError(f"{str(error.orig).strip()}; {refusal}") from error
    of_table = "" if table is DEFINED else f" of {table.name}"
    return [
        f"{item}{of_table} is {actual.get(item, 'missing')}: the models have {definition}"
        f"{_way_to(connection, table, item, definition, actual.get(item))}"
        for item, definition in expected.items()
        if actual.get(item) != definition
    ]


def _way_to(connection: Connection, table: Table, item: str, definition: str, actual: str | None) -> str:
    """How an index that is missing or INVALID is made, at head, where no upgrade makes it any more."""
    kind, _, name = item.partition(" ")
    partitioned = place(connection, table.name) is Place.PARTITIONED
    if actual and actual.startswith("INVALID"):  # also one that Citus marked so, because it was to be built again
        if partitioned:
            return f"; make an index of each partition that lacks it, and ALTER INDEX {name} ATTACH PARTITION for each"
        return f"; REINDEX INDEX CONCURRENTLY {name} mends it"
    if kind != "index" or actual:
        return ""
    taken_by = connection.scalar(
        text("""
            SELECT pg_catalog.concat(pg_catalog.pg_describe_object(CAST('pg_class' AS regclass), taken.oid, 0),
                                     ' of role ', quote_ident(CAST(pg_get_userbyid(taken.relowner) AS text)))
              FROM pg_class c JOIN pg_class taken ON taken.relnamespace = c.relnamespace
             WHERE c.oid = CAST(to_regclass(CAST(:table AS text)) AS oid) AND taken.relname = CAST(:name AS text)
        """),
        {"table": table.name, "name": name},
    )
    if taken_by:
        return f"; its name is taken by {taken_by}: rename or drop that first"
    create = f"CREATE {'UNIQUE ' * definition.startswith('UNIQUE ')}INDEX"
    using = f"USING {definition.removeprefix('UNIQUE ')}"
    if partitioned:
        return (
            f"; {create} {name} ON ONLY {table.name} {using}, then {create} CONCURRENTLY on each partition, and "
            f"ALTER INDEX {name} ATTACH PARTITION for each"
        )
    return f"; {create} CONCURRENTLY {name} ON {table.name} {using}"


def _items(connection: Connection, table: int) -> dict[str, str]:
    return {row.item: row.definition for row in connection.execute(_ITEMS, {"table": table})}
