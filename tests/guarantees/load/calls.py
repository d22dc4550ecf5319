"""Makes the calls that an operation stands for, and sets down what came back: one `Told` for each entry."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.orm import defer, load_only

from iot_models import (
    BatchRejected,
    DeviceNotFound,
    DeviceState,
    IotModelsError,
    LateReport,
    Report,
    ReportStatus,
    Shadow,
    ShadowService,
)
from tests.guarantees.load.reads_and_refusals import REJECTED
from tests.guarantees.load.record import NOTHING_OLD, READ, STANDS, WRITTEN, Answer, Operation
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
        if operation.kind == "remove":
            session.flush()  # what an operation before left to COMMIT is a write of its own; a removal drops it
        return _CALLS.get(operation.kind, _report)(service, operation)
    except BatchRejected as rejected:
        return tuple(
            _refused(rejected.errors[entry.device], operation) if entry.device in rejected.errors else Answer(REJECTED)
            for entry in operation.entries
        )
    except IotModelsError as refused:
        return (_refused(refused, operation),) * len(operation.entries)


def _desire(service: ShadowService, operation: Operation) -> tuple[Answer, ...]:
    (entry,) = operation.entries
    what = entry.document if entry.version is None else entry.version
    shadow = getattr(service, operation.kind)(
        entry.device, what, expected_version=entry.guard, reason=entry.token, request_id=entry.request
    )
    return (_answer(WRITTEN, shadow, operation),)


def _report(service: ShadowService, operation: Operation) -> tuple[Answer, ...]:
    (entry,) = operation.entries
    shadow = getattr(service, operation.kind)(entry.device, entry.document, **_acknowledging(entry.guard))
    return (_answer(WRITTEN, shadow, operation),)


def _acknowledging(guard: Acknowledges) -> Any:
    return {"ack_if_converged": True} if guard == IF_CONVERGED else {"acked_version": guard}


def _refuse(service: ShadowService, operation: Operation) -> tuple[Answer, ...]:
    (entry,) = operation.entries
    shadow = service.refuse_desired(entry.device, entry.version or 0, entry.token)
    return (Answer(WRITTEN, shadow.desired_version, shadow.reported_version),)


def _register(service: ShadowService, operation: Operation) -> tuple[Answer, ...]:
    (entry,) = operation.entries
    return (_answer(STANDS, service.register(entry.device, entry.token), operation),)


def _register_many(service: ShadowService, operation: Operation) -> tuple[Answer, ...]:
    shadows = service.register_many({entry.device: entry.token for entry in operation.entries})
    return tuple(_answer(STANDS, shadows[entry.device], operation) for entry in operation.entries)


def _remove(service: ShadowService, operation: Operation) -> tuple[Answer, ...]:
    (entry,) = operation.entries
    expected = entry.guard if isinstance(entry.guard, int) else None
    service.remove(entry.device, expected_version=expected, reason=entry.token)
    return (Answer(WRITTEN),)


def _prune(service: ShadowService, _operation: Operation) -> tuple[Answer, ...]:
    """Of an age that no version of a load has: so the history can be compared with every change."""
    deleted = service.prune_history(older_than=timedelta(days=1))
    return (Answer(NOTHING_OLD if deleted == 0 else f"deleted {deleted}"),)


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
    reports = [
        Report(
            entry.device,
            entry.document,
            **_acknowledging(entry.guard),
            refused_version=entry.version,
            refusal=None if entry.version is None else entry.token,
        )
        for entry in operation.entries
    ]
    return tuple(
        Answer(_STATUSES[outcome.status], outcome.desired_version, outcome.reported_version)
        for outcome in getattr(service, operation.kind)(reports)
    )


def _by_orm(session: Session, operation: Operation, random: Random) -> tuple[Answer, ...]:
    (entry,) = operation.entries
    document = entry.document
    device = _loaded(session, (operation.tenant, entry.device), random)
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
    "replace_desired": _desire,
    "patch_desired": _desire,
    "restore_desired": _desire,
    "refuse_desired": _refuse,
    "register": _register,
    "register_many": _register_many,
    "remove": _remove,
    "prune_history": _prune,
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


def _refused(error: IotModelsError, operation: Operation) -> Answer:
    name = "InvalidDocument" if isinstance(error, ValueError) and hasattr(error, "path") else type(error).__name__
    desired_version = getattr(error, "actual", None) or getattr(error, "desired", None) or 0
    if isinstance(error, LateReport) and operation.kind == "refuse_desired":
        return Answer(name, error.current)  # of a refusal that is the newest version, of a report the acknowledged one
    return Answer(name, desired_version, getattr(error, "current", None))
