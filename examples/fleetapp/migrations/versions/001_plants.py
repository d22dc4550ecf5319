"""Plants, from before there were machines with shadows.

Revision ID: 001
Revises:
"""

import sqlalchemy as sa
from alembic import op

revision = "001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "plant",
        sa.Column("id", sa.Integer, sa.Identity(), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_plant"),
        sa.UniqueConstraint("name", name="uq_plant_name"),
    )


def downgrade() -> None:
    op.drop_table("plant")
