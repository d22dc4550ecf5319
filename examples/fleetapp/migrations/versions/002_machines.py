"""Machines. Each has its row in device_state, which iot_models migrates: run its history first.

Revision ID: 002
Revises: 001
"""

import sqlalchemy as sa
from alembic import op

revision = "002"
down_revision = "001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "machine",
        sa.Column("id", sa.Integer, sa.Identity(), nullable=False),
        sa.Column("plant_id", sa.Integer, nullable=False),
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("device_id", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_machine"),
        sa.UniqueConstraint("tenant_id", "device_id", name="uq_machine_tenant_id"),
        sa.ForeignKeyConstraint(["plant_id"], ["plant.id"], name="fk_machine_plant_id_plant"),
        sa.ForeignKeyConstraint(
            ["tenant_id", "device_id"],
            ["device_state.tenant_id", "device_state.device_id"],
            name="fk_machine_tenant_id_device_state",
        ),
    )


def downgrade() -> None:
    op.drop_table("machine")
