"""One device's shadow, and what follows from it: delta, pending, drifted, sync status."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from iot_models import SyncStatus
from tests.reference.json_values import equal

STALE_AFTER: Final = timedelta(minutes=30)
_ABSENT: Final = object()


class Between:
    """A time known only to lie between two others: equal to each time from the first to the last."""

    def __init__(self, first: datetime, last: datetime) -> None:
        self.first, self.last = first, last

    def __eq__(self, other: object) -> bool:
        return isinstance(other, datetime) and self.first <= other <= self.last

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{self.first} to {self.last}"


def not_before(known: Between | datetime | None, at: Between) -> Between:
    """The time of a write: its own, and never before the one that is known, which counts as a minute ahead at most."""
    if known is None:
        return at
    first, last = (known.first, known.last) if isinstance(known, Between) else (known, known)
    minute = timedelta(minutes=1)
    return Between(max(min(first, at.first + minute), at.first), max(min(last, at.last + minute), at.last))


@dataclass(frozen=True)
class Device:
    """A row: the shadow, and what else the tests write to it."""

    desired: Any
    reported: Any
    desired_version: int = 0
    reported_version: int = 0
    shadow_updated_at: Between | datetime | None = None
    last_seen_at: Between | datetime | None = None
    status: str = "OFFLINE"
    refused: tuple[int, str] | None = None  # the version, and why

    @property
    def refusal(self) -> str | None:
        if self.refused is None or not self.is_pending:
            return None
        version, words = self.refused
        return words if version == self.desired_version else None

    @property
    def delta(self) -> dict[str, Any]:
        return delta(self.desired, self.reported)

    @property
    def is_pending(self) -> bool:
        return self.desired_version > self.reported_version

    @property
    def is_converged(self) -> bool:
        return nested_delta(self.desired, self.reported) == {}

    @property
    def is_drifted(self) -> bool:
        return self.desired_version == self.reported_version and not self.is_converged

    def sync_status(self, now: datetime) -> SyncStatus:
        seen = self.last_seen_at.last if isinstance(self.last_seen_at, Between) else self.last_seen_at
        return sync_status(self.desired_version, self.reported_version, seen, now=now, stale_after=STALE_AFTER)


def delta(desired: dict[str, Any], reported: dict[str, Any]) -> dict[str, Any]:
    """By keys of the top level, each with its whole desired value."""
    return {key: value for key, value in desired.items() if not equal(reported.get(key, _ABSENT), value)}


def nested_delta(desired: dict[str, Any], reported: dict[str, Any]) -> dict[str, Any]:
    """Inside objects only what differs; where both have an object and nothing differs, nothing."""
    missing = {}
    for key, wanted in desired.items():
        actual = reported.get(key, _ABSENT)
        if isinstance(wanted, dict) and isinstance(actual, dict):
            inner = nested_delta(wanted, actual)
            if inner:
                missing[key] = inner
        elif not equal(wanted, actual):
            missing[key] = wanted
    return missing


def comparison(desired: dict[str, Any], reported: dict[str, Any]) -> dict[str, Any]:
    """From reported to desired, by keys of the top level."""
    both = [key for key in desired if key in reported]
    changed = {key: [reported[key], desired[key]] for key in both if not equal(reported[key], desired[key])}
    return {
        "added": {key: value for key, value in desired.items() if key not in reported},
        "removed": {key: value for key, value in reported.items() if key not in desired},
        "changed": changed,
        "unchanged_count": len(both) - len(changed),
    }


def sync_status(
    desired_version: int,
    reported_version: int,
    last_seen: datetime | None,
    *,
    now: datetime,
    stale_after: timedelta = STALE_AFTER,
) -> SyncStatus:
    if last_seen is None or now - last_seen > stale_after:
        return SyncStatus.STALE
    return SyncStatus.SYNCED if desired_version == reported_version else SyncStatus.PENDING
