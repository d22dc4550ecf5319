"""The deployment that revision 076 was written for: `device_state` without a shadow.

Revision ID: 075
Revises:
"""

from alembic import op

revision = "075"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
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
    # All devices of a site.
    op.execute("CREATE INDEX idx_device_state_site ON device_state (tenant_id, site_id)")
    # A tenant's devices by liveness.
    op.execute("CREATE INDEX idx_device_state_status ON device_state (tenant_id, status)")


def downgrade() -> None:
    op.execute("DROP TABLE device_state")
