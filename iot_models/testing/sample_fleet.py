"""Twelve devices for tests: one in each of six states, and six of another tenant."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, MetaData, func, insert

from iot_models.models import DEFINED, TABLE, DeviceState
from iot_models.twin import STALE_THRESHOLD_MINUTES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.orm import Session


@dataclass(frozen=True, slots=True)
class SampleFleet:
    """The ids of the sample fleet. Both tenants have devices with the same six ids.

    The attributes describe the devices of `tenant_id`. All six devices of `other_tenant_id` are pending at version 9
    with other documents: a statement that forgets its tenant finds too many devices, or another document.

    Attributes:
        tenant_id: The tenant to test with.
        other_tenant_id: The tenant whose devices must never be visible.
        synced: Version 3 is desired and acknowledged, the documents are equal; heard from just now.
        pending: Version 4 is desired, version 3 acknowledged, the delta is `{"target_c": 23.5}`; heard from just now.
        drifted: Version 3 is desired and acknowledged, but it reports `"mode": "eco"` instead of `auto`; heard from
            just now.
        refused: Version 4 is desired, with `"mode": "turbo"`, version 3 acknowledged. The device refused version 4 with
            the words `mode 'turbo' is not supported`; heard from just now. It is pending, too.
        stale: Like `synced`, but not heard from for twice `STALE_THRESHOLD_MINUTES`.
        new: Version 0 with empty documents: never written to and never heard from.
    """

    tenant_id: str = "acme"
    other_tenant_id: str = "globex"
    synced: str = "synced"
    pending: str = "pending"
    drifted: str = "drifted"
    refused: str = "refused"
    stale: str = "stale"
    new: str = "new"


def add_sample_fleet(session: Session, columns: Mapping[str, Any] = MappingProxyType({})) -> SampleFleet:
    """Insert the fleet in the session's transaction, without a commit.

    Async code calls it with `await session.run_sync(add_sample_fleet)`.

    Args:
        session: The session.
        columns: Values for columns that you added to the table, by their names, the same in each row: for those that
            are NOT NULL and have no default.

    Raises:
        IntegrityError: If the fleet is in this database already, or a column needs a value (SQLAlchemy's error).
        ValueError: If `columns` names one of our columns.

    Example:
        >>> fleet = add_sample_fleet(session)
        >>> ShadowService(session, fleet.tenant_id).count_pending()
        2
    """
    if ours := columns.keys() & {column.name for column in DEFINED.columns}:
        raise ValueError(f"{', '.join(sorted(ours))}: these columns have the values of the sample fleet")
    fleet = SampleFleet()
    table = TABLE.to_metadata(MetaData())
    for name in columns.keys() - {*table.columns.keys()}:
        table.append_column(Column(name))
    wanted = {"mode": "auto", "target_c": 21.5}
    long_ago = func.now() - 2 * timedelta(minutes=STALE_THRESHOLD_MINUTES)
    written: dict[str, Any] = {
        "status": "ONLINE",
        "desired_state": wanted,
        "reported_state": wanted,
        "desired_version": 3,
        "reported_version": 3,
        "shadow_updated_at": func.now(),
        "last_heartbeat_at": func.now(),
        "last_seen_at": func.now(),
    }
    devices: dict[str, dict[str, Any]] = {
        fleet.synced: written,
        fleet.pending: written | {"desired_state": wanted | {"target_c": 23.5}, "desired_version": 4},
        fleet.drifted: written | {"reported_state": wanted | {"mode": "eco"}},
        fleet.refused: written
        | {
            "desired_state": wanted | {"mode": "turbo"},
            "desired_version": 4,
            "refused_version": 4,
            "refusal": "mode 'turbo' is not supported",
            "refused_at": func.now(),
        },
        fleet.stale: written | {"status": "STALE", "last_heartbeat_at": long_ago, "last_seen_at": long_ago},
        fleet.new: {},
    }
    elsewhere = written | {"desired_state": {"target_c": 5}, "desired_version": 9, "reported_version": 8}
    for device_id, written_to in devices.items():
        for tenant_id, site_id, values in (
            (fleet.tenant_id, "berlin", written_to),
            (fleet.other_tenant_id, "springfield", elsewhere),
        ):
            row = {"tenant_id": tenant_id, "site_id": site_id, "device_id": device_id, **values}
            session.execute(insert(table).values(row | dict(columns)), bind_arguments={"mapper": DeviceState})
    return fleet
