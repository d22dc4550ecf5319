"""When a report is accepted, and what it leaves behind: decided from what was read of the device, with no database.

`judge` is the rule; `conditions.accepted` is the same rule in SQL, where it guards the write.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from iot_models import twin
from iot_models._core import validation
from iot_models._core.documents import check_document, decode_document, encode_document
from iot_models.errors import InvalidDocument, LateReport, UnknownVersion, UnreadableShadow, shown
from iot_models.reports import Report, ReportOutcome, ReportStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from iot_models._core.documents import DocumentLimits


log = logging.getLogger(__name__)


class Versions(NamedTuple):
    """The two versions of a device: all that a report is judged by."""

    desired: int
    reported: int


class Stored(NamedTuple):
    """What was read of a device, as far as the reports need it.

    Attributes:
        versions: Its versions.
        desired: Its desired document as JSON text; None if no report acknowledges what is converged.
        reported: Its reported document as JSON text; None if no report is a patch.
    """

    versions: Versions
    desired: str | None = None
    reported: str | None = None


class CheckedReport(NamedTuple):
    """A report, as far as it can be checked before its device is looked up.

    Attributes:
        report: The report itself.
        device_id: The id to look up; None if no row can carry it.
        document: The whole document as JSON text; None if the report is a patch or invalid.
        patch: The merge patch; None if the report is a document or invalid.
        acked_version: As a plain int; None if the report names no version, or is invalid.
        if_converged: Whether it acknowledges the newest version if the device is converged after it.
        refused_version: The version that the device refuses; None if it refuses none, or the report is invalid.
        refusal: Why.
    """

    report: Report
    device_id: str | None
    document: str | None = None
    patch: Mapping[str, object] | None = None
    acked_version: int | None = None
    if_converged: bool = False
    refused_version: int | None = None
    refusal: str | None = None

    @property
    def is_valid(self) -> bool:
        """Whether nothing is wrong with it, whatever its device is like."""
        return self.document is not None or self.patch is not None


class Accepted(NamedTuple):
    """What is to be written to a device.

    Attributes:
        document: The document of its last accepted report, as JSON text.
        seen: What the reports were judged by: the write takes effect only where it is still current.
        reported_version: The new `reported_version`.
        refused_version: The version that it refuses; None leaves what the row has.
        refusal: Why.
    """

    document: str
    seen: Stored
    reported_version: int
    refused_version: int | None = None
    refusal: str | None = None


def judge(acked_version: int | None, versions: Versions, refused_version: int | None = None) -> ReportStatus:
    """Accept or refuse a valid report of a device that is at these versions.

    A version that is refused is newer than the one that the same report acknowledges, if it does both.
    """
    newest = max((version for version in (acked_version, refused_version) if version is not None), default=0)
    # In this order: after a restore that left desired behind reported, the version is unknown, not merely late.
    if newest > versions.desired:
        return ReportStatus.UNKNOWN_VERSION
    if acked_version is not None and acked_version < versions.reported:
        return ReportStatus.LATE
    if refused_version is not None and not (refused_version == versions.desired > versions.reported):
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


def require_refusable(device_id: str, version: int, versions: Versions) -> None:
    """Do not take a refusal that `judge` does not accept.

    Raises:
        LateReport: If there is a newer version, or this one is acknowledged already.
        UnknownVersion: If the version was never asked for.
    """
    status = judge(None, versions, version)
    if status is ReportStatus.UNKNOWN_VERSION:
        raise UnknownVersion(device_id, version, versions.desired)
    if status is ReportStatus.LATE:
        raise LateReport(device_id, version, versions.desired)


def check(report: Report, limits: DocumentLimits, *, patches: bool) -> CheckedReport:
    """Check all of a report that can be checked without its device.

    Args:
        report: The report.
        limits: For its document.
        patches: Whether it has a merge patch, and not the whole document.

    Raises:
        TypeError: If `report` is no `Report`. What is wrong inside one is a status, no error.
    """
    if not isinstance(report, Report):
        raise TypeError(f"reports must be Report objects, got {shown(report)}")
    if not _is_text(report.device_id):
        return CheckedReport(report, None)
    # An invalid report is looked up too: its outcome shows the versions of the device.
    device_id = next(iter(validation.findable([report.device_id])), None)
    document, patch = None, None
    try:
        acked_version = validation.acknowledgement(report.acked_version, report.ack_if_converged)
        refused = validation.refusal(report)
        if patches:
            check_document(report.reported, limits)
            patch = report.reported
        else:
            document = encode_document(report.reported, limits)
    except (TypeError, ValueError):  # InvalidDocument is a ValueError
        return CheckedReport(report, device_id)
    return CheckedReport(
        report, device_id, document, patch, acked_version, report.ack_if_converged, *(refused or (None, None))
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def fold(
    reports: Iterable[CheckedReport], stored: Mapping[str, Stored], tenant_id: str, limits: DocumentLimits
) -> tuple[list[ReportOutcome], dict[str, Accepted]]:
    """Decide on reports as if they were applied one after another.

    Args:
        reports: In the order of arrival; several of one device are allowed.
        stored: The devices before the first report. A device that is not in it does not exist.
        tenant_id: Whose devices they are.
        limits: For a document after a merge.

    Returns:
        One outcome per report, in order, and by device what is to be written in the end: nothing for a device without
        an accepted report.
    """
    current = dict(stored)
    accepted: dict[str, Accepted] = {}
    outcomes: list[ReportOutcome] = []
    for report in reports:
        device_id = report.device_id
        now = None if device_id is None else current.get(device_id)
        if not report.is_valid:
            status = ReportStatus.INVALID
        elif device_id is None or now is None:
            status = ReportStatus.UNKNOWN_DEVICE
        else:
            status = judge(report.acked_version, now.versions, report.refused_version)
            if status is ReportStatus.ACCEPTED:
                try:
                    document, now = _applied(report, now, tenant_id, device_id, limits)
                except (InvalidDocument, UnreadableShadow) as error:
                    log.warning("the patch of a report of %r is not applied: %s", device_id, error)
                    status = ReportStatus.INVALID
                else:
                    current[device_id] = now
                    refused = (report.refused_version, report.refusal)
                    if report.refused_version is None and device_id in accepted:
                        refused = accepted[device_id][-2:]
                    accepted[device_id] = Accepted(document, stored[device_id], now.versions.reported, *refused)
        outcomes.append(ReportOutcome(report.report.device_id, status, *(now.versions if now else (None, None))))
    return outcomes, accepted


def _applied(
    report: CheckedReport, stored: Stored, tenant_id: str, device_id: str, limits: DocumentLimits
) -> tuple[str, Stored]:
    """The document that an accepted report leaves behind, and the device after it.

    Raises:
        InvalidDocument: If the document cannot be stored after the merge.
        UnreadableShadow: If what is stored is no document that could be patched.
    """
    document = report.document
    if document is None:
        before = decode_document(stored.reported or "", tenant_id, device_id)
        document = encode_document(twin.merge_patch(before, report.patch or {}), limits)
    reported_version = stored.versions.reported if report.acked_version is None else report.acked_version
    if report.if_converged and _converged(stored.desired or "", document, tenant_id, device_id):
        reported_version = stored.versions.desired
    versions = stored.versions._replace(reported=reported_version)
    return document, stored._replace(versions=versions, reported=document)


def _converged(desired: str, reported: str, tenant_id: str, device_id: str) -> bool:
    """`conditions.converged` in Python, of two sections as JSON texts."""
    try:
        wanted = decode_document(desired, tenant_id, device_id)
    except UnreadableShadow:
        return False
    return not twin.compute_nested_delta(wanted, decode_document(reported, tenant_id, device_id))
