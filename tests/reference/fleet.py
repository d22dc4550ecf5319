"""What each method of `ShadowService` does to one tenant's devices: the contract as a dict in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from iot_models import (
    BatchRejected,
    DeviceNotFound,
    IotModelsError,
    ReportOutcome,
    ReportStatus,
    SyncStatus,
    VersionConflict,
)
from tests.reference.documents import LIMITS, Limits
from tests.reference.json_values import merge_patch
from tests.reference.shadows import Between, Device, not_before
from tests.reference.versions import (
    ERRORS,
    IF_CONVERGED,
    Acknowledges,
    is_conflict,
    reported_version_after,
    status_of_report,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from datetime import datetime

    from iot_models import Report


class Fleet:
    """One tenant's devices. Methods have the names and errors of the service's; a refused call changes nothing.

    The first argument of a write is the time of its transaction, as far as it is known from outside.
    """

    def __init__(self, tenant_id: str, limits: Limits = LIMITS) -> None:
        self.tenant_id = tenant_id
        self.limits = limits
        self.devices: dict[str, Device] = {}
        self.parked: dict[str, Device] = {}

    # Reads

    def get(self, device_id: str) -> Device:
        if device_id not in self.devices:
            raise DeviceNotFound(self.tenant_id, device_id)
        return self.devices[device_id]

    def get_many(self, device_ids: Iterable[str]) -> dict[str, Device]:
        return {device_id: self.devices[device_id] for device_id in device_ids if device_id in self.devices}

    def pending(self) -> dict[str, Device]:
        return {device_id: device for device_id, device in sorted(self.devices.items()) if device.is_pending}

    def iter_pending(self) -> Iterator[Device]:
        return iter(self.pending().values())

    def count_pending(self) -> int:
        return len(self.pending())

    def drifted(self) -> dict[str, Device]:
        return {device_id: device for device_id, device in sorted(self.devices.items()) if device.is_drifted}

    def status_counts(self, now: datetime) -> dict[SyncStatus, int]:
        statuses = [device.sync_status(now) for device in self.devices.values()]
        return {status: statuses.count(status) for status in SyncStatus}

    # Writes

    def replace_desired(
        self, at: Between, device_id: str, desired: object, *, expected_version: int | None = None
    ) -> Device:
        self._require(self.limits.refusal(desired))
        self._require_version(device_id, expected_version)
        return self.write_desired(at, device_id, desired)

    def patch_desired(
        self, at: Between, device_id: str, patch: object, *, expected_version: int | None = None
    ) -> Device:
        self._require(self.limits.refusal_of_patch(patch))
        self._require_version(device_id, expected_version)
        desired = merge_patch(self.devices[device_id].desired, patch)
        self._require(self.limits.refusal(desired))
        return self.write_desired(at, device_id, desired)

    def replace_reported(
        self,
        at: Between,
        device_id: str,
        reported: object,
        *,
        acked_version: int | None = None,
        ack_if_converged: bool = False,
    ) -> Device:
        self._require(self.limits.refusal(reported))
        self._require_acceptance(device_id, acked_version)
        return self._write_reported(at, device_id, reported, IF_CONVERGED if ack_if_converged else acked_version)

    def patch_reported(
        self,
        at: Between,
        device_id: str,
        patch: object,
        *,
        acked_version: int | None = None,
        ack_if_converged: bool = False,
    ) -> Device:
        self._require(self.limits.refusal_of_patch(patch))
        self._require_acceptance(device_id, acked_version)
        reported = merge_patch(self.devices[device_id].reported, patch)
        self._require(self.limits.refusal(reported))
        return self._write_reported(at, device_id, reported, IF_CONVERGED if ack_if_converged else acked_version)

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
        self._require(self.limits.refusal_of_patch(patch))
        return self._all_or_none(device_ids, lambda device_id: self.patch_desired(at, device_id, patch))

    def replace_reported_many(self, at: Between, reports: Iterable[Report]) -> list[ReportOutcome]:
        return [self._outcome(at, self.replace_reported, report) for report in reports]

    def patch_reported_many(self, at: Between, reports: Iterable[Report]) -> list[ReportOutcome]:
        return [self._outcome(at, self.patch_reported, report) for report in reports]

    # What happens beside the service

    def write_desired(self, at: Between, device_id: str, desired: object) -> Device:
        """A desired write that nothing stands against, be it by the service or by a mapped object."""
        device = self.devices[device_id]
        return self.change(
            device_id,
            desired=desired,
            desired_version=device.desired_version + 1,
            # A version ahead, which others stored, is brought back.
            reported_version=min(device.reported_version, device.desired_version),
            shadow_updated_at=not_before(device.shadow_updated_at, at),
        )

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

    def _require(self, refusal: Any) -> None:
        if refusal is not None:
            raise refusal("", "")

    def _require_version(self, device_id: str, expected: int | None) -> None:
        actual = self.get(device_id).desired_version
        if expected is not None and is_conflict(expected, actual):
            raise VersionConflict(device_id, expected, actual)

    def _require_acceptance(self, device_id: str, acked: int | None) -> None:
        device = self.get(device_id)
        status = status_of_report(acked, device.desired_version, device.reported_version)
        if status is not ReportStatus.ACCEPTED:
            stands = device.reported_version if status is ReportStatus.LATE else device.desired_version
            raise ERRORS[status](device_id, acked, stands)

    def _write_reported(self, at: Between, device_id: str, reported: object, acknowledges: Acknowledges) -> Device:
        device = replace(self.devices[device_id], reported=reported)
        version = reported_version_after(
            acknowledges, device.desired_version, device.reported_version, is_converged=device.is_converged
        )
        seen = not_before(device.last_seen_at, at)
        return self.change(device_id, reported=reported, reported_version=version, last_seen_at=seen)

    def _outcome(self, at: Between, write: Callable[..., Device], report: Report) -> ReportOutcome:
        status = ReportStatus.ACCEPTED
        acknowledges = {"acked_version": report.acked_version, "ack_if_converged": report.ack_if_converged}
        try:
            write(at, report.device_id, report.reported, **acknowledges)
        except IotModelsError as error:
            (status,) = (status for status, kind in ERRORS.items() if isinstance(error, kind))
        device = self.devices.get(report.device_id)
        versions = (device.desired_version, device.reported_version) if device else (None, None)
        return ReportOutcome(report.device_id, status, *versions)

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
