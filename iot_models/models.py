"""The tables `device_state` and `device_shadow_history`, as the newest revision leaves them.

The rule that no object writes past `desired_version` is in `iot_models._core.version_guard`, which
`import iot_models` sets up. Statements are outside that rule: bulk `update(DeviceState)`, `Session.bulk_*` and SQL by
hand write what they say and nothing else. Where one of them sets `desired_state`, it also has to raise
`desired_version` by one, as `ShadowService` does. SQL by hand can also store a number of more than 4,300 digits, and
Python's json then refuses to read the row (`ValueError`).
"""

from __future__ import annotations

import typing
from datetime import datetime
from typing import Any, Final

from sqlalchemy import DDL, BigInteger, ColumnElement, Index, Integer, MetaData, Table, event, func, text
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from iot_models import twin
from iot_models._core import conditions
from iot_models._core.column_types import Document, PlainText, UTCTime


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
        str: PlainText(),
        int: Integer,
        datetime: UTCTime(),
        dict[str, Any]: Document(),
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
    # Active history: setting either on an expired object loads the row first, and with it the version that guards it.
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
    refused_version: Mapped[int | None] = mapped_column(
        comment="The desired_version that the device last refused. It counts while that is the newest one, and pending."
    )
    refusal: Mapped[str | None] = mapped_column(comment="Why the device refused it, in its own words.")
    refused_at: Mapped[datetime | None] = mapped_column(comment="When the device refused it.")

    __table_args__ = (
        # Each with the query that it serves. All devices of a site.
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
        # Those of them that refused it: ShadowService.refused and count_refused.
        Index(
            "idx_device_state_shadow_refused",
            "tenant_id",
            "device_id",
            postgresql_where=text("refused_version = desired_version AND desired_version > reported_version"),
        ),
    )

    @hybrid_property
    def is_pending(self) -> bool:
        """Whether the device has yet to acknowledge the newest desired version; in SQL, served by partial indexes."""
        return (self.desired_version or 0) > (self.reported_version or 0)

    @is_pending.inplace.expression
    @classmethod
    def _is_pending_in_sql(cls) -> ColumnElement[bool]:
        return conditions.pending(cls)

    @hybrid_property
    def is_refused(self) -> bool:
        """Whether the device will not apply the newest desired version; in SQL, served by a partial index."""
        return self.refused_version is not None and self.refused_version == self.desired_version and self.is_pending

    @is_refused.inplace.expression
    @classmethod
    def _is_refused_in_sql(cls) -> ColumnElement[bool]:
        return conditions.refused(cls)

    @hybrid_property
    def delta(self) -> dict[str, Any]:
        """What desired asks and reported lacks, by top-level keys: a copy; see `twin.compute_delta`."""
        # Before the first flush an unset column is None here; the database will make it {} (or 0, for a version).
        return twin.compute_delta(self.desired_state or {}, self.reported_state or {})

    @delta.inplace.expression
    @classmethod
    def _delta_in_sql(cls) -> ColumnElement[dict[str, Any]]:
        return conditions.delta(cls)

    @hybrid_property
    def is_converged(self) -> bool:
        """Whether reported has all that desired asks, at any depth; see `twin.compute_nested_delta`.

        In SQL not beside FOR UPDATE, nor in an UPDATE: where such a statement waits for a row, PostgreSQL may answer
        for the row as it was. Lock the rows first, and ask in a second statement. The same holds for `is_drifted`.
        """
        return not twin.compute_nested_delta(self.desired_state or {}, self.reported_state or {})

    @is_converged.inplace.expression
    @classmethod
    def _is_converged_in_sql(cls) -> ColumnElement[bool]:
        return conditions.converged(cls.desired_state, cls.reported_state)

    @hybrid_property
    def is_drifted(self) -> bool:
        """Whether the device acknowledged the newest version and yet is not converged."""
        return (self.desired_version or 0) == (self.reported_version or 0) and not self.is_converged

    @is_drifted.inplace.expression
    @classmethod
    def _is_drifted_in_sql(cls) -> ColumnElement[bool]:
        return conditions.drifted(cls)

    def __repr__(self) -> str:
        return f"DeviceState(tenant_id={self.tenant_id!r}, device_id={self.device_id!r})"


class ShadowHistory(Base):
    """One desired version of one device: the document, and who wrote it when and why.

    Rows are written with the desired write itself, in its statement, by `ShadowService` and by a flush of a
    `DeviceState`, and are never changed. SQL by hand and ORM bulk statements leave none. They stay when the device is
    removed, until `ShadowService.prune_history` deletes them.

    `desired_state` is NULL for the version that removed the device. `written_at` is NULL where nobody
    knows: the state that a device had before its first recorded write. `actor` and `reason` are NULL where the writer
    gave none. A write with a `request_id` is done once for a device.

    A row whose `desired_version` is negative, and whose `device_id` is empty, is no version: it says up to which
    `transaction_id` versions of the tenant were pruned.
    """

    __tablename__ = "device_shadow_history"

    tenant_id: Mapped[str] = mapped_column(primary_key=True)
    device_id: Mapped[str] = mapped_column(primary_key=True)
    desired_version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    desired_state: Mapped[dict[str, Any] | None] = mapped_column(
        comment="The document of this version. NULL: the device was removed."
    )
    written_at: Mapped[datetime | None] = mapped_column(
        comment="When it was written. NULL: not known, before the first recorded write."
    )
    actor: Mapped[str | None] = mapped_column(comment="Who wrote it.")
    reason: Mapped[str | None] = mapped_column(comment="Why, in the words of the writer.")
    request_id: Mapped[str | None] = mapped_column(comment="The request that this write answered, done once.")
    transaction_id: Mapped[int] = mapped_column(
        BigInteger,
        server_default=text("CAST(CAST(pg_current_xact_id() AS text) AS bigint)"),
        comment="The transaction that wrote it: the order of ShadowService.changes.",
    )

    __table_args__ = (
        # A request is done once for a device, also where it is repeated at the same moment.
        Index(
            "idx_device_shadow_history_request",
            "tenant_id",
            "device_id",
            "request_id",
            unique=True,
            postgresql_where=text("request_id IS NOT NULL"),
        ),
        # The oldest versions of a tenant: ShadowService.prune_history.
        Index("idx_device_shadow_history_written", "tenant_id", "written_at"),
        # The versions of a tenant by the transactions that wrote them: ShadowService.changes.
        Index("idx_device_shadow_history_changes", "tenant_id", "transaction_id", "device_id", "desired_version"),
        {"comment": "The desired documents of device_state, a row for each version. Never changed."},
    )

    def __repr__(self) -> str:
        return (
            f"ShadowHistory(tenant_id={self.tenant_id!r}, device_id={self.device_id!r}, "
            f"desired_version={self.desired_version!r})"
        )


# The table, for Core statements: one costs half of what a statement over the mapped class does.
TABLE: Final = typing.cast("Table", DeviceState.__table__)
# Room in each page, by which a heartbeat stays a HOT update: revision 077 has the measurement. (SQLAlchemy 2.0 has no
# argument for the storage parameters of a table.)
_FILLFACTOR: Final = DDL("ALTER TABLE %(fullname)s SET (fillfactor = 75)")  # type: ignore[no-untyped-call]
event.listen(TABLE, "after_create", _FILLFACTOR)
HISTORY: Final = typing.cast("Table", ShadowHistory.__table__)
# What the migrations make, and no more: a team's class that extends DeviceState adds its columns to TABLE.
DEFINED: Final = TABLE.to_metadata(MetaData(naming_convention=Base.metadata.naming_convention))
HISTORY.to_metadata(DEFINED.metadata)
