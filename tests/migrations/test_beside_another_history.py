"""One database, two histories: a team's Alembic and ours, in either order, in one schema or several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from alembic.util import CommandError
from sqlalchemy import NullPool, create_engine, make_url

from iot_models import migrate
from iot_models._migrations.runner import revisions
from tests.databases import partitioned
from tests.migrations import commands
from tests.migrations.raw_sql import (
    FLEET,
    PARKED,
    RAW_075,
    RAW_076,
    SHADOWS,
    psql,
    revision_of,
    rows_of,
    run_sql,
    state,
    tables_of,
)
from tests.migrations.team import Team, team

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

REVISIONS = revisions()
HEAD = REVISIONS[-1]
VERSION_TABLE = "alembic_version_iot_models"
OURS = {"device_state", "device_shadow_history", VERSION_TABLE}


def theirs(url: str) -> list[tuple[object, ...]]:
    return run_sql(url, "SELECT version_num FROM public.alembic_version ORDER BY 1")


@pytest.fixture(params=[("a001", "a002"), ("075", "076", "077")], ids=["other ids", "our ids"])
def beside(tmp_path: Path, empty: str, request: pytest.FixtureRequest) -> Team:
    """A team's project with a history of its own."""
    return team(tmp_path / "team", empty, revisions=request.param)


# Two histories


@pytest.mark.repeats
def test_the_histories_move_up_and_down_in_either_order_without_a_word_to_each_other(beside: Team) -> None:
    url = beside.url
    their_tables = {"alembic_version"} | {f"team_{path.name[:-8]}" for path in beside.folder.glob("versions/*_team.py")}

    beside.alembic("upgrade", "head")
    migrate.upgrade(url)
    assert tables_of(url) == OURS | their_tables
    assert migrate.check(url) == []
    assert migrate.current(url) == HEAD
    at = theirs(url)
    migrate.downgrade(url, "base")
    assert tables_of(url) == their_tables | {VERSION_TABLE}
    assert theirs(url) == at

    migrate.upgrade(url)
    beside.alembic("downgrade", "base")
    assert tables_of(url) == OURS | {"alembic_version"}
    assert migrate.check(url) == []
    beside.alembic("upgrade", "head")
    assert theirs(url) == at


@pytest.mark.repeats
def test_every_command_of_alembic_s_in_our_checkout_works_beside_a_team_s(beside: Team) -> None:
    beside.alembic("upgrade", "head")
    before = theirs(beside.url)
    for arguments in (["upgrade", "head"], ["stamp", "076"], ["stamp", "head"], ["current"], ["history"], ["check"],
                      ["downgrade", "075"], ["upgrade", "+1"]):  # fmt: skip
        code, out, _ = commands.alembic("-x", f"url={beside.url}", *arguments)
        assert code == 0
        assert "a001" not in out
    assert (revision_of(beside.url), theirs(beside.url)) == ("076", before)


@pytest.mark.repeats
def test_going_down_stops_before_it_drops_what_the_team_refers_to(beside: Team) -> None:
    url = beside.url
    migrate.upgrade(url)
    run_sql(url, FLEET, SHADOWS, "CREATE TABLE machine (tenant text, device text, "
            "FOREIGN KEY (tenant, device) REFERENCES device_state)")  # fmt: skip
    before = state(url)
    with pytest.raises(CommandError, match=r"constraint machine_tenant_device_fkey on table machine"):
        migrate.downgrade(url, "base", device_state="drop")
    assert state(url) == before
    migrate.downgrade(url, "075")
    migrate.upgrade(url)
    assert state(url) == before


# A version table from before it had a name of its own


def renamed(url: str) -> None:
    """As earlier versions of this package left it."""
    run_sql(url, f"ALTER TABLE {VERSION_TABLE} RENAME TO alembic_version",
            f"ALTER TABLE alembic_version RENAME CONSTRAINT {VERSION_TABLE}_pkc TO alembic_version_pkc")  # fmt: skip


@pytest.mark.repeats
@pytest.mark.parametrize("revision", REVISIONS)
def test_one_that_is_ours_is_taken_over_by_the_first_command_that_changes_the_database(
    raw_fleet: str, revision: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    migrate.upgrade(raw_fleet, revision)
    rows = rows_of(raw_fleet)
    renamed(raw_fleet)
    before = state(raw_fleet)

    assert migrate.current(raw_fleet) == revision
    migrate.check(raw_fleet)
    assert state(raw_fleet) == before
    migrate.upgrade(raw_fleet, revision)

    assert tables_of(raw_fleet) - {"device_shadow_history"} == OURS - {"device_shadow_history"}
    assert "alembic_version is that of device_state: it is now called" in caplog.text
    assert (revision_of(raw_fleet), rows_of(raw_fleet)) == (revision, rows)
    team(tmp_path / "team", raw_fleet).alembic("upgrade", "head")  # it makes one of its own
    assert theirs(raw_fleet) == [("a001",)]


def test_a_downgrade_takes_it_over_too(at_head: str) -> None:
    renamed(at_head)
    migrate.downgrade(at_head, "075")
    assert (tables_of(at_head), revision_of(at_head)) == (OURS - {"device_shadow_history"}, "075")


@pytest.mark.repeats
def test_a_refused_command_takes_nothing_over(at_head: str) -> None:
    run_sql(at_head, FLEET)
    renamed(at_head)
    before = state(at_head)
    with pytest.raises(CommandError, match="holds 10 rows"):
        migrate.downgrade(at_head, "base")
    assert state(at_head) == before


THEIRS = {
    "another application's 077, and no table": ("", "077"),
    "another application's 077 beside a table that is at 075": (RAW_075, "077"),
    "another application's 077 beside a table that is at 076": (RAW_076, "077"),
    "another application's 075 beside a table that is at 076": (RAW_076, "075"),
    "a revision that is not ours": (RAW_076, "a001"),
}


@pytest.mark.repeats
@pytest.mark.parametrize("made", THEIRS)
def test_one_that_is_not_certainly_ours_is_another_application_s(empty: str, made: str) -> None:
    raw, revision = THEIRS[made]
    run_sql(empty, raw, "CREATE TABLE alembic_version (version_num varchar(32), "
            "CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num));"
            f"INSERT INTO alembic_version VALUES ('{revision}')")  # fmt: skip

    assert migrate.current(empty) is None
    migrate.upgrade(empty)

    assert (revision_of(empty), theirs(empty)) == (HEAD, [(revision,)])
    migrate.downgrade(empty, "base")
    assert theirs(empty) == [(revision,)]


@pytest.mark.repeats
def test_a_trigger_or_a_stranger_s_hand_on_it_makes_it_another_s(at_head: str, server_role: str) -> None:
    renamed(at_head)
    run_sql(at_head, f"ALTER TABLE alembic_version OWNER TO {server_role}")
    migrate.upgrade(at_head)
    assert (revision_of(at_head), theirs(at_head)) == (HEAD, [(HEAD,)])
    run_sql(at_head, f"DROP OWNED BY {server_role}")


# What cannot be right


def test_two_rows_in_our_version_table_are_refused(at_head: str) -> None:
    run_sql(at_head, f"INSERT INTO {VERSION_TABLE} VALUES ('076')")
    before = state(at_head)
    for command in (migrate.upgrade, migrate.current, migrate.check, lambda url: migrate.downgrade(url, "075")):
        with pytest.raises(CommandError, match=rf"{VERSION_TABLE} has 2 rows \(076, {HEAD}\).*DELETE the others"):
            command(at_head)
    assert state(at_head) == before


def test_our_revision_beside_theirs_is_refused_because_their_alembic_runs_it(at_head: str) -> None:
    renamed(at_head)
    run_sql(at_head, "INSERT INTO alembic_version VALUES ('a001')")
    before = state(at_head)
    for command in (migrate.upgrade, migrate.check):
        with pytest.raises(CommandError, match=rf"has our revision {HEAD} beside others.*DELETE our row"):
            command(at_head)
    assert state(at_head) == before


def test_a_history_that_is_newer_than_this_package_is_refused(at_head: str) -> None:
    run_sql(at_head, f"UPDATE {VERSION_TABLE} SET version_num = '999'")
    before = state(at_head)
    for command in (migrate.upgrade, lambda url: migrate.downgrade(url, "075")):
        with pytest.raises(CommandError, match=rf"stands at 999, which is unknown here, where head is {HEAD}.*newer"):
            command(at_head)
    assert state(at_head) == before


# Schemas


def tables(url: str) -> set[str]:
    rows = run_sql(url, "SELECT schemaname || '.' || tablename FROM pg_tables WHERE schemaname !~ '^(pg_|information)'")
    return {str(row[0]) for row in rows}


def ours_in(schema: str) -> set[str]:
    return {f"{schema}.{table}" for table in OURS}


def at_075_in(schema: str) -> set[str]:
    return ours_in(schema) - {f"{schema}.device_shadow_history"}


@pytest.mark.repeats
@pytest.mark.parametrize("schema", ["iot", 'I o"T', "a$$b:%c'\\"])
def test_a_schema_that_is_named_has_all_and_another_none(
    empty: str, schema: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quoted = '"' + schema.replace('"', '""') + '"'
    run_sql(empty, f"CREATE SCHEMA {quoted}")
    team(tmp_path / "team", empty).alembic("upgrade", "head")
    their = tables(empty)
    named: dict[str, Any] = {"schema": schema}

    migrate.upgrade(empty, **named)
    assert tables(empty) == their | ours_in(schema)
    run_sql(empty, f"SET search_path = {quoted}", FLEET, SHADOWS)
    assert migrate.main(["check", "--url", empty, "--schema", schema]) == 0
    assert migrate.current(empty, **named) == HEAD
    assert "stands at head" in capsys.readouterr().out
    assert migrate.check(empty) != []  # there is none in the search path
    migrate.downgrade(empty, "075", **named)
    assert tables(empty) == their | at_075_in(schema) | {f"{schema}.device_state_shadow_076"}
    migrate.upgrade(empty, **named)
    migrate.downgrade(empty, "base", device_state="drop", **named)
    assert tables(empty) == their | {f"{schema}.{VERSION_TABLE}"}

    printed = psql(empty, f"DROP TABLE {quoted}.{VERSION_TABLE};" + migrate.sql("base:head", **named))
    assert printed.returncode == 0, printed.stderr
    assert tables(empty) == their | ours_in(schema)
    assert migrate.check(empty, **named) == []


@pytest.mark.repeats
def test_two_schemas_of_one_database_have_a_history_each(empty: str) -> None:
    run_sql(empty, "CREATE SCHEMA iot")
    migrate.upgrade(empty, schema="iot")
    migrate.upgrade(empty, "075")  # the table of iot is not in the search path
    assert tables(empty) == ours_in("iot") | at_075_in("public")
    assert (migrate.current(empty, schema="iot"), migrate.current(empty)) == (HEAD, "075")

    both = create_engine(empty, connect_args={"options": "-c search_path=iot,public"}, poolclass=NullPool)
    assert migrate.current(both) == HEAD
    migrate.downgrade(both, "075")
    migrate.upgrade(both, schema="public")
    assert (migrate.current(empty, schema="iot"), migrate.current(empty)) == ("075", HEAD)

    run_sql(empty, FLEET, SHADOWS)
    migrate.downgrade(empty, "075")
    run_sql(empty, "SET search_path = iot", FLEET)  # the same devices
    parked = rows_of(empty, PARKED)
    migrate.upgrade(both)  # iot, which has no shadows to put back
    assert rows_of(empty, PARKED) == parked


@partitioned.needs_one_piece("its partitions stay in the schema where they are")
def test_the_table_is_found_in_whichever_schema_of_the_search_path_it_is(empty: str) -> None:
    run_sql(empty, "CREATE SCHEMA first", RAW_075)
    engine = create_engine(empty, connect_args={"options": "-c search_path=first,public"}, poolclass=NullPool)
    migrate.upgrade(engine)
    assert tables(empty) == ours_in("public")


@pytest.mark.parametrize("command", ["upgrade", "check", "sql"])
def test_a_schema_that_is_missing_is_refused(empty: str, command: str) -> None:
    if command == "sql":
        printed = psql(empty, migrate.sql("base:head", schema="iot"))
        assert (printed.returncode, "there is no schema iot" in printed.stderr) == (3, True)
    else:
        with pytest.raises(CommandError, match=r"no schema 'iot' in this database.*nothing was changed. Create it"):
            getattr(migrate, command)(empty, schema="iot")
    assert tables(empty) == set()


@pytest.mark.parametrize("schema", ["pg_catalog", "information_schema", ""])
def test_a_schema_of_postgresql_s_own_is_refused(empty: str, schema: str) -> None:
    with pytest.raises(CommandError, match=r"-x schema=\.\.\.: expected the name of a schema"):
        migrate.upgrade(empty, schema=schema)


def test_a_search_path_without_a_schema_is_refused(empty: str) -> None:
    engine = create_engine(empty, connect_args={"options": "-c search_path=nowhere"}, poolclass=NullPool)
    with pytest.raises(CommandError, match=r"the search path has no schema.*Name one \(--schema"):
        migrate.upgrade(engine)


def test_an_engine_that_translates_schemas_migrates_the_one_that_its_tables_are_in(empty: str) -> None:
    run_sql(empty, "CREATE SCHEMA iot")
    engine = create_engine(empty, poolclass=NullPool, execution_options={"schema_translate_map": {None: "iot"}})
    migrate.upgrade(engine)
    assert tables(empty) == ours_in("iot")
    assert migrate.check(engine) == []

    with pytest.raises(CommandError, match=r"schema 'public' is asked for, but schema_translate_map .* says 'iot'"):
        migrate.upgrade(engine, schema="public")


@pytest.mark.repeats
def test_objects_that_a_team_s_own_need_of_the_search_path_are_still_found(empty: str) -> None:
    """An event trigger of the team's whose function names a table of the schema `public` without its schema."""
    run_sql(empty, """
        CREATE SCHEMA iot; CREATE TABLE ddl_log (at timestamptz DEFAULT now());
        CREATE FUNCTION log_ddl() RETURNS event_trigger LANGUAGE plpgsql
            AS $$ BEGIN INSERT INTO ddl_log DEFAULT VALUES; END $$;
        CREATE EVENT TRIGGER log_ddl ON ddl_command_end EXECUTE FUNCTION log_ddl();
    """)  # fmt: skip
    migrate.upgrade(empty, schema="iot")
    assert migrate.check(empty, schema="iot") == []


@pytest.mark.repeats
def test_a_version_table_of_ours_in_another_schema_says_nothing_about_this_one(empty: str) -> None:
    run_sql(empty, "CREATE SCHEMA iot", f"CREATE TABLE {VERSION_TABLE} (version_num varchar(32) PRIMARY KEY);"
            f"INSERT INTO {VERSION_TABLE} VALUES ('{HEAD}')")  # fmt: skip
    assert migrate.current(empty, schema="iot") is None
    migrate.upgrade(empty, schema="iot")
    assert migrate.check(empty, schema="iot") == []


def test_two_databases_of_one_server_are_no_neighbours(make_empty: Callable[[], str]) -> None:
    first, second = make_empty(), make_empty()
    migrate.upgrade(first)
    assert make_url(first).database != make_url(second).database
    assert migrate.current(second) is None
