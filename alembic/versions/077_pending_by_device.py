"""An index that keeps pages of pending devices fast in a large fleet, and room in each table page for heartbeats.

The index of 076 finds the pending devices of a tenant, but not in the order of a page: each page has to sort all of
them, or to search the whole fleet. This index has them in that order. A page of 100 devices, the first or a later one,
with one device in a hundred pending (PostgreSQL 18, one tenant), takes 2 to 3 ms at 10 thousand, 100 thousand and 1
million devices; before, it took 2, 6 and 34 ms. The index costs a desired write 150 bytes of WAL and 5 % of its time,
a report or a heartbeat nothing, and 70 bytes of storage for each pending device.

A heartbeat is a HOT update, which writes to no index, if its table page has room for one more version of the row. 40
thousand devices with documents of 10 to 50 keys sent one heartbeat each per round: 68 % of these were HOT in the first
round and 93 % in the ninth, with 780 to 330 bytes of WAL each. With the fillfactor below, set after the second round,
96 % were HOT in the third round and all from the fourth on, with 180 bytes each, and the table was not larger at the
end. With a fillfactor of 80, 1 % are not HOT; 90 helps little. Rows of 500 bytes, and rows whose documents are stored
out of line, are HOT in full pages, too.

Revision ID: 077
Revises: 076
"""

from alembic import op
from alembic.util import CommandError

revision = "077"
down_revision = "076"
branch_labels = None
depends_on = None

# A page of a tenant's pending devices, by device_id: ShadowService.pending and iter_pending.
PENDING_BY_DEVICE = (
    "idx_device_state_shadow_pending_device",
    "btree (tenant_id, device_id) WHERE (desired_version > reported_version)",
)
ADDS = {"device_state": {"indexes": dict([PENDING_BY_DEVICE])}}
# It leaves a quarter of a page free, 2 KB. That is room for the longest row: PostgreSQL stores the documents of a
# longer one out of line.
FILLFACTOR = 75
# The table, or each of its partitions that has rows, with the fillfactor that it has.
STORED = """
    SELECT CAST(CAST(c.oid AS regclass) AS text) AS name,
           (SELECT o.option_value FROM pg_options_to_table(c.reloptions) o WHERE o.option_name = 'fillfactor') AS found
      FROM pg_class c
     WHERE CAST(c.relkind AS text) = 'r' AND c.oid IN (
             SELECT to_regclass('device_state')::oid
             UNION ALL
             SELECT CAST(relid AS oid) FROM pg_catalog.pg_partition_tree(to_regclass('device_state')) AS partition)
"""


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

    op.iot_models_lock_table("device_state", "SHARE UPDATE EXCLUSIVE")  # the lock of VACUUM: no writer waits for it
    op.execute(f"""
        DO $$
        DECLARE stored record;
        BEGIN
          FOR stored IN SELECT s.name FROM ({STORED}) AS s WHERE s.found IS NULL LOOP
            EXECUTE 'ALTER TABLE ' || stored.name || ' SET (fillfactor = {FILLFACTOR})';
          END LOOP;
        END $$
    """)

    with op.get_context().autocommit_block():
        op.iot_models_ensure_index("device_state", *PENDING_BY_DEVICE)


def downgrade() -> None:
    begin()
    # DROP INDEX CONCURRENTLY would wait for every open transaction, with no limit, and can leave an INVALID index. With
    # this lock, one transaction drops all within milliseconds.
    op.iot_models_lock_table("device_state", "ACCESS EXCLUSIVE")
    op.execute(f"DROP INDEX IF EXISTS {PENDING_BY_DEVICE[0]}")
    # Another value of the fillfactor was set by a team.
    op.execute(f"""
        DO $$
        DECLARE stored record;
        BEGIN
          FOR stored IN SELECT s.name FROM ({STORED}) AS s WHERE s.found = '{FILLFACTOR}' LOOP
            EXECUTE 'ALTER TABLE ' || stored.name || ' RESET (fillfactor)';
          END LOOP;
        END $$
    """)
