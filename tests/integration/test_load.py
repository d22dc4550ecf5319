"""`python -m iot_models.testing.load`: what it measures is so, it names the bottleneck, and it leaves nothing behind."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from sqlalchemy import NullPool, create_engine, make_url, text

from iot_models import migrate
from iot_models.testing.load import fleet, output, traffic
from iot_models.testing.load.command_line import main
from iot_models.testing.load.plan import Plan, device_id
from tests.databases.alembic_runs import CHECKOUT
from tests.databases.async_engines import ASYNC_DRIVERS
from tests.databases.backends import connected
from tests.databases.tenants import clear, isolate, login
from tests.integration.command_lines import run_here

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Engine

SECRET = "hunter2"  # noqa: S105 - not a real one
DEVICES = 200
FEW = ("--devices", str(DEVICES), "--seconds", "2", "--rate", "100")
# One more line for each report that was written, in the order of the writes.
SEEN = """
    CREATE TABLE seen (id bigserial, tenant_id text, device_id text, n int, acked int);
    CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
      INSERT INTO seen (tenant_id, device_id, n, acked)
      VALUES (NEW.tenant_id, NEW.device_id, (NEW.reported_state ->> 'n')::int, NEW.reported_version);
      RETURN NULL; END $$;
    CREATE TRIGGER seen AFTER UPDATE OF reported_state ON device_state FOR EACH ROW EXECUTE FUNCTION see()
"""
SLOW = """
    CREATE FUNCTION doze() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
      PERFORM pg_sleep(0.5); RETURN NULL; END $$;
    CREATE TRIGGER slow AFTER UPDATE ON device_state FOR EACH STATEMENT EXECUTE FUNCTION doze()
"""
REFUSING = """
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
      IF NEW.reported_state ->> 'n' <> '0' THEN RAISE 'not today'; END IF; RETURN NEW; END $$;
    CREATE TRIGGER refusing BEFORE UPDATE ON device_state FOR EACH ROW EXECUTE FUNCTION refuse()
"""


class Run(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def measured(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.out)
        return document


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def url(own_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> str:
    """The database, which the environment names."""
    monkeypatch.delenv("DATABASE_URL", raising=False)
    url = own_engine.url.render_as_string(hide_password=False)
    monkeypatch.setenv("IOT_MODELS_DATABASE_URL", url)
    return url


@pytest.fixture
def load(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Runs a command line in this process."""

    return lambda *arguments: Run(*run_here(main, arguments, capsys))


def change(engine: Engine, statements: str) -> None:
    with engine.begin() as connection:
        connection.execute(text(statements))


def left(engine: Engine) -> list[int]:
    with engine.connect() as connection:
        return [
            connection.scalar(text(f"SELECT count(*) FROM {table}")) or 0
            for table in ("device_state", "device_shadow_history")
        ]


def await_reports(by: Engine) -> None:
    """Return as soon as a report of the load is written."""
    statement = text("SELECT FROM device_state WHERE reported_state ->> 'n' <> '0' LIMIT 1")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with by.connect() as connection:
            if connection.execute(statement).one_or_none() is not None:
                return
        time.sleep(0.005)
    raise TimeoutError("nothing was reported")


@contextmanager
def beside(work: Callable[[], None]) -> Iterator[None]:
    """Do something in another thread while the block runs."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised below
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    assert failed == []


@pytest.mark.parametrize("driver", ASYNC_DRIVERS)
def test_all_that_is_reported_is_counted_as_it_is_in_the_database_and_nothing_is_left_there(
    load: Callable[..., Run], own_engine: Engine, driver: str
) -> None:
    change(own_engine, SEEN)

    run = load(
        *("--devices", str(DEVICES), "--seconds", "4", "--rate", "200", "--driver", driver),
        *("--tenants", "2", "--desired-rate", "20", "--json"),
    )

    found = run.measured
    plan = Plan(own_engine.url, "", DEVICES, 2, 200, 4, 20, 20, 5, 1000, timedelta(milliseconds=20), bind_tenant=False)
    last = {device_id(plan.device(n)): n for n in range(800)}
    with own_engine.connect() as connection:
        seen = connection.execute(text("SELECT tenant_id, device_id, n, acked FROM seen ORDER BY id")).all()
    assert {row.device_id: row.n for row in seen} == last
    assert {row.device_id: row.tenant_id[-2:] for row in seen} == {
        device_id(number): f"-{number % 2}" for number in range(DEVICES)
    }
    assert {row.acked for row in seen} == {1, 2}  # some had a new version to acknowledge
    assert run.code == (0 if found["is_reached"] else 1)
    assert (found["due"], found["done"], found["unsent"], found["refused"], found["errors"]) == (800, 800, 0, {}, {})
    assert found["batches"] * found["batch"] == pytest.approx(800)
    assert (found["desired_due"], found["desired_done"], found["desired_errors"]) == (80, 80, {})
    for latency in (found["latency"], found["desired_latency"]):
        assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"] <= latency["max"]
    assert found["updates"] > 0
    assert found["hot_updates"] <= found["updates"]
    assert found["wal"] > 800 * 100
    assert left(own_engine) == [0, 0]
    with own_engine.connect() as connection:  # the planner, too, knows of none
        assert connection.scalar(text("SELECT reltuples FROM pg_class WHERE relname = 'device_state'")) == 0


def test_people_read_a_table_and_a_verdict_and_how_far_it_is(
    load: Callable[..., Run], own_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_EVERY", 0.0)

    run = load(*FEW, "--desired-rate", "5")

    lines = run.out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:-2]] == [
        "reports", "accepted", "latency", "batches", "desired writes", "their latency", "this process", "connections",
        "our sessions", "WAL", "HOT updates",
    ]  # fmt: skip
    assert lines[2].endswith("  200 of 200")
    assert [line for line in run.err.splitlines() if line.endswith("...")] == [
        "making devices ...", "writing ...", "deleting them ...",
    ]  # fmt: skip
    assert "making devices: 200 of 200\n" in run.err
    assert "reports/s\n" in run.err
    assert "deleting them: 200 of 200\n" in run.err
    assert left(own_engine) == [0, 0]


def test_a_terminal_shows_a_bar_where_rich_is_installed(
    load: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", terminal := Terminal())
        load("--devices", "10", "--seconds", "0.5", "--rate", "20")
        patch.setattr("sys.stderr", plain := Terminal())
        patch.setitem(sys.modules, "rich.progress", None)
        load("--devices", "10", "--seconds", "0.5", "--rate", "20")

    for phase in ("making devices", "writing", "deleting them"):
        assert phase in terminal.getvalue()
    assert "100 %" in terminal.getvalue()
    assert plain.getvalue() == "making devices ...\nwriting ...\ndeleting them ...\n"


def test_rows_that_somebody_else_has_locked_are_the_bottleneck_and_it_is_said_who(
    load: Callable[..., Run], own_engine: Engine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic, "_DRAIN", 0.1)  # the last batch is still waiting then, and is taken back
    monkeypatch.setattr(traffic, "_AT_AN_END", timedelta(milliseconds=100))

    def lock() -> None:
        with connected(url, connect_args={"application_name": "backup"}) as connection:
            await_reports(own_engine)
            connection.execute(text("SELECT FROM device_state FOR UPDATE"))
            time.sleep(3)

    with beside(lock):
        run = load(*FEW, "--json")

    found = run.measured
    assert (run.code, found["is_reached"]) == (1, False)
    assert "Bottleneck: rows or tables that are locked." in found["verdict"]
    assert "held by 'backup'" in found["verdict"]
    assert found["unanswered"] > 0
    assert found["done"] + found["unanswered"] + found["unsent"] == found["due"]
    assert left(own_engine) == [0, 0]


@pytest.fixture
def slow(own_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Each transaction takes half a second, whatever else runs here; what is not written in time is taken back."""
    change(own_engine, SLOW)
    monkeypatch.setattr(traffic, "_DRAIN", 0.1)
    return ("--devices", "20", "--rate", "20", "--seconds", "3", "--max-batch", "2")


def test_a_pool_of_one_is_the_bottleneck_of_tenants_whose_commits_are_slow(
    load: Callable[..., Run], own_engine: Engine, slow: tuple[str, ...]
) -> None:
    run = load(*slow, "--tenants", "4", "--connections", "1")

    assert run.code == 1
    assert "Bottleneck: the connection pool. No connection of 1 was free " in run.out, run.out
    assert "4 tenants have batches to write (--connections)." in run.out
    assert re.search(r"^not written +0 never begun, [1-9]\d* without an answer at the end$", run.out, re.MULTILINE)
    assert left(own_engine) == [0, 0]


def test_a_trigger_that_pauses_is_the_bottleneck_where_connections_are_free(
    load: Callable[..., Run], own_engine: Engine, slow: tuple[str, ...]
) -> None:
    run = load(*slow)

    assert run.code == 1
    assert "Bottleneck: a pause that a trigger or a setting of the server makes." in run.out, run.out
    assert "Timeout:PgSleep" in run.out
    assert left(own_engine) == [0, 0]


def test_a_rate_that_is_reached_is_success(load: Callable[..., Run], own_engine: Engine) -> None:
    run = load("--devices", "5", "--rate", "1", "--seconds", "3")

    assert run.code == 0, run
    assert "The rate was reached: 1 reports/s. There is room for more: " in run.out
    assert re.search(r"^accepted +3 of 3$", run.out, re.MULTILINE)
    assert left(own_engine) == [0, 0]


def test_a_rate_that_one_process_cannot_make_is_this_processs_bottleneck(
    load: Callable[..., Run], own_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic, "_REPORTS_UNDER_WAY", 1000)

    run = load("--devices", "5000", "--seconds", "2", "--rate", "1000000", "--tenants", "8", "--keys", "300", "--json")

    found = run.measured
    assert run.code == 1
    assert found["busy"] > 0.85
    # Which of the two depends on what else runs here.
    assert "Bottleneck: this process." in found["verdict"] or "the processors of this machine." in found["verdict"]
    assert found["unsent"] == found["due"] - found["done"]
    assert found["latency"]["max"] > 0.01  # from when it was due: not only how long its batch took
    assert left(own_engine) == [0, 0]


def test_errors_are_counted_by_their_sqlstate_and_are_the_bottleneck(
    load: Callable[..., Run], own_engine: Engine
) -> None:
    change(own_engine, REFUSING)

    run = load(*FEW)

    assert run.code == 1
    assert "1 of 200; P0001: 199\n" in run.out  # the first report is not refused
    assert "Bottleneck: writes fail. 199 of 200 reports ended in P0001." in run.out
    assert left(own_engine) == [0, 0]


def test_devices_that_are_removed_meanwhile_are_outcomes_of_their_own(
    load: Callable[..., Run], own_engine: Engine
) -> None:
    def remove() -> None:
        await_reports(own_engine)
        with own_engine.begin() as connection:  # in the order of batches: they wait for it, and never deadlock
            connection.execute(text("SELECT FROM device_state ORDER BY device_id FOR UPDATE"))
            connection.execute(text("DELETE FROM device_state"))

    with beside(remove):
        run = load(*FEW, "--desired-rate", "20")

    assert "; unknown_device: " in run.out
    assert "; DeviceNotFound: " in run.out
    assert left(own_engine) == [0, 0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_nothing_is_left(
    load: Callable[..., Run], own_engine: Engine, number: signal.Signals
) -> None:
    def interrupt() -> None:
        await_reports(own_engine)
        os.kill(os.getpid(), number)

    with beside(interrupt):
        run = load("--devices", str(DEVICES), "--rate", "500", "--desired-rate", "50")  # for a minute

    assert (run.code, run.out) == (128 + number, "")
    assert run.err.endswith("deleting them ...\ninterrupted\n")
    assert left(own_engine) == [0, 0]


def test_a_process_that_is_told_to_end_while_it_makes_devices_deletes_them(own_engine: Engine) -> None:
    command = [sys.executable, "-m", "iot_models.testing.load", "--devices", "100000000"]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while left(own_engine) == [0, 0] and time.monotonic() < deadline:
            time.sleep(0.01)
        process.terminate()
        out, err = process.communicate(timeout=60)

    assert (process.returncode, out) == (128 + signal.SIGTERM, "")
    assert err == "making devices ...\ndeleting them ...\ninterrupted\n"
    assert left(own_engine) == [0, 0]


def test_the_second_signal_ends_the_deleting_too_and_what_is_left_is_said_with_what_deletes_it(
    load: Callable[..., Run], own_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def interrupted(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(30)

    monkeypatch.setattr(fleet.Fleet, "_patiently", interrupted)

    def interrupt() -> None:
        await_reports(own_engine)
        os.kill(os.getpid(), signal.SIGINT)

    with beside(interrupt):
        run = load("--devices", str(DEVICES), "--tenants", "2")

    said, statements = run.err.splitlines()[-2].split(" Delete them: ")
    assert run.code == 130
    assert said == "200 devices are left in the database."
    assert left(own_engine) != [0, 0]
    change(own_engine, statements)
    assert left(own_engine) == [0, 0]


def test_where_the_database_is_gone_it_says_what_is_left_and_what_deletes_it(
    load: Callable[..., Run], own_engine: Engine, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "_RETRIES", (0.1,))
    admin = create_engine(server.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    name = own_engine.url.database

    def allow(answer: str) -> None:
        with admin.connect() as connection:
            connection.execute(text(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS {answer}'))

    def go_away() -> None:
        await_reports(own_engine)
        own_engine.dispose()
        allow("false")
        with admin.connect() as connection:
            statement = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name")
            connection.execute(statement, {"name": name})

    try:
        with beside(go_away):
            run = load(*FEW)
    finally:
        allow("true")

    lines = run.err.splitlines()
    assert (run.code, run.out) == (1, "")
    assert lines[-2].startswith("200 devices are left in the database. Delete them: DELETE FROM device_state WHERE ")
    assert lines[-1].startswith("error: database ")
    change(own_engine, lines[-2].split("Delete them: ")[1])
    assert left(own_engine) == [0, 0]


def test_a_tenant_that_has_rows_is_not_touched(
    load: Callable[..., Run], own_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda _: "theirs")
    change(
        own_engine, "INSERT INTO device_state (tenant_id, site_id, device_id) VALUES ('load-theirs', 's', 'device-1')"
    )

    run = load(*FEW)

    assert run.code == 1
    assert "tenant 'load-theirs' has rows already" in run.err
    assert left(own_engine) == [1, 0]


def test_a_role_that_is_limited_to_one_tenant_runs_it_bound_and_need_not_read_the_wal(
    load: Callable[..., Run], own_engine: Engine, server_role: str
) -> None:
    isolate(own_engine, server_role)
    change(own_engine, "REVOKE EXECUTE ON FUNCTION pg_current_wal_lsn() FROM PUBLIC")
    url = login(own_engine, server_role).render_as_string(hide_password=False)
    try:
        unbound = load(*FEW, "--url", url)
        run = load(*FEW, "--url", url, "--bind-tenant", "--desired-rate", "5")
    finally:
        change(own_engine, "GRANT EXECUTE ON FUNCTION pg_current_wal_lsn() TO PUBLIC")

    assert unbound.code == 1
    assert "row-level security" in unbound.err
    assert "error" not in run.err
    assert "200 of 200" in run.out
    assert "not for this role to read" in run.out
    assert left(own_engine) == [0, 0]
    clear(own_engine)


def test_another_schema_is_found_by_the_urls_search_path(
    load: Callable[..., Run], new_database: Callable[..., str]
) -> None:
    url = make_url(new_database())
    with connected(url.render_as_string(hide_password=False)) as connection:
        connection.execute(text("CREATE SCHEMA iot"))
        connection.commit()
    url = url.update_query_dict({"options": "-csearch_path=iot"})
    migrate.upgrade(url)

    run = load(*FEW, "--url", url.render_as_string(hide_password=False), "--json")

    assert run.measured["done"] == 200
    assert run.measured["updates"] >= 200


def test_without_a_database_there_is_one_that_is_thrown_away(load: Callable[..., Run], own_engine: Engine) -> None:
    run = load("--throwaway", "--devices", "10", "--seconds", "0.5", "--rate", "20")

    assert "10 of 10" in run.out, run
    assert left(own_engine) == [0, 0]


def test_what_cannot_run_is_an_error_in_one_line_without_a_password(
    load: Callable[..., Run], new_database: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = load("--url", f"postgresql://iot:{SECRET}@127.0.0.1:1/nowhere")
    assert nowhere.code == 1
    assert nowhere.err.startswith("error: database nowhere at 127.0.0.1:1: PostgreSQL cannot be reached")
    nowhere_too = load("--url", f"postgresql+asyncpg://iot:{SECRET}@127.0.0.1:1/nowhere")
    assert nowhere_too.err.startswith("error: database nowhere at 127.0.0.1:1: PostgreSQL cannot be reached")
    unmigrated = load("--url", new_database())
    assert "The database is not migrated" in unmigrated.err
    monkeypatch.delenv("IOT_MODELS_DATABASE_URL")
    none = load()
    assert none.err.startswith("error: no database URL: ")
    assert none.err.endswith(", or pass one (--url)\n")
    for run in (nowhere, nowhere_too, unmigrated, none):
        assert (run.code, run.out, run.err.count("\n"), SECRET in run.err) == (1, "", 1, False), run


@pytest.mark.parametrize(
    "arguments",
    [
        ("--devices", "0"), ("--rate", "0"), ("--rate", "-1"), ("--seconds", "x"), ("--desired-rate", "1e3"),
        ("--max-batch", "1.5"), ("--driver", "hunter2"), ("hunter2",), ("--throwaway", "--url", "hunter2"),
    ],
)  # fmt: skip
def test_wrong_usage_is_said_without_repeating_it(load: Callable[..., Run], arguments: tuple[str, ...]) -> None:
    run = load(*arguments)

    assert (run.code, run.out, SECRET in run.err) == (2, "", False)
    assert "this is not understood" not in run.err
