"""${message}

Revision ID: ${up_revision}
Revises: ${down_revision | comma,n}
Create Date: ${create_date}
"""

from alembic import op
from alembic.util import CommandError
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}

# What this revision adds to which table, as PostgreSQL prints it: {name: (type, whether NOT NULL, default)} for columns,
# {name: definition from USING on} for indexes. The first revision that an upgrade runs compares it with the database.
ADDS = {"device_state": {"columns": {}, "indexes": {}}}

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
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    begin()
    ${downgrades if downgrades else "pass"}
