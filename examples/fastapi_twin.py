"""Device twins over HTTP: operators write the desired document, devices report theirs. Copy it and adapt it.

    export IOT_MODELS_DATABASE_URL=postgresql://user:password@host:5432/database
    uvicorn --app-dir examples fastapi_twin:app

The ETag is `desired_version`, for If-Match. A report changes the twin but not its ETag: do not use it to answer 304.
http://127.0.0.1:8000/docs shows the bodies, answers and errors.
"""

import json
import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy import exc
from sqlalchemy.orm import Session
from starlette.requests import ClientDisconnect

from iot_models import DocumentTooLarge, InvalidDocument, IotModelsError, Shadow, ShadowService, VersionConflict
from iot_models.engine import create_engine
from iot_models.twin import SyncStatus

# A request that waits for a locked row holds a thread and a connection, which other tenants need: it waits for a short
# time, then it is answered with 503. Forty connections, because FastAPI has forty threads.
engine = create_engine(
    application_name="fastapi_twin", lock_timeout=timedelta(seconds=2), pool_size=10, max_overflow=30, pool_timeout=2
)
BUSY = {"40P01": "deadlock", "55P03": "lock_timeout", "57014": "statement_timeout"}
MAX_BODY = 131_072  # bytes on the wire: room for a document of 32 KiB with indentation and \u escapes


def each_header_once(request: Request) -> None:
    # A proxy that adds its X-Tenant-Id to the one that the client sent, instead of replacing it, leaves open who asks.
    for name in ("X-Tenant-Id", "X-Device-Id", "If-Match"):
        if len(request.headers.getlist(name)) > 1:
            raise HTTPException(400, f"{name} must be there once")


app = FastAPI(title="Device twins", dependencies=[Depends(each_header_once)])


# REAL AUTHENTICATION GOES HERE, in the next two functions: take the tenant from the operator's verified token, and the
# tenant and the device from the device's certificate or key. As they are here, they trust the headers: only a proxy
# that authenticates, and sets these headers itself, may reach this application.
def tenant(x_tenant_id: Annotated[str, Header(alias="X-Tenant-Id")] = "") -> str:
    if not x_tenant_id:
        raise HTTPException(401, "X-Tenant-Id is missing")
    return x_tenant_id


def device(x_device_id: Annotated[str, Header(alias="X-Device-Id")] = "") -> str:
    if not x_device_id:
        raise HTTPException(401, "X-Device-Id is missing")
    return x_device_id


def shadows(tenant_id: Annotated[str, Depends(tenant)]) -> Iterator[ShadowService]:
    with Session(engine) as session, session.begin():
        yield ShadowService(session, tenant_id)


def expected_version(if_match: Annotated[str, Header(alias="If-Match")] = "") -> int | None:
    tag = re.fullmatch(r'\*|(")?(0|[1-9][0-9]{0,17})(?(1)")', if_match)  # 7 is not what HTTP says, but it is clear
    if not tag:
        raise HTTPException(400 if if_match else 428, 'send the ETag that you read as If-Match: "7", or * for any')
    return int(tag[2]) if tag[2] else None


async def json_body(request: Request) -> Any:
    raw = bytearray()
    try:
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > MAX_BODY:
                raise DocumentTooLarge("", f"the body has more than {MAX_BODY:,} bytes")
        return json.loads(raw, object_pairs_hook=_each_key_once)
    except InvalidDocument:
        raise
    except (ClientDisconnect, RecursionError, ValueError) as error:
        raise InvalidDocument("", f"the body cannot be read as JSON: {error}") from error


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise InvalidDocument("", f"an object has the same key twice, among {list(dict(pairs))[:5]}")
    return dict(pairs)


# One transaction per request. scope="function" commits it before the response is sent: a 200 means that it is stored.
Shadows = Annotated[ShadowService, Depends(shadows, scope="function")]
DeviceId = Annotated[str, Depends(device)]
Version = Annotated[int | None, Depends(expected_version)]
Body = Annotated[Any, Depends(json_body)]


# What /docs and /openapi.json show. The answers are made below, and not checked against these a second time.
class Twin(BaseModel):
    """A device, as it should be and as it reports itself."""

    device_id: str
    desired: dict[str, Any]
    reported: dict[str, Any]
    delta: dict[str, Any]
    is_converged: bool
    desired_version: int
    reported_version: int
    sync_status: SyncStatus
    shadow_updated_at: datetime | None


class Delta(BaseModel):
    """What the device has not done yet."""

    device_id: str
    delta: dict[str, Any]
    desired_version: int
    reported_version: int
    explanation: str


class Report(BaseModel):
    """What the device is now, and the desired_version that it applied, or ack_if_converged where it knows none."""

    reported: dict[str, Any]
    acked_version: int | None = None
    ack_if_converged: bool = False


class Refused(BaseModel, extra="allow"):
    """An error, with its attributes beside its name: an InvalidDocument has `path` and `reason`."""

    error: str
    message: str


class HeaderRefused(BaseModel):
    """A header that is missing, or that cannot be understood."""

    detail: str


ETAG = {"ETag": {"description": "desired_version", "schema": {"type": "string"}, "example": '"7"'}}
RETRY_AFTER = {"Retry-After": {"description": "in seconds", "schema": {"type": "integer"}, "example": 1}}
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "A header or the body is not valid", "model": Refused | HeaderRefused},
    401: {"description": "X-Tenant-Id or X-Device-Id is missing", "model": HeaderRefused},
    404: {"description": "The tenant has no such device", "model": Refused},
    503: {"description": "The device is being written; try again", "model": Refused, "headers": RETRY_AFTER},
    "default": {"description": "An error of the server, in plain text"},
}
TOO_LARGE = {413: {"description": "The document is too large", "model": Refused}}
READ = ERRORS | {200: {"description": "The twin", "model": Twin, "headers": ETAG}}
READ_DELTA = ERRORS | {200: {"description": "What reported lacks", "model": Delta, "headers": ETAG}}
REPORT = READ | TOO_LARGE | {409: {"description": "An older report came late: drop it", "model": Refused}}
PATCH = (
    READ
    | TOO_LARGE
    | {
        409: {"description": "If-Match is not the current ETag, which is sent", "model": Refused, "headers": ETAG},
        428: {"description": "If-Match is missing", "model": HeaderRefused},
    }
)


def body(example: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}}


PATCH_BODY = body({"target_c": 21.5, "mode": None}, {"type": "object", "title": "RFC 7396 merge patch: null removes"})
REPORT_BODY = body({"reported": {"target_c": 21.5}, "acked_version": 7}, Report.model_json_schema())


def twin(shadow: Shadow) -> Response:
    return JSONResponse(shadow.to_dict(), headers={"ETag": shadow.etag})


@app.exception_handler(IotModelsError)
def refused(_: Request, error: IotModelsError) -> Response:
    body = json.dumps({"error": type(error).__name__, "message": str(error), **vars(error)}, default=str)
    headers = {"ETag": f'"{error.actual}"'} if isinstance(error, VersionConflict) else None
    return Response(body, error.http_status, headers, "application/json")


@app.exception_handler(exc.DBAPIError)
@app.exception_handler(exc.TimeoutError)  # the pool's: all its connections are in use
def busy(_: Request, error: exc.SQLAlchemyError) -> Response:
    if isinstance(error, exc.DBAPIError) and getattr(error.orig, "sqlstate", None) not in BUSY:
        raise error
    body = {"error": "Busy", "message": "the device or the database is busy, and nothing was written: try again"}
    return JSONResponse(body, 503, {"Retry-After": "1"})


@app.get("/devices/{device_id}/twin", responses=READ)
def read_twin(shadows: Shadows, device_id: str) -> Response:
    return twin(shadows.get(device_id))


def refuse_wrapped(patch: Any) -> None:
    # Other APIs wrap the document. Stored as it was sent, it would be too deep, and no device would find its keys. If
    # your documents have an object of this name, take this out.
    for pointer in ("/desired", "/state/desired", "/properties/desired"):
        inner = patch
        for key in pointer[1:].split("/"):
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            raise InvalidDocument(pointer, 'send the patch itself, as in {"target_c": 21.5}, and not wrapped')


@app.patch("/devices/{device_id}/twin/desired", responses=PATCH, openapi_extra=PATCH_BODY)
def patch_desired(shadows: Shadows, device_id: str, version: Version, patch: Body) -> Response:
    refuse_wrapped(patch)
    return twin(shadows.patch_desired(device_id, patch, expected_version=version))


@app.get("/devices/{device_id}/twin/delta", responses=READ_DELTA)
def read_delta(shadows: Shadows, device_id: str) -> Response:
    shadow = shadows.get(device_id)
    answer = {name: shadow.to_dict()[name] for name in ("device_id", "delta", "desired_version", "reported_version")}
    return JSONResponse(answer | {"explanation": shadow.explain()}, headers={"ETag": shadow.etag})


@app.get("/device/v1/shadow", responses=READ)
def read_own_shadow(shadows: Shadows, device_id: DeviceId) -> Response:
    return twin(shadows.get(device_id))


@app.post("/device/v1/shadow/reported", responses=REPORT, openapi_extra=REPORT_BODY)
def report(shadows: Shadows, device_id: DeviceId, body: Body) -> Response:
    if not isinstance(body, dict) or not {"reported"} <= body.keys() <= Report.model_fields.keys():
        raise InvalidDocument("", 'a report is {"reported": {...}, "acked_version": 7}; the version is optional')
    acked, if_converged = body.get("acked_version"), body.get("ack_if_converged", False)
    if acked is not None and (type(acked) is not int or not 0 <= acked < 2**63):
        raise InvalidDocument("/acked_version", "must be the desired_version that was applied, an integer")
    if type(if_converged) is not bool or (if_converged and acked is not None):
        raise InvalidDocument("/ack_if_converged", "must be true or false, and not true beside an acked_version")
    return twin(
        shadows.replace_reported(device_id, body["reported"], acked_version=acked, ack_if_converged=if_converged)
    )
