"""A fleet of two tenants, and the role that an application logs in as."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from iot_models import tenancy
from tests.databases.devices import TENANT, add_device

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import URL, Connection, Engine

OTHER = "globex"
# Ids that a literal, a driver's placeholders or a template might trip over.
STRANGE = [
    "o'neill", "''", "\\", "\\'", "'; DROP TABLE device_state; --", "E'", "$$", "$1", "100%", "%s", "%(a)s", "%%",
    ":name", "::", "{}", "{0}", '"quoted"', "?", "line\nbreak", "\t", "größe", "東京", "🌡", " ", "DEFAULT", "0",
    "x" * 2000,
]  # fmt: skip
PRIVILEGES = "SELECT, INSERT, UPDATE, DELETE"
ON_HISTORY = "SELECT, INSERT, DELETE"


def two_tenants(owner: Engine) -> None:
    """Two devices each, of the same names; the first has something to do."""
    with Session(owner) as session, session.begin():
        for tenant in (TENANT, OTHER):
            add_device(session, tenant_id=tenant, desired_state={"of": tenant}, desired_version=1)
            add_device(session, "thermostat-2", tenant_id=tenant)


def isolate(owner: Engine, role: str) -> None:
    # Two transactions: autovacuum waits for one that grants, and the lock that `enable` takes waits for autovacuum.
    with owner.begin() as connection:
        connection.execute(text(f"GRANT {PRIVILEGES} ON device_state TO {role}"))
        if connection.scalar(text("SELECT to_regclass('device_shadow_history') IS NOT NULL")):
            connection.execute(text(f"GRANT {ON_HISTORY} ON device_shadow_history TO {role}"))
    with owner.begin() as connection:
        tenancy.enable(connection, role)


def clear(owner: Engine) -> None:
    """Leave the table as other tests expect it: empty, without a policy."""
    with owner.begin() as connection:
        for table in ("device_state", "device_shadow_history"):
            connection.execute(text(f"TRUNCATE {table}"))
            connection.execute(text(f"DROP POLICY IF EXISTS iot_models_tenant ON {table}"))
            connection.execute(text(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY"))


def login(owner: Engine, role: str) -> URL:
    """The same database as that role."""
    return owner.url.set(username=role, password=role)


@contextmanager
def application(owner: Engine, role: str) -> Iterator[Engine]:
    """Both tenants' devices, and an engine of the isolated role with one connection, which everybody gets in turn."""
    engine = create_engine(login(owner, role), pool_size=1, max_overflow=0, pool_timeout=2)
    try:
        two_tenants(owner)
        isolate(owner, role)
        yield engine
    finally:
        engine.dispose()
        clear(owner)


@contextmanager
def rolled_back(owner: Engine, role: str) -> Iterator[Connection]:
    """The owner, in a transaction whose roles, grants and policies are rolled back too; a row of each tenant."""
    with owner.connect() as connection, connection.begin() as transaction:
        run(connection, "LOCK TABLE device_state, device_shadow_history")  # before the grant: see isolate
        for tenant in (TENANT, OTHER):
            run(connection, f"INSERT INTO device_state (tenant_id, site_id, device_id) VALUES ('{tenant}', 's', 'd')")
        run(connection, f"GRANT {PRIVILEGES} ON device_state TO {role}")
        run(connection, f"GRANT {ON_HISTORY} ON device_shadow_history TO {role}")
        yield connection
        transaction.rollback()


def run(connection: Connection, statement: str) -> None:
    connection.exec_driver_sql(statement, execution_options={"no_parameters": True})


def tenants(session: Session) -> list[str]:
    """The tenants whose rows raw SQL without any condition shows."""
    return list(session.scalars(text("SELECT DISTINCT tenant_id FROM device_state ORDER BY 1")))


def tenants_for(connection: Connection, role: str, bound_to: str = TENANT) -> set[str]:
    """The tenants whose rows the role sees."""
    with connection.begin_nested() as savepoint:
        run(connection, f"SET LOCAL ROLE {role}")
        run(connection, f"SET LOCAL app.tenant_id = '{bound_to}'")
        seen = set(connection.scalars(text("SELECT tenant_id FROM device_state")))
        savepoint.rollback()
    return seen


def security(connection: Connection) -> list[tuple[object, ...]]:
    """All that PostgreSQL knows of the table's policies, their oids included."""
    return [
        tuple(row)
        for row in connection.execute(
            text("""SELECT c.relrowsecurity, c.relforcerowsecurity, p.oid, p.polname, p.polroles, p.polpermissive,
                           p.polcmd, pg_get_expr(p.polqual, c.oid), pg_get_expr(p.polwithcheck, c.oid)
                      FROM pg_class c LEFT JOIN pg_policy p ON p.polrelid = c.oid
                     WHERE c.oid = to_regclass('device_state') ORDER BY p.polname""")
        )
    ]


OFF = [(False, False, *[None] * 7)]


def rows(owner: Engine) -> list[str]:
    """Every row of every tenant, as the owner sees them."""
    with owner.connect() as connection:
        return list(connection.scalars(text("SELECT d::text FROM device_state d ORDER BY 1")))
