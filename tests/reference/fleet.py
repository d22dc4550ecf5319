"""The contract of shadows once more, as plain dicts of one tenant's devices, with no database and none of our code.

Written from what the documentation promises, not from how it is done: what the service and this say is compared. Of
iot_models it knows the names of errors, statuses and reports alone.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from iot_models import (
    BatchRejected,
    DeviceNotFound,
    DocumentTooLarge,
    InvalidDocument,
    IotModelsError,
    LateReport,
    ReportOutcome,
    ReportStatus,
    SyncStatus,
    UnknownVersion,
    VersionConflict,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from iot_models import Report

MAX_BYTES = 200
MAX_DEPTH = 4


class Between:
    """A moment known as well as it can be from outside: equal to any time from the first to the last."""

    def __init__(self, first: datetime, last: datetime) -> None:
        self.first, self.last = first, last

    def __eq__(self, other: object) -> bool:
        return isinstance(other, datetime) and self.first <= other <= self.last

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{self.first} to {self.last}"


@dataclass(frozen=True)
class Device:
    desired: Any
    reported: Any
    desired_version: int = 0
    reported_version: int = 0
    shadow_updated_at: Between | datetime | None = None
    last_seen_at: Between | datetime | None = None
    status: str = "OFFLINE"

    @property
    def delta(self) -> dict[str, Any]:
        absent = object()
        return {
            key: value
            for key, value in self.desired.items()
            if canonical(self.reported.get(key, absent)) != canonical(value)
        }

    @property
    def is_pending(self) -> bool:
        return self.desired_version > self.reported_version

    @property
    def is_drifted(self) -> bool:
        return self.desired_version == self.reported_version and self.delta != {}

    def sync_status(self, now: datetime) -> SyncStatus:
        seen = self.last_seen_at.last if isinstance(self.last_seen_at, Between) else self.last_seen_at
        if seen is None or now - seen > timedelta(minutes=30):
            return SyncStatus.STALE
        return SyncStatus.SYNCED if self.desired_version == self.reported_version else SyncStatus.PENDING


class Fleet:
    """One tenant's devices. What is refused raises, and has changed nothing."""

    def __init__(self, tenant_id: str) -> None:
        self.tenant_id = tenant_id
        self.devices: dict[str, Device] = {}
        self.parked: dict[str, Device] = {}

    def get(self, device_id: str) -> Device:
        if device_id not in self.devices:
            raise DeviceNotFound(self.tenant_id, device_id)
        return self.devices[device_id]

    def get_many(self, device_ids: Iterable[str]) -> dict[str, Device]:
        return {device_id: self.devices[device_id] for device_id in device_ids if device_id in self.devices}

    def replace_desired(
        self, at: Between, device_id: str, desired: object, *, expected_version: int | None = None
    ) -> Device:
        _fits(desired)
        self._at_version(device_id, expected_version)
        return self.write_desired(at, device_id, desired)

    def patch_desired(
        self, at: Between, device_id: str, patch: object, *, expected_version: int | None = None
    ) -> Device:
        _storable(patch)
        self._at_version(device_id, expected_version)
        desired = merged(self.devices[device_id].desired, patch)
        _fits(desired)
        return self.write_desired(at, device_id, desired)

    def replace_reported(
        self, at: Between, device_id: str, reported: object, *, acked_version: int | None = None
    ) -> Device:
        _fits(reported)
        return self._report(at, device_id, acked_version, lambda _: reported)

    def patch_reported(self, at: Between, device_id: str, patch: object, *, acked_version: int | None = None) -> Device:
        _storable(patch)
        return self._report(at, device_id, acked_version, lambda reported: merged(reported, patch))

    def replace_desired_many(
        self, at: Between, documents: Mapping[str, object], *, expected_versions: Mapping[str, int]
    ) -> dict[str, Device]:
        return self._all_or_none(
            documents,
            lambda device_id: self.replace_desired(
                at, device_id, documents[device_id], expected_version=expected_versions.get(device_id)
            ),
        )

    def patch_desired_many(self, at: Between, device_ids: Iterable[str], patch: object) -> dict[str, Device]:
        _storable(patch)
        return self._all_or_none(device_ids, lambda device_id: self.patch_desired(at, device_id, patch))

    def replace_reported_many(self, at: Between, reports: Iterable[Report]) -> list[ReportOutcome]:
        statuses: dict[type[Exception], ReportStatus] = {
            DeviceNotFound: ReportStatus.UNKNOWN_DEVICE,
            LateReport: ReportStatus.LATE,
            UnknownVersion: ReportStatus.UNKNOWN_VERSION,
        }
        outcomes = []
        for report in reports:
            try:
                self.replace_reported(at, report.device_id, report.reported, acked_version=report.acked_version)
                status = ReportStatus.ACCEPTED
            except IotModelsError as error:
                status = statuses.get(type(error), ReportStatus.INVALID)
            device = self.devices.get(report.device_id)
            versions = (device.desired_version, device.reported_version) if device else (None, None)
            outcomes.append(ReportOutcome(report.device_id, status, *versions))
        return outcomes

    def pending(self) -> dict[str, Device]:
        return {device_id: device for device_id, device in sorted(self.devices.items()) if device.is_pending}

    def drifted(self) -> dict[str, Device]:
        return {device_id: device for device_id, device in sorted(self.devices.items()) if device.is_drifted}

    def status_counts(self, now: datetime) -> dict[SyncStatus, int]:
        statuses = [device.sync_status(now) for device in self.devices.values()]
        return {status: statuses.count(status) for status in SyncStatus}

    def write_desired(self, at: Between, device_id: str, desired: object) -> Device:
        """Whoever writes desired, by whatever door."""
        device = self.devices[device_id]
        return self.change(device_id, desired=desired, desired_version=device.desired_version + 1, shadow_updated_at=at)

    def change(self, device_id: str, **columns: Any) -> Device:
        self.devices[device_id] = replace(self.devices[device_id], **columns)
        return self.devices[device_id]

    def downgrade(self) -> None:
        """The shadow columns are gone; what was ever written in them is parked."""
        for device_id, device in self.devices.items():
            if not _never_written(device):
                self.parked[device_id] = device
            self.devices[device_id] = _with_shadow_of(device, Device({}, {}))

    def upgrade(self) -> None:
        """Each parked shadow is back with its device, if there is one without a shadow."""
        for device_id in self.devices.keys() & self.parked.keys():
            if _never_written(self.devices[device_id]):
                self.devices[device_id] = _with_shadow_of(self.devices[device_id], self.parked.pop(device_id))

    def _at_version(self, device_id: str, expected: int | None) -> None:
        actual = self.get(device_id).desired_version
        if expected is not None and expected != actual:
            raise VersionConflict(device_id, expected, actual)

    def _report(self, at: Between, device_id: str, acked: int | None, document: Any) -> Device:
        device = self.get(device_id)
        if acked is not None and acked > device.desired_version:
            raise UnknownVersion(device_id, acked, device.desired_version)
        if acked is not None and acked < device.reported_version:
            raise LateReport(device_id, acked, device.reported_version)
        reported = document(device.reported)
        _fits(reported)
        version = device.reported_version if acked is None else acked
        return self.change(device_id, reported=reported, reported_version=version, last_seen_at=at)

    def _all_or_none(self, device_ids: Iterable[str], write: Any) -> dict[str, Device]:
        before = dict(self.devices)
        written: dict[str, Device] = {}
        errors: dict[str, IotModelsError] = {}
        for device_id in dict.fromkeys(device_ids):
            try:
                written[device_id] = write(device_id)
            except IotModelsError as error:
                errors[device_id] = error
        if errors:
            self.devices = before
            raise BatchRejected(errors)
        return written


def merged(target: Any, patch: Any) -> Any:
    """RFC 7396, section 2."""
    if not isinstance(patch, dict):
        return patch
    kept = {key: value for key, value in target.items() if key not in patch} if isinstance(target, dict) else {}
    old = target if isinstance(target, dict) else {}
    return kept | {key: merged(old.get(key), value) for key, value in patch.items() if value is not None}


def canonical(value: Any) -> Any:
    """The value, such that Python's == of two of them is that of JSON: true is not 1, and 1e23 is 10**23."""
    if isinstance(value, bool):
        return ("boolean", value)
    if isinstance(value, int | float | Decimal):
        return Decimal(str(value))
    if isinstance(value, dict):
        return {key: canonical(item) for key, item in value.items()}
    return [canonical(item) for item in value] if isinstance(value, list) else value


def _storable(document: object) -> None:
    if not isinstance(document, dict) or not _is_json(document, MAX_DEPTH):
        raise InvalidDocument("", "")


def _is_json(value: object, levels: int) -> bool:
    match value:
        case None | bool() | int():
            return True
        case float():
            return math.isfinite(value)
        case str():
            return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)
        case list():
            return levels > 0 and all(_is_json(item, levels - 1) for item in value)
        case dict():
            return levels > 0 and all(
                isinstance(key, str) and _is_json(key, 1) and _is_json(item, levels - 1) for key, item in value.items()
            )
    return False


def _fits(document: object) -> None:
    _storable(document)
    if len(json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()) > MAX_BYTES:
        raise DocumentTooLarge("", "")


def _never_written(device: Device) -> bool:
    return _with_shadow_of(device, Device({}, {})) == device


def _with_shadow_of(device: Device, other: Device) -> Device:
    """Of the five columns of revision 076."""
    return replace(
        device,
        desired=other.desired,
        reported=other.reported,
        desired_version=other.desired_version,
        reported_version=other.reported_version,
        shadow_updated_at=other.shadow_updated_at,
    )
