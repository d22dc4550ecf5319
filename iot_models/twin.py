"""What a twin's documents become: deltas, comparisons, merge patches and the sync status.

Pure functions of their arguments: no database, no clock unless asked, and no argument is ever modified. No result
shares a dict or list with an argument, so that a caller may change what it was given.

Two values are equal here when PostgreSQL's ``jsonb`` says so, not when Python does; see `json_equal`. Documents are
what `json.loads` returns. Whether one may be stored is another module's question (`iot_models._core.documents`).

Documents nest no deeper than Python recurses, which is a few hundred levels: deeper ones, and one that contains itself,
raise `RecursionError`. ``json.loads`` gives up at such a depth too, and what may be stored ends long before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final, NamedTuple, TypeAlias

from iot_models._core.equality import ABSENT, SCALARS, json_equal, surely_equal

Document: TypeAlias = dict[str, Any]

# The seed's constant: a device that has not reported for longer than this is stale.
STALE_THRESHOLD_MINUTES: Final = 30


class SyncStatus(StrEnum):
    """How a device stands to what is wanted of it; the seed's three words.

    Example:
        >>> SyncStatus.PENDING == "pending"
        True
    """

    SYNCED = "synced"
    PENDING = "pending"
    STALE = "stale"


class Change(NamedTuple):
    """The two values of a key that both documents have and that differ."""

    old: Any
    new: Any


@dataclass(frozen=True, slots=True)
class Comparison:
    """The way from the reported document to the desired one, key by key of the top level.

    Attributes:
        added: Keys that only desired has, with their values.
        removed: Keys that only reported has, with their values.
        changed: Keys of both whose values differ: ``old`` is the reported value, ``new`` the desired one.
        unchanged_count: How many keys of both have equal values.
    """

    added: Document
    removed: Document
    changed: dict[str, Change]
    unchanged_count: int


def compute_delta(desired: Mapping[str, object], reported: Mapping[str, object]) -> Document:
    """Return the top-level keys of desired that reported lacks or holds with another value.

    Each comes with its whole desired value. Keys that only reported has are not in the delta. This is the seed's rule
    with one repair: a key that desired holds as ``None`` and reported lacks is in the delta.

    Args:
        desired: What the device should be.
        reported: What the device last confirmed.

    Raises:
        TypeError: An argument is no JSON object.

    Example:
        >>> compute_delta({"color": "RED", "state": "STOP"}, {"color": "GREEN", "engine": "ON"})
        {'color': 'RED', 'state': 'STOP'}
    """
    _require_object("desired", desired)
    _require_object("reported", reported)
    if desired == reported and surely_equal(desired, reported):  # most of a fleet is in sync
        return {}
    delta: Document = {}
    alike: list[str] = []  # keys whose containers Python calls equal, who takes true for 1
    for key, wanted in desired.items():
        actual = reported.get(key, ABSENT)
        if wanted is actual:
            continue
        kind = type(wanted)
        if kind is type(actual) and kind in SCALARS:
            if wanted != actual:
                delta[key] = wanted
        elif wanted == actual:
            alike.append(key)
        elif not json_equal(wanted, actual):
            delta[key] = _copy(wanted)
    if alike and not surely_equal([desired[key] for key in alike], [reported[key] for key in alike]):
        apart = {key for key in alike if not json_equal(desired[key], reported[key])}
        if apart:  # in the order of desired
            delta = {key: _copy(wanted) for key, wanted in desired.items() if key in apart or key in delta}
    return delta


def compute_nested_delta(desired: Mapping[str, object], reported: Mapping[str, object]) -> Document:
    """Return what of desired the device still lacks, down to the leaves, with the path to each.

    This is the delta that AWS IoT sends to devices. Inside objects only what differs is kept, and an object that
    reported satisfies leaves nothing behind. Where reported lacks a key, or has something else than an object there,
    the whole desired value is in the delta. Arrays are compared and returned whole.

    Args:
        desired: What the device should be.
        reported: What the device last confirmed.

    Raises:
        TypeError: An argument is no JSON object.

    Example:
        >>> compute_nested_delta({"color": {"r": 255, "g": 255}}, {"color": {"r": 255, "g": 0}})
        {'color': {'g': 255}}
    """
    _require_object("desired", desired)
    _require_object("reported", reported)
    return _nested_delta(desired, reported)


def compare(desired: Mapping[str, object], reported: Mapping[str, object]) -> Comparison:
    """Return what going from reported to desired adds, removes and changes, over top-level keys.

    The keys of `compute_delta` are those of ``added`` and ``changed`` together.

    Args:
        desired: What the device should be.
        reported: What the device last confirmed.

    Raises:
        TypeError: An argument is no JSON object.

    Example:
        >>> compare({"color": "red", "fan": 2}, {"color": "green", "fan": 2.0}).changed
        {'color': Change(old='green', new='red')}
    """
    delta = compute_delta(desired, reported)
    return Comparison(
        added={key: wanted for key, wanted in delta.items() if key not in reported},
        removed={key: _copy(actual) for key, actual in reported.items() if key not in desired},
        changed={key: Change(_copy(reported[key]), wanted) for key, wanted in delta.items() if key in reported},
        unchanged_count=len(desired) - len(delta),
    )


def merge_patch(document: Mapping[str, object], patch: Mapping[str, object]) -> Document:
    """Return the document with an RFC 7396 merge patch applied.

    ``None`` in the patch removes the key, an object is merged into what is there, and anything else, an
    array too, replaces it whole. A ``None`` that the document already holds stays.

    Args:
        document: What to start from.
        patch: What to change.

    Raises:
        TypeError: An argument is no JSON object. RFC 7396 also defines patches that are none; they would make the
            document something that a twin's document never is.

    Example:
        >>> merge_patch({"color": "red", "fan": {"speed": 2, "mode": "eco"}}, {"color": None, "fan": {"speed": 3}})
        {'fan': {'speed': 3, 'mode': 'eco'}}
    """
    _require_object("document", document)
    _require_object("patch", patch)
    return _merge(document, patch)


def sync_status(
    desired_version: int,
    reported_version: int,
    last_seen: datetime | None,
    *,
    now: datetime | None = None,
    stale_after: timedelta = timedelta(minutes=STALE_THRESHOLD_MINUTES),
) -> SyncStatus:
    """Return whether a device is in sync, still has to apply something, or has not been heard of; the seed's rule.

    Args:
        desired_version: The version of the last desired write.
        reported_version: The desired version that the device last acknowledged.
        last_seen: When the device was last heard of; ``None`` is never, which is stale.
        now: The time to judge by; ``None`` is the present.
        stale_after: A device unheard of for longer is stale, whatever the versions say. Exactly as long is not.

    Raises:
        ValueError: ``last_seen`` or ``now`` has no time zone.

    Example:
        >>> noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
        >>> sync_status(8, 7, noon, now=noon + timedelta(minutes=5))
        <SyncStatus.PENDING: 'pending'>
    """
    now = datetime.now(UTC) if now is None else now
    _require_aware("now", now)
    if last_seen is None:
        return SyncStatus.STALE
    _require_aware("last_seen", last_seen)
    # Python subtracts two times of one zone by the clock on the wall, an hour off across a change to summer time;
    # one of them in UTC makes it the time that really passed.
    if now.astimezone(UTC) - last_seen > stale_after:
        return SyncStatus.STALE
    return SyncStatus.SYNCED if desired_version == reported_version else SyncStatus.PENDING


def _nested_delta(desired: Mapping[str, object], reported: Mapping[str, object]) -> Document:
    if desired == reported and surely_equal(desired, reported):
        return {}
    delta: Document = {}
    for key, wanted in desired.items():
        actual = reported.get(key, ABSENT)
        kind = type(wanted)
        if kind is type(actual) and kind in SCALARS:
            if wanted != actual:
                delta[key] = wanted
        elif isinstance(wanted, dict) and isinstance(actual, dict):
            if inner := _nested_delta(wanted, actual):
                delta[key] = inner
        elif not json_equal(wanted, actual):
            delta[key] = _copy(wanted)
    return delta


def _merge(target: Mapping[str, object], patch: Mapping[str, object]) -> Document:
    # What the patch names is replaced below, so only the rest needs a copy; starting from all keys keeps their order.
    merged: Document = {key: value if key in patch else _copy(value) for key, value in target.items()}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            inner = merged.get(key)
            merged[key] = _merge(inner if isinstance(inner, dict) else {}, value)
        else:
            merged[key] = _copy(value)
    return merged


def _copy(value: object) -> Any:
    """Return a value that shares no container with the one given; `copy.deepcopy` takes several times as long."""
    if type(value) in SCALARS:
        return value
    # Scalars are asked here and not by another call: they are most of what there is.
    if isinstance(value, dict):
        return {key: item if type(item) in SCALARS else _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [item if type(item) in SCALARS else _copy(item) for item in value]
    return value


def _require_object(name: str, value: object) -> None:
    # A plain dict needs no answer from the abstract class, which takes as long as comparing three keys.
    if type(value) is not dict and not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a JSON object (a dict), got {type(value).__name__}")


def _require_aware(name: str, value: datetime) -> None:
    if value.utcoffset() is None:
        raise ValueError(f"{name} must be timezone-aware, as datetime.now(timezone.utc) is; got the naive {value!r}")
