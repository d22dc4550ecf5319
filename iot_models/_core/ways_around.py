"""How a role gets around row level security on our tables, and who gets in the way of the statements of others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sqlalchemy import text

from iot_models._core.shown_names import escaped
from iot_models.models import HISTORY, TABLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection

# Ours beside the table and its history: where Alembic keeps the revision, and what downgrades park.
_VERSION_TABLE: Final = "alembic_version_iot_models"
_PARKING: Final = "device_state_shadow_076_park"
_PARKED_HISTORY: Final = "device_shadow_history_078"
_OTHERS: Final = (
    _VERSION_TABLE,
    "device_state_shadow_076",
    _PARKED_HISTORY,
    "device_state_refusals_079",
)

# As in `statements`, no operator or function of a stranger's is a better match than the catalog's.
_WITH: Final = """
    WITH RECURSIVE me AS (
      SELECT oid FROM pg_roles WHERE CAST(rolname AS text) = CAST(:role AS text)),
    -- A role counts as all that it is a member of by any number of steps, since ADMIN OPTION, INHERIT and SET each give
    -- something. From PostgreSQL 16 on, a membership can be without all three.
    reached (oid) AS (
      SELECT oid FROM me
      UNION
      SELECT m.roleid FROM reached JOIN pg_auth_members m ON m.member = reached.oid
       WHERE m.admin_option
          OR NOT pg_catalog.to_jsonb(m) OPERATOR(pg_catalog.@>) '{"inherit_option": false, "set_option": false}'),
    role AS (
      SELECT r.*, CASE WHEN r.oid = me.oid THEN 'it' ELSE quote_ident(CAST(r.rolname AS text)) END AS subject
        FROM me CROSS JOIN reached JOIN pg_roles r ON r.oid = reached.oid),
    target AS (
      SELECT c.oid, c.relowner, c.relacl, c.relnamespace, quote_ident(CAST(c.relname AS text)) AS name
        FROM pg_class c WHERE c.oid = CAST(to_regclass(CAST(:table AS text)) AS oid)),
    -- The table and those that inherit from it: their rows are rows of the table.
    family (oid) AS (
      SELECT oid FROM target
      UNION
      SELECT inhrelid FROM family JOIN pg_inherits ON inhparent = family.oid),
    -- These, and all from which one of them inherits.
    kin (oid) AS (
      SELECT oid FROM family
      UNION
      SELECT inhparent FROM kin JOIN pg_inherits ON inhrelid = kin.oid),
    -- The table, and each table whose rows change when its rows do: by a foreign key, whose trigger PostgreSQL runs as
    -- the owner of that table; or by a rule, also through a view. With each, as whom PostgreSQL changes its rows (0: as
    -- whoever changes ours), whether it may put new rows or defaults there, and what leads to it.
    changed (oid, runner, gets_rows, user_class, user_id) AS (
      SELECT oid, CAST(0 AS oid), true, CAST(CAST('pg_class' AS regclass) AS oid), oid FROM family
      UNION
      SELECT next.oid, next.runner, next.gets_rows, next.user_class, next.user_id
        FROM changed CROSS JOIN LATERAL (
          -- An UPDATE that moves a row to another partition is an INSERT there.
          SELECT conrelid, relowner,
                 CAST(relkind AS text) = 'p' OR 'd' IN (CAST(confdeltype AS text), CAST(confupdtype AS text)),
                 CAST(CAST('pg_constraint' AS regclass) AS oid), k.oid
            FROM pg_constraint k JOIN pg_class c ON c.oid = conrelid
           WHERE confrelid = changed.oid AND CAST(contype AS text) = 'f'
             AND (CAST(confdeltype AS text) IN ('c', 'n', 'd') OR CAST(confupdtype AS text) IN ('c', 'n', 'd'))
          UNION ALL
          SELECT refobjid, changed.runner, true, classid, objid FROM pg_rewrite r JOIN pg_depend ON objid = r.oid
           WHERE ev_class = changed.oid AND classid = CAST(CAST('pg_rewrite' AS regclass) AS oid)
             AND refclassid = CAST(CAST('pg_class' AS regclass) AS oid)
          UNION ALL
          SELECT inhrelid, changed.runner, changed.gets_rows, changed.user_class, changed.user_id
            FROM pg_inherits WHERE inhparent = changed.oid
          UNION ALL
          -- Whoever owns the parent of a partition can make an index on both.
          SELECT inhparent, changed.runner, changed.gets_rows, changed.user_class, changed.user_id
            FROM pg_inherits
           WHERE inhrelid = changed.oid AND NOT EXISTS (SELECT FROM family WHERE family.oid = changed.oid)
          ) AS next (oid, runner, gets_rows, user_class, user_id)
       WHERE NOT EXISTS (SELECT FROM family WHERE family.oid = next.oid)),
    -- These tables, their columns, triggers, constraints, indexes, defaults, statistics, policies and rules, and all
    -- that they use. With each, as whom PostgreSQL uses it, and whether it does so when our rows change or are read.
    used (classid, objid, user_class, user_id, runner, fires) AS (
      SELECT CAST(CAST('pg_class' AS regclass) AS oid), oid, user_class, user_id, runner, true FROM changed
      UNION
      -- Event triggers run with the rights of whoever migrates, or logs in.
      SELECT CAST(CAST('pg_event_trigger' AS regclass) AS oid), oid,
             CAST(CAST('pg_event_trigger' AS regclass) AS oid), oid, CAST(0 AS oid), NOT CAST(evtenabled AS text) = 'D'
        FROM pg_event_trigger
      UNION
      SELECT classid, objid, classid, objid, runner,
             CASE classid
               WHEN CAST(CAST('pg_trigger' AS regclass) AS oid) THEN
                 -- For DELETE or UPDATE, or for INSERT.
                 NOT CAST(tgenabled AS text) = 'D'
                 AND (CAST(tgtype AS integer) & 24 <> 0 OR gets_rows AND CAST(tgtype AS integer) & 4 <> 0)
               WHEN CAST(CAST('pg_attrdef' AS regclass) AS oid) THEN gets_rows OR NOT CAST(attgenerated AS text) = ''
               -- What foreign keys do to the rows of its owner is not subject to it.
               WHEN CAST(CAST('pg_policy' AS regclass) AS oid) THEN NOT runner = c.relowner
               WHEN CAST(CAST('pg_statistic_ext' AS regclass) AS oid) THEN false
               ELSE true END
        FROM changed JOIN pg_class c ON c.oid = changed.oid
        JOIN pg_depend ON refclassid = CAST(CAST('pg_class' AS regclass) AS oid) AND refobjid = changed.oid
        LEFT JOIN pg_trigger t ON classid = CAST(CAST('pg_trigger' AS regclass) AS oid) AND t.oid = objid
        LEFT JOIN pg_attrdef d ON classid = CAST(CAST('pg_attrdef' AS regclass) AS oid) AND d.oid = objid
        LEFT JOIN pg_attribute a ON a.attrelid = adrelid AND a.attnum = adnum
       WHERE classid = ANY (CAST(CAST('{pg_trigger,pg_constraint,pg_class,pg_attrdef,pg_policy,pg_statistic_ext}'
                                      AS regclass[]) AS oid[]))
          OR classid = CAST(CAST('pg_rewrite' AS regclass) AS oid) AND CAST(deptype AS text) = 'a'
      UNION
      SELECT next.classid, next.objid, used.user_class, used.user_id,
             coalesce((SELECT proowner FROM pg_proc
                        WHERE used.classid = CAST(CAST('pg_proc' AS regclass) AS oid) AND oid = used.objid
                          AND prosecdef), used.runner),
             used.fires
        FROM used CROSS JOIN LATERAL (
          SELECT refclassid, refobjid FROM pg_depend
           WHERE classid = used.classid AND objid = used.objid
             AND refclassid = ANY (CAST(CAST('{pg_proc,pg_operator,pg_type,pg_opclass,pg_opfamily}' AS regclass[])
                                        AS oid[]))
          UNION ALL
          -- The constraints of a domain, and the functions of an operator class.
          SELECT classid, objid FROM pg_depend
           WHERE refclassid = used.classid AND refobjid = used.objid AND CAST(deptype AS text) IN ('a', 'i')
             AND refclassid = ANY (CAST(CAST('{pg_type,pg_opclass,pg_opfamily}' AS regclass[]) AS oid[]))
             AND classid = ANY (CAST(CAST('{pg_constraint,pg_amop,pg_amproc}' AS regclass[]) AS oid[]))
          UNION ALL
          -- The tables of a policy or a rule, and the functions of a view.
          SELECT refclassid, refobjid FROM pg_depend
           WHERE classid = used.classid AND objid = used.objid AND CAST(deptype AS text) = 'n'
             AND classid = ANY (CAST(CAST('{pg_rewrite,pg_policy,pg_proc,pg_attrdef}' AS regclass[]) AS oid[]))
             AND refclassid = CAST(CAST('pg_class' AS regclass) AS oid)
             AND NOT EXISTS (SELECT FROM family WHERE family.oid = refobjid)
          UNION ALL
          SELECT classid, objid FROM pg_depend
           WHERE refclassid = used.classid AND refobjid = used.objid AND CAST(deptype AS text) = 'i'
             AND refclassid = CAST(CAST('pg_class' AS regclass) AS oid)
             AND classid = CAST(CAST('pg_rewrite' AS regclass) AS oid)
          UNION ALL
          -- The policies of a table that is only read.
          SELECT CAST(CAST('pg_policy' AS regclass) AS oid), p.oid FROM pg_policy p
           WHERE used.classid = CAST(CAST('pg_class' AS regclass) AS oid) AND polrelid = used.objid
             AND NOT EXISTS (SELECT FROM changed WHERE changed.oid = polrelid)
          UNION ALL
          -- The planner may take an operator's commutator or negator for it.
          SELECT used.classid, other.oid
            FROM pg_operator o CROSS JOIN LATERAL (VALUES (oprcom), (oprnegate)) AS other (oid)
           WHERE used.classid = CAST(CAST('pg_operator' AS regclass) AS oid) AND o.oid = used.objid
             AND NOT other.oid = CAST(0 AS oid)
          UNION ALL
          -- The columns of a composite type.
          SELECT CAST(CAST('pg_class' AS regclass) AS oid), typrelid FROM pg_type
           WHERE used.classid = CAST(CAST('pg_type' AS regclass) AS oid) AND oid = used.objid
          ) AS next (classid, objid))
"""

_ATTRIBUTES: Final = """
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
    SELECT 'it is a member of ' || subject || ', which reads what others run: the tenants that they bind, and '
           'documents where a driver writes values into its statements' FROM role
     WHERE CAST(rolname AS text) IN ('pg_monitor', 'pg_read_all_stats')
    UNION ALL
    SELECT 'it is a member of ' || subject || ', which reads the settings of the server, a password in '
           'primary_conninfo too' FROM role
     WHERE CAST(rolname AS text) = 'pg_read_all_settings'
    UNION ALL
    SELECT 'it is a member of ' || subject || ', which writes every table without policies, the revision too' FROM role
     WHERE CAST(rolname AS text) = 'pg_write_all_data'
    UNION ALL
    SELECT pg_catalog.format('%s may execute %s, which reach the files of the server', subject,
                             string_agg(CAST(CAST(p.oid AS regprocedure) AS text), ', ' ORDER BY p.oid))
      FROM role JOIN pg_proc p ON p.pronamespace = CAST(CAST('pg_catalog' AS regnamespace) AS oid)
       AND CAST(p.proname AS text) IN ('pg_read_file', 'pg_read_binary_file', 'lo_import', 'lo_export')
     WHERE NOT rolsuper AND has_function_privilege(role.oid, p.oid, 'EXECUTE') GROUP BY subject
    UNION ALL
    SELECT pg_catalog.format('%s may set parameters of the whole server (REVOKE ALTER SYSTEM ON PARAMETER %s FROM %s)',
                             coalesce(subject, 'everybody'), string_agg(parname, ', ' ORDER BY parname),
                             coalesce(quote_ident(CAST(rolname AS text)), 'PUBLIC'))
      FROM pg_parameter_acl CROSS JOIN aclexplode(paracl) LEFT JOIN role ON role.oid = grantee
     WHERE privilege_type = 'ALTER SYSTEM' AND (grantee = CAST(0 AS oid) OR role.oid IS NOT NULL)
     GROUP BY subject, rolname
    UNION ALL
    SELECT pg_catalog.format('%s may set parameters that load code, or switch triggers, foreign keys or checks off '
                             '(REVOKE SET ON PARAMETER %s FROM %s)',
                             coalesce(subject, 'everybody'), string_agg(parname, ', ' ORDER BY parname),
                             coalesce(quote_ident(CAST(rolname AS text)), 'PUBLIC'))
      FROM pg_parameter_acl CROSS JOIN aclexplode(paracl) LEFT JOIN role ON role.oid = grantee
     WHERE privilege_type = 'SET' AND (grantee = CAST(0 AS oid) OR role.oid IS NOT NULL)
       AND parname IN ('allow_system_table_mods', 'dynamic_library_path', 'ignore_checksum_failure',
                       'session_preload_libraries', 'session_replication_role', 'zero_damaged_pages')
     GROUP BY subject, rolname
"""

_RIGHTS: Final = """
    SELECT subject || ' owns the table' AS way FROM role JOIN target ON relowner = role.oid
    UNION ALL
    SELECT subject || ' owns the schema ' || quote_ident(CAST(nspname AS text)) || ', and may drop the table'
      FROM target JOIN pg_namespace n ON n.oid = relnamespace JOIN role ON role.oid = nspowner
    UNION ALL
    -- Anybody who may create objects could have made a history before the migration did.
    SELECT pg_catalog.format('%s belongs to %s, and %s to %s (drop it, or ALTER TABLE %s OWNER TO %s)',
                             target.name, CAST(CAST(target.relowner AS regrole) AS text),
                             quote_ident(CAST(relname AS text)),
                             CAST(CAST(c.relowner AS regrole) AS text), target.name,
                             CAST(CAST(c.relowner AS regrole) AS text))
      FROM target JOIN pg_class c ON c.relnamespace = target.relnamespace
       AND CAST(c.relname AS text) = CAST(:device_state AS text)
      JOIN pg_roles o ON o.oid = target.relowner
     WHERE NOT c.relowner = target.relowner AND NOT o.rolsuper
    UNION ALL
    SELECT subject || ' owns the database' FROM role JOIN pg_database d ON d.datdba = role.oid
     WHERE d.datname = current_database()
    UNION ALL
    SELECT pg_catalog.format('%s may use what no policy limits (REVOKE %s ON %s FROM %s)',
                             coalesce(subject, 'everybody'),
                             string_agg(privilege_type, ', ' ORDER BY privilege_type), target.name,
                             coalesce(quote_ident(CAST(rolname AS text)), 'PUBLIC'))
      FROM target CROSS JOIN aclexplode(relacl) LEFT JOIN role ON role.oid = grantee
     WHERE privilege_type IN ('MAINTAIN', 'REFERENCES', 'TRIGGER', 'TRUNCATE') AND grantee <> relowner
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
    SELECT pg_catalog.format('%s may read values of the table in %s (REVOKE SELECT ON %s FROM %s, PUBLIC)',
                             subject, catalog, catalog, quote_ident(CAST(rolname AS text)))
      FROM role CROSS JOIN (VALUES (CAST('pg_statistic' AS text)), ('pg_statistic_ext_data')) AS v (catalog)
     WHERE NOT rolsuper AND has_any_column_privilege(role.oid, 'pg_catalog.' || catalog, 'SELECT')
    UNION ALL
    SELECT pg_catalog.format('%s may read the passwords of all roles as they are stored (REVOKE SELECT ON %s '
                             'FROM %s, PUBLIC)', subject, catalog, quote_ident(CAST(rolname AS text)))
      FROM role CROSS JOIN LATERAL (
             SELECT catalog FROM (VALUES (CAST('pg_authid' AS text), CAST('rolpassword' AS text)),
                                         ('pg_shadow', 'passwd')) AS v (catalog, col)
              WHERE has_column_privilege(role.oid, 'pg_catalog.' || catalog, col, 'SELECT')
              ORDER BY catalog LIMIT 1) AS read
     WHERE NOT rolsuper
    UNION ALL
    -- With another type, its operator decides which rows are the tenant's.
    SELECT pg_catalog.format('the column tenant_id has the type %s (ALTER TABLE %s ALTER tenant_id TYPE text)',
                             pg_catalog.format_type(atttypid, atttypmod), target.name)
      FROM target JOIN pg_attribute ON attrelid = target.oid
     WHERE attname = 'tenant_id' AND NOT atttypid = CAST(CAST('text' AS regtype) AS oid)
    UNION ALL
    SELECT pg_catalog.format('the column tenant_id has the nondeterministic collation %s, for which tenants of '
                             'different names are one (ALTER TABLE %s ALTER tenant_id TYPE text COLLATE "default")',
                             CAST(CAST(attcollation AS regcollation) AS text), target.name)
      FROM target JOIN pg_attribute ON attrelid = target.oid JOIN pg_collation l ON l.oid = attcollation
     WHERE attname = 'tenant_id' AND NOT collisdeterministic
"""

_OTHER_TABLES: Final = """
    -- The revision has no policies, and nobody but its owner may write it. What is parked has row level security; but
    -- the history is parked with the policies that it had.
    SELECT pg_catalog.format('%s may use what no policy limits (REVOKE %s ON %s FROM %s)',
                             coalesce(subject, 'everybody'),
                             string_agg(privilege_type, ', ' ORDER BY privilege_type),
                             CAST(CAST(c.oid AS regclass) AS text),
                             coalesce(quote_ident(CAST(rolname AS text)), 'PUBLIC')) AS way
      FROM target JOIN pg_class c ON c.relnamespace = target.relnamespace
       AND CAST(c.relname AS text) = ANY (CAST(:others AS text[]))
     CROSS JOIN LATERAL (
       SELECT grantee, privilege_type FROM aclexplode(c.relacl)
       UNION
       SELECT e.grantee, e.privilege_type FROM pg_attribute t CROSS JOIN aclexplode(t.attacl) e
        WHERE t.attrelid = c.oid) AS granted
      LEFT JOIN role ON role.oid = grantee
     WHERE (privilege_type IN ('MAINTAIN', 'REFERENCES', 'TRIGGER', 'TRUNCATE')
            OR CAST(c.relname AS text) = CAST(:version_table AS text) AND privilege_type <> 'SELECT'
            OR CAST(c.relname AS text) = CAST(:parked_history AS text))
       AND grantee <> c.relowner AND (grantee = CAST(0 AS oid) OR role.oid IS NOT NULL)
     GROUP BY subject, rolname, c.oid
    UNION ALL
    SELECT pg_catalog.format('the foreign key %I on a table of ours runs the code of others, as whoever migrates or '
                             'changes a device (ALTER TABLE %s DROP CONSTRAINT %I)',
                             conname, CAST(CAST(conrelid AS regclass) AS text), conname)
      FROM target JOIN pg_class c ON c.relnamespace = target.relnamespace
       AND CAST(c.relname AS text) = ANY (CAST(:others AS text[]))
      JOIN pg_constraint ON confrelid = c.oid
"""

_RELATED_TABLES: Final = """
    SELECT pg_catalog.format('%s may use %s, and reaches the rows of the table through it (REVOKE ALL ON %s FROM %s)',
                             subject, CAST(CAST(c.oid AS regclass) AS text), CAST(CAST(c.oid AS regclass) AS text),
                             quote_ident(CAST(rolname AS text))) AS way
      FROM target JOIN kin ON NOT kin.oid = target.oid JOIN pg_class c ON c.oid = kin.oid
      JOIN role ON role.oid = c.relowner OR has_table_privilege(role.oid, c.oid, 'DELETE, TRUNCATE, TRIGGER')
                OR has_any_column_privilege(role.oid, c.oid, 'SELECT, INSERT, UPDATE, REFERENCES')
                -- Before PostgreSQL 17 there is no such privilege, and asking for it would be an error.
                OR EXISTS (SELECT FROM aclexplode(c.relacl)
                            WHERE privilege_type = 'MAINTAIN' AND (grantee = CAST(0 AS oid) OR grantee = role.oid))
     WHERE NOT rolsuper AND NOT role.oid = target.relowner
    UNION ALL
    (WITH RECURSIVE
     -- What, done to rows of another table, uses rows of this one with the owner's rights, through foreign keys and
     -- rules: DELETE, INSERT, or UPDATE of one of the columns (any, if NULL). Of the table itself, and of views of it,
     -- nothing is asked (NULL). A rule uses it with the rights of its own table's owner. Where that role has none, the
     -- rule only fails, and anybody could make it. `callers` is what a view with security_invoker uses with the rights
     -- of whoever changes the rows (else 0): the role itself, or before a foreign key the owner of the key's table.
     cause (oid, event, columns, link, callers) AS (
       SELECT oid, CAST(NULL AS text), CAST(NULL AS int2[]), CAST(NULL AS text) COLLATE pg_catalog."C", CAST(0 AS oid)
         FROM family
       UNION
       SELECT before.oid, before.event, before.columns, coalesce(cause.link, before.link), before.callers
         FROM cause CROSS JOIN LATERAL (
           SELECT confrelid, rule.event, CASE WHEN rule.event = 'UPDATE' AND NOT EXISTS (
                    -- PostgreSQL computes it from other columns.
                    SELECT FROM pg_attribute WHERE attrelid = confrelid AND attnum = ANY (confkey)
                       AND NOT CAST(attgenerated AS text) = '') THEN confkey END,
                  pg_catalog.format('the foreign key %I', conname), CAST(0 AS oid)
             FROM pg_constraint JOIN pg_class c ON c.oid = conrelid CROSS JOIN LATERAL (
                  VALUES (CAST('DELETE' AS text), CAST(confdeltype AS text)), ('UPDATE', CAST(confupdtype AS text))
                  ) AS rule (event, action)
            WHERE conrelid = cause.oid
              AND (cause.callers = CAST(0 AS oid)
                   OR has_table_privilege(c.relowner, cause.callers, 'DELETE')
                   OR has_any_column_privilege(c.relowner, cause.callers, 'SELECT, INSERT, UPDATE'))
              AND CAST(contype AS text) = 'f' AND action IN ('c', 'n', 'd')
              AND CASE WHEN cause.event IS NULL THEN true
                       WHEN rule.event = 'DELETE' AND action = 'c' THEN cause.event = 'DELETE'
                       ELSE cause.event = 'UPDATE' AND coalesce(conkey OPERATOR(pg_catalog.&&) cause.columns, true) END
           UNION ALL
           SELECT inhparent, cause.event, NULL, cause.link, cause.callers
             FROM pg_inherits WHERE inhrelid = cause.oid AND cause.event IS NOT NULL
           UNION ALL
           -- An UPDATE of the partition key deletes the row from its partition.
           SELECT inhparent, 'UPDATE', NULL, cause.link, cause.callers
             FROM pg_inherits WHERE inhrelid = cause.oid AND cause.event = 'DELETE'
           UNION ALL
           -- What a rule does to the table that it uses is not known. The rules of the table itself are its own.
           SELECT ev_class,
                  CASE CAST(ev_type AS text) WHEN '2' THEN 'UPDATE' WHEN '3' THEN 'INSERT' WHEN '4' THEN 'DELETE' END,
                  NULL, CASE WHEN NOT CAST(ev_type AS text) = '1' THEN pg_catalog.format('the rule %I', rulename) END,
                  CASE WHEN is_callers AND cause.callers = CAST(0 AS oid) THEN cause.oid ELSE cause.callers END
             FROM pg_depend JOIN pg_rewrite r ON r.oid = objid JOIN pg_class c ON c.oid = ev_class
            CROSS JOIN LATERAL (
                  SELECT CAST(ev_type AS text) = '1' AND EXISTS (
                         SELECT FROM pg_options_to_table(c.reloptions)
                          WHERE option_name = 'security_invoker' AND CAST(option_value AS boolean))
                  ) AS view (is_callers)
            WHERE classid = CAST(CAST('pg_rewrite' AS regclass) AS oid)
              AND refclassid = CAST(CAST('pg_class' AS regclass) AS oid) AND refobjid = cause.oid
              AND (is_callers OR has_table_privilege(c.relowner, cause.oid, 'DELETE')
                   OR has_any_column_privilege(c.relowner, cause.oid, 'SELECT, INSERT, UPDATE'))
              AND NOT ev_class = cause.oid AND NOT EXISTS (SELECT FROM family WHERE family.oid = ev_class)
           ) AS before (oid, event, columns, link, callers))
     SELECT DISTINCT
            pg_catalog.format('%s may change rows of %s, and %s changes those of the table with them',
                              subject, CAST(CAST(c.oid AS regclass) AS text), cause.link)
       FROM target CROSS JOIN cause JOIN pg_class c ON c.oid = cause.oid
       JOIN role ON role.oid = c.relowner
                 OR cause.event = 'DELETE' AND has_table_privilege(role.oid, c.oid, 'DELETE')
                 OR cause.event = 'INSERT' AND has_any_column_privilege(role.oid, c.oid, 'INSERT')
                 OR cause.event = 'UPDATE' AND EXISTS (
                      SELECT FROM pg_attribute
                       WHERE attrelid = c.oid AND coalesce(attnum = ANY (cause.columns), true)
                         AND has_column_privilege(role.oid, c.oid, attnum, 'UPDATE'))
      WHERE cause.event IS NOT NULL AND cause.callers = CAST(0 AS oid) AND NOT CAST(c.relkind AS text) = 'v'
        AND NOT rolsuper AND NOT role.oid = target.relowner)
    UNION ALL
    SELECT pg_catalog.format('the foreign key %I shows which devices exist (ALTER TABLE %s DROP CONSTRAINT %I)',
                             conname, CAST(CAST(conrelid AS regclass) AS text), conname)
      FROM target CROSS JOIN family JOIN pg_constraint ON confrelid = family.oid AND CAST(contype AS text) = 'f'
           JOIN pg_class c ON c.oid = conrelid JOIN role ON role.oid = c.relowner
     WHERE NOT role.oid = target.relowner
"""

_CODE: Final = """
    (WITH RECURSIVE
     -- What all this depends on besides: DROP ... CASCADE of its schema, extension, language, collation, operator.
     needed (classid, objid, user_class, user_id) AS (
       SELECT classid, objid, user_class, user_id FROM used
       UNION
       SELECT d.refclassid, d.refobjid, needed.user_class, needed.user_id
         FROM needed JOIN pg_depend d ON d.classid = needed.classid AND d.objid = needed.objid
        WHERE NOT d.refclassid = CAST(CAST('pg_class' AS regclass) AS oid))
     SELECT pg_catalog.format('%s owns the function %s, which runs with the rights of whoever writes: %s calls it',
                              subject, CAST(CAST(p.oid AS regprocedure) AS text),
                              pg_describe_object(user_class, user_id, 0)) AS way
       FROM target CROSS JOIN used JOIN pg_proc p ON p.oid = objid JOIN role ON role.oid = p.proowner
      WHERE classid = CAST(CAST('pg_proc' AS regclass) AS oid) AND NOT role.oid = target.relowner
     UNION ALL
     SELECT pg_catalog.format('%s may change %s, or make triggers on it or foreign keys to it, which run with rights '
                              'of others: %s uses it',
                              subject, CAST(CAST(c.oid AS regclass) AS text),
                              pg_describe_object(user_class, user_id, 0))
       FROM target CROSS JOIN used JOIN pg_class c ON c.oid = objid
            JOIN role ON role.oid = c.relowner OR has_table_privilege(role.oid, c.oid, 'TRIGGER')
                      OR has_any_column_privilege(role.oid, c.oid, 'REFERENCES')
      WHERE classid = CAST(CAST('pg_class' AS regclass) AS oid)
        AND CAST(c.relkind AS text) IN ('r', 'p', 'v', 'm', 'f', 'S')
        AND NOT role.oid = target.relowner AND NOT EXISTS (SELECT FROM kin WHERE kin.oid = c.oid)
        AND NOT (user_class = classid AND user_id = objid)
     UNION ALL
     SELECT pg_catalog.format('%s owns the type %s, and may %s: %s uses it',
                              subject, pg_catalog.format_type(t.oid, NULL),
                              CASE WHEN CAST(typtype AS text) = 'd'
                                   THEN 'add a CHECK, which runs with the rights of whoever writes'
                                   ELSE 'change it' END,
                              pg_describe_object(user_class, user_id, 0))
       FROM target CROSS JOIN used JOIN pg_type t ON t.oid = objid JOIN role ON role.oid = t.typowner
      -- An array belongs to the owner of its elements.
      WHERE classid = CAST(CAST('pg_type' AS regclass) AS oid) AND typelem = CAST(0 AS oid)
        AND NOT role.oid = target.relowner
     UNION ALL
     SELECT pg_catalog.format('%s owns the %s, and may drop it with all that needs it: %s does',
                              subject, pg_describe_object(needed.classid, needed.objid, 0),
                              pg_describe_object(user_class, user_id, 0))
       FROM target CROSS JOIN needed JOIN pg_shdepend s ON s.classid = needed.classid AND s.objid = needed.objid
            JOIN role ON role.oid = s.refobjid
      WHERE s.refclassid = CAST(CAST('pg_authid' AS regclass) AS oid) AND CAST(s.deptype AS text) = 'o'
        AND s.dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND NOT role.oid = target.relowner
        -- What is named above, or takes nothing away but itself.
        AND NOT needed.classid = ANY (CAST(CAST('{pg_class,pg_proc,pg_type,pg_statistic_ext}' AS regclass[]) AS oid[]))
        AND NOT (needed.classid = CAST(CAST('pg_namespace' AS regclass) AS oid)
                 AND needed.objid = target.relnamespace))
"""

_CALLERS_PATH: Final = """
    (WITH
     -- One of its roles may put a table somewhere, and another let the function run: a session has all of them.
     creator AS (
       SELECT role.oid, subject, has_database_privilege(role.oid, current.oid, 'TEMP') AS temp,
              has_database_privilege(role.oid, current.oid, 'CREATE') AS schemas
         FROM role CROSS JOIN target JOIN pg_database current ON datname = current_database()
        WHERE NOT rolsuper AND NOT role.oid = target.relowner),
     -- The functions that the role can let run as another role, in its own search path. C finds nothing by a path, nor
     -- does the catalog's SQL, nor a body that was parsed when it was made: what that one calls is used, too.
     run AS (
       SELECT DISTINCT p.oid AS function, proconfig, runs.runner, nspname
         FROM target CROSS JOIN used JOIN pg_proc p ON p.oid = objid
         JOIN pg_namespace n ON n.oid = pronamespace JOIN pg_language l ON l.oid = prolang
         LEFT JOIN pg_trigger t ON user_class = CAST(CAST('pg_trigger' AS regclass) AS oid) AND t.oid = user_id
          AND tgfoid = p.oid
        CROSS JOIN LATERAL (SELECT CASE WHEN prosecdef THEN proowner ELSE used.runner END) AS runs (runner)
         JOIN role ON NOT role.oid = runs.runner
          AND CASE WHEN user_class = CAST(CAST('pg_event_trigger' AS regclass) AS oid)
              THEN role.oid = (SELECT oid FROM me)
              ELSE has_table_privilege(role.oid, target.oid, 'INSERT, DELETE')
                OR has_any_column_privilege(role.oid, target.oid, 'INSERT, UPDATE')
                OR user_class = CAST(CAST('pg_policy' AS regclass) AS oid)
                   AND has_any_column_privilege(role.oid, target.oid, 'SELECT') END
        WHERE classid = CAST(CAST('pg_proc' AS regclass) AS oid) AND fires AND NOT runs.runner = CAST(0 AS oid)
          AND NOT rolsuper AND NOT role.oid = target.relowner
          AND NOT CAST(lanname AS text) IN ('internal', 'c') AND prosqlbody IS NULL
          AND NOT pronamespace = CAST(CAST('pg_catalog' AS regnamespace) AS oid)
          -- Before PostgreSQL 18, a trigger that fires AFTER runs as whoever changed the device; its WHEN does not.
          AND (prosecdef OR t.oid IS NULL OR CAST(tgtype AS integer) & 66 <> 0
               OR CAST(current_setting('server_version_num') AS integer) >= 180000)),
     -- The schemas of their own paths, in order, as they are called.
     own AS (
       SELECT run.*, place = pg_catalog.max(place) OVER (PARTITION BY function, runner) AS is_last,
              CASE WHEN part = '"$user"' THEN CAST(pg_get_userbyid(runner) AS text)
                   WHEN starts_with(part, '"')
                   THEN pg_catalog.replace(pg_catalog.substr(part, 2, pg_catalog.length(part) - 2), '""', '"')
                   ELSE part END AS schema
         FROM run CROSS JOIN pg_catalog.unnest(proconfig) AS setting
        CROSS JOIN pg_catalog.regexp_matches(pg_catalog.substr(setting, 13), '"(?:[^"]|"")*"|[^, ]+', 'g')
                   WITH ORDINALITY AS matched (parts, place)
        CROSS JOIN LATERAL (SELECT parts[1]) AS p (part)
        WHERE starts_with(setting, 'search_path='))
     SELECT DISTINCT
            pg_catalog.format('it may put its own tables before those that the function %s names, which runs as %s '
                              '(ALTER FUNCTION %s SET search_path = %s, pg_temp)',
                              CAST(CAST(function AS regprocedure) AS text),
                              CAST(CAST(runner AS regrole) AS text), CAST(CAST(function AS regprocedure) AS text),
                              coalesce((SELECT CASE WHEN setting = 'search_path=""' THEN 'pg_catalog'
                                               ELSE pg_catalog.substr(setting, 13) END
                                          FROM pg_catalog.unnest(proconfig) AS setting
                                         WHERE starts_with(setting, 'search_path=') AND NOT setting LIKE '%pg_temp%'),
                                       quote_ident(CAST(nspname AS text)))) AS way
       FROM run
        -- TEMP tables, or those of a schema that it puts first, and may have made.
      WHERE EXISTS (
              SELECT FROM creator
               WHERE temp OR schemas
                  OR EXISTS (SELECT FROM pg_namespace n WHERE has_schema_privilege(creator.oid, n.oid, 'CREATE')))
        -- TEMP tables come first, before the catalog's, unless the function's own path names them at its end.
        AND (NOT EXISTS (
               SELECT FROM pg_catalog.unnest(proconfig) AS setting WHERE setting LIKE 'search_path=%, pg_temp')
             OR EXISTS (SELECT FROM own WHERE own.function = run.function AND own.runner = run.runner
                           AND schema = 'pg_temp' AND NOT is_last))
     UNION ALL
     -- Also by a function or an operator that matches better. That of our downgrade names the types of all it uses.
     SELECT DISTINCT
            pg_catalog.format('%s may create objects in schema %s, which is in the search path of the function %s, '
                              'which runs as %s (take that right away, or ALTER FUNCTION %s SET search_path = ... '
                              'without that schema, pg_temp at the end)',
                              subject, quote_ident(schema), CAST(CAST(function AS regprocedure) AS text),
                              CAST(CAST(runner AS regrole) AS text), CAST(CAST(function AS regprocedure) AS text))
       FROM own LEFT JOIN pg_namespace named ON CAST(named.nspname AS text) = schema JOIN pg_proc p ON p.oid = function
            CROSS JOIN creator
      WHERE CASE WHEN named.oid IS NOT NULL THEN has_schema_privilege(creator.oid, named.oid, 'CREATE')
            -- It may make the schema.
            ELSE NOT starts_with(schema, 'pg_') AND NOT schema = '' AND schemas END
        AND NOT CAST(proname AS text) = CAST(:parking AS text))
"""

_POLICIES: Final = """
    SELECT pg_catalog.concat('the policy ', quote_ident(CAST(polname AS text)), ' shows it rows too') AS way
      FROM target JOIN pg_policy ON polrelid = target.oid
     WHERE polpermissive AND CAST(polname AS text) <> CAST(:policy AS text)
       AND (CAST(0 AS oid) = ANY (polroles) OR polroles OPERATOR(pg_catalog.&&) ARRAY(SELECT oid FROM role))
    UNION ALL
    SELECT pg_catalog.format('a transaction that is bound to no tenant has one already (ALTER %s%s RESET %s)',
                             CASE WHEN setrole = me.oid THEN 'ROLE ' || quote_ident(CAST(:role AS text))
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
"""

# One statement, and so one snapshot.
_SUBJECTS: Final = (_ATTRIBUTES, _RIGHTS, _OTHER_TABLES, _RELATED_TABLES, _CODE, _CALLERS_PATH, _POLICIES)
_WAYS: Final = text(_WITH + " UNION ALL ".join(_SUBJECTS) + " ORDER BY way")

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


def table_names(connection: Connection) -> list[str]:
    """Our tables as SQL names them: in the schema that `schema_translate_map` says, else as the search path finds them.

    Without the history, if the database is not migrated that far.
    """
    schema = connection.schema_for_object(TABLE)
    prefix = "" if schema is None else f"{connection.dialect.identifier_preparer.quote_schema(schema)}."
    table, history = f"{prefix}{TABLE.name}", f"{prefix}{HISTORY.name}"
    exists = text("SELECT to_regclass(CAST(:table AS text)) IS NOT NULL")
    return [table, history] if connection.scalar(exists, {"table": history}) else [table]


def ways_around(connection: Connection, role: str, *, policy: str, setting: str) -> Sequence[str]:
    """How `role` would see or change rows of other tenants, a sentence each, most with the statement that ends it.

    Args:
        connection: To the database of the tables. Nothing is changed or locked.
        role: A role that exists.
        policy: The policy that limits it; other permissive policies are a way.
        setting: What the policy compares with; a value that every session has from the start is a way.
    """
    binds = {
        "role": role,
        "policy": policy,
        "setting": setting,
        "version_table": _VERSION_TABLE,
        "parked_history": _PARKED_HISTORY,
        "parking": _PARKING,
        "device_state": TABLE.name,
        "others": [*_OTHERS],
    }
    # PostgreSQL expects many rows of each recursion. For such a plan it would compile, for seconds, what takes 10 ms.
    connection.execute(text("SELECT set_config('jit', 'off', true)"))
    found = {
        way: None for table in table_names(connection) for way in connection.scalars(_WAYS, binds | {"table": table})
    }
    return [*map(escaped, found)]


def creators(connection: Connection) -> Sequence[str]:
    """Who may create objects in a schema of the search path, a sentence each with the statement that ends it.

    Not the owners of the schema and of the table, and no superuser. No statement of this package calls what they
    create; a statement that somebody types as the table's owner may.
    """
    return [*map(escaped, connection.scalars(_CREATORS, {"table": table_names(connection)[0]}))]
