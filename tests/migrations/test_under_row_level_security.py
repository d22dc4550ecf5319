"""Migrations of a table with row level security: they see every row, and do not change the policies."""

from __future__ import annotations

import pytest
from sqlalchemy import NullPool, create_engine, make_url

from iot_models import migrate, tenancy
from tests.databases.alembic_runs import downgrade, upgrade
from tests.databases.schema_dump import dump
from tests.databases.tenants import isolate
from tests.migrations.raw_sql import FLEET, PARKED, RAW_075, as_role, rows_of, run_sql, tables_of

pytestmark = pytest.mark.repeats

HISTORY = "device_shadow_history"


@pytest.fixture
def url(shadow_fleet_at_head: str, server_role: str) -> str:
    """A fleet of two tenants with shadows, with row level security enabled."""
    isolate(create_engine(shadow_fleet_at_head, poolclass=NullPool), server_role)
    return shadow_fleet_at_head


def tenants(url: str, role: str, tenant: str | None = None) -> set[str]:
    """The tenants whose rows the role sees, bound to a tenant or not bound."""
    bind = f"SET LOCAL app.tenant_id = '{tenant}';" if tenant else ""
    return {row[0] for row in run_sql(as_role(url, role), bind + "SELECT tenant_id FROM device_state")}


def test_a_rollback_and_the_upgrade_after_it_keep_every_shadow_of_every_tenant_and_the_policy(
    url: str, server_role: str
) -> None:
    before, schema = rows_of(url), dump(url)
    of_both = [line for line in schema.splitlines() if "POLICY" in line or "ROW LEVEL" in line]
    policy = [line for line in of_both if HISTORY not in line]
    assert (len(of_both), len(policy)) == (4, 2)

    downgrade(url, "075")
    assert {row.split(",")[0] for row in rows_of(url, PARKED)} == {"(acme", "(globex"}
    left = [line for line in dump(url).splitlines() if "POLICY" in line or "ROW LEVEL" in line]
    assert [line for line in left if PARKED not in line] == policy
    assert tenants(url, server_role, "acme") == {"acme"}
    assert tenants(url, server_role) == set()
    with pytest.raises(Exception, match=f"permission denied for table {PARKED}"):
        run_sql(as_role(url, server_role), f"SELECT * FROM {PARKED}")

    upgrade(url)
    assert rows_of(url) == before
    assert dump(url) == schema  # the policy of the history, too
    assert PARKED not in tables_of(url)


@pytest.mark.parametrize("grantee", ["PUBLIC", "a role"])
def test_default_privileges_show_nobody_what_a_rollback_parked(url: str, server_role: str, grantee: str) -> None:
    before = rows_of(url)
    to = server_role if grantee == "a role" else grantee
    option = "" if grantee == "PUBLIC" else "WITH GRANT OPTION"
    run_sql(url, f"ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO {to} {option}; ALTER ROLE {server_role} BYPASSRLS")

    downgrade(url, "075")

    assert len(rows_of(url, PARKED)) > 1
    for statement in ("SELECT * FROM", "DELETE FROM", "TRUNCATE"):
        with pytest.raises(Exception, match=f"permission denied for table {PARKED}"):
            run_sql(as_role(url, server_role), f"{statement} {PARKED}")
    run_sql(url, f"ALTER ROLE {server_role} NOBYPASSRLS")
    run_sql(url, "UPDATE device_state SET status = 'STALE'; UPDATE device_state SET status = 'ONLINE'")
    upgrade(url)
    assert rows_of(url) == before


def test_check_finds_nothing_wrong_with_an_isolated_table(url: str) -> None:
    assert migrate.check(url) == []


def test_no_migration_enables_row_level_security(raw_fleet: str) -> None:
    upgrade(raw_fleet)

    schema = dump(raw_fleet)
    assert "ROW LEVEL SECURITY" not in schema
    assert "POLICY" not in schema


def test_isolation_may_come_before_the_migration(raw_fleet: str, server_role: str) -> None:
    isolate(create_engine(raw_fleet, poolclass=NullPool), server_role)
    before = rows_of(raw_fleet, columns="tenant_id, device_id, state")

    upgrade(raw_fleet)

    assert rows_of(raw_fleet, columns="tenant_id, device_id, state") == before
    assert tenants(raw_fleet, server_role, "globex") == {"globex"}


def test_a_table_in_a_schema_of_the_search_path_is_isolated_there(empty: str, server_role: str) -> None:
    run_sql(empty, f"CREATE SCHEMA app; SET search_path = app; GRANT USAGE ON SCHEMA app TO {server_role};" + RAW_075)
    run_sql(
        empty,
        f"ALTER DATABASE {make_url(empty).database} SET search_path = app, public; SET search_path = app;" + FLEET,
    )
    engine = create_engine(empty, poolclass=NullPool)
    isolate(engine, server_role)
    with engine.begin() as connection:
        tenancy.enable(connection, server_role)

    assert tenants(empty, server_role, "globex") == {"globex"}
    assert tenants(empty, server_role) == set()
