"""No statement of ours calls a function or an operator of a stranger's, however well it matches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from alembic.util import CommandError
from sqlalchemy import NullPool, make_url, select, text
from sqlalchemy.orm import Session

from iot_models import DeviceState, Report, ShadowService, migrate, tenancy
from iot_models._migrations import deployers, operations
from iot_models._migrations.strangers import VERSION_TABLE
from iot_models.engine import create_engine
from iot_models.testing import database
from tests.databases.devices import TENANT, add_device
from tests.databases.engines import KINDS, Kind
from tests.migrations.raw_sql import FLEET, RAW_075, SHADOWS, interrupt_a_downgrade, run_sql
from tests.security.hostile import hostile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from iot_models.testing import PostgresServer

pytestmark = pytest.mark.repeats

TYPES = ["text", "varchar", "name", "jsonb", "int4", "int8", "timestamptz", "interval", "oid", "regclass", "text[]"]
OPERATORS = ["=", "<>", "<", ">", "<=", ">=", "||", "->", "->>", "@>", "+", "-", "*", "/"]
FUNCTIONS = [
    "now",
    "coalesce",
    "greatest",
    "least",
    "unnest",
    "cardinality",
    "count",
    "current_setting",
    "extract",
    "jsonb_each",
    "jsonb_typeof",
    "jsonb_object_agg",
    "set_config",
    "bool_and",
    "bool_or",
    "quote_ident",
    "format",
    "concat",
]


@pytest.fixture(scope="module")
def attacked(server: PostgresServer, migrated_url: str) -> Iterator[str]:
    with database(server, migrated_url) as url:
        engine = create_engine(url, poolclass=NullPool)
        with Session(engine) as session, session.begin():
            for device in "abc":
                add_device(session, device)
        with engine.begin() as connection:
            connection.execute(text(hostile(TYPES, OPERATORS, FUNCTIONS)))
        yield url


def test_the_attack_would_be_noticed(attacked: str) -> None:
    with create_engine(attacked, poolclass=NullPool).connect() as connection:
        with pytest.raises(Exception, match="called over text and varchar"):
            connection.execute(text("SELECT CAST('a' AS text) = CAST('a' AS varchar)"))
        connection.rollback()
        with pytest.raises(Exception, match="called quote_ident over name"):
            connection.execute(text("SELECT quote_ident(CAST('a' AS name))"))


def _flush(session: Session) -> None:
    device = session.get_one(DeviceState, (TENANT, "a"))
    device.desired_state["changed"] = {"at": 1}
    session.flush()


def _hybrids(session: Session) -> None:
    session.execute(
        select(DeviceState.delta, DeviceState.is_converged, DeviceState.is_drifted, DeviceState.is_pending)
    ).all()


def _service(call: Callable[[ShadowService], object]) -> Callable[[Session], object]:
    return lambda session: call(ShadowService(session, TENANT))


CALLS: dict[str, Callable[[Session], object]] = {
    "get": _service(lambda s: s.get("a")),
    "get_many": _service(lambda s: s.get_many(["abc"])),
    "replace_desired": _service(
        lambda s: s.replace_desired("a", {"x": 1}, expected_version=s.get("a").desired_version)
    ),
    "patch_desired": _service(lambda s: s.patch_desired("a", {"x": 1})),
    "replace_reported": _service(lambda s: s.replace_reported("a", {"x": 1}, acked_version=s.get("a").desired_version)),
    "patch_reported": _service(lambda s: s.patch_reported("a", {"x": 2})),
    "ack_if_converged": _service(
        lambda s: (
            s.replace_desired("a", {"x": {"y": [1]}}),
            s.replace_reported("a", {"x": {"y": [1], "z": 2}}, ack_if_converged=True),
            s.patch_reported("a", {"x": {"y": [2]}}, ack_if_converged=True),
            s.replace_reported_many([Report("a", {"x": {"y": [1], "z": 2}}, ack_if_converged=True)]),
        )
    ),
    "pending": _service(lambda s: (s.pending(), s.pending(after="a"), [*s.iter_pending(batch_size=1)])),
    "counts": _service(lambda s: (s.count_pending(), s.status_counts())),
    "drifted": _service(lambda s: (s.drifted(), s.drifted(after="a"))),
    "replace_desired_many": _service(
        lambda s: s.replace_desired_many({"a": {}, "b": {}}, expected_versions={"a": s.get("a").desired_version})
    ),
    "patch_desired_many": _service(lambda s: s.patch_desired_many(["a", "b"], {"y": 1})),
    "replace_reported_many": _service(
        lambda s: (
            s.replace_reported_many([Report("a", {}, s.get("a").desired_version), Report("b", {})]),
            s.replace_reported_many([Report("a", {}), Report("a", {"z": 1}), Report("x", {})]),
        )
    ),
    "patch_reported_many": _service(lambda s: s.patch_reported_many([Report("a", {"p": 1}, ack_if_converged=True)])),
    "a flush": _flush,
    "the hybrids": _hybrids,
    "binding a tenant": lambda session: tenancy.bind_tenant(session, TENANT),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("driver", KINDS)
def test_no_call_of_the_service_calls_a_strangers_code(attacked: str, driver: str, call: str) -> None:
    Kind(driver, make_url(attacked)).ask(lambda connection: CALLS[call](Session(connection)))


# What migrations ask and do, at each step of a history. Alembic's own statements are among them. (Those of printed SQL
# cannot be helped: it asks for strangers at its beginning.)
CATALOG_TYPES = [
    "text",
    "varchar",
    "name",
    '"char"',
    "bool",
    "int2",
    "int4",
    "int8",
    "oid",
    "regclass",
    "regproc",
    "timestamptz",
    "interval",
    "jsonb",
    "text[]",
    "name[]",
    "oid[]",
    "int2vector",
    "oidvector",
]
CATALOG_OPERATORS = ["=", "<>", "<", ">", "||", "~", "~~", "+"]
CATALOG_FUNCTIONS = [
    "concat",
    "format",
    "quote_ident",
    "quote_literal",
    "to_regclass",
    "to_regprocedure",
    "string_agg",
    "count",
    "bool_or",
    "unnest",
    "round",
    "aclexplode",
    "acldefault",
    "regexp_replace",
    "replace",
    "pg_describe_object",
    "pg_get_userbyid",
    "format_type",
    "pg_get_expr",
    "pg_has_role",
    "has_table_privilege",
    "row_security_active",
    "current_setting",
    "set_config",
    "jsonb_typeof",
]


def test_no_migration_calls_a_strangers_code(new_database: Callable[..., str]) -> None:
    url = new_database()
    run_sql(url, RAW_075, FLEET, hostile(CATALOG_TYPES, CATALOG_OPERATORS, CATALOG_FUNCTIONS))
    before_the_name = f"ALTER TABLE {VERSION_TABLE} RENAME TO alembic_version; ALTER TABLE alembic_version RENAME "
    engine = create_engine(url, poolclass=NullPool)  # run_sql's would call one

    def sql(statement: str) -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql(statement)

    migrate.upgrade(url)
    sql(SHADOWS)
    assert migrate.check(url) == []
    interrupt_a_downgrade(engine)
    assert migrate.check(url) != []
    migrate.upgrade(url)
    migrate.downgrade(url, "075")
    assert migrate.check(url) != []
    sql(f"{before_the_name} CONSTRAINT {VERSION_TABLE}_pkc TO alembic_version_pkc")
    assert migrate.current(url) == "075"
    migrate.upgrade(url)
    with engine.connect() as holder:
        holder.execute(text("SELECT FROM device_state"))
        with pytest.raises(CommandError, match="It is held by: pid"):
            migrate.downgrade(url, "075", lock_timeout="1ms")
    with engine.connect() as connection:
        deployers._holder(connection)  # noqa: SLF001 - what it asks
        operations._builds(engine.pool)  # noqa: SLF001 - the same
        connection.rollback()
        migrate.upgrade(connection)
    migrate.downgrade(url, "base", device_state="drop")
    migrate.upgrade(url)


def test_tenancy_calls_no_strangers_code(attacked: str, server_role: str) -> None:
    with create_engine(attacked, poolclass=NullPool).connect() as connection:
        tenancy.enable(connection, server_role)
        tenancy.enable(connection, server_role)
        assert tenancy.check(connection, server_role) == []
        tenancy.disable(connection, server_role)
        connection.rollback()
