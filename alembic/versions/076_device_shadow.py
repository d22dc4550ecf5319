"""Device shadow: desired and reported state, their versions, and the index of pending devices.

Revision ID: 076
Revises: 075
"""

from alembic import op

revision = "076"
down_revision = "075"
branch_labels = None
depends_on = None

COMMENTS = {
    "desired_state": "Operator intent. What the device should be configured as.",
    "reported_state": "Device-reported actual state. Set by device via MQTT or HTTP.",
    "desired_version": "Monotonically increasing. Increments on every desired_state write.",
    "reported_version": "The desired_version the device last acknowledged.",
    "shadow_updated_at": "Timestamp of the most recent desired_state update.",
}


def upgrade() -> None:
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
    # Devices that have not acknowledged the newest desired version: a tenant's backlog, without reading the rest.
    op.execute("""
        CREATE INDEX IF NOT EXISTS idx_device_state_shadow_pending
          ON device_state (tenant_id)
          WHERE desired_version > reported_version
    """)


def downgrade() -> None:
    op.execute("DROP INDEX IF EXISTS idx_device_state_shadow_pending")
    op.execute("""
        ALTER TABLE device_state
          DROP COLUMN IF EXISTS desired_state,
          DROP COLUMN IF EXISTS reported_state,
          DROP COLUMN IF EXISTS desired_version,
          DROP COLUMN IF EXISTS reported_version,
          DROP COLUMN IF EXISTS shadow_updated_at
    """)
