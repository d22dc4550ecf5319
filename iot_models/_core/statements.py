"""Every SQL statement about shadows: what PostgreSQL is asked. Built here, once each, and never executed here.

All are Core statements over `device_state` that name its `tenant_id` and take their values as bound parameters.
Documents travel as JSON text that `documents.encode_document` made. Nothing here prevents a team from distributing the
table by `tenant_id` (Citus): one table, plain `now()` in SET, no function over columns that is not immutable.

No operator or function of a stranger's is a better match than the catalog's: both sides of a comparison have types for
which the catalog has an operator, and a function whose arguments may be of any type is named with its schema.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Final, Literal

from sqlalchemy import (
    ARRAY,
    TIMESTAMP,
    BigInteger,
    Boolean,
    Interval,
    Text,
    TypeDecorator,
    any_,
    bindparam,
    case,
    cast,
    column,
    false,
    func,
    literal_column,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB

from iot_models._core import conditions
from iot_models._core.column_types import PlainText
from iot_models.models import TABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, TypeAlias

    from sqlalchemy import CTE, ColumnElement, Dialect, FromClause, Select, TableValuedAlias
    from sqlalchemy.sql.dml import ReturningUpdate
    from sqlalchemy.types import TypeEngine

    # Their rows have the columns of a shadow, by name: see SHADOW.
    ShadowSelect: TypeAlias = Select[*tuple[Any, ...]]
    ShadowUpdate: TypeAlias = ReturningUpdate[*tuple[Any, ...]]

Section = Literal["desired_state", "reported_state"]

_C: Final = TABLE.c

# The table once more, for the rows that a writing statement locks before it writes.
LOCKED: Final = TABLE.alias("locking")

# What every statement that shows shadows returns; it is read by name.
SHADOW: Final = (
    _C.tenant_id,
    _C.device_id,
    _C.desired_state,
    _C.reported_state,
    _C.desired_version,
    _C.reported_version,
    _C.shadow_updated_at,
    _C.last_seen_at,
    _C.refused_version,
    _C.refusal,
    _C.refused_at,
)


def of_tenant(table: FromClause) -> ColumnElement[bool]:
    """The rows of the bound `tenant`, in a table of ours or an alias of one."""
    return table.c.tenant_id == bindparam("tenant", type_=PlainText())


OF_TENANT: Final = of_tenant(TABLE)
OF_DEVICE: Final = _C.device_id == bindparam("device", type_=PlainText())


class _TextArray(TypeDecorator[Iterable[object]]):
    """An array whose elements travel as texts. psycopg gets the text of PostgreSQL's array literal.

    Left to psycopg, a list is dumped element by element in Python, which for a thousand documents takes longer than the
    rest of the batch. asyncpg encodes a list in C. It knows this type of array without asking the server, by a
    statement that a stranger's operators could be called in.
    """

    impl = ARRAY(Text)
    cache_ok = True

    def bind_processor(self, dialect: Dialect) -> Callable[[Iterable[object] | None], object]:
        return _texts if dialect.driver == "asyncpg" else _array_literal


def _texts(values: Iterable[object] | None) -> list[str | None]:
    return [value if value is None or isinstance(value, str) else str(value) for value in values or ()]


def _array_literal(values: Iterable[object] | None) -> str:
    return "{" + ",".join(map(_element, values or ())) + "}"


def _element(value: object) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return "NULL" if value is None else str(value)


def _array(name: str, of: TypeEngine[Any]) -> ColumnElement[Any]:
    texts = bindparam(name, type_=_TextArray())
    return texts if isinstance(of, Text) else cast(texts, ARRAY(of))


class _JSONText(TypeDecorator[str]):
    """A JSON text, bound as `jsonb`: PostgreSQL parses it once, and not for each row that looks into it."""

    impl = JSONB
    cache_ok = True

    def bind_processor(self, dialect: Dialect) -> None:  # noqa: ARG002
        return None


def of_locked(name: str) -> ColumnElement[Any]:
    """`of_each`, for the device of a row that is locked."""
    return of_each(name, LOCKED.c.device_id)


def of_each(name: str, device_id: ColumnElement[str]) -> ColumnElement[Any]:
    """What the bound JSON object of that name, a text, has for a device: JSON, or NULL.

    For batches that write more than one table: a function that returns rows, such as `unnest`, beside a CTE that writes
    is what Citus cannot do.
    """
    return bindparam(name, type_=_JSONText()).op("->", return_type=JSONB())(device_id)


DEVICES: Final = _array("devices", Text())
# Not `= ANY (array)`: PostgreSQL does not know the array when it plans, would read all of a tenant where the batch is a
# large part of it, and compare each row with each id.
OF_DEVICES: Final = _C.device_id.in_(select(func.pg_catalog.unnest(DEVICES)))
# Where Citus cannot do that: the subquery hides the ids from the planner, which then searches the index for each.
LOCKED_DEVICES: Final = LOCKED.c.device_id == any_(cast(select(DEVICES).scalar_subquery(), ARRAY(Text)))
_PENDING: Final = conditions.pending(_C)
DOCUMENT: Final = cast(bindparam("document", type_=Text), JSONB)


def _reported_write(document: ColumnElement[Any]) -> dict[str, Any]:
    """What every report does to a row, besides the version that it may acknowledge."""
    return {"reported_state": document, "last_seen_at": not_before(_C.last_seen_at)}


def not_before(time: ColumnElement[Any]) -> ColumnElement[Any]:
    """The time of a write: its transaction's, and never before the time that the row has when it is locked.

    Of two writes of a row, the transaction that began first may be the one that writes last. A time of the row that is
    more than a minute ahead (SQL by hand, a clock that was wrong) counts as one minute ahead, so that no time from the
    far future stays.
    """
    # No CASE, and no function of time inside coalesce: Citus refuses both in an UPDATE.
    known = func.coalesce(time, literal_column("TIMESTAMPTZ '-infinity'", TIMESTAMP(timezone=True)))
    now = func.now()
    return func.greatest(func.least(known, now + literal_column("INTERVAL '1 minute'", Interval)), now)


@cache
def one_shadow() -> ShadowSelect:
    """The shadow of one device. Binds `tenant`, `device`."""
    return select(*SHADOW).where(OF_TENANT, OF_DEVICE)


@cache
def many_shadows() -> ShadowSelect:
    """The shadows of several devices, unordered. Binds `tenant`, `devices` (an array)."""
    return select(*SHADOW).where(OF_TENANT, OF_DEVICES)


@cache
def versions() -> Select[int, int]:
    """`desired_version` and `reported_version` of one device. Binds `tenant`, `device`."""
    return select(_C.desired_version, _C.reported_version).where(OF_TENANT, OF_DEVICE)


@cache
def locked_document(section: Section) -> Select[str, int, int]:
    """One section as JSON text and both versions, the row locked until the transaction ends. Binds `tenant`, `device`.

    As text, so that no number is rounded: what is read here is written back. The lock is the one that an UPDATE takes,
    `FOR NO KEY UPDATE`: inserting a row with a foreign key to this one does not wait.
    """
    return (
        select(cast(_C[section], Text).label("document"), _C.desired_version, _C.reported_version)
        .where(OF_TENANT, OF_DEVICE)
        .with_for_update(key_share=True)
    )


@cache
def write_reported(*, acked: bool, if_converged: bool, unchanged: bool) -> ShadowUpdate:
    """Set the reported document and `last_seen_at`. Binds `tenant`, `device`, `document`.

    If acked, it also sets `reported_version` to the bound `acked`, and writes only a row for which that version is
    neither late nor unknown. If if_converged, it acknowledges the newest version where the document has all that the
    row's desired document asks. If unchanged, it writes only a row whose reported document is still the bound `seen`
    (JSON text), because reported documents have no version of their own.
    """
    values = _reported_write(DOCUMENT)
    guard: list[ColumnElement[bool]] = []
    if if_converged:
        judged = _judged(_locked_row(), DOCUMENT)
        values["reported_version"] = _newest_if_converged(judged, otherwise=_C.reported_version)
        guard.append(_C.device_id == judged.c.device_id)
    if acked:
        version = bindparam("acked", type_=BigInteger)
        # Where the guard holds, this is :acked. Alone, PostgreSQL would cast :acked to integer while it plans the
        # statement, and a number that is too large would fail before the guard could refuse it.
        values["reported_version"] = func.least(version, _C.desired_version)
        guard.append(conditions.accepted(version, _C))
    if unchanged:
        guard.append(_C.reported_state == cast(bindparam("seen", type_=Text), JSONB))
    return update(TABLE).where(OF_TENANT, OF_DEVICE, *guard).values(values).returning(*SHADOW)


@cache
def refuse_desired() -> ShadowUpdate:
    """Record that a device refuses its newest version. Binds `tenant`, `device`, `version`, `words`.

    It writes only a row that is at that version and has not acknowledged it.
    """
    version = bindparam("version", type_=BigInteger)
    values = {
        # Where the guard holds, this is :version: as for `acked`.
        "refused_version": _C.desired_version,
        "refusal": cast(bindparam("words", type_=Text), Text),
        "refused_at": not_before(_C.refused_at),
        "last_seen_at": not_before(_C.last_seen_at),
    }
    guard = conditions.refusable(version, _C)
    return update(TABLE).where(OF_TENANT, OF_DEVICE, guard).values(values).returning(*SHADOW)


@cache
def versions_of_many() -> Select[str, int]:
    """`device_id` and `desired_version` of several devices, unordered. Binds `tenant`, `devices` (an array)."""
    return select(_C.device_id, _C.desired_version).where(OF_TENANT, OF_DEVICES)


@cache
def locked_devices(*sections: Section) -> ShadowSelect:
    """`device_id`, both versions and these sections (as JSON text) of several devices, their rows locked.

    Binds `tenant`, `devices` (an array). Rows are locked as `locked_document` does, in the order that the database
    gives `device_id`. All batches lock in that order, so two batches wait for each other and never deadlock.
    """
    texts = [cast(_C[section], Text).label(section) for section in sections]
    return (
        select(_C.device_id, _C.desired_version, _C.reported_version, *texts)
        .where(OF_TENANT, OF_DEVICES)
        .order_by(_C.device_id)
        .with_for_update(key_share=True)
    )


@cache
def write_reported_many(  # noqa: C901 - a clause of the statement for each
    *, if_converged: bool = False, refuses: bool = False, decided: bool = False, unchanged: bool = False
) -> ReturningUpdate[str, int, int]:
    """Set the reported documents of several devices, `reported_version` and `last_seen_at`; binds `tenant` and arrays.

    The arrays are `devices` (each once), `documents` and `acked` (NULL: leave `reported_version` as it is). A row is
    written under the guard of `write_reported`. If if_converged, the array of that name has the rows that acknowledge
    as `write_reported` does. If refuses, the arrays `refused` and `refusals` have the versions that devices refuse, and
    why (NULL: leave it as it is), under the guard of `refuse_desired`. If decided, the reports were judged before the
    statement, and the arrays `desired` and `reported` are the versions that they were judged by: only a row at these
    versions is written, and if unchanged, only one whose reported document is that of the array `seen` (JSON texts).
    Returns the devices written, and both versions.

    All rows are locked, in order, before the first one is written, including those that the guard then refuses. So a
    statement that reads them afterwards has their locks already, and finds the versions that the guard found.

    The documents pass through the CTE that locks. A join of the locked rows with a second table of documents would be
    slow: in a generic plan (psycopg prepares a statement at its fifth run) PostgreSQL expects ten rows of each and
    compares every row with every other one.
    """
    arrays: dict[str, TypeEngine[Any]] = {"documents": Text(), "acked": BigInteger()}
    if if_converged:
        arrays |= {"if_converged": Boolean()}
    if refuses:
        arrays |= {"refused": BigInteger(), "refusals": Text()}
    if decided:
        arrays |= {"desired": BigInteger(), "reported": BigInteger()}
    if unchanged:
        arrays |= {"seen": Text()}
    new = rows_of("new", **arrays)
    sections = [LOCKED.c.desired_state] if if_converged else []
    # The time beside the rows: Citus refuses a function of time in the CASE of an UPDATE.
    now = [func.now().label("now")] if refuses else []
    locked = locked_rows(
        new, carrying=(*sections, LOCKED.c.desired_version, LOCKED.c.reported_version, *now, *new.c[1:])
    )
    if if_converged:
        locked = _judged(locked, cast(locked.c.documents, JSONB), where=locked.c.if_converged)
    if decided:
        guard = (locked.c.desired_version == locked.c.desired) & (locked.c.reported_version == locked.c.reported)
    else:
        guard = locked.c.acked.is_(None) | conditions.accepted(locked.c.acked, locked.c)
        if refuses:
            guard &= locked.c.refused.is_(None) | conditions.refusable(locked.c.refused, locked.c)
    if unchanged:
        guard &= _C.reported_state == cast(locked.c.seen, JSONB)
    document = cast(locked.c.documents, JSONB)
    version: ColumnElement[int] = func.coalesce(locked.c.acked, locked.c.reported_version)
    if if_converged:
        version = _newest_if_converged(locked, otherwise=version)
    values = _reported_write(document) | {"reported_version": version}
    if refuses:
        values |= _refusals(locked)
    return (
        update(TABLE)
        .where(OF_TENANT, _C.device_id == locked.c.device_id, guard)
        .values(values)
        .returning(_C.device_id, _C.desired_version, _C.reported_version)
    )


def _refusals(locked: CTE) -> dict[str, Any]:
    is_none = locked.c.refused.is_(None)
    return {
        "refused_version": func.coalesce(locked.c.refused, _C.refused_version),
        "refusal": case((is_none, _C.refusal), else_=locked.c.refusals),
        "refused_at": case((is_none, _C.refused_at), else_=locked.c.now),
    }


def _judged(locked: CTE, document: ColumnElement[Any], *, where: ColumnElement[bool] | None = None) -> CTE:
    """The locked rows, and whether each is converged once it reports this document: `is_converged`.

    False where `where` does not hold.

    Judged between the lock and the write. Where an UPDATE or a lock has to wait for a row, PostgreSQL evaluates its
    expressions once more, for the row as it is then, but not the recursion in `conditions.converged`: that would go on
    answering for the row as it was. So a version whose document nobody compared could be acknowledged.
    """
    is_converged = conditions.converged(locked.c.desired_state, document)
    if where is not None:
        is_converged = case((where, is_converged), else_=false())
    return select(*locked.c, is_converged.label("is_converged")).cte("judged").prefix_with("MATERIALIZED")


def _newest_if_converged(judged: CTE, *, otherwise: ColumnElement[int]) -> ColumnElement[int]:
    """The `reported_version` that a report without a version leaves behind."""
    return case((judged.c.is_converged, _C.desired_version), else_=otherwise)


def _locked_row() -> CTE:
    """The row of the bound device, locked, with its desired document."""
    of_device = LOCKED.c.device_id == bindparam("device", type_=PlainText())
    return lock(select(LOCKED.c.device_id, LOCKED.c.desired_state).where(of_device))


def rows_of(name: str, **arrays: TypeEngine[Any]) -> TableValuedAlias:
    """The bound array `devices`, and others bound by their names, side by side as the columns of a table."""
    types = {"devices": Text(), **arrays}
    columns = [column(key, type_) for key, type_ in types.items()]
    # Several arrays are known to PostgreSQL as `unnest` only, which then is the catalog's, whatever else has the name.
    unnest = func.unnest if arrays else func.pg_catalog.unnest
    rows = unnest(*(_array(key, type_) for key, type_ in types.items()))
    return rows.table_valued(*columns).render_derived(name=name)


def locked_rows(of: TableValuedAlias, carrying: Sequence[ColumnElement[Any]]) -> CTE:
    """The rows of these devices with those columns beside them, locked in the order of `device_id`."""
    return lock(
        select(LOCKED.c.device_id, *carrying)
        .join_from(LOCKED, of, LOCKED.c.device_id == of.c.devices)
        .order_by(LOCKED.c.device_id)
    )


def lock(rows: ShadowSelect) -> CTE:
    """These rows of the bound tenant, locked as `locked_document` does."""
    return (
        rows.where(of_tenant(LOCKED))
        .with_for_update(key_share=True, of=LOCKED)
        .cte("locked")
        .prefix_with("MATERIALIZED")
    )


@cache
def pending_page(*, after: bool) -> ShadowSelect:
    """A page of the devices that have not acknowledged the newest version, by `device_id`. Binds `tenant`, `limit`.

    With `after`, the page begins behind the bound `after` (keyset pagination): a late page costs as much as the first.

    The rows are read in the order of the index of revision 077. The subquery hides the limit from the planner. If the
    planner knew it, and expected no more pending devices than that (a table without statistics, a tenant whose rows
    were just loaded), it would sort all of them for each page. Without it, it reads the index in order.
    """
    return _page(_PENDING, SHADOW, after=after)


def _page(condition: ColumnElement[bool], columns: Sequence[ColumnElement[Any]], *, after: bool) -> ShadowSelect:
    behind = [_C.device_id > bindparam("after", type_=PlainText())] if after else []
    limit = select(bindparam("limit", type_=BigInteger)).scalar_subquery()
    return select(*columns).where(OF_TENANT, condition, *behind).order_by(_C.device_id).limit(limit)


@cache
def pending_versions(*, after: bool) -> ShadowSelect:
    """A page of pending devices, as `pending_page`: `device_id`, `desired_version`, and whether that `is_refused`."""
    is_refused = func.coalesce(_C.refused_version == _C.desired_version, false()).label("is_refused")
    return _page(_PENDING, [_C.device_id, _C.desired_version, is_refused], after=after)


@cache
def pending_tenant(*, after: bool) -> Select[str]:
    """The first tenant that has pending devices. With `after`, the first one behind the bound `after`.

    The only statement over all tenants: a watcher of all of them asks it for one tenant after the other.
    """
    behind = [_C.tenant_id > bindparam("after", type_=PlainText())] if after else []
    return select(_C.tenant_id).where(_PENDING, *behind).order_by(_C.tenant_id).limit(1)


@cache
def pending_count() -> Select[int]:
    """How many devices have not acknowledged the newest version. Binds `tenant`."""
    return select(func.count()).select_from(TABLE).where(OF_TENANT, _PENDING)


@cache
def refused_page(*, after: bool) -> ShadowSelect:
    """A page of the devices that refused the newest version, as `pending_page`."""
    return _page(conditions.refused(_C), SHADOW, after=after)


@cache
def refused_count() -> Select[int]:
    """How many devices refused the newest version. Binds `tenant`."""
    return select(func.count()).select_from(TABLE).where(OF_TENANT, conditions.refused(_C))


@cache
def drifted_page(*, after: bool) -> ShadowSelect:
    """A page of the devices that acknowledged the newest version and lack some of it, as `pending_page`."""
    behind = [_C.device_id > bindparam("after", type_=PlainText())] if after else []
    limit = bindparam("limit", type_=BigInteger)
    return select(*SHADOW).where(OF_TENANT, conditions.drifted(_C), *behind).order_by(_C.device_id).limit(limit)


@cache
def status_counts() -> Select[str, int]:
    """How many devices have each sync status; a status that no device has is absent.

    Binds `tenant`, `now`, `stale_after`.
    """
    now, stale_after = bindparam("now", type_=TIMESTAMP(timezone=True)), bindparam("stale_after", type_=Interval)
    status = conditions.sync_status(_C, now, stale_after).label("sync_status")
    return select(status, func.count().label("devices")).where(OF_TENANT).group_by(status)
