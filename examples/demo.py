"""The main job on a real PostgreSQL: a fleet is migrated, its shadows are used, a migration is rolled back.

At the end, a wrong write is undone, a device refuses a write, and a request is sent twice.

    make demo

It runs on the throwaway server, or in a database of its own on the server at IOT_MODELS_TEST_DATABASE_URL. The figures
and sentences about shadows that it prints come from the database.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.orm import Session

from iot_models import IotModelsError, Shadow, ShadowService, SyncStatus, VersionConflict
from iot_models.engine import normalize_url
from iot_models.testing import throwaway

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Engine

_CHECKOUT: Final = Path(__file__).resolve().parents[1]
_TENANT: Final = "acme"
_NEVER_SEEN_EVERY: Final = 9  # one device in nine, always a thermostat, was mounted and never switched on
_STYLES: Final = {SyncStatus.SYNCED: "green", SyncStatus.PENDING: "yellow", SyncStatus.STALE: "red"}

# The deployment before shadows, as a team made it with raw SQL and without Alembic.
_DEPLOYMENT_075: Final = """
    CREATE TABLE device_state (
      tenant_id TEXT NOT NULL, site_id TEXT NOT NULL, device_id TEXT NOT NULL,
      status TEXT NOT NULL DEFAULT 'OFFLINE',
      last_heartbeat_at TIMESTAMPTZ, last_telemetry_at TIMESTAMPTZ, last_seen_at TIMESTAMPTZ,
      last_state_change_at TIMESTAMPTZ NOT NULL DEFAULT now(),
      state JSONB NOT NULL DEFAULT '{}',
      PRIMARY KEY (tenant_id, device_id));
    CREATE INDEX idx_device_state_site ON device_state (tenant_id, site_id);
    CREATE INDEX idx_device_state_status ON device_state (tenant_id, status);
"""
_DEVICE: Final = text("""
    INSERT INTO device_state (tenant_id, site_id, device_id, status, last_heartbeat_at, last_telemetry_at,
                              last_seen_at, state)
    VALUES (:tenant, :site, :device, CASE WHEN :seen THEN 'ONLINE' ELSE 'OFFLINE' END,
            CASE WHEN :seen THEN now() END, CASE WHEN :seen THEN now() END, CASE WHEN :seen THEN now() END,
            CAST(:state AS jsonb))
""")


def main() -> None:
    """Run the demo.

    Raises:
        ThrowawayPostgresError: If no server is given, and the throwaway server cannot run here.
        SystemExit: If a migration fails.
    """
    # A pipe has no width. The tables need 110 columns.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    with _database(console) as url:
        engine = create_engine(url)
        _create_the_fleet(console, engine)
        _alembic(console, url, "upgrade", "head")
        _life_of_a_shadow(console, engine)
        before = _shadows(engine)
        console.rule("A rollback, and the upgrade after it")
        _alembic(console, url, "downgrade", "075")
        with engine.connect() as connection:
            parked = connection.scalar(text("SELECT count(*) FROM device_state_shadow_076"))
        console.print(f"{parked} shadows are parked. Meanwhile the old code writes heartbeats.")
        with engine.begin() as connection:
            connection.execute(text("UPDATE device_state SET last_heartbeat_at = now()"))
        _alembic(console, url, "upgrade", "head")
        after = _shadows(engine)
        same = sum(before.get(key) == shadow for key, shadow in after.items())
        console.print(f"{same:,} of {len(before):,} shadows are what they were before, to the last digit.")
        _who_wrote_what(console, engine)
        engine.dispose()


@contextmanager
def _database(console: Console) -> Iterator[str]:
    """Provide a database for the demo: on the given server, else on the throwaway server."""
    given = os.environ.get("IOT_MODELS_TEST_DATABASE_URL")
    if not given:
        with throwaway.postgres() as server:
            console.print(f"PostgreSQL {server.version}, a throwaway server, started for this demo only.")
            yield server.url
        return
    name = f"iot_models_demo_{secrets.token_hex(4)}"
    admin = create_engine(normalize_url(given), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
        try:
            console.print(f"Database {name} on the server of IOT_MODELS_TEST_DATABASE_URL, dropped after the demo.")
            yield normalize_url(given).set(database=name).render_as_string(hide_password=False)
        finally:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


def _shadows(engine: Engine) -> dict[tuple[str, str], str]:
    """Return the shadows as text that PostgreSQL writes, by tenant and device: no digit is lost."""
    with engine.connect() as connection:
        rows = connection.execute(
            text("""
                SELECT tenant_id, device_id, CAST((desired_state, reported_state, desired_version, reported_version,
                       shadow_updated_at) AS text) AS shadow FROM device_state WHERE desired_version > 0
            """)
        )
        return {(row.tenant_id, row.device_id): row.shadow for row in rows}


def _create_the_fleet(console: Console, engine: Engine) -> None:
    console.rule("The deployment before revision 076")
    fleet = [_device(tenant, n) for tenant in (_TENANT, "globex") for n in range(500)]
    with engine.begin() as connection:
        for statement in filter(str.strip, _DEPLOYMENT_075.split(";")):
            connection.execute(text(statement))
        connection.execute(_DEVICE, fleet)
    for example in fleet[:3]:
        console.print(f"{example['device']:<16} {example['state']}", soft_wrap=True)
    console.print(f"… {len(fleet):,} devices in {len({device['tenant'] for device in fleet})} tenants")


def _device(tenant: str, n: int) -> dict[str, Any]:
    """Return a device's row. Thermostats, smart plugs and gateways take turns, with the telemetry of such devices."""
    kind, telemetry = (
        (
            "thermostat",
            {"temp_c": 18 + n % 70 / 10, "humidity_pct": 35 + n % 30, "valve_pct": n % 101, "battery_mv": 3010 - n},
        ),
        (
            "plug",
            {"relay": n % 2 == 0, "power_w": n % 230 / 10, "energy_wh": n * 137, "voltage_v": 228.5 + n % 40 / 10},
        ),
        (
            "gateway",
            {
                "fw": f"4.{n % 7}.{n % 3}",
                "uptime_s": n * 3_613,
                "lte": {"rsrp_dbm": -70 - n % 45, "operator": "26201"},
                "nodes": [f"{n:04x}-{k}" for k in range(n % 4)],
            },
        ),
    )[n % 3]  # fmt: skip
    return {
        "tenant": tenant,
        "site": f"site-{n // 50:02}",
        "device": f"{kind}-{n // 3:04}",
        "seen": n % _NEVER_SEEN_EVERY != _NEVER_SEEN_EVERY - 3,
        "state": json.dumps(telemetry),
    }


def _alembic(console: Console, url: str, *arguments: str) -> None:
    """Run the `alembic` command in the checkout, as an engineer would type it, and show what it prints."""
    console.print(f"[bold]$ alembic {' '.join(arguments)}[/bold]")
    run = subprocess.run(  # noqa: S603 - our own arguments
        [sys.executable, "-m", "alembic", *arguments],
        cwd=_CHECKOUT,
        env=os.environ | {"IOT_MODELS_DATABASE_URL": make_url(url).render_as_string(hide_password=False)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    console.print(run.stdout.rstrip(), style="dim", markup=False, soft_wrap=True)
    if run.returncode:
        raise SystemExit(f"alembic {' '.join(arguments)} ended with {run.returncode}")


def _life_of_a_shadow(console: Console, engine: Engine) -> None:
    console.rule("The life of a shadow")
    with Session(engine) as session, session.begin():
        shadows = ShadowService(session, _TENANT, actor="operator")
        tell, refused = partial(_tell, console), partial(_refused, console)

        comfort = {"target_c": 21.5, "mode": "auto", "schedule": {"mon-fri": ["06:30", "22:00"]}}
        for device_id in ("thermostat-0000", "thermostat-0001", "thermostat-0002"):
            tell("operator", shadows.patch_desired(device_id, comfort))
        tell("operator", shadows.patch_desired("plug-0000", {"relay": True, "max_power_w": 2300}))
        tell("operator", shadows.replace_desired("gateway-0000", {"report_every_s": 60, "fw_channel": "stable"}))

        tell("device", shadows.replace_reported("thermostat-0000", comfort | {"temp_c": 19.8}, acked_version=1))
        tell("device", shadows.patch_reported("thermostat-0001", {"temp_c": 18.4, "mode": "auto"}))
        tell("device", shadows.replace_reported("plug-0000", {"relay": False, "max_power_w": 2300}, acked_version=1))

        gateway = "gateway-0000"
        version = shadows.get(gateway).desired_version
        console.print(f"Two operators read {gateway} at version {version}, and both write with that expected_version.")
        tell("first", shadows.patch_desired(gateway, {"report_every_s": 30}, expected_version=version))
        refused("second", lambda: shadows.patch_desired(gateway, {"report_every_s": 300}, expected_version=version))

        warmer = shadows.patch_desired("thermostat-0000", {"target_c": 23})
        tell("operator", warmer)
        acked = warmer.desired_version
        tell("device", shadows.patch_reported("thermostat-0000", {"target_c": 23}, acked_version=acked))
        refused("device", lambda: shadows.replace_reported("thermostat-0000", comfort, acked_version=acked - 1))

        names = ["thermostat-0000", "thermostat-0001", "thermostat-0002", "plug-0000", gateway]
        _table(console, list(shadows.get_many(names).values()))
        console.print(f"{shadows.count_pending()} of the tenant's devices are pending: "
                      + ", ".join(shadow.device_id for shadow in shadows.pending()))  # fmt: skip


def _who_wrote_what(console: Console, engine: Engine) -> None:
    console.rule("Who wrote what: a restore, a refusal, a repeated request")
    with Session(engine) as session, session.begin():
        anna = ShadowService(session, _TENANT, actor="anna")
        night_job = ShadowService(session, _TENANT, actor="night-job")
        devices = ShadowService(session, _TENANT)
        tell, refused = partial(_tell, console), partial(_refused, console)

        warm, mild, plug = "thermostat-0000", "thermostat-0001", "plug-0000"
        wrong = night_job.patch_desired(warm, {"target_c": 5}, reason="nobody is here at night")
        tell("night-job", wrong)
        tell("device", devices.patch_reported(warm, {"target_c": 5}, acked_version=wrong.desired_version))
        console.print("It is cold. Anna looks up who did it (a rollback keeps the history), and restores version 2.")
        for version in anna.history(warm, limit=3):
            why = f" ({version.reason})" if version.reason else ""
            line = f"version {version.version} by {version.actor}{why}: {json.dumps(version.desired)}"
            console.print(line, markup=False, soft_wrap=True)
        restored = anna.restore_desired(warm, 2, reason="the night shift is here")
        tell("anna", restored)
        tell("device", devices.patch_reported(warm, {"target_c": 23}, acked_version=restored.desired_version))

        console.print(f"Anna asks {mild} for a mode that it does not have.")
        turbo = anna.patch_desired(mild, {"mode": "turbo"})
        tell("anna", turbo)
        tell("device", devices.refuse_desired(mild, turbo.desired_version, "mode 'turbo' is not supported"))
        for shadow in anna.refused():
            console.print(f"Refused: {shadow.device_id}, version {shadow.desired_version}: {shadow.refusal}")
        tell("anna", anna.patch_desired(mild, {"mode": "auto"}))
        console.print(f"A new version ends the refusal: {anna.count_refused()} devices refuse what is desired.")

        console.print("Anna's request is written, but the answer is lost. She sends it again, with its request_id.")
        for _ in range(2):
            tell("anna", anna.patch_desired(plug, {"max_power_w": 2000}, request_id="request-1"))
        refused("anna", lambda: anna.patch_desired(plug, {"max_power_w": 3000}, request_id="request-1"))


def _tell(console: Console, writer: str, shadow: Shadow) -> None:
    console.print(f"{writer:<9} {shadow.explain()}", soft_wrap=True)


def _refused(console: Console, writer: str, write: Callable[[], object]) -> None:
    try:
        write()
    except IotModelsError as error:
        kind = "red" if isinstance(error, VersionConflict) else "magenta"
        console.print(f"{writer:<9} [{kind}]{type(error).__name__}[/{kind}]: ", end="")
        console.print(str(error), markup=False, soft_wrap=True)


def _table(console: Console, shadows: list[Shadow]) -> None:
    table = Table(title=f"Shadows of tenant {_TENANT} at {datetime.now(UTC):%H:%M:%S} UTC", show_lines=True)
    for column in ("device", "desired", "reported", "delta", "version", "status"):
        table.add_column(column, overflow="fold")
    for shadow in shadows:
        status = shadow.sync_status()
        drifted = "\n[magenta]drifted[/magenta]" if shadow.is_drifted else ""
        table.add_row(
            shadow.device_id,
            _lines(shadow.desired),
            _lines(shadow.reported),
            _lines(shadow.delta) or "—",
            f"{shadow.desired_version} desired\n{shadow.reported_version} acked",
            f"[{_STYLES[status]}]{status}[/{_STYLES[status]}]{drifted}",
        )
    console.print(table)


def _lines(document: dict[str, Any]) -> str:
    """Return a document with one key per line and without braces, for a cell of the table."""
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in document.items()).replace("[", r"\[")


if __name__ == "__main__":
    main()
