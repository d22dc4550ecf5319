"""One device's shadow as a value: what it holds, and what follows from that."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from iot_models import twin

# The seed's threshold, where nothing else is said.
STALE_AFTER: Final = timedelta(minutes=twin.STALE_THRESHOLD_MINUTES)

_KEYS_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Shadow:
    """One device's shadow as the database had it when it was read: a value, no live object.

    Attributes:
        desired: What the operator wants. A copy: changing it changes nothing else.
        reported: What the device last confirmed. A copy too.
        desired_version: Raised by one by every write of desired.
        reported_version: The `desired_version` that the device last acknowledged.
        shadow_updated_at: When desired was last written; None if never.
        last_seen_at: When the device last reported or was otherwise heard of; None if never.
        stale_after: The silence after which `sync_status` says `stale`; no part of equality.
    """

    tenant_id: str
    device_id: str
    desired: dict[str, Any]
    reported: dict[str, Any]
    desired_version: int
    reported_version: int
    shadow_updated_at: datetime | None
    last_seen_at: datetime | None
    stale_after: timedelta = field(default=STALE_AFTER, repr=False, compare=False, kw_only=True)

    @property
    def delta(self) -> dict[str, Any]:
        """What desired asks and reported lacks, by top-level keys; see `twin.compute_delta`."""
        return twin.compute_delta(self.desired, self.reported)

    @property
    def nested_delta(self) -> dict[str, Any]:
        """The same down to the differing leaves, as AWS computes it; see `twin.compute_nested_delta`."""
        return twin.compute_nested_delta(self.desired, self.reported)

    @property
    def is_pending(self) -> bool:
        """Whether the device has yet to acknowledge the newest desired version."""
        return self.desired_version > self.reported_version

    @property
    def is_drifted(self) -> bool:
        """Whether the device acknowledged the newest version and yet runs something else."""
        return self.desired_version == self.reported_version and not self.is_converged

    @property
    def is_converged(self) -> bool:
        """Whether the delta is empty, whatever the versions say."""
        return not self.delta

    @property
    def etag(self) -> str:
        """`desired_version` as a strong HTTP entity tag, quotes included: for `ETag` and `If-Match`."""
        return f'"{self.desired_version}"'

    def sync_status(self, now: datetime | None = None) -> twin.SyncStatus:
        """Synced, pending or stale; see `twin.sync_status`.

        Raises:
            ValueError: If `now` has no time zone.
        """
        return twin.sync_status(
            self.desired_version, self.reported_version, self.last_seen_at, now=now, stale_after=self.stale_after
        )

    def explain(self, now: datetime | None = None) -> str:
        """Say in one sentence how the device stands, and if it is out of sync, why.

        Raises:
            ValueError: If `now` has no time zone.
        """
        status = self.sync_status(now)
        if self.last_seen_at is None:
            seen = "it was never seen"
        else:
            word = "silent since" if status is twin.SyncStatus.STALE else "last seen at"
            seen = f"{word} {self.last_seen_at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
        if self.is_pending:
            why = f"version {self.desired_version} is not acknowledged (the device is at {self.reported_version})"
        elif self.desired_version < self.reported_version:
            why = (
                f"the device acknowledged version {self.reported_version}, "
                f"which is ahead of the desired version {self.desired_version}"
            )
        else:
            why = f"version {self.desired_version} is acknowledged"
        # A stale device is first of all silent; "synced" alone would hide that it runs something else.
        stands = "has drifted" if self.is_drifted and status is twin.SyncStatus.SYNCED else f"is {status}"
        return f"{self.device_id} {stands}: {why}{self._difference()}, {seen}."

    def to_dict(self) -> dict[str, Any]:
        """The shape that an HTTP API returns, ready for `json.dumps`; times are ISO 8601 in UTC."""
        return {
            "device_id": self.device_id,
            "desired": self.desired,
            "reported": self.reported,
            "delta": self.delta,
            "desired_version": self.desired_version,
            "reported_version": self.reported_version,
            "sync_status": self.sync_status().value,
            "shadow_updated_at": _iso(self.shadow_updated_at) if self.shadow_updated_at else None,
        }

    def _difference(self) -> str:
        keys = list(self.delta)
        if not keys:
            return " and nothing differs"
        rest = f" and {len(keys) - _KEYS_SHOWN} more" if len(keys) > _KEYS_SHOWN else ""
        link = "and" if self.is_pending else "but"
        return f", {link} {', '.join(map(repr, keys[:_KEYS_SHOWN]))}{rest} differ{'s' if len(keys) == 1 else ''}"


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat()
