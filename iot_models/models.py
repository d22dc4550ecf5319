"""The table `device_state`, as revision 077 leaves it, and the rule that no object writes past `desired_version`.

A flush writes a changed `desired_state` by one guarded UPDATE of its own, before everything else that it writes to the
table. So that UPDATE alone can lose a race: SQLAlchemy's `version_id_col` would guard every write of the row, and a
heartbeat would fail because an operator was quicker.

Statements are outside: bulk `update(DeviceState)`, `Session.bulk_*` and SQL by hand write what they say, nothing else.
Whoever sets `desired_state` by one of them also raises `desired_version` by one; `ShadowService` does. SQL by hand
can also store a number of more than 4,300 digits, by which Python's json refuses to read the row (`ValueError`).
"""

from __future__ import annotations

import typing
from datetime import datetime
from typing import Any, Final

from sqlalchemy import (
    DDL,
    TIMESTAMP,
    ColumnElement,
    Connection,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    and_,
    bindparam,
    case,
    cast,
    column,
    event,
    func,
    inspect,
    literal,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import DeclarativeBase, Mapped, Mapper, mapped_column, object_session
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.exc import StaleDataError

from iot_models import twin
from iot_models._core import tracked_documents


class Base(DeclarativeBase):
    """Declarative base whose constraint names are those that PostgreSQL itself gives.

    So tables made by raw SQL, by Alembic and by `create_all` carry the same names.
    """

    metadata = MetaData(
        naming_convention={
            "pk": "%(table_name)s_pkey",
            "uq": "%(table_name)s_%(column_0_N_name)s_key",
            "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
            "ck": "%(table_name)s_%(constraint_name)s_check",
            "ix": "idx_%(column_0_N_label)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - DeclarativeBase's own declaration, read once
        str: Text,
        int: Integer,
        datetime: TIMESTAMP(timezone=True),
        # none_as_null: None is an absent document and breaks NOT NULL loudly, instead of being stored as JSON null.
        dict[str, Any]: JSONB(none_as_null=True),
    }


class DeviceState(Base):
    """One device of one tenant: its liveness, its last telemetry state, and its shadow.

    `status` is `ONLINE`, `STALE` or `OFFLINE`.

    Setting `desired_state`, or changing it in place at any depth, and flushing raises `desired_version` by one and sets
    `shadow_updated_at` to the server's time, also where nothing differs. Where the row is not at the `desired_version`
    that was loaded any more, the flush raises SQLAlchemy's `StaleDataError`. `desired_version` itself is set on new
    objects only. All other columns are written as ever: no version rises, none is asked for.

    Documents are copied when they are assigned, and hold what PostgreSQL's jsonb can hold: else `InvalidDocument`.
    How large they may be is not looked at here; `ShadowService` does. A document is written back as Python read it:
    numbers of more digits than a float keeps are rounded, which `ShadowService.patch_desired` does not do. Ids that no
    row can carry (NUL, a lone surrogate, too long for an index) give the driver's errors.

    Example:
        >>> device = session.get_one(DeviceState, ("acme", "thermostat-1"))
        >>> device.desired_state["fan"]["speed"] = 3
        >>> session.commit()
    """

    __tablename__ = "device_state"

    tenant_id: Mapped[str] = mapped_column(primary_key=True)
    site_id: Mapped[str]
    device_id: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str] = mapped_column(server_default=text("'OFFLINE'"))
    last_heartbeat_at: Mapped[datetime | None]
    last_telemetry_at: Mapped[datetime | None]
    last_seen_at: Mapped[datetime | None]
    last_state_change_at: Mapped[datetime] = mapped_column(server_default=func.now())
    state: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    # Active history: on an expired object, setting either loads the row first, and so the version that guards it.
    desired_state: Mapped[dict[str, Any]] = mapped_column(
        server_default=text("'{}'"),
        active_history=True,
        comment="Operator intent. What the device should be configured as.",
    )
    reported_state: Mapped[dict[str, Any]] = mapped_column(
        server_default=text("'{}'"), comment="Device-reported actual state. Set by device via MQTT or HTTP."
    )
    desired_version: Mapped[int] = mapped_column(
        server_default=text("0"),
        active_history=True,
        comment="Monotonically increasing. Increments on every desired_state write.",
    )
    reported_version: Mapped[int] = mapped_column(
        server_default=text("0"), comment="The desired_version the device last acknowledged."
    )
    shadow_updated_at: Mapped[datetime | None] = mapped_column(
        comment="Timestamp of the most recent desired_state update."
    )

    __table_args__ = (
        # All devices of a site.
        Index("idx_device_state_site", "tenant_id", "site_id"),
        # A tenant's devices by liveness.
        Index("idx_device_state_status", "tenant_id", "status"),
        # How many devices have not acknowledged the newest desired version: ShadowService.count_pending.
        Index(
            "idx_device_state_shadow_pending",
            "tenant_id",
            postgresql_where=text("desired_version > reported_version"),
        ),
        # Pages of them in the order of device_id: ShadowService.pending and iter_pending.
        Index(
            "idx_device_state_shadow_pending_device",
            "tenant_id",
            "device_id",
            postgresql_where=text("desired_version > reported_version"),
        ),
    )

    @hybrid_property
    def is_pending(self) -> bool:
        """Whether the device has yet to acknowledge the newest desired version; in SQL, served by partial indexes."""
        return (self.desired_version or 0) > (self.reported_version or 0)

    @is_pending.inplace.expression
    @classmethod
    def _is_pending_in_sql(cls) -> ColumnElement[bool]:
        return cls.desired_version > cls.reported_version

    @hybrid_property
    def delta(self) -> dict[str, Any]:
        """What desired asks and reported lacks, by top-level keys: a copy; see `twin.compute_delta`."""
        # Before the first flush an unset column is None here; the database will make it {} (or 0, for a version).
        return twin.compute_delta(self.desired_state or {}, self.reported_state or {})

    @delta.inplace.expression
    @classmethod
    def _delta_in_sql(cls) -> ColumnElement[dict[str, Any]]:
        nothing = cast(literal("{}", Text), JSONB)
        wanted = func.jsonb_each(cls.desired_state).table_valued("key", column("value", JSONB))
        missing = (
            select(func.coalesce(func.jsonb_object_agg(wanted.c.key, wanted.c.value), nothing))
            .where(cls.reported_state[wanted.c.key].is_distinct_from(wanted.c.value))
            .correlate(cls)
            .scalar_subquery()
        )
        # Most devices run what they should: they are spared the subquery. And a SELECT of the delta alone, which names
        # no table outside the subquery, would not know where to select it from.
        return case((cls.desired_state == cls.reported_state, nothing), else_=missing)

    @hybrid_property
    def is_drifted(self) -> bool:
        """Whether the device acknowledged the newest version and yet runs something else."""
        return (self.desired_version or 0) == (self.reported_version or 0) and bool(self.delta)

    @is_drifted.inplace.expression
    @classmethod
    def _is_drifted_in_sql(cls) -> ColumnElement[bool]:
        return and_(cls.desired_version == cls.reported_version, cls.delta != cast(literal("{}", Text), JSONB))

    def __repr__(self) -> str:
        return f"DeviceState(tenant_id={self.tenant_id!r}, device_id={self.device_id!r})"


_DOCUMENTS: Final = ("state", "desired_state", "reported_state")
_TABLE: Final = typing.cast("Table", DeviceState.__table__)
# Room in each page, by which a heartbeat stays a HOT update: revision 077 has the measurement. (SQLAlchemy 2.0 knows no
# storage parameters of tables.)
_FILLFACTOR: Final = DDL("ALTER TABLE %(fullname)s SET (fillfactor = 75)")  # type: ignore[no-untyped-call]
event.listen(_TABLE, "after_create", _FILLFACTOR)
_C: Final = _TABLE.c
_WRITE_DESIRED: Final = (
    update(_TABLE)
    .where(
        _C.tenant_id == bindparam("tenant"),
        _C.device_id == bindparam("device"),
        _C.desired_version == bindparam("loaded"),
    )
    .values(
        desired_state=bindparam("document"),
        desired_version=_C.desired_version + 1,
        shadow_updated_at=func.now(),
    )
    .returning(_C.desired_version, _C.shadow_updated_at)
)

for _attribute in (DeviceState.state, DeviceState.desired_state, DeviceState.reported_state):
    tracked_documents.track(_attribute)


@event.listens_for(DeviceState, "before_insert", propagate=True)
def _before_insert(mapper: Mapper[DeviceState], _connection: Connection, device: DeviceState) -> None:
    tracked_documents.check_changes(device, *_DOCUMENTS)
    session = object_session(device)
    key = mapper.identity_key_from_instance(device)
    if session is not None and session.identity_map.get(key) in session.deleted:
        # SQLAlchemy would make one UPDATE of the two, by which the old shadow lives on and its version may go back.
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
    document = device.desired_state
    row = connection.execute(
        _WRITE_DESIRED, {"tenant": tenant_id, "device": device_id, "loaded": loaded, "document": document}
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
