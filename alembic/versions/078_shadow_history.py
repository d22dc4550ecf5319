"""History: each desired version of each device, who wrote it, when and why.

A row is written by the statement that writes `desired_state`; no trigger does it. It stays when its device is removed,
so the table has no foreign key.

`transaction_id` orders the changes of a tenant, so that nothing that commits later stands before what was read. A
sequence could not: it is drawn before the commit. It is a bigint, because few libraries that read a schema know
PostgreSQL's xid8.

The table has the documents of all tenants. What default privileges give others on it is taken away. Then those who may
read `device_state` may read it, those who may write desired documents may add to it, and those who may delete devices
may delete from it; nobody may change what it holds. Row level security is copied from `device_state`, with its
policies. So code that is deployed afterwards needs no GRANT, and no role sees more of a tenant than before.

The downgrade renames a table that has rows to `device_shadow_history_078`, for its owner alone, with row level security
also where it had none, and without policies: not every right can be revoked there (pg_read_all_data). The upgrade takes
it back, with the rights, the row level security and the policies that `device_state` has then: those that the table had
may show what was shut meanwhile. Neither reads a row, nor keeps a writer of `device_state` waiting.
Desired writes in between, by code that knows no history, leave versions without a row.

Revision ID: 078
Revises: 077
"""

import logging

from alembic import context, op
from alembic.util import CommandError
from sqlalchemy import text

revision = "078"
down_revision = "077"
branch_labels = None
depends_on = None

log = logging.getLogger("alembic.iot_models")

HISTORY = "device_shadow_history"
PARKED = "device_shadow_history_078"
COLUMNS = {
    "tenant_id": ("text", True, None),
    "device_id": ("text", True, None),
    "desired_version": ("integer", True, None),
    "desired_state": ("jsonb", False, None),
    "written_at": ("timestamp with time zone", False, None),
    "actor": ("text", False, None),
    "reason": ("text", False, None),
    "request_id": ("text", False, None),
    "transaction_id": ("bigint", True, "((pg_current_xact_id())::text)::bigint"),
}
KEY = ("tenant_id", "device_id", "desired_version")
# The columns of device_state that are the same there.
SHARED = "'tenant_id', 'device_id', 'desired_version', 'desired_state'"
COMMENTS = {
    "desired_state": "The document of this version. NULL: the device was removed.",
    "written_at": "When it was written. NULL: not known, before the first recorded write.",
    "actor": "Who wrote it.",
    "reason": "Why, in the words of the writer.",
    "request_id": "The request that this write answered, done once.",
    "transaction_id": "The transaction that wrote it: the order of ShadowService.changes.",
}
INDEXES = {
    # A request is done once for a device, also where it is repeated at the same moment.
    "idx_device_shadow_history_request": "btree (tenant_id, device_id, request_id) WHERE (request_id IS NOT NULL)",
    # The oldest versions of a tenant: ShadowService.prune_history.
    "idx_device_shadow_history_written": "btree (tenant_id, written_at)",
    # The versions of a tenant by the transactions that wrote them: ShadowService.changes.
    "idx_device_shadow_history_changes": "btree (tenant_id, transaction_id, device_id, desired_version)",
}
UNIQUE = {"idx_device_shadow_history_request"}
ADDS = {HISTORY: {"columns": COLUMNS, "indexes": INDEXES}}
# As long as it is parked.
SHUT = "The history that the downgrade from 078 parked. The next upgrade takes it back."
MAKES = {table: {"required": COLUMNS, "primary_key": KEY} for table in (HISTORY, PARKED)}


NEEDS = """the revisions of iot_models need two lines in this env.py (import iot_models.migrate); nothing was changed.
Without them, writers could wait without a limit, and a rollback could lose shadows:

    with iot_models.migrate.guarded(connection):      # around configure() and run_migrations(), in no transaction
        context.configure(connection=connection, ..., transaction_per_migration=True)"""


def begin() -> None:
    if not hasattr(op, "iot_models_begin"):
        raise CommandError(NEEDS)
    op.iot_models_begin(NEEDS)


def upgrade() -> None:
    begin()
    for table in (HISTORY, PARKED):
        if op.iot_models_table_exists(table):
            op.iot_models_expect_table(table, required=COLUMNS, primary_key=KEY)
    _lock_what_exists()

    _take_row_security_off()
    # If both exist, somebody has made the table while another was parked.
    op.execute(f"""
        DO $$ BEGIN
          IF to_regclass('{PARKED}') IS NOT NULL AND to_regclass('{HISTORY}') IS NULL THEN
            ALTER TABLE {PARKED} RENAME TO {HISTORY};
          END IF;
        END $$
    """)
    op.execute(f"""
        CREATE TABLE IF NOT EXISTS {HISTORY} (
          tenant_id       TEXT NOT NULL,
          device_id       TEXT NOT NULL,
          desired_version INTEGER NOT NULL,
          desired_state   JSONB,
          written_at      TIMESTAMPTZ,
          actor           TEXT,
          reason          TEXT,
          request_id      TEXT,
          transaction_id  BIGINT NOT NULL DEFAULT CAST(CAST(pg_current_xact_id() AS TEXT) AS BIGINT),
          PRIMARY KEY (tenant_id, device_id, desired_version)
        )
    """)
    # Before anything is granted or secured: Citus copies that to the machines.
    op.iot_models_distribute(HISTORY, beside="device_state")
    op.execute(f"""
        DO $$ BEGIN
          IF to_regclass('{PARKED}') IS NOT NULL THEN
            INSERT INTO {HISTORY} ({", ".join(COLUMNS)}) SELECT {", ".join(COLUMNS)} FROM {PARKED}
              ON CONFLICT DO NOTHING;
            DROP TABLE {PARKED};
          END IF;
        END $$
    """)
    for name, definition in INDEXES.items():
        unique = "UNIQUE " if name in UNIQUE else ""
        op.execute(f"CREATE {unique}INDEX IF NOT EXISTS {name} ON {HISTORY} USING {definition}")
        _require_index(name)
    op.execute(
        f"COMMENT ON TABLE {HISTORY} IS 'The desired documents of device_state, a row for each version. Never changed.'"
    )
    for column, comment in COMMENTS.items():
        op.execute(f"COMMENT ON COLUMN {HISTORY}.{column} IS '{comment}'")
    _give_to_the_owner()
    _revoke_all(HISTORY)
    _grant_as_on_device_state()
    _secure_as_device_state()
    op.iot_models_look_again()  # the text of a policy may call another function there, which matches better
    if not context.is_offline_mode():
        _name_what_is_not_copied(op.get_bind())


def downgrade() -> None:
    begin()
    op.iot_models_lock_table(HISTORY, "ACCESS EXCLUSIVE")
    if context.get_x_argument(as_dictionary=True).get("shadow") == "discard":
        op.execute(f"DROP TABLE {HISTORY}")
        op.execute(f"DROP TABLE IF EXISTS {PARKED}")
        return
    op.execute(f"""
        DO $$ BEGIN
          IF EXISTS (SELECT 1 FROM {HISTORY}) THEN
            ALTER TABLE {HISTORY} RENAME TO {PARKED};
            ALTER TABLE {PARKED} NO FORCE ROW LEVEL SECURITY;
            ALTER TABLE {PARKED} ENABLE ROW LEVEL SECURITY;
            COMMENT ON TABLE {PARKED} IS '{SHUT}';
          ELSE
            DROP TABLE {HISTORY};
          END IF;
        END $$
    """)
    _revoke_all(PARKED)
    _drop_policies()


def _lock_what_exists() -> None:
    """Wait for who makes a trigger on a history that exists already, and name it: rows may be added to that table."""
    for table in (HISTORY, PARKED):
        if op.iot_models_table_exists(table):
            op.iot_models_lock_table(table, "ACCESS EXCLUSIVE")
    if context.is_offline_mode():
        op.execute(f"""
            DO $$ BEGIN
              IF to_regclass('{HISTORY}') IS NOT NULL THEN
                LOCK TABLE {HISTORY} IN ACCESS EXCLUSIVE MODE;
              END IF;
            END $$
        """)
        op.iot_models_look_again()


def _take_row_security_off() -> None:
    """From the parked history, with policies that it was given there."""
    op.execute(f"""
        DO $$ BEGIN
          IF to_regclass('{PARKED}') IS NOT NULL THEN
            ALTER TABLE {PARKED} DISABLE ROW LEVEL SECURITY;
            ALTER TABLE {PARKED} NO FORCE ROW LEVEL SECURITY;
          END IF;
        END $$
    """)
    _drop_policies()


def _drop_policies() -> None:
    """Drop those of the parked history; name those that will not be made again."""
    if not context.is_offline_mode():
        _name_what_is_not_made_again(op.get_bind())
    op.execute(f"""
        DO $$
        DECLARE policy record;
        BEGIN
          FOR policy IN
            SELECT quote_ident(CAST(p.polname AS text)) AS name,
                   EXISTS (SELECT FROM pg_policy d WHERE d.polrelid = to_regclass('device_state')::oid
                              AND d.polname = p.polname) AS is_made_again
              FROM pg_policy p WHERE p.polrelid = to_regclass('{PARKED}')::oid ORDER BY p.polname
          LOOP
            EXECUTE 'DROP POLICY ' || policy.name || ' ON {PARKED}';
            IF NOT policy.is_made_again THEN
              RAISE WARNING USING MESSAGE = 'the policy ' || policy.name || ' of the parked history is gone, since '
                'device_state has none of that name: create it on {HISTORY} when that is there, if it is still wanted';
            END IF;
          END LOOP;
        END $$
    """)


def _require_index(name: str) -> None:
    """IF NOT EXISTS leaves an index out where anything else has its name."""
    op.execute(f"""
        DO $$ BEGIN
          IF NOT EXISTS (SELECT FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
                          WHERE i.indrelid = to_regclass('{HISTORY}')::oid AND c.relname = '{name}') THEN
            RAISE duplicate_table USING MESSAGE = 'the name of index {name} is taken: rename or drop what has it';
          END IF;
        END $$
    """)


def _give_to_the_owner() -> None:
    """Give a table that a superuser makes to the owner of `device_state`."""
    op.execute(f"""
        DO $$
        DECLARE owner text := (SELECT CAST(pg_get_userbyid(c.relowner) AS text) FROM pg_class c
                                WHERE c.oid = to_regclass('device_state')::oid);
        BEGIN
          IF (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) AND owner <> CAST(current_user AS text) THEN
            EXECUTE 'ALTER TABLE {HISTORY} OWNER TO ' || quote_ident(owner);
          END IF;
        END $$
    """)


def _revoke_all(table: str) -> None:
    """Leave the table to its owner alone, if it exists."""
    op.execute(f"""
        DO $$
        DECLARE granted record;
        BEGIN
          FOR granted IN
            SELECT DISTINCT
                   CASE WHEN a.grantee = CAST(0 AS oid) THEN 'PUBLIC'
                   ELSE quote_ident(CAST(pg_get_userbyid(a.grantee) AS text)) END AS role
              FROM pg_class c
             CROSS JOIN LATERAL (
               SELECT grantee FROM aclexplode(c.relacl)
               UNION ALL
               SELECT e.grantee FROM pg_attribute t CROSS JOIN aclexplode(t.attacl) e WHERE t.attrelid = c.oid) a
             WHERE c.oid = to_regclass('{table}')::oid AND a.grantee <> c.relowner
          LOOP
            EXECUTE 'REVOKE ALL PRIVILEGES ON {table} FROM ' || granted.role || ' CASCADE';
          END LOOP;
        END $$
    """)


def _grant_as_on_device_state() -> None:
    """A right on `device_state`, or to write its desired documents, is a right on their history.

    Who may read one column of the table may not read all of the history.
    """
    op.execute(f"""
        DO $$
        DECLARE granted record;
        BEGIN
          FOR granted IN
            SELECT CASE WHEN a.grantee = CAST(0 AS oid) THEN 'PUBLIC'
                   ELSE quote_ident(CAST(pg_get_userbyid(a.grantee) AS text)) END AS role,
                   string_agg(DISTINCT given.privilege, ', ') AS privileges
              FROM pg_class c
             CROSS JOIN LATERAL (
               SELECT grantee, privilege_type FROM aclexplode(c.relacl)
               UNION ALL
               SELECT e.grantee, e.privilege_type FROM pg_attribute t CROSS JOIN aclexplode(t.attacl) e
                WHERE t.attrelid = c.oid AND t.attname = 'desired_state' AND NOT e.privilege_type = 'SELECT') a
              JOIN (VALUES (CAST('SELECT' AS text), CAST('SELECT' AS text)), ('INSERT', 'INSERT'), ('UPDATE', 'INSERT'),
                           ('DELETE', 'INSERT'), ('DELETE', 'DELETE')) AS given (has, privilege)
                ON given.has = a.privilege_type
             WHERE c.oid = to_regclass('device_state')::oid
               AND a.grantee <> (SELECT h.relowner FROM pg_class h WHERE h.oid = to_regclass('{HISTORY}')::oid)
             GROUP BY a.grantee
          LOOP
            EXECUTE 'GRANT ' || granted.privileges || ' ON {HISTORY} TO ' || granted.role;
          END LOOP;
        END $$
    """)


def _secure_as_device_state() -> None:
    """Copy row level security. A policy that uses what the history does not have is named, and not copied.

    Its text is copied, in which a column of the team's could be one of the history's own (`actor`). So it is copied
    only if it uses no other columns than those that both tables have from us.

    Without a policy a role sees no row and adds none. So a restrictive one that cannot be copied takes the others with
    it: they would show too much.
    """
    op.execute(f"""
        DO $$
        DECLARE
          known CONSTANT oid := to_regclass('{HISTORY}')::oid;
          wanted record;
          left_out text;
        BEGIN
          SELECT relrowsecurity, relforcerowsecurity INTO wanted FROM pg_class
           WHERE oid = to_regclass('device_state')::oid;
          IF wanted.relforcerowsecurity THEN
            ALTER TABLE {HISTORY} FORCE ROW LEVEL SECURITY;
          END IF;
          IF NOT wanted.relrowsecurity THEN
            RETURN;
          END IF;
          ALTER TABLE {HISTORY} ENABLE ROW LEVEL SECURITY;
          FOR wanted IN
            SELECT CAST(p.polname AS text) AS name, p.polpermissive AS permissive,
                   -- Who updates a device adds to its history.
                   CASE CAST(p.polcmd AS text) WHEN 'r' THEN 'SELECT' WHEN 'd' THEN 'DELETE' WHEN '*' THEN 'ALL'
                     ELSE 'INSERT' END AS command,
                   (SELECT string_agg(CASE WHEN role = CAST(0 AS oid) THEN 'PUBLIC'
                                      ELSE quote_ident(CAST(pg_get_userbyid(role) AS text)) END, ', ')
                      FROM pg_catalog.unnest(p.polroles) AS role) AS roles,
                   CASE WHEN CAST(p.polcmd AS text) IN ('a', 'w') THEN ''
                   ELSE coalesce(' USING (' || pg_get_expr(p.polqual, p.polrelid) || ')', '') END
                     || CASE WHEN CAST(p.polcmd AS text) = 'w'
                        THEN ' WITH CHECK (' || pg_get_expr(coalesce(p.polwithcheck, p.polqual), p.polrelid) || ')'
                        ELSE coalesce(' WITH CHECK (' || pg_get_expr(p.polwithcheck, p.polrelid) || ')', '') END
                     AS rule,
                   NOT EXISTS (
                     SELECT FROM pg_depend d JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
                      WHERE d.classid = 'pg_policy'::regclass::oid AND d.objid = p.oid
                        AND d.refclassid = 'pg_class'::regclass::oid AND d.refobjid = p.polrelid
                        AND d.refobjsubid <> 0 AND a.attname <> ALL (ARRAY[{SHARED}])) AS is_shared
              FROM pg_policy p
             WHERE p.polrelid = to_regclass('device_state')::oid
               AND NOT EXISTS (SELECT FROM pg_policy o WHERE o.polrelid = known AND o.polname = p.polname)
             ORDER BY p.polpermissive, p.polname
          LOOP
            CONTINUE WHEN wanted.permissive AND left_out IS NOT NULL;
            BEGIN
              IF NOT wanted.is_shared THEN
                RAISE undefined_column;
              END IF;
              EXECUTE 'CREATE POLICY ' || quote_ident(wanted.name) || ' ON {HISTORY} AS '
                || CASE WHEN wanted.permissive THEN 'PERMISSIVE' ELSE 'RESTRICTIVE' END
                || ' FOR ' || wanted.command || ' TO ' || wanted.roles || wanted.rule;
            EXCEPTION WHEN undefined_column OR undefined_table THEN
              IF NOT wanted.permissive THEN
                left_out := wanted.name;
              END IF;
              RAISE WARNING USING MESSAGE = 'the policy ' || quote_ident(wanted.name) || ' of device_state cannot be '
                'copied to {HISTORY}: create one there';
            END;
          END LOOP;
        END $$
    """)


def _name_what_is_not_made_again(connection) -> None:  # noqa: ANN001 - a Connection
    gone = connection.scalars(
        text(f"""
            SELECT quote_ident(CAST(p.polname AS text)) FROM pg_policy p
             WHERE p.polrelid = to_regclass('{PARKED}')::oid
               AND NOT EXISTS (SELECT FROM pg_policy d WHERE d.polrelid = to_regclass('device_state')::oid
                                  AND d.polname = p.polname)
             ORDER BY 1
        """)
    ).all()
    if gone:
        log.warning(
            "policies that the parked history had are gone, since device_state has none of that name: %s. Create them "
            "on %s when that is there, if they are still wanted",
            ", ".join(gone),
            HISTORY,
        )


def _name_what_is_not_copied(connection) -> None:  # noqa: ANN001 - a Connection
    missing = connection.scalars(
        text(f"""
            SELECT quote_ident(CAST(p.polname AS text)) FROM pg_policy p
             WHERE p.polrelid = to_regclass('device_state')::oid
               AND NOT EXISTS (SELECT FROM pg_policy o
                                WHERE o.polrelid = to_regclass('{HISTORY}')::oid AND o.polname = p.polname)
             ORDER BY 1
        """)
    ).all()
    if missing:
        log.warning(
            "policies of device_state are not on %s, because they use columns that it does not have, or a restrictive "
            "one does: %s. Create such policies there: a role without one reads no history, and writes no desired "
            "document",
            HISTORY,
            ", ".join(missing),
        )
