"""The application's own tables, on its own Base with its own naming convention."""

from sqlalchemy import ForeignKey, ForeignKeyConstraint, Identity, MetaData, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from iot_models import DeviceState


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ix": "ix_%(column_0_label)s",
        }
    )
    type_annotation_map = {str: Text}


class Plant(Base):
    __tablename__ = "plant"

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


class Machine(Base):
    __tablename__ = "machine"

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    plant_id: Mapped[int] = mapped_column(ForeignKey("plant.id"))
    tenant_id: Mapped[str]
    device_id: Mapped[str]

    plant: Mapped[Plant] = relationship()
    # The class, and its attributes below, and not their names, which would be looked up in this Base.
    device: Mapped[DeviceState] = relationship(DeviceState)
    orders: Mapped[list["MachineOrder"]] = relationship(back_populates="machine", order_by="MachineOrder.id")

    __table_args__ = (
        UniqueConstraint("tenant_id", "device_id"),
        ForeignKeyConstraint(["tenant_id", "device_id"], [DeviceState.tenant_id, DeviceState.device_id]),
    )


class MachineOrder(Base):
    __tablename__ = "machine_order"

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    machine_id: Mapped[int] = mapped_column(ForeignKey("machine.id"), index=True)
    product: Mapped[str]
    quantity: Mapped[int]
    desired_version: Mapped[int]
    """The version of the machine's shadow that asks for this order."""

    machine: Mapped[Machine] = relationship(back_populates="orders")
