"""What is asked of the history: versions of a device, the work of a request, and to forget what is old.

The version that a device is at belongs to its history also where no write has recorded it yet.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import BigInteger, Interval, Text, and_, bindparam, cast, delete, exists, false, func, null, select

from iot_models._core.column_types import PlainText
from iot_models._core.statements import OF_DEVICE, OF_TENANT, of_tenant
from iot_models.models import HISTORY, TABLE

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, CompoundSelect, Select
    from sqlalchemy.sql.dml import ReturningDelete

_C: Final = TABLE.c
_H: Final = HISTORY.c
_OLD: Final = HISTORY.alias("old")
_NOBODY: Final = cast(null(), Text)
_VERSION: Final = (
    _H.tenant_id,
    _H.device_id,
    _H.desired_version,
    _H.desired_state,
    _H.written_at,
    _H.actor,
    _H.reason,
    _H.request_id,
    _H.desired_state.is_(None).label("is_removal"),
)


def _current(*where: ColumnElement[bool]) -> Select[Any]:
    """The version of the row of a device, if the history does not have it."""
    is_recorded = exists(
        select(_H.device_id)
        .where(of_tenant(HISTORY), _H.device_id == _C.device_id, _H.desired_version == _C.desired_version)
        .correlate_except(HISTORY)
    )
    columns = (
        _C.tenant_id,
        _C.device_id,
        _C.desired_version,
        _C.desired_state,
        _C.shadow_updated_at.label("written_at"),
        _NOBODY.label("actor"),
        _NOBODY.label("reason"),
        _NOBODY.label("request_id"),
        false().label("is_removal"),
    )
    return select(*columns).where(OF_TENANT, OF_DEVICE, ~is_recorded, *where)


def _of_device() -> ColumnElement[bool]:
    return and_(of_tenant(HISTORY), _H.device_id == bindparam("device", type_=PlainText()))


@cache
def history_page(*, before: bool) -> Select[Any]:
    """The versions of a device, the newest first. Binds `tenant`, `device`, `limit`, and `before`, a version."""
    bound = bindparam("before", type_=BigInteger)
    limit = bindparam("limit", type_=BigInteger)
    recorded = select(*_VERSION).where(_of_device(), *([_H.desired_version < bound] if before else []))
    recorded = recorded.order_by(_H.desired_version.desc()).limit(limit)
    current = _current(*([_C.desired_version < bound] if before else []))
    both = recorded.union_all(current).subquery("versions")
    return select(*both.c).order_by(both.c.desired_version.desc()).limit(limit)


@cache
def version_of_device() -> CompoundSelect[Any]:
    """One version of a device. Binds `tenant`, `device`, `version`."""
    version = bindparam("version", type_=BigInteger)
    return (
        select(*_VERSION)
        .where(_of_device(), _H.desired_version == version)
        .union_all(_current(_C.desired_version == version))
    )


@cache
def versions_kept() -> Select[int | None, int | None]:
    """The oldest and the newest version that can be read of a device; NULL if none can. Binds `tenant`, `device`."""
    recorded = select(_H.desired_version).where(_of_device())
    versions = recorded.union_all(select(_C.desired_version).where(OF_TENANT, OF_DEVICE)).subquery("versions")
    return select(func.min(versions.c.desired_version), func.max(versions.c.desired_version))


@cache
def request_done() -> Select[Any]:
    """The version that a request has written, and the document before it. Binds `tenant`, `device`, `request`.

    `before` is NULL where the version before it is not kept.
    """
    earlier = HISTORY.alias("earlier")
    before = (
        select(earlier.c.desired_state)
        .where(
            of_tenant(earlier),
            earlier.c.device_id == _H.device_id,
            earlier.c.desired_version == _H.desired_version - 1,
        )
        .correlate(HISTORY)
        .scalar_subquery()
    )
    is_request = _H.request_id == cast(bindparam("request", type_=Text), Text)
    return select(
        _H.desired_version, cast(_H.desired_state, Text).label("desired"), cast(before, Text).label("before")
    ).where(_of_device(), is_request)


@cache
def prune_history(*, keep: int) -> ReturningDelete[int]:
    """Delete a page of the oldest versions. Binds `tenant`, `age`, `limit`; the newest `keep` of each device stay."""
    limit = bindparam("limit", type_=BigInteger)
    age = func.now() - bindparam("age", type_=Interval)
    # Where nobody knows the age, the version is as old as the write that ended it.
    ended = HISTORY.alias("ended")
    of_device = (ended.c.tenant_id == _OLD.c.tenant_id, ended.c.device_id == _OLD.c.device_id)
    newer = select(ended.c.device_id).where(*of_device, ended.c.desired_version > _OLD.c.desired_version)
    is_old = exists(newer.where(ended.c.written_at < age)) | ~exists(newer)
    unknown = _old(_OLD.c.written_at.is_(None) & is_old, keep=keep).limit(limit)
    known = _old(_OLD.c.written_at < age, keep=keep).order_by(_OLD.c.written_at).limit(limit)
    page = unknown.subquery().select().union_all(known.subquery().select()).limit(limit).subquery("page")
    return (
        delete(HISTORY)
        .where(of_tenant(HISTORY), _H.device_id == page.c.device_id, _H.desired_version == page.c.desired_version)
        .returning(_H.desired_version)
    )


def _old(condition: ColumnElement[bool], *, keep: int) -> Select[str, int]:
    wanted = select(_OLD.c.device_id, _OLD.c.desired_version).where(of_tenant(_OLD), condition)
    if not keep:
        return wanted
    newer = HISTORY.alias("newer")
    last_kept = (
        select(newer.c.desired_version)
        .where(of_tenant(newer), newer.c.device_id == _OLD.c.device_id)
        .order_by(newer.c.desired_version.desc())
        .offset(keep - 1)
        .limit(1)
        .correlate(_OLD)
        .scalar_subquery()
    )
    return wanted.where(_OLD.c.desired_version < last_kept)
