"""The API: an order and the machine's shadow change in one transaction, or neither does."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, PositiveInt
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import joinedload

from fleetapp.models import Machine, MachineOrder, Plant
from iot_models import AsyncShadowService, DeviceState, IotModelsError
from iot_models.engine import create_async_engine


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    engine = create_async_engine(getattr(app.state, "url", None), application_name="fleetapp")
    app.state.sessions = async_sessionmaker(engine, expire_on_commit=False)
    yield
    await engine.dispose()


def one_tenant(request: Request) -> None:
    # A proxy that adds its X-Tenant-Id to the one that the client sent, instead of replacing it, leaves open who asks.
    if len(request.headers.getlist("X-Tenant-Id")) > 1:
        raise HTTPException(400, "X-Tenant-Id must be there once")


app = FastAPI(title="fleetapp", lifespan=lifespan, dependencies=[Depends(one_tenant)])


async def session(request: Request) -> AsyncIterator[AsyncSession]:
    async with request.app.state.sessions.begin() as opened:
        yield opened


# "function": the transaction is committed before the answer is sent.
Session = Annotated[AsyncSession, Depends(session, scope="function")]
# As in examples/fastapi_twin.py: a proxy that authenticates sets it.
Tenant = Annotated[str, Header(alias="X-Tenant-Id")]


class NewMachine(BaseModel):
    plant: str
    device_id: str


class Order(BaseModel):
    product: str
    quantity: PositiveInt


@app.exception_handler(IotModelsError)
async def refused(_: Request, error: IotModelsError) -> JSONResponse:
    return JSONResponse({"error": str(error)}, error.http_status)


@app.post("/machines", status_code=201)
async def add_machine(body: NewMachine, session: Session, tenant: Tenant) -> dict[str, Any]:
    plant = await session.scalar(select(Plant).where(Plant.name == body.plant)) or Plant(name=body.plant)
    device = DeviceState(tenant_id=tenant, device_id=body.device_id, site_id=body.plant)
    machine = Machine(plant=plant, device=device)
    session.add(machine)
    await session.flush()
    return {"id": machine.id}


@app.post("/machines/{machine_id}/orders", status_code=201)
async def order(machine_id: int, body: Order, session: Session, tenant: Tenant) -> dict[str, Any]:
    machine = await find(session, tenant, machine_id)
    shadow = await AsyncShadowService(session, tenant).patch_desired(machine.device_id, {"order": body.model_dump()})
    session.add(MachineOrder(machine=machine, desired_version=shadow.desired_version, **body.model_dump()))
    return {"desired_version": shadow.desired_version, "delta": shadow.delta}


@app.get("/machines/{machine_id}")
async def show(machine_id: int, session: Session, tenant: Tenant) -> dict[str, Any]:
    machine = await find(session, tenant, machine_id)
    orders = await session.scalars(
        select(MachineOrder).where(MachineOrder.machine == machine).order_by(MachineOrder.id)
    )
    return {
        "plant": machine.plant.name,
        "is_pending": machine.device.is_pending,
        "orders": [[order.product, order.quantity, order.desired_version] for order in orders],
    }


async def find(session: AsyncSession, tenant: str, machine_id: int) -> Machine:
    machine = await session.scalar(
        select(Machine)
        .where(Machine.id == machine_id, Machine.tenant_id == tenant)
        .options(joinedload(Machine.plant), joinedload(Machine.device))
    )
    if machine is None:
        raise HTTPException(404, f"no machine {machine_id}")
    return machine
