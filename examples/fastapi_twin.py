"""Device twins over HTTP: operators write the desired document, devices report theirs. Copy it and adapt it.

    export IOT_MODELS_DATABASE_URL=postgresql://user:password@host:5432/database
    uvicorn --app-dir examples fastapi_twin:app

The ETag is `desired_version`, for If-Match. A report changes the twin but not its ETag: do not use it to answer 304.
"""

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session
from starlette.requests import ClientDisconnect

from iot_models import DocumentTooLarge, InvalidDocument, IotModelsError, Shadow, ShadowService, VersionConflict
from iot_models.engine import create_engine

app = FastAPI(title="Device twins")
engine = create_engine(application_name="fastapi_twin")
MAX_BODY = 131_072  # bytes on the wire: room for a document of 32 KiB with indentation and \u escapes


# REAL AUTHENTICATION GOES HERE, in the next two functions: take the tenant from the operator's verified token, and the
# tenant and the device from the device's certificate or key. As they are here, they trust the headers.
def tenant(x_tenant_id: Annotated[str, Header()] = "") -> str:
    if not x_tenant_id:
        raise HTTPException(401, "X-Tenant-Id is missing")
    return x_tenant_id


def device(x_device_id: Annotated[str, Header()] = "") -> str:
    if not x_device_id:
        raise HTTPException(401, "X-Device-Id is missing")
    return x_device_id


def shadows(tenant_id: Annotated[str, Depends(tenant)]) -> Iterator[ShadowService]:
    with Session(engine) as session, session.begin():
        yield ShadowService(session, tenant_id)


def expected_version(if_match: Annotated[str, Header()] = "") -> int | None:
    tag = re.fullmatch(r'\*|"(0|[1-9][0-9]{0,17})"', if_match)
    if not tag:
        raise HTTPException(400 if if_match else 428, 'send the ETag that you read as If-Match: "7", or * for any')
    return int(tag[1]) if tag[1] else None


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


def twin(shadow: Shadow) -> Response:
    return JSONResponse(shadow.to_dict(), headers={"ETag": shadow.etag})


@app.exception_handler(IotModelsError)
def refused(_: Request, error: IotModelsError) -> Response:
    body = json.dumps({"error": type(error).__name__, "message": str(error), **vars(error)}, default=str)
    headers = {"ETag": f'"{error.actual}"'} if isinstance(error, VersionConflict) else None
    return Response(body, error.http_status, headers, "application/json")


@app.get("/devices/{device_id}/twin")
def read_twin(shadows: Shadows, device_id: str) -> Response:
    return twin(shadows.get(device_id))


@app.patch("/devices/{device_id}/twin/desired")
def patch_desired(shadows: Shadows, device_id: str, version: Version, patch: Body) -> Response:
    return twin(shadows.patch_desired(device_id, patch, expected_version=version))


@app.get("/devices/{device_id}/twin/delta")
def read_delta(shadows: Shadows, device_id: str) -> dict[str, Any]:
    shadow = shadows.get(device_id)
    return {"device_id": device_id, "delta": shadow.delta, "explanation": shadow.explain()}


@app.get("/device/v1/shadow")
def read_own_shadow(shadows: Shadows, device_id: DeviceId) -> Response:
    return twin(shadows.get(device_id))


@app.post("/device/v1/shadow/reported")
def report(shadows: Shadows, device_id: DeviceId, body: Body) -> Response:
    if not isinstance(body, dict) or not {"reported"} <= body.keys() <= {"reported", "acked_version"}:
        raise InvalidDocument("", 'a report is {"reported": {...}, "acked_version": 7}; the version is optional')
    acked = body.get("acked_version")
    if acked is not None and (type(acked) is not int or not 0 <= acked < 2**63):
        raise InvalidDocument("/acked_version", "must be the desired_version that was applied, an integer")
    return twin(shadows.replace_reported(device_id, body["reported"], acked_version=acked))
