"""Who is there, and which errors an attempt has to meet or may meet."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.exc import IntegrityError, StatementError

from iot_models import (
    DeviceNotFound,
    InvalidDocument,
    InvalidVersion,
    IotModelsError,
    RequestReused,
    VersionConflict,
    VersionNotKept,
)
from tests.fuzz.corpus.documents import DEVICE_IDS, LOOK_ALIKES, TOO_LONG_FOR_AN_INDEX
from tests.fuzz.corpus.hostile_types import SabotageError
from tests.fuzz.judge.entry_points import ENTRY_POINTS, NEIGHBOUR, EntryPoint
from tests.reference.documents import LIMITS, ORM_DEPTH, storable, storable_text
from tests.reference.json_values import merge_patch
from tests.reference.versions import ERRORS, is_conflict, status_of_report

if TYPE_CHECKING:
    from tests.fuzz.judge.entry_points import Attempt

TENANTS: Final = list(LOOK_ALIKES.values())
TENANT: Final = TENANTS[0]
DEVICE: Final = "thermostat-1"
DESIRED_VERSION: Final = 7
REPORTED_VERSION: Final = 3
# A device of each tenant that was removed, and the request that wrote a version of each device that is there.
GONE: Final = "gone"
DONE: Final = "done"
DONE_VERSION: Final = 6
KNOWN_DEVICES: Final = [
    DEVICE,
    NEIGHBOUR,
    *(name for name in DEVICE_IDS.values() if storable_text(name) and len(name) < len(TOO_LONG_FOR_AN_INDEX)),
]

# Two tenants have all of them; the others enough to be mistaken for one another.
_FEW_DEVICES: Final = KNOWN_DEVICES[:5]


def sentinel(tenant_id: str, device_id: str) -> dict[str, Any]:
    """What a device holds that nobody wrote to, in each section: whose it is."""
    return {"of": [tenant_id, device_id], "fan": {"speed": 1, "auto": True}}


def reported_version_of(device_id: object) -> int:
    return DESIRED_VERSION if device_id == NEIGHBOUR else REPORTED_VERSION


def devices_of(tenant_id: str) -> list[str]:
    return KNOWN_DEVICES if tenant_id in TENANTS[:2] else _FEW_DEVICES


def held(section: str, tenant_id: str, device_id: str) -> dict[str, Any]:
    """What a section holds; the neighbour's device runs something else than it should."""
    drifted = section == "reported_state" and device_id == NEIGHBOUR
    return sentinel(tenant_id, device_id) | ({"fan": "drifted"} if drifted else {})


def kept(tenant_id: str, device_id: object) -> dict[int, dict[str, Any] | None]:
    """The desired documents of a device by version; None is its removal. The history lacks the one that it is at."""
    if not isinstance(device_id, str):
        return {}
    mine = sentinel(tenant_id, device_id)
    if device_id == GONE:
        return {8: mine, 9: None}
    if device_id not in devices_of(tenant_id):
        return {}
    earlier: dict[int, dict[str, Any] | None] = {version: mine | {"version": version} for version in (5, DONE_VERSION)}
    return earlier | {DESIRED_VERSION: held("desired_state", tenant_id, device_id)}


def repeats(point: EntryPoint, attempt: Attempt) -> bool:
    """Whether it is the request that is done. It restored that version, or one of which nobody knows any more."""
    version = point.version_of(attempt)
    if not _is_done(point, attempt) or point.version != "kept" or type(version) is not int:
        return False
    return version == DONE_VERSION or 0 <= version < min(kept(attempt.tenant_id, attempt.device_id))


def _is_done(point: EntryPoint, attempt: Attempt) -> bool:
    has_request = "request_id" in point.takes and type(attempt.request_id) is str and attempt.request_id == DONE
    return has_request and type(attempt.device_id) is str and attempt.device_id in devices_of(attempt.tenant_id)


@dataclass(frozen=True, slots=True)
class Expected:
    """The errors of which one has to come, and those that may come."""

    demanded: tuple[type[Exception], ...] = ()
    possible: tuple[type[Exception], ...] = ()

    def __add__(self, other: Expected) -> Expected:
        return Expected(self.demanded + other.demanded, self.possible + other.possible)


# RuntimeError: a dict that changes while it is looked at. StatementError: what JSON's encoder says inside of a flush.
_ANY: Final = Expected(possible=(IotModelsError, TypeError, ValueError, RuntimeError, StatementError, SabotageError))


def expected_of_device(point: EntryPoint, attempt: Attempt) -> Expected:
    device_id = attempt.device_id
    if point.kind == "tenant":
        return Expected()
    absent: tuple[type[Exception], ...]
    if point.kind == "after":
        if device_id is None:  # from the first one on
            return Expected()
        absent = () if not isinstance(device_id, str) or storable_text(device_id) else (ValueError,)
    elif point.call in {ENTRY_POINTS["register"].call, ENTRY_POINTS["register_many"].call}:
        absent = () if not isinstance(device_id, str) or _is_new_id(device_id) else (ValueError,)
    elif point.version in {"before", "kept"} and point.section is None:
        absent = () if _has_versions(point, attempt) else (DeviceNotFound,)
    else:
        absent = (
            ()
            if device_id in devices_of(attempt.tenant_id) or point.call is ENTRY_POINTS["get_many"].call
            else (DeviceNotFound,)
        )
    if not isinstance(device_id, str):
        return Expected((TypeError,))
    return Expected(absent) if type(device_id) is str else _ANY


def _has_versions(point: EntryPoint, attempt: Attempt) -> bool:
    """Whether there is a device to read the history of, or to find out that a page or a version of it is empty."""
    can_be_empty = point.version == "kept" or attempt.version is not None
    is_text = isinstance(attempt.device_id, str) and storable_text(attempt.device_id)
    return bool(kept(attempt.tenant_id, attempt.device_id)) or (can_be_empty and is_text)


def expected_of_document(point: EntryPoint, attempt: Attempt) -> Expected:
    if "document" not in point.takes:
        return Expected()
    if point.kind == "orm":
        if attempt.document is None:
            return Expected((IntegrityError,))  # NOT NULL
        verdict = storable(attempt.document, max_depth=ORM_DEPTH, max_bytes=float("inf"))
    elif point.merges:
        verdict = storable(attempt.document, max_bytes=float("inf"))
        if verdict and attempt.device_id in devices_of(attempt.tenant_id):
            verdict = storable(
                merge_patch(held(str(point.section), attempt.tenant_id, attempt.device_id), attempt.document)
            )
        elif verdict and not storable(attempt.document, max_bytes=2 * LIMITS.max_bytes):
            verdict = False  # before it is known that there is no such device
    else:
        verdict = storable(attempt.document)
    if verdict is None:
        return _ANY
    return Expected() if verdict else Expected((InvalidDocument,))


def expected_of_version(point: EntryPoint, attempt: Attempt) -> Expected:
    version = point.version_of(attempt)
    if "version" not in point.takes or version is None or repeats(point, attempt):
        return Expected()
    if point.version == "number":
        return _expected_of_number(version)
    if (invalid := _expected_of_invalid(version)) is not None:
        return invalid
    refused: type[Exception] | None = None
    reported = reported_version_of(attempt.device_id)
    if point.version == "expected":
        refused = VersionConflict if is_conflict(version, DESIRED_VERSION) else None
    elif point.version == "acked":
        refused = ERRORS.get(status_of_report(version, DESIRED_VERSION, reported))
    elif point.version == "refused":
        refused = ERRORS.get(status_of_report(None, DESIRED_VERSION, reported, version))
    elif point.version == "kept" and version not in kept(attempt.tenant_id, attempt.device_id):
        refused = VersionNotKept
    return Expected((refused,)) if refused else Expected()


def _expected_of_number(number: object) -> Expected:
    if isinstance(number, bool) or not isinstance(number, int):
        return Expected((TypeError,))
    if type(number) is not int:
        return _ANY
    return Expected() if 0 <= number < 2**63 else Expected((ValueError,))


def _expected_of_invalid(version: object) -> Expected | None:
    if isinstance(version, bool) or not isinstance(version, int):
        return Expected((InvalidVersion,))
    if type(version) is not int:
        return _ANY
    return None if 0 <= version < 2**63 else Expected((InvalidVersion,))


# In bytes. A new id may be blank, but not empty.
_LONGEST_NEW_ID: Final = 1_000


def _is_new_id(text: str) -> bool:
    return bool(text) and storable_text(text) and len(text.encode()) <= _LONGEST_NEW_ID


# How long each may be, in characters.
LONGEST: Final = {"actor": 255, "request_id": 255, "reason": 1_000, "refusal": 1_000}


def expected_of_words(point: EntryPoint, attempt: Attempt) -> Expected:
    found = Expected()
    for part in sorted(point.takes & {*LONGEST, "site_id"}):
        value = getattr(attempt, part)
        if value is None and part != "site_id":
            continue
        if not isinstance(value, str):
            found += Expected((TypeError,))
        elif type(value) is not str:
            found += _ANY
        elif part == "site_id":
            found += Expected(() if _is_new_id(value) else (ValueError,))
        elif not storable_text(value) or not value.strip() or len(value) > LONGEST[part]:
            found += Expected((ValueError,))
    if _is_done(point, attempt) and not repeats(point, attempt):
        found += Expected((RequestReused,))
    return found


def expected_of_refusal(point: EntryPoint, attempt: Attempt) -> Expected:
    """Of the version that a report refuses; a report refuses with words, and does not acknowledge what it refuses."""
    if "refused_version" not in point.takes:
        return Expected()
    refused, acked = attempt.refused_version, attempt.version
    if refused is None:
        return Expected() if attempt.refusal is None else Expected((ValueError,))
    found = Expected() if attempt.refusal is not None else Expected((TypeError,))
    if (invalid := _expected_of_invalid(refused)) is not None:
        return found + invalid
    if type(acked) is int and acked >= refused:
        found += Expected((ValueError,))
    status = status_of_report(None, DESIRED_VERSION, reported_version_of(attempt.device_id), refused)
    return found + (Expected((ERRORS[status],)) if status in ERRORS else Expected())


def expected_of_age(point: EntryPoint, attempt: Attempt) -> Expected:
    if "age" not in point.takes:
        return Expected()
    if not isinstance(attempt.age, timedelta):
        return Expected((TypeError,))
    return Expected((ValueError,)) if attempt.age < timedelta() else Expected()


def expected(point: EntryPoint, attempt: Attempt) -> Expected:
    return sum(
        (
            of_part(point, attempt)
            for of_part in (
                expected_of_device,
                expected_of_document,
                expected_of_version,
                expected_of_words,
                expected_of_refusal,
                expected_of_age,
            )
        ),
        Expected(),
    )
