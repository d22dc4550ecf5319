"""Makes the calls that an operation stands for, and sets down what came back: one `Told` for each entry."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

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

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.orm import Session

_STATUSES: Final = {
    ReportStatus.ACCEPTED: WRITTEN,
    ReportStatus.LATE: "LateReport",
    ReportStatus.UNKNOWN_DEVICE: "DeviceNotFound",
    ReportStatus.UNKNOWN_VERSION: "UnknownVersion",
    ReportStatus.INVALID: "InvalidDocument",
}


def call(session: Session, operation: Operation) -> tuple[Answer, ...]:
    """Do it and say what the contract answered, refusals included; what the contract does not know is raised."""
    service = ShadowService(session, operation.tenant)
    try:
        return _CALLS.get(operation.kind, _one)(session, service, operation)
    except BatchRejected as rejected:
        return tuple(
            _refused(rejected.errors[entry.device]) if entry.device in rejected.errors else Answer(REJECTED)
            for entry in operation.entries
        )
    except IotModelsError as refused:
        return (_refused(refused),) * len(operation.entries)


def _one(_: Session, service: ShadowService, operation: Operation) -> tuple[Answer, ...]:
    ((device, document, guard),) = operation.entries
    name = "expected_version" if operation.section == "desired" else "acked_version"
    return (_answer(WRITTEN, getattr(service, operation.kind)(device, document, **{name: guard}), operation),)


def _get(_: Session, service: ShadowService, operation: Operation) -> tuple[Answer, ...]:
    return (_answer(READ, service.get(operation.entries[0].device), operation),)


def _replace_many(_: Session, service: ShadowService, operation: Operation) -> tuple[Answer, ...]:
    documents = {entry.device: entry.document for entry in operation.entries}
    expected = {entry.device: entry.guard for entry in operation.entries if entry.guard is not None}
    shadows = service.replace_desired_many(documents, expected_versions=expected)
    return tuple(_answer(WRITTEN, shadows[device], operation) for device in documents)


def _patch_many(_: Session, service: ShadowService, operation: Operation) -> tuple[Answer, ...]:
    devices = [entry.device for entry in operation.entries]
    shadows = service.patch_desired_many(devices, operation.entries[0].document)
    return tuple(_answer(WRITTEN, shadows[device], operation) for device in devices)


def _report_many(_: Session, service: ShadowService, operation: Operation) -> tuple[Answer, ...]:
    reports = [Report(device, document, acked) for device, document, acked in operation.entries]
    return tuple(
        Answer(_STATUSES[outcome.status], outcome.desired_version, outcome.reported_version)
        for outcome in service.replace_reported_many(reports)
    )


def _by_orm(session: Session, _: ShadowService, operation: Operation) -> tuple[Answer, ...]:
    ((name, document, _guard),) = operation.entries
    device = session.get(DeviceState, (operation.tenant, name))
    if device is None:
        raise DeviceNotFound(operation.tenant, name)
    if operation.kind == "orm_replace":
        device.desired_state = document
    elif operation.kind == "orm_change":
        _change(device.desired_state, document)
    else:
        device.last_heartbeat_at = device.last_seen_at = datetime.now(UTC)
    session.flush()
    # Not reported_version: an object shows what was loaded, and only a write of desired_state asks for more.
    return (Answer(WRITTEN, device.desired_version, None, dict(device.desired_state)),)


_CALLS: Final = {
    "get": _get,
    "replace_desired_many": _replace_many,
    "patch_desired_many": _patch_many,
    "replace_reported_many": _report_many,
    "orm_replace": _by_orm,
    "orm_change": _by_orm,
    "heartbeat": _by_orm,
}


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
