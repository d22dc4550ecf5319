"""A PostgreSQL that says that Citus has distributed tables: the way that a migration takes then, on one machine.

Only what the migrations ask of Citus is there, in pg_catalog as Citus has it, and it moves nothing. What Citus refuses
is refused here where that is easy, which is a trigger on a distributed table. tests/distributed asks the real one.
"""

from __future__ import annotations

from sqlalchemy import NullPool, create_engine, text

_CATALOG = (
    "SET allow_system_table_mods = on",
    """CREATE TABLE pg_catalog.pg_dist_partition (
         logicalrelid regclass PRIMARY KEY, partmethod "char" NOT NULL DEFAULT 'h', partkey text DEFAULT 'tenant_id',
         colocationid int NOT NULL DEFAULT 1, repmodel "char" NOT NULL DEFAULT 's')""",
    "CREATE TABLE pg_catalog.pg_dist_local_group (groupid int)",
    "INSERT INTO pg_catalog.pg_dist_local_group VALUES (0)",
    "CREATE TABLE pg_catalog.pg_dist_node (groupid int, nodename text, nodeport int)",
    """CREATE FUNCTION pg_catalog.column_to_column_name(regclass, text) RETURNS text LANGUAGE sql
         AS 'SELECT $2'""",
    """CREATE FUNCTION pg_catalog.create_distributed_table(t regclass, key text, colocate_with text DEFAULT 'default')
         RETURNS void LANGUAGE sql
         AS 'INSERT INTO pg_catalog.pg_dist_partition (logicalrelid, partkey) VALUES (t, key)'""",
    """CREATE FUNCTION pg_catalog.citus_drop_trigger() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN
         DELETE FROM pg_catalog.pg_dist_partition
          WHERE logicalrelid::oid IN (SELECT objid FROM pg_event_trigger_dropped_objects() WHERE object_type = 'table');
       END $$""",
    """CREATE FUNCTION pg_catalog.refuse_triggers() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN
         IF EXISTS (SELECT FROM pg_trigger t JOIN pg_catalog.pg_dist_partition p ON p.logicalrelid::oid = t.tgrelid
                     WHERE NOT t.tgisinternal AND p.partmethod = 'h') THEN
           RAISE feature_not_supported USING MESSAGE = 'triggers are not supported on distributed tables';
         END IF;
       END $$""",
    "CREATE EVENT TRIGGER citus_drop ON sql_drop EXECUTE FUNCTION pg_catalog.citus_drop_trigger()",
    """CREATE EVENT TRIGGER refuse_triggers ON ddl_command_end WHEN TAG IN ('CREATE TRIGGER')
         EXECUTE FUNCTION pg_catalog.refuse_triggers()""",
)


def pretend_citus(url: str) -> None:
    """Make the catalog of Citus in a database, with no table distributed."""
    with create_engine(url, poolclass=NullPool).begin() as connection:
        for statement in _CATALOG:
            connection.execute(text(statement))


def set_citus(url: str, statement: str) -> None:
    """Change that catalog."""
    with create_engine(url, poolclass=NullPool).begin() as connection:
        connection.execute(text("SET LOCAL allow_system_table_mods = on"))
        connection.execute(text(statement))
