"""Where a migration looks for what it names: in the schema of `device_state` first, and in no other one that has ours.

That schema is the one that the caller names, else the first of the search path that has a `device_state`, else the
first of the search path. The others follow, since what a team has attached to the table (an event trigger, a trigger)
may need them; but without those that have an object with a name of ours: it would be taken for the right one.

The query names the schema of each function, operator and type: until it has run, a schema can stand before pg_catalog.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from sqlalchemy import event, text

from iot_models._migrations.comparison import HISTORY, TABLE
from iot_models._migrations.dependents import PARKED, PARKED_HISTORY, PARKED_REFUSALS, TRIGGER
from iot_models._migrations.obstacles import Obstacle, refuse
from iot_models._migrations.strangers import TRUSTED, VERSION_TABLE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection

_OURS: Final = f"{TABLE},{HISTORY},{PARKED},{PARKED_HISTORY},{PARKED_REFUSALS},{VERSION_TABLE}"
# `{schema}` stands for what the caller names.
_PATH: Final = f"""
    WITH path AS (
      SELECT n.oid, n.nspname, p.place
        FROM ROWS FROM (pg_catalog.unnest(pg_catalog.current_schemas(false))) WITH ORDINALITY AS p (name, place)
        JOIN pg_catalog.pg_namespace n ON n.nspname {{=}} p.name
       WHERE NOT n.nspname OPERATOR(pg_catalog.~) '^pg_'),
    taken AS (
      SELECT c.relnamespace AS oid, c.relname {{=}} '{TABLE}' AS has_table FROM pg_catalog.pg_class c
       WHERE c.relname {{=}} ANY ('{{{{{_OURS}}}}}')
      UNION ALL
      SELECT p.pronamespace, false FROM pg_catalog.pg_proc p WHERE p.proname {{=}} '{TRIGGER}'),
    home AS (
      SELECT coalesce(
        CAST({{schema}} AS pg_catalog.text),
        (SELECT CAST(path.nspname AS pg_catalog.text) FROM path
          WHERE EXISTS (SELECT FROM taken WHERE taken.oid {{=}} path.oid AND taken.has_table)
          ORDER BY path.place LIMIT 1),
        (SELECT CAST(path.nspname AS pg_catalog.text) FROM path ORDER BY path.place LIMIT 1)) AS name)
    SELECT pg_catalog.set_config('search_path', coalesce((
             SELECT pg_catalog.string_agg(pg_catalog.quote_ident(s.name), ', ' ORDER BY s.place) FROM (
               SELECT home.name, 0 FROM home
               UNION ALL
               SELECT CAST(path.nspname AS pg_catalog.text), path.place FROM path CROSS JOIN home
                WHERE NOT path.nspname {{=}} CAST(home.name AS pg_catalog.name)
                  AND NOT EXISTS (SELECT FROM taken WHERE taken.oid {{=}} path.oid)) AS s (name, place)), ''), false)
"""  # noqa: S608 - our names


# Who may create objects in the first schema of the path, but those that `strangers` trusts.
_CREATORS: Final = text(f"""
    SELECT pg_catalog.format('REVOKE CREATE ON SCHEMA %I FROM %s', CAST(n.nspname AS text),
                             coalesce(quote_ident(CAST(r.rolname AS text)), 'PUBLIC'))
      FROM pg_namespace n CROSS JOIN aclexplode(n.nspacl) a LEFT JOIN pg_roles r ON r.oid = a.grantee
     WHERE n.nspname = current_schema() AND a.privilege_type = 'CREATE'
       AND NOT coalesce({TRUSTED}, false)
     ORDER BY 1
""")  # noqa: S608 - our own text


def set_path(connection: Connection, schema: str | None) -> None:
    """Set the search path of the session, for `schema` or, if it is None, for what the search path says.

    Raises:
        CommandError: If there is no such schema, or this role may not use it.
    """
    first = refuse_unusual_path(connection)
    connection.execute(text(_query(":schema")), {"schema": schema})
    home, role = connection.execute(text("SELECT CAST(current_schema() AS text), CAST(current_user AS text)")).one()
    if schema is not None and home != schema:
        fact = f"there is no schema {schema!a} in this database, or role {role!a} may not use it"
        refuse([Obstacle(fact, (), "create it, or grant USAGE and CREATE on it, as the owner of the database")])
    if home is None:
        fact = "the search path has no schema that this role may use"
        refuse([Obstacle(fact, (), "name one (--schema, or in the URL ?options=-c search_path=...)")])
    if first not in {None, home} and (creators := connection.scalars(_CREATORS).all()):
        fact = (
            f"schema {home!a} is not the first of the search path, and others may create objects in it: triggers of "
            "yours would find theirs"
        )
        refuse([Obstacle(fact, creators, "do that, or put the schema first in the search path of this role")])


def refuse_unusual_path(connection: Connection) -> str | None:
    """Refuse a search path with a schema before pg_catalog, whose types and functions all that follows would use.

    Returns:
        The first schema of the path.

    Raises:
        CommandError: If there is one.
    """
    path, first = connection.execute(
        text(
            "SELECT pg_catalog.array_to_string(pg_catalog.current_schemas(true), ','), "
            "CAST(pg_catalog.current_schema() AS pg_catalog.text)"
        )
    ).one()
    if not re.match(r"(pg_temp_\d+,)?pg_catalog(,|$)", path):
        fact = f"the search path ({path}) has a schema before pg_catalog"
        refuse([Obstacle(fact, (), "take pg_catalog out of it: it comes first by itself")])
    return first if first is None else str(first)


@contextmanager
def narrowed(connection: Connection) -> Iterator[None]:
    """Let SQLAlchemy's and Alembic's own statements find the catalog's operators and functions only.

    They compare a name with VARCHAR, for which a stranger's operator is a better match than the catalog's. They name
    the schema of each table, and so need no search path; but what `alembic check` reads does. Our statements need one,
    and compare exact types.
    """
    path = connection.scalar(text("SELECT pg_catalog.current_setting('search_path')"))

    def search(statement: str, where: str) -> None:
        looks = "pg_catalog.pg_class.relname" in statement and "pg_table_is_visible" not in statement
        if looks or f".{VERSION_TABLE}" in statement:
            connection.connection.cursor().execute(f"SET search_path = {where}")

    def narrow(_connection: Connection, _cursor: object, statement: str, *_rest: object) -> None:
        search(statement, "pg_catalog, pg_temp")

    def widen(_connection: Connection, _cursor: object, statement: str, *_rest: object) -> None:
        search(statement, str(path))

    event.listen(connection, "before_cursor_execute", narrow)
    event.listen(connection, "after_cursor_execute", widen)
    try:
        yield
    finally:
        event.remove(connection, "before_cursor_execute", narrow)
        event.remove(connection, "after_cursor_execute", widen)


def in_sql(schema: str | None) -> str:
    """SQL that sets the same path where no connection can be asked; it raises an exception if there is no `schema`."""
    if schema is None:
        return f"DO $$ BEGIN PERFORM * FROM ({_query('NULL')}) AS path; END $$"
    # Octal: neither the end of the block nor a parameter of Alembic's.
    literal = schema.replace("\\", "\\\\").replace("'", "''")
    for character in "$:%":
        literal = literal.replace(character, f"\\{ord(character):03o}")
    return f"""DO $$ BEGIN
  PERFORM * FROM ({_query(f"E'{literal}'")}) AS path;
  IF NOT coalesce(pg_catalog.current_schema() OPERATOR(pg_catalog.=) E'{literal}', false) THEN
    RAISE EXCEPTION USING MESSAGE = pg_catalog.concat('there is no schema ', pg_catalog.quote_ident(E'{literal}'),
      ', or this role may not use it');
  END IF;
END $$"""


def _query(schema: str) -> str:
    return _PATH.format(**{"=": "OPERATOR(pg_catalog.=)", "schema": schema})
