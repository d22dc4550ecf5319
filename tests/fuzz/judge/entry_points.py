"""The entry points: every public way in for a document, a device id or a version, each as a function of one attempt.

Those of `ShadowService` have the names of its methods; how a method writes is what the reference model says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from sqlalchemy import select

from iot_models import DeviceState, Report, ReportOutcome, Shadow, ShadowService
from tests.reference.methods import WRITES

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from sqlalchemy.orm import Session

    Answer: TypeAlias = list[Shadow | ReportOutcome]

NEIGHBOUR: Final = "neighbour"
HARMLESS: Final[dict[str, Any]] = {"harmless": True}


@dataclass(frozen=True, slots=True)
class Attempt:
    """What is passed to an entry point; what a caller leaves out is harmless."""

    tenant_id: str
    device_id: Any
    document: Any = field(default_factory=lambda: dict(HARMLESS))
    version: Any = None


@dataclass(frozen=True, slots=True)
class EntryPoint:
    """One way in.

    Attributes:
        call: Makes the attempt and returns all that it was answered.
        section: The column that it writes; None where it reads.
        kind: How it takes devices: `one`; `all` or none of a batch, the neighbour too; `each` report of a batch, the
            neighbour's too; those `after` an id; `orm`, by an attribute of the mapped object.
        merges: Whether the document is a merge patch.
        takes: Which of an attempt's parts count besides the device.
    """

    call: Callable[[Session, Attempt], Answer]
    section: Literal["desired_state", "reported_state", "state"] | None
    kind: Literal["one", "all", "each", "after", "orm"] = "one"
    merges: bool = False
    takes: frozenset[str] = frozenset({"document"})


def _service(session: Session, attempt: Attempt) -> ShadowService:
    return ShadowService(session, attempt.tenant_id)


def _get(session: Session, attempt: Attempt) -> Answer:
    return [_service(session, attempt).get(attempt.device_id)]


def _get_many(session: Session, attempt: Attempt) -> Answer:
    return [*_service(session, attempt).get_many([NEIGHBOUR, attempt.device_id]).values()]


def _pending(session: Session, attempt: Attempt) -> Answer:
    return [*_service(session, attempt).pending(after=attempt.device_id)]


def _drifted(session: Session, attempt: Attempt) -> Answer:
    return [*_service(session, attempt).drifted(after=attempt.device_id)]


def _replace_desired(session: Session, attempt: Attempt) -> Answer:
    write = _service(session, attempt).replace_desired
    return [write(attempt.device_id, attempt.document, expected_version=attempt.version)]


def _patch_desired(session: Session, attempt: Attempt) -> Answer:
    write = _service(session, attempt).patch_desired
    return [write(attempt.device_id, attempt.document, expected_version=attempt.version)]


def _replace_reported(session: Session, attempt: Attempt) -> Answer:
    write = _service(session, attempt).replace_reported
    return [write(attempt.device_id, attempt.document, acked_version=attempt.version)]


def _patch_reported(session: Session, attempt: Attempt) -> Answer:
    write = _service(session, attempt).patch_reported
    return [write(attempt.device_id, attempt.document, acked_version=attempt.version)]


def _replace_desired_many(session: Session, attempt: Attempt) -> Answer:
    documents = {NEIGHBOUR: HARMLESS, attempt.device_id: attempt.document}
    versions = None if attempt.version is None else {attempt.device_id: attempt.version, NEIGHBOUR: 7}
    return [*_service(session, attempt).replace_desired_many(documents, expected_versions=versions).values()]


def _patch_desired_many(session: Session, attempt: Attempt) -> Answer:
    return [*_service(session, attempt).patch_desired_many([NEIGHBOUR, attempt.device_id], attempt.document).values()]


def _replace_reported_many(session: Session, attempt: Attempt) -> Answer:
    reports = [Report(NEIGHBOUR, HARMLESS, 7), Report(attempt.device_id, attempt.document, attempt.version)]
    return [*_service(session, attempt).replace_reported_many(reports)]


def _patch_reported_many(session: Session, attempt: Attempt) -> Answer:
    reports = [Report(NEIGHBOUR, HARMLESS, 7), Report(attempt.device_id, attempt.document, attempt.version)]
    return [*_service(session, attempt).patch_reported_many(reports)]


def _loaded(session: Session, attempt: Attempt) -> DeviceState:
    return session.scalars(
        select(DeviceState).filter_by(tenant_id=attempt.tenant_id, device_id=attempt.device_id)
    ).one()


def _assign(name: str) -> Callable[[Session, Attempt], Answer]:
    def assign(session: Session, attempt: Attempt) -> Answer:
        setattr(_loaded(session, attempt), name, attempt.document)
        session.flush()
        return [_service(session, attempt).get(attempt.device_id)]

    return assign


def _change_inside(session: Session, attempt: Attempt) -> Answer:
    device = _loaded(session, attempt)
    device.desired_state.clear()
    device.desired_state.update(attempt.document)
    session.flush()
    return [_service(session, attempt).get(attempt.device_id)]


_DOCUMENT: Final = frozenset({"document"})
_DOCUMENT_AND_VERSION: Final = frozenset({"document", "version"})


def _method(
    name: str, call: Callable[[Session, Attempt], Answer], takes: frozenset[str] = _DOCUMENT_AND_VERSION
) -> EntryPoint:
    write = WRITES[name]
    section: Literal["desired_state", "reported_state"] = (
        "desired_state" if write.section == "desired" else "reported_state"
    )
    return EntryPoint(call, section, write.devices, write.merges, takes)


ENTRY_POINTS: Final = {
    "get": EntryPoint(_get, None, takes=frozenset()),
    "get_many": EntryPoint(_get_many, None, "all", takes=frozenset()),
    "pending": EntryPoint(_pending, None, "after", takes=frozenset()),
    "drifted": EntryPoint(_drifted, None, "after", takes=frozenset()),
    "replace_desired": _method("replace_desired", _replace_desired),
    "patch_desired": _method("patch_desired", _patch_desired),
    "replace_reported": _method("replace_reported", _replace_reported),
    "patch_reported": _method("patch_reported", _patch_reported),
    "replace_desired_many": _method("replace_desired_many", _replace_desired_many),
    "patch_desired_many": _method("patch_desired_many", _patch_desired_many, takes=_DOCUMENT),
    "replace_reported_many": _method("replace_reported_many", _replace_reported_many),
    "patch_reported_many": _method("patch_reported_many", _patch_reported_many),
    "DeviceState.desired_state =": EntryPoint(_assign("desired_state"), "desired_state", "orm"),
    "DeviceState.reported_state =": EntryPoint(_assign("reported_state"), "reported_state", "orm"),
    "DeviceState.state =": EntryPoint(_assign("state"), "state", "orm"),
    "DeviceState.desired_state.update": EntryPoint(_change_inside, "desired_state", "orm"),
}
