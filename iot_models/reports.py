"""Reports of devices in a batch, and what becomes of each: decided here, from versions alone, with no database."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from iot_models._core import validation
from iot_models._core.documents import encode_document, storable_text
from iot_models.errors import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from iot_models._core.documents import DocumentLimits


class ReportStatus(StrEnum):
    """What became of a report.

    Example:
        >>> ReportStatus.LATE == "late"
        True
    """

    ACCEPTED = "accepted"
    LATE = "late"
    UNKNOWN_DEVICE = "unknown_device"
    UNKNOWN_VERSION = "unknown_version"
    INVALID = "invalid"


@dataclass(frozen=True, slots=True)
class Report:
    """What one device says about itself; nothing is checked until the batch is written.

    Attributes:
        device_id: Who reports.
        reported: The whole reported document.
        acked_version: The `desired_version` that the device applied; None where it says nothing about that.
    """

    device_id: str
    reported: Mapping[str, Any]
    acked_version: int | None = None


@dataclass(frozen=True, slots=True)
class ReportOutcome:
    """What became of one report.

    Attributes:
        device_id: As the report gave it.
        status: `accepted`: written. `late`: a newer version was acknowledged already, drop the message.
            `unknown_version`: acknowledges what was never asked, let the device fetch its shadow again.
            `unknown_device`: the tenant has no such device. `invalid`: the document cannot be stored, or
            `acked_version` is no version, or `device_id` no text; says so whether there is such a device or not.
        desired_version: As it is after this report; None if the tenant has no such device.
        reported_version: The same.
    """

    device_id: str
    status: ReportStatus
    desired_version: int | None
    reported_version: int | None


class Versions(NamedTuple):
    """How a device stands: all that a report's fate depends on."""

    desired: int
    reported: int


class CheckedReport(NamedTuple):
    """A report and what can be said of it before its device is looked up.

    Attributes:
        report: The report itself.
        device_id: The id to look up; None if no row can carry it.
        document: The document as JSON text; None if the report is invalid.
        acked_version: As a plain int; None if it says nothing about that, or is invalid.
    """

    report: Report
    device_id: str | None
    document: str | None
    acked_version: int | None


class Accepted(NamedTuple):
    """What is to be written of a device.

    Attributes:
        document: That of its last accepted report, as JSON text.
        seen: The versions on which the reports were judged: the write holds only where they still stand.
        reported_version: As it is to be.
    """

    document: str
    seen: Versions
    reported_version: int


def judge(acked_version: int | None, versions: Versions) -> ReportStatus:
    """What becomes of a valid report of a device that stands at these versions."""
    if acked_version is None:
        return ReportStatus.ACCEPTED
    # In this order: after a restore that left desired behind reported, the report is unknown, not merely late.
    if acked_version > versions.desired:
        return ReportStatus.UNKNOWN_VERSION
    if acked_version < versions.reported:
        return ReportStatus.LATE
    return ReportStatus.ACCEPTED


def check(report: Report, limits: DocumentLimits) -> CheckedReport:
    """Check all of a report that can be checked without its device.

    Raises:
        TypeError: If `report` is no `Report`. What is wrong inside one is no error but a status.
    """
    if not isinstance(report, Report):
        raise TypeError(f"reports must be Report objects, got {shown(report)}")
    storable = _is_text(report.device_id) and storable_text(report.device_id)
    document, acked_version = _checked(report, limits)
    return CheckedReport(report, report.device_id if storable else None, document, acked_version)


def fold(
    reports: Iterable[CheckedReport], versions: Mapping[str, Versions]
) -> tuple[list[ReportOutcome], dict[str, Accepted]]:
    """Decide on reports as if they were applied one after another.

    Args:
        reports: In the order of arrival, any number of them of one device.
        versions: How the devices stand before the first report. A device that is not in it does not exist.

    Returns:
        One outcome per report, in order, and by device what is to be written in the end: nothing for a device without
        an accepted report.
    """
    current = dict(versions)
    accepted: dict[str, Accepted] = {}
    outcomes: list[ReportOutcome] = []
    for report, device_id, document, acked_version in reports:
        stands = None if device_id is None else current.get(device_id)
        if document is None:
            status = ReportStatus.INVALID
        elif device_id is None or stands is None:
            status = ReportStatus.UNKNOWN_DEVICE
        else:
            status = judge(acked_version, stands)
            if status is ReportStatus.ACCEPTED:
                if acked_version is not None:
                    stands = stands._replace(reported=acked_version)
                current[device_id] = stands
                accepted[device_id] = Accepted(document, versions[device_id], stands.reported)
        outcomes.append(ReportOutcome(report.device_id, status, *(stands or (None, None))))
    return outcomes, accepted


def _checked(report: Report, limits: DocumentLimits) -> tuple[str | None, int | None]:
    """The document as JSON text and the acknowledged version; no document if anything about the report is invalid."""
    if not _is_text(report.device_id):
        return None, None
    try:
        acked_version = validation.version("acked_version", report.acked_version)
        return encode_document(report.reported, limits), acked_version
    except (TypeError, ValueError):  # InvalidDocument is a ValueError
        return None, None


def _is_text(value: object) -> bool:
    return isinstance(value, str)
