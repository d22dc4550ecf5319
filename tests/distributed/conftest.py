"""A real Citus cluster, which no package has: IOT_MODELS_TEST_DISTRIBUTED_URL names its coordinator and a database there.

The database has the extension and knows two workers at least, and the role is a superuser. `make test-distributed` runs
these tests; a run without the variable does not collect them. Whatever they make is in schemas of their own in that
database, which are dropped at the end, whatever happened.
"""

from __future__ import annotations

import os
import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import URL, NullPool, create_engine, make_url, text

from iot_models import migrate
from iot_models.engine import normalize_url
from tests.migrations.raw_sql import FLEET, PLAIN_075, run_sql

if TYPE_CHECKING:
    from collections.abc import Iterator

VARIABLE = "IOT_MODELS_TEST_DISTRIBUTED_URL"
collect_ignore_glob = [] if os.environ.get(VARIABLE) else ["test_*.py"]


def execute(url: URL | str, *statements: str) -> list[tuple[object, ...]]:
    """Run each statement in a transaction of its own; the rows of the last one."""
    rows: list[tuple[object, ...]] = []
    engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            result = connection.execute(text(statement.replace(":", "\\:")))
            rows = [tuple(row) for row in result] if result.returns_rows else []
    return rows


@contextmanager
def new_schema(coordinator: URL) -> Iterator[str]:
    """An empty schema, which goes at the end; gives its URL."""
    name = f"iot_models_test_{secrets.token_hex(4)}"
    execute(coordinator, f"CREATE SCHEMA {name}")
    try:
        yield coordinator.update_query_dict({"options": f"-csearch_path={name}"}).render_as_string(hide_password=False)
    finally:
        execute(coordinator, f"DROP SCHEMA {name} CASCADE")


@pytest.fixture(scope="session")
def coordinator() -> URL:
    """The coordinator of the cluster."""
    return normalize_url(os.environ[VARIABLE])


@pytest.fixture(scope="session")
def plain_url(coordinator: URL) -> Iterator[str]:
    """A migrated schema on the coordinator alone."""
    with new_schema(coordinator) as url:
        migrate.upgrade(url)
        yield url


@pytest.fixture(scope="session")
def distributed_url(coordinator: URL) -> Iterator[str]:
    """A migrated schema whose tables are distributed by tenant_id, and colocated."""
    with new_schema(coordinator) as url:
        migrate.upgrade(url)
        execute(
            url,
            "SELECT create_distributed_table('device_state', 'tenant_id')",
            "SELECT create_distributed_table('device_shadow_history', 'tenant_id', colocate_with => 'device_state')",
        )
        yield url


@pytest.fixture
def schema(coordinator: URL) -> Iterator[str]:
    """An empty schema of this test alone; returns its URL."""
    with new_schema(coordinator) as url:
        yield url


@pytest.fixture
def fleet(schema: str) -> str:
    """A deployment before shadows, made by raw SQL and distributed, with ten devices."""
    run_sql(schema, PLAIN_075)
    execute(schema, "SELECT create_distributed_table('device_state', 'tenant_id', shard_count => 4)", FLEET)
    return schema


@pytest.fixture
def worker(fleet: str) -> str:
    """The same database and schema through a worker."""
    query = "SELECT nodename, nodeport FROM pg_dist_node WHERE groupid > 0 ORDER BY 2 LIMIT 1"
    ((host, port),) = execute(fleet, query)
    return make_url(fleet).set(host=str(host), port=int(str(port))).render_as_string(hide_password=False)
