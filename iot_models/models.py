"""The table `device_state`, as revision 076 leaves it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import TIMESTAMP, Index, Integer, MetaData, Text, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


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

    `status` is `ONLINE`, `STALE` or `OFFLINE`. The shadow's columns are written by `ShadowService`.
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
    desired_state: Mapped[dict[str, Any]] = mapped_column(
        server_default=text("'{}'"), comment="Operator intent. What the device should be configured as."
    )
    reported_state: Mapped[dict[str, Any]] = mapped_column(
        server_default=text("'{}'"), comment="Device-reported actual state. Set by device via MQTT or HTTP."
    )
    desired_version: Mapped[int] = mapped_column(
        server_default=text("0"), comment="Monotonically increasing. Increments on every desired_state write."
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
        # Devices that have not acknowledged the newest desired version: ShadowService.pending and count_pending.
        Index(
            "idx_device_state_shadow_pending",
            "tenant_id",
            postgresql_where=text("desired_version > reported_version"),
        ),
    )

    def __repr__(self) -> str:
        return f"DeviceState(tenant_id={self.tenant_id!r}, device_id={self.device_id!r})"
