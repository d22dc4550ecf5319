"""`device_state` in partitions, as a team would have it: by the hash of its tenant, one of them in partitions itself."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from tests.databases.alembic_runs import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import Connection

# IOT_MODELS_TEST_PARTITIONED=1 runs what needs a migrated database on one whose table is partitioned.
ASKED_FOR = os.environ.get("IOT_MODELS_TEST_PARTITIONED") == "1"

_RAW_075 = (CHECKOUT / "tests" / "data" / "075.sql").read_text()
RAW_075_PARTITIONED = (
    re.sub(r"(PRIMARY KEY \(tenant_id, device_id\)\s*\))", r"\1 PARTITION BY HASH (tenant_id)", _RAW_075)
    + """
    CREATE TABLE device_state_p0 PARTITION OF device_state FOR VALUES WITH (MODULUS 3, REMAINDER 0);
    CREATE TABLE device_state_p1 PARTITION OF device_state FOR VALUES WITH (MODULUS 3, REMAINDER 1);
    CREATE TABLE device_state_p2 PARTITION OF device_state FOR VALUES WITH (MODULUS 3, REMAINDER 2)
      PARTITION BY HASH (device_id);
    CREATE TABLE device_state_p2a PARTITION OF device_state_p2 FOR VALUES WITH (MODULUS 2, REMAINDER 0);
    CREATE TABLE device_state_p2b PARTITION OF device_state_p2 FOR VALUES WITH (MODULUS 2, REMAINDER 1);
"""
)
LEAVES = ("device_state_p0", "device_state_p1", "device_state_p2a", "device_state_p2b")
# What has the rows of the table in the migrated database.
STORED = LEAVES if ASKED_FOR else ("device_state",)


def needs_one_piece(why: str) -> pytest.MarkDecorator:
    """A test of what PostgreSQL does not do with a partitioned table."""
    return pytest.mark.skipif(ASKED_FOR, reason=f"device_state is partitioned: {why}")


def of_the_whole(said: Iterable[str]) -> list[str]:
    """What is said of the table, without what is said again of each partition."""
    return [line for line in said if not re.search(r"\bdevice_state_p\d", line)]


def names_of_the_whole(connection: Connection, plan: str) -> str:
    """A plan in which each partition, and each index of one, has the name of the table, or of its index."""
    found = text("SELECT relname, CAST(pg_partition_root(oid) AS text) AS whole FROM pg_class WHERE relispartition")
    names = {row.relname: row.whole for row in connection.execute(found)}
    return re.sub(r"\w+", lambda name: names.get(name[0], name[0]), plan)
