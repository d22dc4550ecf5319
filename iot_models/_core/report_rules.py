"""When a report is accepted: decided from the device's versions alone, with no database.

`judge` is the rule; `conditions.accepted` is the same rule in SQL, where it guards the write.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from iot_models._core import validation
from iot_models._core.documents import encode_document
from iot_models.errors import LateReport, UnknownVersion, shown
from iot_models.reports import Report, ReportOutcome, ReportStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from iot_models._core.documents import DocumentLimits


class Versions(NamedTuple):
    """The two versions of a device: all that the answer to a report depends on."""

    desired: int
    reported: int


class CheckedReport(NamedTuple):
    """A report, as far as it can be checked before its device is looked up.

    Attributes:
        report: The report itself.
        device_id: The id to look up; None if no row can carry it.
        document: The document as JSON text; None if the report is invalid.
        acked_version: As a plain int; None if the report acknowledges nothing, or is invalid.
    """

    report: Report
    device_id: str | None
    document: str | None
    acked_version: int | None


class Accepted(NamedTuple):
    """What is to be written to a device.

    Attributes:
        document: The document of its last accepted report, as JSON text.
        seen: The versions that the reports were judged by: the write takes effect only where they are still current.
        reported_version: The new `reported_version`.
    """

    document: str
    seen: Versions
    reported_version: int


def judge(acked_version: int | None, versions: Versions) -> ReportStatus:
    """Accept or refuse a valid report of a device that is at these versions."""
    if acked_version is None:
        return ReportStatus.ACCEPTED
    # In this order: after a restore that left desired behind reported, the version is unknown, not merely late.
    if acked_version > versions.desired:
        return ReportStatus.UNKNOWN_VERSION
    if acked_version < versions.reported:
        return ReportStatus.LATE
    return ReportStatus.ACCEPTED


def require_accepted(device_id: str, acked_version: int | None, versions: Versions) -> None:
    """Refuse a report that `judge` does not accept.

    Raises:
        LateReport: If a newer version is acknowledged already.
        UnknownVersion: If the version was never asked for.
    """
    status = judge(acked_version, versions)
    if acked_version is None or status is ReportStatus.ACCEPTED:
        return
    if status is ReportStatus.UNKNOWN_VERSION:
        raise UnknownVersion(device_id, acked_version, versions.desired)
    raise LateReport(device_id, acked_version, versions.reported)


def check(report: Report, limits: DocumentLimits) -> CheckedReport:
    """Check all of a report that can be checked without its device.

    Raises:
        TypeError: If `report` is no `Report`. What is wrong inside one is a status, no error.
    """
    if not isinstance(report, Report):
        raise TypeError(f"reports must be Report objects, got {shown(report)}")
    if not _is_text(report.device_id):
        return CheckedReport(report, None, None, None)
    # An invalid report is looked up too: its outcome shows the versions of the device.
    device_id = next(iter(validation.findable([report.device_id])), None)
    try:
        acked_version = validation.version("acked_version", report.acked_version)
        document = encode_document(report.reported, limits)
    except (TypeError, ValueError):  # InvalidDocument is a ValueError
        return CheckedReport(report, device_id, None, None)
    return CheckedReport(report, device_id, document, acked_version)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def fold(
    reports: Iterable[CheckedReport], versions: Mapping[str, Versions]
) -> tuple[list[ReportOutcome], dict[str, Accepted]]:
    """Decide on reports as if they were applied one after another.

    Args:
        reports: In the order of arrival; several of one device are allowed.
        versions: The versions of the devices before the first report. A device that is not in it does not exist.

    Returns:
        One outcome per report, in order, and by device what is to be written in the end: nothing for a device without
        an accepted report.
    """
    current = dict(versions)
    accepted: dict[str, Accepted] = {}
    outcomes: list[ReportOutcome] = []
    for report, device_id, document, acked_version in reports:
        now = None if device_id is None else current.get(device_id)
        if document is None:
            status = ReportStatus.INVALID
        elif device_id is None or now is None:
            status = ReportStatus.UNKNOWN_DEVICE
        else:
            status = judge(acked_version, now)
            if status is ReportStatus.ACCEPTED:
                if acked_version is not None:
                    now = now._replace(reported=acked_version)
                current[device_id] = now
                accepted[device_id] = Accepted(document, versions[device_id], now.reported)
        outcomes.append(ReportOutcome(report.device_id, status, *(now or (None, None))))
    return outcomes, accepted
