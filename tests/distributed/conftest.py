"""Two schemas of the database that IOT_MODELS_TEST_DISTRIBUTED_URL names, a coordinator: one distributed, one plain.

`make test-distributed` runs these tests; a run without the variable does not collect them. Both schemas are dropped at
the end, whatever happened.
"""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import create_engine, make_url, text

from iot_models import migrate
from iot_models.engine import normalize_url

if TYPE_CHECKING:
    from collections.abc import Iterator

VARIABLE = "IOT_MODELS_TEST_DISTRIBUTED_URL"
collect_ignore_glob = [] if os.environ.get(VARIABLE) else ["test_*.py"]


@pytest.fixture(scope="session")
def coordinator() -> str:
    """The URL that the variable names."""
    return normalize_url(os.environ[VARIABLE]).set(drivername="postgresql").render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def plain_url(coordinator: str) -> Iterator[str]:
    """A migrated schema on the coordinator alone."""
    yield from _schema(coordinator)


@pytest.fixture(scope="session")
def distributed_url(coordinator: str) -> Iterator[str]:
    """A migrated schema whose tables are distributed by tenant_id, and colocated."""
    yield from _schema(
        coordinator,
        "SELECT create_distributed_table('device_state', 'tenant_id')",
        "SELECT create_distributed_table('device_shadow_history', 'tenant_id', colocate_with => 'device_state')",
    )


def _schema(coordinator: str, *statements: str) -> Iterator[str]:
    schema = f"iot_models_test_{secrets.token_hex(4)}"
    url = make_url(coordinator).update_query_dict({"options": f"-csearch_path={schema}"})
    engine = create_engine(url.set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE SCHEMA {schema}"))
        try:
            migrate.upgrade(url.render_as_string(hide_password=False))
            for statement in statements:
                connection.execute(text(statement))
            yield url.render_as_string(hide_password=False)
        finally:
            connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))
    engine.dispose()
