"""`Shadow`: one device's shadow as a value, with what is computed from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from iot_models import twin
from iot_models.errors import listed

if TYPE_CHECKING:
    from collections.abc import Collection

# The default: how long a device may be silent before it is stale.
STALE_AFTER: Final = timedelta(minutes=twin.STALE_THRESHOLD_MINUTES)


@dataclass(frozen=True, slots=True)
class Shadow:
    """One device's shadow as it was in the database when it was read. It does not follow later changes.

    Attributes:
        tenant_id: The tenant that the device belongs to.
        device_id: The device's id, unique within the tenant.
        desired: What the device should be. A copy: changing it changes nothing else.
        reported: What the device last confirmed. A copy, too.
        desired_version: Rises by one with every write of desired, also with one that changes nothing.
        reported_version: The `desired_version` that the device last acknowledged.
        shadow_updated_at: When desired was last written; None if never.
        last_seen_at: When the device was last heard from; None if never.
        refusal: Why the device will not apply the newest version, in its own words; None if it has not refused it.
        refused_at: When it refused that; None if it has not.
        stale_after: How long the device may be silent before `sync_status` is `stale`. Equality ignores it.

    Example:
        >>> shadow = ShadowService(session, "acme").get("thermostat-1")
        >>> shadow.is_pending, shadow.delta
        (True, {'target_c': 21.5})
    """

    tenant_id: str
    device_id: str
    desired: dict[str, Any]
    reported: dict[str, Any]
    desired_version: int
    reported_version: int
    shadow_updated_at: datetime | None
    last_seen_at: datetime | None
    refusal: str | None = field(default=None, kw_only=True)
    refused_at: datetime | None = field(default=None, kw_only=True)
    stale_after: timedelta = field(default=STALE_AFTER, repr=False, compare=False, kw_only=True)

    def __hash__(self) -> int:
        """Equal shadows have equal hashes. The documents take no part: they are dicts."""
        return hash((self.tenant_id, self.device_id, self.desired_version, self.reported_version))

    @property
    def delta(self) -> dict[str, Any]:
        """The top-level keys of desired that reported lacks or has with another value; see `twin.compute_delta`."""
        return twin.compute_delta(self.desired, self.reported)

    @property
    def nested_delta(self) -> dict[str, Any]:
        """The values inside desired that reported lacks or has otherwise, by AWS IoT's rule.

        See `twin.compute_nested_delta`.
        """
        return twin.compute_nested_delta(self.desired, self.reported)

    @property
    def is_pending(self) -> bool:
        """Whether the device has not acknowledged the newest desired version yet."""
        return self.desired_version > self.reported_version

    @property
    def is_refused(self) -> bool:
        """Whether the device says that it will not apply the newest version. It is pending then, too."""
        return self.refusal is not None

    @property
    def is_converged(self) -> bool:
        """Whether reported has all that desired asks, at any depth: `nested_delta` is empty.

        What it has besides, and the versions, do not matter.
        """
        return not self.nested_delta

    @property
    def is_drifted(self) -> bool:
        """Whether the device acknowledged the newest desired version, but is not converged."""
        return self.desired_version == self.reported_version and not self.is_converged

    @property
    def etag(self) -> str:
        """`desired_version` as a strong HTTP entity tag, with its quotes: for `ETag` and `If-Match`."""
        return f'"{self.desired_version}"'

    def sync_status(self, now: datetime | None = None) -> twin.SyncStatus:
        """Return whether the device is synced, pending or stale; see `twin.sync_status`.

        Args:
            now: The time to compare `last_seen_at` with; None is the present.

        Raises:
            ValueError: If `now` has no time zone.
        """
        return twin.sync_status(
            self.desired_version, self.reported_version, self.last_seen_at, now=now, stale_after=self.stale_after
        )

    def explain(self, now: datetime | None = None) -> str:
        """Return one sentence that says whether the device is in sync, and if not, why.

        Args:
            now: The time to compare `last_seen_at` with; None is the present.

        Raises:
            ValueError: If `now` has no time zone.

        Example:
            >>> shadow.explain()
            "t-1 has drifted: version 1 is acknowledged, but 'mode' differs, last seen at 2026-11-01 12:00:00 UTC."
        """
        status = self.sync_status(now)
        if self.last_seen_at is None:
            seen = "it was never seen"
        else:
            word = "silent since" if status is twin.SyncStatus.STALE else "last seen at"
            seen = f"{word} {self.last_seen_at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
        if self.refusal is not None:
            at = f"the device is at {self.reported_version}"
            why = f"version {self.desired_version} is refused ({self.refusal!r}, {at})"
        elif self.is_pending:
            why = f"version {self.desired_version} is not acknowledged (the device is at {self.reported_version})"
        elif self.desired_version < self.reported_version:
            why = (
                f"the device acknowledged version {self.reported_version}, "
                f"which is ahead of the desired version {self.desired_version}"
            )
        else:
            why = f"version {self.desired_version} is acknowledged"
        # "is stale" is more important than "has drifted". "is synced" is not: it would hide the drift.
        keys = self.nested_delta.keys()
        drifted = self.desired_version == self.reported_version and keys
        stands = "has drifted" if drifted and status is twin.SyncStatus.SYNCED else f"is {status}"
        # A line of a log stays one line, whatever the device is called.
        return f"{repr(self.device_id)[1:-1]} {stands}: {why}{self._difference(keys)}, {seen}."

    def to_dict(self) -> dict[str, Any]:
        """Return the shadow as a dict for an HTTP API, ready for `json.dumps`. Times are ISO 8601 in UTC."""
        return {
            "device_id": self.device_id,
            "desired": self.desired,
            "reported": self.reported,
            "delta": self.delta,
            "is_converged": self.is_converged,
            "desired_version": self.desired_version,
            "reported_version": self.reported_version,
            "sync_status": self.sync_status().value,
            "refusal": self.refusal,
            "shadow_updated_at": iso(self.shadow_updated_at) if self.shadow_updated_at else None,
        }

    def _difference(self, keys: Collection[str]) -> str:
        if not keys:
            return " and nothing differs"
        link = "and" if self.is_pending else "but"
        return f", {link} {listed(keys)} differ{'s' if len(keys) == 1 else ''}"


def iso(moment: datetime) -> str:
    """The time as ISO 8601 in UTC."""
    return moment.astimezone(UTC).isoformat()
