"""Roles for which isolation would not hold: refused, with every reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from iot_models import tenancy
from iot_models._migrations.command_line import main
from tests.databases import partitioned
from tests.databases.devices import TENANT
from tests.databases.tenants import OFF, run, security, tenants_for

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

OTHER_KEY = partitioned.needs_one_piece("the type of what it is partitioned by is never altered")
WAYS = {
    "it is a superuser": ["ALTER ROLE {app} SUPERUSER"],
    "it has BYPASSRLS": ["ALTER ROLE {app} BYPASSRLS"],
    "it owns the table": ["ALTER TABLE device_state OWNER TO {app}"],
    "{app}_b owns the table": [
        "CREATE ROLE {app}_b",
        "ALTER TABLE device_state OWNER TO {app}_b",
        "GRANT {app}_b TO {app}",
    ],
    "{app}_b has BYPASSRLS": [  # by way of another role, and without inheriting: SET ROLE would do
        "CREATE ROLE {app}_b BYPASSRLS",
        "CREATE ROLE {app}_a NOINHERIT",
        "GRANT {app}_b TO {app}_a",
        "ALTER ROLE {app} NOINHERIT",
        "GRANT {app}_a TO {app}",
    ],
    "{app}_b is a superuser": ["CREATE ROLE {app}_b SUPERUSER", "GRANT {app}_b TO {app}"],
    "it may use what no policy limits (REVOKE REFERENCES, TRIGGER, TRUNCATE ON device_state FROM {app})": [
        "GRANT REFERENCES, TRIGGER, TRUNCATE ON device_state TO {app}"
    ],
    "{app}_b may use what no policy limits (REVOKE TRUNCATE ON device_state FROM {app}_b)": [
        "CREATE ROLE {app}_b",
        "GRANT TRUNCATE ON device_state TO {app}_b",
        "GRANT {app}_b TO {app}",
    ],
    "everybody may use what no policy limits (REVOKE TRIGGER ON device_state FROM PUBLIC)": [
        "GRANT TRIGGER ON device_state TO PUBLIC"
    ],
    "the policy open shows it rows too": ["CREATE POLICY open ON device_state USING (true)"],
    "the policy mine shows it rows too": ["CREATE POLICY mine ON device_state FOR SELECT TO {app} USING (true)"],
    'the policy "The Group\'s" shows it rows too': [
        "CREATE ROLE {app}_b",
        "GRANT {app}_b TO {app}",
        'CREATE POLICY "The Group\'s" ON device_state TO {app}_b USING (true)',
    ],
    "it has REPLICATION, and a replication slot shows it every row": ["ALTER ROLE {app} REPLICATION"],
    "it is a member of pg_read_server_files, which reaches the files of the server": [
        "CREATE ROLE {app}_b",
        "GRANT pg_read_server_files TO {app}_b",
        "GRANT {app}_b TO {app}",
    ],
    "it is a member of pg_execute_server_program, which reaches the files of the server; "
    "it is a member of pg_write_server_files, which reaches the files of the server": [
        "GRANT pg_execute_server_program, pg_write_server_files TO {app}"
    ],
    "it may execute lo_import(text), pg_read_file(text), which reach the files of the server": [
        "GRANT EXECUTE ON FUNCTION pg_read_file(text) TO {app}",
        "GRANT EXECUTE ON FUNCTION lo_import(text) TO PUBLIC",
    ],
    "it is a member of pg_monitor, which reads what others run: the tenants that they bind, and documents where a driver "
    "writes values into its statements; it is a member of pg_read_all_settings, which reads the settings of the server, a "
    "password in primary_conninfo too; it is a member of pg_read_all_stats, which reads what others run: the tenants "
    "that they bind, and documents where a driver writes values into its statements": ["GRANT pg_monitor TO {app}"],
    "it is a member of pg_read_all_settings, which reads the settings of the server, a password in primary_conninfo "
    "too": ["GRANT pg_read_all_settings TO {app}"],
    "it may use what no policy limits (REVOKE DELETE, INSERT, UPDATE ON alembic_version_iot_models FROM {app})": [
        "CREATE TABLE IF NOT EXISTS alembic_version_iot_models (version_num varchar(32))",
        "GRANT SELECT, INSERT, DELETE ON alembic_version_iot_models TO {app}",
        "GRANT UPDATE (version_num) ON alembic_version_iot_models TO {app}",
    ],
    "everybody may use what no policy limits (REVOKE TRIGGER, TRUNCATE ON device_state_refusals_079 FROM PUBLIC); "
    "it may use what no policy limits (REVOKE REFERENCES ON device_state_shadow_076 FROM {app})": [
        "CREATE TABLE device_state_refusals_079 ()",
        "GRANT SELECT, TRIGGER, TRUNCATE ON device_state_refusals_079 TO PUBLIC",
        "CREATE TABLE device_state_shadow_076 (device_id text)",
        "GRANT SELECT, INSERT, REFERENCES (device_id) ON device_state_shadow_076 TO {app}",
    ],
    "it owns the schema public, and may drop the table": ["ALTER SCHEMA public OWNER TO {app}"],
    "it may use what no policy limits (REVOKE REFERENCES (tenant_id, device_id) ON device_state FROM {app})": [
        "GRANT REFERENCES (tenant_id, device_id) ON device_state TO {app}"
    ],
    "it owns the function f(), which runs with the rights of whoever writes: "
    "trigger the spy on table device_state calls it": [
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
        "ALTER FUNCTION f() OWNER TO {app}",
        'CREATE TRIGGER "the spy" BEFORE INSERT ON device_state FOR EACH ROW EXECUTE FUNCTION f()',
    ],
    "it owns the function g(jsonb), which runs with the rights of whoever writes: index i calls it": [
        "CREATE FUNCTION g(jsonb) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT $1::text'",
        "CREATE INDEX i ON device_state (g(desired_state))",
        "ALTER FUNCTION g(jsonb) OWNER TO {app}",
    ],
    "it owns the function same(text,text), which runs with the rights of whoever writes: "
    "constraint c on table device_state calls it": [
        "CREATE FUNCTION same(text, text) RETURNS bool LANGUAGE sql IMMUTABLE AS 'SELECT $1 = $2'",
        "CREATE OPERATOR === (LEFTARG = text, RIGHTARG = text, FUNCTION = same)",
        "ALTER TABLE device_state ADD CONSTRAINT c CHECK (status === status)",
        "ALTER FUNCTION same(text, text) OWNER TO {app}",
    ],
    "it may use everything, and reaches the rows of the table through it (REVOKE ALL ON everything FROM {app})": [
        "CREATE TABLE everything (tenant_id text)",
        "ALTER TABLE device_state INHERIT everything",
        "GRANT SELECT ON everything TO {app}",
    ],
    "it may change rows of sites, and the foreign key k changes those of the table with them": [
        "CREATE TABLE sites (site_id text PRIMARY KEY)",
        "INSERT INTO sites VALUES ('s')",
        "ALTER TABLE device_state ADD CONSTRAINT k FOREIGN KEY (site_id) REFERENCES sites ON DELETE CASCADE",
        "GRANT DELETE ON sites TO {app}",
    ],
    "it may read values of the table in pg_statistic (REVOKE SELECT ON pg_statistic FROM {app}, PUBLIC)": [
        "GRANT SELECT ON pg_statistic TO {app}"
    ],
    "it may read values of the table in pg_statistic (REVOKE SELECT ON pg_statistic FROM {app}, PUBLIC); "
    "it may read values of the table in pg_statistic_ext_data (REVOKE SELECT ON pg_statistic_ext_data FROM {app}, PUBLIC)"
    "": [
        "GRANT SELECT (starelid, staattnum, stavalues1) ON pg_statistic TO {app}",
        "GRANT SELECT (stxoid, stxdmcv) ON pg_statistic_ext_data TO PUBLIC",
    ],
    "it may read the passwords of all roles as they are stored (REVOKE SELECT ON pg_authid FROM {app}, PUBLIC)": [
        "GRANT SELECT (rolname, rolpassword) ON pg_authid TO {app}"
    ],
    "it may set parameters of the whole server (REVOKE ALTER SYSTEM ON PARAMETER archive_command FROM {app})": [
        "GRANT ALTER SYSTEM ON PARAMETER archive_command TO {app}"
    ],
    "it may read the passwords of all roles as they are stored (REVOKE SELECT ON pg_shadow FROM {app}, PUBLIC)": [
        "GRANT SELECT ON pg_shadow TO {app}"
    ],
    "it is a member of pg_write_all_data, which writes every table without policies, the revision too": [
        "GRANT pg_write_all_data TO {app}"
    ],
    "it may set parameters that load code, or switch triggers, foreign keys or checks off "
    "(REVOKE SET ON PARAMETER session_replication_role FROM {app})": [
        "GRANT SET ON PARAMETER session_replication_role, log_statement TO {app}"
    ],
    'the foreign key k shows which devices exist (ALTER TABLE "My table" DROP CONSTRAINT k)': [
        'CREATE TABLE "My table" (t text, d text, CONSTRAINT k FOREIGN KEY (t, d) REFERENCES device_state)',
        'ALTER TABLE "My table" OWNER TO {app}',
    ],
    "a transaction that is bound to no tenant has one already (ALTER ROLE {app} RESET app.tenant_id)": [
        "ALTER ROLE {app} SET app.tenant_id = 'acme'"
    ],
    "a transaction that is bound to no tenant has one already (ALTER ROLE ALL RESET app.tenant_id)": [
        "ALTER ROLE ALL SET app.tenant_id = 'acme'"
    ],
    "a transaction that is bound to no tenant has one already (ALTER DATABASE {database} RESET app.tenant_id); "
    "a transaction that is bound to no tenant has one already (ALTER ROLE {app} IN DATABASE {database} RESET "
    "app.tenant_id)": [
        "ALTER DATABASE {database} SET APP.tenant_id = 'acme'",
        "ALTER ROLE {app} IN DATABASE {database} SET app.tenant_id = 'acme'",
    ],
    "everybody may use what no policy limits (REVOKE TRUNCATE ON device_state FROM PUBLIC); "
    "it has BYPASSRLS; it owns the table": [
        "ALTER ROLE {app} BYPASSRLS",
        "ALTER TABLE device_state OWNER TO {app}",
        "GRANT TRUNCATE ON device_state TO PUBLIC",
    ],
}


@pytest.mark.repeats
@pytest.mark.parametrize("way", WAYS)
def test_a_role_that_a_policy_would_not_stop_is_refused_with_every_reason_also_when_its_rights_are_granted_later(
    owner: Connection, app: str, way: str
) -> None:
    def named(written: str) -> str:
        return written.replace("{app}", app).replace("{database}", str(owner.engine.url.database))

    if partitioned.ASKED_FOR and any("INHERIT everything" in statement for statement in WAYS[way]):
        pytest.skip("device_state is partitioned: nothing can inherit from it, nor it from others")
    tenancy.enable(owner, app)
    assert tenancy.check(owner, app) == []
    for statement in WAYS[way]:
        run(owner, named(statement))
    before = security(owner)

    with pytest.raises(ValueError) as caught:
        tenancy.enable(owner, app)

    reasons = tenancy.check(owner, app)
    assert "; ".join(partitioned.of_the_whole(reasons)).startswith(named(way))
    assert str(caught.value).startswith(
        f"isolation would not hold for role '{app}': {'; '.join(reasons)}. Take that away, or let the application log "
        "in as a role of its own"
    )
    assert security(owner) == before

    # A role for which it was never enabled, too.
    tenancy.disable(owner, app)
    with pytest.raises(ValueError, match="isolation would not hold"):
        tenancy.enable(owner, app)


@OTHER_KEY
def test_a_collation_for_which_two_tenants_are_one_is_refused(owner: Connection, app: str) -> None:
    run(owner, "CREATE COLLATION any_case (locale = 'C')")
    # Without ICU there is none.
    run(owner, "UPDATE pg_collation SET collisdeterministic = false WHERE collname = 'any_case'")
    run(owner, "ALTER TABLE device_state ALTER tenant_id TYPE text COLLATE any_case")

    with pytest.raises(ValueError, match="the column tenant_id has the nondeterministic collation any_case"):
        tenancy.enable(owner, app)


def test_a_superuser_does_not_enable_it_for_a_strangers_table_that_the_search_path_finds_first(
    owner: Connection, app: str
) -> None:
    stranger = f"{app}_b"
    run(owner, f"CREATE ROLE {stranger}; CREATE SCHEMA theirs AUTHORIZATION {stranger}; SET ROLE {stranger};"
               "CREATE TABLE theirs.device_state (tenant_id text, device_id text);"
               "CREATE TABLE theirs.device_shadow_history (tenant_id text, device_id text); RESET ROLE;"
               "SET search_path = theirs, public")  # fmt: skip
    with pytest.raises(ValueError, match=rf"^device_state, as the search path .* to role {stranger}, which may be"):
        tenancy.enable(owner, app)
    run(owner, f"SET ROLE {stranger}")  # it does with its own table what it likes
    tenancy.enable(owner, app)
    run(owner, "RESET ROLE")


def test_a_check_finds_that_there_is_no_table_any_more(owner: Connection, app: str) -> None:
    tenancy.enable(owner, app)
    run(owner, "DROP TABLE device_state")

    (found,) = tenancy.check(owner, app)
    assert found == f"the policy iot_models_tenant does not limit it: call tenancy.enable(connection, '{app}')"


@partitioned.needs_one_piece("nothing can inherit from it")
def test_who_may_clear_the_tables_statistics_is_refused(owner: Connection, app: str) -> None:
    if owner.scalar(text("SELECT current_setting('server_version_num')::int < 170000")):
        pytest.skip("PostgreSQL 17 is the first with MAINTAIN")
    run(owner, f"GRANT MAINTAIN ON device_state TO {app}")
    run(owner, f"CREATE TABLE child () INHERITS (device_state); GRANT MAINTAIN ON child TO {app}")

    with pytest.raises(ValueError) as caught:
        tenancy.enable(owner, app)

    assert f"(REVOKE MAINTAIN ON device_state FROM {app})" in str(caught.value)
    assert f"(REVOKE ALL ON child FROM {app})" in str(caught.value)


@OTHER_KEY
def test_a_tenant_id_of_a_type_with_an_equality_of_its_own_is_refused(owner: Connection, app: str) -> None:
    run(owner, "ALTER TABLE device_state ALTER tenant_id TYPE varchar")

    with pytest.raises(
        ValueError, match=r"type character varying \(ALTER TABLE device_state ALTER tenant_id TYPE text"
    ):
        tenancy.enable(owner, app)


def test_a_membership_that_gives_nothing_is_no_way_around(owner: Connection, app: str) -> None:
    if owner.scalar(text("SELECT current_setting('server_version_num')::int < 160000")):
        pytest.skip("PostgreSQL 16 is the first with GRANT ... WITH SET FALSE")
    run(owner, f"CREATE ROLE {app}_b; ALTER TABLE device_state OWNER TO {app}_b")
    run(owner, f"GRANT {app}_b TO {app} WITH INHERIT FALSE, SET FALSE, ADMIN FALSE")

    run(owner, f"ALTER TABLE device_shadow_history OWNER TO {app}_b; SET ROLE {app}_b")
    tenancy.enable(owner, app)
    run(owner, "RESET ROLE")

    assert tenants_for(owner, app) == {TENANT}


@pytest.mark.parametrize("second", ["INHERIT", "SET", "ADMIN"])
@pytest.mark.parametrize("first", ["INHERIT", "SET", "ADMIN"])
def test_memberships_are_followed_whatever_they_give(owner: Connection, app: str, first: str, second: str) -> None:
    if owner.scalar(text("SELECT current_setting('server_version_num')::int < 160000")):
        pytest.skip("PostgreSQL 16 is the first with GRANT ... WITH SET FALSE")

    def membership(given: str) -> str:
        return ", ".join(f"{option} {option == given}" for option in ("INHERIT", "SET", "ADMIN"))

    run(owner, f"CREATE ROLE {app}_a; CREATE ROLE {app}_b; ALTER TABLE device_state OWNER TO {app}_b")
    run(owner, f"GRANT {app}_a TO {app} WITH {membership(first)}; GRANT {app}_b TO {app}_a WITH {membership(second)}")
    run(owner, f"GRANT pg_read_server_files TO {app}_b WITH {membership('INHERIT')}")

    with pytest.raises(ValueError) as caught:
        tenancy.enable(owner, app)

    assert f"{app}_b owns the table" in str(caught.value)
    assert "it is a member of pg_read_server_files" in str(caught.value)


def test_anybody_may_check(owner: Connection, app: str) -> None:
    tenancy.enable(owner, app)
    run(owner, f"GRANT REFERENCES ON device_state TO {app}")
    run(owner, f"SET LOCAL ROLE {app}")

    (found,) = tenancy.check(owner, app)
    assert "REVOKE REFERENCES" in found


def test_a_check_ends_soon_also_where_postgresql_compiles_statements(owner: Connection, app: str) -> None:
    if not owner.scalar(text("SELECT pg_jit_available()")):
        pytest.skip("this server cannot compile statements")
    tenancy.enable(owner, app)
    run(owner, "SET LOCAL jit = on; SET LOCAL jit_above_cost = 0; SET LOCAL jit_optimize_above_cost = 0")
    run(owner, "SET LOCAL statement_timeout = '2s'")

    assert tenancy.check(owner, app) == []


@pytest.mark.parametrize("role", ["the application's", "nobody's"])
def test_a_deployment_is_stopped_by_one_line(
    own_engine: Engine, app: str, role: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with own_engine.begin() as connection:
        tenancy.enable(connection, app)
    asked = app if role == "the application's" else role
    command = ["check", "--url", own_engine.url.render_as_string(hide_password=False), "--tenancy", asked]

    assert main(command) == (0 if asked == app else 1)
    if asked == app:
        with own_engine.begin() as connection:
            run(connection, f"ALTER ROLE {app} REPLICATION")
            run(connection, "ALTER TABLE device_state DISABLE ROW LEVEL SECURITY")
        assert main(command) == 1

    said = capsys.readouterr().out.splitlines()
    assert said[-1] == (
        f"role '{app}' is not limited to one tenant: the policy iot_models_tenant does not limit it: "
        f"call tenancy.enable(connection, '{app}'); it has REPLICATION, and a replication slot shows it every row"
        if asked == app
        else 'there is no role "nobody\'s" on this server: check the name, or CREATE ROLE first'
    )
    assert len(said) == (2 if asked == app else 1)


def test_once_the_reason_is_gone_the_same_call_goes_through(owner: Connection, app: str) -> None:
    run(owner, f"GRANT ALL ON device_state TO {app}")
    with pytest.raises(ValueError, match="REFERENCES, TRIGGER, TRUNCATE"):
        tenancy.enable(owner, app)

    run(owner, f"REVOKE ALL ON device_state FROM {app}; GRANT SELECT, INSERT, UPDATE, DELETE ON device_state TO {app}")
    tenancy.enable(owner, app)

    assert tenants_for(owner, app) == {TENANT}


@pytest.mark.parametrize("name", ["nobody at all", "", "public", "current_user", "x" * 64, "'"])
def test_a_role_that_does_not_exist_is_refused(owner: Connection, name: str) -> None:
    if name == "x" * 64:
        run(owner, f"CREATE ROLE {'x' * 63}")  # what PostgreSQL would cut the name down to

    for call in (tenancy.enable, tenancy.disable, tenancy.check):
        with pytest.raises(LookupError, match=r"there is no role .* check the name, or CREATE ROLE first"):
            call(owner, name)
        with pytest.raises(TypeError, match="role must be a str, got None"):
            call(owner, None)  # type: ignore[arg-type]
    assert security(owner) == OFF
