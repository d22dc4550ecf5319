"""What the service, the table and the model have to have in common."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from sqlalchemy import inspect, text

from iot_models import BatchRejected, DesiredVersion, DeviceState, InvalidDocument, IotModelsError, Shadow
from tests.reference.fleet import Version
from tests.reference.json_values import canonical
from tests.reference.shadows import Device

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection


def described(result: Any) -> Any:
    """A result, from whichever side, such that == of two says whether they agree."""
    if isinstance(result, Shadow | Device):
        documents = (result.desired, result.reported, result.delta)
        versions = (
            result.desired_version,
            result.reported_version,
            result.is_pending,
            result.is_converged,
            result.is_drifted,
            result.refusal,
        )
        return *map(canonical, documents), *versions, result.shadow_updated_at, result.last_seen_at
    if isinstance(result, DesiredVersion | Version):
        desired = "removed" if result.desired is None else canonical(result.desired)
        return desired, result.written_at, result.reason, result.request_id
    if isinstance(result, BatchRejected):
        return BatchRejected, described(dict(result.errors))
    if isinstance(result, IotModelsError):
        # Where in the document, and how it is worded, are the subject of other tests.
        return type(result), () if isinstance(result, InvalidDocument) else result.args
    if isinstance(result, dict):
        return [(key, described(value)) for key, value in result.items()]  # the order is promised too
    return [described(item) for item in result] if isinstance(result, list) else result


def outcome(call: Callable[[], Any]) -> Any:
    """What it returns or, in our words, raises."""
    try:
        return call()
    except IotModelsError as error:
        return error


def columns(device: Device) -> dict[str, Any]:
    """The device's row."""
    return {
        "desired_state": canonical(device.desired),
        "reported_state": canonical(device.reported),
        "desired_version": device.desired_version,
        "reported_version": device.reported_version,
        "shadow_updated_at": device.shadow_updated_at,
        "last_seen_at": device.last_seen_at,
        "status": device.status,
        "refused_version": device.refused[0] if device.refused else None,
        "refusal": device.refused[1] if device.refused else None,
    }


def stored_rows(connection: Connection) -> dict[tuple[str, str], dict[str, Any]]:
    """All rows, asked for in no way that the service does."""
    rows = connection.execute(
        text("SELECT *, desired_state::text AS desired, reported_state::text AS reported FROM device_state")
    ).mappings()
    return {
        (row["tenant_id"], row["device_id"]): {
            **{name: row[name] for name in columns(Device({}, {}))},
            "desired_state": canonical(json.loads(row["desired"], parse_float=Decimal)),
            "reported_state": canonical(json.loads(row["reported"], parse_float=Decimal)),
        }
        for row in rows
    }


def stored_versions(connection: Connection) -> dict[tuple[str, str, int], Any]:
    """The history, asked for in no way that the service does."""
    rows = connection.execute(
        text("""SELECT tenant_id, device_id, desired_version, desired_state::text AS desired, reason, request_id,
                       written_at FROM device_shadow_history WHERE desired_version >= 0""")
    )
    return {
        (row.tenant_id, row.device_id, row.desired_version): described(
            Version(
                None if row.desired is None else json.loads(row.desired, parse_float=Decimal),
                row.written_at,
                row.reason,
                row.request_id,
            )
        )
        for row in rows
    }


def shown_columns(device: DeviceState) -> dict[str, Any]:
    """What a mapped object shows without asking the database."""
    loaded = inspect(device).dict
    return {name: canonical(loaded[name]) for name in columns(Device({}, {})) if name in loaded}
