"""SQLAlchemy's ORM as it is usually used: load, change, flush."""

from __future__ import annotations

from datetime import datetime  # noqa: TC003 - the mapped classes need it
from typing import TYPE_CHECKING, Any, ClassVar

from fleet_data import DOCUMENT, PATCH, TENANT, Devices, each_timed, engine_of
from sqlalchemy import DateTime, Integer, Text, func
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from iot_models import twin

if TYPE_CHECKING:
    from contextlib import ExitStack

    from fleet_data import Works


class Base(DeclarativeBase):
    pass


class Columns:
    tenant_id: Mapped[str] = mapped_column(Text, primary_key=True)
    device_id: Mapped[str] = mapped_column(Text, primary_key=True)
    desired_state: Mapped[dict[str, Any]] = mapped_column(JSONB)
    reported_state: Mapped[dict[str, Any]] = mapped_column(JSONB)
    desired_version: Mapped[int] = mapped_column(Integer)
    reported_version: Mapped[int] = mapped_column(Integer)
    shadow_updated_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    last_seen_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


class Versioned(Columns, Base):
    """With the ORM's own optimistic lock (`version_id_col`), as a user without this package would write it."""

    __tablename__ = "device_state"
    desired_version: Mapped[int] = mapped_column(Integer)
    __mapper_args__: ClassVar[dict[str, Any]] = {"version_id_col": desired_version}


class OtherBase(DeclarativeBase):
    pass


class Unversioned(Columns, OtherBase):
    """The same without the lock, because a report must not raise the version."""

    __tablename__ = "device_state"


def by_orm(stack: ExitStack, url: str) -> Works:
    engine = engine_of(stack, url)
    devices = Devices("orm")

    def get() -> None:
        with Session(engine) as session:
            assert session.get(Versioned, (TENANT, devices.next()))

    def change(document: dict[str, Any] | None) -> None:
        with Session(engine) as session, session.begin():
            device = session.get_one(Versioned, (TENANT, devices.next()))
            device.desired_state = DOCUMENT | {"turn": device.desired_version} if document is None else document
            device.shadow_updated_at = func.now()

    def patch() -> None:
        with Session(engine) as session, session.begin():
            device = session.get_one(Versioned, (TENANT, devices.next()))
            device.desired_state = twin.merge_patch(device.desired_state, PATCH | {"turn": device.desired_version})
            device.shadow_updated_at = func.now()

    def report() -> None:
        with Session(engine) as session, session.begin():
            device = session.get_one(Unversioned, (TENANT, devices.next()))
            assert device.reported_version <= 2 <= device.desired_version
            device.reported_state = DOCUMENT | {"turn": devices.versions[device.device_id]}
            device.reported_version = 2
            device.last_seen_at = func.now()
            devices.versions[device.device_id] += 1

    return {"ORM, session per write": ("orm", each_timed(get, lambda: change(None), patch, report))}
