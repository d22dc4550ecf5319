"""The table in which Alembic keeps the revision of this history: one of our own, beside that of the application.

Databases that were migrated before it had a name of its own have it as `alembic_version`. That is ours if it has one
row, with one of our revisions, and `device_state` beside it is as that revision leaves it; the first command that
changes such a database renames it. Any other `alembic_version` belongs to another application.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from sqlalchemy import text

from iot_models._migrations.comparison import TABLE
from iot_models._migrations.history import added
from iot_models._migrations.obstacles import Obstacle, refuse
from iot_models._migrations.strangers import VERSION_TABLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from alembic.script import Script
    from sqlalchemy import Connection

log = logging.getLogger("alembic.iot_models")

# Alembic's own name, which every application has that chooses no other.
_DEFAULT: Final = "alembic_version"
_RENAME: Final = (
    "ALTER TABLE {0} RENAME TO {1}",
    "ALTER TABLE {1} RENAME CONSTRAINT {0}_pkc TO {1}_pkc",
)

# A plain table that only trusted roles can have made, and of which no trigger, policy or rule runs.
_MAY_BE_OURS: Final = text("""
    SELECT EXISTS (
      SELECT FROM pg_class c JOIN pg_class t ON t.oid = to_regclass(CAST(:table AS text))::oid
       AND t.relnamespace = c.relnamespace
       JOIN pg_constraint k ON k.conrelid = c.oid AND k.conname = CAST(:default AS text) || '_pkc'
       WHERE c.oid = to_regclass(CAST(:default AS text))::oid AND CAST(c.relkind AS text) = 'r'
         -- `device_state` is there, and so is trusted: see `strangers`.
         AND (c.relowner = t.relowner OR EXISTS (
                SELECT FROM pg_roles r WHERE r.oid = c.relowner AND (r.rolsuper OR r.rolname = current_user)))
         AND NOT (c.relhastriggers OR c.relrowsecurity OR c.relhasrules OR c.relhassubclass)
         AND pg_catalog.has_table_privilege(c.oid, 'SELECT')
         AND EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = 'version_num'
                        AND a.atttypid = 'varchar'::regtype::oid))
""")
_HAS: Final = text("""
    SELECT CAST(attname AS text) FROM pg_attribute
     WHERE attrelid = to_regclass(CAST(:table AS text))::oid AND attnum > 0 AND NOT attisdropped
    UNION ALL
    SELECT CAST(c.relname AS text) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
     WHERE i.indrelid = to_regclass(CAST(:table AS text))::oid
""")


def find(connection: Connection, scripts: Sequence[Script]) -> str:
    """The name of the table that has, or is to have, the revision of this history. Nothing is changed.

    Raises:
        CommandError: If it has more than one row; or if it is the application's, which runs our revisions with its own.
    """
    exists = text("SELECT to_regclass(CAST(:table AS text)) IS NOT NULL")
    if connection.scalar(exists, {"table": VERSION_TABLE}):
        rows = _rows(connection, VERSION_TABLE)
        if len(rows) > 1:
            fact = f"{VERSION_TABLE} has {len(rows)} rows ({', '.join(rows)}): no database stands at two revisions"
            refuse([Obstacle(fact, (), "find out which one is right (compare device_state), and DELETE the others")])
        return VERSION_TABLE
    if not connection.scalar(_MAY_BE_OURS, {"table": TABLE, "default": _DEFAULT}):
        return VERSION_TABLE
    rows = _rows(connection, _DEFAULT)
    ours = [revision for revision in rows if _fits(connection, revision, scripts)]
    if ours and rows[1:]:
        fact = (
            f"{_DEFAULT} has our revision {ours[0]} beside others: the application's Alembic runs our revisions, by "
            "its version_locations"
        )
        remedy = (
            "use its commands; or, to give our history back its own table, take our folder out of version_locations "
            f"and DELETE our row from {_DEFAULT}"
        )
        refuse([Obstacle(fact, (), remedy)])
    return _DEFAULT if ours else VERSION_TABLE


def refuse_unknown(heads: Sequence[str], scripts: Sequence[Script]) -> None:
    """Refuse to migrate a database at a revision that this package does not have.

    Raises:
        CommandError: If it is at one.
    """
    known = [script.revision for script in scripts]
    if found := [revision for revision in heads if revision not in known]:
        refuse([Obstacle(f"the database {unknown(found[0], known[-1])}", (), "install that version of iot_models")])


def unknown(revision: str, head: str) -> str:
    """What is said of a database at a revision that this package does not have."""
    shown = ascii(revision)[1:-1]
    return f"stands at {shown}, which is unknown here, where head is {head}: a newer iot_models migrated it"


def take_over(connection: Connection) -> None:
    """Rename the table that `find` found under Alembic's own name. The caller commits."""
    log.warning(
        "%s is that of device_state: it is now called %s. (If it is another application's: %s.)",
        _DEFAULT,
        VERSION_TABLE,
        "; ".join(statement.format(VERSION_TABLE, _DEFAULT) for statement in _RENAME),
    )
    for statement in _RENAME:
        connection.execute(text(statement.format(_DEFAULT, VERSION_TABLE)))


def _rows(connection: Connection, table: str) -> Sequence[str]:
    query = text(f"SELECT CAST(version_num AS text) FROM {table} ORDER BY 1")  # noqa: S608 - our names
    rows: Sequence[str] = connection.scalars(query).all()
    return rows


def _fits(connection: Connection, revision: str, scripts: Sequence[Script]) -> bool:
    """Whether `device_state` has what the revisions up to this one add, and nothing that later ones add."""
    known = [script.revision for script in scripts]
    if revision not in known:
        return False
    there = {*connection.scalars(_HAS, {"table": TABLE})}
    end = known.index(revision) + 1
    return _adds(scripts[:end]) <= there and not _adds(scripts[end:]) & there


def _adds(scripts: Sequence[Script]) -> set[str]:
    return {name for script in scripts for kind in ("columns", "indexes") for name in added(script, kind)}
