"""Whether a fleet and its database agree: all devices converged, nothing lost that was answered or acknowledged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sqlalchemy import text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import Engine

    from tests.mqtt.fleet import Fleet

# Each report that is committed, in order, by a trigger: the second witness beside what the devices heard.
_KEEP_REPORTS: Final = """
    CREATE TABLE reports_kept (position bigint GENERATED ALWAYS AS IDENTITY, tenant_id text, device_id text, n bigint);
    CREATE FUNCTION keep_report() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
        INSERT INTO public.reports_kept (tenant_id, device_id, n)
        VALUES (NEW.tenant_id, NEW.device_id, (NEW.reported_state->>'n')::bigint);
        RETURN NULL;
    END$$;
    CREATE TRIGGER keep_report AFTER UPDATE OF reported_state ON device_state FOR EACH ROW EXECUTE FUNCTION keep_report();
"""


def keep_reports(engine: Engine) -> None:
    """Have the database itself record each report; for `violations`."""
    with engine.begin() as connection:
        connection.exec_driver_sql(_KEEP_REPORTS)


def violations(engine: Engine, tenant_id: str, fleet: Fleet, written: Iterable[tuple[str, int]]) -> list[str]:
    """What does not fit, a sentence each; empty once all is at rest, if nothing was lost.

    Args:
        engine: The database, after `keep_reports`.
        tenant_id: The fleet's tenant.
        fleet: The fleet, running.
        written: Devices and the versions of the desired writes that were acknowledged to their writer.
    """
    binds = {"tenant": tenant_id}
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        rows = {
            row.device_id: row
            for row in connection.execute(
                text("""
                    SELECT device_id, desired_state, desired_version, reported_state, reported_version, refused_version
                      FROM device_state WHERE tenant_id = :tenant"""),
                binds,
            )
        }
        kept: dict[str, set[int]] = {name: set() for name in rows}
        for name, number in connection.execute(
            text("SELECT DISTINCT device_id, n FROM reports_kept WHERE tenant_id = :tenant"), binds
        ):
            kept[name].add(number)
        versions: dict[str, list[int]] = {name: [] for name in rows}
        for name, version in connection.execute(
            text("""
                SELECT device_id, desired_version FROM device_shadow_history
                 WHERE tenant_id = :tenant AND desired_version > 0 ORDER BY device_id, desired_version"""),
            binds,
        ):
            versions[name].append(version)
    found = [
        f"{name}: the write of version {version} was acknowledged and is not in the history"
        for name, version in written
        if version > len(versions[name])
    ]
    for name, device in fleet.devices.items():
        row = rows[name]
        if versions[name] != list(range(1, row.desired_version + 1)):
            found.append(f"{name}: the history skips a version, of {row.desired_version}")
        newest = max(kept[name], default=0)
        # Of the reports of a device in one batch only the last is written, and the answer to each comes after it.
        if lost := {number for number in device.accepted.copy() if number > newest} | (
            device.alone.copy() - kept[name]
        ):
            found.append(f"{name}: reports {sorted(lost)} were answered `accepted` and never committed")
        if not device.is_answered:
            found.append(f"{name}: report {device.number} is not answered")
        if row.reported_state != device.state | {"n": device.number}:
            found.append(f"{name}: runs {device.state}, report {device.number}; stored is {row.reported_state}")
        if row.desired_version not in {row.reported_version, row.refused_version}:
            found.append(f"{name}: {row.desired_version} is pending, {row.reported_version} acknowledged")
        if row.refused_version is None and any(
            device.state.get(key) != row.desired_state[key] for key in row.desired_state
        ):
            found.append(f"{name}: acknowledged {row.reported_version} and runs {device.state}")
    return found
