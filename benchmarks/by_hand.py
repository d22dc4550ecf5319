"""One device at a time, written by hand: the upper limit, and what a careful user would write."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import psycopg
from fleet_data import COLUMNS, DEVICES, DOCUMENT, PATCH, TENANT, Devices, each_timed, engine_of, plain
from sqlalchemy import make_url
from sqlalchemy.orm import Session

from iot_models import twin
from iot_models._core import desired_statements, statements

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack
    from pathlib import Path

    import asyncpg
    from fleet_data import Works

PGBENCH_TRANSACTIONS = 400
CORE = "SQLAlchemy Core by hand, long session, AUTOCOMMIT"

GET = f"SELECT {COLUMNS} FROM device_state WHERE tenant_id = %s AND device_id = %s"
REPLACE = f"""
    UPDATE device_state
       SET desired_state = %s::text::jsonb, desired_version = desired_version + 1, shadow_updated_at = now()
     WHERE tenant_id = %s AND device_id = %s AND desired_version = %s RETURNING {COLUMNS}
"""
REPORT = f"""
    UPDATE device_state SET reported_state = %s::text::jsonb, reported_version = %s, last_seen_at = now()
     WHERE tenant_id = %s AND device_id = %s AND %s BETWEEN reported_version AND desired_version RETURNING {COLUMNS}
"""
LOCK = """
    SELECT desired_state, desired_version FROM device_state WHERE tenant_id = %s AND device_id = %s
       FOR NO KEY UPDATE
"""
# pgbench increments i. Each device is written once per DEVICES transactions, so its version is known.
_VARIABLES = f"""\\set i :i + 1
\\set d :i % {DEVICES}
\\set v 2 + :i / {DEVICES}
"""
_DEVICE = f"tenant_id = '{TENANT}' AND device_id = 'pgbench-' || lpad(:d::text, 7, '0')"
PGBENCH = {
    "get": f"SELECT {COLUMNS} FROM device_state WHERE {_DEVICE};",
    "replace desired": f"""
        UPDATE device_state
           SET desired_state = '{json.dumps(DOCUMENT)}', desired_version = desired_version + 1,
               shadow_updated_at = now()
         WHERE {_DEVICE} AND desired_version = :v RETURNING {COLUMNS};
    """,
    "report": f"""
        UPDATE device_state SET reported_state = '{json.dumps(DOCUMENT)}', reported_version = 2, last_seen_at = now()
         WHERE {_DEVICE} AND 2 BETWEEN reported_version AND desired_version RETURNING {COLUMNS};
    """,
}


def pgbench(url: str, tools: Path) -> Works:
    counters = {work: itertools.count() for work in PGBENCH}
    address = make_url(url)

    def turn(work: str, script: str) -> float:
        started = next(counters[work]) * PGBENCH_TRANSACTIONS
        done = subprocess.run(
            [
                *(tools / "pgbench", "-n", "-M", "prepared", "-c", "1", "-t", str(PGBENCH_TRANSACTIONS)),
                *("-D", f"i={started - 1}", "-f", "/dev/stdin", plain(url)),
            ],
            input=_VARIABLES + script,
            env=os.environ | ({"PGPASSWORD": address.password} if address.password else {}),
            text=True, capture_output=True, check=True,
        )  # fmt: skip
        latency = next(line for line in done.stdout.splitlines() if line.startswith("latency average"))
        return float(latency.split()[3]) / 1000

    works = {work: lambda work=work, script=script: turn(work, script) for work, script in PGBENCH.items()}
    return {"pgbench, prepared": ("pgbench", works)}


def by_psycopg(stack: ExitStack, url: str) -> Works:
    found: Works = {}
    for name, prefix, autocommit in (
        ("psycopg by hand, autocommit", "hand", True),
        ("psycopg by hand, transaction", "handtx", False),
    ):
        connection = stack.enter_context(psycopg.connect(plain(url), autocommit=autocommit))
        found[name] = (prefix, _by_hand_works(connection, Devices(prefix)))
    return found


def _by_hand_works(connection: psycopg.Connection, devices: Devices) -> dict[str, Callable[[], float]]:
    def done(row: tuple[Any, ...] | None) -> None:
        assert row is not None
        connection.commit()

    def get() -> None:
        done(connection.execute(GET, (TENANT, devices.next())).fetchone())

    def replace() -> None:
        device = devices.next()
        done(connection.execute(REPLACE, (json.dumps(DOCUMENT), TENANT, device, devices.versions[device])).fetchone())
        devices.versions[device] += 1

    def patch() -> None:
        device = devices.next()
        document, version = connection.execute(LOCK, (TENANT, device)).fetchone()
        merged = json.dumps(twin.merge_patch(document, PATCH))
        done(connection.execute(REPLACE, (merged, TENANT, device, version)).fetchone())
        devices.versions[device] += 1

    def report() -> None:
        done(connection.execute(REPORT, (json.dumps(DOCUMENT), 2, TENANT, devices.next(), 2)).fetchone())

    return each_timed(get, replace, patch, report)


def by_core(stack: ExitStack, url: str) -> Works:
    """The service's own statements, executed without the service: what SQLAlchemy itself costs."""
    engine = engine_of(stack, url, autocommit=True)
    connection = stack.enter_context(engine.connect())
    session = stack.enter_context(Session(engine))
    return {
        "SQLAlchemy Core by hand, AUTOCOMMIT": ("core", _core_works(connection.execute, Devices("core"))),
        f"{CORE}, history": ("corehist", _core_works(session.execute, Devices("corehist"), recorded=True)),
        f"{CORE}, no history": ("coresess", _core_works(session.execute, Devices("coresess"))),
    }


def _core_works(
    execute: Callable[..., Any], devices: Devices, *, recorded: bool = False
) -> dict[str, Callable[[], float]]:
    author = {"author": None, "why": None} if recorded else {}
    write = desired_statements.write_desired(guarded=True, recorded=recorded, once=False)
    write_report = statements.write_reported(acked=True, if_converged=False, unchanged=False)

    def get() -> None:
        assert execute(statements.one_shadow(), {"tenant": TENANT, "device": devices.next()}).one_or_none()

    def replace() -> None:
        device = devices.next()
        binds = {
            "tenant": TENANT,
            "device": device,
            "document": json.dumps(DOCUMENT),
            "expected": devices.versions[device],
        }
        assert execute(write, author | binds).one_or_none()
        devices.versions[device] += 1

    def patch() -> None:
        device = devices.next()
        binds = author | {"tenant": TENANT, "device": device}
        document, version, _ = execute(statements.locked_document("desired_state"), binds).one()
        merged = json.dumps(twin.merge_patch(json.loads(document), PATCH))
        assert execute(write, binds | {"document": merged, "expected": version}).one_or_none()
        devices.versions[device] += 1

    def report() -> None:
        binds = {"tenant": TENANT, "device": devices.next(), "document": json.dumps(DOCUMENT), "acked": 2}
        assert execute(write_report, binds).one_or_none()

    return each_timed(get, replace, patch, report)


def by_driver_sql(stack: ExitStack, url: str) -> Works:
    """The psycopg statements as text through SQLAlchemy's Connection: what it costs where it compiles nothing."""
    connection = stack.enter_context(engine_of(stack, url, autocommit=True).connect())
    devices = Devices("driver")

    def get() -> None:
        assert connection.exec_driver_sql(GET, (TENANT, devices.next())).one_or_none()

    def replace() -> None:
        device = devices.next()
        binds = (json.dumps(DOCUMENT), TENANT, device, devices.versions[device])
        assert connection.exec_driver_sql(REPLACE, binds).one_or_none()
        devices.versions[device] += 1

    def patch() -> None:
        device = devices.next()
        document, version = connection.exec_driver_sql(LOCK, (TENANT, device)).one()
        merged = json.dumps(twin.merge_patch(document, PATCH))
        assert connection.exec_driver_sql(REPLACE, (merged, TENANT, device, version)).one_or_none()
        devices.versions[device] += 1

    def report() -> None:
        binds = (json.dumps(DOCUMENT), 2, TENANT, devices.next(), 2)
        assert connection.exec_driver_sql(REPORT, binds).one_or_none()

    return {"SQLAlchemy by hand, SQL as text, AUTOCOMMIT": ("driver", each_timed(get, replace, patch, report))}


def asyncpg_works(connection: asyncpg.Connection, devices: Devices) -> dict[str, Any]:
    get_sql, replace_sql, report_sql, lock_sql = map(numbered, (GET, REPLACE, REPORT, LOCK))

    def decoded(row: asyncpg.Record) -> list[Any]:
        values = list(row)
        values[2:4] = json.loads(values[2]), json.loads(values[3])  # psycopg and SQLAlchemy decode documents, too
        return values

    async def get() -> None:
        decoded(await connection.fetchrow(get_sql, TENANT, devices.next()))

    async def replace() -> None:
        device = devices.next()
        decoded(await connection.fetchrow(replace_sql, json.dumps(DOCUMENT), TENANT, device, devices.versions[device]))
        devices.versions[device] += 1

    async def patch() -> None:
        device = devices.next()
        document, version = await connection.fetchrow(lock_sql, TENANT, device)
        merged = json.dumps(twin.merge_patch(json.loads(document), PATCH))
        decoded(await connection.fetchrow(replace_sql, merged, TENANT, device, version))
        devices.versions[device] += 1

    async def report() -> None:
        decoded(await connection.fetchrow(report_sql, json.dumps(DOCUMENT), 2, TENANT, devices.next(), 2))

    return {"get": get, "replace desired": replace, "patch desired": patch, "report": report}


def numbered(statement: str) -> str:
    parts = statement.split("%s")
    return parts[0] + "".join(f"${n}{part}" for n, part in enumerate(parts[1:], 1))
