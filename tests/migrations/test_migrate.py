"""`python -m iot_models.migrate` as an operator types it, and `iot_models.migrate` as a service or a test calls it."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from alembic.util import CommandError
from sqlalchemy import Engine, NullPool, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from iot_models import migrate
from iot_models._migrations import comparison, history, operations, runner
from iot_models._migrations.command_line import main
from tests.databases import partitioned
from tests.databases.alembic_runs import CHECKOUT
from tests.databases.schema_dump import dump
from tests.migrations import commands
from tests.migrations.raw_sql import (
    ADD_SHADOW,
    ADVISORY_LOCK,
    FLEET,
    PARKED,
    RAW_076,
    SHADOWS,
    psql,
    rows_of,
    run_sql,
    tables_of,
)
from tests.migrations.revisions import HEAD, REVISIONS, TO_HEAD

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NOWHERE = "postgresql://iot:hunter2@127.0.0.1:1/nowhere"
SUBCOMMANDS = ("upgrade", "downgrade", "current", "history", "check", "sql")


@pytest.fixture(autouse=True)
def _no_url_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IOT_MODELS_DATABASE_URL", "DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "iot_models.migrate", *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of the command in a process of its own."""
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    return process.returncode, out, err


def as_session(url: str, *settings: str) -> str:
    """The URL with settings of the session: `role=pg_monitor`."""
    options = " ".join(f"-c {setting}" for setting in settings)
    return make_url(url).update_query_dict({"options": options}).render_as_string(hide_password=False)


# The command line, in a process of its own.


@pytest.mark.repeats
def test_the_command_upgrades_checks_and_downgrades_a_database(empty: str) -> None:
    code, out, err = run("upgrade", "075", "--url", empty, DATABASE_URL=NOWHERE)
    assert (code, out) == (0, "")
    assert re.fullmatch(r"(INFO  \[alembic.*\n)*INFO  \[alembic.*Running upgrade  -> 075, .*\n", err)
    assert commands.migrate("current", IOT_MODELS_DATABASE_URL=empty, DATABASE_URL=NOWHERE) == (0, "075\n", "")
    code, out, err = run("check", DATABASE_URL=empty)
    assert (code, err) == (1, "")
    assert re.fullmatch(
        rf"database \w+ stands at 075, head is {HEAD}: run python -m iot_models\.migrate upgrade head\n", out
    )

    upgraded = commands.migrate("upgrade", DATABASE_URL=empty)
    assert upgraded.code == 0
    assert TO_HEAD in upgraded.err
    code, out, err = commands.migrate("check", DATABASE_URL=empty)
    assert (code, err) == (0, "")
    assert re.fullmatch(rf"database \w+ stands at head \({HEAD}\) and equals the models\n", out)

    code, out, err = commands.migrate("downgrade", "base", DATABASE_URL=empty)
    assert (code, out) == (0, "")
    assert "Running downgrade 076 -> 075" in err
    assert tables_of(empty) == {"alembic_version_iot_models"}


def test_ctrl_c_ends_with_one_line_and_the_next_run_continues(empty: str) -> None:
    engine = create_engine(empty, poolclass=NullPool)
    with engine.connect() as other_deployer:
        other_deployer.execute(text("SELECT pg_advisory_lock(:key)"), {"key": ADVISORY_LOCK})
        process = start("upgrade", DATABASE_URL=empty)
        assert process.stderr is not None
        assert "another deployer is migrating this database" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)

    assert (process.returncode, out) == (130, "")
    assert err == "interrupted: run the same command again to continue from there\n"
    migrate.upgrade(empty)
    assert migrate.current(empty) == HEAD


# The command line, in this process.


def test_help_names_every_command_and_where_the_url_comes_from() -> None:
    code, out, err = commands.migrate("--help")

    assert (code, err) == (0, "")
    assert all(re.search(rf"^    {name} ", out, re.MULTILINE) for name in SUBCOMMANDS)
    assert "python -m iot_models.migrate check || exit 1" in out
    assert "--url, else IOT_MODELS_DATABASE_URL, else DATABASE_URL" in out


def test_history_and_sql_need_no_database() -> None:
    code, out, err = commands.migrate("history")
    assert (code, err) == (0, "")
    steps = [f"{before} -> {after}" for before, after in zip(["<base>", *REVISIONS], REVISIONS, strict=False)]
    assert [line.split(",")[0].replace(" (iot_models)", "") for line in out.splitlines()] == [
        f"{steps[-1]} (head)",
        *steps[-2::-1],
    ]

    code, out, err = commands.migrate("sql", "075:head")
    assert (code, err) == (0, "")
    assert out == migrate.sql(f"075:{HEAD}")


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_command_has_a_help_text(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])

    said = capsys.readouterr().out
    assert said.startswith(f"usage: python -m iot_models.migrate {name} ")
    assert "--url" in said


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["downgrade"], ["check", "--frobnicate"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: python -m iot_models.migrate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check"], r"no database URL: set IOT_MODELS_DATABASE_URL \(or DATABASE_URL\) to .*, or pass one \(--url\)"),
        (["check", "--url", "nonsense"], r"not a database URL: write it as postgresql://.*"),
        (["current", "--url", "mysql://iot:hunter2@db/iot"], r"iot_models works on PostgreSQL; .* names 'mysql'"),
        (["current", "--url", "postgresql+frob://db/iot"], r"postgresql\+frob: Can't load plugin.*; write .*psycopg://.*"),
        (["current", "--url", "postgresql+psycopg2cffi://db/iot"], r"postgresql\+psycopg2cffi: No module .*; write .*"),
        (["upgrade", "--url", "postgresql+asyncpg://db/iot"], r"migrations run synchronously, and postgresql\+asyncpg .*"),
        (["upgrade", "--url", NOWHERE], r"cannot reach database nowhere at 127\.0\.0\.1:1: .*"),
        (["-x", "frob=1", "upgrade", "--url", NOWHERE], r"-x frob: unknown; there are url, schema, lock_timeout, .*"),
        (["upgrade", "--lock-timeout", "4", "--url", NOWHERE], r"-x lock_timeout=\.\.\.: expected how long .*"),
        (["sql", "075"], r"'075' is no range of revisions: write FROM:TO, as in 075:076 or 076:075"),
        (["sql", "075:frob"], r"Can't locate revision identified by 'frob'"),
        (["sql", "head:075", "--shadow=keep"], r"-x shadow=\.\.\.: expected discard: .*"),
    ],
)  # fmt: skip
def test_an_error_is_one_message_and_exit_code_1(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1

    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(f"error: {message}\n", err, re.DOTALL)
    assert "hunter2" not in err


def test_an_error_of_postgresql_is_its_own_message_and_exit_code_1(
    empty: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["upgrade", "--url", as_session(empty, "role=pg_monitor")]) == 1
    assert "error: PostgreSQL says: permission denied for schema public\n" in capsys.readouterr().err


def test_a_downgrade_that_would_drop_rows_is_refused_until_an_option_allows_it(
    at_head: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_sql(at_head, FLEET, SHADOWS)

    assert main(["downgrade", "base", "--url", at_head]) == 1
    assert "device_state holds 10 rows" in capsys.readouterr().err
    assert len(rows_of(at_head)) == 10

    assert main(["upgrade", "--url", at_head]) == 0
    # -x before the command, as with Alembic.
    assert main(["-x", "shadow=discard", "downgrade", f"-{len(REVISIONS) - 1}", "--url", at_head]) == 0
    assert tables_of(at_head) == {"alembic_version_iot_models", "device_state"}
    assert main(["downgrade", "-x", f"url={at_head}", "base", "--device-state=drop"]) == 0
    assert tables_of(at_head) == {"alembic_version_iot_models"}


@pytest.mark.parametrize(
    ("flag", "command"),
    [
        (["upgrade", "075:076", "--sql"], ["sql", "075:076"]),
        (["upgrade", "--sql"], ["sql", "base:head"]),
        (["downgrade", "head:075", "--sql"], ["sql", "head:075"]),
        (["downgrade", "076:075", "--sql", "--shadow=discard"], ["sql", "076:075", "--shadow=discard"]),
        (["upgrade", "075:076", "--sql", "--lock-timeout=9s"], ["sql", "075:076", "--lock-timeout=9s"]),
    ],
)
def test_the_flag_sql_prints_what_the_command_sql_prints(
    flag: list[str], command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flag) == 0
    by_flag = capsys.readouterr().out
    assert main(command) == 0

    assert "ALTER TABLE device_state" in by_flag
    assert capsys.readouterr().out == by_flag


# check


def test_check_finds_nothing_at_head_and_changes_nothing(at_head: str) -> None:
    before = dump(at_head)
    assert migrate.check(at_head) == []
    assert dump(at_head) == before


def test_the_comparison_changes_nothing_in_the_callers_transaction(at_head: str) -> None:
    run_sql(at_head, "DROP INDEX idx_device_state_site")
    engine = create_engine(at_head, poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text("SET LOCAL lock_timeout = '7s'"))
        assert len(comparison.differences(connection)) == 1
        assert len(comparison.differences(connection)) == 1
        assert connection.scalar(text("SELECT to_regclass('pg_temp.device_state')")) is None
        assert connection.scalar(text("SHOW lock_timeout")) == "7s"


def test_a_raw_schema_that_was_adopted_equals_the_models(empty: str) -> None:
    run_sql(empty, RAW_076)
    (problem,) = migrate.check(empty)
    assert problem.endswith(
        f"was never migrated by Alembic, head is {HEAD}: run python -m iot_models.migrate upgrade head"
    )

    migrate.upgrade(empty)
    assert migrate.check(empty) == []


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (
            "ALTER TABLE device_state ALTER state DROP NOT NULL",
            "column state is jsonb DEFAULT '{}'::jsonb: the models have jsonb NOT NULL DEFAULT '{}'::jsonb",
        ),
        (
            "ALTER TABLE device_state ALTER site_id SET DEFAULT 'x'",
            "column site_id is text NOT NULL DEFAULT 'x'::text: the models have text NOT NULL",
        ),
        (
            "ALTER TABLE device_state ALTER status SET DEFAULT 'ONLINE'",
            "column status is text NOT NULL DEFAULT 'ONLINE'::text: the models have text NOT NULL DEFAULT 'OFFLINE'::text",
        ),
        (
            "ALTER TABLE device_state ALTER last_seen_at TYPE timestamp(3)",
            "column last_seen_at is timestamp(3) without time zone: the models have timestamp with time zone",
        ),
        (
            "ALTER TABLE device_state DROP state, ADD state jsonb NOT NULL GENERATED ALWAYS AS (desired_state) STORED",
            "column state is jsonb NOT NULL DEFAULT desired_state: the models have jsonb NOT NULL DEFAULT '{}'::jsonb",
        ),
        (
            "ALTER TABLE device_state DROP last_heartbeat_at",
            "column last_heartbeat_at is missing: the models have timestamp with time zone",
        ),
        (
            "COMMENT ON COLUMN device_state.reported_version IS 'Else.'",
            "the comment on column reported_version is 'Else.': the models have 'The desired_version the device last acknowledged.'",
        ),
        (
            "COMMENT ON COLUMN device_state.reported_version IS NULL",
            "the comment on column reported_version is missing: the models have 'The desired_version the device last acknowledged.'",
        ),
        (
            "ALTER TABLE device_state DROP CONSTRAINT device_state_pkey, ADD PRIMARY KEY (device_id, tenant_id)",
            "the primary key is (device_id, tenant_id): the models have (tenant_id, device_id)",
        ),
        (
            "ALTER TABLE device_state DROP CONSTRAINT device_state_pkey",
            "the primary key is missing: the models have (tenant_id, device_id)",
        ),
        (
            "DROP INDEX idx_device_state_site",
            "index idx_device_state_site is missing: the models have btree (tenant_id, site_id); CREATE INDEX CONCURRENTLY"
            " idx_device_state_site ON device_state USING btree (tenant_id, site_id)",
        ),
        (
            "DROP INDEX idx_device_state_site; CREATE UNIQUE INDEX idx_device_state_site ON device_state (tenant_id, site_id)",
            "index idx_device_state_site is UNIQUE btree (tenant_id, site_id): the models have btree (tenant_id, site_id)",
        ),
        (
            "DROP INDEX idx_device_state_shadow_pending; CREATE INDEX idx_device_state_shadow_pending ON device_state"
            " (tenant_id) WHERE desired_version >= reported_version",
            "index idx_device_state_shadow_pending is btree (tenant_id) WHERE (desired_version >= reported_version):"
            " the models have btree (tenant_id) WHERE (desired_version > reported_version)",
        ),
        (
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'idx_device_state_status'::regclass",
            "index idx_device_state_status is INVALID btree (tenant_id, status): the models have btree (tenant_id, status);"
            " REINDEX INDEX CONCURRENTLY idx_device_state_status mends it",
        ),
        ("DROP TABLE device_state", "table device_state is missing"),
    ],
)  # fmt: skip
@partitioned.needs_one_piece("the schema is that of a plain one")
def test_check_names_each_difference_from_the_models(
    change: str, difference: str, at_head: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_sql(at_head, change)

    assert difference in migrate.check(at_head)
    assert main(["check", "--url", at_head]) == 1
    assert f"{difference}\n" in capsys.readouterr().out


@partitioned.needs_one_piece("PostgreSQL does not do this to it")
def test_what_a_team_added_to_the_table_is_no_difference(at_head: str) -> None:
    run_sql(
        at_head,
        """
        ALTER TABLE device_state ADD own_column text NOT NULL DEFAULT '1', ADD CHECK (status <> ''), ADD UNIQUE (device_id),
              ENABLE ROW LEVEL SECURITY;
        COMMENT ON TABLE device_state IS 'Ours.';
        COMMENT ON COLUMN device_state.tenant_id IS 'Who pays.';
        COMMENT ON COLUMN device_state.own_column IS 'What runs.';
        CREATE INDEX idx_of_ours ON device_state (own_column) WHERE status = 'ONLINE';
        CREATE POLICY own ON device_state USING (tenant_id = current_user);
        CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
        CREATE TRIGGER note BEFORE UPDATE ON device_state FOR EACH ROW EXECUTE FUNCTION note();
        CREATE TABLE site (tenant_id text, site_id text, PRIMARY KEY (tenant_id, site_id));
        ALTER TABLE device_state ADD FOREIGN KEY (tenant_id, site_id) REFERENCES site;
        CREATE VIEW online AS SELECT * FROM device_state WHERE status = 'ONLINE';
        """,
    )
    assert migrate.check(at_head) == []


def test_check_compares_the_table_in_the_schema_that_the_search_path_names(empty: str) -> None:
    run_sql(empty, "CREATE SCHEMA iot")
    url = as_session(empty, "search_path=iot")
    migrate.upgrade(url)

    assert migrate.check(url) == []
    assert "was never migrated" in migrate.check(empty)[0]


@pytest.mark.parametrize(
    ("revision", "problems", "mode"),
    # The locks of an upgrade to 076, of its downgrade, of the index build of 077; and without a deployer.
    [
        ("075", 1, "ACCESS EXCLUSIVE"),
        ("076", 1, "SHARE ROW EXCLUSIVE"),
        ("076", 1, "SHARE UPDATE EXCLUSIVE"),
        (HEAD, 0, "SHARE ROW EXCLUSIVE"),
    ],
)
def test_check_does_not_wait_for_a_deployer_at_work(revision: str, problems: int, mode: str, empty: str) -> None:
    migrate.upgrade(empty, revision)
    engine = create_engine(empty, poolclass=NullPool)
    with engine.connect() as deployer:
        deployer.execute(text("SELECT pg_advisory_lock(:key)"), {"key": ADVISORY_LOCK})
        deployer.execute(text(f"LOCK TABLE device_state IN {mode} MODE"))

        assert len(migrate.check(empty)) == problems
        assert migrate.current(empty) == revision


def test_check_gives_up_soon_if_another_session_has_locked_the_table_against_reads(at_head: str) -> None:
    engine = create_engine(at_head, poolclass=NullPool)
    with engine.connect() as other:
        other.execute(text("LOCK TABLE device_state IN ACCESS EXCLUSIVE MODE"))
        began = time.monotonic()
        with pytest.raises(CommandError, match="lock timeout; device_state is locked by another session"):
            migrate.check(at_head)
        assert time.monotonic() - began < 3


def test_another_error_during_a_check_is_not_reported_as_a_missing_privilege(at_head: str) -> None:
    run_sql(
        at_head,
        """
        CREATE FUNCTION forbid() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not on a Friday'; END $$;
        CREATE EVENT TRIGGER forbid ON ddl_command_start WHEN TAG IN ('CREATE TABLE') EXECUTE FUNCTION forbid();
        """,
    )
    with pytest.raises(DBAPIError, match="not on a Friday"):
        migrate.check(at_head)


def test_an_unknown_revision_is_reported_as_unknown_and_not_as_old(at_head: str) -> None:
    run_sql(at_head, "UPDATE alembic_version_iot_models SET version_num = 'frob'")
    (problem,) = migrate.check(at_head)
    assert f"stands at frob, which is unknown here, where head is {HEAD}: a newer iot_models migrated it" in problem


def test_what_is_no_revision_is_refused_without_being_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["upgrade", "postgresql://iot:hunter2@db/iot"])

    said = capsys.readouterr().err
    assert "argument revision: not a revision: write 076, head, +1 or -1, or a range FROM:TO" in said
    assert "hunter2" not in said


@pytest.mark.repeats
@pytest.mark.parametrize("revision", ["076", "head"])  # the database is at 076
def test_an_interrupted_downgrade_is_reported_and_undone_by_the_next_upgrade(
    at_head: str, revision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "_FIRST_PAUSE", 0.001)
    run_sql(at_head, FLEET, SHADOWS)
    before = rows_of(at_head)
    migrate.downgrade(at_head, "076")
    engine = create_engine(at_head, poolclass=NullPool)
    with engine.connect() as reader:
        reader.execute(text("SELECT FROM device_state"))  # its lock conflicts only with the last step
        with pytest.raises(CommandError, match="no lock on device_state after 5 tries of 10ms"):
            migrate.downgrade(at_head, "075", lock_timeout="10ms")

    problem = migrate.check(at_head)[-1]
    assert "a downgrade to 075 is at work or was interrupted (trigger device_state_shadow_076_park" in problem
    assert "to stay where the database is, run upgrade head" in problem

    migrate.upgrade(at_head, revision)
    assert PARKED not in tables_of(at_head)
    migrate.upgrade(at_head)
    assert migrate.check(at_head) == []
    assert rows_of(at_head) == before
    assert PARKED not in tables_of(at_head)


@pytest.mark.repeats
def test_parked_shadows_are_a_note_and_not_a_problem(at_head: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_sql(at_head, FLEET, SHADOWS)
    migrate.downgrade(at_head, "075")
    assert main(["check", "--url", at_head]) == 1
    assert capsys.readouterr().err == (
        "note: shadows parked in device_state_shadow_076: 4; the next upgrade puts them back\n"
    )

    run_sql(at_head, ADD_SHADOW, "UPDATE device_state SET desired_version = 1 WHERE device_id = 'd1'")
    migrate.upgrade(at_head)
    assert main(["check", "--url", at_head]) == 0
    assert capsys.readouterr().err == (
        "note: shadows parked in device_state_shadow_076: 1; their devices have a newer shadow\n"
    )

    migrate.downgrade(at_head, "076")
    assert main(["check", "--url", at_head]) == 1
    assert capsys.readouterr().err.startswith(
        "note: shadows parked in device_state_shadow_076: 1; their devices have a newer shadow\n"
    )
    migrate.upgrade(at_head)

    # A role without the privilege to read them can run the check, too.
    run_sql(at_head, "GRANT SELECT ON alembic_version_iot_models TO pg_monitor")
    assert main(["check", "--url", as_session(at_head, "role=pg_monitor")]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("setting", ["role=pg_monitor", "default_transaction_read_only=on"])
def test_check_without_temporary_tables_says_what_it_needs(setting: str, at_head: str) -> None:
    database = make_url(at_head).database
    run_sql(
        at_head,
        f"REVOKE TEMPORARY ON DATABASE {database} FROM public; GRANT SELECT ON alembic_version_iot_models TO pg_monitor",
    )
    with pytest.raises(CommandError, match="ask the primary, as a role that has TEMP on the database"):
        migrate.check(as_session(at_head, setting))


# From code.


def test_an_engine_keeps_its_pool_and_its_settings(empty: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = create_engine(
        as_session(empty, "lock_timeout=7s"), pool_size=1, max_overflow=0, isolation_level="AUTOCOMMIT"
    )
    levels = {name: logging.getLogger(name).level for name in ("", "alembic", "sqlalchemy.engine")}
    handlers = list(logging.getLogger().handlers)

    migrate.upgrade(engine)
    assert migrate.current(engine) == HEAD
    assert migrate.check(engine) == []
    migrate.downgrade(engine, "075", lock_timeout="1s")
    assert migrate.current(engine) == "075"

    with engine.connect() as connection:
        assert connection.scalar(text("SHOW lock_timeout")) == "7s"
        assert connection.scalar(text("SHOW row_security")) == "on"
        assert getattr(connection.connection.dbapi_connection, "autocommit", None) is True
    assert levels == {name: logging.getLogger(name).level for name in levels}
    assert handlers == logging.getLogger().handlers
    assert caplog.messages == []
    engine.dispose()


def test_an_autocommit_engine_migrates_in_transactions_too(at_head: str) -> None:
    migrate.downgrade(at_head, "076")
    run_sql(
        at_head,
        # With it the last step of the downgrade fails, and the steps before it in the transaction must be undone.
        """
        CREATE FUNCTION forbid() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not on a Friday'; END $$;
        CREATE EVENT TRIGGER forbid ON sql_drop WHEN TAG IN ('ALTER TABLE') EXECUTE FUNCTION forbid();
        """,
    )
    engine = create_engine(at_head, isolation_level="AUTOCOMMIT", poolclass=NullPool)

    with pytest.raises(Exception, match="not on a Friday"):
        migrate.downgrade(engine, "075", shadow="discard")
    assert migrate.current(engine) == "076"
    migrate.upgrade(engine)
    assert migrate.check(engine) == []


def test_a_url_object_keeps_its_password_and_its_percent_signs(empty: str) -> None:
    passwords: list[str] = []

    def remember(_dialect: object, _record: object, _arguments: object, parameters: dict[str, Any]) -> None:
        passwords.append(parameters["password"])
        parameters["password"] = make_url(empty).password

    event.listen(Engine, "do_connect", remember)
    try:
        assert migrate.current(make_url(empty).set(drivername="postgres", password="50%&= s")) is None  # noqa: S106
    finally:
        event.remove(Engine, "do_connect", remember)
    assert passwords == ["50%&= s"]


def test_an_upgrade_waits_for_a_lock_as_long_as_lock_timeout_says(empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "_FIRST_PAUSE", 0.001)
    migrate.upgrade(empty, "075")
    engine = create_engine(empty, poolclass=NullPool)
    with engine.connect() as reader:
        reader.execute(text("SELECT FROM device_state"))
        with pytest.raises(CommandError, match="no lock on device_state after 5 tries of 10ms"):
            migrate.upgrade(empty, lock_timeout="10ms")


def test_current_is_none_before_the_first_revision_and_base_on_the_command_line(
    empty: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert migrate.current(as_session(empty, "default_transaction_read_only=on")) is None
    assert main(["current", "--url", empty]) == 0
    assert main(["upgrade", "--url", empty]) == 0
    assert main(["current", "--url", empty]) == 0
    assert capsys.readouterr().out == f"<base>\n{HEAD} (head)\n"


def test_without_a_url_the_environment_names_it(at_head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", at_head)
    assert migrate.current() == HEAD


def test_an_async_engine_is_refused_and_the_message_says_what_to_pass(at_head: str) -> None:
    engine = create_async_engine(at_head)
    targets: list[Any] = [engine, engine.sync_engine]
    for target in targets:
        with pytest.raises(CommandError, match=r"await connection\.run_sync\(migrate\.upgrade\)"):
            migrate.upgrade(target)
    assert migrate.current(engine.url.set(drivername="postgresql+psycopg")) == HEAD


def test_an_engine_of_another_database_is_refused() -> None:
    with pytest.raises(CommandError, match="iot_models works on PostgreSQL; this engine is for sqlite"):
        migrate.upgrade(create_engine("sqlite://"))


@pytest.mark.repeats
def test_each_thread_migrates_its_own_database(make_empty: Callable[[], str]) -> None:
    urls = [make_empty() for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(migrate.upgrade, urls))
    assert [migrate.check(url) for url in urls] == [[], [], []]


def test_the_sql_from_code_does_what_the_upgrade_and_the_downgrade_do(empty: str, plain_migrated_url: str) -> None:
    assert psql(empty, migrate.sql("base:head")).returncode == 0
    assert migrate.check(empty) == []
    assert dump(empty) == dump(plain_migrated_url)

    run_sql(empty, FLEET, SHADOWS)
    down = migrate.sql("head:base", shadow="discard", device_state="drop", lock_timeout="1s")
    assert psql(empty, down).returncode == 0
    assert "device_state" not in tables_of(empty)


def test_the_revisions_may_be_in_a_folder_with_a_percent_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "100%(here)s"
    shutil.copytree(CHECKOUT / "alembic", folder)
    monkeypatch.setattr(history, "FOLDER", folder)
    assert runner.revisions() == REVISIONS
