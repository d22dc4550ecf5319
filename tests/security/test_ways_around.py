"""Arrangements of the owner's by which a limited role reaches other tenants' rows: each is found while they are still kept.

Each attack is run, too, as the limited role: an arrangement that lets it reach nothing would be no reason to refuse it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import psycopg
import pytest
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Session

from iot_models import tenancy
from iot_models._core import ways_around
from iot_models._migrations import dependents, strangers
from iot_models.testing import PostgresServer, database
from tests.databases import partitioned
from tests.databases.backends import await_lock_waits
from tests.databases.devices import TENANT, add_device
from tests.databases.tenants import OFF, OTHER, isolate, login, rows, run, security

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine

pytestmark = pytest.mark.repeats

KEPT = "the-secret-of-"
# The limited role's own schema, with what its functions bring home.
MINE = """
    CREATE SCHEMA mine AUTHORIZATION {app}; SET ROLE {app};
    CREATE TABLE mine.loot (document jsonb);
    CREATE FUNCTION mine.on_a_row() RETURNS trigger LANGUAGE plpgsql AS $$
      BEGIN INSERT INTO mine.loot SELECT desired_state FROM public.device_state; RETURN coalesce(NEW, OLD); END $$;
    CREATE FUNCTION mine.same(text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN $1; END';
    GRANT ALL ON SCHEMA mine TO PUBLIC; GRANT ALL ON mine.loot TO PUBLIC; RESET ROLE;
"""
NOTES = """
    CREATE TABLE notes (tenant_id text, device_id text, PRIMARY KEY (tenant_id, device_id),
                        FOREIGN KEY (tenant_id, device_id) REFERENCES device_state ON DELETE CASCADE ON UPDATE CASCADE);
    INSERT INTO notes SELECT tenant_id, device_id FROM device_state;
"""
LOGS = """
    CREATE TABLE log (device_id text);
    CREATE FUNCTION logs() RETURNS trigger LANGUAGE plpgsql {} AS $$
      BEGIN INSERT INTO log VALUES (OLD.device_id); RETURN OLD; END $$;
"""
SHADOWED = """
    CREATE TEMP TABLE log (device_id text); GRANT ALL ON log TO PUBLIC;
    CREATE TRIGGER t BEFORE INSERT ON log FOR EACH ROW EXECUTE FUNCTION mine.on_a_row();
"""
BOUND = "SET app.tenant_id = 'acme';"
MOVES = BOUND + "UPDATE device_state SET device_id = 'moved'"
REMOVES = BOUND + "DELETE FROM device_state"
# `same` is harmless while the owner makes what calls it.
HARMFUL = """
    CREATE OR REPLACE FUNCTION mine.same(text) RETURNS text LANGUAGE plpgsql AS $$
      BEGIN INSERT INTO mine.loot SELECT desired_state FROM public.device_state; RETURN $1; END $$;
"""
# A function of the owner's that reads `known`, and a view that takes the table's place for it.
KNOWN = """
    CREATE TABLE known (n int); INSERT INTO known VALUES (1); GRANT SELECT ON known TO PUBLIC;
    CREATE FUNCTION is_known(text) RETURNS boolean LANGUAGE plpgsql IMMUTABLE {} AS $$
      BEGIN RETURN (SELECT count(*) > 0 FROM known); END $$;
"""
AS_ITS_OWNER = KNOWN.replace("{}", "SECURITY DEFINER")
AS_ITS_CALLER = KNOWN.replace("{}", "")
SUPPLANTED = (
    HARMFUL
    + """
    CREATE TEMP VIEW known AS SELECT 1 AS n WHERE mine.same('x') = 'x'; GRANT ALL ON known TO PUBLIC;
"""
)
IS_KNOWN = (
    "it may put its own tables before those that the function is_known(text) names, which runs as postgres "
    "(ALTER FUNCTION is_known(text) SET search_path = public, pg_temp)"
)
THAT_LOGS = "it may put its own tables before those that the function logs() names, which runs as postgres"


# The limited role may put objects nowhere, unless more is granted.
NOWHERE = """
    REVOKE TEMP ON DATABASE {database} FROM PUBLIC;
    ALTER SCHEMA mine OWNER TO CURRENT_USER; REVOKE CREATE ON SCHEMA mine FROM PUBLIC;
"""
# A function of the caller's search path, with the owner's rights.
LOGGED = (
    LOGS.replace("{}", "SECURITY DEFINER")
    + "CREATE TRIGGER t AFTER DELETE ON device_state FOR EACH ROW EXECUTE FUNCTION logs();"
)
GROUP = "CREATE ROLE {group}; GRANT {group} TO {app};"
# What the group has, the role has only after SET ROLE.
APART = "ALTER ROLE {app} NOINHERIT;" + GROUP
SHADOWED_IN_THEIRS = """
    CREATE TABLE theirs.log (device_id text); GRANT ALL ON SCHEMA theirs TO PUBLIC; GRANT ALL ON theirs.log TO PUBLIC;
    CREATE TRIGGER t BEFORE INSERT ON theirs.log FOR EACH ROW EXECUTE FUNCTION mine.on_a_row();
"""


class Way(NamedTuple):
    """What the owner makes, what the limited role does then, and what `check` says in between."""

    made: str
    attack: str
    said: str
    owner_then: str = ""


WAYS = {
    "a trigger on a table whose rows are removed with the devices": Way(
        NOTES + "GRANT TRIGGER ON notes TO {app}",
        "CREATE TRIGGER t BEFORE DELETE ON notes FOR EACH ROW EXECUTE FUNCTION mine.on_a_row();" + REMOVES,
        "it may change notes, or make triggers on it or foreign keys to it, which run with rights of others",
    ),
    "an index of a table whose keys are set to NULL": Way(
        "CREATE TABLE notes (tenant_id text, device_id text,"
        " FOREIGN KEY (tenant_id, device_id) REFERENCES device_state ON DELETE SET NULL);"
        "INSERT INTO notes SELECT tenant_id, device_id FROM device_state;"
        "CREATE INDEX i ON notes (mine.same(device_id))",
        HARMFUL + REMOVES,
        "it owns the function mine.same(text), which runs with the rights of whoever writes: index i calls it",
    ),
    "a CHECK two cascades away": Way(
        NOTES + "CREATE TABLE files (tenant_id text, device_id text,"
        " CONSTRAINT c CHECK (mine.same(device_id) <> ''),"
        " FOREIGN KEY (tenant_id, device_id) REFERENCES notes ON UPDATE CASCADE);"
        "INSERT INTO files SELECT * FROM notes",
        HARMFUL + MOVES,
        "it owns the function mine.same(text), which runs with the rights of whoever writes: "
        "constraint c on table files calls it",
    ),
    "a trigger of what a rule writes two cascades away": Way(
        NOTES + "CREATE TABLE log (device_id text);"
        "CREATE RULE r AS ON DELETE TO notes DO ALSO INSERT INTO log VALUES (OLD.device_id);"
        "GRANT TRIGGER ON log TO {app}",
        "CREATE TRIGGER t BEFORE INSERT ON log FOR EACH ROW EXECUTE FUNCTION mine.on_a_row();" + REMOVES,
        "it may change log, or make triggers on it or foreign keys to it, which run with rights of others: "
        "rule r on table notes uses it",
    ),
    "a function that a trigger of a rule's table calls": Way(
        NOTES + "CREATE TABLE log (device_id text);"
        "CREATE RULE r AS ON DELETE TO notes DO ALSO INSERT INTO log VALUES (OLD.device_id);"
        "CREATE TRIGGER t BEFORE INSERT ON log FOR EACH ROW EXECUTE FUNCTION mine.on_a_row()",
        REMOVES,
        "it owns the function mine.on_a_row(), which runs with the rights of whoever writes: trigger t on table log",
    ),
    "a trigger of the owner's that runs as the owner in the caller's search path": Way(
        NOTES + LOGS.replace("{}", "") + "CREATE TRIGGER t BEFORE DELETE ON notes FOR EACH ROW EXECUTE FUNCTION logs()",
        SHADOWED + REMOVES,
        "it may put its own tables before those that the function logs() names, which runs as postgres "
        "(ALTER FUNCTION logs() SET search_path = public, pg_temp)",
    ),
    "a function with the owner's rights and the caller's search path": Way(
        LOGS.replace("{}", "SECURITY DEFINER SET search_path = public")
        + "CREATE TRIGGER t AFTER DELETE ON device_state FOR EACH ROW EXECUTE FUNCTION logs()",
        SHADOWED + REMOVES,
        "it may put its own tables before those that the function logs() names, which runs as postgres",
    ),
    "a schema of its own in the path of a function with the owner's rights": Way(
        LOGS.replace("{}", "SECURITY DEFINER SET search_path = mine, public, pg_temp")
        + "CREATE TRIGGER t AFTER DELETE ON device_state FOR EACH ROW EXECUTE FUNCTION logs()",
        SHADOWED.replace("TEMP TABLE log", "TABLE mine.log").replace("ON log", "ON mine.log") + REMOVES,
        "it may create objects in schema mine, which is in the search path of the function logs(), which runs as postgres",
    ),
    "a schema that it may make in the path of a function with the owner's rights": Way(
        LOGS.replace("{}", """SECURITY DEFINER SET search_path = "$user", public, pg_temp""")
        + "CREATE TRIGGER t AFTER DELETE ON device_state FOR EACH ROW EXECUTE FUNCTION logs();"
        "GRANT CREATE ON DATABASE {database} TO {app}",
        "CREATE SCHEMA postgres; GRANT ALL ON SCHEMA postgres TO PUBLIC;"
        + SHADOWED.replace("TEMP TABLE log", "TABLE postgres.log").replace("ON log", "ON postgres.log") + REMOVES,
        "it may create objects in schema postgres, which is in the search path of the function logs()",
    ),
    "a schema that it may make and put first": Way(
        NOWHERE + LOGGED + "GRANT CREATE ON DATABASE {database} TO {app}",
        "CREATE SCHEMA theirs;" + SHADOWED_IN_THEIRS + "SET search_path = theirs, public;" + REMOVES,
        THAT_LOGS,
    ),
    "a schema of a group that it may become": Way(
        NOWHERE + LOGGED + APART + "CREATE SCHEMA theirs AUTHORIZATION {group}",
        "SET ROLE {group};" + SHADOWED_IN_THEIRS + "RESET ROLE; SET search_path = theirs, public;" + REMOVES,
        THAT_LOGS,
    ),
    "a schema that a group may make that it may become": Way(
        NOWHERE + LOGGED + APART + "GRANT CREATE ON DATABASE {database} TO {group}",
        "SET ROLE {group}; CREATE SCHEMA theirs;" + SHADOWED_IN_THEIRS
        + "RESET ROLE; SET search_path = theirs, public;" + REMOVES,
        THAT_LOGS,
    ),
    "temporary tables of its own, where a group that it may become has the table": Way(
        NOWHERE + LOGGED + APART + "GRANT TEMP ON DATABASE {database} TO {app};"
        "REVOKE ALL ON device_state FROM {app}; GRANT SELECT, DELETE ON device_state TO {group};"
        "ALTER POLICY iot_models_tenant ON device_state TO {app}, {group}",
        SHADOWED + "SET ROLE {group};" + REMOVES,
        THAT_LOGS,
    ),
    "a schema of a group that it may become in the path of a function with the owner's rights": Way(
        NOWHERE + LOGGED.replace("SECURITY DEFINER", "SECURITY DEFINER SET search_path = theirs, public, pg_temp")
        + APART + "CREATE SCHEMA theirs AUTHORIZATION {group}",
        "SET ROLE {group};" + SHADOWED_IN_THEIRS + "RESET ROLE;" + REMOVES,
        "{group} may create objects in schema theirs, which is in the search path of the function logs()",
    ),
    "temporary tables twice in the path of a function with the owner's rights": Way(
        LOGS.replace("{}", "SECURITY DEFINER SET search_path = pg_temp, public, pg_temp")
        + "CREATE TRIGGER t AFTER DELETE ON device_state FOR EACH ROW EXECUTE FUNCTION logs()",
        SHADOWED + REMOVES,
        "it may put its own tables before those that the function logs() names, which runs as postgres",
    ),
    "a CHECK of a table whose rows move with the devices": Way(
        NOTES + AS_ITS_CALLER + "ALTER TABLE notes ADD CHECK (is_known(device_id))", SUPPLANTED + MOVES, IS_KNOWN
    ),
    "a CHECK of a domain of such a table": Way(
        AS_ITS_CALLER
        + "CREATE DOMAIN known_id AS text CHECK (is_known(VALUE));"
        + NOTES.replace("device_id text", "device_id known_id"),
        SUPPLANTED + MOVES,
        IS_KNOWN,
    ),
    "a generated column of such a table": Way(
        NOTES + AS_ITS_CALLER
        + "ALTER TABLE notes ADD is_known boolean GENERATED ALWAYS AS (is_known(device_id)) STORED",
        SUPPLANTED + MOVES,
        IS_KNOWN,
    ),
    "a default that a foreign key sets": Way(
        AS_ITS_CALLER + "CREATE TABLE notes (tenant_id text, device_id text, "
        " FOREIGN KEY (tenant_id, device_id) REFERENCES device_state ON DELETE SET DEFAULT (device_id));"
        "ALTER TABLE notes ALTER device_id SET DEFAULT CASE WHEN is_known('x') THEN NULL END;"
        "INSERT INTO notes SELECT tenant_id, device_id FROM device_state",
        SUPPLANTED + REMOVES,
        IS_KNOWN,
    ),
    "the condition of a trigger on such a table": Way(
        NOTES + AS_ITS_CALLER + LOGS.replace("{}", "SET search_path = public, pg_temp")
        + "GRANT INSERT ON log TO PUBLIC;"
        "CREATE TRIGGER t AFTER DELETE ON notes FOR EACH ROW WHEN (is_known(OLD.device_id)) EXECUTE FUNCTION logs()",
        SUPPLANTED + REMOVES,
        IS_KNOWN,
    ),
    "a function that a rule of such a table calls": Way(
        NOTES + AS_ITS_CALLER + "CREATE TABLE log (b boolean);"
        "CREATE RULE r AS ON DELETE TO notes DO ALSO INSERT INTO log VALUES (is_known(OLD.device_id))",
        SUPPLANTED + REMOVES,
        IS_KNOWN,
    ),
    "a trigger of the owner's on what a rule of such a table writes": Way(
        NOTES + LOGS.replace("{}", "").replace("OLD", "NEW") + "CREATE TABLE ids (device_id text);"
        "CREATE RULE r AS ON DELETE TO notes DO ALSO INSERT INTO ids VALUES (OLD.device_id);"
        "CREATE TRIGGER t BEFORE INSERT ON ids FOR EACH ROW EXECUTE FUNCTION logs()",
        SHADOWED + REMOVES,
        THAT_LOGS,
    ),
    "a trigger in place of what a rule of such a table writes to a view": Way(
        NOTES + LOGS.replace("{}", "").replace("OLD", "NEW") + "CREATE VIEW ids AS SELECT 'x' AS device_id;"
        "CREATE RULE r AS ON DELETE TO notes DO ALSO INSERT INTO ids VALUES (OLD.device_id);"
        "CREATE TRIGGER t INSTEAD OF INSERT ON ids FOR EACH ROW EXECUTE FUNCTION logs()",
        SHADOWED + REMOVES,
        THAT_LOGS,
    ),
    "a trigger of the owner's for rows that move to another partition": Way(
        NOTES.replace("UPDATE CASCADE)", "UPDATE CASCADE) PARTITION BY LIST (device_id);"
                      "CREATE TABLE notes_of_d PARTITION OF notes FOR VALUES IN ('d');"
                      "CREATE TABLE others PARTITION OF notes DEFAULT")
        + LOGS.replace("{}", "").replace("OLD", "NEW")
        + "CREATE TRIGGER t BEFORE INSERT ON notes FOR EACH ROW EXECUTE FUNCTION logs()",
        SHADOWED + MOVES,
        THAT_LOGS,
    ),
    "a default with the owner's rights": Way(
        AS_ITS_OWNER + "ALTER TABLE device_state ADD b boolean; ALTER TABLE device_state ALTER b SET DEFAULT is_known('')",
        SUPPLANTED + BOUND + "INSERT INTO device_state (tenant_id, site_id, device_id) VALUES ('acme', 's', 'more')",
        IS_KNOWN,
    ),
    "a restrictive policy with the owner's rights": Way(
        AS_ITS_OWNER + "CREATE POLICY p ON device_state AS RESTRICTIVE USING (is_known(tenant_id))",
        SUPPLANTED + BOUND + "SELECT FROM device_state",
        IS_KNOWN,
    ),
    "the policy of a table that a policy reads": Way(
        AS_ITS_OWNER + "CREATE TABLE tenants AS SELECT DISTINCT tenant_id FROM device_state;"
        "GRANT SELECT ON tenants TO {app}; ALTER TABLE tenants ENABLE ROW LEVEL SECURITY;"
        "CREATE POLICY p ON tenants USING (is_known(tenant_id));"
        "CREATE POLICY p ON device_state AS RESTRICTIVE USING (tenant_id IN (SELECT tenant_id FROM tenants))",
        SUPPLANTED + BOUND + "SELECT FROM device_state",
        IS_KNOWN,
    ),
    "a function that one with the owner's rights calls": Way(
        AS_ITS_CALLER
        + "CREATE FUNCTION knows() RETURNS boolean LANGUAGE sql SECURITY DEFINER BEGIN ATOMIC SELECT is_known(''); END;"
        "ALTER TABLE device_state ADD CHECK (knows())",
        SUPPLANTED + BOUND + "UPDATE device_state SET status = 'x'",
        IS_KNOWN,
    ),
    "an event trigger with the owner's rights": Way(
        LOGS.replace("{}", "SECURITY DEFINER").replace("RETURNS trigger", "RETURNS event_trigger")
        .replace("OLD.device_id", "tg_tag").replace("RETURN OLD;", "")
        + "CREATE EVENT TRIGGER e ON ddl_command_end EXECUTE FUNCTION logs()",
        SHADOWED + "CREATE TEMP TABLE another ()",
        THAT_LOGS,
    ),
    "a table of the catalog for a function with the owner's rights and an empty path": Way(
        LOGS.replace("{}", "SECURITY DEFINER SET search_path = ''")
        .replace("INTO log VALUES (OLD.device_id)", "INTO public.log SELECT rolname FROM pg_roles")
        + "CREATE TRIGGER t AFTER DELETE ON device_state FOR EACH ROW EXECUTE FUNCTION logs()",
        SUPPLANTED.replace("1 AS n", "'x' AS rolname").replace("known", "pg_roles") + REMOVES,
        THAT_LOGS + " (ALTER FUNCTION logs() SET search_path = pg_catalog, pg_temp)",
    ),
    "a table of the catalog for a function with the owner's rights and the catalog's path": Way(
        LOGS.replace("{}", "SECURITY DEFINER SET search_path = pg_catalog")
        .replace("INTO log VALUES (OLD.device_id)", "INTO public.log SELECT rolname FROM pg_roles")
        + "CREATE TRIGGER t AFTER DELETE ON device_state FOR EACH ROW EXECUTE FUNCTION logs()",
        SUPPLANTED.replace("1 AS n", "'x' AS rolname").replace("known", "pg_roles") + REMOVES,
        THAT_LOGS + " (ALTER FUNCTION logs() SET search_path = pg_catalog, pg_temp)",
    ),
    "an expression of statistics": Way(
        "CREATE STATISTICS s ON (mine.same(device_id)), site_id FROM device_state",
        HARMFUL,
        "it owns the function mine.same(text), which runs with the rights of whoever writes: statistics object s",
        "ANALYZE device_state",  # as autovacuum does by itself
    ),
    "a type in a schema of its own": Way(
        "CREATE TYPE mine.color AS ENUM ('red'); ALTER TABLE device_state ADD color mine.color DEFAULT 'red'",
        "DROP TYPE mine.color CASCADE",
        "it owns the schema mine, and may drop it with all that needs it: table device_state does",
    ),
    "a collation of its own": Way(
        'SET ROLE {app}; CREATE COLLATION mine.c FROM "C"; RESET ROLE;'
        "ALTER TABLE device_state ADD note text COLLATE mine.c DEFAULT 'x'",
        "DROP COLLATION mine.c CASCADE",
        "it owns the collation mine.c, and may drop it with all that needs it: table device_state does",
    ),
    "an extension of its own": Way(
        "GRANT CREATE ON DATABASE {database} TO {app}; SET ROLE {app}; CREATE EXTENSION hstore SCHEMA mine; RESET ROLE;"
        "REVOKE CREATE ON DATABASE {database} FROM {app}; ALTER SCHEMA mine OWNER TO CURRENT_USER;"
        "ALTER TABLE device_state ADD labels mine.hstore DEFAULT 'a=>1'",
        "DROP EXTENSION hstore CASCADE",
        "it owns the extension hstore, and may drop it with all that needs it: table device_state does",
    ),
    "a rule of another table": Way(
        "CREATE TABLE sites (site_id text); INSERT INTO sites VALUES ('s');"
        "CREATE RULE r AS ON DELETE TO sites DO ALSO DELETE FROM device_state;"
        "GRANT SELECT, DELETE ON sites TO {app}",
        "DELETE FROM sites",
        "it may change rows of sites, and the rule r changes those of the table with them",
    ),
    "a rule of another table by way of a view": Way(
        "CREATE VIEW everything AS SELECT * FROM device_state; CREATE TABLE sites (site_id text);"
        "CREATE RULE r AS ON INSERT TO sites DO ALSO UPDATE everything SET status = NEW.site_id;"
        "GRANT INSERT ON sites TO {app}",
        "INSERT INTO sites VALUES ('s')",
        "it may change rows of sites, and the rule r changes those of the table with them",
    ),
    "a rule, by way of a view that uses the table as its caller, of a table whose rows go with another's": Way(
        "CREATE ROLE {group}; CREATE VIEW everything WITH (security_invoker) AS SELECT * FROM device_state;"
        "ALTER VIEW everything OWNER TO {group}; CREATE TABLE plants (id int PRIMARY KEY); INSERT INTO plants VALUES (1);"
        "CREATE TABLE sites (id int REFERENCES plants ON DELETE CASCADE); INSERT INTO sites VALUES (1);"
        "CREATE RULE r AS ON DELETE TO sites DO ALSO UPDATE everything SET status = 'x';"
        "GRANT SELECT, DELETE ON plants TO {app}",
        "DELETE FROM plants",
        "it may change rows of plants, and the rule r changes those of the table with them",
    ),
    "a rule of the table of a role that has a right on one column": Way(
        "CREATE ROLE {group}; CREATE SCHEMA theirs AUTHORIZATION {group}; GRANT USAGE ON SCHEMA theirs TO PUBLIC;"
        "GRANT UPDATE (status) ON device_state TO {group}; CREATE POLICY p ON device_state TO {group} USING (true);"
        "SET ROLE {group}; CREATE TABLE theirs.sites (site_id text);"
        "CREATE RULE r AS ON INSERT TO theirs.sites DO ALSO UPDATE public.device_state SET status = 'x';"
        "GRANT INSERT ON theirs.sites TO PUBLIC; RESET ROLE",
        "INSERT INTO theirs.sites VALUES ('s')",
        "it may change rows of theirs.sites, and the rule r changes those of the table with them",
    ),
    "an UPDATE of what a generated key is computed from": Way(
        "CREATE TABLE sites (name text, key text GENERATED ALWAYS AS (name || '!') STORED UNIQUE);"
        "INSERT INTO sites VALUES ('berlin'); ALTER TABLE device_state ADD key text DEFAULT 'berlin!'"
        " REFERENCES sites (key) ON UPDATE CASCADE; GRANT SELECT, UPDATE (name) ON sites TO {app}",
        "UPDATE sites SET name = 'moved'",
        "it may change rows of sites, and the foreign key device_state_key_fkey changes those of the table with them",
    ),
    "an UPDATE that moves a row to another partition": Way(
        "CREATE TABLE sites (kind text, id int) PARTITION BY LIST (kind);"
        "CREATE TABLE new PARTITION OF sites (PRIMARY KEY (id)) FOR VALUES IN ('new');"
        "CREATE TABLE old PARTITION OF sites FOR VALUES IN ('old'); INSERT INTO sites VALUES ('new', 1);"
        "ALTER TABLE device_state ADD site int DEFAULT 1 REFERENCES new ON DELETE CASCADE;"
        "GRANT SELECT, UPDATE (kind) ON sites TO {app}",
        "UPDATE sites SET kind = 'old'",
        "it may change rows of sites, and the foreign key device_state_site_fkey changes those of the table with them",
    ),
    "a view that a function of a default reads": Way(
        "SET ROLE {app}; CREATE VIEW mine.v AS SELECT 1 AS n; RESET ROLE;"
        "CREATE FUNCTION n() RETURNS int LANGUAGE sql BEGIN ATOMIC SELECT n FROM mine.v; END;"
        "ALTER TABLE device_state ADD n int; ALTER TABLE device_state ALTER n SET DEFAULT n()",
        HARMFUL + "CREATE OR REPLACE VIEW mine.v AS SELECT length(mine.same('x')) AS n",
        "it may change mine.v, or make triggers on it or foreign keys to it, which run with rights of others",
        "INSERT INTO device_state (tenant_id, site_id, device_id) VALUES ('acme', 's', 'more')",
    ),
    "an event trigger": Way(
        "SET ROLE {app}; CREATE FUNCTION mine.on_ddl() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END'; RESET ROLE;"
        "CREATE EVENT TRIGGER e ON ddl_command_end EXECUTE FUNCTION mine.on_ddl()",
        """CREATE OR REPLACE FUNCTION mine.on_ddl() RETURNS event_trigger LANGUAGE plpgsql AS
           'BEGIN INSERT INTO mine.loot SELECT desired_state FROM public.device_state; END'""",
        "it owns the function mine.on_ddl(), which runs with the rights of whoever writes: event trigger e",
        "COMMENT ON COLUMN device_state.status IS 'a migration'",
    ),
    "the parent of a partition": Way(
        NOTES + "SET ROLE {app}; CREATE TABLE mine.parent (tenant_id text NOT NULL, device_id text NOT NULL)"
        " PARTITION BY LIST (tenant_id); RESET ROLE; ALTER TABLE mine.parent ATTACH PARTITION notes DEFAULT;"
        "GRANT CREATE ON SCHEMA public TO {app}",
        "CREATE INDEX ON mine.parent (mine.same(device_id));" + HARMFUL + MOVES,
        "it may change mine.parent, or make triggers on it or foreign keys to it, which run with rights of others",
    ),
}  # fmt: skip


@pytest.fixture
def isolated(server: PostgresServer, migrated_url: str, server_role: str) -> Iterator[Engine]:
    """The owner's engine on a database with a device of each tenant, in which the role is limited to one of them."""
    with database(server, migrated_url) as url:
        owner = create_engine(url, poolclass=NullPool)
        with Session(owner) as session, session.begin():
            for tenant in (TENANT, OTHER):
                add_device(session, "d", tenant_id=tenant, desired_state={"kept": KEPT + tenant})
            session.execute(text(MINE.format(app=server_role)))
        isolate(owner, server_role)
        yield owner
        with owner.begin() as connection:
            group = group_of(server_role)
            if connection.scalar(text("SELECT count(*) FROM pg_roles WHERE rolname = :group"), {"group": group}):
                run(connection, f"DROP OWNED BY {group} CASCADE; DROP ROLE {group}")
            run(connection, f"DROP OWNED BY {server_role} CASCADE")


def group_of(role: str) -> str:
    return f"{role}_group"


def named(part: str, owner: Engine, role: str) -> str:
    for name, value in (("app", role), ("group", group_of(role)), ("database", str(owner.url.database))):
        part = part.replace("{" + name + "}", value)
    return part


@pytest.mark.parametrize("way", WAYS)
def test_what_reaches_another_tenants_rows_is_found_before_it_is_used(
    isolated: Engine, server_role: str, way: str
) -> None:
    made, attack, said, owner_then = (named(part, isolated, server_role) for part in WAYS[way])
    with isolated.begin() as connection:
        assert tenancy.check(connection, server_role) == []
        if "hstore" in made and not connection.scalar(
            text("SELECT count(*) FROM pg_available_extensions WHERE name = 'hstore'")
        ):
            pytest.skip("this server has no hstore")
        run(connection, made)
        found = tenancy.check(connection, server_role)
        with pytest.raises(ValueError, match="isolation would not hold"):
            tenancy.enable(connection, server_role)
    before = victims(isolated)

    url = login(isolated, server_role).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url) as attacker:
        attacker.execute("DELETE FROM mine.loot")
        attacker.execute(attack.encode())
    with isolated.begin() as connection:
        run(connection, owner_then or "SELECT")
        loot = str(connection.scalars(text("SELECT document FROM mine.loot")).all())

    assert [line for line in found if line.startswith(said)]
    assert KEPT + OTHER in loot or victims(isolated) != before


@pytest.mark.parametrize(
    "view",
    [
        "",
        "CREATE VIEW theirs.device_state AS SELECT * FROM public.device_state;",
        "CREATE VIEW theirs.device_state WITH (security_invoker = on) AS SELECT * FROM public.device_state;",
    ],
)
def test_a_rule_of_somebody_who_has_no_right_on_the_table_is_no_reason_to_refuse(
    isolated: Engine, server_role: str, view: str
) -> None:
    """Anybody who may make a table, a temporary one too, could keep every role from being enabled."""
    rule = f"""
        CREATE ROLE {{group}}; CREATE SCHEMA theirs AUTHORIZATION {{group}}; GRANT USAGE ON SCHEMA theirs TO PUBLIC;
        SET ROLE {{group}}; {view} CREATE TABLE theirs.t (n int);
        CREATE RULE r AS ON DELETE TO theirs.t DO ALSO DELETE FROM {"theirs" if view else "public"}.device_state;
        GRANT DELETE ON theirs.t TO PUBLIC; RESET ROLE
    """
    with isolated.begin() as connection:
        run(connection, named(rule, isolated, server_role))
        assert tenancy.check(connection, server_role) == []
        tenancy.enable(connection, server_role)
    before = victims(isolated)
    with create_engine(login(isolated, server_role), poolclass=NullPool).connect() as caller:
        # As whoever calls, if the view says so: then this is no more than that role may do anyway.
        with nullcontext() if "invoker" in view else pytest.raises(ProgrammingError, match="permission denied"):
            caller.execute(text("DELETE FROM theirs.t"))
        caller.commit()
    assert victims(isolated) == before


@partitioned.needs_one_piece("a trigger takes a right on each partition")
def test_what_is_committed_while_enable_waits_for_its_lock_is_found(isolated: Engine, server_role: str) -> None:
    """The right to make a trigger may be gone by then."""
    group = group_of(server_role)
    trigger = "CREATE TRIGGER t BEFORE UPDATE ON device_state FOR EACH ROW EXECUTE FUNCTION mine.on_a_row()"
    with isolated.begin() as connection:
        tenancy.disable(connection, server_role)
        run(
            connection, f"CREATE ROLE {group}; GRANT TRIGGER ON device_state TO {group}; GRANT {group} TO {server_role}"
        )
    with create_engine(login(isolated, server_role), poolclass=NullPool).connect() as attacker:
        attacker.execute(text(trigger))
        with isolated.begin() as connection:
            run(connection, f"REVOKE {group} FROM {server_role}")
        with ThreadPoolExecutor(1) as pool:
            enabling = pool.submit(enabled, isolated, server_role)
            await_lock_waits(isolated, 1)
            attacker.commit()
            with pytest.raises(ValueError, match=r"it owns the function mine\.on_a_row\(\)"):
                enabling.result()
    with isolated.begin() as connection:
        assert security(connection) == OFF


def enabled(owner: Engine, role: str) -> None:
    with owner.begin() as connection:
        tenancy.enable(connection, role)


def victims(owner: Engine) -> list[str]:
    return [row for row in rows(owner) if OTHER in row]


def test_check_and_migrations_give_our_tables_the_same_names() -> None:
    names = [strangers.VERSION_TABLE, dependents.PARKED, dependents.PARKED_HISTORY, dependents.PARKED_REFUSALS]
    assert [*ways_around._OTHERS] == names  # noqa: SLF001 - _core imports nothing from _migrations
