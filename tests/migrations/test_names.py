"""Names that are taken, and names that need quoting: refused before any change, or harmless."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from alembic.util import CommandError
from sqlalchemy import NullPool, create_engine, make_url, text
from sqlalchemy.orm import Session

from iot_models import ShadowService, migrate, tenancy
from tests.migrations.raw_sql import FLEET, PARKED, RAW_075, SHADOWS, rows_of, run_sql, state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from iot_models.testing import PostgresServer

MAKE = {
    "view": "CREATE VIEW {name} AS SELECT 1 AS a",
    "materialized view": "CREATE MATERIALIZED VIEW {name} AS SELECT 1 AS a",
    "sequence": "CREATE SEQUENCE {name}",
    "composite type": "CREATE TYPE {name} AS (a int)",
    "table": "CREATE TABLE {name} (a int)",
    "partitioned table": "CREATE TABLE {name} (a int) PARTITION BY HASH (a)",
    "index": "CREATE INDEX {name} ON another (a)",
    "foreign table": "CREATE FOREIGN TABLE {name} (a int) SERVER elsewhere",
}
TYPES = {"domain": "CREATE DOMAIN {name} AS int", "enum": "CREATE TYPE {name} AS ENUM ('a')"}
INDEXES = ["idx_device_state_site", "idx_device_state_shadow_pending", "idx_device_state_shadow_pending_device"]


@pytest.fixture
def url(empty: str) -> Iterator[str]:
    run_sql(
        empty,
        "CREATE TABLE another (a int)",
        "CREATE FOREIGN DATA WRAPPER elsewhere; CREATE SERVER elsewhere FOREIGN DATA WRAPPER elsewhere",
    )
    yield empty
    run_sql(empty, "DROP FOREIGN DATA WRAPPER elsewhere CASCADE")


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        *(("an empty database", kind) for kind in MAKE),
        ("a deployment by raw SQL", "view"),
        ("a deployment by raw SQL", "index"),
    ],
)
def test_an_upgrade_names_all_that_has_a_name_of_its_own(url: str, start: str, kind: str) -> None:
    names = [PARKED, *INDEXES]
    if start != "an empty database":
        run_sql(url, RAW_075, FLEET)
        names.remove("idx_device_state_site")
    run_sql(url, *(MAKE[kind].format(name=name) for name in names))
    before = state(url)

    with pytest.raises(CommandError, match="nothing was changed") as caught:
        migrate.upgrade(url)
    for name in names:
        assert name in str(caught.value)
    assert state(url) == before
    assert migrate.check(url)  # says so, and does not fail


@pytest.mark.repeats
@pytest.mark.parametrize("kind", TYPES)
def test_a_type_with_the_name_of_a_table_is_refused_before_the_table_is_made(at_head: str, kind: str) -> None:
    run_sql(at_head, FLEET, SHADOWS, TYPES[kind].format(name=PARKED))
    before = state(at_head)
    with pytest.raises(CommandError, match=f"a table's name is taken by type {PARKED}"):
        migrate.downgrade(at_head, "075")
    assert state(at_head) == before

    run_sql(at_head, "DROP TABLE alembic_version_iot_models, device_state", TYPES[kind].format(name="device_state"))
    with pytest.raises(CommandError, match="a table's name is taken by type device_state"):
        migrate.upgrade(at_head)


@pytest.mark.parametrize("kind", ["view", "sequence", "composite type", "table", "index", "enum"])
def test_another_object_with_the_name_of_the_version_table_is_refused_by_every_command(url: str, kind: str) -> None:
    run_sql(url, (MAKE | TYPES)[kind].format(name="alembic_version_iot_models"))

    for command in (migrate.upgrade, migrate.check, lambda url: migrate.downgrade(url, "base")):
        with pytest.raises(
            CommandError, match="alembic_version_iot_models has the name of the table in which Alembic keeps"
        ):
            command(url)

    run_sql(url, f"DROP {_word(kind)} alembic_version_iot_models")
    run_sql(url, MAKE["sequence"].format(name="alembic_version_iot_models_pkc"))
    with pytest.raises(CommandError, match="alembic_version_iot_models_pkc has the name"):
        migrate.upgrade(url)


def _word(kind: str) -> str:
    return {"composite type": "TYPE", "enum": "TYPE", "partitioned table": "TABLE"}.get(kind, kind.upper())


STRANGE = [
    "quo\"ted o'clock per%cent %s %(a)s",
    "$1 $$ $user co:lon :name\nline",
    r"back\:slash \ größe",
    "x" * 63,
]


@pytest.mark.repeats
@pytest.mark.parametrize("name", STRANGE)
def test_a_database_a_schema_and_roles_may_have_any_name(server: PostgresServer, name: str) -> None:
    """The owner has the name as well, and so has the application's role, but for its last letter."""
    quoted, application = _quoted(name), name[:-1]
    run_sql(server.url, f"CREATE ROLE {quoted} LOGIN; CREATE ROLE {_quoted(application)} LOGIN")
    _outside_a_transaction(server.url, f"CREATE DATABASE {quoted} OWNER {quoted}")
    url = make_url(server.url).set(database=name, username=name)
    try:
        with create_engine(url, poolclass=NullPool).begin() as connection:
            connection.exec_driver_sql(f"CREATE SCHEMA {quoted}", execution_options={"no_parameters": True})
        engine = create_engine(url, connect_args={"options": f"-c search_path={_escaped(quoted)}"}, poolclass=NullPool)

        migrate.upgrade(engine)
        with engine.begin() as connection:
            connection.exec_driver_sql(FLEET, execution_options={"no_parameters": True})
            connection.exec_driver_sql(SHADOWS, execution_options={"no_parameters": True})
            connection.exec_driver_sql(
                f"GRANT SELECT, UPDATE ON device_state TO {_quoted(application)}",
                execution_options={"no_parameters": True},
            )
            tenancy.enable(connection, application)
            assert tenancy.check(connection, application) == []
        before = _shadows(engine)
        migrate.downgrade(engine, "075")
        migrate.upgrade(engine)
        assert _shadows(engine) == before
        assert migrate.check(engine) == []
        with Session(engine) as session:
            assert ShadowService(session, "globex").get("d1").desired_version == 7
    finally:
        _outside_a_transaction(server.url, f"DROP DATABASE {quoted} WITH (FORCE)")
        run_sql(server.url, f"DROP ROLE {quoted}; DROP ROLE {_quoted(application)}")


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _escaped(option: str) -> str:
    return re.sub(r"([\\\s])", r"\\\1", option)


def _outside_a_transaction(url: str, statement: str) -> None:
    with create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool).connect() as connection:
        connection.exec_driver_sql(statement, execution_options={"no_parameters": True})


def _shadows(engine: object) -> list[str]:
    with engine.connect() as connection:  # type: ignore[attr-defined]
        return list(connection.scalars(text("SELECT CAST(d AS text) FROM device_state d ORDER BY 1")))


@pytest.mark.repeats
def test_a_stranger_who_is_dropped_half_way_is_no_stranger_to_the_next_command(
    server: PostgresServer, new_database: Callable[..., str]
) -> None:
    url, role = new_database(), _quoted('line\n"break"')
    run_sql(url, f"CREATE ROLE {role}; GRANT CREATE ON SCHEMA public TO {role}")
    run_sql(url, f"SET ROLE {role}; CREATE TABLE {PARKED} (a int)")
    with pytest.raises(CommandError, match=rf'table {PARKED} of role "line\\n""break"""'):
        migrate.upgrade(url)

    run_sql(url, f"DROP OWNED BY {role}; DROP ROLE {role}")
    migrate.upgrade(url)

    assert migrate.check(url) == []
    assert rows_of(url) == []
    assert server.url
