"""The deployments that teams made by raw SQL, and what a database holds after a migration."""

from __future__ import annotations

import re
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Connection, Engine, NullPool, create_engine, event, make_url, text

from iot_models import migrate
from tests.databases import partitioned
from tests.databases.alembic_runs import CHECKOUT
from tests.databases.client_tools import client_tool
from tests.databases.schema_dump import dump

if TYPE_CHECKING:
    from collections.abc import Iterator

DATA = CHECKOUT / "tests" / "data"
# The table as a team made it by hand before there were shadows.
PLAIN_075 = (DATA / "075.sql").read_text()
# The same, in partitions where the run asks for that.
RAW_075 = partitioned.RAW_075_PARTITIONED if partitioned.ASKED_FOR else PLAIN_075
# The shadow as a team added it by hand, with the SELECT that verifies it.
(ADD_SHADOW,) = re.findall(r"```sql\n(.*?)```", (DATA / "seed_076_device_shadow.md").read_text(), re.DOTALL)
RAW_076 = RAW_075 + ADD_SHADOW

# Ten devices of two tenants, as they are at 075: heartbeats and telemetry. The same rows in every database.
FLEET = """
    INSERT INTO device_state (tenant_id, site_id, device_id, status, last_seen_at, last_state_change_at, state)
    SELECT CASE WHEN n % 2 = 0 THEN 'acme' ELSE 'globex' END, 's' || n / 5, 'd' || n, 'ONLINE',
           timestamptz '2026-01-02 03:04:05.678901+00' + n * interval '1 ms', '2026-01-01 00:00:00.000001+00',
           jsonb_build_object('t', n / 7.0)
      FROM generate_series(1, 10) n;
"""
# Shadows of four of them. Numbers longer than a float, a time to the microsecond, a key that needs quoting, a JSON null.
SHADOWS = """
    UPDATE device_state SET desired_state = '{"lat": 52.12345678901234567890, "huge": 1e400, "a\\"b": null, "neat": 21.50}',
           reported_state = '{"x": [1.10, {"y": 1e-330}]}', desired_version = 7, reported_version = 5,
           shadow_updated_at = '2026-02-03 04:05:06.123456+00' WHERE device_id IN ('d1', 'd2', 'd3');
    UPDATE device_state SET reported_state = '{"only": "reported"}' WHERE device_id = 'd4';
"""
# A version of one of them, and its refusal: at head.
VERSIONS = """
    INSERT INTO device_shadow_history (tenant_id, device_id, desired_version, desired_state, written_at, actor)
    SELECT tenant_id, device_id, desired_version, desired_state, shadow_updated_at, 'anna' FROM device_state WHERE device_id = 'd1';
    UPDATE device_state SET refused_version = 7, refusal = 'no', refused_at = '2026-02-04 00:00:00+00' WHERE device_id = 'd1';
"""
SHADOW_COLUMNS = "desired_state, reported_state, desired_version, reported_version, shadow_updated_at"
# Where a downgrade below 076 parks them.
PARKED = "device_state_shadow_076"

# What deployers wait for each other on.
ADVISORY_LOCK = 0x696F745F6D6F6465


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


def psql(url: str, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script as a database administrator would."""
    target = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    command = [client_tool("psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", target]
    return subprocess.run(command, input=script, check=False, capture_output=True, text=True, timeout=60)


def as_role(url: str, role: str) -> str:
    """The URL of the same database for a role whose password is its name."""
    return make_url(url).set(username=role, password=role).render_as_string(hide_password=False)


def rows_of(url: str, table: str = "device_state", columns: str = "*") -> list[str]:
    """Every row as PostgreSQL writes it, exact to the last digit."""
    with create_engine(url, poolclass=NullPool).connect() as connection:
        return _rows(connection, table, columns)


def _rows(connection: Connection, table: str, columns: str = "*") -> list[str]:
    return list(connection.scalars(text(f"SELECT t::text FROM (SELECT {columns} FROM {table}) t ORDER BY 1")))


def revision_of(url: str) -> str:
    """The revision at which Alembic says that the database stands."""
    (row,) = run_sql(url, "SELECT version_num FROM alembic_version_iot_models")
    return str(row[0])


def tables_of(url: str) -> set[str]:
    """The tables of a team, without the partitions of one."""
    with create_engine(url, poolclass=NullPool).connect() as connection:
        return _tables(connection)


def _tables(connection: Connection) -> set[str]:
    found = text("""
        SELECT relname FROM pg_class
         WHERE relnamespace = CAST(to_regnamespace('public') AS oid) AND relkind IN ('r', 'p') AND NOT relispartition
    """)
    return {*connection.scalars(found)}


def state(url: str) -> tuple[str, dict[str, list[str]]]:
    """All that a migration can change: the schema, and the rows of each table, Alembic's included."""
    with create_engine(url, poolclass=NullPool).connect() as connection:
        rows = {table: _rows(connection, table) for table in sorted(_tables(connection))}
    return dump(url), rows


@contextmanager
def cut_off_before_the_columns_go(engine: Engine | type[Engine]) -> Iterator[None]:
    """Cut the downgrade below 076 in the block off when the shadows are parked and the columns are still there."""

    def cut(_c: object, _cursor: object, statement: str, *_rest: object) -> None:
        if "DROP COLUMN IF EXISTS desired_state" in statement:
            raise KeyboardInterrupt

    event.listen(engine, "before_cursor_execute", cut)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        event.remove(engine, "before_cursor_execute", cut)


def interrupt_a_downgrade(engine: Engine) -> None:
    with cut_off_before_the_columns_go(engine):
        migrate.downgrade(engine, "075")
