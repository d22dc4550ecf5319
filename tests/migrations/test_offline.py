"""`--sql`: psql runs what it prints, with the same result as the online migration."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from tests.databases import partitioned
from tests.databases.alembic_runs import downgrade, upgrade
from tests.databases.backends import await_lock_waits, connected
from tests.databases.schema_dump import dump
from tests.migrations import raw_sql
from tests.migrations.commands import alembic
from tests.migrations.raw_sql import FLEET, PARKED, RAW_075, SHADOWS, VERSIONS, rows_of, run_sql, state, tables_of

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

pytestmark = pytest.mark.repeats


def psql(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Print the SQL of `alembic ARGUMENTS --sql`, and run it as a database administrator would."""
    printed = alembic(*arguments, "--sql")
    assert printed.code == 0, printed.err
    return raw_sql.psql(url, printed.out)


@pytest.fixture
def two(make_empty: Callable[[], str]) -> tuple[str, str]:
    """Two databases at 075 with the same ten devices: one to migrate online, the other by psql."""
    urls = make_empty(), make_empty()
    for url in urls:
        run_sql(url, RAW_075 + FLEET)
        upgrade(url, "075")
    return urls


@partitioned.needs_one_piece("printed SQL refuses it")
def test_the_printed_sql_ends_in_the_same_result_both_ways_shadows_included(two: tuple[str, str]) -> None:
    online, offline = two
    upgrade(online)
    run = psql(offline, "upgrade", "075:head")
    assert run.returncode == 0, run.stderr
    assert state(offline) == state(online)

    for url in two:
        run_sql(url, SHADOWS)
    downgrade(online, "075")
    run = psql(offline, "downgrade", "head:075")
    assert run.returncode == 0, run.stderr
    assert len(rows_of(offline, PARKED)) == 4
    assert state(offline) == state(online)

    upgrade(online)
    run = psql(offline, "upgrade", "075:head")
    assert run.returncode == 0, run.stderr
    assert state(offline) == state(online)
    assert PARKED not in tables_of(offline)


@partitioned.needs_one_piece("printed SQL refuses it")
def test_without_shadows_the_printed_sql_leaves_no_parked_table(two: tuple[str, str]) -> None:
    before = state(two[1])
    psql(two[1], "upgrade", "075:head")

    assert psql(two[1], "downgrade", "head:075").returncode == 0
    assert state(two[1]) == before


@partitioned.needs_one_piece("printed SQL refuses it")
def test_a_parked_shadow_whose_device_replication_removed_stays_and_is_counted(two: tuple[str, str]) -> None:
    url = two[1]
    upgrade(url)
    run_sql(url, SHADOWS)
    assert psql(url, "downgrade", "head:075").returncode == 0
    run_sql(url, "SET session_replication_role = replica; DELETE FROM device_state WHERE device_id = 'd2'")

    run = psql(url, "upgrade", "075:head")

    assert run.returncode == 0
    assert "WARNING:  1 parked shadows stay in device_state_shadow_076" in run.stderr
    assert [row.split(",")[1] for row in rows_of(url, PARKED)] == ["d2"]


@pytest.mark.parametrize(
    ("revision", "name"),
    [("075:076", "idx_device_state_shadow_pending"), ("076:077", "idx_device_state_shadow_pending_device")],
)
@partitioned.needs_one_piece("printed SQL refuses it")
def test_an_invalid_index_that_a_cancelled_build_left_is_replaced(
    two: tuple[str, str], revision: str, name: str
) -> None:
    url = two[1]
    before, after = revision.split(":")
    upgrade(url, after)
    expected = dump(url)
    index = f"indexrelid = '{name}'::regclass"
    run_sql(
        url,
        f"UPDATE pg_index SET indisvalid = false WHERE {index}; UPDATE alembic_version_iot_models SET version_num = '{before}'",
    )

    assert psql(url, "upgrade", revision).returncode == 0
    assert run_sql(url, f"SELECT indisvalid FROM pg_index WHERE {index}") == [(True,)]
    assert dump(url) == expected


@partitioned.needs_one_piece("printed SQL refuses it")
def test_revision_077_alone_is_applied_and_reverted_without_moving_shadows(two: tuple[str, str]) -> None:
    url = two[1]
    upgrade(url, "076")
    run_sql(url, SHADOWS)
    before = state(url)

    assert psql(url, "upgrade", "076:077").returncode == 0
    after = state(url)
    assert psql(url, "downgrade", "077:076").returncode == 0
    assert state(url) == before
    upgrade(url, "077")
    assert state(url) == after


def test_the_printed_sql_discards_and_drops_only_with_the_options(two: tuple[str, str]) -> None:
    url = two[1]
    before = state(url)
    upgrade(url)
    run_sql(url, SHADOWS)

    assert psql(url, "-x", "shadow=discard", "downgrade", "head:075").returncode == 0
    assert state(url) == before

    run = psql(url, "downgrade", "075:base")
    assert run.returncode != 0
    assert "device_state holds rows: print this SQL with -x device_state=drop" in run.stderr
    assert state(url) == before

    assert psql(url, "-x", "device_state=drop", "downgrade", "075:base").returncode == 0
    assert "device_state" not in tables_of(url)


def test_the_printed_sql_migrates_an_empty_database_to_head(empty: str, plain_migrated_url: str) -> None:
    assert psql(empty, "upgrade", "head").returncode == 0
    assert dump(empty) == dump(plain_migrated_url)


def test_the_printed_sql_sets_the_lock_timeout() -> None:
    assert alembic("upgrade", "075:076", "--sql").out.startswith("SET lock_timeout = '4s';")
    printed = alembic("-x", "lock_timeout=500ms", "upgrade", "075:076", "--sql").out
    assert printed.startswith("SET lock_timeout = '500ms';")


def test_the_printed_sql_waits_no_longer_after_an_index_either(empty: str) -> None:
    printed = alembic("-x", "lock_timeout=700ms", "upgrade", "head", "--sql").out
    done = raw_sql.psql(empty, printed + "SHOW lock_timeout;")
    assert "700ms" in done.stdout, done.stderr


def test_the_printed_sql_parks_no_shadow_if_row_level_security_hides_others(
    two: tuple[str, str], server_role: str
) -> None:
    url = two[1]
    upgrade(url)
    run_sql(url, SHADOWS, f"""
        ALTER TABLE device_state OWNER TO {server_role};
        ALTER TABLE device_shadow_history OWNER TO {server_role};
        ALTER TABLE alembic_version_iot_models OWNER TO {server_role};
        ALTER SCHEMA public OWNER TO {server_role};
        ALTER TABLE device_state ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
        CREATE POLICY one ON device_state USING (device_id = 'd1');
    """)  # fmt: skip
    before = rows_of(url)

    run = psql(raw_sql.as_role(url, server_role), "downgrade", "head:075")

    assert run.returncode != 0
    assert "query would be affected by row-level security policy" in run.stderr
    assert rows_of(url) == before


@pytest.mark.parametrize("held", ["d1", "d4"])  # whichever we would come to first
@pytest.mark.parametrize(("below", "parked"), [("075:076", PARKED), ("078:079", "device_state_refusals_079")])
@partitioned.needs_one_piece("printed SQL refuses it")
def test_who_writes_several_devices_while_the_printed_sql_puts_shadows_back_comes_first(
    shadow_fleet_at_head: str, below: str, parked: str, held: str
) -> None:
    """They lock rows in another order than we do, and the parked table is dropped with its foreign key."""
    url = shadow_fleet_at_head
    run_sql(url, VERSIONS)
    downgrade(url, below.partition(":")[0])
    until_built, begin, put_back = alembic("upgrade", below, "--sql").out.rpartition("BEGIN;")
    done = raw_sql.psql(url, until_built)
    assert done.returncode == 0, done.stderr
    assert parked in tables_of(url)
    with ThreadPoolExecutor(1) as pool, connected(url) as writer:
        written = text("UPDATE device_state SET site_id = 's9' WHERE device_id = :device")
        writer.execute(written, {"device": held})
        putting_back = pool.submit(raw_sql.psql, url, begin + put_back)
        await_lock_waits(writer.engine, 1)
        for device in ("d1", "d2", "d3", "d4"):
            writer.execute(written, {"device": device})
        writer.commit()
        done = putting_back.result(timeout=60)
    assert done.returncode == 0, done.stderr
    assert parked not in tables_of(url)
