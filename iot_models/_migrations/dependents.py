"""Objects of a team's that depend on columns of a table, or on the table: a view, a policy, an index, a publication."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sqlalchemy import text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection

# The table and the trigger that the downgrade from 076 creates.
PARKED: Final = "device_state_shadow_076"
TRIGGER: Final = "device_state_shadow_076_park"
# What the parked table says of itself until a downgrade that copies without a trigger has finished.
COPIES: Final = "Copies of shadows: a downgrade from 076 is at work, or was interrupted."
# What the downgrades from 078 and 079 park.
PARKED_HISTORY: Final = "device_shadow_history_078"
PARKED_REFUSALS: Final = "device_state_refusals_079"

# DROP COLUMN fails because of some of these ('n'), and silently drops others ('a'): an index, a CHECK, statistics.
# What a team made is theirs, so neither may happen. A view depends by its rule, a generated column by its expression.
_DEPENDENTS: Final = text("""
    WITH ours AS (SELECT to_regclass(CAST(:table AS text))::oid AS oid),
    columns AS (
      SELECT attnum FROM pg_attribute
       WHERE attrelid = (SELECT oid FROM ours) AND NOT attisdropped AND attname = ANY (CAST(:columns AS text[]))),
    found AS (
      SELECT DISTINCT d.classid, d.objid, d.objsubid
        FROM pg_depend d
       WHERE (d.refclassid = 'pg_class'::regclass::oid AND d.refobjid = (SELECT oid FROM ours)
              AND (d.refobjsubid IN (SELECT attnum FROM columns) OR :whole)
              OR :whole AND d.refclassid = 'pg_type'::regclass::oid
              AND d.refobjid IN (SELECT reltype FROM pg_class WHERE oid = (SELECT oid FROM ours)))
         AND (CAST(d.deptype AS text) = 'n' OR CAST(d.deptype AS text) = 'a' AND NOT :whole)
         -- The default of the column itself.
         AND NOT (d.classid = 'pg_attrdef'::regclass::oid AND EXISTS (
               SELECT FROM pg_attrdef f WHERE f.oid = d.objid AND f.adrelid = d.refobjid AND f.adnum = d.refobjsubid))
         -- PostgreSQL 18 has NOT NULL as a constraint.
         AND NOT (d.classid = 'pg_constraint'::regclass::oid AND EXISTS (
               SELECT FROM pg_constraint n WHERE n.oid = d.objid AND CAST(n.contype AS text) = 'n'))
         -- What goes with the table, if all of it goes.
         AND NOT (:whole AND EXISTS (
               SELECT FROM pg_depend o
                WHERE (o.classid, o.objid) = (d.classid, d.objid) AND CAST(o.deptype AS text) IN ('a', 'i')
                  AND o.refclassid = 'pg_class'::regclass::oid AND o.refobjid = (SELECT oid FROM ours)))
         AND NOT (:whole AND d.classid = 'pg_type'::regclass::oid)),
    objects AS (
      SELECT CASE WHEN r.rulename = '_RETURN' THEN 'pg_class'::regclass::oid
                  WHEN f.oid IS NOT NULL THEN 'pg_class'::regclass::oid ELSE found.classid END AS classid,
             CASE WHEN r.rulename = '_RETURN' THEN r.ev_class
                  WHEN f.oid IS NOT NULL THEN f.adrelid ELSE found.objid END AS objid,
             CASE WHEN f.oid IS NOT NULL THEN CAST(f.adnum AS integer) ELSE found.objsubid END AS objsubid
        FROM found LEFT JOIN pg_rewrite r ON found.classid = 'pg_rewrite'::regclass::oid AND r.oid = found.objid
             LEFT JOIN pg_attrdef f ON found.classid = 'pg_attrdef'::regclass::oid AND f.oid = found.objid)
    SELECT DISTINCT pg_catalog.pg_describe_object(o.classid, o.objid, o.objsubid) AS object,
           CASE
             WHEN o.classid = 'pg_class'::regclass::oid AND o.objsubid > 0 THEN
               pg_catalog.format('ALTER TABLE %s DROP COLUMN %I', c.oid::regclass, a.attname)
             WHEN o.classid = 'pg_class'::regclass::oid THEN
               pg_catalog.format('DROP %s %s', CASE CAST(c.relkind AS text)
                 WHEN 'v' THEN 'VIEW' WHEN 'm' THEN 'MATERIALIZED VIEW' WHEN 'i' THEN 'INDEX' WHEN 'I' THEN 'INDEX'
                 WHEN 'S' THEN 'SEQUENCE'
                 WHEN 'f' THEN 'FOREIGN TABLE' ELSE 'TABLE' END, c.oid::regclass)
             WHEN o.classid = 'pg_constraint'::regclass::oid THEN
               pg_catalog.format('ALTER TABLE %s DROP CONSTRAINT %I', k.conrelid::regclass, k.conname)
             WHEN o.classid = 'pg_policy'::regclass::oid THEN
               pg_catalog.format('DROP POLICY %I ON %s', p.polname, p.polrelid::regclass)
             WHEN o.classid = 'pg_trigger'::regclass::oid THEN
               pg_catalog.format('DROP TRIGGER %I ON %s', t.tgname, t.tgrelid::regclass)
             WHEN o.classid = 'pg_rewrite'::regclass::oid THEN
               pg_catalog.format('DROP RULE %I ON %s', w.rulename, w.ev_class::regclass)
             WHEN o.classid = 'pg_statistic_ext'::regclass::oid THEN
               pg_catalog.format('DROP STATISTICS %I.%I', CAST(s.stxnamespace AS regnamespace), s.stxname)
             WHEN o.classid = 'pg_proc'::regclass::oid THEN
               pg_catalog.format('DROP ROUTINE %s', CAST(o.objid AS regprocedure))
             WHEN o.classid = 'pg_publication_rel'::regclass::oid THEN
               pg_catalog.format('ALTER PUBLICATION %I DROP TABLE %s', b.pubname, l.prrelid::regclass)
           END AS statement
      FROM objects o
      LEFT JOIN pg_class c ON o.classid = 'pg_class'::regclass::oid AND c.oid = o.objid
      LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = o.objsubid AND o.objsubid > 0
      LEFT JOIN pg_constraint k ON o.classid = 'pg_constraint'::regclass::oid AND k.oid = o.objid
      LEFT JOIN pg_policy p ON o.classid = 'pg_policy'::regclass::oid AND p.oid = o.objid
      LEFT JOIN pg_trigger t ON o.classid = 'pg_trigger'::regclass::oid AND t.oid = o.objid
      LEFT JOIN pg_rewrite w ON o.classid = 'pg_rewrite'::regclass::oid AND w.oid = o.objid
      LEFT JOIN pg_statistic_ext s ON o.classid = 'pg_statistic_ext'::regclass::oid AND s.oid = o.objid
      LEFT JOIN pg_publication_rel l ON o.classid = 'pg_publication_rel'::regclass::oid AND l.oid = o.objid
      LEFT JOIN pg_publication b ON b.oid = l.prpubid
     -- Ours: the indexes that the downgrade drops, the copying trigger, and the parked table with its foreign key.
     WHERE NOT (c.relkind IS NOT NULL AND CAST(c.relkind AS text) IN ('i', 'I')
                  AND c.relname = ANY (CAST(:indexes AS text[])))
       AND coalesce(NOT (t.tgrelid = (SELECT oid FROM ours) AND t.tgname = CAST(:trigger AS text)), TRUE)
       AND coalesce(k.conrelid <> to_regclass(CAST(:parked AS text))::oid, TRUE)
       -- What a partition has from its parent, and the partitions themselves.
       AND NOT (coalesce(c.relispartition, FALSE) AND o.objsubid = 0)
       AND coalesce(t.tgparentid = CAST(0 AS oid), TRUE)
       AND coalesce(k.conparentid = CAST(0 AS oid) AND (k.conislocal OR k.contypid <> CAST(0 AS oid)), TRUE)
       AND coalesce(a.attinhcount = 0, TRUE)
     ORDER BY 1
""")


def dependents(
    connection: Connection,
    table: str,
    *,
    columns: Sequence[str],
    indexes: Sequence[str],
    whole: bool,
) -> dict[str, str | None]:
    """What would be lost with columns of a table, or would keep them from being dropped.

    Args:
        connection: Nothing is changed, and no row is locked.
        table: Its name.
        columns: Those that are dropped.
        indexes: Ours, which are dropped too.
        whole: Whether the table is dropped, too.

    Returns:
        Each object, as PostgreSQL describes it, with the statement that drops it; None for a kind of object that is
        not known here.
    """
    binds = {"table": table, "columns": columns, "indexes": indexes, "trigger": TRIGGER, "parked": PARKED}
    # The columns first, each with what is on the table itself; then, if the table goes, what is elsewhere.
    return {
        row.object: row.statement
        for everything in ([False, True] if whole else [False])
        for row in connection.execute(_DEPENDENTS, {**binds, "whole": everything})
    }


# PostgreSQL adds no column with a default to a table whose row type a column has, also as an array, in a domain or in
# another row.
_OF_ITS_ROW_TYPE: Final = text("""
    WITH RECURSIVE types AS (
      SELECT c.reltype AS oid FROM pg_class c WHERE c.oid = to_regclass(CAST(:table AS text))::oid
      UNION
      SELECT t.oid FROM types JOIN pg_type t
          ON t.typbasetype = types.oid OR t.typelem = types.oid
          OR EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = t.typrelid AND a.atttypid = types.oid))
    SELECT pg_catalog.format('column %I of %s', a.attname, a.attrelid::regclass)
      FROM types JOIN pg_attribute a ON a.atttypid = types.oid JOIN pg_class c ON c.oid = a.attrelid
     WHERE CAST(c.relkind AS text) IN ('r', 'm', 'p') AND NOT a.attisdropped ORDER BY 1
""")


def columns_of_its_row_type(connection: Connection, table: str) -> Sequence[str]:
    """The columns that keep a column from being added to a table, since they have its row type."""
    found: Sequence[str] = connection.scalars(_OF_ITS_ROW_TYPE, {"table": table}).all()
    return found
