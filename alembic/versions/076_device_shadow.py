"""Device shadow: desired and reported state, their versions, and the index of pending devices.

Upgrade and downgrade run while writers go on. A writer waits at most for one try for a lock (`lock_timeout`) or for a
page of rows. Each step can be interrupted: the same command, run again, continues from there.

The downgrade parks the shadows in `device_state_shadow_076`; the upgrade puts them back.

A shadow goes with its device, while it is parked, too: a device that is removed during a rollback and registered again
is another one, and must not get the shadow of the first. So the parked table has a foreign key to `device_state`, with
ON DELETE CASCADE and, for a device that is renamed, ON UPDATE CASCADE. A trigger on `device_state` could do the same,
but it would be an object of ours on the table of 075, which a team dumps, compares and changes; the foreign key goes
with the parked table. It costs a removal one search by primary key, and a heartbeat nothing. It takes a short SHARE ROW
EXCLUSIVE lock, which the copying trigger needs anyway. While shadows are parked, TRUNCATE of `device_state` fails
unless it names both tables. Logical replication fires no cascade: a shadow whose device it removed stays parked, and
the next upgrade counts it.

Where Citus has distributed `device_state`, the parked table is distributed in the same way, and the rows of one tenant
are moved at a time, because only these can be locked. Citus has no triggers: the shadows are copied beforehand, and
what was written meanwhile is copied in the last transaction, which has to compare all shadows for that. It has no ON
UPDATE CASCADE of the column that distributes either: while shadows are parked, their devices cannot be renamed.

Revision ID: 076
Revises: 075
"""

import logging
import time

from alembic import context, op
from alembic.util import CommandError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

revision = "076"
down_revision = "075"
branch_labels = None
depends_on = None

log = logging.getLogger("alembic.iot_models")

COLUMNS = {
    "desired_state": ("jsonb", True, "'{}'::jsonb"),
    "reported_state": ("jsonb", True, "'{}'::jsonb"),
    "desired_version": ("integer", True, "0"),
    "reported_version": ("integer", True, "0"),
    "shadow_updated_at": ("timestamp with time zone", False, None),
}
COMMENTS = {
    "desired_state": "Operator intent. What the device should be configured as.",
    "reported_state": "Device-reported actual state. Set by device via MQTT or HTTP.",
    "desired_version": "Monotonically increasing. Increments on every desired_state write.",
    "reported_version": "The desired_version the device last acknowledged.",
    "shadow_updated_at": "Timestamp of the most recent desired_state update.",
}
# The devices of a tenant that have not acknowledged the newest desired version.
PENDING = ("idx_device_state_shadow_pending", "btree (tenant_id) WHERE (desired_version > reported_version)")
ADDS = {"device_state": {"columns": COLUMNS, "indexes": dict([PENDING])}}

PARKED = "device_state_shadow_076"
TRIGGER = "device_state_shadow_076_park"
KEY = ("tenant_id", "device_id")
PARKED_COLUMNS = dict.fromkeys(KEY, ("text", True, None)) | {
    name: (kind, not_null, None) for name, (kind, not_null, _) in COLUMNS.items()
}
NAMES = ", ".join(COLUMNS)
OVERWRITE = ", ".join(f"{name} = EXCLUDED.{name}" for name in COLUMNS)

# How many rows are locked at a time: a writer of one of them waits a few milliseconds, until all of them are written.
PAGE = 200
# How many rounds there are for rows that other transactions have locked, and the pause after the first one, doubled
# after each.
ROUNDS = 8
FIRST_PAUSE = 0.1
PROGRESS_EVERY = 2.0
DIVISION_BY_ZERO = "22012"


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
    op.iot_models_expect_table("device_state", added_since=revision)
    parked = op.iot_models_table_exists(PARKED)
    if parked:
        op.iot_models_expect_table(PARKED, required=PARKED_COLUMNS, primary_key=KEY)

    op.iot_models_lock_table("device_state", "ACCESS EXCLUSIVE")
    # Constant defaults: PostgreSQL adds the columns without rewriting the table.
    op.execute("""
        ALTER TABLE device_state
          ADD COLUMN IF NOT EXISTS desired_state     JSONB NOT NULL DEFAULT '{}',
          ADD COLUMN IF NOT EXISTS reported_state    JSONB NOT NULL DEFAULT '{}',
          ADD COLUMN IF NOT EXISTS desired_version   INTEGER NOT NULL DEFAULT 0,
          ADD COLUMN IF NOT EXISTS reported_version  INTEGER NOT NULL DEFAULT 0,
          ADD COLUMN IF NOT EXISTS shadow_updated_at TIMESTAMPTZ
    """)
    for column, comment in COMMENTS.items():
        op.execute(f"COMMENT ON COLUMN device_state.{column} IS '{comment}'")

    with op.get_context().autocommit_block():
        if parked:
            _put_back(op.get_bind())
        op.iot_models_ensure_index("device_state", *PENDING)

    if context.is_offline_mode():
        # For the DROP of the parked table with its foreign key, and before any row is locked: a transaction that waits
        # for a row of ours would never let us have it.
        op.iot_models_lock_table("device_state", "ACCESS EXCLUSIVE", where_exists=PARKED)
        op.iot_models_nobody_makes_triggers(PARKED)
        _put_back_offline()
    elif parked:
        _report_what_stays(op.get_bind())


def downgrade() -> None:
    begin()
    discard = context.get_x_argument(as_dictionary=True).get("shadow") == "discard"
    online = not context.is_offline_mode()
    distributed = op.iot_models_is_distributed("device_state")
    if online and not discard:
        if op.iot_models_table_exists(PARKED):
            op.iot_models_expect_table(PARKED, required=PARKED_COLUMNS, primary_key=KEY)
        op.iot_models_lock_table("device_state", "SHARE ROW EXCLUSIVE")
        _create_parked(COPIES if distributed else SHADOWS)
        if not distributed:
            _mirror_new_writes()
        with op.get_context().autocommit_block():
            if distributed:
                _move(op.get_bind(), COPY, "parked", tenants_of="device_state")
            else:
                _move(op.get_bind(), PARK, "parked")

    # The rest is one transaction, Alembic's. Before it every shadow is in the columns, after it in the parked table,
    # while it runs in both.
    op.iot_models_lock_table("device_state", "ACCESS EXCLUSIVE")
    if discard:
        op.execute(f"DROP TABLE IF EXISTS {PARKED}")
    elif distributed or not online:
        _create_parked(SHADOWS)
        _park_what_differs()
    op.execute(f"DROP FUNCTION IF EXISTS {TRIGGER}() CASCADE")  # with its trigger; Citus refuses a DROP TRIGGER
    op.execute(f"DROP INDEX IF EXISTS {PENDING[0]}")
    op.execute("ALTER TABLE device_state " + ", ".join(f"DROP COLUMN IF EXISTS {name}" for name in COLUMNS))
    if (
        online
        and not discard
        and not distributed
        and not op.get_bind().scalar(text(f"SELECT EXISTS (SELECT 1 FROM {PARKED})"))
    ):
        op.execute(f"DROP TABLE {PARKED}")


def _never_written(row: str) -> str:
    return (
        f"{row}.desired_state = '{{}}' AND {row}.reported_state = '{{}}' AND {row}.desired_version = 0 "
        f"AND {row}.reported_version = 0 AND {row}.shadow_updated_at IS NULL"
    )


# What the parked table says of itself.
SHADOWS = "Shadows that the downgrade from 076 parked. The next upgrade puts them back."
COPIES = "Copies of shadows: a downgrade from 076 is at work, or was interrupted."


def _create_parked(comment: str) -> None:
    op.execute(f"""
        CREATE TABLE IF NOT EXISTS {PARKED} (
          tenant_id         TEXT NOT NULL,
          device_id         TEXT NOT NULL,
          desired_state     JSONB NOT NULL,
          reported_state    JSONB NOT NULL,
          desired_version   INTEGER NOT NULL,
          reported_version  INTEGER NOT NULL,
          shadow_updated_at TIMESTAMPTZ,
          PRIMARY KEY (tenant_id, device_id)
        )
    """)
    op.iot_models_distribute(PARKED, beside="device_state")
    op.execute(f"COMMENT ON TABLE {PARKED} IS '{comment}'")
    _give_to_the_owner("TABLE", PARKED)
    # It has the shadows of all tenants, and is its owner's alone: default privileges may let the application read new
    # tables, and without a policy a role with BYPASSRLS would still see rows.
    op.execute(f"ALTER TABLE {PARKED} ENABLE ROW LEVEL SECURITY")
    _revoke_all(
        PARKED,
        f"""
            SELECT c.relowner AS owner, a.grantee
              FROM pg_class c
             CROSS JOIN LATERAL (
               SELECT grantee FROM aclexplode(c.relacl)
               UNION ALL
               SELECT e.grantee FROM pg_attribute t CROSS JOIN aclexplode(t.attacl) e WHERE t.attrelid = c.oid) a
             WHERE c.oid = to_regclass('{PARKED}')::oid
        """,
    )
    # A table that was parked before this foreign key existed may have shadows of devices that are gone.
    op.execute(f"""
        DO $$ BEGIN
          IF NOT EXISTS (
            SELECT FROM pg_constraint
             WHERE conrelid = to_regclass('{PARKED}')::oid AND confrelid = to_regclass('device_state')::oid)
          THEN
            DELETE FROM {PARKED} p WHERE NOT EXISTS (
              SELECT 1 FROM device_state d WHERE (d.tenant_id, d.device_id) = (p.tenant_id, p.device_id));
            BEGIN
              ALTER TABLE {PARKED} ADD FOREIGN KEY (tenant_id, device_id)
                REFERENCES device_state (tenant_id, device_id) ON DELETE CASCADE ON UPDATE CASCADE;
            EXCEPTION WHEN feature_not_supported OR invalid_foreign_key THEN  -- Citus
              ALTER TABLE {PARKED} ADD FOREIGN KEY (tenant_id, device_id)
                REFERENCES device_state (tenant_id, device_id) ON DELETE CASCADE;
            END;
          END IF;
        END $$
    """)


def _revoke_all(target: str, grantees: str) -> None:
    """Take away what default privileges gave others on a new object; `grantees` selects its `owner` and `grantee`."""
    op.execute(f"""
        DO $$
        DECLARE granted record;
        BEGIN
          FOR granted IN
            SELECT DISTINCT
                   CASE WHEN a.grantee = CAST(0 AS oid) THEN 'PUBLIC'
                   ELSE quote_ident(CAST(pg_get_userbyid(a.grantee) AS text)) END AS role
              FROM ({grantees}) a WHERE a.grantee <> a.owner
          LOOP
            EXECUTE 'REVOKE ALL PRIVILEGES ON {target} FROM ' || granted.role || ' CASCADE';
          END LOOP;
        END $$
    """)


def _give_to_the_owner(kind: str, name: str) -> None:
    """Give a new object of a superuser's to the owner of `device_state`.

    The owner of the schema may replace what is in it, and what a superuser's function uses would run as the superuser.
    """
    op.execute(f"""
        DO $$
        DECLARE owner text := (SELECT CAST(pg_get_userbyid(c.relowner) AS text) FROM pg_class c
                                WHERE c.oid = to_regclass('device_state')::oid);
        BEGIN
          IF (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) AND owner <> CAST(current_user AS text) THEN
            EXECUTE 'ALTER {kind} {name} OWNER TO ' || quote_ident(owner);
          END IF;
        END $$
    """)


def _mirror_new_writes() -> None:
    """From now on every write of a shadow also goes to the parked copy.

    By a trigger, because the copying must not block writers and the last transaction must not have to read the table.
    Its function runs with the rights of its owner, because the application's role has none on the parked table. So it
    has to be safe by itself: nobody else may execute it, and as a trigger of another table it refuses to run. The
    triggers of partitions are made by PostgreSQL.
    """
    table = (
        op.get_bind()
        .execute(
            text("""
            SELECT CAST(c.oid AS bigint) AS id, quote_ident(CAST(n.nspname AS text)) AS schema
              FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE c.oid = to_regclass('device_state')::oid
        """)
        )
        .one()
    )
    schema = table.schema.replace(":", r"\:")  # Alembic would take :name for a parameter
    op.execute(f"""
        CREATE OR REPLACE FUNCTION {TRIGGER}() RETURNS trigger
        LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {schema}, pg_temp AS $$
        BEGIN
          IF TG_RELID <> CAST({table.id} AS oid) AND NOT EXISTS (
            SELECT FROM pg_partition_ancestors(CAST(TG_RELID AS regclass)) AS of
             WHERE CAST(of.relid AS oid) = CAST({table.id} AS oid))
          THEN
            RAISE insufficient_privilege USING MESSAGE = '{TRIGGER}() is for device_state alone';
          END IF;
          IF {_never_written("NEW")} THEN
            DELETE FROM {PARKED} p WHERE p.tenant_id = NEW.tenant_id AND p.device_id = NEW.device_id;
          ELSE
            INSERT INTO {PARKED} (tenant_id, device_id, {NAMES})
            VALUES (NEW.tenant_id, NEW.device_id, {", ".join(f"NEW.{name}" for name in COLUMNS)})
            ON CONFLICT (tenant_id, device_id) DO UPDATE SET {OVERWRITE};
          END IF;
          RETURN NULL;
        END $$
    """)
    _give_to_the_owner("FUNCTION", f"{TRIGGER}()")
    _revoke_all(
        f"FUNCTION {TRIGGER}()",
        f"""
            SELECT p.proowner AS owner, a.grantee
              FROM pg_proc p CROSS JOIN aclexplode(coalesce(p.proacl, pg_catalog.acldefault('f', p.proowner))) a
             WHERE p.oid = to_regprocedure('{TRIGGER}()')::oid
        """,
    )
    op.execute(f"""
        CREATE OR REPLACE TRIGGER {TRIGGER}
          AFTER INSERT OR UPDATE OF tenant_id, device_id, {NAMES} ON device_state
          FOR EACH ROW EXECUTE FUNCTION {TRIGGER}()
    """)
    # ALWAYS: also for what logical replication writes.
    op.execute(f"ALTER TABLE device_state ENABLE ALWAYS TRIGGER {TRIGGER}")


# PARK and PUT_BACK move a page of shadows in one statement. They lock the rows first and skip those that a writer has
# locked, which a later round takes. So they never wait while they hold a lock, and cannot be part of a deadlock.
# A page reads one table by its primary key and joins the other table to these keys only (MATERIALIZED). New columns
# have no statistics, so the planner would expect a join of both tables to return one row.
# `<of d>` and `<of p>` limit a table to one tenant where it is distributed: Citus has to see it for each table.

EQUAL = " AND ".join(f"p.{name} IS NOT DISTINCT FROM d.{name}" for name in COLUMNS)

PARK = f"""
    WITH page AS MATERIALIZED (
      SELECT tenant_id, device_id FROM device_state d
       WHERE <behind> AND NOT ({_never_written("d")})
       ORDER BY tenant_id, device_id LIMIT {PAGE}),
    found AS MATERIALIZED (
      SELECT tenant_id, device_id FROM page JOIN device_state d USING (tenant_id, device_id)
        LEFT JOIN {PARKED} p USING (tenant_id, device_id)
       WHERE NOT ({_never_written("d")}) AND (p.tenant_id IS NULL OR NOT ({EQUAL}))),
    free AS MATERIALIZED (
      SELECT d.* FROM device_state d JOIN found USING (tenant_id, device_id)
       WHERE NOT ({_never_written("d")})
         FOR NO KEY UPDATE OF d SKIP LOCKED),
    moved AS (
      INSERT INTO {PARKED} (tenant_id, device_id, {NAMES}) SELECT tenant_id, device_id, {NAMES} FROM free
          ON CONFLICT (tenant_id, device_id) DO UPDATE SET {OVERWRITE}
          RETURNING 1)
    SELECT tenant_id, device_id, (SELECT count(*) FROM found) AS found, (SELECT count(*) FROM moved) AS moved
      FROM page ORDER BY tenant_id DESC, device_id DESC LIMIT 1
"""
# The same where the table is distributed. It takes what it finds: what is written later, or locked by who removes the
# device, is parked in the last transaction.
COPY = f"""
    WITH page AS MATERIALIZED (
      SELECT tenant_id, device_id, {NAMES} FROM device_state d
       WHERE <behind><of d> AND NOT ({_never_written("d")})
       ORDER BY tenant_id, device_id LIMIT {PAGE}
         FOR KEY SHARE OF d SKIP LOCKED),
    moved AS (
      INSERT INTO {PARKED} (tenant_id, device_id, {NAMES}) SELECT tenant_id, device_id, {NAMES} FROM page
          ON CONFLICT (tenant_id, device_id) DO UPDATE SET {OVERWRITE}
          RETURNING 1)
    SELECT tenant_id, device_id, (SELECT count(*) FROM page) AS found, (SELECT count(*) FROM moved) AS moved
      FROM page ORDER BY tenant_id DESC, device_id DESC LIMIT 1
"""
# A shadow that was written since the downgrade is kept. The division fails, and so undoes the page, if a trigger of the
# team suppressed the UPDATE of a row whose parked copy this statement deletes.
PUT_BACK = f"""
    WITH page AS MATERIALIZED (
      SELECT tenant_id, device_id FROM {PARKED} p
       WHERE <behind><of p>
       ORDER BY tenant_id, device_id LIMIT {PAGE}),
    found AS MATERIALIZED (
      SELECT tenant_id, device_id FROM page JOIN device_state d USING (tenant_id, device_id)
       WHERE {_never_written("d")}<of d>),
    free AS MATERIALIZED (
      SELECT tenant_id, device_id FROM device_state d JOIN found USING (tenant_id, device_id)
       WHERE {_never_written("d")}<of d>
         FOR NO KEY UPDATE OF d SKIP LOCKED),
    taken AS (
      DELETE FROM {PARKED} p USING free WHERE (p.tenant_id, p.device_id) = (free.tenant_id, free.device_id)<of p>
          RETURNING p.*),
    moved AS (
      UPDATE device_state d SET {", ".join(f"{name} = taken.{name}" for name in COLUMNS)}
        FROM taken WHERE (d.tenant_id, d.device_id) = (taken.tenant_id, taken.device_id)<of d>
          RETURNING 1)
    SELECT tenant_id, device_id, (SELECT count(*) FROM found) AS found, (SELECT count(*) FROM moved) AS moved,
           1 / CAST((SELECT count(*) FROM taken) = (SELECT count(*) FROM moved) AS integer) AS whole
      FROM page ORDER BY tenant_id DESC, device_id DESC LIMIT 1
"""


def _move(connection, statement: str, done: str, tenants_of: str | None = None) -> None:  # noqa: ANN001 - a Connection
    """Run the statement of a page until nothing is left to move, and log the progress every two seconds.

    `tenants_of` names the table whose tenants are moved one after another; None: all rows in one sequence.
    """
    for table in "dp":
        one = f" AND {table}.tenant_id = CAST(:of AS text)" if tenants_of else ""
        statement = statement.replace(f"<of {table}>", one)
    first = text(statement.replace("<behind>", "TRUE"))
    further = text(
        statement.replace("<behind>", "(tenant_id, device_id) > (CAST(:tenant AS text), CAST(:device AS text))")
    )
    total = 0
    report_at = time.monotonic() + PROGRESS_EVERY
    pause = FIRST_PAUSE
    for _ in range(ROUNDS):
        held = 0
        # A tenant that comes later has no shadows yet, or they are copied in the last transaction.
        tenants = connection.scalars(text(f"SELECT DISTINCT tenant_id FROM {tenants_of}")).all() if tenants_of else [""]
        for tenant in sorted(tenants):
            only = {"of": tenant} if tenants_of else {}
            page = connection.execute(first, only).one_or_none()
            while page is not None:
                total += page.moved
                held += page.found - page.moved
                if time.monotonic() >= report_at:
                    log.info("%s shadows %s so far", f"{total:,}", done)
                    report_at += PROGRESS_EVERY
                behind = {"tenant": page.tenant_id, "device": page.device_id}
                page = connection.execute(further, only | behind).one_or_none()
        if not held:
            log.info("%s shadows %s", f"{total:,}", done)
            return
        log.info("%d rows are locked by other transactions: again in %.1f s", held, pause)
        time.sleep(pause)
        pause *= 2
    raise CommandError(
        f"{held} rows of device_state stayed locked by other transactions over {ROUNDS} rounds. "
        f"{total:,} shadows are {done}; end those transactions (pg_stat_activity, or pg_prepared_xacts) and run the "
        "same command again."
    )


def _put_back(connection) -> None:  # noqa: ANN001 - a Connection
    distributed = op.iot_models_is_distributed("device_state")
    try:
        _move(connection, PUT_BACK, "put back", tenants_of=PARKED if distributed else None)
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) != DIVISION_BY_ZERO:
            raise
        raise CommandError(
            "a trigger or rule on device_state keeps parked shadows from being put back: disable it, run the same "
            f"command again, and enable it afterwards. Nothing is lost: they are in {PARKED}."
        ) from error


def _report_what_stays(connection) -> None:  # noqa: ANN001 - a Connection
    left = connection.scalar(text(f"SELECT count(*) FROM {PARKED}"))
    if not left:
        op.iot_models_lock_table("device_state", "ACCESS EXCLUSIVE")  # before the parked table, as who removes a device
        op.execute(f"DROP TABLE {PARKED}")
        return
    log.warning(
        "%s parked shadows stay in %s: their devices have a newer shadow, or were removed by logical replication. "
        "Drop the table when you no longer need them.",
        f"{left:,}",
        PARKED,
    )


def _put_back_offline() -> None:
    keys = "(d.tenant_id, d.device_id) = (p.tenant_id, p.device_id)"
    op.execute(f"""
        DO $$ BEGIN
          IF to_regclass('{PARKED}') IS NOT NULL THEN
            WITH moved AS (
              UPDATE device_state d SET {", ".join(f"{name} = p.{name}" for name in COLUMNS)}
                FROM {PARKED} p WHERE {keys} AND {_never_written("d")}
              RETURNING d.tenant_id, d.device_id)
            DELETE FROM {PARKED} p USING moved d WHERE {keys};
            IF EXISTS (SELECT 1 FROM {PARKED}) THEN
              RAISE WARNING USING MESSAGE = pg_catalog.concat(
                (SELECT count(*) FROM {PARKED}), ' parked shadows stay in {PARKED}: their devices have a newer shadow, '
                'or were removed by logical replication');
            ELSE
              DROP TABLE {PARKED};
            END IF;
          END IF;
        END $$
    """)


def _park_what_differs() -> None:
    """Park all shadows in one transaction, but those that were copied already and are the same since."""
    op.execute(f"""
        INSERT INTO {PARKED} (tenant_id, device_id, {NAMES})
        SELECT d.tenant_id, d.device_id, {", ".join(f"d.{name}" for name in COLUMNS)}
          FROM device_state d LEFT JOIN {PARKED} p ON (p.tenant_id, p.device_id) = (d.tenant_id, d.device_id)
         WHERE NOT ({_never_written("d")}) AND (p.tenant_id IS NULL OR NOT ({EQUAL}))
        ON CONFLICT (tenant_id, device_id) DO UPDATE SET {OVERWRITE}
    """)
    op.execute(f"""
        DELETE FROM {PARKED} p USING device_state d
         WHERE (d.tenant_id, d.device_id) = (p.tenant_id, p.device_id) AND {_never_written("d")}
    """)
    op.execute(f"""
        DO $$ BEGIN
          IF NOT EXISTS (SELECT 1 FROM {PARKED}) THEN
            DROP TABLE {PARKED};
          END IF;
        END $$
    """)
