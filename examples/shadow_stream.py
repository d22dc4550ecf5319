"""A browser follows a device: its shadow at once, and again whenever desired or reported has changed.

    export IOT_MODELS_DATABASE_URL=postgresql://user:password@host:5432/database
    uvicorn --app-dir examples --timeout-graceful-shutdown 1 shadow_stream:app

    new EventSource("/devices/thermostat-1/events").addEventListener("shadow", event => show(JSON.parse(event.data)))

No browser holds a connection of the pool: once a second one statement for each tenant reads all devices that are being
followed, whoever follows them, in however many windows. Reports notify nobody, so that listening would miss them. An
event is the whole shadow: a browser that is slow, or comes back, gets the newest one and needs none in between.
"""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Annotated

from fastapi import Depends, FastAPI, Header, HTTPException, Request
from fastapi.responses import StreamingResponse
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from iot_models import AsyncShadowService
from iot_models.engine import create_async_engine

PERIOD, HEARTBEAT = 1.0, 15.0  # seconds; seconds, less than a proxy's patience
MOST, EACH = 1000, 100  # browsers at once; and of one tenant, which so leaves room for others
engine = create_async_engine(
    application_name="shadow_stream", statement_timeout=timedelta(seconds=5), pool_size=2, pool_timeout=5
)
log = logging.getLogger("uvicorn.error")


class Followed:
    """A device that is being followed: by how many, its newest shadow as an event, and what wakes them."""

    def __init__(self, event: str) -> None:
        self.event, self.followers, self.changed = event, 0, asyncio.Event()


followed: dict[tuple[str, str], Followed] = {}
browsers = Counter[str]()  # by tenant, from the first moment of a request on


async def read(tenant_id: str, device_ids: Iterable[str]) -> dict[str, str]:
    async with AsyncSession(engine) as session:
        shadows = await AsyncShadowService(session, tenant_id).get_many(device_ids)
    events = {}
    for device_id, shadow in shadows.items():
        # sync_status changes with the time alone. Line breaks inside of strings are \n in JSON: one line is one event.
        body = {name: value for name, value in shadow.to_dict().items() if name != "sync_status"}
        events[device_id] = f"event: shadow\ndata: {json.dumps(body)}\n\n"
    return events


async def poll() -> None:
    was_read = True
    while True:
        await asyncio.sleep(PERIOD)
        try:
            for tenant_id in {tenant_id for tenant_id, _ in followed}:
                ids = [device_id for owner, device_id in followed if owner == tenant_id]
                events = await read(tenant_id, ids)
                for device_id in ids:
                    device = followed.get((tenant_id, device_id))
                    event = events.get(device_id, "event: removed\ndata: {}\n\n")
                    if device and device.event != event:
                        device.event = event
                        device.changed.set()
                        device.changed = asyncio.Event()
            was_read = True
        except (SQLAlchemyError, OSError) as error:
            if was_read:
                log.warning("shadows are not read, until the database answers: %s", str(error).partition("\n")[0])
            was_read = False


@asynccontextmanager
async def polling(_: FastAPI) -> AsyncIterator[None]:
    task = asyncio.create_task(poll())
    yield
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    await engine.dispose()


ONCE = ("X-Tenant-Id",)


def each_header_once(request: Request) -> None:
    # A proxy that adds its X-Tenant-Id to the one that the client sent, instead of replacing it, leaves open who asks.
    for name in ONCE:
        if len(request.headers.getlist(name)) > 1:
            raise HTTPException(400, f"{name} must be there once")


app = FastAPI(title="Device shadows, live", lifespan=polling, dependencies=[Depends(each_header_once)])


# REAL AUTHENTICATION GOES HERE: EventSource sends cookies and no headers of one's own, so take the tenant from the
# session's cookie. As it is here, only a proxy that authenticates, and sets this header itself, may reach it.
def tenant(x_tenant_id: Annotated[str, Header(alias="X-Tenant-Id")] = "") -> str:
    if not x_tenant_id:
        raise HTTPException(401, "X-Tenant-Id is missing")
    return x_tenant_id


async def place(tenant_id: Annotated[str, Depends(tenant)]) -> AsyncIterator[None]:
    browsers[tenant_id] += 1
    try:
        if browsers[tenant_id] > EACH or browsers.total() > MOST:
            raise HTTPException(503, "too many browsers follow devices: try again later", {"Retry-After": "60"})
        yield  # until the stream ends, however it does
    finally:
        browsers[tenant_id] -= 1
        if not browsers[tenant_id]:
            del browsers[tenant_id]


@app.get("/devices/{device_id}/events", dependencies=[Depends(place)])
async def events(request: Request, device_id: str, tenant_id: Annotated[str, Depends(tenant)]) -> StreamingResponse:
    key = (tenant_id, device_id)
    try:
        first = followed[key].event if key in followed else (await read(tenant_id, [device_id])).get(device_id)
    except (SQLAlchemyError, OSError) as error:
        raise HTTPException(503, "the database does not answer: try again", {"Retry-After": "5"}) from error
    if first is None:
        raise HTTPException(404, "the tenant has no such device")
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would collect events before it sends
    return StreamingResponse(follow(request, key, first), 200, headers, "text/event-stream")


async def follow(request: Request, key: tuple[str, str], first: str) -> AsyncIterator[str]:
    device = followed.setdefault(key, Followed(first))
    device.followers += 1
    try:
        yield (sent := device.event)
        while not await request.is_disconnected():
            changed = device.changed
            if device.event == sent:
                with suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), HEARTBEAT)
            if device.event == sent:
                yield ": still here\n\n"
            else:
                sent = device.event
                yield sent
    finally:
        device.followers -= 1
        if not device.followers:
            del followed[key]
