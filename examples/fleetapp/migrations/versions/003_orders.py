"""Orders of a machine.

Revision ID: 003
Revises: 002
"""

import sqlalchemy as sa
from alembic import op

revision = "003"
down_revision = "002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "machine_order",
        sa.Column("id", sa.Integer, sa.Identity(), nullable=False),
        sa.Column("machine_id", sa.Integer, nullable=False),
        sa.Column("product", sa.Text, nullable=False),
        sa.Column("quantity", sa.Integer, nullable=False),
        sa.Column("desired_version", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_machine_order"),
        sa.ForeignKeyConstraint(["machine_id"], ["machine.id"], name="fk_machine_order_machine_id_machine"),
    )
    op.create_index("ix_machine_order_machine_id", "machine_order", ["machine_id"])


def downgrade() -> None:
    op.drop_table("machine_order")
