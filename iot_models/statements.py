"""Every SQL statement: what PostgreSQL is asked. Built here, once each, and never executed here.

All are Core statements over `device_state` that name its `tenant_id` and take their values as bound parameters;
documents travel as JSON text that `documents.encode_document` made. Nothing here stands in the way of distributing
the table by `tenant_id` (Citus): one table, plain `now()` in SET, no function over columns that is not immutable.
"""

from __future__ import annotations

import typing
from functools import cache
from typing import TYPE_CHECKING, Final, Literal

from sqlalchemy import ARRAY, BigInteger, Text, any_, bindparam, cast, func, select, update
from sqlalchemy.dialects.postgresql import JSONB

from iot_models.models import DeviceState

if TYPE_CHECKING:
    from datetime import datetime
    from typing import Any, TypeAlias

    from sqlalchemy import ColumnElement, Select, Table
    from sqlalchemy.sql.dml import ReturningUpdate

    _Json: TypeAlias = dict[str, Any]
    ShadowSelect: TypeAlias = Select[str, str, _Json, _Json, int, int, datetime | None, datetime | None]
    ShadowUpdate: TypeAlias = ReturningUpdate[str, str, _Json, _Json, int, int, datetime | None, datetime | None]

Section = Literal["desired_state", "reported_state"]

# The table, not the mapped class: a Core statement costs half of what an ORM one does.
_TABLE: Final = typing.cast("Table", DeviceState.__table__)
_C: Final = _TABLE.c

# What every statement about shadows returns, in the order of Shadow's fields.
_SHADOW: Final = (
    _C.tenant_id,
    _C.device_id,
    _C.desired_state,
    _C.reported_state,
    _C.desired_version,
    _C.reported_version,
    _C.shadow_updated_at,
    _C.last_seen_at,
)
_OF_TENANT: Final = _C.tenant_id == bindparam("tenant", type_=Text)
_OF_DEVICE: Final = _C.device_id == bindparam("device", type_=Text)
# The very words of the partial index's predicate.
_PENDING: Final = _C.desired_version > _C.reported_version
_DOCUMENT: Final = cast(bindparam("document", type_=Text), JSONB)


@cache
def one_shadow() -> ShadowSelect:
    """The shadow of one device. Binds `tenant`, `device`."""
    return select(*_SHADOW).where(_OF_TENANT, _OF_DEVICE)


@cache
def many_shadows() -> ShadowSelect:
    """The shadows of several devices, unordered. Binds `tenant`, `devices` (an array)."""
    return select(*_SHADOW).where(_OF_TENANT, _C.device_id == any_(bindparam("devices", type_=ARRAY(Text))))


@cache
def versions() -> Select[int, int]:
    """`desired_version` and `reported_version` of one device. Binds `tenant`, `device`."""
    return select(_C.desired_version, _C.reported_version).where(_OF_TENANT, _OF_DEVICE)


@cache
def locked_document(section: Section) -> Select[str, int, int]:
    """One section as JSON text and both versions, the row locked until the transaction ends. Binds `tenant`, `device`.

    As text, because the engine's own JSON deserializer may round numbers, and what is read here is written back. The
    lock is the one that an UPDATE takes: foreign keys to the row are not held up.
    """
    return (
        select(cast(_C[section], Text), _C.desired_version, _C.reported_version)
        .where(_OF_TENANT, _OF_DEVICE)
        .with_for_update(key_share=True)
    )


@cache
def write_desired(*, guarded: bool) -> ShadowUpdate:
    """Set the desired document and raise its version by one. Binds `tenant`, `device`, `document`.

    Guarded, it writes only where `desired_version` is still the bound `expected`.
    """
    guard = [_C.desired_version == bindparam("expected", type_=BigInteger)] if guarded else []
    return (
        update(_TABLE)
        .where(_OF_TENANT, _OF_DEVICE, *guard)
        .values(
            desired_state=_DOCUMENT,
            desired_version=_C.desired_version + 1,
            shadow_updated_at=func.now(),
        )
        .returning(*_SHADOW)
    )


@cache
def write_reported(*, acked: bool, unchanged: bool) -> ShadowUpdate:
    """Set the reported document and `last_seen_at`. Binds `tenant`, `device`, `document`.

    Acked, it also sets `reported_version` to the bound `acked`, and writes only where that is neither older than what
    is stored nor newer than what was asked. Unchanged, it writes only where the document is still the bound `seen`
    (JSON text): reported documents have no version of their own.
    """
    values: dict[str, ColumnElement[Any]] = {"reported_state": _DOCUMENT, "last_seen_at": func.now()}
    guard: list[ColumnElement[bool]] = []
    if acked:
        version = bindparam("acked", type_=BigInteger)
        # The guard makes this :acked. Alone, it would be cast to integer while planning, and fail before any guard.
        values["reported_version"] = func.least(version, _C.desired_version)
        guard.append(version.between(_C.reported_version, _C.desired_version))
    if unchanged:
        guard.append(_C.reported_state == cast(bindparam("seen", type_=Text), JSONB))
    return update(_TABLE).where(_OF_TENANT, _OF_DEVICE, *guard).values(**values).returning(*_SHADOW)


@cache
def pending_page(*, after: bool) -> ShadowSelect:
    """A page of the devices that have not acknowledged the newest version, by `device_id`. Binds `tenant`, `limit`.

    With `after`, those that come behind the bound `after`: a keyset, so that a deep page costs what the first does.
    """
    behind = [_C.device_id > bindparam("after", type_=Text)] if after else []
    return (
        select(*_SHADOW)
        .where(_OF_TENANT, _PENDING, *behind)
        .order_by(_C.device_id)
        .limit(bindparam("limit", type_=BigInteger))
    )


@cache
def pending_count() -> Select[int]:
    """How many devices have not acknowledged the newest version. Binds `tenant`."""
    return select(func.count()).select_from(_TABLE).where(_OF_TENANT, _PENDING)
