"""Refusals: a device's word that it will not apply the newest desired version, and why.

The downgrade parks the refusals that count in `device_state_refusals_079`, in its one transaction: the partial index
finds them, so that its time is that of the refusals and not of the fleet. The upgrade puts them back, page by page
beside writers, where the device is still at that version, written at that time: a device that is removed meanwhile and
registered again is another one.

Revision ID: 079
Revises: 078
"""

import logging
import time

from alembic import context, op
from alembic.util import CommandError
from sqlalchemy import text

revision = "079"
down_revision = "078"
branch_labels = None
depends_on = None

log = logging.getLogger("alembic.iot_models")

COLUMNS = {
    "refused_version": ("integer", False, None),
    "refusal": ("text", False, None),
    "refused_at": ("timestamp with time zone", False, None),
}
COMMENTS = {
    "refused_version": (
        "The desired_version that the device last refused. It counts while that is the newest one, and pending."
    ),
    "refusal": "Why the device refused it, in its own words.",
    "refused_at": "When the device refused it.",
}
# The devices of a tenant that refused the newest version, by device_id: ShadowService.refused and count_refused.
REFUSED = (
    "idx_device_state_shadow_refused",
    "btree (tenant_id, device_id) WHERE ((refused_version = desired_version) AND (desired_version > reported_version))",
)
ADDS = {"device_state": {"columns": COLUMNS, "indexes": dict([REFUSED])}}

PARKED = "device_state_refusals_079"
KEY = ("tenant_id", "device_id")
PARKED_COLUMNS = {
    **dict.fromkeys(KEY, ("text", True, None)),
    **COLUMNS,
    "shadow_updated_at": ("timestamp with time zone", False, None),
}
MAKES = {PARKED: {"required": PARKED_COLUMNS, "primary_key": KEY}}
NAMES = ", ".join(PARKED_COLUMNS)

# How many rows are locked at a time, how often those that others have locked are tried again, and the first pause.
PAGE = 200
ROUNDS = 8
FIRST_PAUSE = 0.1
PROGRESS_EVERY = 2.0


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
    op.execute("""
        ALTER TABLE device_state
          ADD COLUMN IF NOT EXISTS refused_version INTEGER,
          ADD COLUMN IF NOT EXISTS refusal         TEXT,
          ADD COLUMN IF NOT EXISTS refused_at      TIMESTAMPTZ
    """)
    for column, comment in COMMENTS.items():
        op.execute(f"COMMENT ON COLUMN device_state.{column} IS '{comment}'")

    with op.get_context().autocommit_block():
        if parked:
            _put_back(op.get_bind())
        op.iot_models_ensure_index("device_state", *REFUSED)

    if context.is_offline_mode():
        # For the DROP of the parked table with its foreign key, and before any row is locked: a transaction that waits
        # for a row of ours would never let us have it.
        op.iot_models_lock_table("device_state", "ACCESS EXCLUSIVE", where_exists=PARKED)
        op.iot_models_nobody_makes_triggers(PARKED)
        _put_back_offline()
    elif parked:
        op.iot_models_lock_table("device_state", "ACCESS EXCLUSIVE")  # before the parked table, as who removes a device
        op.execute(f"DROP TABLE {PARKED}")


def downgrade() -> None:
    begin()
    op.iot_models_lock_table("device_state", "ACCESS EXCLUSIVE")
    op.execute(f"DROP TABLE IF EXISTS {PARKED}")
    if context.get_x_argument(as_dictionary=True).get("shadow") != "discard":
        _park()
    op.execute(f"DROP INDEX IF EXISTS {REFUSED[0]}")
    op.execute("ALTER TABLE device_state " + ", ".join(f"DROP COLUMN IF EXISTS {name}" for name in COLUMNS))


def _park() -> None:
    op.execute(f"""
        CREATE TABLE {PARKED} (
          tenant_id         TEXT NOT NULL,
          device_id         TEXT NOT NULL,
          refused_version   INTEGER,
          refusal           TEXT,
          refused_at        TIMESTAMPTZ,
          shadow_updated_at TIMESTAMPTZ,
          PRIMARY KEY (tenant_id, device_id)
        )
    """)
    op.iot_models_distribute(PARKED, beside="device_state")
    op.execute(
        f"COMMENT ON TABLE {PARKED} IS 'Refusals that the downgrade from 079 parked. The next upgrade puts them back.'"
    )
    # To the owner of device_state, and to nobody else: it has the words of all tenants' devices.
    op.execute(f"""
        DO $$
        DECLARE
          owner text := (SELECT CAST(pg_get_userbyid(c.relowner) AS text) FROM pg_class c
                          WHERE c.oid = to_regclass('device_state')::oid);
          granted record;
        BEGIN
          IF (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) AND owner <> CAST(current_user AS text) THEN
            EXECUTE 'ALTER TABLE {PARKED} OWNER TO ' || quote_ident(owner);
          END IF;
          FOR granted IN
            SELECT DISTINCT CASE WHEN a.grantee = CAST(0 AS oid) THEN 'PUBLIC'
                            ELSE quote_ident(CAST(pg_get_userbyid(a.grantee) AS text)) END AS role
              FROM pg_class c CROSS JOIN aclexplode(c.relacl) a
             WHERE c.oid = to_regclass('{PARKED}')::oid AND a.grantee <> c.relowner
          LOOP
            EXECUTE 'REVOKE ALL PRIVILEGES ON {PARKED} FROM ' || granted.role || ' CASCADE';
          END LOOP;
        END $$
    """)
    op.execute(f"ALTER TABLE {PARKED} ENABLE ROW LEVEL SECURITY")
    op.execute(f"""
        DO $$ BEGIN
          INSERT INTO {PARKED} ({NAMES}) SELECT {NAMES} FROM device_state
           WHERE refused_version = desired_version AND desired_version > reported_version;
          IF NOT EXISTS (SELECT 1 FROM {PARKED}) THEN
            DROP TABLE {PARKED};
          END IF;
        END $$
    """)


# A device that has a newer version or refusal keeps it.
SAME = (
    "d.desired_version = p.refused_version AND d.refused_version IS NULL "
    "AND d.shadow_updated_at IS NOT DISTINCT FROM p.shadow_updated_at"
)
# A page, with its rows locked but those that a writer has locked; a later round takes these. So it never waits while it
# holds a lock. What is left belongs to no device any more. `<of d>` and `<of p>` limit a table to one tenant where
# it is distributed: Citus locks no others at a time.
PUT_BACK = f"""
    WITH page AS MATERIALIZED (
      SELECT tenant_id, device_id FROM {PARKED} p
       WHERE <behind><of p>
       ORDER BY tenant_id, device_id LIMIT {PAGE}),
    found AS MATERIALIZED (
      SELECT tenant_id, device_id FROM page JOIN device_state d USING (tenant_id, device_id)
       WHERE TRUE<of d>),
    free AS MATERIALIZED (
      SELECT d.tenant_id, d.device_id FROM found JOIN device_state d USING (tenant_id, device_id)
       WHERE TRUE<of d>
         FOR NO KEY UPDATE OF d SKIP LOCKED),
    taken AS (
      DELETE FROM {PARKED} p USING free WHERE (p.tenant_id, p.device_id) = (free.tenant_id, free.device_id)<of p>
          RETURNING p.*),
    moved AS (
      UPDATE device_state d SET {", ".join(f"{name} = taken.{name}" for name in COLUMNS)}
        FROM taken WHERE (d.tenant_id, d.device_id) = (taken.tenant_id, taken.device_id)
         AND {SAME.replace("p.", "taken.")}<of d>
          RETURNING 1)
    SELECT tenant_id, device_id, (SELECT count(*) FROM found) - (SELECT count(*) FROM free) AS held,
           (SELECT count(*) FROM moved) AS moved
      FROM page ORDER BY tenant_id DESC, device_id DESC LIMIT 1
"""


def _put_back(connection) -> None:  # noqa: ANN001 - a Connection
    by_tenant = op.iot_models_is_distributed("device_state")
    statement = PUT_BACK
    for table in "dp":
        one = f" AND {table}.tenant_id = CAST(:of AS text)" if by_tenant else ""
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
        tenants = connection.scalars(text(f"SELECT DISTINCT tenant_id FROM {PARKED}")).all() if by_tenant else [""]
        for tenant in sorted(tenants):
            only = {"of": tenant} if by_tenant else {}
            page = connection.execute(first, only).one_or_none()
            while page is not None:
                total += page.moved
                held += page.held
                if time.monotonic() >= report_at:
                    log.info("%s refusals put back so far", f"{total:,}")
                    report_at += PROGRESS_EVERY
                behind = {"tenant": page.tenant_id, "device": page.device_id}
                page = connection.execute(further, only | behind).one_or_none()
        if not held:
            log.info("%s refusals put back", f"{total:,}")
            return
        time.sleep(pause)
        pause *= 2
    raise CommandError(
        f"{held} rows of device_state stayed locked by other transactions over {ROUNDS} rounds. {total:,} refusals are "
        "put back; end those transactions (pg_stat_activity, or pg_prepared_xacts) and run the same command again."
    )


def _put_back_offline() -> None:
    op.execute(f"""
        DO $$ BEGIN
          IF to_regclass('{PARKED}') IS NOT NULL THEN
            UPDATE device_state d SET {", ".join(f"{name} = p.{name}" for name in COLUMNS)}
              FROM {PARKED} p WHERE (d.tenant_id, d.device_id) = (p.tenant_id, p.device_id)
               AND {SAME};
            DROP TABLE {PARKED};
          END IF;
        END $$
    """)
