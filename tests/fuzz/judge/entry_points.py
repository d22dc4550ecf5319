"""Every public way in for a document, a device id or a version, each as a function of one attempt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from sqlalchemy import select

from iot_models import DeviceState, Report, ReportOutcome, Shadow, ShadowService

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from sqlalchemy.orm import Session

    Answer: TypeAlias = list[Shadow | ReportOutcome]

NEIGHBOUR: Final = "neighbour"
HARMLESS: Final[dict[str, Any]] = {"harmless": True}


@dataclass(frozen=True, slots=True)
class Attempt:
    """What is sent through a door; what a caller leaves out is harmless."""

    tenant_id: str
    device_id: Any
    document: Any = field(default_factory=lambda: dict(HARMLESS))
    version: Any = None


@dataclass(frozen=True, slots=True)
class Door:
    """One way in.

    Attributes:
        call: Makes the attempt and returns all that it was answered.
        section: The column that it writes; None for a door that reads.
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


_VERSIONED = frozenset({"document", "version"})
DOORS: Final = {
    "get": Door(_get, None, takes=frozenset()),
    "get_many": Door(_get_many, None, "all", takes=frozenset()),
    "pending": Door(_pending, None, "after", takes=frozenset()),
    "drifted": Door(_drifted, None, "after", takes=frozenset()),
    "replace_desired": Door(_replace_desired, "desired_state", takes=_VERSIONED),
    "patch_desired": Door(_patch_desired, "desired_state", merges=True, takes=_VERSIONED),
    "replace_reported": Door(_replace_reported, "reported_state", takes=_VERSIONED),
    "patch_reported": Door(_patch_reported, "reported_state", merges=True, takes=_VERSIONED),
    "replace_desired_many": Door(_replace_desired_many, "desired_state", "all", takes=_VERSIONED),
    "patch_desired_many": Door(_patch_desired_many, "desired_state", "all", merges=True),
    "replace_reported_many": Door(_replace_reported_many, "reported_state", "each", takes=_VERSIONED),
    "DeviceState.desired_state =": Door(_assign("desired_state"), "desired_state", "orm"),
    "DeviceState.reported_state =": Door(_assign("reported_state"), "reported_state", "orm"),
    "DeviceState.state =": Door(_assign("state"), "state", "orm"),
    "DeviceState.desired_state.update": Door(_change_inside, "desired_state", "orm"),
}
