"""${message}

Revision ID: ${up_revision}
Revises: ${down_revision | comma,n}
Create Date: ${create_date}
"""

from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}

# What this revision adds to which table, as PostgreSQL prints it: {name: (type, whether NOT NULL, default)} for columns,
# {name: definition from USING on} for indexes. The first revision that an upgrade runs compares it with the database.
ADDS = {"device_state": {"columns": {}, "indexes": {}}}


def upgrade() -> None:
    op.iot_models_expect_table("device_state", added_since=revision)
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
