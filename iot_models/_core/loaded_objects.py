"""What a rolled back savepoint undoes in the database is undone in the session's objects.

SQLAlchemy does so for what it flushed itself. The service writes beside the flush: an object that showed its values
would keep a version that never happened, and the version guard would let it overwrite whoever writes that version next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

from sqlalchemy import event

from iot_models.models import DeviceState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy.orm import Session, SessionTransaction

    _Keys: TypeAlias = set[tuple[Any, ...]]

_WRITTEN: Final = "iot_models.written_in_savepoints"


def remember(session: Session, tenant_id: str, device_ids: Iterable[str]) -> None:
    """Have these devices read anew after a rollback to a savepoint, also where they are loaded later than now."""
    if not session.in_nested_transaction():
        return
    if _WRITTEN not in session.info:
        session.info[_WRITTEN] = set()
        event.listen(session, "after_soft_rollback", _expire)
        event.listen(session, "after_transaction_end", _forget)
    written: _Keys = session.info[_WRITTEN]
    key_of = DeviceState.__mapper__.identity_key_from_primary_key
    written.update(key_of((tenant_id, device_id)) for device_id in device_ids)


def _expire(session: Session, ended: SessionTransaction) -> None:
    if ended.nested:  # the rollback of a whole transaction expires everything by itself
        for key in session.info[_WRITTEN]:
            if (device := session.identity_map.get(key)) is not None:
                session.expire(device)


def _forget(session: Session, ended: SessionTransaction) -> None:
    if ended.parent is None:
        session.info[_WRITTEN].clear()
