"""The table `device_state` without shadows, as deployments had it before revision 076.

If raw SQL has created the table already, up to 075 or up to 076, it is adopted: compared, and left as it is.

Revision ID: 075
Revises:
"""

from alembic import context, op
from alembic.util import CommandError

revision = "075"
down_revision = None
branch_labels = ("iot_models",)
depends_on = None

COLUMNS = {
    "tenant_id": ("text", True, None),
    "site_id": ("text", True, None),
    "device_id": ("text", True, None),
    "status": ("text", True, "'OFFLINE'::text"),
    "last_heartbeat_at": ("timestamp with time zone", False, None),
    "last_telemetry_at": ("timestamp with time zone", False, None),
    "last_seen_at": ("timestamp with time zone", False, None),
    "last_state_change_at": ("timestamp with time zone", True, "now()"),
    "state": ("jsonb", True, "'{}'::jsonb"),
}
INDEXES = {
    # All devices of a site.
    "idx_device_state_site": "btree (tenant_id, site_id)",
    # A tenant's devices by liveness.
    "idx_device_state_status": "btree (tenant_id, status)",
}
ADDS = {"device_state": {"columns": COLUMNS, "indexes": INDEXES}}

PARKED = "device_state_shadow_076"
# What later downgrades park.
PARKED_LATER = ("device_shadow_history_078", "device_state_refusals_079")


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
    if op.iot_models_table_exists("device_state"):
        _adopt()
        return
    op.execute("""
        CREATE TABLE device_state (
          tenant_id            TEXT NOT NULL,
          site_id              TEXT NOT NULL,
          device_id            TEXT NOT NULL,
          status               TEXT NOT NULL DEFAULT 'OFFLINE',
          last_heartbeat_at    TIMESTAMPTZ,
          last_telemetry_at    TIMESTAMPTZ,
          last_seen_at         TIMESTAMPTZ,
          last_state_change_at TIMESTAMPTZ NOT NULL DEFAULT now(),
          state                JSONB NOT NULL DEFAULT '{}',
          PRIMARY KEY (tenant_id, device_id)
        )
    """)
    for name, definition in INDEXES.items():
        op.execute(f"CREATE INDEX {name} ON device_state USING {definition}")


def _adopt() -> None:
    op.iot_models_expect_table(
        "device_state", required=COLUMNS, primary_key=["tenant_id", "device_id"], added_since=revision
    )
    with op.get_context().autocommit_block():
        for name, definition in INDEXES.items():
            op.iot_models_ensure_index("device_state", name, definition)


def downgrade() -> None:
    begin()
    op.iot_models_lock_table("device_state", "ACCESS EXCLUSIVE")
    parked = op.iot_models_table_exists(PARKED)
    if context.get_x_argument(as_dictionary=True).get("device_state") != "drop":
        _refuse_rows("device_state")
        if parked:
            _refuse_rows(PARKED)
    else:
        for table in PARKED_LATER:
            op.execute(f"DROP TABLE IF EXISTS {table}")
    if parked:
        op.execute(f"DROP TABLE {PARKED}")
    op.execute("DROP TABLE device_state")


def _refuse_rows(table: str) -> None:
    if context.is_offline_mode():
        op.execute(f"""
            DO $$ BEGIN
              IF EXISTS (SELECT 1 FROM {table}) THEN
                RAISE EXCEPTION '{table} holds rows: print this SQL with -x device_state=drop to drop them';
              END IF;
            END $$
        """)
        return
    rows = op.get_bind().exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one()
    if rows:
        raise CommandError(
            f"{table} holds {rows:,} rows, and going below 075 would drop them; nothing was dropped. "
            "Stay at 075, or throw them away with -x device_state=drop."
        )
