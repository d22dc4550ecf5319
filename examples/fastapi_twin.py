"""Device twins over HTTP: operators write the desired document, devices report theirs. Copy it and adapt it.

    export IOT_MODELS_DATABASE_URL=postgresql://user:password@host:5432/database
    uvicorn --app-dir examples fastapi_twin:app

The ETag is `desired_version`, for If-Match. A report changes the twin but not its ETag: do not use it to answer 304.
A client that got no answer sends its write again, with the same Idempotency-Key: it is written once.
http://127.0.0.1:8000/docs shows the bodies, answers and errors.
"""

import json
import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, StringConstraints, ValidationError
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
TEXT = r"^[^\x00]*\w[^\x00]*$"  # a letter or a digit, and no zero character: PostgreSQL stores none
Id = Annotated[str, StringConstraints(max_length=255, pattern=TEXT)]
Words = Annotated[str, StringConstraints(max_length=1000, pattern=TEXT)]


ONCE = ("X-Tenant-Id", "X-User", "X-Device-Id", "If-Match", "Idempotency-Key")


def each_header_once(request: Request) -> None:
    # A proxy that adds its X-Tenant-Id to the one that the client sent, instead of replacing it, leaves open who asks.
    for name in ONCE:
        if len(request.headers.getlist(name)) > 1:
            raise HTTPException(400, f"{name} must be there once")


app = FastAPI(title="Device twins", dependencies=[Depends(each_header_once)])


# REAL AUTHENTICATION GOES HERE, in the next three functions: take the tenant and the user from the operator's login, by
# its verified token, and the tenant and the device from the device's certificate or key. As they are here, they trust
# the headers: only a proxy that authenticates, and sets these headers itself, may reach this application.
def tenant(x_tenant_id: Annotated[str, Header(alias="X-Tenant-Id")] = "") -> str:
    if not x_tenant_id:
        raise HTTPException(401, "X-Tenant-Id is missing")
    return x_tenant_id


def current_user(x_user: Annotated[Id | None, Header(alias="X-User")] = None) -> str | None:
    return x_user  # stands in the history of each desired write; a real service takes it from its login


def device(x_device_id: Annotated[str, Header(alias="X-Device-Id")] = "") -> str:
    if not x_device_id:
        raise HTTPException(401, "X-Device-Id is missing")
    return x_device_id


def shadows(
    tenant_id: Annotated[str, Depends(tenant)], user: Annotated[str | None, Depends(current_user)]
) -> Iterator[ShadowService]:
    with Session(engine) as session, session.begin():
        yield ShadowService(session, tenant_id, actor=user)


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
RequestId = Annotated[Id | None, Header(alias="Idempotency-Key")]
Reason = Annotated[Words | None, Query()]  # in the query, because a header takes few languages


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
    refusal: str | None
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


class DesiredVersion(BaseModel):
    """What the device was to be at one version; who wrote it, when and why. `desired` is null where it was removed."""

    device_id: str
    version: int
    desired: dict[str, Any] | None
    written_at: datetime | None
    actor: str | None
    reason: str | None
    request_id: str | None


class Changes(BaseModel):
    """Desired versions of all devices of the tenant, and where the next ones begin."""

    changes: list[DesiredVersion]
    cursor: str
    held_back_since: datetime | None


class Place(BaseModel):
    """Where a new device is."""

    site_id: Id


class Restore(BaseModel):
    """The desired_version whose document is written again."""

    version: int


class Refusal(BaseModel):
    """The desired_version that the device will not apply, and why."""

    version: int
    reason: Words


class Refused(BaseModel, extra="allow"):
    """An error, with its attributes beside its name: an InvalidDocument has `path` and `reason`."""

    error: str
    message: str


class HeaderRefused(BaseModel):
    """A header, a parameter or a field of the body that is missing, or that cannot be understood."""

    detail: str


ETAG = {"ETag": {"description": "desired_version", "schema": {"type": "string"}, "example": '"7"'}}
RETRY_AFTER = {"Retry-After": {"description": "in seconds", "schema": {"type": "integer"}, "example": 1}}
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "A header, a parameter or the body is not valid", "model": Refused | HeaderRefused},
    401: {"description": "X-Tenant-Id or X-Device-Id is missing", "model": HeaderRefused},
    404: {"description": "The tenant has no such device, or the device no such version", "model": Refused},
    503: {"description": "The device is being written; try again", "model": Refused, "headers": RETRY_AFTER},
    "default": {"description": "An error of the server, in plain text"},
}
TOO_LARGE = {413: {"description": "The document is too large", "model": Refused}}
READ = ERRORS | {200: {"description": "The twin", "model": Twin, "headers": ETAG}}
READ_HISTORY = ERRORS | {200: {"description": "Versions, the newest first", "model": list[DesiredVersion]}}
READ_VERSION = ERRORS | {200: {"description": "The version", "model": DesiredVersion}}
READ_CHANGES = ERRORS | {200: {"description": "Versions, in the order to read them", "model": Changes}}
READ_CHANGES |= {410: {"description": "`after` has expired: read all again, without it", "model": Refused}}
del READ_CHANGES[404]
READ_DELTA = ERRORS | {200: {"description": "What reported lacks", "model": Delta, "headers": ETAG}}
REPORT = READ | TOO_LARGE | {409: {"description": "An older report came late: drop it", "model": Refused}}
CONFLICT = "If-Match is not the current ETag, which is sent; or the Idempotency-Key is of another request, without ETag"
GUARDED: dict[int | str, dict[str, Any]] = {
    409: {"description": CONFLICT, "model": Refused, "headers": ETAG},
    428: {"description": "If-Match is missing", "model": HeaderRefused},
}
WRITE = READ | TOO_LARGE | GUARDED
REGISTER = READ | TOO_LARGE
del REGISTER[404]
REMOVE = ERRORS | GUARDED | {204: {"description": "The device is removed; its history stays"}}


def body(example: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}}


PATCH_BODY = body({"target_c": 21.5, "mode": None}, {"type": "object", "title": "RFC 7396 merge patch: null removes"})
RESTORE_BODY = body({"version": 3}, Restore.model_json_schema())
PLACE_BODY = body({"site_id": "berlin"}, Place.model_json_schema())
REFUSAL_BODY = body({"version": 7, "reason": "mode 'turbo' is not supported"}, Refusal.model_json_schema())
REPORT_BODY = body({"reported": {"target_c": 21.5}, "acked_version": 7}, Report.model_json_schema())


def twin(shadow: Shadow) -> Response:
    return JSONResponse(shadow.to_dict(), headers={"ETag": shadow.etag})


@app.exception_handler(RequestValidationError)  # a header or a parameter
@app.exception_handler(ValidationError)  # a body
def not_understood(_: Request, error: RequestValidationError | ValidationError) -> Response:
    wrong = error.errors()[0]
    return JSONResponse({"detail": f"{' '.join(map(str, wrong['loc'])) or 'body'}: {wrong['msg']}"}, 400)


@app.exception_handler(IotModelsError)
def refused(_: Request, error: IotModelsError) -> Response:
    values = {name: value for name, value in vars(error).items() if not name.startswith("_")}
    body = json.dumps({"error": type(error).__name__, "message": str(error), **values}, default=str)
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


@app.patch("/devices/{device_id}/twin/desired", responses=WRITE, openapi_extra=PATCH_BODY)
def patch_desired(
    shadows: Shadows, device_id: str, version: Version, patch: Body, reason: Reason = None, key: RequestId = None
) -> Response:
    refuse_wrapped(patch)
    return twin(shadows.patch_desired(device_id, patch, expected_version=version, reason=reason, request_id=key))


@app.post("/devices/{device_id}/twin/desired/restore", responses=WRITE, openapi_extra=RESTORE_BODY)
def restore_desired(
    shadows: Shadows, device_id: str, version: Version, body: Body, reason: Reason = None, key: RequestId = None
) -> Response:
    wanted = Restore.model_validate(body, strict=True).version
    return twin(shadows.restore_desired(device_id, wanted, expected_version=version, reason=reason, request_id=key))


@app.get("/devices/{device_id}/twin/desired/history", responses=READ_HISTORY)
def read_history(
    shadows: Shadows, device_id: str, limit: Annotated[int, Query(ge=1, le=100)] = 20, before: int | None = None
) -> Response:
    # The next page is before the last version of this one. A removed device still has its history.
    return JSONResponse([version.to_dict() for version in shadows.history(device_id, limit=limit, before=before)])


@app.get("/devices/{device_id}/twin/desired/versions/{version}", responses=READ_VERSION)
def read_version(shadows: Shadows, device_id: str, version: int) -> Response:
    return JSONResponse(shadows.desired_at(device_id, version).to_dict())


@app.get("/changes", responses=READ_CHANGES)
def read_changes(
    shadows: Shadows, limit: Annotated[int, Query(ge=1, le=100)] = 100, after: str | None = None
) -> Response:
    # A hundred documents of 32 KiB are a body of some megabytes, which stands in memory: more is more pages.
    # The next page is after the cursor of this one. An empty one says: ask again later, with the same cursor.
    return JSONResponse(shadows.changes(after=after, limit=limit).to_dict())


@app.get("/devices/{device_id}/twin/delta", responses=READ_DELTA)
def read_delta(shadows: Shadows, device_id: str) -> Response:
    shadow = shadows.get(device_id)
    answer = {name: shadow.to_dict()[name] for name in ("device_id", "delta", "desired_version", "reported_version")}
    return JSONResponse(answer | {"explanation": shadow.explain()}, headers={"ETag": shadow.etag})


@app.put("/devices/{device_id}", responses=REGISTER, openapi_extra=PLACE_BODY)
def register(shadows: Shadows, device_id: Id, body: Body) -> Response:
    # A device that is there already stays as it is, also at another site: sent twice, the request does no harm.
    return twin(shadows.register(device_id, Place.model_validate(body, strict=True).site_id))


@app.delete("/devices/{device_id}", responses=REMOVE, status_code=204)
def remove(shadows: Shadows, device_id: str, version: Version, reason: Reason = None) -> None:
    shadows.remove(device_id, expected_version=version, reason=reason)


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


@app.post("/device/v1/shadow/refusal", responses=REPORT, openapi_extra=REFUSAL_BODY)
def refuse_desired(shadows: Shadows, device_id: DeviceId, body: Body) -> Response:
    refusal = Refusal.model_validate(body, strict=True)
    return twin(shadows.refuse_desired(device_id, refusal.version, refusal.reason))
