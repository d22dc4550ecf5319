"""Tables, functions and types beside `device_state` through which a role would get around isolation: it is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from iot_models import tenancy
from tests.databases import partitioned
from tests.databases.tenants import run

if TYPE_CHECKING:
    from sqlalchemy import Connection

pytestmark = pytest.mark.repeats


@pytest.fixture
def owner(owner: Connection, app: str) -> Connection:
    """The owner, in a transaction in which the role is limited."""
    tenancy.enable(owner, app)
    assert tenancy.check(owner, app) == []
    return owner


def found(owner: Connection, app: str, statements: list[str]) -> list[str]:
    """What `check` says after these statements; `enable` refuses the same."""
    if partitioned.ASKED_FOR and any("INHERIT" in statement for statement in statements):
        pytest.skip("device_state is partitioned: nothing can inherit from it, nor it from others")
    for statement in statements:
        run(owner, statement.replace("{app}", app))
    said = tenancy.check(owner, app)
    if said:
        with pytest.raises(ValueError) as refused:
            tenancy.enable(owner, app)
        assert f"'{app}': {'; '.join(said)}. Take that away" in str(refused.value)
    return [line.replace(app, "{app}") for line in partitioned.of_the_whole(said)]


# Inheritance

PARENT = ["CREATE TABLE things (tenant_id text, device_id text)", "ALTER TABLE device_state INHERIT things"]
GRANDPARENT = ["CREATE TABLE things (tenant_id text)", "CREATE TABLE p () INHERITS (things)",
               "ALTER TABLE device_state INHERIT p"]  # fmt: skip
CHILD = ["CREATE TABLE things () INHERITS (device_state)"]
GRANDCHILD = ["CREATE TABLE k () INHERITS (device_state)", "CREATE TABLE things () INHERITS (k)"]
ANOTHER_PARENT_OF_A_CHILD = ["CREATE TABLE things (more text)", "CREATE TABLE k () INHERITS (device_state, things)"]
FAMILIES = {"a parent": PARENT, "a grandparent": GRANDPARENT, "a child": CHILD, "a grandchild": GRANDCHILD,
            "another parent of a child": ANOTHER_PARENT_OF_A_CHILD}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("right", ["SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "TRIGGER", "REFERENCES"])
def test_a_right_on_a_table_that_shares_rows_by_inheritance_is_a_way_around(
    owner: Connection, app: str, family: str, right: str
) -> None:
    assert found(owner, app, [*FAMILIES[family], f"GRANT {right} ON things TO {app}"]) == [
        "it may use things, and reaches the rows of the table through it (REVOKE ALL ON things FROM {app})"
    ]


@pytest.mark.parametrize("family", ["a parent", "a grandparent", "a child", "a grandchild"])
@pytest.mark.parametrize("right", ["SELECT", "UPDATE", "REFERENCES"])
def test_a_right_on_a_column_of_such_a_table_is_one_until_it_is_revoked(
    owner: Connection, app: str, family: str, right: str
) -> None:
    (said,) = found(owner, app, [*FAMILIES[family], f"GRANT {right} (tenant_id) ON things TO {app}"])
    assert said.endswith("(REVOKE ALL ON things FROM {app})")

    assert found(owner, app, ["REVOKE ALL ON things FROM {app}"]) == []


def test_who_owns_such_a_table_can_grant_itself_what_was_revoked(owner: Connection, app: str) -> None:
    taken = ["ALTER TABLE things OWNER TO {app}", "REVOKE ALL ON things FROM {app}"]
    (said,) = found(owner, app, [*PARENT, *taken])
    assert said.startswith("it may use things, and reaches the rows")


@pytest.mark.parametrize("family", ["a child", "a grandchild"])
def test_a_foreign_key_to_a_table_that_inherits_shows_which_devices_exist(
    owner: Connection, app: str, family: str
) -> None:
    statements = [
        *FAMILIES[family],
        "ALTER TABLE things ADD UNIQUE (tenant_id, device_id)",
        "CREATE TABLE mine (t text, d text, CONSTRAINT k FOREIGN KEY (t, d) REFERENCES things (tenant_id, device_id))",
        "ALTER TABLE mine OWNER TO {app}",
    ]
    assert found(owner, app, statements) == [
        "the foreign key k shows which devices exist (ALTER TABLE mine DROP CONSTRAINT k)"
    ]


# Foreign keys that change rows

SITES = ["CREATE TABLE sites (site_id text PRIMARY KEY, name text)", "INSERT INTO sites VALUES ('s')"]
REGIONS = ["CREATE TABLE regions (region_id text PRIMARY KEY, name text)"]
KEY = "ALTER TABLE device_state ADD CONSTRAINT k FOREIGN KEY (site_id) REFERENCES sites "
# A table, what the role may do to its rows, and the foreign keys on the way.
CHAINS = [
    ("sites", "UPDATE (site_id)", [*SITES, KEY + "ON UPDATE CASCADE"]),
    ("sites", "UPDATE", [*SITES, KEY + "ON UPDATE CASCADE"]),
    ("sites", "DELETE", [*SITES, KEY + "ON DELETE SET NULL"]),
    (
        "regions",
        "DELETE",
        [
            *REGIONS,
            *SITES,
            "ALTER TABLE sites ADD region_id text REFERENCES regions ON DELETE CASCADE",
            KEY + "ON DELETE CASCADE",
        ],
    ),
    (
        "regions",
        "UPDATE (region_id)",
        [
            *REGIONS,
            "INSERT INTO regions VALUES ('s')",
            *SITES,
            "ALTER TABLE sites ADD FOREIGN KEY (site_id) REFERENCES regions ON UPDATE CASCADE",
            KEY + "ON UPDATE CASCADE",
        ],
    ),
    (
        "regions",
        "DELETE",  # which updates a row of sites
        [
            *REGIONS,
            "INSERT INTO regions VALUES ('s')",
            *SITES,
            "ALTER TABLE sites ADD FOREIGN KEY (site_id) REFERENCES regions ON DELETE SET DEFAULT",
            KEY + "ON UPDATE CASCADE",
        ],
    ),
    (
        "countries",
        "DELETE",
        [
            "CREATE TABLE countries (country_id text PRIMARY KEY)",
            *REGIONS,
            "ALTER TABLE regions ADD country_id text REFERENCES countries ON DELETE CASCADE",
            *SITES,
            "ALTER TABLE sites ADD region_id text REFERENCES regions ON DELETE CASCADE",
            KEY + "ON DELETE CASCADE",
        ],
    ),
    (
        "places",
        "DELETE",
        ["CREATE TABLE places (name text)", *SITES, "ALTER TABLE sites INHERIT places", KEY + "ON DELETE CASCADE"],
    ),
    (
        "places",
        "UPDATE (site_id)",
        [
            "CREATE TABLE places (site_id text NOT NULL)",
            *SITES,
            "ALTER TABLE sites INHERIT places",
            KEY + "ON UPDATE CASCADE",
        ],
    ),
    (
        "sites",
        "DELETE",
        [
            *SITES,
            "CREATE TABLE more (CONSTRAINT k FOREIGN KEY (site_id) REFERENCES sites ON DELETE CASCADE) "
            "INHERITS (device_state)",
        ],
    ),
]


@pytest.mark.parametrize(("table", "right", "statements"), CHAINS)
def test_a_right_whose_use_changes_rows_through_foreign_keys_is_a_way_around(
    owner: Connection, app: str, table: str, right: str, statements: list[str]
) -> None:
    assert found(owner, app, [*statements, f"GRANT {right} ON {table} TO {{app}}"]) == [
        f"it may change rows of {table}, and the foreign key k changes those of the table with them"
    ]


def test_who_owns_the_other_table_can_grant_itself_what_was_revoked(owner: Connection, app: str) -> None:
    taken = ["ALTER TABLE sites OWNER TO {app}", "REVOKE ALL ON sites FROM {app}"]
    (said,) = found(owner, app, [*SITES, KEY + "ON DELETE CASCADE", *taken])
    assert said.startswith("it may change rows of sites")


@pytest.mark.parametrize(
    "statements",
    [
        [*SITES, KEY + "ON UPDATE CASCADE", "GRANT SELECT, INSERT, DELETE, UPDATE (name) ON sites TO {app}"],
        [*SITES, KEY + "ON DELETE CASCADE", "GRANT SELECT, INSERT, UPDATE ON sites TO {app}"],
        [*SITES, KEY, "GRANT SELECT, INSERT, UPDATE, DELETE ON sites TO {app}"],
        [
            *REGIONS,
            *SITES,
            "ALTER TABLE sites ADD region_id text REFERENCES regions ON UPDATE CASCADE ON DELETE SET NULL",
            KEY + "ON UPDATE CASCADE ON DELETE CASCADE",
            "GRANT SELECT, INSERT, UPDATE, DELETE ON regions TO {app}",
        ],
    ],
    ids=["another column", "another event", "no cascade", "a chain that ends before the key"],
)
def test_a_right_whose_use_changes_no_row_of_the_table_is_none(
    owner: Connection, app: str, statements: list[str]
) -> None:
    assert found(owner, app, statements) == []


# Functions and types

FUNCTIONS = {
    "a CHECK of a domain": (
        "f(text)",
        "table device_state",
        [
            "CREATE FUNCTION f(text) RETURNS bool LANGUAGE sql IMMUTABLE AS 'SELECT true'",
            "CREATE DOMAIN code AS text CHECK (f(VALUE))",
            "ALTER TABLE device_state ADD note code",
        ],
    ),
    "an operator class": (
        "f(text,text)",
        "index i",
        [
            "CREATE FUNCTION f(text, text) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT bttextcmp($1, $2)'",
            "CREATE OPERATOR CLASS o FOR TYPE text USING btree AS OPERATOR 1 <, OPERATOR 2 <=, OPERATOR 3 =, "
            "OPERATOR 4 >=, OPERATOR 5 >, FUNCTION 1 f(text, text)",
            "CREATE INDEX i ON device_state (status o)",
        ],
    ),
    "a rule": (
        "f()",
        "rule also on table device_state",
        [
            "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
            "CREATE RULE also AS ON DELETE TO device_state DO ALSO SELECT f()",
        ],
    ),
    "a trigger of a table that inherits": (
        "f()",
        "trigger z on table k",
        [
            "CREATE TABLE k () INHERITS (device_state)",
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
            "CREATE TRIGGER z BEFORE INSERT ON k FOR EACH ROW EXECUTE FUNCTION f()",
        ],
    ),
}


@pytest.mark.parametrize("place", FUNCTIONS)
def test_whose_function_is_called_by_something_that_the_table_uses_is_refused(
    owner: Connection, app: str, place: str
) -> None:
    function, user, statements = FUNCTIONS[place]
    assert found(owner, app, [*statements, f"ALTER FUNCTION {function} OWNER TO {{app}}"]) == [
        f"it owns the function {function}, which runs with the rights of whoever writes: {user} calls it"
    ]


TEXT = "CREATE DOMAIN code AS text"
TYPES = {
    "table device_state": [
        [TEXT, "ALTER TABLE device_state ADD note code"],
        [TEXT, "ALTER TABLE device_state ADD notes code[]"],
        [TEXT, "CREATE DOMAIN finer AS code", "CREATE DOMAIN finest AS finer", "ALTER TABLE device_state ADD n finest"],
        [TEXT, "CREATE TYPE pair AS (a code, b int)", "CREATE DOMAIN d AS pair[]", "ALTER TABLE device_state ADD n d"],
        [TEXT, "CREATE TYPE span AS RANGE (subtype = code)", "ALTER TABLE device_state ADD spans span[]"],
    ],
    "trigger z on table device_state": [
        [
            "CREATE DOMAIN code AS jsonb",
            "CREATE TRIGGER z BEFORE UPDATE ON device_state FOR EACH ROW "
            "WHEN (CAST(NEW.desired_state AS code) IS NOT NULL) EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        ]
    ],
    "constraint c on table device_state": [
        [TEXT, "ALTER TABLE device_state ADD CONSTRAINT c CHECK (CAST(status AS code) IS NOT NULL)"]
    ],
    "index i": [[TEXT, "CREATE INDEX i ON device_state ((CAST(status AS code)))"]],
    "default value for column status of table device_state": [
        [TEXT, "ALTER TABLE device_state ALTER status SET DEFAULT CAST('x' AS code)"]
    ],
    "policy p on table device_state": [
        [TEXT, "CREATE POLICY p ON device_state AS RESTRICTIVE USING (CAST(status AS code) IS NOT NULL)"]
    ],
}


@pytest.mark.parametrize("whose", ["it", "{app}_b"])
@pytest.mark.parametrize(("user", "statements"), [(user, each) for user, many in TYPES.items() for each in many])
def test_whose_domain_the_table_uses_can_add_a_check_that_sees_every_row_and_is_refused(
    owner: Connection, app: str, user: str, statements: list[str], whose: str
) -> None:
    group = ["CREATE ROLE {app}_b", "GRANT {app}_b TO {app}"]
    given = f"ALTER DOMAIN code OWNER TO {whose.replace('it', '{app}')}"
    assert found(owner, app, [*statements, *group, given]) == [
        f"{whose} owns the type code, and may add a CHECK, which runs with the rights of whoever writes: {user} uses it"
    ]


RELATIONS = {
    "policy p on table device_state": [
        "CREATE POLICY p ON device_state AS RESTRICTIVE USING (EXISTS (SELECT FROM other))"
    ],
    "rule r on table device_state": ["CREATE RULE r AS ON UPDATE TO device_state DO ALSO INSERT INTO other VALUES (1)"],
}


@pytest.mark.parametrize("given", ["ALTER TABLE other OWNER TO {app}", "GRANT TRIGGER ON other TO {app}"])
@pytest.mark.parametrize("user", RELATIONS)
def test_who_may_change_a_table_that_a_policy_or_a_rule_uses_is_refused(
    owner: Connection, app: str, user: str, given: str
) -> None:
    statements = ["CREATE TABLE other (a int)", *RELATIONS[user], given]
    assert found(owner, app, statements) == [
        f"it may change other, or make triggers on it or foreign keys to it, which run with rights of others: {user} uses it"
    ]


def test_who_owns_a_view_that_a_policy_reads_is_refused(owner: Connection, app: str) -> None:
    statements = ["CREATE VIEW other AS SELECT 1", RELATIONS["policy p on table device_state"][0],
                  "ALTER VIEW other OWNER TO {app}"]  # fmt: skip
    assert found(owner, app, statements) == [
        "it may change other, or make triggers on it or foreign keys to it, which run with rights of others: policy p on table device_state uses it"
    ]


def test_whose_enum_the_table_uses_can_rename_its_values_and_is_refused(owner: Connection, app: str) -> None:
    assert found(
        owner,
        app,
        [
            "CREATE TYPE mood AS ENUM ('good')",
            "ALTER TABLE device_state ADD moods mood[]",
            "ALTER TYPE mood OWNER TO {app}",
        ],
    ) == ["it owns the type mood, and may change it: table device_state uses it"]


@pytest.mark.parametrize(
    "statements",
    [
        [TEXT, "CREATE TABLE other (note code)", "CREATE VIEW v AS SELECT CAST(status AS code) FROM device_state"],
        [
            "CREATE DOMAIN code AS text",
            "CREATE DOMAIN used AS text CHECK (VALUE <> '')",
            "ALTER TABLE device_state ADD note used",
            "CREATE TABLE other (note used CHECK (CAST(note AS code) <> ''))",
        ],
    ],
    ids=["a view and another table", "a CHECK of another table"],
)
def test_a_domain_that_only_others_use_is_no_way_around(owner: Connection, app: str, statements: list[str]) -> None:
    assert found(owner, app, [*statements, "ALTER DOMAIN code OWNER TO {app}"]) == []


NOTES = "CREATE TABLE notes (t text, d text, FOREIGN KEY (t, d) REFERENCES device_state)"


@pytest.mark.parametrize(
    "statements",
    [
        [NOTES, "GRANT ALL ON notes TO {app}"],
        [
            "CREATE TABLE log (a text)",
            "CREATE RULE r AS ON DELETE TO device_state DO ALSO INSERT INTO log VALUES (OLD.device_id)",
            "GRANT SELECT, INSERT, UPDATE, DELETE ON log TO {app}",
        ],
        [
            *SITES,
            "CREATE TABLE log (a text)",
            "CREATE RULE r AS ON INSERT TO sites DO ALSO INSERT INTO log VALUES (NEW.site_id)",
            KEY + "ON DELETE CASCADE",
            "GRANT SELECT, INSERT ON sites, log TO {app}",
        ],
        [*SITES, KEY, "ALTER TABLE sites OWNER TO {app}"],
    ],
    ids=[
        "a foreign key without a cascade",
        "rows that a rule of the table wrote",
        "a rule of another table that stays there",
        "a table that is only looked up",
    ],
)
def test_another_tables_key_or_rule_that_reaches_no_row_of_the_table_is_no_way_around(
    owner: Connection, app: str, statements: list[str]
) -> None:
    assert found(owner, app, statements) == []


def test_a_rule_counts_for_who_may_do_what_it_waits_for(owner: Connection, app: str) -> None:
    rules = ["CREATE TABLE log (a text)", "CREATE RULE r AS ON UPDATE TO log DO ALSO DELETE FROM device_state"]
    assert found(owner, app, [*rules, "GRANT SELECT, INSERT, DELETE ON log TO {app}"]) == []

    assert found(owner, app, ["GRANT UPDATE (a) ON log TO {app}"]) == [
        "it may change rows of log, and the rule r changes those of the table with them"
    ]


# Functions that PostgreSQL runs as another role, in the search path of whoever changes a device.

CASCADED = "CREATE TABLE notes (t text, d text, FOREIGN KEY (t, d) REFERENCES device_state ON DELETE "
LOGS = (
    "CREATE FUNCTION logs() RETURNS trigger LANGUAGE plpgsql{} AS 'BEGIN INSERT INTO log VALUES (1); RETURN OLD; END'"
)
FIRES = "CREATE TRIGGER fires {} ON notes FOR EACH ROW EXECUTE FUNCTION logs()"


def shadowing(owner: Connection, function: str = "logs()", path: str = "public") -> str:
    role = owner.scalar(text("SELECT quote_ident(CAST(current_user AS text))"))
    return (
        f"it may put its own tables before those that the function {function} names, which runs as {role} "
        f"(ALTER FUNCTION {function} SET search_path = {path}, pg_temp)"
    )


@pytest.mark.parametrize(
    "statements",
    [
        [CASCADED + "CASCADE)", LOGS.format(""), FIRES.format("BEFORE DELETE")],
        [CASCADED + "SET NULL)", LOGS.format(" SET search_path = public"), FIRES.format("BEFORE UPDATE")],
        [CASCADED + "SET DEFAULT)", LOGS.format(" SET search_path = pg_temp"), FIRES.format("BEFORE INSERT OR UPDATE")],
        [CASCADED + "NO ACTION ON UPDATE CASCADE)", LOGS.format(" SECURITY DEFINER"), FIRES.format("AFTER UPDATE")],
        [
            "CREATE TABLE notes (note text PRIMARY KEY, t text, d text,"
            " FOREIGN KEY (t, d) REFERENCES device_state ON DELETE CASCADE)",
            "CREATE TABLE files (note text REFERENCES notes ON DELETE CASCADE)",
            LOGS.format(""),
            FIRES.format("BEFORE DELETE").replace("notes", "files"),
        ],
        [LOGS.format(" SECURITY DEFINER"), FIRES.format("AFTER INSERT").replace("notes", "device_state")],
    ],
    ids=["CASCADE", "SET NULL", "SET DEFAULT", "ON UPDATE", "two steps away", "SECURITY DEFINER"],
)
def test_a_trigger_that_runs_as_another_role_in_the_callers_search_path_is_named_until_it_has_a_path_of_its_own(
    owner: Connection, app: str, statements: list[str]
) -> None:
    assert found(owner, app, statements) == [shadowing(owner)]

    assert found(owner, app, ["ALTER FUNCTION logs() SET search_path = public, pg_temp"]) == []


@pytest.mark.parametrize("path", ["''", "pg_catalog"])
def test_the_catalogs_tables_come_behind_temporary_ones_where_the_path_does_not_name_these(
    owner: Connection, app: str, path: str
) -> None:
    made = [CASCADED + "CASCADE)", LOGS.format(f" SET search_path = {path}"), FIRES.format("BEFORE DELETE")]
    assert found(owner, app, made) == [shadowing(owner, path="pg_catalog")]

    assert found(owner, app, ["ALTER FUNCTION logs() SET search_path = pg_catalog, pg_temp"]) == []


def test_before_postgresql_18_a_trigger_after_a_cascade_runs_as_whoever_changed_the_device(
    owner: Connection, app: str
) -> None:
    new = owner.scalar(text("SELECT current_setting('server_version_num')::int >= 180000"))
    said = found(owner, app, [CASCADED + "CASCADE)", LOGS.format(""), FIRES.format("AFTER DELETE")])
    assert said == ([shadowing(owner)] if new else [])


@pytest.mark.parametrize(
    "statements",
    [
        [CASCADED + "NO ACTION)", LOGS.format(""), FIRES.format("BEFORE DELETE")],
        [CASCADED + "CASCADE)", LOGS.format(""), FIRES.format("BEFORE INSERT")],
        [
            CASCADED + "CASCADE)",
            LOGS.format(""),
            FIRES.format("BEFORE DELETE"),
            "ALTER TABLE notes DISABLE TRIGGER fires",
        ],
        [
            CASCADED + "CASCADE)",
            "CREATE TRIGGER t BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        ],
        [
            CASCADED + "CASCADE ON UPDATE CASCADE)",
            "ALTER TABLE notes ADD CHECK (t || 1 <> d), ADD CHECK (quote_literal(1) <> d)",
        ],
        [
            CASCADED + "CASCADE ON UPDATE CASCADE)",
            "CREATE FUNCTION known(text) RETURNS boolean LANGUAGE sql RETURN $1 IN (SELECT site_id FROM device_state)",
            "ALTER TABLE notes ADD CHECK (known(d))",
        ],
        [
            CASCADED + "CASCADE ON UPDATE CASCADE)",
            "CREATE FUNCTION known(text) RETURNS boolean LANGUAGE plpgsql AS 'BEGIN RETURN true; END'",
            "ALTER TABLE notes ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
            "CREATE POLICY p ON notes USING (known(t))",
        ],
        [LOGS.format(""), FIRES.format("BEFORE DELETE").replace("notes", "device_state")],
        [
            CASCADED + "CASCADE)",
            LOGS.format(""),
            FIRES.format("BEFORE DELETE"),
            "REVOKE INSERT, UPDATE, DELETE ON device_state, device_shadow_history FROM {app}",
        ],
        [
            CASCADED + "CASCADE)",
            LOGS.format(""),
            FIRES.format("BEFORE DELETE"),
            "DO $$ BEGIN EXECUTE format('REVOKE TEMP ON DATABASE %I FROM PUBLIC', current_database()); END $$",
            "REVOKE CREATE ON SCHEMA public FROM PUBLIC",
        ],
    ],
    ids=[
        "no cascade",
        "for INSERT",
        "a trigger that is disabled",
        "a function of the catalog",
        "functions of the catalog in SQL",
        "a function whose names were found when it was made",
        "a policy that does not apply to foreign keys",
        "as the caller",
        "a role that only reads",
        "a role that can make no table",
    ],
)
def test_other_code_is_no_way_around(owner: Connection, app: str, statements: list[str]) -> None:
    assert found(owner, app, statements) == []
