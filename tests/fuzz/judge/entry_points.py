"""The entry points: every public way in for a document, an id, a version or words, each as a function of one attempt.

Those of `ShadowService` have the names of its methods; how a method writes is what the reference model says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Literal

from sqlalchemy import select

from iot_models import DesiredVersion, DeviceState, Report, ReportOutcome, Shadow, ShadowService
from tests.reference.methods import WRITES

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from sqlalchemy.orm import Session

    Answer: TypeAlias = list[Shadow | ReportOutcome | DesiredVersion | int]
    Section: TypeAlias = Literal["desired_state", "reported_state", "state", "life", "history"]

NEIGHBOUR: Final = "neighbour"
HARMLESS: Final[dict[str, Any]] = {"harmless": True}


@dataclass(frozen=True, slots=True)
class Attempt:
    """What is passed to an entry point; what a caller leaves out is harmless."""

    tenant_id: str
    device_id: Any
    document: Any = field(default_factory=lambda: dict(HARMLESS))
    version: Any = None
    actor: Any = None
    reason: Any = None
    request_id: Any = None
    refused_version: Any = None
    refusal: Any = None
    site_id: Any = "berlin"
    age: Any = field(default_factory=timedelta)


@dataclass(frozen=True, slots=True)
class EntryPoint:
    """One way in.

    Attributes:
        call: Makes the attempt and returns all that it was answered.
        section: The column that it writes; `life` or `history`, where it makes, removes or forgets; None where it reads.
        kind: How it takes devices: `one`; `all` or none of a batch, the neighbour too; `each` report of a batch, the
            neighbour's too; those `after` an id; `orm`, by an attribute of the mapped object; `tenant`, none.
        merges: Whether the document is a merge patch.
        takes: Which of an attempt's parts count besides the device.
        version: What the version is: the one `expected`, `acked` or `refused`; one that the history has `kept`; the one
            `before` which a page begins; or a `number` of another kind.
        usual: The version, where the attempt has none.
    """

    call: Callable[[Session, Attempt], Answer]
    section: Section | None
    kind: Literal["one", "all", "each", "after", "orm", "tenant"] = "one"
    merges: bool = False
    takes: frozenset[str] = frozenset({"document"})
    version: Literal["expected", "acked", "refused", "kept", "before", "number"] = "expected"
    usual: int | None = None

    def version_of(self, attempt: Attempt) -> Any:
        return self.usual if attempt.version is None else attempt.version


def _service(session: Session, attempt: Attempt) -> ShadowService:
    return ShadowService(session, attempt.tenant_id, actor=attempt.actor)


def _get(session: Session, attempt: Attempt) -> Answer:
    return [_service(session, attempt).get(attempt.device_id)]


def _get_many(session: Session, attempt: Attempt) -> Answer:
    return [*_service(session, attempt).get_many([NEIGHBOUR, attempt.device_id]).values()]


def _pending(session: Session, attempt: Attempt) -> Answer:
    return [*_service(session, attempt).pending(after=attempt.device_id)]


def _drifted(session: Session, attempt: Attempt) -> Answer:
    return [*_service(session, attempt).drifted(after=attempt.device_id)]


def _refused(session: Session, attempt: Attempt) -> Answer:
    return [*_service(session, attempt).refused(after=attempt.device_id)]


def _history(session: Session, attempt: Attempt) -> Answer:
    return [*_service(session, attempt).history(attempt.device_id, before=attempt.version)]


def _desired_at(session: Session, attempt: Attempt) -> Answer:
    version = ENTRY_POINTS["desired_at"].version_of(attempt)
    return [_service(session, attempt).desired_at(attempt.device_id, version)]


def _replace_desired(session: Session, attempt: Attempt) -> Answer:
    write = _service(session, attempt).replace_desired
    return [write(attempt.device_id, attempt.document, expected_version=attempt.version, **_why(attempt))]


def _patch_desired(session: Session, attempt: Attempt) -> Answer:
    write = _service(session, attempt).patch_desired
    return [write(attempt.device_id, attempt.document, expected_version=attempt.version, **_why(attempt))]


def _restore_desired(session: Session, attempt: Attempt) -> Answer:
    version = ENTRY_POINTS["restore_desired"].version_of(attempt)
    return [_service(session, attempt).restore_desired(attempt.device_id, version, **_why(attempt))]


def _why(attempt: Attempt) -> dict[str, Any]:
    return {"reason": attempt.reason, "request_id": attempt.request_id}


def _refuse_desired(session: Session, attempt: Attempt) -> Answer:
    version = ENTRY_POINTS["refuse_desired"].version_of(attempt)
    refusal = "no" if attempt.refusal is None else attempt.refusal
    return [_service(session, attempt).refuse_desired(attempt.device_id, version, refusal)]


def _register(session: Session, attempt: Attempt) -> Answer:
    return [_service(session, attempt).register(attempt.device_id, attempt.site_id)]


def _register_many(session: Session, attempt: Attempt) -> Answer:
    sites = {NEIGHBOUR: "berlin", attempt.device_id: attempt.site_id}
    return [*_service(session, attempt).register_many(sites).values()]


def _remove(session: Session, attempt: Attempt) -> Answer:
    _service(session, attempt).remove(attempt.device_id, expected_version=attempt.version, reason=attempt.reason)
    return []


def _prune_history(session: Session, attempt: Attempt) -> Answer:
    prune = _service(session, attempt).prune_history
    limit = 10_000 if attempt.version is None else attempt.version
    return [prune(older_than=attempt.age, keep=ENTRY_POINTS["prune_history"].version_of(attempt), limit=limit)]


def _replace_reported(session: Session, attempt: Attempt) -> Answer:
    write = _service(session, attempt).replace_reported
    return [write(attempt.device_id, attempt.document, acked_version=attempt.version)]


def _patch_reported(session: Session, attempt: Attempt) -> Answer:
    write = _service(session, attempt).patch_reported
    return [write(attempt.device_id, attempt.document, acked_version=attempt.version)]


def _replace_desired_many(session: Session, attempt: Attempt) -> Answer:
    documents = {NEIGHBOUR: HARMLESS, attempt.device_id: attempt.document}
    versions = None if attempt.version is None else {attempt.device_id: attempt.version, NEIGHBOUR: 7}
    write = _service(session, attempt).replace_desired_many
    return [*write(documents, expected_versions=versions, reason=attempt.reason).values()]


def _patch_desired_many(session: Session, attempt: Attempt) -> Answer:
    devices = [NEIGHBOUR, attempt.device_id]
    write = _service(session, attempt).patch_desired_many
    return [*write(devices, attempt.document, reason=attempt.reason).values()]


def _replace_reported_many(session: Session, attempt: Attempt) -> Answer:
    return [*_service(session, attempt).replace_reported_many(_reports(attempt))]


def _patch_reported_many(session: Session, attempt: Attempt) -> Answer:
    return [*_service(session, attempt).patch_reported_many(_reports(attempt))]


def _reports(attempt: Attempt) -> list[Report]:
    refuses = {"refused_version": attempt.refused_version, "refusal": attempt.refusal}
    return [
        Report(NEIGHBOUR, HARMLESS, 7),
        Report(attempt.device_id, attempt.document, attempt.version, **refuses),
    ]


def _loaded(session: Session, attempt: Attempt) -> DeviceState:
    return session.scalars(
        select(DeviceState).filter_by(tenant_id=attempt.tenant_id, device_id=attempt.device_id)
    ).one()


def _assign(name: str) -> Callable[[Session, Attempt], Answer]:
    def assign(session: Session, attempt: Attempt) -> Answer:
        setattr(_loaded(session, attempt), name, attempt.document)
        return _flushed(session, attempt)

    return assign


def _change_inside(session: Session, attempt: Attempt) -> Answer:
    device = _loaded(session, attempt)
    device.desired_state.clear()
    device.desired_state.update(attempt.document)
    return _flushed(session, attempt)


def _flushed(session: Session, attempt: Attempt) -> Answer:
    """The application says in the session's info who writes and why."""
    said = {"iot_models.actor": attempt.actor, "iot_models.reason": attempt.reason}
    session.info.update(said)
    try:
        session.flush()
        return [ShadowService(session, attempt.tenant_id).get(attempt.device_id)]
    finally:
        for name in said:
            del session.info[name]


def _parts(words: str) -> frozenset[str]:
    return frozenset(words.split())


_SECTIONS: Final[dict[str, Section]] = {"desired": "desired_state", "reported": "reported_state"}


def _method(
    name: str, call: Callable[[Session, Attempt], Answer], takes: str = "document version", **more: Any
) -> EntryPoint:
    write = WRITES[name]
    section: Any = _SECTIONS.get(write.section, write.section)
    kind = "tenant" if write.section == "history" else write.devices
    version = "expected" if section in {"desired_state", "life"} else "acked"
    return EntryPoint(call, section, kind, write.merges, _parts(takes), **{"version": version, **more})


ENTRY_POINTS: Final = {
    "get": EntryPoint(_get, None, takes=_parts("actor")),
    "get_many": EntryPoint(_get_many, None, "all", takes=frozenset()),
    "pending": EntryPoint(_pending, None, "after", takes=frozenset()),
    "drifted": EntryPoint(_drifted, None, "after", takes=frozenset()),
    "refused": EntryPoint(_refused, None, "after", takes=frozenset()),
    "history": EntryPoint(_history, None, takes=_parts("version"), version="before"),
    "desired_at": EntryPoint(_desired_at, None, takes=_parts("version"), version="kept", usual=5),
    "replace_desired": _method("replace_desired", _replace_desired, "document version actor reason request_id"),
    "patch_desired": _method("patch_desired", _patch_desired, "document version actor reason request_id"),
    "restore_desired": _method(
        "restore_desired", _restore_desired, "version actor reason request_id", version="kept", usual=5
    ),
    "refuse_desired": _method("refuse_desired", _refuse_desired, "version refusal", version="refused", usual=7),
    "register": _method("register", _register, "site_id"),
    "register_many": _method("register_many", _register_many, "site_id"),
    "remove": _method("remove", _remove, "version actor reason"),
    "prune_history": _method("prune_history", _prune_history, "version age", version="number", usual=0),
    "replace_reported": _method("replace_reported", _replace_reported),
    "patch_reported": _method("patch_reported", _patch_reported),
    "replace_desired_many": _method("replace_desired_many", _replace_desired_many, "document version actor reason"),
    "patch_desired_many": _method("patch_desired_many", _patch_desired_many, "document actor reason"),
    "replace_reported_many": _method(
        "replace_reported_many", _replace_reported_many, "document version refused_version refusal"
    ),
    "patch_reported_many": _method(
        "patch_reported_many", _patch_reported_many, "document version refused_version refusal"
    ),
    "DeviceState.desired_state =": EntryPoint(
        _assign("desired_state"), "desired_state", "orm", takes=_parts("document actor reason")
    ),
    "DeviceState.reported_state =": EntryPoint(_assign("reported_state"), "reported_state", "orm"),
    "DeviceState.state =": EntryPoint(_assign("state"), "state", "orm"),
    "DeviceState.desired_state.update": EntryPoint(
        _change_inside, "desired_state", "orm", takes=_parts("document actor reason")
    ),
}
