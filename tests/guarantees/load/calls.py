"""Makes the calls that an operation stands for, and sets down what came back: one `Told` for each entry."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.orm import defer, load_only

from iot_models import (
    BatchRejected,
    DeviceNotFound,
    DeviceState,
    IotModelsError,
    Report,
    ReportStatus,
    Shadow,
    ShadowService,
)
from tests.guarantees.load.reads_and_refusals import REJECTED
from tests.guarantees.load.record import READ, WRITTEN, Answer, Operation
from tests.reference.versions import IF_CONVERGED, Acknowledges

if TYPE_CHECKING:
    from collections.abc import Mapping
    from random import Random

    from sqlalchemy.orm import Session
    from sqlalchemy.orm.interfaces import ORMOption

    from tests.guarantees.load.history import Key

_STATUSES: Final = {
    ReportStatus.ACCEPTED: WRITTEN,
    ReportStatus.LATE: "LateReport",
    ReportStatus.UNKNOWN_DEVICE: "DeviceNotFound",
    ReportStatus.UNKNOWN_VERSION: "UnknownVersion",
    ReportStatus.INVALID: "InvalidDocument",
}


def call(session: Session, operation: Operation, random: Random) -> tuple[Answer, ...]:
    """Do it and say what the contract answered, refusals included; what the contract does not know is raised.

    An object is loaded in one of several ways, and without autoflush its change may wait for a later flush: `random`
    chooses.
    """
    service = ShadowService(session, operation.tenant)
    try:
        if operation.kind in _BY_ORM:
            return _by_orm(session, operation, random)
        return _CALLS.get(operation.kind, _one)(service, operation)
    except BatchRejected as rejected:
        return tuple(
            _refused(rejected.errors[entry.device]) if entry.device in rejected.errors else Answer(REJECTED)
            for entry in operation.entries
        )
    except IotModelsError as refused:
        return (_refused(refused),) * len(operation.entries)


def _one(service: ShadowService, operation: Operation) -> tuple[Answer, ...]:
    ((device, document, guard),) = operation.entries
    how = {"expected_version": guard} if operation.section == "desired" else _acknowledging(guard)
    return (_answer(WRITTEN, getattr(service, operation.kind)(device, document, **how), operation),)


def _acknowledging(guard: Acknowledges) -> Any:
    return {"ack_if_converged": True} if guard == IF_CONVERGED else {"acked_version": guard}


def _get(service: ShadowService, operation: Operation) -> tuple[Answer, ...]:
    return (_answer(READ, service.get(operation.entries[0].device), operation),)


def _replace_many(service: ShadowService, operation: Operation) -> tuple[Answer, ...]:
    documents = {entry.device: entry.document for entry in operation.entries}
    expected = {entry.device: entry.guard for entry in operation.entries if isinstance(entry.guard, int)}
    shadows = service.replace_desired_many(documents, expected_versions=expected)
    return tuple(_answer(WRITTEN, shadows[device], operation) for device in documents)


def _patch_many(service: ShadowService, operation: Operation) -> tuple[Answer, ...]:
    devices = [entry.device for entry in operation.entries]
    shadows = service.patch_desired_many(devices, operation.entries[0].document)
    return tuple(_answer(WRITTEN, shadows[device], operation) for device in devices)


def _report_many(service: ShadowService, operation: Operation) -> tuple[Answer, ...]:
    reports = [Report(device, document, **_acknowledging(guard)) for device, document, guard in operation.entries]
    return tuple(
        Answer(_STATUSES[outcome.status], outcome.desired_version, outcome.reported_version)
        for outcome in getattr(service, operation.kind)(reports)
    )


def _by_orm(session: Session, operation: Operation, random: Random) -> tuple[Answer, ...]:
    ((name, document, _guard),) = operation.entries
    device = _loaded(session, (operation.tenant, name), random)
    if operation.kind == "orm_replace":
        device.desired_state = document
    elif operation.kind == "orm_change":
        _change(device.desired_state, document)
    else:
        device.last_heartbeat_at = device.last_seen_at = datetime.now(UTC)
    if not session.autoflush and random.random() < _LEFT_TO_COMMIT:
        return (Answer(WRITTEN),)
    session.flush()
    # Not reported_version: an object shows what was loaded, and only a write of desired_state asks for more.
    return (Answer(WRITTEN, device.desired_version, None, dict(device.desired_state)),)


def _loaded(session: Session, key: Key, random: Random) -> DeviceState:
    """The object of this row, loaded whole or in part, and some of it read anew."""
    known = session.identity_map.get(session.identity_key(DeviceState, key))
    if known is not None and known in session.dirty:
        session.flush()  # an unwritten change of an operation before: it is a write of its own
    device = session.get(DeviceState, key, options=random.choice(_LOADS))
    if device is None:
        raise DeviceNotFound(*key)
    match random.choice(["", "", "", "expire", "refresh"]):
        case "expire":
            session.expire(device, random.choice(_COLUMNS))
        case "refresh":
            session.refresh(device, random.choice(_COLUMNS))
    return device


_CALLS: Final = {
    "get": _get,
    "replace_desired_many": _replace_many,
    "patch_desired_many": _patch_many,
    "replace_reported_many": _report_many,
    "patch_reported_many": _report_many,
}
_BY_ORM: Final = {"orm_replace", "orm_change", "heartbeat"}
_LEFT_TO_COMMIT: Final = 0.5
# What is loaded at once of an object that is new to the session; the rest comes when it is read.
_LOADS: Final[list[list[ORMOption]]] = [
    [],
    [],
    [load_only(DeviceState.desired_version)],
    [load_only(DeviceState.desired_state)],
    [load_only(DeviceState.desired_version, DeviceState.desired_state)],
    [defer(DeviceState.desired_state)],
]
_COLUMNS: Final = [["desired_state"], ["desired_version"], ["desired_version", "desired_state"], ["status"]]


def _change(target: dict[str, Any], patch: Mapping[str, Any]) -> None:
    """In place, key by key: what a patch says, as a program would write it."""
    for key, value in patch.items():
        if value is None:
            target.pop(key, None)
        elif isinstance(value, dict):
            if not isinstance(target.get(key), dict):
                target[key] = {}
            _change(target[key], value)
        else:
            target[key] = value


def _answer(status: str, shadow: Shadow, operation: Operation) -> Answer:
    document = shadow.reported if operation.section == "reported" else shadow.desired
    return Answer(status, shadow.desired_version, shadow.reported_version, dict(document))


def _refused(error: IotModelsError) -> Answer:
    name = "InvalidDocument" if isinstance(error, ValueError) and hasattr(error, "path") else type(error).__name__
    desired_version = getattr(error, "actual", None) or getattr(error, "desired", None) or 0
    return Answer(name, desired_version, getattr(error, "current", None))
