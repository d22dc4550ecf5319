"""Who is there, and which errors an attempt has to meet or may meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.exc import IntegrityError, StatementError

from iot_models import (
    DeviceNotFound,
    InvalidDocument,
    InvalidVersion,
    IotModelsError,
    VersionConflict,
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
    if point.kind == "after":
        if device_id is None:  # from the first one on
            return Expected()
        absent: tuple[type[Exception], ...] = (
            () if not isinstance(device_id, str) or storable_text(device_id) else (ValueError,)
        )
    else:
        absent = (
            ()
            if device_id in devices_of(attempt.tenant_id) or point.call is ENTRY_POINTS["get_many"].call
            else (DeviceNotFound,)
        )
    if not isinstance(device_id, str):
        return Expected((TypeError,))
    return Expected(absent) if type(device_id) is str else _ANY


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
    version = attempt.version
    if "version" not in point.takes or version is None:
        return Expected()
    if isinstance(version, bool) or not isinstance(version, int):
        return Expected((InvalidVersion,))
    if type(version) is not int:
        return _ANY
    refused: type[Exception] | None = None
    if not 0 <= version < 2**63:
        refused = InvalidVersion
    elif point.section == "desired_state":
        refused = VersionConflict if is_conflict(version, DESIRED_VERSION) else None
    else:
        refused = ERRORS.get(status_of_report(version, DESIRED_VERSION, reported_version_of(attempt.device_id)))
    return Expected((refused,)) if refused else Expected()


def expected(point: EntryPoint, attempt: Attempt) -> Expected:
    return (
        expected_of_device(point, attempt) + expected_of_document(point, attempt) + expected_of_version(point, attempt)
    )
