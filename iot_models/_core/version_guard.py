"""The rule that no object writes past `desired_version`: what happens to a `DeviceState` when it is flushed.

A flush writes a changed `desired_state` by the service's own guarded UPDATE, before everything else that it writes to
the table. Only that UPDATE can be refused because another transaction was quicker. SQLAlchemy's `version_id_col` would
guard every write of the row, and a heartbeat would fail because an operator wrote.

**The version that guards a write is the one that its document was read at.** It is remembered for each object when the
document is read (`_remember`), and not taken from `desired_version` when the object is flushed: by then that may show
a newer version, from a lazy load, a refresh of one column, or a write of the service in the same session, which says
nothing about the document in the object. If a document was read while the object showed no version, no version can
guard it, and the flush is refused.

**The history sees it all.** That UPDATE records the version, and a deletion the end of the device. An object that is
added under the id of a device that was removed goes on at the version of the removal, as `ShadowService.register` does.
Each costs one statement for all objects of a flush and tenant.

`import iot_models` imports this module, which sets the rule up for `DeviceState` and for classes that extend it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

from sqlalchemy import Connection, event, inspect
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import InstanceState, Mapper, Session, object_session
from sqlalchemy.orm.exc import StaleDataError

from iot_models._core import desired_statements, loaded_objects, statements, tracked_documents
from iot_models._core.documents import encode_document, json_object
from iot_models._core.equality import json_equal
from iot_models._core.loaded_objects import READ_AT, author
from iot_models._core.tracked_documents import STORABLE, Document, set_committed_value
from iot_models.models import DeviceState

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

_DOCUMENTS: Final = ("state", "desired_state", "reported_state")
# In `Session.info`.
_FLUSH: Final = "iot_models.flush"


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
    _flush_of(cast("Session", state.session)).added.append(cast("DeviceState", state.obj()))


@event.listens_for(DeviceState, "before_delete", propagate=True)
def _before_delete(_mapper: object, connection: Connection, device: DeviceState) -> None:
    session = cast("Session", object_session(device))
    ended = _flush_of(session).ended
    if device in ended:
        return
    # All at once: the first DELETE comes after the last of these events.
    ending = {device, *(other for other in session.deleted if isinstance(other, DeviceState))} - ended
    ended |= ending
    for tenant_id, devices in _by_tenant(ending).items():
        _record_removals(connection, tenant_id, devices, author(session))


def _record_removals(
    connection: Connection, tenant_id: str, devices: dict[str, DeviceState], by: dict[str, str | None]
) -> None:
    """Record the end of these devices, whose rows the flush deletes next.

    Raises:
        StaleDataError: If one was removed and made again since its object was read: the row is of another life.
    """
    left = {device_id: inspect(device).info.get(READ_AT) for device_id, device in devices.items()}
    for _ in range(2):  # the second time it sees what those have done for whom the first one has waited
        read_at = {device_id: str(version) for device_id, version in left.items() if version is not None}
        binds = {"tenant": tenant_id, "devices": list(left), "read_at": json_object(read_at), **by}
        for row in connection.execute(desired_statements.record_removals(), binds):
            del left[row.device_id]
        if not left:
            return
    # A row that is gone is SQLAlchemy's to tell.
    there = connection.execute(statements.versions_of_many(), {"tenant": tenant_id, "devices": list(left)})
    if (other := there.first()) is not None:
        raise StaleDataError(
            f"device {other.device_id!r} was removed by another transaction since its object was read, and made again: "
            "it is another device now. Roll back, and read it again"
        )


class _Flush:
    """The devices that a flush inserts, and those whose end it has recorded."""

    def __init__(self) -> None:
        self.added: list[DeviceState] = []
        self.ended: set[DeviceState] = set()


def _flush_of(session: Session) -> _Flush:
    if _FLUSH not in session.info:
        event.listen(session, "after_flush_postexec", _go_on)
        event.listen(session, "after_soft_rollback", _forget)
        session.info[_FLUSH] = _Flush()
    flush: _Flush = session.info[_FLUSH]
    return flush


def _forget(session: Session, _ended: object) -> None:
    session.info[_FLUSH] = _Flush()


def _go_on(session: Session, _context: object) -> None:
    """Let what was inserted go on at the newest version of its history: see `desired_statements.go_on`.

    After the INSERT, which waits for the end of a transaction that is just removing the device.
    """
    added = _flush_of(session).added
    session.info[_FLUSH] = _Flush()
    connection = session.connection(bind_arguments={"mapper": DeviceState.__mapper__}) if added else None
    for tenant_id, devices in _by_tenant(added).items():
        execute = cast("Connection", connection).execute
        # Without eager_defaults an object does not show what the database filled in: 0.
        inserted = {device_id: str(inspect(device).info[READ_AT] or 0) for device_id, device in devices.items()}
        binds = {"tenant": tenant_id, "devices": list(devices), "inserted": json_object(inserted)}
        behind = execute(desired_statements.behind(), binds).all()
        for row in behind:
            if row.seen > 1:
                raise StaleDataError(
                    f"device {row.device_id!r} was removed by another transaction since this one began, and added "
                    "again here: roll back, and run all of it again"
                )
        if behind:
            for shown in execute(desired_statements.go_on(), binds | {"devices": [row.device_id for row in behind]}):
                loaded_objects.show(session, shown)


def _by_tenant(devices: Iterable[DeviceState]) -> dict[str, dict[str, DeviceState]]:
    found: dict[str, dict[str, DeviceState]] = {}
    for device in devices:
        tenant_id, device_id = cast("tuple[str, str]", inspect(device).identity)
        found.setdefault(tenant_id, {})[device_id] = device
    return found


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
        desired_statements.write_desired(guarded=True),
        {
            "tenant": tenant_id,
            "device": device_id,
            "expected": read_at,
            "document": text,
            **author(cast("Session", state.session)),
        },
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
    for name in ("reported_version", "refused_version", "refusal", "refused_at"):
        if not state.attrs[name].history.has_changes():
            set_committed_value(device, name, getattr(row, name))
    state.info[READ_AT] = row.desired_version
    loaded_objects.show(cast("Session", state.session), row, besides=device)
