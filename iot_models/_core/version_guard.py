"""The rule that no object writes past `desired_version`: what happens to a `DeviceState` when it is flushed.

A flush writes a changed `desired_state` by the service's own guarded UPDATE, before everything else that it writes to
the table. Only that UPDATE can be refused because another transaction was quicker. SQLAlchemy's `version_id_col` would
guard every write of the row, and a heartbeat would fail because an operator wrote.

**The version that guards a write is the one that its document was read at.** It is remembered for each object when the
document is read (`_remember`), and not taken from `desired_version` when the object is flushed: by then that may show
a newer version, from a lazy load, a refresh of one column, or a write of the service in the same session, which says
nothing about the document in the object. If a document was read while the object showed no version, no version can
guard it, and the flush is refused.

`import iot_models` imports this module, which sets the rule up for `DeviceState` and for classes that extend it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

from sqlalchemy import Connection, event, inspect
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import InstanceState, Mapper, Session, object_session
from sqlalchemy.orm.exc import StaleDataError

from iot_models._core import loaded_objects, statements, tracked_documents
from iot_models._core.documents import encode_document
from iot_models._core.equality import json_equal
from iot_models._core.loaded_objects import READ_AT
from iot_models._core.tracked_documents import STORABLE, Document, set_committed_value
from iot_models.models import DeviceState

if TYPE_CHECKING:
    from collections.abc import Collection

_DOCUMENTS: Final = ("state", "desired_state", "reported_state")


@event.listens_for(DeviceState, "load", raw=True, propagate=True)
@event.listens_for(DeviceState, "refresh", raw=True, propagate=True)
@event.listens_for(DeviceState, "refresh_flush", raw=True, propagate=True)
@event.listens_for(DeviceState, "_sa_event_merge_wo_load", raw=True, propagate=True)
def _remember(state: InstanceState[DeviceState], _context: object = None, names: Collection[str] | None = None) -> None:
    """Remember the version that the object shows when its document is read: from the same row, or from before.

    A version that was read before the document can guard it, too. If the row is still at that version when the guard
    asks, no desired write happened since the version was read, and so none since the document was read.
    """
    if names is not None and "desired_state" not in names:
        return
    document = state.dict.get("desired_state")
    if not isinstance(document, Document):  # just read: tracked_documents has not seen it yet
        state.info[READ_AT] = state.dict.get("desired_version")
    elif document.owner is not None and document.owner[0] is not state:  # merge(load=False) hands over another object's
        state.info[READ_AT] = document.owner[0].info.get(READ_AT)


@event.listens_for(DeviceState.desired_state, "set", raw=True, propagate=True)
def _take_over(state: InstanceState[DeviceState], value: object, old: object, _initiator: object) -> None:
    """Guard what `Session.merge` copies from another object of this row by the version that it was read at there."""
    source = value.owner[0] if isinstance(value, Document) and value.owner is not None else None
    if source is None or source is state or source.key is None or source.key != state.key:
        return
    if not (isinstance(old, dict) and json_equal(value, old)):  # an equal one is no change
        state.info[READ_AT] = source.info.get(READ_AT)


# After the listeners above, which tell a document that was just read by its not being tracked yet.
for _attribute in (DeviceState.state, DeviceState.desired_state, DeviceState.reported_state):
    tracked_documents.track(_attribute)


@event.listens_for(DeviceState, "before_insert", propagate=True)
def _before_insert(mapper: Mapper[DeviceState], _connection: Connection, device: DeviceState) -> None:
    tracked_documents.check_changes(device, *_DOCUMENTS)
    session = object_session(device)
    key = mapper.identity_key_from_instance(device)
    if session is not None and session.identity_map.get(key) in session.deleted:
        # SQLAlchemy would make one UPDATE of the two: the old shadow would live on, and its version might go back.
        raise InvalidRequestError(f"{device!r} is deleted and added again in one flush: flush after deleting it")


@event.listens_for(DeviceState, "after_insert", raw=True, propagate=True)
def _after_insert(_mapper: object, _connection: object, state: InstanceState[DeviceState]) -> None:
    state.info[READ_AT] = state.dict.get("desired_version")


@event.listens_for(DeviceState, "before_update", propagate=True)
def _before_update(_mapper: Mapper[DeviceState], connection: Connection, device: DeviceState) -> None:
    tracked_documents.check_changes(device, *_DOCUMENTS)
    state = inspect(device)
    if state.attrs.desired_version.history.has_changes():
        raise StaleDataError(
            f"{device!r} carries a desired_version that its row does not have: it was set by hand, or merged from an "
            "object of another version. It counts the writes of desired_state by itself: set that alone, and merge "
            "only what was loaded at the current version"
        )
    if not state.attrs.desired_state.history.has_changes():
        return
    read_at: int | None = state.info.get(READ_AT)
    if read_at is None:
        raise InvalidRequestError(
            f"the desired_state of {device!r} was read without the desired_version of its row, so no version can "
            "guard the change: load both in one statement (load_only, defer and refresh name single columns), and "
            "change it then"
        )
    # The identity, because a flush may also rename the device.
    tenant_id, device_id = cast("tuple[str, str]", state.identity)
    document: dict[str, Any] | None = device.desired_state
    # None becomes NULL, which the column refuses.
    text = None if document is None else encode_document(document, STORABLE)
    row = connection.execute(
        statements.write_desired(guarded=True),
        {"tenant": tenant_id, "device": device_id, "expected": read_at, "document": text},
    ).one_or_none()
    if row is None:
        raise StaleDataError(
            f"the desired_state of {device!r} was changed on top of desired_version {read_at}, which its row is not "
            "at any more: roll back, read the device again and decide on what it says now"
        )
    # Written, so that the flush's own UPDATE carries the other columns only.
    set_committed_value(device, "desired_state", document)
    set_committed_value(device, "desired_version", row.desired_version)
    set_committed_value(device, "shadow_updated_at", row.shadow_updated_at)
    state.info[READ_AT] = row.desired_version
    loaded_objects.show(cast("Session", state.session), row, besides=device)
