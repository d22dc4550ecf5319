"""How a role gets around row level security on `device_state`, and who gets in the way of the statements of others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sqlalchemy import text

from iot_models.models import TABLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection

# A role counts as all that it can become by SET ROLE. As in `statements`, no operator or function of a stranger's is a
# better match than the catalog's.
_WAYS: Final = text("""
    WITH me AS (
      SELECT oid, rolsuper, CAST(rolname AS text) AS rolname FROM pg_roles
       WHERE CAST(rolname AS text) = CAST(:role AS text)),
    role AS (
      SELECT r.*, CASE WHEN r.oid = me.oid THEN 'it' ELSE quote_ident(CAST(r.rolname AS text)) END AS subject
        FROM me JOIN pg_roles r ON r.oid = me.oid OR NOT me.rolsuper AND pg_has_role(me.oid, r.oid,
               -- From 16 on, a membership can give neither its rights nor SET ROLE.
               CASE WHEN CAST(current_setting('server_version_num') AS integer) < 160000 THEN 'MEMBER'
                    ELSE 'USAGE, SET, MEMBER WITH ADMIN OPTION' END)),
    target AS (
      SELECT c.oid, c.relowner, c.relacl, c.relnamespace, quote_ident(CAST(c.relname AS text)) AS name
        FROM pg_class c WHERE c.oid = CAST(to_regclass(CAST(:table AS text)) AS oid))

    SELECT subject || CASE WHEN rolsuper THEN ' is a superuser' ELSE ' has BYPASSRLS' END AS way
      FROM role WHERE rolsuper OR rolbypassrls
    UNION ALL
    SELECT subject || ' has REPLICATION, and a replication slot shows it every row' FROM role
     WHERE rolreplication AND NOT rolsuper
    UNION ALL
    SELECT subject || ' has CREATEROLE, and can make itself a member of the owner before PostgreSQL 16' FROM role
     WHERE rolcreaterole AND NOT rolsuper AND CAST(current_setting('server_version_num') AS integer) < 160000
    UNION ALL
    SELECT 'it is a member of ' || subject || ', which reaches the files of the server' FROM role
     WHERE CAST(rolname AS text) IN ('pg_execute_server_program', 'pg_read_server_files', 'pg_write_server_files')
    UNION ALL
    SELECT pg_catalog.format('%s may execute %s, which reach the files of the server', subject,
                             string_agg(CAST(CAST(p.oid AS regprocedure) AS text), ', ' ORDER BY p.oid))
      FROM role JOIN pg_proc p ON p.pronamespace = CAST(CAST('pg_catalog' AS regnamespace) AS oid)
       AND CAST(p.proname AS text) IN ('pg_read_file', 'pg_read_binary_file', 'lo_import', 'lo_export')
     WHERE NOT rolsuper AND has_function_privilege(role.oid, p.oid, 'EXECUTE') GROUP BY subject
    UNION ALL
    SELECT subject || ' owns the table' FROM role JOIN target ON relowner = role.oid
    UNION ALL
    SELECT subject || ' owns the schema ' || quote_ident(CAST(nspname AS text)) || ', and may drop the table'
      FROM target JOIN pg_namespace n ON n.oid = relnamespace JOIN role ON role.oid = nspowner
    UNION ALL
    SELECT subject || ' owns the database' FROM role JOIN pg_database d ON d.datdba = role.oid
     WHERE d.datname = current_database()
    UNION ALL
    SELECT pg_catalog.format('%s may use what no policy limits (REVOKE %s ON %s FROM %s)',
                             coalesce(subject, 'everybody'),
                             string_agg(privilege_type, ', ' ORDER BY privilege_type), target.name,
                             coalesce(quote_ident(CAST(rolname AS text)), 'PUBLIC'))
      FROM target CROSS JOIN aclexplode(relacl) LEFT JOIN role ON role.oid = grantee
     WHERE privilege_type IN ('REFERENCES', 'TRIGGER', 'TRUNCATE') AND grantee <> relowner
       AND (grantee = CAST(0 AS oid) OR role.oid IS NOT NULL)
     GROUP BY subject, rolname, target.name
    UNION ALL
    SELECT pg_catalog.format('%s may use what no policy limits (REVOKE REFERENCES (%s) ON %s FROM %s)',
                             coalesce(subject, 'everybody'),
                             string_agg(quote_ident(CAST(attname AS text)), ', ' ORDER BY attnum), target.name,
                             coalesce(quote_ident(CAST(rolname AS text)), 'PUBLIC'))
      FROM target JOIN pg_attribute ON attrelid = target.oid CROSS JOIN aclexplode(attacl)
           LEFT JOIN role ON role.oid = grantee
     WHERE privilege_type = 'REFERENCES' AND grantee <> relowner
       AND (grantee = CAST(0 AS oid) OR role.oid IS NOT NULL)
     GROUP BY subject, rolname, target.name
    UNION ALL
    SELECT pg_catalog.format('%s owns the function %s, which runs with the rights of whoever writes: %s calls it',
                             subject, CAST(CAST(p.oid AS regprocedure) AS text),
                             pg_describe_object(t.classid, t.objid, 0))
      FROM target
      JOIN pg_depend t ON t.refclassid = CAST(CAST('pg_class' AS regclass) AS oid) AND t.refobjid = target.oid
       AND t.classid = ANY (CAST(CAST('{pg_trigger,pg_constraint,pg_class,pg_attrdef,pg_policy}' AS regclass[])
                                 AS oid[]))
      JOIN pg_depend f ON f.classid = t.classid AND f.objid = t.objid
       AND f.refclassid = ANY (CAST(CAST('{pg_proc,pg_operator}' AS regclass[]) AS oid[]))
      LEFT JOIN pg_operator o ON o.oid = f.refobjid AND f.refclassid = CAST(CAST('pg_operator' AS regclass) AS oid)
      JOIN pg_proc p ON p.oid = coalesce(CAST(o.oprcode AS oid), f.refobjid) JOIN role ON role.oid = p.proowner
     WHERE NOT role.oid = target.relowner GROUP BY subject, p.oid, t.classid, t.objid
    UNION ALL
    SELECT pg_catalog.format('%s may use %s, and reaches the rows of the table through it (REVOKE ALL ON %s FROM %s)',
                             subject, CAST(CAST(kin.oid AS regclass) AS text), CAST(CAST(kin.oid AS regclass) AS text),
                             quote_ident(CAST(rolname AS text)))
      FROM target
      JOIN pg_inherits ON inhrelid = target.oid OR inhparent = target.oid
      JOIN pg_class kin ON kin.oid = CASE WHEN inhrelid = target.oid THEN inhparent ELSE inhrelid END
      JOIN role ON has_table_privilege(role.oid, kin.oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE')
     WHERE NOT rolsuper AND NOT role.oid = target.relowner
    UNION ALL
    SELECT pg_catalog.format('%s may change rows of %s, and the foreign key %I changes those of the table with them',
                             subject, CAST(CAST(confrelid AS regclass) AS text), conname)
      FROM target
      JOIN pg_constraint ON conrelid = target.oid AND CAST(contype AS text) = 'f'
      JOIN role ON CAST(confdeltype AS text) IN ('c', 'n', 'd') AND has_table_privilege(role.oid, confrelid, 'DELETE')
                OR CAST(confupdtype AS text) IN ('c', 'n', 'd') AND has_table_privilege(role.oid, confrelid, 'UPDATE')
     WHERE NOT rolsuper AND NOT role.oid = target.relowner
    UNION ALL
    SELECT subject || ' may read values of the table in pg_statistic (REVOKE SELECT ON pg_statistic FROM '
           || quote_ident(CAST(rolname AS text)) || ', PUBLIC)'
      FROM role WHERE NOT rolsuper AND has_table_privilege(role.oid, CAST('pg_catalog.pg_statistic' AS text), 'SELECT')
    UNION ALL
    SELECT pg_catalog.format('%s may set parameters of the whole server (REVOKE ALTER SYSTEM ON PARAMETER %s FROM %s)',
                             coalesce(subject, 'everybody'), string_agg(parname, ', ' ORDER BY parname),
                             coalesce(quote_ident(CAST(rolname AS text)), 'PUBLIC'))
      FROM pg_parameter_acl CROSS JOIN aclexplode(paracl) LEFT JOIN role ON role.oid = grantee
     WHERE privilege_type = 'ALTER SYSTEM' AND (grantee = CAST(0 AS oid) OR role.oid IS NOT NULL)
     GROUP BY subject, rolname
    UNION ALL
    SELECT pg_catalog.format('the foreign key %I shows which devices exist (ALTER TABLE %s DROP CONSTRAINT %I)',
                             conname, CAST(CAST(conrelid AS regclass) AS text), conname)
      FROM target JOIN pg_constraint ON confrelid = target.oid AND CAST(contype AS text) = 'f'
           JOIN pg_class c ON c.oid = conrelid JOIN role ON role.oid = c.relowner
     WHERE NOT role.oid = target.relowner
    UNION ALL
    SELECT pg_catalog.concat('the policy ', quote_ident(CAST(polname AS text)), ' shows it rows too')
      FROM target JOIN pg_policy ON polrelid = target.oid
     WHERE polpermissive AND CAST(polname AS text) <> CAST(:policy AS text)
       AND (CAST(0 AS oid) = ANY (polroles) OR polroles OPERATOR(pg_catalog.&&) ARRAY(SELECT oid FROM role))
    UNION ALL
    SELECT pg_catalog.format('a transaction that is bound to no tenant has one already (ALTER %s%s RESET %s)',
                             CASE WHEN setrole = me.oid THEN 'ROLE ' || quote_ident(me.rolname)
                                  WHEN setdatabase = CAST(0 AS oid) THEN 'ROLE ALL' ELSE '' END,
                             CASE WHEN setdatabase = CAST(0 AS oid) THEN ''
                                  WHEN setrole = me.oid THEN ' IN DATABASE ' || quote_ident(current_database())
                                  ELSE 'DATABASE ' || quote_ident(current_database()) END,
                             CAST(:setting AS text))
      FROM me JOIN pg_db_role_setting ON setrole = me.oid OR setrole = CAST(0 AS oid)
           CROSS JOIN pg_catalog.unnest(setconfig) AS setting
     WHERE (setdatabase = CAST(0 AS oid)
            OR setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database()))
       AND starts_with(lower(setting), CAST(:setting AS text) || '=')
     ORDER BY way
""")

_CREATORS: Final = text("""
    SELECT pg_catalog.format('%s may create functions and operators in schema %s, where statements of others find them'
                             ' (REVOKE CREATE ON SCHEMA %s FROM %s)',
                             coalesce('role ' || quote_ident(CAST(rolname AS text)), 'everybody'),
                             quote_ident(CAST(nspname AS text)), quote_ident(CAST(nspname AS text)),
                             coalesce(quote_ident(CAST(rolname AS text)), 'PUBLIC')) AS found
      FROM pg_namespace n CROSS JOIN aclexplode(nspacl) LEFT JOIN pg_roles r ON r.oid = grantee
     WHERE n.nspname = ANY (current_schemas(false)) AND privilege_type = 'CREATE' AND grantee <> nspowner
       AND NOT coalesce(rolsuper, false)
       AND NOT EXISTS (SELECT FROM pg_class c WHERE relowner = grantee
                          AND c.oid = CAST(to_regclass(CAST(:table AS text)) AS oid))
     ORDER BY found
""")


def ways_around(connection: Connection, role: str, *, policy: str, setting: str) -> Sequence[str]:
    """How `role` would see or change rows of other tenants, a sentence each, most with the statement that ends it.

    Args:
        connection: To the database of the table. Nothing is changed or locked.
        role: A role that exists.
        policy: The policy that limits it; other permissive policies are a way.
        setting: What the policy compares with; a value that every session has from the start is a way.
    """
    binds = {"table": TABLE.name, "role": role, "policy": policy, "setting": setting}
    found: Sequence[str] = connection.scalars(_WAYS, binds).all()
    return found


def creators(connection: Connection) -> Sequence[str]:
    """Who may create objects in a schema of the search path, a sentence each with the statement that ends it.

    Not the owners of the schema and of the table, and no superuser. No statement of this package calls what they
    create; a statement that somebody types as the table's owner may.
    """
    found: Sequence[str] = connection.scalars(_CREATORS, {"table": TABLE.name}).all()
    return found
