"""What a desired write asks of PostgreSQL: the document, its version and its row of the history, in one statement.

    locked       the rows, locked in the order of device_id, if they are at their expected versions
    recorded     the same, each with the newest version that the history has of the device
    newest       adds the new version to the history
    kept         adds the state before it, if the history lacks it: nothing in it is without a predecessor
    written      writes the row of the device

The new version is one above the row's. A row may be behind its history: SQL by hand removed a device and inserted it
again, or set its version back. It goes on above the newest version of its history, so that no version stands for two
documents, and no message of the earlier life fits.

What a decision needs is read between the lock and the write: see `statements`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import (
    BigInteger,
    Text,
    bindparam,
    case,
    cast,
    delete,
    exists,
    func,
    literal_column,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB, insert

from iot_models._core.column_types import PlainText
from iot_models._core.statements import (
    DEVICES,
    DOCUMENT,
    LOCKED,
    LOCKED_DEVICES,
    OF_DEVICE,
    OF_DEVICES,
    OF_TENANT,
    SHADOW,
    lock,
    not_before,
    of_each,
    of_locked,
    of_tenant,
    rows_of,
)
from iot_models.models import HISTORY, TABLE

if TYPE_CHECKING:
    from sqlalchemy import CTE, ColumnElement, Select
    from sqlalchemy.sql.dml import ReturningInsert

    from iot_models._core.statements import ShadowSelect, ShadowUpdate

_C: Final = TABLE.c
_H: Final = HISTORY.c
_TENANT: Final = cast(bindparam("tenant", type_=Text), Text)
_ACTOR, _REASON, _REQUEST = (cast(bindparam(name, type_=Text), Text) for name in ("author", "why", "request"))
_NOBODY: Final = cast(null(), Text)
_EMPTY: Final = literal_column("'{}'::jsonb", JSONB)
# The database fills in the transaction.
_COLUMNS: Final = tuple(column.name for column in HISTORY.columns if column.name != "transaction_id")
_REQUEST_KEY: Final = ("tenant_id", "device_id", "request_id")


def _desired_columns(document: ColumnElement[Any], version: ColumnElement[int]) -> dict[str, Any]:
    """What a desired write does to a row, besides its time.

    A `reported_version` ahead of the desired one, which others may have stored, is brought back to it: the device is
    an ordinary pending one from then on. A refusal was one of the version before.
    """
    return {
        "desired_state": document,
        "desired_version": version,
        "reported_version": func.least(_C.reported_version, _C.desired_version),
        "refused_version": None,
        "refusal": None,
        "refused_at": None,
    }


@cache
def write_desired(*, guarded: bool, recorded: bool = True, once: bool = False) -> ShadowSelect | ShadowUpdate:
    """Set the desired document and raise its version. Binds `tenant`, `device`, `document`.

    If guarded, it writes only a row whose `desired_version` is the bound `expected`. If recorded, it adds the version
    to the history, and binds `author` and `why`. If once, it binds `request`, and writes nothing where the history
    has a version of this request already, or another transaction is just adding it.
    """
    if not recorded:
        guard = [_C.desired_version == bindparam("expected", type_=BigInteger)] if guarded else []
        return _unrecorded(DOCUMENT, OF_DEVICE, *guard)
    return _write(_with_newest(_locked_device(guarded=guarded)), DOCUMENT, once=once)


@cache
def restore_desired(*, guarded: bool, once: bool) -> ShadowSelect:
    """Set the desired document to that of an earlier version. Binds `version`, and what `write_desired` binds."""
    version = bindparam("version", type_=BigInteger)
    locked = _locked_device(guarded=guarded)
    of_version = (_H.device_id == locked.c.device_id) & (_H.desired_version == version)
    kept = select(_H.desired_state).where(of_tenant(HISTORY), of_version).scalar_subquery()
    current = case((locked.c.desired_version == version, locked.c.desired_state))
    found = _with_newest(locked, func.coalesce(kept, current).label("found"))
    is_document = func.jsonb_typeof(found.c.found) == literal_column("'object'", Text)
    return _write(found, found.c.found, where=is_document, once=once)


@cache
def write_desired_many(*, recorded: bool = True) -> ShadowSelect | ShadowUpdate:
    """Set the desired documents of several devices and raise their versions, all or none.

    Binds `tenant`, `devices`, `documents`, `expected`.

    `devices` is an array, each once; `documents` and `expected` are JSON objects by device (texts). A device that
    `expected` lacks is written at any version. First the rows at their expected version are locked, in order. The
    statement writes only if these are all the devices of the batch. If recorded, as `write_desired`.
    """
    expected = cast(of_locked("expected"), BigInteger)
    at_expected = func.coalesce(expected, LOCKED.c.desired_version) == LOCKED.c.desired_version
    columns = [LOCKED.c[name] for name in ("device_id", "desired_state", "desired_version", "shadow_updated_at")]
    rows = select(*columns, of_locked("documents").label("document")).where(LOCKED_DEVICES, at_expected)
    locked = lock(rows.order_by(LOCKED.c.device_id))
    all_locked = select(func.count()).select_from(locked).scalar_subquery() == func.pg_catalog.cardinality(DEVICES)
    if recorded:
        found = _with_newest(locked)
        return _write(found, found.c.document, where=all_locked)
    return _unrecorded(locked.c.document, _C.device_id == locked.c.device_id, all_locked)


def _unrecorded(document: ColumnElement[Any], *where: ColumnElement[bool]) -> ShadowUpdate:
    """Write `document` and leave the history alone."""
    values = _desired_columns(document, _C.desired_version + 1)
    values["shadow_updated_at"] = not_before(_C.shadow_updated_at)
    return update(TABLE).where(OF_TENANT, *where).values(values).returning(*SHADOW)


def _write(
    found: CTE, document: ColumnElement[Any], *, where: ColumnElement[bool] | None = None, once: bool = False
) -> ShadowSelect:
    """Write `document` to the rows that were found, and to their history; returns the new shadows."""
    guards = [] if where is None else [where]
    version = func.greatest(found.c.desired_version, found.c.newest) + 1
    request = _REQUEST if once else _NOBODY
    added = insert(HISTORY).from_select(
        _COLUMNS,
        select(
            _TENANT,
            found.c.device_id,
            version,
            document,
            not_before(found.c.shadow_updated_at),
            _ACTOR,
            _REASON,
            request,
        ).where(*guards),
    )
    if once:
        added = added.on_conflict_do_nothing(index_elements=_REQUEST_KEY, index_where=_H.request_id.is_not(None))
    newest = added.returning(_H.device_id, _H.desired_version, _H.desired_state, _H.written_at).cte("newest")
    values = _desired_columns(newest.c.desired_state, newest.c.desired_version)
    # A row that is behind its history has acknowledged nothing of its own: what fits is of its earlier life.
    before = newest.c.desired_version - 1
    values["reported_version"] = case((before > _C.desired_version, before), else_=values["reported_version"])
    written = (
        update(TABLE)
        .where(OF_TENANT, _C.device_id == newest.c.device_id)
        .values(values | {"shadow_updated_at": newest.c.written_at})
        .returning(*SHADOW)
        .cte("written")
    )
    kept = _kept(found, [exists(select(newest.c.device_id))] if once else guards)
    return select(*written.c).add_cte(kept)


def _kept(found: CTE, where: list[ColumnElement[bool]]) -> CTE:
    """Record the state before a write, if the history lacks it."""
    is_lacking = or_(found.c.newest.is_(None), found.c.newest < found.c.desired_version)
    before = select(
        _TENANT,
        found.c.device_id,
        found.c.desired_version,
        found.c.desired_state,
        found.c.shadow_updated_at,
        _NOBODY,
        _NOBODY,
        _NOBODY,
    ).where(is_lacking, *where)
    # The history as it was when the statement began: another transaction may have recorded it since.
    return insert(HISTORY).from_select(_COLUMNS, before).on_conflict_do_nothing().cte("kept")


def _locked_device(*, guarded: bool) -> CTE:
    guard = [LOCKED.c.desired_version == bindparam("expected", type_=BigInteger)] if guarded else []
    columns = [LOCKED.c[name] for name in ("device_id", "desired_state", "desired_version", "shadow_updated_at")]
    of_device = LOCKED.c.device_id == bindparam("device", type_=PlainText())
    return lock(select(*columns).where(of_device, *guard))


def _with_newest(locked: CTE, *besides: ColumnElement[Any]) -> CTE:
    newest = _newest_of(locked.c.device_id)
    return select(*locked.c, newest.label("newest"), *besides).cte("recorded").prefix_with("MATERIALIZED")


def _newest_of(device_id: ColumnElement[str]) -> ColumnElement[int]:
    """The newest version that the history has of a device; NULL if it has none."""
    return (
        select(func.max(_H.desired_version))
        .where(of_tenant(HISTORY), _H.device_id == device_id)
        .correlate_except(HISTORY)
        .scalar_subquery()
    )


@cache
def remove(*, guarded: bool) -> ReturningInsert[str, int]:
    """Delete the row of a device, and add a version without a document to its history.

    Binds `tenant`, `device`, `author`, `why`; if guarded, `expected`. Returns the `device_id` and that version.
    """
    guard = [_C.desired_version == bindparam("expected", type_=BigInteger)] if guarded else []
    before = (_C.device_id, _C.desired_state, _C.desired_version, _C.shadow_updated_at)
    return _end(delete(TABLE).where(OF_TENANT, OF_DEVICE, *guard).returning(*before).cte("gone"))


@cache
def record_removals() -> ReturningInsert[str, int]:
    """The same for rows that the next statement deletes: they are locked.

    Binds `tenant`, `author`, `why`, the array `devices`, and `read_at`: the versions at which they were read, a JSON
    object by device (a text). It leaves out a device that was removed since, and made again: its row is of another
    life.
    """
    before = (LOCKED.c.device_id, LOCKED.c.desired_state, LOCKED.c.desired_version, LOCKED.c.shadow_updated_at)
    read_at = cast(of_locked("read_at"), BigInteger)
    is_removal = (_H.device_id == LOCKED.c.device_id) & _H.desired_state.is_(None) & (_H.desired_version > read_at)
    removed_since = exists(select(_H.device_id).where(of_tenant(HISTORY), is_removal).correlate(LOCKED))
    rows = select(*before).where(of_tenant(LOCKED), LOCKED_DEVICES, ~removed_since)
    rows = rows.order_by(LOCKED.c.device_id).with_for_update(of=LOCKED)
    return _end(rows.cte("gone").prefix_with("MATERIALIZED"))


def _end(gone: CTE) -> ReturningInsert[str, int]:
    found = _with_newest(gone)
    version = func.greatest(found.c.desired_version, found.c.newest) + 1
    end = select(
        _TENANT,
        found.c.device_id,
        version,
        cast(null(), JSONB(none_as_null=True)),
        not_before(found.c.shadow_updated_at),
        _ACTOR,
        _REASON,
        _NOBODY,
    )
    added = insert(HISTORY).from_select(_COLUMNS, end).add_cte(_kept(found, []))
    return added.returning(_H.device_id, _H.desired_version)


def _resume_of(device_id: ColumnElement[str]) -> ColumnElement[int]:
    """The version at which a new row of a device goes on; NULL if it has no history.

    That of its removal. Where nobody recorded one (SQL by hand, a device that was renamed), the one above the newest.
    """
    above = case((_H.desired_state.is_(None), 0), else_=1)
    of_device = (of_tenant(HISTORY), _H.device_id == device_id)
    newest = select(_H.desired_version + above).where(*of_device).order_by(_H.desired_version.desc()).limit(1)
    return newest.correlate_except(HISTORY).scalar_subquery()


@cache
def register() -> ReturningInsert[str, int]:
    """Insert the devices that are not there. Binds `tenant` and the arrays `devices` and `sites`.

    Returns the `device_id` and `desired_version` of each new one.

    A device that has a history goes on above it, acknowledged. No INSERT waits for the end of a transaction that is
    just removing the device: it would not know the version of the removal. Until then, it is there.
    """
    new = rows_of("new", sites=Text())
    version = func.coalesce(_resume_of(new.c.devices), 0)
    is_there = exists(select(_C.device_id).where(OF_TENANT, _C.device_id == new.c.devices).correlate(new))
    rows = select(_TENANT, new.c.devices, new.c.sites, version, version).where(~is_there).order_by(new.c.devices)
    names = ["tenant_id", "device_id", "site_id", "desired_version", "reported_version"]
    added = insert(TABLE).from_select(names, rows).on_conflict_do_nothing(index_elements=["tenant_id", "device_id"])
    return added.returning(_C.device_id, _C.desired_version)


@cache
def registered() -> ShadowSelect:
    """The shadows of several devices, and where a new row of each would `resume`. Binds as `many_shadows`."""
    return select(*SHADOW, _resume_of(_C.device_id).label("resume")).where(OF_TENANT, OF_DEVICES)


@cache
def behind() -> Select[str, int]:
    """Which of these new rows are behind the history of their devices. Binds `tenant`, `devices`, `inserted`.

    Returns each `device_id`, and how many rows are `seen` of it: two where this transaction works on a snapshot
    (REPEATABLE READ, SERIALIZABLE) and another one has removed the device since. The version of the removal cannot be
    seen then.
    """
    resuming = _resuming()
    is_behind = or_(_is_behind(resuming.c.version), resuming.c.seen > 1)
    rows = select(_C.device_id, resuming.c.seen).join_from(TABLE, resuming, _C.device_id == resuming.c.devices)
    return rows.where(OF_TENANT, is_behind)


@cache
def go_on() -> ShadowUpdate:
    """Let new rows that are behind the history of their devices go on above it.

    Binds `tenant`, `devices`, and `inserted`: the versions that the rows were inserted at, a JSON object by device (a
    text). A row that comes with a desired document asks for it under a version of its own.
    """
    resuming = _resuming()
    asks = case((_C.desired_state == _EMPTY, 0), else_=1)
    return (
        update(TABLE)
        .where(OF_TENANT, _C.device_id == resuming.c.devices, _is_behind(resuming.c.version))
        .values({"desired_version": resuming.c.version + asks, "reported_version": resuming.c.version})
        .returning(*SHADOW)
    )


def _resuming() -> CTE:
    wanted = rows_of("wanted")
    same = TABLE.alias("same")
    seen = (
        select(func.count())
        .where(of_tenant(same), same.c.device_id == wanted.c.devices)
        .correlate(wanted)
        .scalar_subquery()
    )
    found = select(wanted.c.devices, _resume_of(wanted.c.devices).label("version"), seen.label("seen"))
    return found.cte("resuming").prefix_with("MATERIALIZED")


def _is_behind(resume: ColumnElement[int]) -> ColumnElement[bool]:
    """The version of a new row stands for something else in the history, or something of an earlier life fits it.

    A row that has another version than it was inserted at is new no more, and its history is of this life: in
    AUTOCOMMIT mode others may have written it already.
    """
    inserted = cast(of_each("inserted", _C.device_id), BigInteger)
    is_blank = (_C.reported_version >= resume) & (_C.desired_state == _EMPTY)
    is_earlier = (_C.desired_version < resume) | ((_C.desired_version == resume) & ~is_blank)
    return (_C.desired_version == inserted) & is_earlier
