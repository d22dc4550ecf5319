"""The rule that no object writes past `desired_version`: what happens to a `DeviceState` when it is flushed.

A flush writes a changed `desired_state` by the service's own guarded UPDATE, before everything else that it writes to
the table. That UPDATE alone can lose a race. SQLAlchemy's `version_id_col` would guard every write of the row, and a
heartbeat would fail because an operator was quicker.

`import iot_models` imports this module, which sets the rule up for `DeviceState` and for classes that extend it.
"""

from __future__ import annotations

import typing
from typing import Any, Final

from sqlalchemy import Connection, event, inspect
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Mapper, object_session
from sqlalchemy.orm.exc import StaleDataError

from iot_models._core import statements, tracked_documents
from iot_models._core.documents import encode_document
from iot_models._core.tracked_documents import STORABLE, set_committed_value
from iot_models.models import DeviceState

_DOCUMENTS: Final = ("state", "desired_state", "reported_state")

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
    if "desired_version" in state.unloaded:
        raise InvalidRequestError(
            f"the desired_state of {device!r} was changed without the desired_version that it was read at: load both"
        )
    # The identity, because a flush may also rename the device.
    tenant_id, device_id = typing.cast("tuple[str, str]", state.identity)
    loaded = device.desired_version
    document: dict[str, Any] | None = device.desired_state
    # None becomes NULL, which the column refuses.
    text = None if document is None else encode_document(document, STORABLE)
    row = connection.execute(
        statements.write_desired(guarded=True),
        {"tenant": tenant_id, "device": device_id, "expected": loaded, "document": text},
    ).one_or_none()
    if row is None:
        raise StaleDataError(
            f"the desired_state of {device!r} was changed on top of desired_version {loaded}, which its row is not at "
            "any more: roll back, read the device again and decide on what it says now"
        )
    # Written, so that the flush's own UPDATE carries the other columns only.
    set_committed_value(device, "desired_state", document)
    set_committed_value(device, "desired_version", row.desired_version)
    set_committed_value(device, "shadow_updated_at", row.shadow_updated_at)
