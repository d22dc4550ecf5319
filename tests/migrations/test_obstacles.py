"""What would stop a migration is found before it changes anything, all of it at once, and `check` says it too."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.util import CommandError
from sqlalchemy import NullPool, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

from iot_models import migrate
from iot_models._migrations import (
    deployers,
    environment,
    expectations,
    faulty_rows,
    findings,
    indexes,
    operations,
    runner,
)
from iot_models._migrations.command_line import main
from iot_models._migrations.obstacles import Plan, obstacles
from iot_models.testing import throwaway
from tests.databases import partitioned
from tests.databases.alembic_runs import downgrade, upgrade
from tests.databases.backends import connected
from tests.migrations.raw_sql import (
    ADD_SHADOW,
    ADVISORY_LOCK,
    FLEET,
    PARKED,
    RAW_075,
    RAW_076,
    SHADOW_COLUMNS,
    SHADOWS,
    as_role,
    revision_of,
    rows_of,
    run_sql,
    state,
    tables_of,
)
from tests.migrations.revisions import HEAD

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection


TRIGGER = "device_state_shadow_076_park"
# What a team may have made on the columns of a shadow, and how the refusal names it.
DEPENDENTS = {
    "a view": (
        "CREATE VIEW v AS SELECT desired_state FROM device_state; CREATE VIEW w AS SELECT * FROM v",
        ["view v (DROP VIEW v)"],
    ),
    "a materialized view": (
        "CREATE MATERIALIZED VIEW m AS SELECT reported_version FROM device_state",
        ["materialized view m (DROP MATERIALIZED VIEW m)"],
    ),
    "a generated column": (
        "ALTER TABLE device_state ADD ahead integer GENERATED ALWAYS AS (desired_version - reported_version) STORED",
        ["column ahead of table device_state (ALTER TABLE device_state DROP COLUMN ahead)"],
    ),
    "a publication's columns": (
        "CREATE PUBLICATION p1 FOR TABLE device_state (tenant_id, device_id, desired_state)",
        ["publication of table device_state in publication p1 (ALTER PUBLICATION p1 DROP TABLE device_state)"],
    ),
    "a publication's row filter": (
        "CREATE PUBLICATION p2 FOR TABLE device_state WHERE (desired_version > 0) WITH (publish = 'insert')",
        ["publication of table device_state in publication p2 (ALTER PUBLICATION p2 DROP TABLE device_state)"],
    ),
    "a policy": (
        "CREATE POLICY p ON device_state USING (desired_version >= 0)",
        ["policy p on table device_state (DROP POLICY p ON device_state)"],
    ),
    "a policy of another table": (
        "CREATE TABLE o2 (a int); CREATE POLICY p ON o2 USING (EXISTS (SELECT FROM device_state WHERE desired_version = a))",
        ["policy p on table o2 (DROP POLICY p ON o2)"],
    ),
    "a trigger's WHEN": (
        "CREATE TRIGGER t1 BEFORE UPDATE ON device_state FOR EACH ROW WHEN (NEW.desired_version > 9) EXECUTE FUNCTION f()",
        ["trigger t1 on table device_state (DROP TRIGGER t1 ON device_state)"],
    ),
    "a trigger's UPDATE OF": (
        "CREATE TRIGGER t2 BEFORE UPDATE OF reported_state ON device_state FOR EACH ROW EXECUTE FUNCTION f()",
        ["trigger t2 on table device_state (DROP TRIGGER t2 ON device_state)"],
    ),
    "a function": (
        "CREATE FUNCTION g() RETURNS bigint LANGUAGE SQL BEGIN ATOMIC SELECT sum(desired_version) FROM device_state; END",
        ["function g() (DROP ROUTINE g())"],
    ),
    "a rule": (
        "CREATE RULE r AS ON UPDATE TO device_state WHERE NEW.desired_version < 0 DO INSTEAD NOTHING",
        ["rule r on table device_state (DROP RULE r ON device_state)"],
    ),
    "statistics": (
        "CREATE STATISTICS s ON desired_version, reported_version FROM device_state",
        ["statistics object s (DROP STATISTICS public.s)"],
    ),
    "an index": (
        "CREATE INDEX i1 ON device_state (shadow_updated_at)",
        ["index i1 (DROP INDEX i1)"],
    ),
    "an index with an expression": (
        "CREATE INDEX i2 ON device_state ((desired_state ->> 'mode'))",
        ["index i2 (DROP INDEX i2)"],
    ),
    "a CHECK": (
        "ALTER TABLE device_state ADD CONSTRAINT c CHECK (desired_version >= reported_version)",
        ["constraint c on table device_state (ALTER TABLE device_state DROP CONSTRAINT c)"],
    ),
    "a foreign key": (
        "CREATE UNIQUE INDEX i ON device_state (desired_version) INCLUDE (tenant_id);"
        "CREATE TABLE o (a int); ALTER TABLE device_state ADD CONSTRAINT u UNIQUE (reported_version);"
        "ALTER TABLE o ADD CONSTRAINT k FOREIGN KEY (a) REFERENCES device_state (reported_version)",
        [
            "constraint k on table o (ALTER TABLE o DROP CONSTRAINT k)",
            "constraint u on table device_state (ALTER TABLE device_state DROP CONSTRAINT u)",
            "index i (DROP INDEX i)",
        ],
    ),
}


@pytest.fixture
def url(shadow_fleet_at_head: str) -> Iterator[str]:
    """Ten devices at head, four of which have a shadow."""
    run_sql(
        shadow_fleet_at_head,
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
    )
    yield shadow_fleet_at_head
    run_sql(shadow_fleet_at_head, "DROP PUBLICATION IF EXISTS p, p1, p2")  # belongs to no schema


def owned_under_forced_row_security(url: str, role: str) -> str:
    """The URL of the table's new owner, to which a policy shows one row."""
    run_sql(url, f"""
        ALTER TABLE device_state OWNER TO {role};
        ALTER TABLE IF EXISTS device_shadow_history OWNER TO {role};
        ALTER TABLE IF EXISTS alembic_version_iot_models OWNER TO {role};
        ALTER TABLE IF EXISTS {PARKED} OWNER TO {role};
        ALTER SCHEMA public OWNER TO {role};
        ALTER TABLE device_state ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
        CREATE POLICY one ON device_state USING (device_id = 'd1');
    """)  # fmt: skip
    return as_role(url, role)


# Objects that depend on a column.


@pytest.mark.repeats
@pytest.mark.parametrize("discard", [False, True])
@partitioned.needs_one_piece("PostgreSQL does not do this to it")
def test_a_downgrade_names_all_that_depends_on_its_columns_and_changes_nothing(url: str, *, discard: bool) -> None:
    run_sql(url, "DELETE FROM device_state WHERE device_id <> 'd1'")  # versions are unique here
    run_sql(url, *(made for made, _ in DEPENDENTS.values()))
    before = state(url)

    with pytest.raises(CommandError) as caught:
        migrate.downgrade(url, "075", shadow="discard" if discard else None)

    said = str(caught.value)
    assert said.startswith(
        "objects depend on columns of device_state that this downgrade drops; nothing was changed:\n"
    )
    assert re.findall(r"^  - (.*)$", said, re.MULTILINE) == sorted(
        name for _, named in DEPENDENTS.values() for name in named
    )
    assert state(url) == before
    assert revision_of(url) == HEAD

    # What the message says is enough.
    for statement in re.findall(r"\(((?:DROP|ALTER) .*)\)$", said, re.MULTILINE):
        cascade = "" if statement.startswith("ALTER PUBLICATION") else " CASCADE"
        run_sql(url, re.sub(r"^(DROP INDEX|DROP [A-Z ]+|ALTER TABLE) (.*)$", rf"\1 \2{cascade}", statement))
    downgrade(url, "075")
    assert PARKED in tables_of(url)


@pytest.mark.repeats
def test_what_does_not_depend_on_the_columns_of_a_shadow_does_not_stop_its_downgrade(url: str) -> None:
    run_sql(url, """
        CREATE VIEW v AS SELECT tenant_id, device_id, status FROM device_state;
        CREATE INDEX i ON device_state (last_seen_at);
        CREATE POLICY p ON device_state USING (tenant_id <> '');
        CREATE PUBLICATION p FOR TABLE device_state;
        ALTER TABLE device_state ADD seen boolean GENERATED ALWAYS AS (last_seen_at IS NOT NULL) STORED;
        CREATE TRIGGER t BEFORE UPDATE OF status ON device_state FOR EACH ROW EXECUTE FUNCTION f();
    """)  # fmt: skip
    downgrade(url, "075")
    assert revision_of(url) == "075"


@pytest.mark.repeats
def test_a_downgrade_to_base_names_what_depends_on_the_table(at_head: str) -> None:
    run_sql(at_head, """
        CREATE VIEW v AS SELECT status FROM device_state;
        CREATE TABLE o (t text, d text, CONSTRAINT k FOREIGN KEY (t, d) REFERENCES device_state);
        CREATE INDEX i ON device_state (last_seen_at);
        CREATE POLICY p ON device_state USING (tenant_id <> '');
    """)  # fmt: skip
    before = state(at_head)

    with pytest.raises(CommandError) as caught:
        migrate.downgrade(at_head, "base", device_state="drop")

    assert re.findall(r"^  - (.*)$", str(caught.value), re.MULTILINE) == [
        "constraint k on table o (ALTER TABLE o DROP CONSTRAINT k)",
        "view v (DROP VIEW v)",
    ]
    assert state(at_head) == before


ROW_TYPES = {
    "itself": "CREATE TABLE other (device device_state)",
    "an array": "CREATE TABLE other (device device_state[])",
    "a domain": "CREATE DOMAIN device AS device_state; CREATE TABLE other (device device)",
    "in another row": "CREATE TYPE device AS (state device_state); CREATE TABLE other (device device[])",
}


@pytest.mark.parametrize("kind", ROW_TYPES)
def test_an_upgrade_names_the_columns_that_have_the_table_s_row_type(raw_fleet: str, kind: str) -> None:
    run_sql(raw_fleet, ROW_TYPES[kind])
    before = state(raw_fleet)
    with pytest.raises(
        CommandError, match=r"(?s)row type of device_state.*nothing was changed.*column device of other"
    ):
        migrate.upgrade(raw_fleet)
    assert state(raw_fleet) == before
    run_sql(raw_fleet, "DROP TABLE other")
    migrate.upgrade(raw_fleet)


def test_an_upgrade_names_the_rules_that_would_keep_shadows_from_being_put_back(shadow_fleet_at_head: str) -> None:
    before = rows_of(shadow_fleet_at_head)
    migrate.downgrade(shadow_fleet_at_head, "075")
    run_sql(shadow_fleet_at_head, "CREATE RULE tell AS ON UPDATE TO device_state DO ALSO NOTIFY device")
    with pytest.raises(CommandError, match=r"(?s)put back; nothing was changed.*DROP RULE tell ON device_state"):
        migrate.upgrade(shadow_fleet_at_head)
    run_sql(shadow_fleet_at_head, "DROP RULE tell ON device_state")
    migrate.upgrade(shadow_fleet_at_head)
    assert rows_of(shadow_fleet_at_head) == before


@partitioned.needs_one_piece("PostgreSQL does not do this to it")
def test_a_downgrade_names_the_tables_whose_rows_it_could_not_park(shadow_fleet_at_head: str) -> None:
    run_sql(shadow_fleet_at_head, "CREATE TABLE kid () INHERITS (device_state)")
    before = state(shadow_fleet_at_head)
    with pytest.raises(CommandError, match=r"(?s)cannot be parked; nothing.*ALTER TABLE kid NO INHERIT device_state"):
        migrate.downgrade(shadow_fleet_at_head, "075")
    assert state(shadow_fleet_at_head) == before
    run_sql(shadow_fleet_at_head, "ALTER TABLE kid NO INHERIT device_state")
    migrate.downgrade(shadow_fleet_at_head, "075")


@pytest.mark.repeats
def test_an_upgrade_names_what_depends_on_the_parked_shadows(shadow_fleet_at_head: str) -> None:
    migrate.downgrade(shadow_fleet_at_head, "075")
    run_sql(shadow_fleet_at_head, f"CREATE VIEW parked AS SELECT 1 AS one FROM {PARKED}")
    before = state(shadow_fleet_at_head)
    with pytest.raises(CommandError, match=rf"(?s)depend on {PARKED}.*nothing was changed.*\(DROP VIEW parked\)"):
        migrate.upgrade(shadow_fleet_at_head)
    assert state(shadow_fleet_at_head) == before


@pytest.mark.repeats
def test_an_upgrade_and_the_downgrade_of_077_are_not_stopped_by_what_depends_on_columns(url: str) -> None:
    run_sql(url, "CREATE VIEW v AS SELECT desired_version FROM device_state")
    downgrade(url, "076")
    upgrade(url)
    assert revision_of(url) == HEAD


@pytest.mark.repeats
def test_check_says_what_would_stop_a_rollback_and_that_is_no_problem(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_sql(url, "CREATE VIEW v AS SELECT * FROM device_state")
    assert main(["check", "--url", url]) == 0
    assert capsys.readouterr().err.startswith(
        "note: a downgrade below 076 would be refused: objects depend on columns of device_state that this downgrade "
        "drops: view v (DROP VIEW v); drop each of them"
    )


# Row level security.


@pytest.mark.repeats
@partitioned.needs_one_piece("its partitions have the owner that they had")
def test_a_downgrade_by_an_owner_who_does_not_see_every_row_is_refused_before_any_change(
    url: str, server_role: str, capsys: pytest.CaptureFixture[str]
) -> None:
    owner = owned_under_forced_row_security(url, server_role)
    before = state(url)

    with pytest.raises(CommandError, match="a row-level security policy can hide rows from this role"):
        migrate.downgrade(owner, "075")
    assert state(url) == before
    assert main(["check", "--url", owner]) == 0
    assert "note: a downgrade below 076 would be refused: a row-level security policy" in capsys.readouterr().err

    run_sql(owner, "ALTER TABLE device_state NO FORCE ROW LEVEL SECURITY")
    migrate.downgrade(owner, "075")
    assert len(rows_of(url, PARKED)) == 4


@pytest.mark.repeats
@partitioned.needs_one_piece("its partitions have the owner that they had")
def test_an_interrupted_downgrade_is_undone_by_the_next_upgrade_of_such_an_owner(
    url: str, server_role: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(operations, "_FIRST_PAUSE", 0.001)
    run_sql(url, "DROP FUNCTION f()")
    before = state(url)
    run_sql(url, f"ALTER TABLE device_state OWNER TO {server_role}; ALTER TABLE device_shadow_history OWNER TO {server_role}; ALTER SCHEMA public OWNER TO {server_role};"
                 f"ALTER TABLE alembic_version_iot_models OWNER TO {server_role}")  # fmt: skip
    migrate.downgrade(as_role(url, server_role), "076")
    with create_engine(url, poolclass=NullPool).connect() as reader:
        reader.execute(text("SELECT FROM device_state"))
        with pytest.raises(CommandError, match="no lock"):
            migrate.downgrade(as_role(url, server_role), "075", lock_timeout="10ms")
    owner = owned_under_forced_row_security(url, server_role)

    with pytest.raises(CommandError, match="a row-level security policy can hide rows"):
        migrate.downgrade(owner, "075")
    migrate.upgrade(owner)

    assert "a downgrade to 075 was interrupted: its trigger and its copies of the shadows are taken away" in caplog.text
    assert migrate.check(owner) == []
    assert PARKED not in tables_of(url)
    assert state(url)[1] == before[1]


@pytest.mark.parametrize("parker", ["the superuser", "the owner"])
@partitioned.needs_one_piece("its partitions have the owner that they had")
def test_an_upgrade_that_puts_shadows_back_by_an_owner_who_does_not_see_every_row_is_refused_before_any_change(
    url: str, server_role: str, parker: str
) -> None:
    downgrade(url, "075")
    owner = owned_under_forced_row_security(url, server_role)
    if parker == "the superuser":
        run_sql(url, f"ALTER TABLE {PARKED} OWNER TO CURRENT_USER; GRANT ALL ON {PARKED} TO {server_role}")
    before = state(url)

    with pytest.raises(CommandError) as caught:
        migrate.upgrade(owner)
    said = str(caught.value)
    assert "a row-level security policy can hide rows from this role" in said
    assert ("it does not own device_state_shadow_076" in said) == (parker == "the superuser")
    assert state(url) == before
    problems = migrate.check(owner)
    assert any("a row-level security policy can hide rows" in problem for problem in problems)

    run_sql(url, f"ALTER TABLE device_state NO FORCE ROW LEVEL SECURITY; ALTER TABLE {PARKED} OWNER TO {server_role}")
    migrate.upgrade(owner)
    assert PARKED not in tables_of(url)


@pytest.mark.repeats
@pytest.mark.parametrize("start", ["raw 075", "raw 076"])
@partitioned.needs_one_piece("its partitions have the owner that they had")
def test_an_owner_under_forced_row_security_adopts_a_table_because_that_reads_no_row(
    empty: str, server_role: str, start: str
) -> None:
    run_sql(empty, (RAW_075 if start == "raw 075" else RAW_076 + ";") + FLEET)
    owner = owned_under_forced_row_security(empty, server_role)

    migrate.upgrade(owner)

    assert migrate.check(owner) == []
    assert revision_of(empty) == HEAD


@pytest.mark.repeats
def test_a_role_without_the_rights_is_told_so_before_any_change(url: str, server_role: str) -> None:
    run_sql(url, f"GRANT ALL ON device_state, alembic_version_iot_models TO {server_role}")
    before = state(url)
    with pytest.raises(CommandError) as caught:
        migrate.downgrade(as_role(url, server_role), "075")
    assert f"role {server_role} may not migrate this database; nothing was changed" in str(caught.value)
    assert "  - it does not own device_state, whose owner is postgres\n" in str(caught.value)
    assert "  - it may not CREATE in schema public\n" in str(caught.value)
    assert state(url) == before


# All at once.


@pytest.mark.repeats
def test_all_that_stops_a_downgrade_is_in_one_error(url: str, server_role: str) -> None:
    owner = owned_under_forced_row_security(url, server_role)
    run_sql(url, f"CREATE VIEW v AS SELECT * FROM device_state; CREATE TABLE {PARKED} (note text)")
    with pytest.raises(CommandError) as caught:
        migrate.downgrade(owner, "075")
    for found in (
        "device_state_shadow_076 is not the table that this migration expects",
        "it does not own device_state_shadow_076",
        "can hide rows from this role",
        "view v (DROP VIEW v)",
    ):
        assert found in str(caught.value)


# Settings of the database.


@pytest.fixture
def set_database(empty: str) -> Iterator[str]:
    """A database whose settings a test may change."""
    yield str(make_url(empty).database)
    writing = make_url(empty).update_query_dict({"options": "-c default_transaction_read_only=off"})
    run_sql(
        writing.render_as_string(hide_password=False),
        f"ALTER DATABASE {make_url(empty).database} RESET ALL",
    )


@pytest.mark.repeats
@pytest.mark.parametrize(
    "setting",
    [
        "transaction_timeout = '150ms'",
        "idle_session_timeout = '150ms'",
        "default_transaction_isolation = 'repeatable read'",
        "default_transaction_isolation = 'serializable'",
        "default_transaction_deferrable = on",
        "quote_all_identifiers = on",
        "client_encoding = 'LATIN1'",
    ],
)
def test_a_default_of_the_database_does_not_stop_a_migration(
    empty: str, set_database: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = setting.split(" ", maxsplit=1)[0]
    if not run_sql(empty, f"SELECT 1 FROM pg_settings WHERE name = '{name}'"):
        pytest.skip(f"this PostgreSQL has no {name}")
    run_sql(empty, RAW_075 + FLEET, f"ALTER DATABASE {set_database} SET {setting}")
    run_sql(empty, "UPDATE device_state SET device_id = E'\\u00e9\\U0001F600' WHERE device_id = 'd1'")
    if "timeout" in name:
        _slow(monkeypatch)

    migrate.upgrade(empty)
    assert migrate.check(empty) == []
    run_sql(empty, "UPDATE device_state SET desired_version = 3")
    migrate.downgrade(empty, "075")
    assert run_sql(empty, f"SELECT count(*) FROM {PARKED}") == [(10,)]
    migrate.upgrade(empty)
    assert run_sql(empty, "SELECT sum(desired_version) FROM device_state") == [(30,)]


def _slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first look at an index take longer than the timeouts, inside a transaction and outside."""
    original = expectations.find_index
    slept = set()

    def slow(connection, table, name):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        status = connection.connection.driver_connection.info.transaction_status
        if status not in slept:
            slept.add(status)
            time.sleep(0.2)
        return original(connection, table, name)

    monkeypatch.setattr(indexes, "find_index", slow)
    monkeypatch.setattr(expectations, "find_index", slow)


def test_a_database_that_only_reads_is_refused_with_the_setting_that_says_so(empty: str, set_database: str) -> None:
    run_sql(empty, f"ALTER DATABASE {set_database} SET default_transaction_read_only = on")
    with pytest.raises(CommandError, match=r"this connection only reads \(default_transaction_read_only is on\)"):
        migrate.upgrade(empty)
    assert tables_of(empty) == set()


@pytest.mark.parametrize(("encoding", "refused"), [("SQL_ASCII", True), ("LATIN1", False)])
def test_a_database_with_another_encoding_than_utf8(
    empty: str, encoding: str, *, refused: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{make_url(empty).database}_{encoding.lower()}"
    admin = create_engine(empty, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(
            text(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LOCALE_PROVIDER libc LOCALE 'C'")
        )
    named = make_url(empty).set(database=name).update_query_dict({"client_encoding": "utf8"})
    other = named.render_as_string(hide_password=False)
    try:
        if refused:
            with pytest.raises(CommandError, match="the encoding of this database is SQL_ASCII"):
                migrate.upgrade(other)
            assert tables_of(other) == set()
            assert any("SQL_ASCII" in problem for problem in migrate.check(other))
        else:
            migrate.upgrade(other)
            assert main(["check", "--url", other]) == 0
            assert "note: the encoding of this database is LATIN1" in capsys.readouterr().err
    finally:
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


# The table and its rows.


@pytest.mark.repeats
@pytest.mark.parametrize("start", ["raw", "075"])
def test_a_not_null_that_is_not_valid_is_refused_with_the_validate_that_is_missing(empty: str, start: str) -> None:
    if run_sql(empty, "SELECT current_setting('server_version_num')::int < 180000") == [(True,)]:
        pytest.skip("PostgreSQL 18 is the first with NOT NULL ... NOT VALID")
    run_sql(empty, RAW_076 + ";" + FLEET)
    run_sql(empty, """
        ALTER TABLE device_state ALTER desired_state DROP NOT NULL;
        UPDATE device_state SET desired_state = NULL WHERE device_id = 'd1';
        ALTER TABLE device_state ADD CONSTRAINT later NOT NULL desired_state NOT VALID;
    """)  # fmt: skip
    if start == "075":
        run_sql(empty, "CREATE TABLE alembic_version_iot_models (version_num varchar(32) PRIMARY KEY);"
                       "INSERT INTO alembic_version_iot_models VALUES ('075')")  # fmt: skip
    before = state(empty)

    with pytest.raises(CommandError) as caught:
        migrate.upgrade(empty)

    fault = "its NOT NULL is NOT VALID: replace the NULLs, then ALTER TABLE device_state VALIDATE CONSTRAINT later"
    assert f"column desired_state may hold NULL, because {fault}" in str(caught.value)
    assert state(empty) == before
    assert any(fault in problem for problem in migrate.check(empty))

    run_sql(empty, "UPDATE device_state SET desired_state = '{}' WHERE desired_state IS NULL;"
                   "ALTER TABLE device_state VALIDATE CONSTRAINT later")  # fmt: skip
    migrate.upgrade(empty)
    assert migrate.check(empty) == []


@pytest.mark.repeats
@pytest.mark.parametrize("column", ["tenant_id", "site_id", "device_id"])
@partitioned.needs_one_piece("PostgreSQL does not do this to it")
def test_a_nondeterministic_collation_of_an_id_is_refused(empty: str, column: str) -> None:
    # Made without ICU, which not every server has: only the catalog says what it is.
    run_sql(empty, """
        CREATE COLLATION loose FROM "C";
        UPDATE pg_collation SET collisdeterministic = false WHERE collname = 'loose';
    """, RAW_075 + FLEET)  # fmt: skip
    run_sql(empty, f"ALTER TABLE device_state ALTER {column} TYPE text COLLATE loose")
    before = state(empty)

    with pytest.raises(CommandError, match=f"column {column} has the nondeterministic collation loose"):
        migrate.upgrade(empty)
    assert state(empty) == before

    mend = f'ALTER TABLE device_state ALTER {column} TYPE text COLLATE "default"'
    assert any(mend in problem for problem in migrate.check(empty))
    run_sql(empty, mend)
    migrate.upgrade(empty)
    run_sql(empty, f"ALTER TABLE device_state ALTER {column} TYPE text COLLATE loose")
    (problem,) = migrate.check(empty)
    assert "nondeterministic" in problem


def test_rows_that_are_no_shadows_are_counted_with_the_statement_that_mends_them(
    empty: str, caplog: pytest.LogCaptureFixture
) -> None:
    run_sql(empty, RAW_076 + ";" + FLEET, """
        UPDATE device_state SET desired_state = 'null', desired_version = 4 WHERE device_id IN ('d1', 'd2');
        UPDATE device_state SET reported_state = '[]' WHERE device_id = 'd3';
        UPDATE device_state SET reported_version = 999 WHERE device_id IN ('d4', 'd5', 'd6');
        UPDATE device_state SET desired_version = 1 WHERE device_id = 'd6';
    """)  # fmt: skip
    before = rows_of(empty, columns=SHADOW_COLUMNS)

    migrate.upgrade(empty)

    assert rows_of(empty, columns=SHADOW_COLUMNS) == before
    said = [
        "2 rows of device_state are no shadows, because desired_state is no JSON object",
        "1 rows of device_state are no shadows, because reported_state is no JSON object",
        "3 rows of device_state are no shadows, because reported_version is greater than desired_version",
    ]
    problems = migrate.check(empty)
    assert [problem.split(":")[0] for problem in problems] == said
    assert all(sentence in caplog.text for sentence in said)

    for problem in problems:
        run_sql(empty, problem.partition(": ")[2])
    assert migrate.check(empty) == []
    assert run_sql(
        empty,
        "SELECT device_id, desired_state, desired_version, reported_version FROM device_state"
        " WHERE device_id IN ('d1', 'd4', 'd6') ORDER BY 1",
    ) == [("d1", {}, 5, 0), ("d4", {}, 0, 0), ("d6", {}, 1, 0)]


def test_of_a_table_that_is_too_large_to_look_at_a_part_is_looked_at(
    at_head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_sql(at_head, FLEET, "UPDATE device_state SET reported_version = 9")
    original = faulty_rows._counts  # noqa: SLF001

    def slow(connection, source, *, limit):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        return original(connection, f"{source}, pg_sleep(0.3)" if limit != "0" else source, limit=limit)

    monkeypatch.setattr(faulty_rows, "_counts", slow)
    monkeypatch.setattr(faulty_rows, "_SECONDS", 0.1)
    monkeypatch.setattr(faulty_rows, "_ROWS", 4)
    (problem,) = migrate.check(at_head)
    assert problem.startswith(
        "4 rows among the 4 rows of device_state that were looked at (the whole table takes longer than 0.1 s)"
    )


@pytest.mark.repeats
def test_a_row_fault_of_a_table_without_shadows_is_not_looked_for(raw_fleet: str) -> None:
    upgrade(raw_fleet, "075")
    assert len(migrate.check(raw_fleet)) == 1
    run_sql(raw_fleet, ADD_SHADOW, SHADOWS)
    assert len(migrate.check(raw_fleet)) == 1
    assert f"trigger {TRIGGER}" not in migrate.check(raw_fleet)[0]


# Locks.


@pytest.mark.repeats
def test_a_prepared_transaction_that_holds_the_table_is_named_with_what_ends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(operations, "_FIRST_PAUSE", 0.01)
    with throwaway.postgres(settings={"max_prepared_transactions": "2"}) as server:
        run_sql(server.url, RAW_075, FLEET)
        migrate.upgrade(server.url, "075")
        run_sql(server.url, "UPDATE device_state SET status = 'STALE'; PREPARE TRANSACTION 'it''s'")

        with pytest.raises(CommandError) as caught:
            migrate.upgrade(server.url, lock_timeout="10ms")

        assert (
            "It is held by: the prepared transaction 'it''s' (which stays until ROLLBACK PREPARED 'it''s' "
            "or COMMIT PREPARED 'it''s', for "
        ) in str(caught.value)
        engine = create_engine(server.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql("ROLLBACK PREPARED 'it''s'")
        # The deployers' lock, too.
        run_sql(server.url, f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK}); PREPARE TRANSACTION 'deployer'")
        monkeypatch.setattr(deployers, "_MOST_SECONDS", 0.1)
        with pytest.raises(CommandError, match="the prepared transaction 'deployer', which stays until ROLLBACK"):
            migrate.upgrade(server.url)
        with engine.connect() as connection:
            connection.exec_driver_sql("ROLLBACK PREPARED 'deployer'")
        migrate.upgrade(server.url)
        assert migrate.check(server.url) == []


@pytest.mark.repeats
def test_the_role_that_may_set_it_makes_autovacuum_leave_at_once(url: str, server_role: str) -> None:
    owner = as_role(url, server_role)
    assert seen_by_a_migration(url) == "20ms"
    run_sql(url, f"ALTER TABLE device_state OWNER TO {server_role}; ALTER TABLE device_shadow_history OWNER TO {server_role}; ALTER TABLE alembic_version_iot_models OWNER TO {server_role};"
                 f"ALTER SCHEMA public OWNER TO {server_role}")  # fmt: skip
    assert seen_by_a_migration(owner) == "1s"
    run_sql(url, f"GRANT SET ON PARAMETER deadlock_timeout TO {server_role}")
    try:
        assert seen_by_a_migration(owner) == "20ms"
    finally:
        run_sql(url, f"REVOKE SET ON PARAMETER deadlock_timeout FROM {server_role}")


def seen_by_a_migration(url: str) -> str:
    """`deadlock_timeout` in the session of a migration."""
    return runner.ask(url, {}, lambda _, connection: str(connection.scalar(text("SHOW deadlock_timeout"))))


@pytest.mark.repeats
def test_check_says_what_a_grant_would_gain(url: str, server_role: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--url", url]) == 0
    assert "deadlock_timeout" not in capsys.readouterr().err
    run_sql(
        url,
        f"ALTER TABLE device_state OWNER TO {server_role}; GRANT SELECT ON alembic_version_iot_models TO {server_role};"
        f"ALTER SCHEMA public OWNER TO {server_role}",
    )
    assert main(["check", "--url", as_role(url, server_role)]) == 0
    assert f"GRANT SET ON PARAMETER deadlock_timeout TO {server_role} makes that 20ms" in capsys.readouterr().err


@pytest.mark.repeats
@pytest.mark.parametrize("pool_timeout", [5, None])
@partitioned.needs_one_piece("each partition has a build of its own")
def test_the_progress_of_an_index_build_needs_no_room_in_the_pool(
    raw_fleet: str, pool_timeout: float | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(indexes, "_PROGRESS_EVERY", 0.05)
    migrate.upgrade(raw_fleet, "076")
    engine = create_engine(raw_fleet, pool_size=1, max_overflow=0, pool_timeout=pool_timeout)
    with ThreadPoolExecutor(1) as threads, caplog.at_level(logging.INFO):
        with create_engine(raw_fleet, poolclass=NullPool).connect() as writer:
            writer.execute(text("UPDATE device_state SET status = 'STALE' WHERE device_id = 'd2'"))
            migrating = threads.submit(migrate.upgrade, engine)
            deadline = time.monotonic() + 20
            while "waiting for the transaction of pid" not in caplog.text and time.monotonic() < deadline:
                time.sleep(0.01)
        began = time.monotonic()
        migrating.result(timeout=30)
    assert time.monotonic() - began < 4
    assert "waiting for the transaction of pid" in caplog.text
    engine.dispose()


# What a team's application does.


@pytest.mark.repeats
def test_check_does_not_demand_the_column_of_a_class_that_extends_ours(at_head: str) -> None:
    program = (
        "import sys\n"
        "from sqlalchemy.orm import Mapped\n"
        "from iot_models import DeviceState\n"
        "class Machine(DeviceState):\n"
        "    firmware: Mapped[str | None]\n"
        "    __mapper_args__ = {'polymorphic_identity': None}\n"
        "from iot_models import migrate\n"
        "assert 'firmware' in DeviceState.__table__.columns\n"
        "print(migrate.check(sys.argv[1]))\n"
    )
    run = subprocess.run([sys.executable, "-c", program, at_head], check=False, capture_output=True, text=True)
    assert (run.stdout, run.returncode) == ("[]\n", 0), run.stderr


def test_the_message_about_another_table_names_a_help_that_is_installed(
    empty: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_sql(empty, RAW_075, "ALTER TABLE device_state DROP state")
    with pytest.raises(CommandError, match=r"python -m iot_models\.migrate upgrade --help shows how"):
        migrate.upgrade(empty)
    with pytest.raises(SystemExit, match="0"):
        main(["upgrade", "--help"])
    assert "column X is missing" in capsys.readouterr().out


# The look ahead itself


def test_a_revision_refuses_a_table_by_itself_where_nothing_looked_ahead(at_head: str) -> None:
    with connected(at_head) as connection:
        operation = Operations(MigrationContext.configure(connection))
        with pytest.raises(CommandError, match=r"(?s)nothing was changed.*it does not exist"):
            operation.iot_models_expect_table("nowhere", required={"a": ("text", True, None)})  # type: ignore[attr-defined]


def test_a_table_that_is_gone_is_said_before_a_downgrade(at_head: str) -> None:
    run_sql(at_head, "DROP TABLE device_state")
    with pytest.raises(CommandError, match="it does not exist"):
        migrate.downgrade(at_head, "075")
    assert revision_of(at_head) == HEAD


def test_nothing_stops_a_migration_that_does_nothing(at_head: str) -> None:
    with connected(at_head) as connection:
        assert obstacles(connection, Plan(scripts=[], upgrade=True)) == []


def test_other_errors_than_a_lock_or_a_timeout_are_passed_on(at_head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with connected(at_head) as connection, pytest.raises(DBAPIError, match="nowhere"):
        faulty_rows._counts(connection, "nowhere", limit="0")  # noqa: SLF001
    monkeypatch.setattr(findings, "obstacles", lambda connection, _: connection.execute(text("SELECT 1 / 0")))
    with pytest.raises(DBAPIError, match="division by zero"):
        migrate.check(at_head)


def test_an_error_of_the_database_while_it_looks_ahead_is_passed_on(
    raw_fleet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(connection: Connection, _plan: object) -> None:
        connection.execute(text("SELECT 1 / 0"))

    monkeypatch.setattr(environment, "obstacles", fail)
    with pytest.raises(DBAPIError, match="division by zero"):
        migrate.upgrade(raw_fleet)
