"""The deployments that teams made by raw SQL, and ways to look at them."""

from __future__ import annotations

import re
from typing import Any

from alembic_runs import CHECKOUT
from sqlalchemy import NullPool, create_engine, text

DATA = CHECKOUT / "tests" / "data"
RAW_075 = (DATA / "075.sql").read_text()
SHADOW_COLUMNS = "desired_state, reported_state, desired_version, reported_version, shadow_updated_at"


def seed_sql() -> str:
    """The SQL of the document that 076 comes from, its verifying SELECT included."""
    (block,) = re.findall(r"```sql\n(.*?)```", (DATA / "seed_076_device_shadow.md").read_text(), re.DOTALL)
    assert isinstance(block, str)
    return block


RAW_076 = RAW_075 + seed_sql()


def run_sql(url: str, *scripts: str) -> list[tuple[Any, ...]]:
    """Run scripts as psql would, in one transaction, and return the rows of the last statement."""
    engine = create_engine(url, poolclass=NullPool)
    rows: list[tuple[Any, ...]] = []
    with engine.begin() as connection:
        cursor = connection.connection.cursor()
        for script in scripts:
            cursor.execute(script.encode())
            while cursor.nextset():
                pass
        if cursor.description:
            rows = list(cursor.fetchall())
    return rows


def rows_of(url: str, table: str = "device_state", columns: str = "*") -> list[str]:
    """Every row as PostgreSQL writes it, exact to the last digit."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        return list(connection.scalars(text(f"SELECT t::text FROM (SELECT {columns} FROM {table}) t ORDER BY 1")))


def tables_of(url: str) -> set[str]:
    return {row[0] for row in run_sql(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")}


def fleet_sql(devices: int = 10) -> str:
    """Rows of 075: heartbeats and telemetry as devices send them."""
    return f"""
        INSERT INTO device_state (tenant_id, site_id, device_id, status, last_seen_at, state)
        SELECT CASE WHEN n % 2 = 0 THEN 'acme' ELSE 'globex' END, 's' || n / 5, 'd' || n, 'ONLINE',
               timestamptz '2026-01-02 03:04:05.678901+00' + n * interval '1 ms', jsonb_build_object('t', n / 7.0)
          FROM generate_series(1, {devices}) n;
    """


# Numbers longer than a float, a time to the microsecond, a key that needs quoting, a JSON null.
SHADOWS = """
    UPDATE device_state SET desired_state = '{"lat": 52.12345678901234567890, "huge": 1e400, "a\\"b": null, "neat": 21.50}',
           reported_state = '{"x": [1.10, {"y": 1e-330}]}', desired_version = 7, reported_version = 5,
           shadow_updated_at = '2026-02-03 04:05:06.123456+00' WHERE device_id IN ('d1', 'd2', 'd3');
    UPDATE device_state SET reported_state = '{"only": "reported"}' WHERE device_id = 'd4';
"""
