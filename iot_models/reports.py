"""What devices report in a batch, and what becomes of each report."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


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
        device_id: The device that reports.
        reported: The whole reported document; for `patch_reported_many`, a merge patch for it.
        acked_version: The `desired_version` that the device applied; None where it says nothing about that.
        ack_if_converged: For a device that sends no version: whether to acknowledge the newest one if the device is
            converged after this report. Not together with `acked_version`.
        refused_version: The newest `desired_version`, if the device says that it will not apply it. Together with an
            `acked_version` only if that is an older one; not together with `ack_if_converged`.
        refusal: Why: text that is not empty, of 1,000 characters at most. With `refused_version`, and only with it.
    """

    device_id: str
    reported: Mapping[str, Any]
    acked_version: int | None = None
    ack_if_converged: bool = False
    refused_version: int | None = None
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class ReportOutcome:
    """What became of one report.

    Attributes:
        device_id: As the report gave it.
        status: `accepted`: written. `late`: a newer version was acknowledged already, or the version that is refused
            is not the newest one or is acknowledged; drop the message.
            `unknown_version`: acknowledges what was never asked, let the device fetch its shadow again.
            `unknown_device`: the tenant has no such device. `invalid`: the document cannot be stored, or the report
            acknowledges in both ways, or `acked_version` is no version, or `device_id` no text; says so whether there
            is such a device or not. Also if a patch does not fit the document that is stored.
        desired_version: As it is after this report; None if the tenant has no such device.
        reported_version: The same.
    """

    device_id: str
    status: ReportStatus
    desired_version: int | None
    reported_version: int | None
