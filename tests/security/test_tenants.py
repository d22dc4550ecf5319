"""A role that is limited to one tenant, and may run any SQL but bind another tenant, gets nothing of the others."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import psycopg
import pytest
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.orm import Session

from iot_models.testing import PostgresServer, database
from tests.databases.devices import TENANT, add_device
from tests.databases.tenants import OTHER, isolate, login, rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine

pytestmark = pytest.mark.repeats

KEPT = "the-secret-of-"
LEAK = """
    CREATE FUNCTION pg_temp.leak(text, jsonb) RETURNS bool LANGUAGE plpgsql COST 0.0000001
        AS $$ BEGIN RAISE NOTICE '% %', $1, $2; RETURN true; END $$;
"""
ATTACKS = [
    # Reading.
    "SELECT tenant_id, desired_state FROM device_state WHERE tenant_id = 'globex'",
    "SELECT tenant_id, desired_state FROM device_state WHERE tenant_id = 'acme' OR true",
    LEAK + "SELECT device_id FROM device_state WHERE pg_temp.leak(tenant_id, desired_state)",
    LEAK + "SELECT device_id FROM device_state WHERE tenant_id = 'globex' AND pg_temp.leak(tenant_id, desired_state)",
    LEAK + "UPDATE device_state SET status = 'x' WHERE pg_temp.leak(tenant_id, desired_state)",
    "SELECT desired_state::text::int FROM device_state WHERE tenant_id = 'globex'",
    "CREATE TEMP VIEW v AS SELECT tenant_id, desired_state FROM device_state; SELECT * FROM v",
    "CREATE TEMP TABLE t AS SELECT tenant_id, desired_state FROM device_state; SELECT * FROM t",
    "SELECT * FROM query_to_xml('SELECT * FROM device_state', true, false, '')",
    "SELECT most_common_vals, histogram_bounds FROM pg_stats WHERE tablename = 'device_state'",
    "SELECT * FROM pg_statistic",
    "SELECT most_common_vals FROM pg_stats_ext",
    "SET row_security = off; SELECT tenant_id, desired_state FROM device_state",
    "SELECT pg_read_file('PG_VERSION')",
    "SELECT lo_import('/etc/passwd')",
    "COPY device_state TO PROGRAM 'cat'",
    "CREATE TEMP TABLE t (line text); COPY t FROM '/etc/passwd'",
    "SELECT pg_create_logical_replication_slot('spy', 'pgoutput')",
    "CREATE PUBLICATION p FOR TABLE device_state",
    "SET ROLE postgres; SELECT tenant_id, desired_state FROM device_state",
    "SET SESSION AUTHORIZATION postgres; SELECT tenant_id, desired_state FROM device_state",
    "INSERT INTO device_state (tenant_id, site_id, device_id) VALUES ('globex', 's', 'd') "
    "ON CONFLICT (tenant_id, device_id) DO UPDATE SET status = 'x' RETURNING desired_state",
    # Writing.
    "UPDATE device_state SET desired_state = '{}'",
    "UPDATE device_state SET tenant_id = 'globex', device_id = 'planted'",
    "INSERT INTO device_state (tenant_id, site_id, device_id) VALUES ('globex', 's', 'planted')",
    "INSERT INTO device_state (tenant_id, site_id, device_id) VALUES ('globex', 's', 'd') ON CONFLICT DO NOTHING",
    "MERGE INTO device_state d USING (VALUES ('globex', 'd')) v (t, d) ON d.tenant_id = v.t AND d.device_id = v.d "
    "WHEN MATCHED THEN DELETE WHEN NOT MATCHED THEN INSERT (tenant_id, site_id, device_id) VALUES (v.t, 's', 'planted')",
    "DELETE FROM device_state",
    "TRUNCATE device_state",
    "CREATE FUNCTION pg_temp.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
    "CREATE TRIGGER t BEFORE UPDATE ON device_state FOR EACH ROW EXECUTE FUNCTION pg_temp.f()",
    "CREATE RULE r AS ON UPDATE TO device_state DO INSTEAD NOTHING",
    "CREATE TEMP TABLE t (t text, d text, FOREIGN KEY (t, d) REFERENCES device_state ON UPDATE CASCADE)",
    "ALTER TABLE device_state DISABLE ROW LEVEL SECURITY",
    "CREATE POLICY mine ON device_state USING (true)",
    "ALTER POLICY iot_models_tenant ON device_state USING (true)",
    "CREATE TABLE public.child () INHERITS (device_state)",
    "CREATE INDEX ON device_state (status)",
    "DROP TABLE device_state",
    "DROP SCHEMA public CASCADE",
    "GRANT ALL ON device_state TO PUBLIC",
]


@pytest.fixture(scope="module")
def isolated(server: PostgresServer, migrated_url: str) -> Iterator[tuple[Engine, str]]:
    """The owner's engine on a database with a device of each tenant, and the URL of the role that is limited."""
    role = f"iot_models_test_{secrets.token_hex(4)}"
    with database(server, migrated_url) as url:
        owner = create_engine(url, poolclass=NullPool)
        with Session(owner) as session, session.begin():
            session.execute(text(f"CREATE ROLE {role} LOGIN"))
            for tenant in (TENANT, OTHER):
                add_device(session, "d", tenant_id=tenant, desired_state={"of": tenant, "kept": KEPT + tenant})
        isolate(owner, role)
        yield owner, login(owner, role).set(drivername="postgresql").render_as_string(hide_password=False)
        with owner.begin() as connection:
            connection.execute(text(f"DROP OWNED BY {role}"))
            connection.execute(text(f"DROP ROLE {role}"))


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_role_gets_nothing_of_another_tenant(isolated: tuple[Engine, str], attack: str) -> None:
    owner, url = isolated
    before = victims(owner)
    said: list[str] = []

    with psycopg.connect(url) as connection:
        connection.add_notice_handler(lambda notice: said.append(str(notice.message_primary)))
        connection.execute("SET LOCAL app.tenant_id = 'acme'")
        try:
            cursor = connection.execute(attack.encode())
            while cursor.nextset():
                pass
            said += map(str, cursor.fetchall() if cursor.description else [])
            connection.commit()
        except psycopg.Error as error:
            said.append(str(error))
            connection.rollback()

    assert KEPT + OTHER not in " ".join(said)
    assert victims(owner) == before


def victims(owner: Engine) -> list[str]:
    return [row for row in rows(owner) if OTHER in row]
