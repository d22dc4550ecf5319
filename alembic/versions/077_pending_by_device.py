"""Pages of pending devices that cost the same whatever the fleet and its backlog, and room for heartbeats.

The index of 076 finds a tenant's backlog; for each page that has then to be sorted, or searched for along the whole
fleet. Here it stands sorted. A page of 100 devices, the first one or a later one, where one device in a hundred is
pending (PostgreSQL 18, one tenant): 2 to 3 ms at 10 thousand, 100 thousand and 1 million devices, where it was 2, 6 and
34 ms. The price is 150 bytes of WAL and 5 % of the time for a desired write, nothing for a report or a heartbeat, and
70 bytes for each pending device.

A heartbeat is a HOT update, which touches no index, where its page has room for one more version of the row. Of 40
thousand devices with documents of 10 to 50 keys, each heard in turn, 68 % had it in the first round and 93 % in the
ninth, at 780 to 330 bytes of WAL each. With the fillfactor below, set after the second round: 96 % in the third, all
from the fourth on, at 180 bytes, and the table was no larger in the end. 80 keeps 1 % of them from it, 90 gains little;
rows of 500 bytes, and rows whose documents are out of line, are HOT in full pages too.

Revision ID: 077
Revises: 076
"""

from alembic import op

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
# A quarter of a page is 2 KB, and so is the longest row that PostgreSQL keeps in a page before it moves documents out.
FILLFACTOR = 75
FOUND = """
    SELECT FROM pg_class c, pg_options_to_table(c.reloptions) o
     WHERE c.oid = to_regclass('device_state') AND o.option_name = 'fillfactor'
"""


def upgrade() -> None:
    op.expect_table("device_state", added_since=revision)

    op.lock_table("device_state", "SHARE UPDATE EXCLUSIVE")  # VACUUM's: no writer waits
    op.execute(f"""
        DO $$ BEGIN
          IF NOT EXISTS ({FOUND}) THEN
            ALTER TABLE device_state SET (fillfactor = {FILLFACTOR});
          END IF;
        END $$
    """)

    with op.get_context().autocommit_block():
        op.ensure_index("device_state", *PENDING_BY_DEVICE)


def downgrade() -> None:
    # DROP INDEX CONCURRENTLY would wait for every open transaction, without an end, and may leave an INVALID index.
    # Once this lock is had, all goes in one transaction, within milliseconds.
    op.lock_table("device_state", "ACCESS EXCLUSIVE")
    op.execute(f"DROP INDEX IF EXISTS {PENDING_BY_DEVICE[0]}")
    # Another fillfactor than ours is a team's own.
    op.execute(f"""
        DO $$ BEGIN
          IF EXISTS ({FOUND} AND o.option_value = '{FILLFACTOR}') THEN
            ALTER TABLE device_state RESET (fillfactor);
          END IF;
        END $$
    """)
