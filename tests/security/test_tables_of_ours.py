"""What others can make of our own tables: the revision's, and those in which a rollback parks what it takes away."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import psycopg
import pytest
from alembic.util import CommandError
from sqlalchemy import make_url, text

from iot_models import migrate, tenancy
from iot_models._migrations.strangers import VERSION_TABLE
from tests.databases.backends import connected
from tests.databases.tenants import ON_HISTORY, PRIVILEGES
from tests.migrations.raw_sql import FLEET, SHADOWS, VERSIONS, psql, revision_of, rows_of, run_sql, tables_of
from tests.security.hostile import TELL, calls

if TYPE_CHECKING:
    from collections.abc import Callable

HISTORY = "device_shadow_history"
PARKED_HISTORY = f"{HISTORY}_078"
PARKED_REFUSALS = "device_state_refusals_079"
PARKED = "device_state_shadow_076"


@pytest.fixture
def neighbour(attacker: str, database: str) -> str:
    """The attacker has a schema of its own, and may create in no other."""
    run_sql(database, f"REVOKE CREATE ON SCHEMA public FROM PUBLIC; CREATE SCHEMA nb AUTHORIZATION {role_of(attacker)}")
    return attacker


def role_of(url: str) -> str:
    return str(make_url(url).username)


def at(database: str, revision: str) -> str:
    """The database at that revision, with shadows, a version and a refusal; what a rollback parks is parked."""
    migrate.upgrade(database)
    run_sql(database, FLEET, SHADOWS, VERSIONS)
    migrate.downgrade(database, revision)
    return database


# A table whose trigger runs, before PostgreSQL 18, as whoever changes what the table refers to.
SPY = f"""
    CREATE TABLE nb.spy ({{columns}});
    CREATE FUNCTION nb.tell() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {TELL}; RETURN NULL; END $$;
    CREATE TRIGGER tell AFTER UPDATE OR DELETE ON nb.spy FOR EACH ROW EXECUTE FUNCTION nb.tell();
    INSERT INTO nb.spy VALUES ({{row}});
"""
REFERS = """
    ALTER TABLE nb.spy ADD CONSTRAINT refers FOREIGN KEY ({key}) REFERENCES public.{table}
      ON DELETE CASCADE ON UPDATE CASCADE;
"""
DEVICE = {"columns": "t text, d text", "row": "'globex', 'd1'", "key": "t, d"}
VERSION = {"columns": "v varchar(32)", "row": "'078'", "key": "v"}
SPIED = {VERSION_TABLE: ("078", VERSION), PARKED_REFUSALS: ("078", DEVICE), PARKED: ("075", DEVICE)}


@pytest.mark.parametrize("table", SPIED)
def test_a_foreign_key_that_was_made_while_others_had_the_right_is_refused_by_name(
    database: str, neighbour: str, table: str
) -> None:
    revision, spy = SPIED[table]
    at(database, revision)
    run_sql(database, f"GRANT REFERENCES ON {table} TO {role_of(neighbour)}")
    run_sql(neighbour, SPY.format(**spy), REFERS.format(table=table, **spy))
    run_sql(database, f"REVOKE ALL ON {table} FROM {role_of(neighbour)}")

    for command in (migrate.upgrade, migrate.check, lambda url: migrate.downgrade(url, "075")):
        with pytest.raises(CommandError, match=r"constraint refers on table nb.spy, which a table of ours does not"):
            command(database)
    assert psql(database, migrate.sql(f"{revision}:head")).returncode != 0

    assert calls(database) == []
    assert revision_of(database) == revision


def test_a_foreign_key_that_is_committed_while_a_migration_waits_is_refused(
    database: str, neighbour: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A right to one column is enough."""
    migrate.upgrade(database, "078")
    run_sql(database, f"GRANT REFERENCES (version_num) ON {VERSION_TABLE} TO {role_of(neighbour)}")
    run_sql(neighbour, SPY.format(**VERSION))
    with connected(neighbour) as connection, ThreadPoolExecutor(1) as pool:
        connection.execute(text(REFERS.format(table=VERSION_TABLE, **VERSION)))
        upgrading = pool.submit(migrate.upgrade, database, lock_timeout="200ms")
        while f"{VERSION_TABLE} is in use" not in caplog.text:
            assert not upgrading.done()
        connection.commit()
        with pytest.raises(CommandError, match=r"constraint refers on table nb\.spy"):
            upgrading.result()
    assert calls(database) == []
    assert revision_of(database) == "078"


def test_isolation_is_promised_to_no_role_whose_foreign_key_runs_its_code_in_the_next_migration(
    database: str, neighbour: str
) -> None:
    migrate.upgrade(database, "078")
    app = role_of(neighbour)
    run_sql(database, f"GRANT {PRIVILEGES} ON device_state TO {app}; GRANT {ON_HISTORY} ON {HISTORY} TO {app};"
                      f"GRANT REFERENCES ON {VERSION_TABLE} TO {app}")  # fmt: skip
    run_sql(neighbour, SPY.format(**VERSION), REFERS.format(table=VERSION_TABLE, **VERSION))
    run_sql(database, f"REVOKE REFERENCES ON {VERSION_TABLE} FROM {app}")

    with connected(database) as connection:
        with pytest.raises(ValueError, match="the foreign key refers on a table of ours runs the code of others"):
            tenancy.enable(connection, app)
        connection.rollback()
        run_sql(neighbour, "ALTER TABLE nb.spy DROP CONSTRAINT refers")
        tenancy.enable(connection, app)
        assert tenancy.check(connection, app) == []


def test_what_is_parked_is_not_put_back_while_others_may_make_triggers_on_a_child_of_the_table(
    database: str, neighbour: str
) -> None:
    at(database, "075")
    run_sql(database, f"CREATE TABLE child () INHERITS (device_state); GRANT ALL ON child TO {role_of(neighbour)}")

    with pytest.raises(CommandError, match=f"REVOKE TRIGGER ON child FROM {role_of(neighbour)}"):
        migrate.upgrade(database)

    run_sql(database, f"REVOKE TRIGGER ON child FROM {role_of(neighbour)}")
    migrate.upgrade(database)
    assert run_sql(database, "SELECT count(*) FROM device_state WHERE desired_version = 7") == [(3,)]


@pytest.mark.parametrize(("revision", "parked"), [("075", PARKED), ("078", PARKED_REFUSALS)])
def test_printed_sql_puts_nothing_back_while_others_may_make_triggers(
    database: str, neighbour: str, revision: str, parked: str
) -> None:
    """One that is made while the index is built would be committed while the UPDATE waits for it."""
    at(database, revision)
    before = rows_of(database, parked)
    run_sql(database, f"GRANT TRIGGER ON device_state TO {role_of(neighbour)}")
    run_sql(
        neighbour, f"CREATE FUNCTION nb.tell() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {TELL}; RETURN NEW; END $$"
    )
    before_it, built, rest = re.split("(CREATE INDEX CONCURRENTLY [^;]*;)", migrate.sql(f"{revision}:head"), maxsplit=1)
    # A superuser's function is no stranger's: only the right tells what could come.
    planted = (
        f"SET ROLE {role_of(neighbour)}; CREATE TRIGGER t BEFORE UPDATE ON device_state FOR EACH ROW"
        " EXECUTE FUNCTION suppress_redundant_updates_trigger(); RESET ROLE;"
    )

    done = psql(database, before_it + built + planted + rest)

    assert done.returncode == 3
    assert f"REVOKE TRIGGER ON device_state FROM {role_of(neighbour)}" in done.stderr
    assert rows_of(database, parked) == before
    run_sql(database, f"REVOKE TRIGGER ON device_state FROM {role_of(neighbour)}")


PLANTED = f"INSERT INTO {PARKED_HISTORY} VALUES ('globex', 'd1', 8, '{{\"planted\": 1}}', now(), 'anna', 'why', 'r-1')"


def test_the_parked_history_is_its_owners_alone(database: str, neighbour: str) -> None:
    at(database, "077")
    everything = f"GRANT ALL ON {PARKED_HISTORY} TO {role_of(neighbour)}"

    run_sql(database, everything)
    assert run_sql(neighbour, f"SELECT * FROM {PARKED_HISTORY}") == []
    migrate.upgrade(database, "077")
    for statement in (f"SELECT * FROM {PARKED_HISTORY}", f"TRUNCATE {PARKED_HISTORY}", PLANTED):
        with pytest.raises(psycopg.Error, match="permission denied"):
            run_sql(neighbour, statement)

    run_sql(database, everything)
    migrate.upgrade(database)
    assert run_sql(database, f"SELECT device_id, desired_version FROM {HISTORY}") == [("d1", 7)]
    for statement in (f"SELECT * FROM {HISTORY}", PLANTED.replace(PARKED_HISTORY, HISTORY)):
        with pytest.raises(psycopg.Error, match="permission denied"):
            run_sql(neighbour, statement)


def test_a_role_that_is_limited_while_the_history_is_parked_reads_none_of_it(database: str, neighbour: str) -> None:
    at(database, "077")
    app = role_of(neighbour)
    run_sql(database, f"GRANT {PRIVILEGES} ON ALL TABLES IN SCHEMA public TO {app}")
    with (
        connected(database) as connection,
        pytest.raises(ValueError, match=rf"REVOKE DELETE, INSERT, SELECT, UPDATE ON {PARKED_HISTORY} FROM {app}"),
    ):
        tenancy.enable(connection, app)
    assert run_sql(neighbour, f"SET app.tenant_id = 'acme'; SELECT * FROM {PARKED_HISTORY}") == []


@pytest.mark.parametrize("secured", [False, True])
@pytest.mark.parametrize("printed", [False, True])
def test_a_history_comes_back_with_the_row_security_that_it_had(
    database: str, neighbour: str, *, secured: bool, printed: bool
) -> None:
    migrate.upgrade(database)
    run_sql(database, FLEET, SHADOWS, VERSIONS, f"GRANT {PRIVILEGES} ON device_state TO {role_of(neighbour)}")
    if secured:
        with connected(database) as connection:
            run_sql(database, f"GRANT {ON_HISTORY} ON {HISTORY} TO {role_of(neighbour)}")
            tenancy.enable(connection, role_of(neighbour))
            connection.commit()
    asked = (
        f"SELECT relrowsecurity, pg_catalog.obj_description(oid, 'pg_class') FROM pg_class WHERE relname = '{HISTORY}'"
    )
    before = rows_of(database, HISTORY), run_sql(database, asked)

    if printed:
        for script in (migrate.sql("head:077"), migrate.sql("077:head")):
            assert psql(database, script).returncode == 0
            if PARKED_HISTORY in tables_of(database):
                assert run_sql(database, asked.replace(HISTORY, PARKED_HISTORY))[0][0] is True
    else:
        migrate.downgrade(database, "077")
        assert run_sql(database, asked.replace(HISTORY, PARKED_HISTORY))[0][0] is True
        migrate.upgrade(database)

    assert (rows_of(database, HISTORY), run_sql(database, asked)) == before
    bound = "SET app.tenant_id = 'acme';" if secured else ""
    assert run_sql(neighbour, f"{bound} SELECT count(*) FROM {HISTORY}") == [(0 if secured else 1,)]


def migrated(database: str, *, printed: bool) -> None:
    if printed:
        assert psql(database, migrate.sql("077:head")).returncode == 0
    else:
        migrate.upgrade(database)


@pytest.fixture
def reporter(database: str, neighbour: str) -> str:
    """The neighbour may read all tenants' rows, history included; then the rollback has parked the history."""
    migrate.upgrade(database)
    reporter = role_of(neighbour)
    run_sql(database, FLEET, SHADOWS, VERSIONS, f"GRANT {PRIVILEGES} ON device_state TO {reporter};"
                      f"GRANT {ON_HISTORY} ON {HISTORY} TO {reporter}")  # fmt: skip
    for table in ("device_state", HISTORY):
        run_sql(database, f"CREATE POLICY reports ON {table} TO {reporter} USING (true);"
                          f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")  # fmt: skip
    assert run_sql(neighbour, f"SELECT tenant_id FROM {HISTORY}") == [("globex",)]
    migrate.downgrade(database, "077")
    return reporter


@pytest.mark.parametrize("printed", [False, True])
def test_a_policy_that_was_dropped_during_a_rollback_does_not_come_back_with_the_history(
    database: str, neighbour: str, reporter: str, caplog: pytest.LogCaptureFixture, *, printed: bool
) -> None:
    run_sql(database, "DROP POLICY reports ON device_state")
    with connected(database) as connection:
        tenancy.enable(connection, reporter)
        connection.commit()
        assert tenancy.check(connection, reporter) == []

    migrated(database, printed=printed)

    assert run_sql(neighbour, f"SELECT * FROM {HISTORY}") == []
    assert run_sql(neighbour, f"SET app.tenant_id = 'acme'; SELECT * FROM {HISTORY}") == []
    assert run_sql(neighbour, f"SET app.tenant_id = 'globex'; SELECT tenant_id FROM {HISTORY}") == [("globex",)]
    with connected(database) as connection:
        assert tenancy.check(connection, reporter) == []
    assert "policies that the parked history had are gone" not in caplog.text  # the owner dropped it on device_state


@pytest.mark.parametrize("printed", [False, True])
def test_who_may_read_all_data_reads_no_parked_history(
    database: str, neighbour: str, caplog: pytest.LogCaptureFixture, *, printed: bool
) -> None:
    """That right is a membership, which no REVOKE on a table takes away: a policy would let it see the rows."""
    migrate.upgrade(database)
    reporter = role_of(neighbour)
    run_sql(database, FLEET, SHADOWS, VERSIONS, f"GRANT pg_read_all_data TO {reporter}")
    for table in ("device_state", HISTORY):
        run_sql(database, f"CREATE POLICY reports ON {table} TO {reporter} USING (true);"
                          f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY; ALTER TABLE {table} FORCE ROW LEVEL SECURITY")  # fmt: skip
    run_sql(database, f"CREATE POLICY audits ON {HISTORY} TO {reporter} USING (actor = 'anna')")

    warned = ""
    if printed:
        done = psql(database, migrate.sql("head:077"))
        assert done.returncode == 0
        warned = done.stderr
    else:
        migrate.downgrade(database, "077")
        warned = caplog.text
    run_sql(database, "DROP POLICY reports ON device_state")

    assert run_sql(neighbour, f"SELECT * FROM {PARKED_HISTORY}") == []
    assert run_sql(database, "SELECT count(*) FROM pg_policy") == [(0,)]
    assert run_sql(database, f"SELECT device_id, desired_version FROM {PARKED_HISTORY}") == [("d1", 7)]
    assert "audits" in warned
    assert "reports" not in warned

    migrated(database, printed=printed)
    assert run_sql(neighbour, f"SELECT * FROM {HISTORY}") == []
    run_sql(database, f"REVOKE pg_read_all_data FROM {reporter}")


@pytest.mark.parametrize("printed", [False, True])
def test_a_role_that_was_limited_during_a_rollback_writes_the_history_that_comes_back(
    database: str, neighbour: str, reporter: str, *, printed: bool
) -> None:
    run_sql(database, f"DROP POLICY reports ON device_state; ALTER TABLE device_state FORCE ROW LEVEL SECURITY;"
                      f"CREATE POLICY mine ON device_state TO {reporter} USING (tenant_id = 'globex')")  # fmt: skip

    migrated(database, printed=printed)

    write = f"INSERT INTO {HISTORY} VALUES ('{{}}', 'd1', 8, '{{{{}}}}', now())"
    run_sql(neighbour, write.format("globex"))
    with pytest.raises(psycopg.Error, match="violates row-level security policy"):
        run_sql(neighbour, write.format("acme"))


def test_row_level_security_that_was_switched_off_during_a_rollback_is_off_for_the_history_too(
    database: str, neighbour: str, reporter: str
) -> None:
    run_sql(database, "DROP POLICY reports ON device_state; ALTER TABLE device_state DISABLE ROW LEVEL SECURITY;"
                      f"REVOKE DELETE ON device_state FROM {reporter}")  # fmt: skip

    migrate.upgrade(database)

    assert run_sql(database, f"SELECT relrowsecurity FROM pg_class WHERE relname = '{HISTORY}'") == [(False,)]
    run_sql(neighbour, f"INSERT INTO {HISTORY} VALUES ('acme', 'd1', 8, '{{}}', now())")
    with pytest.raises(psycopg.Error, match="permission denied"):
        run_sql(neighbour, f"DELETE FROM {HISTORY}")


@pytest.mark.parametrize("forced", ["FORCE", "NO FORCE"])
def test_a_history_that_was_made_meanwhile_gets_all_that_was_parked_however_it_was_shut(
    database: str, owners: str, forced: str
) -> None:
    migrate.upgrade(owners)
    run_sql(owners, FLEET, SHADOWS, VERSIONS, f"ALTER TABLE {HISTORY} {forced} ROW LEVEL SECURITY")
    migrate.downgrade(owners, "077")
    run_sql(
        owners,
        f"CREATE TABLE {HISTORY} (LIKE {PARKED_HISTORY} INCLUDING DEFAULTS, PRIMARY KEY (tenant_id, device_id, desired_version))",
    )

    migrate.upgrade(owners)

    assert run_sql(database, f"SELECT device_id, desired_version FROM {HISTORY}") == [("d1", 7)]


@pytest.mark.parametrize("printed", [False, True])
def test_a_trigger_that_is_made_on_another_history_while_the_parked_one_goes_into_it_is_not_called(
    database: str, neighbour: str, *, printed: bool
) -> None:
    at(database, "077")
    run_sql(database, f"CREATE TABLE {HISTORY} (LIKE {PARKED_HISTORY} INCLUDING DEFAULTS, PRIMARY KEY (tenant_id, device_id, desired_version));"
                      f"GRANT ALL ON {HISTORY} TO {role_of(neighbour)}")  # fmt: skip
    run_sql(
        neighbour, f"CREATE FUNCTION nb.tell() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {TELL}; RETURN NEW; END $$"
    )
    waits = f"SELECT count(*) FROM pg_locks WHERE relation = '{HISTORY}'::regclass AND NOT granted"
    with connected(neighbour) as connection, ThreadPoolExecutor(1) as pool:
        connection.execute(text(f"CREATE TRIGGER t BEFORE INSERT ON {HISTORY} FOR EACH ROW EXECUTE FUNCTION nb.tell()"))
        run: Callable[[], object]
        run = (lambda: psql(database, migrate.sql("077:078"))) if printed else (lambda: migrate.upgrade(database))
        done = pool.submit(run)
        while run_sql(database, waits) == [(0,)]:
            assert not done.done()
        connection.commit()
        if printed:
            assert "function nb.tell() of role" in str(done.result())
        else:
            with pytest.raises(CommandError, match=r"function nb\.tell\(\) of role"):
                done.result()
    assert calls(database) == []
    assert revision_of(database) == "077"


OWN_POLICY = """
    CREATE FUNCTION public.mine(anyelement) RETURNS boolean STABLE LANGUAGE sql AS
      $$ SELECT $1::text = current_setting('app.tenant_id', true) $$;
    ALTER TABLE device_state ENABLE ROW LEVEL SECURITY;
    CREATE POLICY p ON device_state USING (mine(tenant_id));
"""


@pytest.mark.parametrize("printed", [False, True])
def test_the_copy_of_a_policy_calls_no_function_of_a_strangers_that_matches_better(
    database: str, attacker: str, *, printed: bool
) -> None:
    migrate.upgrade(database, "077")
    run_sql(database, OWN_POLICY)
    takes = f"LANGUAGE plpgsql AS $$ BEGIN {TELL}; RETURN true; END $$"
    run_sql(attacker, f"CREATE FUNCTION public.mine(text) RETURNS boolean {takes}")

    if printed:
        assert "function mine(text) of role" in psql(database, migrate.sql("077:078")).stderr
    else:
        with pytest.raises(CommandError, match=r"function mine\(text\) of role"):
            migrate.upgrade(database, "078")
    assert revision_of(database) == "077"
    assert HISTORY not in tables_of(database)

    run_sql(attacker, "DROP FUNCTION public.mine(text)")
    migrate.upgrade(database, "078")
    assert run_sql(database, "SELECT count(*) FROM pg_policy") == [(2,)]


def test_a_policy_over_a_column_of_the_teams_is_not_copied_to_a_column_of_the_same_name(
    database: str, neighbour: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The history has an `actor` of its own, which is mostly NULL."""
    migrate.upgrade(database, "077")
    run_sql(
        database,
        FLEET,
        SHADOWS,
        f"""
        ALTER TABLE device_state ADD actor text; GRANT SELECT ON device_state TO {role_of(neighbour)};
        UPDATE device_state SET actor = 'other';
        ALTER TABLE device_state ENABLE ROW LEVEL SECURITY;
        CREATE POLICY own ON device_state USING (actor IS NULL);
        CREATE POLICY tenants ON device_state USING (tenant_id = current_setting('app.tenant_id', true));
        """,
    )

    migrate.upgrade(database)
    run_sql(database, VERSIONS)

    assert run_sql(neighbour, f"SELECT * FROM {HISTORY}") == []
    assert run_sql(neighbour, f"SET app.tenant_id = 'globex'; SELECT device_id FROM {HISTORY}") == [("d1",)]
    assert "own. Create such policies there" in caplog.text


def test_who_may_read_one_column_does_not_read_the_history(database: str, neighbour: str) -> None:
    migrate.upgrade(database, "077")
    run_sql(
        database,
        FLEET,
        SHADOWS,
        f"GRANT SELECT (desired_state), UPDATE (desired_state) ON device_state TO {role_of(neighbour)}",
    )

    migrate.upgrade(database)

    with pytest.raises(psycopg.Error, match="permission denied"):
        run_sql(neighbour, f"SELECT tenant_id, device_id, actor FROM {HISTORY}")
    run_sql(neighbour, f"INSERT INTO {HISTORY} VALUES ('globex', 'd1', 7, '{{}}')")


TAKEN = [
    ("077", "078", HISTORY),
    ("077", "078", "idx_device_shadow_history_written"),
    ("079", "078", PARKED_REFUSALS),
    ("078", "077", PARKED_HISTORY),
    ("076", "075", PARKED),
    (None, "075", VERSION_TABLE),
    (None, "075", "device_state"),
]


@pytest.mark.parametrize(("start", "target", "name"), TAKEN)
def test_who_takes_a_name_in_an_open_transaction_is_named(
    database: str, attacker: str, start: str | None, target: str, name: str
) -> None:
    down = start is not None and target < start
    if start:
        at(database, start) if down else migrate.upgrade(database, start)
    with connected(attacker, connect_args={"application_name": "the attacker"}) as connection:
        connection.execute(text(f"CREATE TABLE public.{name} (a int)"))
        pid = connection.scalar(text("SELECT pg_backend_pid()"))
        migration = migrate.downgrade if down else migrate.upgrade
        with pytest.raises(
            CommandError, match=rf"(?s){name}.*pid {pid}, role {role_of(attacker)}, application the att"
        ):
            migration(database, target, lock_timeout="200ms")
        connection.rollback()
    migration(database, target)
    assert revision_of(database) == target


@pytest.mark.parametrize("kind", ["CREATE TABLE {} ()", "CREATE SEQUENCE {}", "CREATE VIEW {} AS SELECT 1"])
@pytest.mark.parametrize("name", ["idx_device_shadow_history_request", "idx_device_shadow_history_written"])
def test_the_name_of_an_index_of_the_history_that_a_stranger_took_is_refused(
    database: str, attacker: str, name: str, kind: str
) -> None:
    """Without the one, every write with a request_id would fail."""
    migrate.upgrade(database, "077")
    run_sql(attacker, kind.format(name))

    with pytest.raises(CommandError, match=f"the name of index {name} is taken by (table|sequence|view) {name}"):
        migrate.upgrade(database)
    assert any(f"the name of index {name} is taken by" in problem for problem in migrate.check(database))
    printed = psql(database, migrate.sql("077:078"))
    assert f"the name of index {name} is taken" in printed.stderr
    assert revision_of(database) == "077"


def test_check_says_how_a_missing_index_of_the_history_is_made(database: str, attacker: str) -> None:
    """An upgrade before this was refused could leave it out."""
    name = "idx_device_shadow_history_request"
    migrate.upgrade(database)
    run_sql(database, f"DROP INDEX {name}")
    run_sql(attacker, f"CREATE TABLE {name} ()")
    (taken,) = migrate.check(database)
    assert f"its name is taken by table {name} of role {role_of(attacker)}" in taken

    run_sql(attacker, f"DROP TABLE {name}")
    (missing,) = migrate.check(database)
    statement = re.search(r"CREATE UNIQUE INDEX CONCURRENTLY .*", missing)
    assert statement
    with connected(database, isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(statement.group())
    assert migrate.check(database) == []


@pytest.mark.parametrize(("name", "target"), [(PARKED_REFUSALS, "078"), (PARKED_HISTORY, "077")])
def test_a_type_with_the_name_of_what_is_parked_is_named(database: str, attacker: str, name: str, target: str) -> None:
    at(database, "079")
    run_sql(attacker, f"CREATE TYPE {name} AS ENUM ('a')")
    with pytest.raises(CommandError, match=f"a table's name is taken by type {name}"):
        migrate.downgrade(database, target)
