"""Which writes happen: a desired write by `expected_version`, a report by `acked_version`."""

from __future__ import annotations

from typing import Final

from iot_models import DeviceNotFound, InvalidDocument, IotModelsError, LateReport, ReportStatus, UnknownVersion

# What a single report raises, where a batch answers with a status.
ERRORS: Final[dict[ReportStatus, type[IotModelsError]]] = {
    ReportStatus.LATE: LateReport,
    ReportStatus.UNKNOWN_DEVICE: DeviceNotFound,
    ReportStatus.UNKNOWN_VERSION: UnknownVersion,
    ReportStatus.INVALID: InvalidDocument,
}


def is_conflict(expected_version: int | None, desired_version: int) -> bool:
    """Whether a desired write is refused; without an expected version it never is."""
    return expected_version not in {None, desired_version}


def status_of_report(acked_version: int | None, desired_version: int, reported_version: int) -> ReportStatus:
    """What becomes of a valid report; without an acknowledged version it is always accepted."""
    if acked_version is None:
        return ReportStatus.ACCEPTED
    if acked_version > desired_version:  # also where the backup that was restored lags behind the device
        return ReportStatus.UNKNOWN_VERSION
    return ReportStatus.LATE if acked_version < reported_version else ReportStatus.ACCEPTED


def reported_version_after(acked_version: int | None, reported_version: int) -> int:
    """What an accepted report leaves behind."""
    return reported_version if acked_version is None else acked_version
