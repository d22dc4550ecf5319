"""Documents in Python, without a database: deltas and merge patches, compared with plain loops and with packages."""

from __future__ import annotations

import copy
import json
from functools import partial
from typing import TYPE_CHECKING, Any

import json_merge_patch  # type: ignore[import-untyped]
import jsonpatch
from deepdiff import DeepDiff
from rounds import Figure, Progress, interleaved, timed

from iot_models import twin

if TYPE_CHECKING:
    from collections.abc import Callable

    Document = dict[str, Any]
    Works = dict[str, dict[str, Callable[[], Any]]]

SECTION = "documents"
SECONDS = 0.02  # per turn
EVERY = 20  # one key in 20 differs: 5 %


def measure(rounds: int, progress: Progress) -> list[Figure]:
    """Measure deltas and merges of small, ordinary and large documents: equal ones, and with 5 % of keys different."""
    figures: list[Figure] = []
    for size, desired in (("small", _small()), ("ordinary", _ordinary()), ("large", large())):
        for state, reported in (("in sync", desired), ("5 % differ", _differing(desired))):
            works = _works(desired, reported)
            _check(works, desired, reported)
            setting = f"{size}, {state}"
            for work, contenders in works.items():
                turns = {name: timed(once, SECONDS) for name, once in contenders.items()}
                for name, measured in interleaved(turns, rounds, progress, f"{work}, {setting}").items():
                    figures.append(Figure(SECTION, work, name, setting, "s", measured))
    return figures


def _small() -> Document:
    """Return ten keys without nested objects."""
    return {
        "mode": "heat", "target_c": 21.5, "fan_speed": 2, "fan_on": True, "firmware": "2.8.0", "interval_s": 60,
        "locked": False, "brightness": 7, "night_from": "22:00", "schedule": [6, 9, 17, 22],
    }  # fmt: skip


def _ordinary() -> Document:
    """Return fifty settings: ten at the top level, and ten groups of four."""
    zones = {
        f"zone_{n}": {"target_c": 18.5 + n / 2, "mode": "heat", "on": n % 3 > 0, "schedule": [6, 9, 17, 20 + n % 4]}
        for n in range(10)
    }
    return _small() | zones


def large() -> Document:
    """Return the configuration of a device with many channels, nearly as large as a document may be (32 KiB)."""
    channels = {
        f"channel_{n:02}": {
            "interval_s": 30 + n,
            "enabled": n % 7 > 0,
            "topic": f"plant/hall-{n % 4}/line-{n % 9}/channel-{n:02}/telemetry",
            "unit": ("celsius", "bar", "percent", "rpm")[n % 4],
            "limits": {"low": -40 + n, "high": 85.5 + n, "hysteresis": 0.5, "alarm": {"on": True, "delay_s": 10 + n}},
            "calibration": {"offset": n / 16, "gain": 1 + n / 128, "points": [[0, 4.0], [50, 12.0], [100, 20.0]]},
            "filter": {"kind": "median", "window": 5 + n % 8},
            "labels": ["production", f"hall-{n % 4}", f"line-{n % 9}"],
        }
        for n in range(88)
    }
    return _small() | channels


def _differing(document: Document) -> Document:
    """Return the document with a different value at each twentieth top-level key; in a group, at its first setting."""
    changed: Document = copy.deepcopy(document)
    for key in list(changed)[EVERY // 4 :: EVERY]:
        inside, name = (changed[key], next(iter(changed[key]))) if isinstance(changed[key], dict) else (changed, key)
        inside[name] += 1
    return changed


def _works(desired: Document, reported: Document) -> Works:
    """Return what each contender does. The patch has what differs; if nothing does, it is the whole document."""
    patch = twin.compute_nested_delta(desired, reported) or desired
    steps = jsonpatch.make_patch(reported, desired).patch

    def on(left: Any, right: Any, contenders: dict[str, Callable[[Any, Any], Any]]) -> dict[str, Callable[[], Any]]:
        # Each contender has its own copies, as documents that come from the database are. This matters: DeepDiff keeps
        # references to keys, and the bytes of marshal, by which we compare, depend on references to a value.
        return {
            name: partial(once, json.loads(json.dumps(left)), json.loads(json.dumps(right)))
            for name, once in contenders.items()
        }

    packages = {
        "deepdiff": lambda desired, reported: DeepDiff(reported, desired),
        "jsonpatch": lambda desired, reported: jsonpatch.make_patch(reported, desired),
    }
    return {
        "compute_delta": on(
            desired, reported, {"ours": twin.compute_delta, "plain loop with ==": _plain_delta} | packages
        ),
        "compute_nested_delta": on(
            desired,
            reported,
            {
                "ours": twin.compute_nested_delta,
                "recursion by hand": _nested_by_hand,
                "json-merge-patch": lambda desired, reported: json_merge_patch.create_patch(reported, desired),
            }
            | packages,
        ),
        "merge_patch": on(
            reported,
            patch,
            {
                "ours": twin.merge_patch,
                # These two change their argument, so a caller has to copy it first.
                "RFC 7396's loop on a deepcopy": lambda target, patch: _merge_in_place(copy.deepcopy(target), patch),
                "json-merge-patch on a deepcopy": lambda target, patch: json_merge_patch.merge(
                    copy.deepcopy(target), patch
                ),
            },
        )
        | on(reported, steps, {"jsonpatch": jsonpatch.apply_patch}),
    }


def _plain_delta(desired: Document, reported: Document) -> Document:
    delta = {}
    for key, desired_val in desired.items():
        if reported.get(key) != desired_val:
            delta[key] = desired_val  # noqa: PERF403 - the loop as it is usually written
    return delta


def _nested_by_hand(desired: Document, reported: Document) -> Document:
    delta: Document = {}
    for key, wanted in desired.items():
        actual = reported.get(key)
        if isinstance(wanted, dict) and isinstance(actual, dict):
            if inner := _nested_by_hand(wanted, actual):
                delta[key] = inner
        elif key not in reported or wanted != actual:
            delta[key] = wanted
    return delta


def _merge_in_place(target: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    if not isinstance(target, dict):
        target = {}
    for name, value in patch.items():
        if value is None:
            target.pop(name, None)
        else:
            target[name] = _merge_in_place(target.get(name), value)
    return target


def _check(works: Works, desired: Document, reported: Document) -> None:
    """Check that all contenders have the same result; for deltas of packages, that they have the same keys."""
    expected: dict[str, Any] = {
        "compute_delta": _plain_delta(desired, reported),
        "compute_nested_delta": _nested_by_hand(desired, reported),
        "merge_patch": desired,
    }
    for work, contenders in works.items():
        for name, once in contenders.items():
            found, wanted = once(), expected[work]
            if isinstance(found, DeepDiff):
                found, wanted = set(found.affected_root_keys), set(wanted)
            elif isinstance(found, jsonpatch.JsonPatch):
                found, wanted = {step["path"].split("/")[1] for step in found}, set(wanted)
            if found != wanted:
                raise AssertionError(f"{work}: {name} computed {found!r}, expected {wanted!r}")
