"""`DesiredVersion`, one desired version of one device, as the history has it; `ChangePage`, a page of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from iot_models.shadow import iso

if TYPE_CHECKING:
    from datetime import datetime


@dataclass(frozen=True, slots=True)
class DesiredVersion:
    """What a device was to be at one version, and who wrote it, when and why.

    Attributes:
        tenant_id: The tenant that the device belongs or belonged to.
        device_id: The device's id, unique within the tenant.
        version: The `desired_version`.
        desired: The document. A copy: changing it changes nothing else. None: this version removed the device.
        written_at: When it was written; None where nobody knows, before the first recorded write.
        actor: Who wrote it; None where the writer did not say, or knew no history.
        reason: Why, in the words of the writer; None where it gave none.
        request_id: The request that it answered; None where it answered none.

    Example:
        >>> for version in ShadowService(session, "acme").history("thermostat-1"):
        ...     print(version.version, version.actor, version.reason, version.desired)
        2 anna None {'target_c': 21.5}
        1 nightly eco mode {'target_c': 17}
    """

    tenant_id: str
    device_id: str
    version: int
    desired: dict[str, Any] | None
    written_at: datetime | None
    actor: str | None
    reason: str | None
    request_id: str | None

    def __hash__(self) -> int:
        """Equal versions have equal hashes. The document takes no part: it is a dict."""
        return hash((self.tenant_id, self.device_id, self.version))

    def to_dict(self) -> dict[str, Any]:
        """Return the version as a dict for an HTTP API, ready for `json.dumps`. The time is ISO 8601 in UTC."""
        return {
            "device_id": self.device_id,
            "version": self.version,
            "desired": self.desired,
            "written_at": iso(self.written_at) if self.written_at else None,
            "actor": self.actor,
            "reason": self.reason,
            "request_id": self.request_id,
        }


@dataclass(frozen=True, slots=True)
class ChangePage:
    """A page of the desired versions of a tenant, and where the next one begins: see `ShadowService.changes`.

    Attributes:
        changes: The versions. Empty: there are no more now.
        cursor: Where the next page begins. Keep it with what you made of the page, in the same transaction.
        held_back_since: When the oldest version was written that is committed and yet not to be read, because an older
            transaction is open, of any database of the server. None: nothing is held back.
    """

    changes: list[DesiredVersion]
    cursor: str
    held_back_since: datetime | None

    def to_dict(self) -> dict[str, Any]:
        """Return the page as a dict for an HTTP API, ready for `json.dumps`. The times are ISO 8601 in UTC."""
        return {
            "changes": [change.to_dict() for change in self.changes],
            "cursor": self.cursor,
            "held_back_since": iso(self.held_back_since) if self.held_back_since else None,
        }
