"""How PostgreSQL carries out the service's statements for a role that a policy applies to."""

from __future__ import annotations

import re
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.orm import Session

from iot_models import Report, ShadowService
from tests.databases.devices import TENANT
from tests.databases.tenants import isolate, login

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Engine


@contextmanager
def explained(engine: Engine) -> Iterator[dict[str, str]]:
    """The plan of each statement that the block runs, asked for as the same role in the same transaction."""
    plans: dict[str, str] = {}

    def explain(connection: Connection, _cursor: object, statement: str, parameters: Any, *_rest: object) -> None:
        if not statement.startswith("SET "):
            cursor = connection.connection.cursor()
            cursor.execute("EXPLAIN " + statement, parameters)
            plans[statement] = "\n".join(line for (line,) in cursor.fetchall())

    event.listen(engine, "before_cursor_execute", explain)
    try:
        yield plans
    finally:
        event.remove(engine, "before_cursor_execute", explain)


@pytest.mark.repeats
def test_the_policy_keeps_no_statement_of_the_service_from_its_index(own_engine: Engine, server_role: str) -> None:
    with own_engine.begin() as connection:
        connection.execute(
            text("""INSERT INTO device_state (tenant_id, site_id, device_id, desired_version)
                    SELECT 'acme', 's', md5(CAST(n AS text)), CAST(n % 100 = 0 AS integer)
                      FROM generate_series(1, 50000) n""")
        )
        connection.execute(
            text("""INSERT INTO device_shadow_history (tenant_id, device_id, desired_version, written_at, transaction_id)
                    SELECT 'acme', md5(CAST(n AS text)), 0, now(), 3 + n / 100 FROM generate_series(1, 50000) n""")
        )
        connection.execute(text("ANALYZE device_state, device_shadow_history"))
        ids = list(connection.scalars(text("SELECT device_id FROM device_state ORDER BY device_id LIMIT 50")))
    isolate(own_engine, server_role)

    engine = create_engine(login(own_engine, server_role))
    with Session(engine) as session:
        shadows = ShadowService(session, TENANT, bind_tenant=True)
        with explained(engine) as plans:
            shadows.get(ids[0])
            shadows.replace_desired(ids[0], {"a": 1})
            shadows.patch_desired(ids[0], {"b": 1})
            shadows.replace_reported(ids[0], {"a": 1}, acked_version=1)
            shadows.patch_reported(ids[0], {"a": 1}, acked_version=2)
            shadows.get_many(ids)
            shadows.replace_desired_many({device: {"c": 1} for device in ids})
            shadows.patch_desired_many(ids, {"c": 2})
            shadows.replace_reported_many([Report(device, {"c": 2}, 1) for device in ids])
            shadows.pending(limit=10)
            shadows.pending(limit=10, after="8")
            shadows.count_pending()
            cursor = shadows.changes(limit=10).cursor
            shadows.changes(after=cursor, limit=10)
            shadows.prune_history(older_than=timedelta(days=1))
    engine.dispose()

    assert len(plans) == 18
    for statement, plan in plans.items():
        assert "current_setting('app.tenant_id'" in plan, plan
        assert "Index" in plan, statement
        assert "Seq Scan on device_state" not in plan, plan
        assert "Seq Scan on device_shadow_history" not in plan, plan
        if "pg_control_system" in statement:
            assert re.search(r"Index Cond: .*ROW\(transaction_id|Index Cond: .*transaction_id <", plan), plan
