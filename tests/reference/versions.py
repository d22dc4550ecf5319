"""Which writes happen: a desired write by `expected_version`, a report by `acked_version`."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

from iot_models import DeviceNotFound, InvalidDocument, IotModelsError, LateReport, ReportStatus, UnknownVersion

# What a single report raises, where a batch answers with a status.
ERRORS: Final[dict[ReportStatus, type[IotModelsError]]] = {
    ReportStatus.LATE: LateReport,
    ReportStatus.UNKNOWN_DEVICE: DeviceNotFound,
    ReportStatus.UNKNOWN_VERSION: UnknownVersion,
    ReportStatus.INVALID: InvalidDocument,
}


# What a report may acknowledge instead of a version: the newest one, if the device is converged after it.
IF_CONVERGED: Final = "if converged"
Acknowledges: TypeAlias = int | Literal["if converged"] | None


def is_conflict(expected_version: Acknowledges, desired_version: int) -> bool:
    """Whether a desired write is refused; without an expected version it never is."""
    return expected_version not in {None, desired_version}


def status_of_report(
    acked_version: Acknowledges, desired_version: int, reported_version: int, refused_version: int | None = None
) -> ReportStatus:
    """What becomes of a valid report; one that names no version is always accepted."""
    if refused_version is not None:
        if refused_version > desired_version:
            return ReportStatus.UNKNOWN_VERSION
        if refused_version < desired_version or refused_version <= reported_version:
            return ReportStatus.LATE
    if acked_version is None or acked_version == IF_CONVERGED:
        return ReportStatus.ACCEPTED
    if acked_version > desired_version:  # also where the backup that was restored lags behind the device
        return ReportStatus.UNKNOWN_VERSION
    return ReportStatus.LATE if acked_version < reported_version else ReportStatus.ACCEPTED


def reported_version_after(
    acked_version: Acknowledges, desired_version: int, reported_version: int, *, is_converged: bool
) -> int:
    """What an accepted report leaves behind, after which the device is converged or not."""
    if acked_version == IF_CONVERGED:
        return desired_version if is_converged else reported_version
    return reported_version if acked_version is None else acked_version


def refusal_after(refusal: str | None, refused_version: int, desired_version: int, reported_version: int) -> str | None:
    """What is left of a refusal: it is over with the next desired write, or with an acknowledgement in the end."""
    return refusal if refused_version == desired_version > reported_version else None


def removed_at(desired_version: int) -> int:
    """The version of the removal of a device. Registered again, the device goes on at it, acknowledged."""
    return desired_version + 1
