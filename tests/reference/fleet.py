"""What each method of `ShadowService` does to one tenant's devices: the contract as a dict in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from iot_models import (
    BatchRejected,
    DeviceNotFound,
    IotModelsError,
    ReportOutcome,
    ReportStatus,
    RequestReused,
    SyncStatus,
    VersionConflict,
    VersionNotKept,
)
from tests.reference.documents import LIMITS, Limits
from tests.reference.json_values import equal, merge_patch
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


@dataclass(frozen=True)
class Version:
    """A row of the history."""

    desired: Any  # None: the device was removed
    written_at: Between | datetime | None = None
    reason: str | None = None
    request_id: str | None = None


class Fleet:
    """One tenant's devices. Methods have the names and errors of the service's; a refused call changes nothing.

    The first argument of a write is the time of its transaction, as far as it is known from outside.
    """

    def __init__(self, tenant_id: str, limits: Limits = LIMITS) -> None:
        self.tenant_id = tenant_id
        self.limits = limits
        self.devices: dict[str, Device] = {}
        self.parked: dict[str, Device] = {}
        self.versions: dict[str, dict[int, Version]] = {}  # by device and desired_version; each dict is never changed

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

    def refused(self) -> dict[str, Device]:
        return {device_id: device for device_id, device in self.pending().items() if device.refusal is not None}

    def count_refused(self) -> int:
        return len(self.refused())

    def history(self, device_id: str) -> dict[int, Version]:
        kept = self._kept(device_id)
        if not kept:
            raise DeviceNotFound(self.tenant_id, device_id)
        return dict(sorted(kept.items(), reverse=True))

    def desired_at(self, device_id: str, version: int) -> Version:
        kept = self._kept(device_id)
        if version not in kept:
            raise VersionNotKept(device_id, version, min(kept, default=None), max(kept, default=None))
        return kept[version]

    def changes(self) -> dict[tuple[str, int], Version]:
        """All that is kept, once it is committed; in which order the model cannot know."""
        return {
            (device_id, number): version
            for device_id, kept in self.versions.items()
            for number, version in kept.items()
        }

    def _kept(self, device_id: str) -> dict[int, Version]:
        """The history, and the version that the device is at."""
        kept = self.versions.get(device_id, {})
        device = self.devices.get(device_id)
        if device is None:
            return kept
        return {device.desired_version: Version(device.desired, device.shadow_updated_at)} | kept

    def status_counts(self, now: datetime) -> dict[SyncStatus, int]:
        statuses = [device.sync_status(now) for device in self.devices.values()]
        return {status: statuses.count(status) for status in SyncStatus}

    # Writes

    def replace_desired(
        self,
        at: Between,
        device_id: str,
        desired: object,
        *,
        expected_version: int | None = None,
        reason: str | None = None,
        request_id: str | None = None,
    ) -> Device:
        self._require(self.limits.refusal(desired))
        if (done := self._done(device_id, request_id, lambda *_: desired)) is not None:
            return done
        self._require_version(device_id, expected_version)
        return self.write_desired(at, device_id, desired, reason, request_id)

    def patch_desired(
        self,
        at: Between,
        device_id: str,
        patch: object,
        *,
        expected_version: int | None = None,
        reason: str | None = None,
        request_id: str | None = None,
    ) -> Device:
        self._require(self.limits.refusal_of_patch(patch))
        if (
            done := self._done(
                device_id,
                request_id,
                lambda before, written, _: merge_patch(written if before is None else before, patch),
            )
        ) is not None:
            return done
        self._require_version(device_id, expected_version)
        desired = merge_patch(self.devices[device_id].desired, patch)
        self._require(self.limits.refusal(desired))
        return self.write_desired(at, device_id, desired, reason, request_id)

    def restore_desired(
        self,
        at: Between,
        device_id: str,
        version: int,
        *,
        expected_version: int | None = None,
        reason: str | None = None,
        request_id: str | None = None,
    ) -> Device:
        def restored(_before: Any, written: Any, number: int) -> Any:
            kept = self._kept(device_id)
            # Pruned since: nobody can tell.
            return kept[version].desired or {} if version in kept else written if version < number else None

        if (done := self._done(device_id, request_id, restored)) is not None:
            return done
        self._require_version(device_id, expected_version)
        kept = self._kept(device_id)
        device = self.devices[device_id]
        desired = self.desired_at(device_id, version).desired
        if desired is None and version == device.desired_version:  # registered again at the version of its removal
            desired = device.desired
        if desired is None:
            raise VersionNotKept(device_id, version, min(kept), max(kept))
        return self.write_desired(at, device_id, desired, reason, request_id)

    def refuse_desired(self, at: Between, device_id: str, version: int, reason: str) -> Device:
        device = self.get(device_id)
        status = status_of_report(None, device.desired_version, device.reported_version, version)
        if status is not ReportStatus.ACCEPTED:
            raise ERRORS[status](device_id, version, device.desired_version)
        seen = not_before(device.last_seen_at, at)
        return self.change(device_id, refused=(version, reason), last_seen_at=seen)

    def register(self, _at: Between, device_id: str, _site_id: str) -> Device:
        if device_id not in self.devices:
            self.add(device_id, Device({}, {}))
        return self.devices[device_id]

    def register_many(self, at: Between, sites: Mapping[str, str]) -> dict[str, Device]:
        return {device_id: self.register(at, device_id, site_id) for device_id, site_id in sites.items()}

    def remove(
        self, at: Between, device_id: str, *, expected_version: int | None = None, reason: str | None = None
    ) -> None:
        self._require_version(device_id, expected_version)
        self._record(device_id, Version(None, not_before(self.devices[device_id].shadow_updated_at, at), reason))
        del self.devices[device_id]

    def prune_history(self, _at: Between, keep: int) -> int:
        """All that is not among the newest, whatever its age."""
        before = sum(map(len, self.versions.values()))
        self.versions = {
            device_id: dict(sorted(kept.items())[max(0, len(kept) - keep) :])
            for device_id, kept in self.versions.items()
        }
        return before - sum(map(len, self.versions.values()))

    def replace_reported(
        self,
        at: Between,
        device_id: str,
        reported: object,
        *,
        acked_version: int | None = None,
        ack_if_converged: bool = False,
        refuses: tuple[int, str] | None = None,
    ) -> Device:
        self._require(self.limits.refusal(reported))
        self._require_acceptance(device_id, acked_version, refuses)
        acknowledges: Acknowledges = IF_CONVERGED if ack_if_converged else acked_version
        return self._write_reported(at, device_id, reported, acknowledges, refuses)

    def patch_reported(
        self,
        at: Between,
        device_id: str,
        patch: object,
        *,
        acked_version: int | None = None,
        ack_if_converged: bool = False,
        refuses: tuple[int, str] | None = None,
    ) -> Device:
        self._require(self.limits.refusal_of_patch(patch))
        self._require_acceptance(device_id, acked_version, refuses)
        reported = merge_patch(self.devices[device_id].reported, patch)
        self._require(self.limits.refusal(reported))
        acknowledges: Acknowledges = IF_CONVERGED if ack_if_converged else acked_version
        return self._write_reported(at, device_id, reported, acknowledges, refuses)

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

    def write_desired(
        self,
        at: Between,
        device_id: str,
        desired: object,
        reason: str | None = None,
        request_id: str | None = None,
    ) -> Device:
        """A desired write that nothing stands against, be it by the service or by a mapped object."""
        device = self.devices[device_id]
        written_at = not_before(device.shadow_updated_at, at)
        version = self._record(device_id, Version(desired, written_at, reason, request_id))
        return self.change(
            device_id,
            desired=desired,
            desired_version=version,
            # A version ahead, which others stored, is brought back. What fits a row that is behind its history is of
            # its earlier life.
            reported_version=version - 1
            if version - 1 > device.desired_version
            else min(device.reported_version, device.desired_version),
            shadow_updated_at=written_at,
            refused=None,
        )

    def add(self, device_id: str, device: Device) -> None:
        """A row is inserted: it goes on above its history, with a version of its own if it asks for anything."""
        kept = self.versions.get(device_id, {})
        if kept:
            newest = max(kept)
            resume = newest if kept[newest].desired is None else newest + 1  # without a removal, above the newest one
            is_blank = device.reported_version >= resume and equal(device.desired, {})
            if device.desired_version < resume or (device.desired_version == resume and not is_blank):
                version = resume + (not equal(device.desired, {}))
                device = replace(device, desired_version=version, reported_version=resume)
        self.devices[device_id] = device

    def _record(self, device_id: str, version: Version) -> int:
        """The version above the row's and above its history; the state before it is recorded too."""
        device, kept = self.devices[device_id], self.versions.get(device_id, {})
        newest = max(kept, default=-1)
        if newest < device.desired_version:
            kept = kept | {device.desired_version: Version(device.desired, device.shadow_updated_at)}
        number = max(device.desired_version, newest) + 1
        self.versions[device_id] = kept | {number: version}
        return number

    def _done(self, device_id: str, request_id: str | None, asked: Callable[[Any, Any, int], Any]) -> Device | None:
        """The device as it is, if the request was done before."""
        device = self.get(device_id)
        kept = self.versions.get(device_id, {})
        done = {version.request_id: number for number, version in kept.items()}
        if request_id is None or request_id not in done:
            return None
        number = done[request_id]
        before = kept[number - 1].desired if number - 1 in kept else None
        # The version before may be pruned, or its number may be another one.
        if not equal(asked(before, kept[number].desired, number), kept[number].desired):
            raise RequestReused(device_id, request_id, number)
        return device

    def change(self, device_id: str, **columns: Any) -> Device:
        self.devices[device_id] = replace(self.devices[device_id], **columns)
        return self.devices[device_id]

    def downgrade(self) -> None:
        """The shadow columns are gone; what was ever written in them is parked. So are refusals that count."""
        for device_id, device in self.devices.items():
            if not _never_written(device):
                self.parked[device_id] = device
            self.devices[device_id] = replace(_with_shadow_of(device, Device({}, {})), refused=None)

    def upgrade(self) -> None:
        """Each parked shadow is back with its device, if there is one without a shadow."""
        for device_id in self.devices.keys() & self.parked.keys():
            if _never_written(self.devices[device_id]):
                parked = self.parked.pop(device_id)
                refused = None if parked.refusal is None else parked.refused
                self.devices[device_id] = replace(_with_shadow_of(self.devices[device_id], parked), refused=refused)

    def _require(self, refusal: Any) -> None:
        if refusal is not None:
            raise refusal("", "")

    def _require_version(self, device_id: str, expected: int | None) -> None:
        actual = self.get(device_id).desired_version
        if expected is not None and is_conflict(expected, actual):
            raise VersionConflict(device_id, expected, actual)

    def _require_acceptance(self, device_id: str, acked: int | None, refuses: tuple[int, str] | None) -> None:
        device = self.get(device_id)
        refused = None if refuses is None else refuses[0]
        status = status_of_report(acked, device.desired_version, device.reported_version, refused)
        if status is not ReportStatus.ACCEPTED:
            stands = device.reported_version if status is ReportStatus.LATE else device.desired_version
            raise ERRORS[status](device_id, acked, stands)

    def _write_reported(
        self,
        at: Between,
        device_id: str,
        reported: object,
        acknowledges: Acknowledges,
        refuses: tuple[int, str] | None,
    ) -> Device:
        device = replace(self.devices[device_id], reported=reported)
        version = reported_version_after(
            acknowledges, device.desired_version, device.reported_version, is_converged=device.is_converged
        )
        seen = not_before(device.last_seen_at, at)
        refused = refuses or device.refused
        return self.change(device_id, reported=reported, reported_version=version, last_seen_at=seen, refused=refused)

    def _outcome(self, at: Between, write: Callable[..., Device], report: Report) -> ReportOutcome:
        status = ReportStatus.ACCEPTED
        how: dict[str, Any] = {
            "acked_version": report.acked_version,
            "ack_if_converged": report.ack_if_converged,
            "refuses": None if report.refused_version is None else (report.refused_version, report.refusal),
        }
        try:
            write(at, report.device_id, report.reported, **how)
        except IotModelsError as error:
            (status,) = (status for status, kind in ERRORS.items() if isinstance(error, kind))
        device = self.devices.get(report.device_id)
        versions = (device.desired_version, device.reported_version) if device else (None, None)
        return ReportOutcome(report.device_id, status, *versions)

    def _all_or_none(self, device_ids: Iterable[str], write: Any) -> dict[str, Device]:
        before = dict(self.devices), dict(self.versions)
        written: dict[str, Device] = {}
        errors: dict[str, IotModelsError] = {}
        for device_id in dict.fromkeys(device_ids):
            try:
                written[device_id] = write(device_id)
            except IotModelsError as error:
                errors[device_id] = error
        if errors:
            self.devices, self.versions = before
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
