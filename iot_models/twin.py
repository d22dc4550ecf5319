"""Pure functions on the documents of a twin: deltas, comparisons, merge patches, and the sync status.

They use no database, and no clock except where `now` is left out. They never change an argument. No result shares a
dict or list with an argument, so the caller may change a result.

Two values are equal when PostgreSQL's `jsonb` says so, which is not always what Python says: `true` is not `1`. See
`iot_models._core.equality.json_equal`. Documents are what `json.loads` returns: inside them, objects are dicts and
arrays are lists. Whether a document can be stored is checked elsewhere (`iot_models._core.documents`).

A document that is nested deeper than Python's recursion limit allows (a few hundred levels), or that contains itself,
raises `RecursionError`. `json.loads` does the same at such a depth. A document that can be stored is less deep.
"""

from __future__ import annotations

import marshal
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from iot_models._core.equality import ABSENT, SCALARS, json_equal, surely_equal
from iot_models._core.json_pointer import pointer

if TYPE_CHECKING:
    from iot_models._core.json_pointer import Place

Document: TypeAlias = dict[str, Any]

# A device that was not heard from for longer than this is stale, unless the caller names another time.
STALE_THRESHOLD_MINUTES: Final = 30


class SyncStatus(StrEnum):
    """Whether a device acknowledged the newest desired version and was heard from lately; see `sync_status`.

    Attributes:
        SYNCED: It acknowledged the newest desired version.
        PENDING: It has not acknowledged the newest desired version.
        STALE: It was not heard from for too long, whatever the versions are.

    Example:
        >>> SyncStatus.PENDING == "pending"
        True
    """

    SYNCED = "synced"
    PENDING = "pending"
    STALE = "stale"


class Change(NamedTuple):
    """The two different values of a key that both documents have.

    Attributes:
        old: The reported value.
        new: The desired value.
    """

    old: Any
    new: Any


@dataclass(frozen=True, slots=True)
class Comparison:
    """The difference between a reported and a desired document, by top-level keys.

    Attributes:
        added: Keys that only desired has, with their values.
        removed: Keys that only reported has, with their values.
        changed: Keys that both have with different values.
        unchanged_count: How many keys both have with equal values.
    """

    added: Document
    removed: Document
    changed: dict[str, Change]
    unchanged_count: int

    def to_dict(self) -> Document:
        """Return the comparison as a dict for `json.dumps`; a change is `{"old": ..., "new": ...}`."""
        return {
            "added": self.added,
            "removed": self.removed,
            "changed": {key: change._asdict() for key, change in self.changed.items()},
            "unchanged_count": self.unchanged_count,
        }


def compute_delta(desired: Mapping[str, object], reported: Mapping[str, object]) -> Document:
    """Return the top-level keys of desired that reported lacks or has with another value.

    Each key comes with its whole desired value. Keys that only reported has are not in the delta. `None` is a value:
    a key that is `None` in desired and absent in reported is in the delta.

    Args:
        desired: What the device should be.
        reported: What the device last confirmed.

    Raises:
        TypeError: If an argument is not a mapping.

    Example:
        >>> compute_delta({"color": "RED", "state": "STOP"}, {"color": "GREEN", "engine": "ON"})
        {'color': 'RED', 'state': 'STOP'}
    """
    _require_object("desired", desired)
    _require_object("reported", reported)
    if desired == reported and surely_equal(desired, reported):  # true of most devices of a fleet
        return {}
    delta: Document = {}
    alike: list[str] = []  # keys whose values are equal for Python, for which true is 1: they are compared again
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
    if alike:
        pairs = [desired[key] for key in alike], [reported[key] for key in alike]
        if not surely_equal(*pairs) and not json_equal(*pairs):
            apart = {key for key in alike if not json_equal(desired[key], reported[key])}
            # Build it again, so that the keys keep the order of desired.
            delta = {key: _copy(wanted) for key, wanted in desired.items() if key in apart or key in delta}
    return delta


def compute_nested_delta(desired: Mapping[str, object], reported: Mapping[str, object]) -> Document:
    """Return the values of desired that reported lacks or has otherwise, with the path to each.

    This is the delta that AWS IoT sends to devices. Of an object that both documents have, only the differing members
    are in the delta; if none differs, the object is not in it. Where reported lacks a key, or has something other than
    an object there, the whole desired value is in the delta. Arrays are compared and returned whole.

    Args:
        desired: What the device should be.
        reported: What the device last confirmed.

    Raises:
        TypeError: If an argument is not a mapping.

    Example:
        >>> compute_nested_delta({"color": {"r": 255, "g": 255}}, {"color": {"r": 255, "g": 0}})
        {'color': {'g': 255}}
    """
    _require_object("desired", desired)
    _require_object("reported", reported)
    return _nested_delta(desired, reported)


def compare(desired: Mapping[str, object], reported: Mapping[str, object]) -> Comparison:
    """Return the top-level keys that are added, removed and changed on the way from reported to desired.

    The keys of `added` and `changed` together are the keys of `compute_delta`.

    Args:
        desired: What the device should be.
        reported: What the device last confirmed.

    Raises:
        TypeError: If an argument is not a mapping.

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

    `None` in the patch removes the key. An object in the patch is merged into the object that is there. Any other
    value, also an array, replaces the whole value that is there. A `None` that the document already has stays.

    Args:
        document: The document before.
        patch: What to change in it.

    Raises:
        TypeError: If an argument is not a mapping. RFC 7396 also defines patches that are not objects; their result is
            not an object, and a twin's document always is.

    Example:
        >>> merge_patch({"color": "red", "fan": {"speed": 2, "mode": "eco"}}, {"color": None, "fan": {"speed": 3}})
        {'fan': {'speed': 3, 'mode': 'eco'}}
    """
    _require_object("document", document)
    _require_object("patch", patch)
    return _merge(document, patch)


def create_merge_patch(old: Mapping[str, object], new: Mapping[str, object]) -> Document:
    """Return the RFC 7396 merge patch that makes `new` of `old`: `merge_patch(old, patch)` is equal to `new`.

    Nothing is in it that does not differ: of an object that both documents have, only the differing members. The patch
    of equal documents is `{}`. By it a device can report its difference, and a map below the top level can be replaced.

    Args:
        old: The document before.
        new: The document that it shall become.

    Raises:
        TypeError: If an argument is not a mapping.
        ValueError: If there is no such patch, with a JSON Pointer to the place in `new`: where an object has a `None`
            that `old` does not have there, because in a merge patch `None` removes the key; and where a number is NaN
            or infinite, which JSON does not have.

    Example:
        >>> create_merge_patch({"color": "red", "fan": {"speed": 2, "on": True}}, {"fan": {"speed": 3, "on": True}})
        {'color': None, 'fan': {'speed': 3}}
    """
    _require_object("old", old)
    _require_object("new", new)
    return _patch(old, new, ())


def sync_status(
    desired_version: int,
    reported_version: int,
    last_seen: datetime | None,
    *,
    now: datetime | None = None,
    stale_after: timedelta = timedelta(minutes=STALE_THRESHOLD_MINUTES),
) -> SyncStatus:
    """Return whether a device is synced, pending or stale.

    It is stale if it was not heard from for longer than `stale_after`, whatever the versions are. Otherwise it is
    synced if the two versions are equal, and pending if not.

    Args:
        desired_version: The version of the last desired write.
        reported_version: The desired version that the device last acknowledged.
        last_seen: When the device was last heard from; None is never, which is stale.
        now: The time to compare `last_seen` with; None is the present.
        stale_after: The longest silence that is not stale.

    Raises:
        ValueError: If `last_seen` or `now` has no time zone.

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
    # Python subtracts two times of the same zone as local times: an hour is wrong where summer time begins or ends in
    # between. With one of the two in UTC, the difference is the time that really passed.
    if now.astimezone(UTC) - last_seen > stale_after:
        return SyncStatus.STALE
    return SyncStatus.SYNCED if desired_version == reported_version else SyncStatus.PENDING


def _nested_delta(desired: Mapping[str, object], reported: Mapping[str, object], *, at_once: bool = True) -> Document:
    """The nested delta. `at_once`: first compare the whole in C, which is not done again at each level inside."""
    if at_once and desired == reported:
        if surely_equal(desired, reported):
            return {}
        at_once = False
    delta: Document = {}
    for key, wanted in desired.items():
        actual = reported.get(key, ABSENT)
        kind = type(wanted)
        if kind is type(actual) and kind in SCALARS:
            if wanted != actual:
                delta[key] = wanted
        elif isinstance(wanted, dict) and isinstance(actual, dict):
            if inner := _nested_delta(wanted, actual, at_once=at_once):
                delta[key] = inner
        elif not json_equal(wanted, actual):
            delta[key] = _copy(wanted)
    return delta


def _merge(target: Mapping[str, object], patch: Mapping[str, object]) -> Document:
    # Only keys that the patch does not name need a copy: the others are replaced below. They are included here all the
    # same, so that all keys keep their order.
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


def _patch(old: Mapping[str, object], new: Mapping[str, object], place: Place) -> Document:
    patch: Document = {key: None for key in old if key not in new}
    for key, value in new.items():
        before = old.get(key, ABSENT)
        if isinstance(value, dict) and isinstance(before, dict):
            if inner := _patch(before, value, (place, key)):
                patch[key] = inner
        elif not json_equal(value, before):
            patch[key] = _set_by_patch(value, (place, key))
    return patch


def _set_by_patch(value: Any, place: Place, *, in_array: bool = False) -> Any:
    """Return a copy of a value that replaces another one, or raise the `ValueError` where no patch can set it."""
    if isinstance(value, dict):
        return {key: _set_by_patch(item, (place, key), in_array=in_array) for key, item in value.items()}
    if isinstance(value, list):  # a patch sets it as it is, with each null in it
        return [_set_by_patch(item, (place, index), in_array=True) for index, item in enumerate(value)]
    if value is None and not in_array:
        raise ValueError(
            f"no merge patch sets {pointer(place)} to null: in a patch, null removes the key. Replace the document"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{pointer(place)} is {value}, which is no JSON number: use null, or omit it")
    return value


def _copy(value: Any) -> Any:
    """Return a copy that shares no dict or list with the value. `copy.deepcopy` takes several times as long."""
    if type(value) in SCALARS:
        return value
    try:
        # In C: fast also where a value is nothing but small containers. Format 2 writes twice what is there twice.
        return marshal.loads(marshal.dumps(value, 2))  # noqa: S302 - what was just written
    except ValueError:  # it has a type of somebody's own, or too many levels
        pass
    if isinstance(value, dict):
        return {key: item if type(item) in SCALARS else _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [item if type(item) in SCALARS else _copy(item) for item in value]
    return value


def _require_object(name: str, value: object) -> None:
    # The test for a plain dict saves isinstance() with an abstract class, which takes as long as comparing three keys.
    if type(value) is not dict and not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a JSON object (a dict), got {type(value).__name__}")


def _require_aware(name: str, value: datetime) -> None:
    if value.utcoffset() is None:
        raise ValueError(f"{name} must be timezone-aware, as datetime.now(timezone.utc) is; got the naive {value!r}")
