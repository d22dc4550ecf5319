"""The database that tests are given one after another: empty each time, and a new one where more than rows was left."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import NullPool, create_engine, text

from tests.databases import partitioned
from tests.databases.reuse import ReusedDatabase

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iot_models.testing import PostgresServer

pytestmark = pytest.mark.repeats

DEVICE = "INSERT INTO device_state (tenant_id, site_id, device_id) VALUES ('acme', 'berlin', 't-1')"


@pytest.fixture(scope="module")
def reused(server: PostgresServer, migrated_url: str) -> Iterator[ReusedDatabase]:
    with ReusedDatabase(server, migrated_url) as reused:
        yield reused


def devices(url: str) -> int:
    with create_engine(url, poolclass=NullPool).connect() as connection:
        count: int = connection.execute(text("SELECT count(*) FROM device_state")).scalar_one()
        return count


def test_rows_and_open_transactions_are_gone_and_the_database_is_the_same(reused: ReusedDatabase) -> None:
    with reused.clean() as url:
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.execute(text(DEVICE))
        holder = engine.connect()
        holder.execute(text("SELECT FROM device_state FOR UPDATE"))
    with reused.clean() as again:
        assert again == url
        assert devices(again) == 0
    holder.invalidate()
    engine.dispose()


@pytest.mark.parametrize(
    "left_behind",
    [
        "CREATE TABLE kept ()",
        "CREATE FUNCTION kept() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "CREATE SCHEMA kept",
        "ALTER TABLE device_state ENABLE ROW LEVEL SECURITY",
        f"ALTER TABLE {partitioned.STORED[0]} SET (autovacuum_enabled = off)",
        "ALTER TABLE device_state ADD CHECK (site_id <> '')",
        "DROP INDEX idx_device_state_shadow_pending",
        "DROP TABLE device_state",
        f"{DEVICE}; ANALYZE device_state",
        "UPDATE alembic_version_iot_models SET version_num = '075'",
    ],
)
def test_what_is_left_behind_besides_rows_makes_the_next_database_a_new_one(
    reused: ReusedDatabase, left_behind: str
) -> None:
    with reused.clean() as url, create_engine(url, poolclass=NullPool).begin() as connection:
        for statement in left_behind.split("; "):
            connection.execute(text(statement))
    with reused.clean() as other:
        assert other != url
        assert devices(other) == 0
