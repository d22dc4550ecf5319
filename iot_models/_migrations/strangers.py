"""Objects of roles that nobody here trusts, under names that a migration uses: it would run their code as its own role.

A role that may create objects in a schema of the search path can make a table, a function or an operator before us. A
function or an operator of the right types is a better match than the catalog's, whatever stands first in the path.

Trusted are superusers, the role that migrates, and the owner of the database, with all that what they made uses. Nobody
is trusted for owning the table or its schema, since whoever may create objects can make them first; nor for a
membership, since whoever may grant one can arrange it, and all its members have what it has.

This is asked before everything else, in SQL that names the schema of each function and operator, and again while the
migration runs (`obstacles.looking_again`): others may have waited for that moment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sqlalchemy import text

from iot_models._core.shown_names import escaped_in_sql
from iot_models._migrations.comparison import COLUMNS, HISTORY, TABLE
from iot_models._migrations.dependents import PARKED, PARKED_HISTORY, PARKED_REFUSALS, TRIGGER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection

# Of our own, beside the `alembic_version` of the application.
VERSION_TABLE: Final = "alembic_version_iot_models"
# Tables that are ours alone. A team's triggers and policies on `device_state` and the history are its own business,
# also while the history is parked with them.
ALONE: Final = (VERSION_TABLE, PARKED, PARKED_REFUSALS, PARKED_HISTORY)
_TABLES: Final = (*ALONE, HISTORY)

# The rule, as a condition on a row `r` of pg_roles. `{=}` stands for the catalog's operator.
_TRUSTED: Final = """
       r.rolsuper OR r.rolname {=} CURRENT_USER OR r.rolname {=} 'pg_database_owner'
          OR EXISTS (SELECT FROM pg_catalog.pg_database d
                      WHERE d.datname {=} pg_catalog.current_database() AND d.datdba {=} r.oid)"""
_EQUAL: Final = "OPERATOR(pg_catalog.=)"
TRUSTED: Final = _TRUSTED.replace("{=}", _EQUAL)

REFUSAL: Final = "names that this command uses are taken by objects of other roles, and their code would run"

_FOUND: Final = (
    """
    WITH RECURSIVE path AS (
      SELECT n.oid FROM pg_catalog.pg_namespace n
       WHERE n.nspname {=} ANY (pg_catalog.current_schemas(false)) AND NOT (n.nspname {=} 'pg_catalog')),
    home AS (
      SELECT c.oid, c.relnamespace FROM pg_catalog.pg_class c
       WHERE c.oid {=} CAST(pg_catalog.to_regclass(CAST(:table AS text)) AS oid)),
    trusted AS (
      SELECT r.oid FROM pg_catalog.pg_roles r WHERE {trusted}),
    -- The table, our others, and those that inherit from them: whoever reads or writes the one uses the other.
    written (oid) AS (
      (SELECT home.oid FROM home UNION SELECT ours.oid FROM ours)
      UNION
      SELECT i.inhrelid FROM written JOIN pg_catalog.pg_inherits i ON i.inhparent {=} written.oid),
    -- What a trigger, a CHECK, an index, a default, a policy, a statistics object or a column of these refers to.
    used AS (
      SELECT f.refclassid, f.refobjid
        FROM written
        JOIN pg_catalog.pg_depend t ON t.refclassid {=} CAST(CAST('pg_catalog.pg_class' AS regclass) AS oid)
         AND t.refobjid {=} written.oid
         AND t.classid {=} ANY (CAST(CAST('{pg_catalog.pg_trigger,pg_catalog.pg_constraint,pg_catalog.pg_class,'
                                          'pg_catalog.pg_attrdef,pg_catalog.pg_policy,pg_catalog.pg_statistic_ext}'
                                          AS regclass[]) AS oid[]))
        JOIN pg_catalog.pg_depend f ON f.classid {=} t.classid AND f.objid {=} t.objid
      UNION ALL
      SELECT f.refclassid, f.refobjid
        FROM written
        JOIN pg_catalog.pg_depend f ON f.classid {=} CAST(CAST('pg_catalog.pg_class' AS regclass) AS oid)
         AND f.objid {=} written.oid),
    -- A domain of a domain, an array of one: whoever owns it can add a CHECK.
    types AS (
      SELECT used.refobjid AS oid FROM used
       WHERE used.refclassid {=} CAST(CAST('pg_catalog.pg_type' AS regclass) AS oid)
      UNION
      SELECT below.oid FROM types JOIN pg_catalog.pg_type t ON t.oid {=} types.oid
        CROSS JOIN LATERAL (VALUES (t.typbasetype), (t.typelem)) AS below (oid)
       WHERE NOT below.oid {=} CAST(0 AS oid)),
    ours AS (
      SELECT c.oid FROM pg_catalog.pg_class c JOIN path ON path.oid {=} c.relnamespace
       WHERE c.relname {=} ANY (CAST(CAST(:tables AS text[]) AS name[]))),
    alone AS (
      SELECT c.oid, CAST(c.relkind AS text) {=} 'r' AS is_table, c.relname {=} '{parked_history}' AS was_a_teams
        FROM pg_catalog.pg_class c JOIN path ON path.oid {=} c.relnamespace
       WHERE c.relname {=} ANY (CAST(CAST(:alone AS text[]) AS name[]))),
    named AS (
      SELECT CAST('pg_catalog.pg_class' AS regclass) AS class, c.oid, c.relowner AS owner
        FROM written JOIN pg_catalog.pg_class c ON c.oid {=} written.oid
      UNION ALL
      SELECT 'pg_catalog.pg_namespace', n.oid, n.nspowner FROM pg_catalog.pg_namespace n
       WHERE n.nspname {=} pg_catalog.current_schema() OR n.oid {=} (SELECT home.relnamespace FROM home)
      UNION ALL
      SELECT used.refclassid, used.refobjid, coalesce(p.proowner, o.oprowner)
        FROM used
        LEFT JOIN pg_catalog.pg_proc p ON p.oid {=} used.refobjid
         AND used.refclassid {=} CAST(CAST('pg_catalog.pg_proc' AS regclass) AS oid)
        LEFT JOIN pg_catalog.pg_operator o ON o.oid {=} used.refobjid
         AND used.refclassid {=} CAST(CAST('pg_catalog.pg_operator' AS regclass) AS oid)
       WHERE p.oid IS NOT NULL OR o.oid IS NOT NULL
      UNION ALL
      SELECT 'pg_catalog.pg_type', t.oid, t.typowner FROM types JOIN pg_catalog.pg_type t ON t.oid {=} types.oid
      UNION ALL
      SELECT 'pg_catalog.pg_proc', p.oid, p.proowner FROM pg_catalog.pg_proc p JOIN path ON path.oid {=} p.pronamespace
       WHERE p.proname {=} CAST(CAST(:trigger AS text) AS name)
          -- Where the column is missing, PostgreSQL takes `device_state.desired_state` for a call with one argument.
          OR p.proname {=} ANY (CAST(CAST(:columns AS text[]) AS name[]))
             AND p.pronargs OPERATOR(pg_catalog.>=) CAST(1 AS smallint)
             AND p.pronargs OPERATOR(pg_catalog.-) p.pronargdefaults OPERATOR(pg_catalog.<=) CAST(1 AS smallint)
      UNION ALL
      -- A condition of its own, and no EXISTS: this is asked while writers wait for a lock, and who fills a schema
      -- with functions must not make it slow. PostgreSQL looks for none of them in a temporary schema.
      SELECT 'pg_catalog.pg_proc', p.oid, p.proowner FROM pg_catalog.pg_proc p JOIN path ON path.oid {=} p.pronamespace
       WHERE p.proname {=} ANY (SELECT b.proname FROM pg_catalog.pg_proc b
                                 WHERE b.pronamespace {=} CAST(CAST('pg_catalog' AS regnamespace) AS oid))
      UNION ALL
      SELECT 'pg_catalog.pg_operator', p.oid, p.oprowner
        FROM pg_catalog.pg_operator p JOIN path ON path.oid {=} p.oprnamespace
       WHERE p.oprname {=} ANY (SELECT b.oprname FROM pg_catalog.pg_operator b
                                 WHERE b.oprnamespace {=} CAST(CAST('pg_catalog' AS regnamespace) AS oid))),
    carried AS (
      SELECT CAST('pg_catalog.pg_trigger' AS regclass) AS class, t.oid FROM pg_catalog.pg_trigger t
        JOIN alone ON alone.oid {=} t.tgrelid WHERE NOT t.tgisinternal AND NOT alone.was_a_teams
      UNION ALL
      SELECT 'pg_catalog.pg_rewrite', r.oid FROM pg_catalog.pg_rewrite r
        JOIN alone ON alone.oid {=} r.ev_class WHERE alone.is_table AND NOT alone.was_a_teams
      UNION ALL
      SELECT 'pg_catalog.pg_policy', p.oid FROM pg_catalog.pg_policy p
        JOIN alone ON alone.oid {=} p.polrelid WHERE NOT alone.was_a_teams
      UNION ALL
      -- A foreign key outlives the right to make it. What it does to the rows of its table fires the triggers there:
      -- before PostgreSQL 18, those that fire AFTER run as whoever migrates.
      SELECT 'pg_catalog.pg_constraint', k.oid FROM pg_catalog.pg_constraint k JOIN alone ON alone.oid {=} k.confrelid
      UNION ALL
      SELECT 'pg_catalog.pg_class', i.inhrelid FROM pg_catalog.pg_inherits i JOIN alone ON alone.oid {=} i.inhparent
        JOIN pg_catalog.pg_class child ON child.oid {=} i.inhrelid
       WHERE NOT (alone.was_a_teams AND child.relispartition)  -- a team may have partitioned its history
      UNION ALL
      SELECT 'pg_catalog.pg_class', i.inhparent FROM pg_catalog.pg_inherits i JOIN alone ON alone.oid {=} i.inhrelid)
    SELECT pg_catalog.concat(pg_catalog.pg_describe_object(named.class, named.oid, 0), ' of role ',
                             pg_catalog.quote_ident(CAST(pg_catalog.pg_get_userbyid(named.owner) AS text))) AS found
      FROM named
     WHERE NOT EXISTS (SELECT FROM trusted WHERE trusted.oid {=} named.owner)
       -- What belongs to an extension, if whoever can change the extension is trusted.
       AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                         JOIN pg_catalog.pg_extension e ON e.oid {=} d.refobjid
                         JOIN trusted ON trusted.oid {=} e.extowner
                        WHERE d.classid {=} CAST(named.class AS oid) AND d.objid {=} named.oid
                          AND CAST(d.deptype AS text) {=} 'e')
    UNION
    SELECT pg_catalog.concat(pg_catalog.pg_describe_object(carried.class, carried.oid, 0),
                             ', which a table of ours does not have')
      FROM carried
     ORDER BY 1
""".replace("{trusted}", _TRUSTED)
    .replace("{parked_history}", PARKED_HISTORY)
    .replace("{=}", _EQUAL)
)


def strangers(connection: Connection, *besides: str) -> Sequence[str]:
    """Each object that a migration would take for the catalog's or for its own. Nothing is changed or locked.

    `besides` are names of tables that it uses besides ours.
    """
    binds = {
        "table": TABLE,
        "tables": [*_TABLES, *besides],
        "alone": [*ALONE, *besides],
        "trigger": TRIGGER,
        "columns": [*COLUMNS],
    }
    found: Sequence[str] = connection.scalars(text(_FOUND), binds).all()
    return found


def refusal_in_sql() -> str:
    """SQL that asks the same where no connection can be asked: it raises an exception that names what it found."""
    question = _FOUND
    tables, alone, columns = ("'{" + ",".join(names) + "}'" for names in (_TABLES, ALONE, COLUMNS))
    for name, value in (
        ("tables", tables),
        ("alone", alone),
        ("table", f"'{TABLE}'"),
        ("trigger", f"'{TRIGGER}'"),
        ("columns", columns),
    ):
        question = question.replace(f":{name}", value)
    return f"""DO $$
DECLARE
  strangers pg_catalog.text := (
    SELECT pg_catalog.string_agg({escaped_in_sql("asked.found")}, pg_catalog.chr(10)) FROM ({question}) AS asked);
BEGIN
  IF strangers IS NOT NULL THEN
    RAISE EXCEPTION USING MESSAGE = '{REFUSAL}', DETAIL = strangers;
  END IF;
END $$"""  # noqa: S608 - our own text
