"""Migrations while writers go on: short locks, a concurrent index build, two deployers, and interruptions."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from alembic import command
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, event, text

from iot_models._migrations import deployers, indexes, operations
from iot_models.testing import throwaway
from tests.databases import partitioned
from tests.databases.alembic_runs import CHECKOUT, config, downgrade, run_alembic, upgrade
from tests.databases.backends import connected
from tests.databases.schema_dump import dump
from tests.migrations.raw_sql import (
    ADD_SHADOW,
    ADVISORY_LOCK,
    FLEET,
    PARKED,
    RAW_075,
    SHADOW_COLUMNS,
    SHADOWS,
    VERSIONS,
    as_role,
    revision_of,
    rows_of,
    run_sql,
    state,
    tables_of,
)
from tests.migrations.revisions import HEAD, REVISIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PENDING = (
    "device_state",
    "idx_device_state_shadow_pending",
    "btree (tenant_id) WHERE (desired_version > reported_version)",
)
HEARTBEAT = "UPDATE device_state SET last_heartbeat_at = clock_timestamp() WHERE device_id = 'd1'"


@pytest.fixture
def url(raw_fleet: str) -> str:
    """A raw deployment of ten devices."""
    return raw_fleet


@pytest.mark.repeats
@pytest.mark.parametrize(("start", "end"), [("075", "head"), ("head", "075"), ("076", "075")])
def test_a_lock_that_is_not_acquired_in_time_is_an_error_and_changes_nothing_while_writers_go_on(
    url: str, start: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "_FIRST_PAUSE", 0.01)
    migrate = command.upgrade if end == "head" else command.downgrade
    upgrade(url, start)
    before, rows = dump(url), rows_of(url)
    impatient = config(url)
    impatient.cmd_opts.x.append("lock_timeout=100ms")  # type: ignore[union-attr]

    with ThreadPoolExecutor(1) as pool, connected(url) as holder:
        holder.execute(text("SELECT * FROM device_state"))  # a long report
        pid = holder.scalar(text("SELECT pg_backend_pid()"))
        migrating = pool.submit(migrate, impatient, end)
        time.sleep(0.05)
        run_sql(url, HEARTBEAT)  # succeeds while the report is still open
        with pytest.raises(CommandError) as caught:
            migrating.result(timeout=30)

    said = str(caught.value)
    assert "no lock on device_state after 5 tries of 100ms" in said
    assert f"pid {pid}" in said
    assert "-x lock_timeout=" in said
    if start != "076":  # its downgrade may have created the parked table by then
        assert dump(url) == before
    assert [row.split(",")[:4] for row in rows_of(url)] == [row.split(",")[:4] for row in rows]

    migrate(config(url), end)
    assert revision_of(url) == (HEAD if end == "head" else end)


@pytest.mark.repeats
def test_a_lock_that_a_later_try_acquires_is_enough(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(operations, "_FIRST_PAUSE", 0.2)
    patient = config(url)
    patient.cmd_opts.x.append("lock_timeout=100ms")  # type: ignore[union-attr]

    with ThreadPoolExecutor(1) as pool, connected(url) as holder, caplog.at_level(logging.WARNING):
        holder.execute(text("SELECT * FROM device_state"))
        migrating = pool.submit(command.upgrade, patient, "head")
        wait_until(lambda: "try 1 of 5" in caplog.text)
        holder.rollback()
        migrating.result(timeout=30)

    assert revision_of(url) == HEAD


def test_another_error_than_the_lock_is_passed_on(url: str) -> None:
    with connected(url) as connection, connection.begin():
        connection.execute(text("SET LOCAL statement_timeout = '50ms'"))
        operations = Operations(MigrationContext.configure(connection))
        with connected(url) as holder:
            holder.execute(text("SELECT * FROM device_state"))
            with pytest.raises(Exception, match="statement timeout"):
                operations.iot_models_lock_table("device_state", "ACCESS EXCLUSIVE")  # type: ignore[attr-defined]


def test_a_lock_that_is_no_longer_held_is_reported_as_such(url: str) -> None:
    with connected(url) as connection:
        assert operations._lock_holders(connection, "device_state") == "no transaction any more"  # noqa: SLF001


@partitioned.needs_one_piece("each partition has a build of its own")
def test_the_index_build_waits_for_an_open_transaction_while_other_writers_go_on(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(indexes, "_PROGRESS_EVERY", 0.05)
    run_sql(url, ADD_SHADOW, "DROP INDEX idx_device_state_shadow_pending")

    def build() -> None:
        with connected(url, isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("SET lock_timeout = '50ms'"))  # would cancel the build if it applied to it
            operations = Operations(MigrationContext.configure(connection))
            operations.iot_models_ensure_index(*PENDING)  # type: ignore[attr-defined]
            assert connection.scalar(text("SHOW lock_timeout")) == "50ms"

    with ThreadPoolExecutor(1) as pool, connected(url) as writer, caplog.at_level(logging.INFO):
        writer.execute(text("UPDATE device_state SET status = 'STALE' WHERE device_id = 'd2'"))
        building = pool.submit(build)
        wait_until(lambda: "waiting for the transaction of pid" in caplog.text)
        run_sql(url, HEARTBEAT)
        assert not building.done()
        writer.commit()
        building.result(timeout=30)

    assert "idx_device_state_shadow_pending: " in caplog.text
    assert run_sql(
        url, "SELECT indisvalid FROM pg_index WHERE indexrelid = 'idx_device_state_shadow_pending'::regclass"
    ) == [(True,)]


@pytest.mark.parametrize(
    "holds", ["LOCK TABLE device_state IN SHARE ROW EXCLUSIVE MODE", "CREATE TABLE idx_device_state_shadow_pending ()"]
)
@partitioned.needs_one_piece("each partition has a build of its own")
def test_whom_an_index_build_waits_for_from_its_first_moment_on_is_named(
    url: str, holds: str, server_role: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(indexes, "_PROGRESS_EVERY", 0.05)
    run_sql(url, ADD_SHADOW, "DROP INDEX idx_device_state_shadow_pending",
            f"GRANT UPDATE ON device_state TO {server_role}; GRANT CREATE ON SCHEMA public TO {server_role}")  # fmt: skip

    def build() -> None:
        with connected(url, isolation_level="AUTOCOMMIT") as connection:
            operations = Operations(MigrationContext.configure(connection))
            operations.iot_models_ensure_index(*PENDING)  # type: ignore[attr-defined]

    with ThreadPoolExecutor(1) as pool, connected(as_role(url, server_role)) as holder, caplog.at_level(logging.INFO):
        holder.execute(text(holds))
        pid = holder.scalar(text("SELECT pg_backend_pid()"))
        building = pool.submit(build)
        wait_until(lambda: f"waiting for the transaction of pid {pid}, role {server_role}, " in caplog.text)
        holder.rollback()
        building.result(timeout=30)


@pytest.mark.parametrize(
    ("before", "name"), [("075", "idx_device_state_shadow_pending"), ("076", "idx_device_state_shadow_pending_device")]
)
@partitioned.needs_one_piece("each partition has a build of its own")
def test_an_invalid_index_is_built_again_and_a_valid_one_is_kept(
    url: str, before: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    upgrade(url)
    identity = f"SELECT indexrelid, indisvalid FROM pg_index WHERE indexrelid = '{name}'::regclass"
    run_sql(url, f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{name}'::regclass")
    ((invalid, _),) = run_sql(url, identity)
    run_sql(url, f"UPDATE alembic_version_iot_models SET version_num = '{before}'")

    upgrade(url)

    ((built, valid),) = run_sql(url, identity)
    assert valid
    assert built != invalid
    assert "is INVALID, left by an interrupted build" in caplog.text

    run_sql(url, f"UPDATE alembic_version_iot_models SET version_num = '{before}'")
    upgrade(url)
    assert run_sql(url, identity) == [(built, True)]


@pytest.mark.repeats
@pytest.mark.parametrize("direction", ["upgrade", "downgrade"])
def test_of_two_deployers_at_once_both_succeed_and_the_work_is_done_once(url: str, direction: str) -> None:
    arguments = ("upgrade", "head") if direction == "upgrade" else ("downgrade", "075")
    if direction == "downgrade":
        upgrade(url)
        run_sql(url, SHADOWS)

    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda _: run_alembic(*arguments, DATABASE_URL=url), range(2)))

    assert [run.returncode for run in runs] == [0, 0], [run.stderr for run in runs]
    pairs = [*pairwise(REVISIONS)] if direction == "upgrade" else [*pairwise(REVISIONS[::-1])]
    for step in (f"{start} -> {end}" for start, end in pairs):
        assert sum(run.stderr.count(step) for run in runs) == 1


def test_who_holds_the_deployers_lock_for_too_long_is_named(
    url: str, server_role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployers, "_MOST_SECONDS", 0.5)
    before = tables_of(url)
    with connected(as_role(url, server_role)) as other:
        pid = other.scalar(text("SELECT pg_backend_pid() FROM pg_advisory_lock(:key)"), {"key": ADVISORY_LOCK})
        with pytest.raises(CommandError, match=f"another deployer holds the lock.*pid {pid}, role {server_role}"):
            upgrade(url)
    assert tables_of(url) == before


def test_a_waiting_deployer_says_so_and_a_command_that_only_reads_does_not_wait(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with connected(url, isolation_level="AUTOCOMMIT") as other, caplog.at_level(logging.INFO):
        other.execute(text("SELECT pg_advisory_lock(:key)"), {"key": ADVISORY_LOCK})
        command.current(config(url))
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(upgrade, url)
            try:
                wait_until(lambda: "another deployer is migrating this database: waiting for pid" in caplog.text)
                assert not waiting.done()
                assert "alembic_version_iot_models" not in tables_of(url)
            finally:  # otherwise the pool would wait forever
                other.execute(text("SELECT pg_advisory_unlock_all()"))
            waiting.result(timeout=30)
    assert revision_of(url) == HEAD


@pytest.mark.repeats
def test_the_downgrade_copies_what_writers_change_meanwhile_and_never_makes_them_fail(
    url: str, server_role: str
) -> None:
    """The application's role has no privilege on the parked table. It writes before and after a page is copied."""
    upgrade(url)
    run_sql(url, f"GRANT SELECT, INSERT, UPDATE, DELETE ON device_state TO {server_role}", SHADOWS)
    (d3,) = (row for row in rows_of(url, columns=f"tenant_id, device_id, {SHADOW_COLUMNS}") if ",d3," in row)
    writes = [
        """UPDATE device_state SET desired_version = 8 WHERE device_id = 'd1';
           INSERT INTO device_state (tenant_id, site_id, device_id, desired_version) VALUES ('acme', 's', 'new', 3)""",
        """UPDATE device_state SET desired_version = 9, shadow_updated_at = NULL WHERE device_id = 'd2';
           UPDATE device_state SET device_id = 'renamed' WHERE device_id = 'd3';
           UPDATE device_state SET reported_state = '{}' WHERE device_id = 'd4';
           DELETE FROM device_state WHERE device_id = 'd1'""",
    ]

    def write(_c: object, _cursor: object, statement: str, *_rest: object) -> None:
        if "WITH page AS" in statement and writes:
            run_sql(as_role(url, server_role), writes.pop(0))

    event.listen(Engine, "before_cursor_execute", write)
    try:
        downgrade(url, "075")
    finally:
        event.remove(Engine, "before_cursor_execute", write)

    assert not writes
    parked = {row.split(",")[1]: row for row in rows_of(url, PARKED)}
    assert set(parked) == {"d2", "new", "renamed"}  # d1 was deleted, d3 was renamed
    assert parked["d2"].endswith(",9,5,)")
    assert parked["renamed"].split(",", 2)[2] == d3.split(",", 2)[2]


@pytest.mark.repeats
def test_rows_that_a_writer_has_locked_are_moved_in_a_later_round(url: str, caplog: pytest.LogCaptureFixture) -> None:
    upgrade(url)
    run_sql(url, SHADOWS)
    before = rows_of(url, columns="device_id, desired_state, reported_state, desired_version")
    downgrade(url, "075")

    with ThreadPoolExecutor(1) as pool, connected(url) as writer, caplog.at_level(logging.INFO):
        migrating = None

        def hold_a_row(_c: object, _cursor: object, statement: str, *_rest: object) -> None:
            if "WITH page AS" in statement and not writer.in_transaction():
                writer.execute(text("UPDATE device_state SET status = 'STALE' WHERE device_id = 'd2'"))

        event.listen(Engine, "before_cursor_execute", hold_a_row)
        try:
            migrating = pool.submit(upgrade, url)
            wait_until(lambda: "1 rows are locked by other transactions" in caplog.text)
        finally:
            event.remove(Engine, "before_cursor_execute", hold_a_row)
        writer.commit()
        migrating.result(timeout=30)

    assert rows_of(url, columns="device_id, desired_state, reported_state, desired_version") == before
    assert PARKED not in tables_of(url)


def wait_until(holds: Callable[[], object]) -> None:
    """Wait until a condition holds that another thread brings about. It fails after 20 seconds."""
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, "the condition does not hold after 20 seconds"
        time.sleep(0.01)


@contextmanager
def cut_after(changes: int) -> Iterator[list[str]]:
    """Cut the connection to the server after that many statements, as if the client had been killed.

    Statements that change nothing do not count: after them the database is as it was before.
    """
    seen: list[str] = []

    def cut(connection: Connection, _cursor: object, statement: str, *_rest: object) -> None:
        if statement.split(maxsplit=1)[0] in {"SELECT", "SHOW", "SET", "SAVEPOINT", "RELEASE"}:
            return
        words = statement.split()
        if words[0] == "WITH" and words[1] != "page":  # a question: strangers, whenever some time has passed
            return
        seen.append(statement)
        if len(seen) == changes:
            connection.connection.dbapi_connection.pgconn.finish()  # type: ignore[union-attr]

    event.listen(Engine, "after_cursor_execute", cut)
    try:
        yield seen
    finally:
        event.remove(Engine, "after_cursor_execute", cut)


class Way(NamedTuple):
    """A migration, how a database comes to where it begins, and the least number of changes that it makes."""

    begin: Callable[[str], object]
    migrate: Callable[[str], None]
    least: int


def at_077(url: str) -> None:
    """Devices with shadows; the history and the refusals are parked."""
    upgrade(url)
    run_sql(url, SHADOWS, VERSIONS)
    downgrade(url, "077")


def at_head_again(url: str) -> None:
    at_077(url)
    upgrade(url)


def at_076(url: str) -> None:
    at_077(url)
    downgrade(url, "076")


def at_075_with_parked_shadows(url: str) -> None:
    at_077(url)
    downgrade(url, "075")


WAYS = {
    "raw 075 to 077": Way(tables_of, lambda url: upgrade(url, "077"), 12),
    "076 to 077": Way(at_076, lambda url: upgrade(url, "077"), 4),
    "077 to 076": Way(at_077, lambda url: downgrade(url, "076"), 5),
    "077 to 075": Way(at_077, lambda url: downgrade(url, "075"), 12),
    "075 with parked shadows to 077": Way(at_075_with_parked_shadows, lambda url: upgrade(url, "077"), 12),
    "077 with parked history and refusals to head": Way(at_077, upgrade, 12),
    "head to 077": Way(at_head_again, lambda url: downgrade(url, "077"), 8),
}


@pytest.mark.repeats
@pytest.mark.parametrize("way", WAYS)
def test_cut_off_after_any_change_the_same_command_ends_in_the_same_result(
    url: str, new_database: Callable[..., str], way: str
) -> None:
    begin, migrate, least = WAYS[way]
    begin(url)
    before = left_in(url)
    copy = new_database(url)
    with cut_after(0) as statements:
        migrate(copy)
    expected = state(copy)
    assert len(statements) >= least

    copy = new_database(url)
    continued: list[object] = []
    for cut, statement in enumerate(statements, 1):
        with (
            cut_after(cut),
            pytest.raises(CommandError, match=r"the connection was lost.*(?s:.)*Run the same command again"),
        ):
            migrate(copy)
        left = left_in(copy)
        if left == before:  # all of it was rolled back, and the next cut begins where this one began
            continue
        if left not in continued:  # else the command went on from there already
            migrate(copy)
            assert state(copy) == expected, f"cut after {statement}"
            continued.append(left)
        copy = new_database(url)


def left_in(url: str) -> object:
    """All from which a command goes on: beside what a dump shows, who has which right, and which index is invalid."""
    rights_and_indexes = """
        SELECT CAST(relname AS text), CAST(relacl AS text), indisvalid
          FROM pg_class LEFT JOIN pg_index ON indexrelid = pg_class.oid WHERE relnamespace = 'public'::regnamespace
        UNION ALL
        SELECT CAST(proname AS text), CAST(proacl AS text), NULL FROM pg_proc WHERE pronamespace = 'public'::regnamespace
        ORDER BY 1
    """
    return state(url), run_sql(url, rights_and_indexes)


KILLED = """
import os, signal, sys
sys.path.insert(0, {checkout!r})
from sqlalchemy import Engine, event
from tests.databases.alembic_runs import downgrade, upgrade

seen = 0
def kill(connection, cursor, statement, *rest):
    global seen
    seen += 1
    if {needle!r} in statement:
        os.kill(os.getpid(), signal.SIGKILL)
event.listen(Engine, {moment!r}, kill)
{call}
"""


@pytest.mark.repeats
@pytest.mark.parametrize(
    ("call", "moment", "needle"),
    [
        ("upgrade(sys.argv[1])", "after_cursor_execute", "ALTER TABLE device_state"),
        ("upgrade(sys.argv[1])", "before_cursor_execute", "CREATE INDEX CONCURRENTLY"),
        ("upgrade(sys.argv[1])", "after_cursor_execute", "UPDATE public.alembic_version_iot_models"),
        ("upgrade(sys.argv[1])", "before_cursor_execute", "idx_device_state_shadow_pending_device ON"),
        (
            "downgrade(sys.argv[1], '075')",
            "after_cursor_execute",
            "DROP INDEX IF EXISTS idx_device_state_shadow_pending_device",
        ),
        ("downgrade(sys.argv[1], '075')", "after_cursor_execute", "WITH page AS"),
        ("downgrade(sys.argv[1], '075')", "after_cursor_execute", "DROP COLUMN IF EXISTS desired_state"),
    ],
)
def test_after_kill_9_of_the_client_the_next_run_completes_the_migration(
    url: str, migrated_url: str, call: str, moment: str, needle: str
) -> None:
    if call.startswith("downgrade"):
        upgrade(url)
        run_sql(url, SHADOWS)
    program = KILLED.format(checkout=str(CHECKOUT), needle=needle, moment=moment, call=call)

    killed = subprocess.run([sys.executable, "-c", program, url], check=False, capture_output=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    if call.startswith("downgrade"):
        downgrade(url, "075")
        assert len(rows_of(url, PARKED)) == 4
        assert revision_of(url) == "075"
    upgrade(url)
    assert dump(url) == dump(migrated_url)
    assert len(rows_of(url)) == 10


@pytest.mark.skipif(sys.platform == "win32", reason="the throwaway server needs POSIX")
def test_a_server_that_crashes_in_the_middle_is_no_harm_either() -> None:
    """After SIGKILL to the backend that migrates, the server ends all connections and recovers from its WAL."""
    # Unlike the throwaway server's default, so that what was committed survives.
    with throwaway.postgres(settings={"synchronous_commit": "on"}) as server:
        run_sql(server.url, RAW_075 + FLEET)
        for needle, migrate in (
            ("CREATE INDEX", upgrade),
            ("DROP COLUMN IF EXISTS desired_state", lambda url: downgrade(url, "075")),
            ("WITH page AS", upgrade),
        ):
            before = rows_of(server.url, columns="device_id, state")
            crashed = threading.Event()

            def crash(connection: Connection, _cursor: object, statement: str, *_rest: object) -> None:
                if needle in statement and not crashed.is_set():  # noqa: B023 - used in this turn only
                    crashed.set()  # noqa: B023
                    dbapi: Any = connection.connection.dbapi_connection
                    os.kill(dbapi.info.backend_pid, signal.SIGKILL)

            event.listen(Engine, "before_cursor_execute", crash)
            try:
                with pytest.raises(CommandError, match="the connection was lost"):
                    migrate(server.url)
            finally:
                event.remove(Engine, "before_cursor_execute", crash)
            assert crashed.is_set()
            wait_until(lambda: answers(server.url))
            migrate(server.url)
            assert rows_of(server.url, columns="device_id, state") == before
            if needle == "CREATE INDEX":
                run_sql(server.url, SHADOWS)
        assert len([row for row in rows_of(server.url) if "52.12345678901234567890" in row]) == 3


def answers(url: str) -> bool:
    try:
        run_sql(url, "SELECT 1")
    except Exception:  # noqa: BLE001 - whatever a recovering server says
        return False
    return True
