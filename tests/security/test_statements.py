"""No statement of ours calls a function or an operator of a stranger's, however well it matches."""

from __future__ import annotations

import re
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import pytest
from alembic.util import CommandError
from sqlalchemy import NullPool, insert, make_url, select, text
from sqlalchemy.orm import Session

from iot_models import DeviceState, Report, ShadowHistory, ShadowService, migrate, tenancy
from iot_models._migrations import deployers, indexes
from iot_models._migrations.strangers import VERSION_TABLE
from iot_models.engine import create_engine
from iot_models.testing import database
from tests.databases import partitioned
from tests.databases.alembic_runs import CHECKOUT
from tests.databases.backends import backend_pid
from tests.databases.devices import TENANT, add_device
from tests.databases.engines import KINDS, Kind
from tests.migrations.raw_sql import FLEET, RAW_075, SHADOWS, as_role, interrupt_a_downgrade, psql, run_sql
from tests.security.hostile import hostile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from iot_models.testing import PostgresServer

pytestmark = pytest.mark.repeats

TYPES = [
    "text", "varchar", "name", "bool", "jsonb", "int4", "int8", "numeric", "timestamptz", "interval", "oid", "regclass", "text[]",
    "xid", "xid8", "pg_snapshot",
]  # fmt: skip
OPERATORS = ["=", "<>", "<", ">", "<=", ">=", "||", "->", "->>", "@>", "+", "-", "*", "/"]
FUNCTIONS = [
    "now",
    "coalesce",
    "greatest",
    "least",
    "unnest",
    "cardinality",
    "count",
    "max",
    "min",
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
    "pg_current_snapshot",
    "pg_current_xact_id",
    "pg_current_xact_id_if_assigned",
    "pg_snapshot_xmin",
    "pg_snapshot_xmax",
    "pg_control_system",
    "current_database",
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


def _registered_and_removed(service: ShadowService) -> None:
    service.register("new", "s")
    service.remove("new", expected_version=0)
    service.register_many({"new": "s", "a": "s"})


def _changes(session: Session) -> None:
    """From the start, which asks for what another cluster wrote too, and behind a version."""
    shadows = ShadowService(session, TENANT)
    session.execute(
        insert(ShadowHistory),
        [
            {"tenant_id": TENANT, "device_id": "h", "desired_version": n, "transaction_id": 2 * 10**15 * n}
            for n in (0, 1)
        ],
    )
    first = shadows.changes(limit=1)
    assert first.changes
    assert shadows.changes(after=first.cursor).changes
    assert shadows.prune_history(older_than=timedelta(0), keep=0)
    shadows.prune_history(older_than=timedelta(0), keep=0)


def _life(session: Session) -> None:
    for _ in range(2):
        device = DeviceState(tenant_id=TENANT, site_id="s", device_id="object")
        session.add(device)
        session.flush()
        session.delete(device)
        session.flush()


def _hybrids(session: Session) -> None:
    session.execute(
        select(DeviceState.delta, DeviceState.is_converged, DeviceState.is_drifted, DeviceState.is_refused)
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
    "requests": _service(
        lambda s: [
            write()
            for write in (
                partial(s.replace_desired, "a", {"r": 1}, request_id="r-1"),
                partial(s.patch_desired, "a", {"r": 2}, request_id="r-2"),
                partial(s.restore_desired, "a", 0, request_id="r-3"),
            )
            for _ in range(2)
        ]
    ),
    "history": _service(
        lambda s: (
            s.patch_desired("a", {"h": 1}, reason="r"),
            s.history("a"),
            s.history("a", before=1),
            s.desired_at("a", 0),
            s.restore_desired("a", 0, expected_version=s.get("a").desired_version),
            s.prune_history(older_than=timedelta(days=1)),
        )
    ),
    "changes": _changes,
    "refusals": _service(
        lambda s: (
            s.refuse_desired("a", s.patch_desired("a", {"x": 1}).desired_version, "no"),
            s.replace_reported_many(
                [Report("a", {}, refused_version=s.patch_desired("a", {}).desired_version, refusal="no")]
            ),
            s.refused(),
            s.refused(after="a"),
            s.count_refused(),
        )
    ),
    "life": _service(_registered_and_removed),
    "an object's life": _life,
    "a flush": _flush,
    "the hybrids": _hybrids,
    "binding a tenant": lambda session: tenancy.bind_tenant(session, TENANT),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("driver", KINDS)
def test_no_call_of_the_service_calls_a_strangers_code(attacked: str, driver: str, call: str) -> None:
    Kind(driver, make_url(attacked)).ask(lambda connection: CALLS[call](Session(connection)))


# What migrations ask and do, at each step of a history. Alembic's own statements are among them.
CATALOG_TYPES = [
    "text", "varchar", "bpchar", "name", '"char"', "bool", "int2", "int4", "int8", "numeric", "oid", "regclass", "regproc",
    "regtype", "regnamespace", "xid", "xid8", "pg_snapshot", "timestamptz", "interval", "json", "jsonb", "text[]", "varchar[]", "name[]", "oid[]",
    "int2[]", "regclass[]", "int2vector", "oidvector",
]  # fmt: skip
CATALOG_OPERATORS = ["=", "<>", "<", ">", "<=", ">=", "||", "~", "~~", "+", "-", "/", "<<", "&&", "@>"]
# Whatever our SQL calls. Each name that an opening parenthesis follows is one, or none of the catalog's.
CALLED = sorted(
    {
        name
        for folder in ("iot_models/_migrations", "iot_models/_core", "alembic/versions")
        for path in (CHECKOUT / folder).glob("*.py")
        for name in re.findall(r"\b([a-z_0-9]{3,})\(", path.read_text())
    }
)


class Deployment(NamedTuple):
    """A database at 075 whose plain owner migrates, as a superuser and as that owner; and a role of the application's.

    A superuser, who may everything, would miss half of our questions: they begin with a right that is not there.
    """

    superuser: str
    owner: str
    app: str


@pytest.fixture
def deployment(new_database: Callable[..., str], server_role: str) -> Iterator[Deployment]:
    url = new_database()
    owned = f"DATABASE {make_url(url).database}", "SCHEMA public"
    app = f"{server_role}_app"
    run_sql(url, f"CREATE ROLE {app};", *(f"ALTER {one} OWNER TO {server_role};" for one in owned))
    run_sql(as_role(url, server_role), RAW_075, FLEET)
    yield Deployment(url, as_role(url, server_role), app)
    sql(url, *(f"ALTER {one} OWNER TO postgres" for one in owned), f"DROP OWNED BY {server_role}, {app} CASCADE",
        f"DROP ROLE {app}")  # fmt: skip


def sql(url: str, *statements: str) -> None:
    """On a connection of ours: SQLAlchemy's own asks what a planted operator would answer."""
    with create_engine(url, poolclass=NullPool).begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def plant(deployment: Deployment, types: Sequence[str]) -> None:
    """Of the superuser's, who is trusted: else the migration would refuse to begin."""
    run_sql(deployment.superuser, hostile(types, CATALOG_OPERATORS, CALLED), "GRANT USAGE ON SCHEMA attack TO PUBLIC")


def test_no_migration_calls_a_strangers_code(deployment: Deployment) -> None:
    url = deployment.owner
    plant(deployment, CATALOG_TYPES)
    before_the_name = f"ALTER TABLE {VERSION_TABLE} RENAME TO alembic_version; ALTER TABLE alembic_version RENAME "
    engine = create_engine(url, poolclass=NullPool)
    migrate.upgrade(url)
    sql(url, SHADOWS, f"GRANT SELECT, INSERT, UPDATE, DELETE ON device_state TO {deployment.app}")
    assert migrate.check(url) == []
    with engine.begin() as connection:
        tenancy.enable(connection, deployment.app)
        assert tenancy.check(connection, deployment.app) == []
    interrupt_a_downgrade(engine)
    assert migrate.check(url) != []
    migrate.upgrade(url)
    migrate.downgrade(url, "075")
    assert migrate.check(url) != []
    sql(url, f"{before_the_name} CONSTRAINT {VERSION_TABLE}_pkc TO alembic_version_pkc")
    assert migrate.current(url) == "075"
    migrate.upgrade(url)
    with engine.connect() as holder:
        holder.execute(text("SELECT FROM device_state"))
        with pytest.raises(CommandError, match="It is held by: pid"):
            migrate.downgrade(url, "075", lock_timeout="1ms")
    with engine.connect() as connection:
        deployers._holder(connection)  # noqa: SLF001 - what it asks
        indexes._state_of_build(engine.pool, backend_pid(connection))  # noqa: SLF001 - the same
        connection.rollback()
        migrate.upgrade(connection)
    migrate.downgrade(url, "base", device_state="drop")
    migrate.upgrade(url)


@partitioned.needs_one_piece("printed SQL refuses it")
def test_printed_sql_calls_a_strangers_code_in_alembics_own_statements_only(deployment: Deployment) -> None:
    """Alembic compares a revision, a VARCHAR, in the whole search path. It asks for strangers at its beginning."""
    url = deployment.owner
    migrate.upgrade(url)
    run_sql(url, SHADOWS)
    plant(deployment, [one for one in CATALOG_TYPES if one not in {"varchar", "bpchar", "varchar[]"}])

    for way in ("head:075", "075:head", "head:075"):
        printed = psql(url, migrate.sql(way))
        assert printed.returncode == 0, printed.stderr
    # A device that has a newer shadow keeps the parked one from being put back, which is said.
    sql(
        deployment.superuser,
        "SET search_path = pg_catalog",
        "ALTER TABLE public.device_state ADD desired_version int NOT NULL DEFAULT 0",
        "UPDATE public.device_state SET desired_version = 9 WHERE device_id = 'd1'",
    )
    printed = psql(url, migrate.sql("075:head"))
    assert printed.returncode == 0, printed.stderr
    assert "1 parked shadows stay" in printed.stderr


def test_tenancy_calls_no_strangers_code(attacked: str, server_role: str) -> None:
    with create_engine(attacked, poolclass=NullPool).connect() as connection:
        tenancy.enable(connection, server_role)
        tenancy.enable(connection, server_role)
        assert tenancy.check(connection, server_role) == []
        tenancy.disable(connection, server_role)
        connection.rollback()
