"""What the service writes is shown by the objects that the session has loaded, and taken back with a savepoint.

SQLAlchemy does both for what it flushed itself, but the service writes without a flush. An object that kept its old
values would be out of date. An object that kept the values of a write that a savepoint took back would have a version
that its row never had, and the version guard would let it overwrite the next write with that version.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from sqlalchemy import event, inspect
from sqlalchemy.orm import scoped_session

from iot_models._core import validation
from iot_models._core.tracked_documents import notice, set_committed_value
from iot_models.models import DeviceState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import Row
    from sqlalchemy.orm import Session, SessionTransaction

    _Keys: TypeAlias = set[tuple[Any, ...]]

# In `InstanceState.info`: the version that the object's desired_state was read at, which guards the next write of it.
# `version_guard` keeps it for all that SQLAlchemy loads, `show` for what the service shows.
READ_AT: Final = "iot_models.desired_read_at"
_WRITTEN: Final = "iot_models.written_in_savepoints"
# In `Session.info`, by the application: who writes, and why, for the history.
ACTOR: Final = "iot_models.actor"
REASON: Final = "iot_models.reason"


def session_of(given: Session | scoped_session[Any]) -> Session:
    """The session to use now: of a `scoped_session`, the one of the current scope."""
    return given() if isinstance(given, scoped_session) else given


def author(session: Session, actor: str | None = None, reason: str | None = None) -> dict[str, str | None]:
    """Who writes and why, as the statements bind it: what the caller says, else what the session's `info` does.

    Raises:
        TypeError: If one of these is no string.
        ValueError: If one is empty, too long, or cannot be stored as text.
    """
    actor = validation.identifier(f"session.info[{ACTOR!r}]", session.info.get(ACTOR)) if actor is None else actor
    if reason is None and (known := session.info.get(REASON)) is not None:
        reason = validation.words(f"session.info[{REASON!r}]", known)
    return {"author": actor, "why": reason}


def loaded(session: Session, tenant_id: str, device_ids: Iterable[str]) -> dict[str, list[DeviceState]]:
    """The objects of those devices that the session has loaded.

    There may be several of one device: classes that extend `DeviceState` have an identity of their own.
    """
    found: dict[str, list[DeviceState]] = {}
    for device_id in device_ids:
        for key in _keys(tenant_id, device_id):
            device: DeviceState | None = session.identity_map.get(key)
            if device is not None:
                found.setdefault(device_id, []).append(device)
    return found


def show(session: Session, row: Row[*tuple[Any, ...]], *, besides: DeviceState | None = None) -> None:
    """Show what a write returned on the loaded objects of that device.

    Changes of the caller that are not flushed yet are kept, and so is the version that guards them.

    Args:
        session: Where the objects are.
        row: What the write returned.
        besides: An object that shows it already.
    """
    for device in loaded(session, row.tenant_id, [row.device_id]).get(row.device_id, ()):
        if device is not besides:
            state = inspect(device)
            notice(state)
            for name, value in row._mapping.items():  # noqa: SLF001 - Row's public name for it
                if name in state.attrs and not state.attrs[name].history.has_changes():
                    set_committed_value(device, name, deepcopy(value))
                    if name == "desired_state":
                        state.info[READ_AT] = row.desired_version


def expire(session: Session, tenant_id: str, device_ids: Iterable[str]) -> None:
    """Let the loaded objects of these devices, which were removed, say so where they are read.

    An object with changes that are not flushed yet says so when it is flushed.
    """
    for devices in loaded(session, tenant_id, device_ids).values():
        for device in devices:
            notice(inspect(device))
            if device not in session.dirty:
                session.expire(device)


def remember(session: Session, tenant_id: str, device_ids: Iterable[str]) -> None:
    """Have these devices read again after a rollback to a savepoint, also where they are loaded later than now."""
    if not session.in_nested_transaction():
        return
    if _WRITTEN not in session.info:
        session.info[_WRITTEN] = set()
        event.listen(session, "after_soft_rollback", _expire)
        event.listen(session, "after_transaction_end", _forget)
    written: _Keys = session.info[_WRITTEN]
    written.update(key for device_id in device_ids for key in _keys(tenant_id, device_id))


def _keys(tenant_id: str, device_id: str) -> _Keys:
    mappers = DeviceState.__mapper__.self_and_descendants
    return {mapper.identity_key_from_primary_key((tenant_id, device_id)) for mapper in mappers}


def _expire(session: Session, ended: SessionTransaction) -> None:
    if ended.nested:  # the rollback of a whole transaction expires everything by itself
        for key in session.info[_WRITTEN]:
            if (device := session.identity_map.get(key)) is not None:
                session.expire(device)


def _forget(session: Session, ended: SessionTransaction) -> None:
    if ended.parent is None:
        session.info[_WRITTEN].clear()
