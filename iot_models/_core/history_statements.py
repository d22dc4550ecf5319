"""What is asked of the history: versions of a device, the work of a request, all changes, and to forget what is old.

The version that a device is at belongs to its history also where no write has recorded it yet.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import (
    BigInteger,
    Interval,
    Text,
    and_,
    bindparam,
    case,
    cast,
    column,
    delete,
    exists,
    false,
    func,
    insert,
    literal_column,
    null,
    select,
    table,
    true,
    tuple_,
    union_all,
)
from sqlalchemy.dialects.postgresql import JSONB, OID

from iot_models._core.column_types import PlainText
from iot_models._core.statements import OF_DEVICE, OF_TENANT, of_tenant
from iot_models.models import HISTORY, TABLE

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, CompoundSelect, FromClause, Select, Subquery

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


# Prunings leave marks: rows without a device, whose transaction_id is the greatest that was pruned. Their
# desired_version, a negative random number, tells one mark from another.
_NO_DEVICE: Final = literal_column("''", Text)


def _is_version(of: FromClause) -> ColumnElement[bool]:
    return of.c.desired_version >= 0


def _is_mark(of: FromClause) -> ColumnElement[bool]:
    return and_(of_tenant(of), of.c.device_id == _NO_DEVICE, of.c.desired_version < 0)


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
    return and_(of_tenant(HISTORY), _H.device_id == bindparam("device", type_=PlainText()), _is_version(HISTORY))


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


def _number(transaction: ColumnElement[Any]) -> ColumnElement[int]:
    """The number of a transaction, for PostgreSQL an xid8, in a type that each client knows."""
    return cast(cast(transaction, Text), BigInteger)


# Of the statement's snapshot. All transactions below xmin have ended; none from xmax on had ended when it was taken.
_XMIN: Final = _number(func.pg_snapshot_xmin(func.pg_current_snapshot()))
_XMAX: Final = _number(func.pg_snapshot_xmax(func.pg_current_snapshot()))
# What this transaction itself has written. Its number may be one that the snapshot does not know either.
_IS_OWN: Final = _H.transaction_id == func.coalesce(_number(func.pg_current_xact_id_if_assigned()), -1)


@cache
def changes_page(*, foreign: bool, after: bool) -> Select[Any]:
    """A page of the tenant's versions in the order of their transactions. Binds `tenant`, `limit`.

    If after, the page begins with the version of the bound `transaction`, `device`, `version`. If foreign, it begins
    among the foreign ones, which come first. The first columns are the same in each row, and there if no version is:

        system_identifier, database    the cluster and the database
        xmax                           versions from this transaction on are foreign
        marks                          what was pruned: `{"-17": 4711}`, a mark and up to which transaction
        held_back_since                when the oldest version was written that is committed and not to be read yet

    All of it is of one snapshot, in AUTOCOMMIT mode too.
    """
    head = _head()
    # <, not <=: xmin itself is open.
    rows = _changes(_H.transaction_id < _XMIN, is_local=true(), after=after and not foreign)
    if foreign:
        first = _changes(_H.transaction_id >= _XMAX, ~_IS_OWN, is_local=false(), after=after).subquery("first")
        then = rows.subquery("then_these")
        both = union_all(select(*first.c), select(*then.c)).subquery("both")
        rows = select(*both.c).order_by(*_in_order(both)).limit(_limit())
    page = rows.subquery("page")
    return select(*head.c, *page.c).select_from(head.outerjoin(page, true())).order_by(*_in_order(page))


def _head() -> Subquery:
    held_back = (
        select(_H.written_at)
        .where(of_tenant(HISTORY), _H.transaction_id >= _XMIN, _H.transaction_id < _XMAX, ~_IS_OWN)
        .where(_is_version(HISTORY), _H.written_at.is_not(None))
        .order_by(_H.transaction_id)
        .limit(1)
        .scalar_subquery()
    )
    mark = HISTORY.alias("mark")
    marks = select(
        func.pg_catalog.jsonb_object_agg(cast(mark.c.desired_version, Text), mark.c.transaction_id, type_=JSONB)
    )
    control = func.pg_control_system().table_valued(column("system_identifier", BigInteger))
    databases = table("pg_database", column("oid", OID), column("datname"), schema="pg_catalog")
    database = select(cast(databases.c.oid, BigInteger)).where(databases.c.datname == func.current_database())
    return select(
        select(control.c.system_identifier).scalar_subquery().label("system_identifier"),
        database.scalar_subquery().label("database"),
        _XMAX.label("xmax"),
        cast(marks.where(_is_mark(mark)).scalar_subquery(), Text).label("marks"),
        held_back.label("held_back_since"),
    ).subquery("head")


def _changes(*where: ColumnElement[bool], is_local: ColumnElement[bool], after: bool) -> Select[Any]:
    if after:
        place = (bindparam("transaction", type_=BigInteger), bindparam("device", type_=PlainText()))
        read = tuple_(*place, bindparam("version", type_=BigInteger))
        where += (tuple_(_H.transaction_id, _H.device_id, _H.desired_version) >= read,)
    rows = select(*_VERSION, _H.transaction_id, is_local.label("is_local"))
    rows = rows.where(of_tenant(HISTORY), _is_version(HISTORY), *where)
    return rows.order_by(_H.transaction_id, _H.device_id, _H.desired_version).limit(_limit())


def _in_order(rows: FromClause) -> list[ColumnElement[Any]]:
    return [rows.c[name] for name in ("is_local", "transaction_id", "device_id", "desired_version")]


def _limit() -> ColumnElement[int]:
    """The bound limit, hidden from the planner as in `statements.pending_page`."""
    return select(bindparam("limit", type_=BigInteger)).scalar_subquery()


@cache
def prune_history(*, keep: int) -> Select[int]:
    """Delete a page of the oldest versions, and leave a mark. Returns how many were deleted.

    Binds `tenant`, `age`, `limit`, and `mark`, a negative number; the newest `keep` of each device stay.

    The mark is one with the versions that it stands for: a snapshot has all of them, or it. It takes the place of the
    marks of no later transaction. Of two prunings at once each leaves its own. Foreign versions have one of their own.
    """
    limit = bindparam("limit", type_=BigInteger)
    age = func.now() - bindparam("age", type_=Interval)
    # Where nobody knows the age, the version is as old as the write that ended it.
    ended = HISTORY.alias("ended")
    of_device = (of_tenant(ended), ended.c.device_id == _OLD.c.device_id)
    newer = select(ended.c.device_id).where(*of_device, ended.c.desired_version > _OLD.c.desired_version)
    is_old = exists(newer.where(ended.c.written_at < age)) | ~exists(newer)
    unknown = _old(_OLD.c.written_at.is_(None) & is_old, keep=keep).limit(limit)
    known = _old(_OLD.c.written_at < age, keep=keep).order_by(_OLD.c.written_at).limit(limit)
    both = unknown.subquery().select().union_all(known.subquery().select()).limit(limit).subquery("both")
    page = select(*both.c).cte("page").prefix_with("MATERIALIZED")
    mark = HISTORY.alias("mark")
    pruned = select(func.max(page.c.transaction_id)).where(_is_foreign(page) == _is_foreign(mark)).scalar_subquery()
    replaced = select(mark.c.device_id, mark.c.desired_version).where(_is_mark(mark), mark.c.transaction_id <= pruned)
    going = union_all(select(page.c.device_id, page.c.desired_version), replaced).subquery("going")
    gone = (
        delete(HISTORY)
        .where(of_tenant(HISTORY), _H.device_id == going.c.device_id, _H.desired_version == going.c.desired_version)
        .returning(_H.desired_version, _H.transaction_id)
        .cte("gone")
    )
    # Two marks at most, and a number for each.
    name = bindparam("mark", type_=BigInteger) - case((_is_foreign(gone), 1), else_=0)
    made = select(
        cast(bindparam("tenant", type_=Text), Text), _NO_DEVICE, name, func.now(), func.max(gone.c.transaction_id)
    ).group_by(_is_foreign(gone))
    names = ["tenant_id", "device_id", "desired_version", "written_at", "transaction_id"]
    left = insert(HISTORY).from_select(names, made).cte("left_behind")
    return select(func.count()).select_from(gone).where(_is_version(gone)).add_cte(left)


def _is_foreign(of: FromClause) -> ColumnElement[bool]:
    return of.c.transaction_id >= _XMAX


def _old(condition: ColumnElement[bool], *, keep: int) -> Select[str, int, int]:
    wanted = select(_OLD.c.device_id, _OLD.c.desired_version, _OLD.c.transaction_id)
    wanted = wanted.where(of_tenant(_OLD), _is_version(_OLD), condition)
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
