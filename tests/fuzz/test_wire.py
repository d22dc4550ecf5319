"""Hostile JSON, ids and tenants over HTTP, through `examples/fastapi_twin.py` as its server would call it."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import pytest
from sqlalchemy import Engine, insert, text

from iot_models import DeviceState
from iot_models._core.equality import json_equal
from tests.databases.alembic_runs import CHECKOUT
from tests.fuzz.corpus.documents import DEVICE_IDS, LOOK_ALIKES
from tests.fuzz.corpus.wire import JSON_TEXTS
from tests.fuzz.judge.entry_points import NEIGHBOUR
from tests.fuzz.judge.expected import DEVICE, sentinel
from tests.reference.documents import storable
from tests.reference.json_values import merge_patch

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.repeats

TENANT = "acm%E9"  # a header carries latin 1: these three are what a header can say
TENANTS = [TENANT, "acm_", "acm% "]
MAX_BODY = 131_072


@dataclass(frozen=True, slots=True)
class Answer:
    """A status, and a body that was read as JSON, which has no NaN."""

    status: int
    body: Any


class App:
    """The application, called in this process: what escapes it is an error here, not a page that says 500."""

    def __init__(self, app: Any, engine: Engine) -> None:
        self._app = app
        self._engine = engine
        self._was = self.rows()

    def call(self, method: str, path: str, headers: dict[str, str], body: bytes = b"") -> Answer:
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(path),
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers.items()],
        }
        asyncio.run(self._app(scope, receive, send))
        content = b"".join(message.get("body", b"") for message in sent)
        return Answer(sent[0]["status"], json.loads(content, parse_constant=_no_json))

    def rows(self) -> dict[tuple[str, str], tuple[Any, ...]]:
        with self._engine.connect() as connection:
            found = connection.execute(text("SELECT tenant_id, device_id, * FROM device_state"))
            return {(row[0], row[1]): tuple(row[2:]) for row in found}

    def undone(self) -> dict[tuple[str, str], tuple[Any, ...]]:
        """The rows that were changed since the beginning, as they are; put back as they were."""
        changed = {key: row for key, row in self.rows().items() if row != self._was[key]}
        if changed:
            with self._engine.begin() as connection:
                # The history too: a row that is behind it goes on above it.
                connection.execute(text("TRUNCATE device_state, device_shadow_history"))
                connection.execute(text("INSERT INTO device_state SELECT * FROM was"))
        return changed


def _no_json(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


@pytest.fixture
def app(own_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[App]:
    monkeypatch.setenv("IOT_MODELS_DATABASE_URL", own_engine.url.render_as_string(hide_password=False))
    spec = importlib.util.spec_from_file_location("fastapi_twin_fuzzed", CHECKOUT / "examples" / "fastapi_twin.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # FastAPI looks up annotations there
    spec.loader.exec_module(module)
    with own_engine.begin() as connection:
        rows = [
            {
                "tenant_id": tenant,
                "site_id": "berlin",
                "device_id": device,
                "desired_state": sentinel(tenant, device),
                "reported_state": sentinel(tenant, device),
            }
            for tenant in TENANTS
            for device in [DEVICE, NEIGHBOUR, *(set(LOOK_ALIKES.values()) - {DEVICE})]
        ]
        connection.execute(insert(DeviceState), rows)
        connection.execute(text("CREATE TABLE was AS TABLE device_state"))
    yield App(module.app, own_engine)
    module.engine.dispose()


def _as_meant(body: bytes) -> Any:
    """The document, if the text is one that says what it means; else None."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError
        return dict(pairs)

    try:
        return json.loads(body, object_pairs_hook=once)
    except (ValueError, RecursionError):
        return None


def test_json_is_stored_as_it_was_meant_or_refused(app: App) -> None:
    headers = {"x-tenant-id": TENANT, "x-device-id": DEVICE, "if-match": "*"}
    for name, body in JSON_TEXTS.items():
        report = b'{"reported": ' + body + b"}"
        patched, reported = _as_meant(body), _as_meant(report)
        if storable(patched, max_bytes=float("inf")):
            patched = merge_patch(sentinel(TENANT, DEVICE), patched)
        answer = app.call("PATCH", f"/devices/{DEVICE}/twin/desired", headers, body)
        _check(app, f"PATCH {name}", answer, "desired", patched if len(body) <= MAX_BODY else None)

        answer = app.call("POST", "/device/v1/shadow/reported", headers, report)
        document = reported["reported"] if isinstance(reported, dict) and len(report) <= MAX_BODY else None
        _check(app, f"POST {name}", answer, "reported", document)


def _check(app: App, name: str, answer: Answer, section: str, wanted: Any) -> None:
    changed = app.undone()
    if storable(wanted):
        assert (name, answer.status, list(changed)) == (name, 200, [(TENANT, DEVICE)])
        assert json_equal(answer.body[section], wanted), f"{name}: {answer.body}"
    else:
        assert (name, answer.status in {400, 413}, changed) == (name, True, {})
        assert answer.body.keys() >= {"error", "message"}


def test_an_id_in_a_path_shows_the_tenants_own_device_or_none(app: App) -> None:
    for name, device_id in DEVICE_IDS.items():
        path = f"/devices/{quote(device_id, safe='', errors='surrogatepass')}/twin"
        for tenant in TENANTS:
            answer = app.call("GET", path, {"x-tenant-id": tenant})
            if device_id in LOOK_ALIKES.values():
                assert (name, answer.status, answer.body.get("desired")) == (name, 200, sentinel(tenant, device_id))
            else:
                assert (name, answer.status) == (name, 404)
    assert not app.undone()
