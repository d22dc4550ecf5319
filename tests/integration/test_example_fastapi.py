"""`examples/fastapi_twin.py`, started as a user starts it and driven over real HTTP.

One server serves all tests of this file; each test has devices of its own, in tenants of its own.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection
from threading import Barrier
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from sqlalchemy import Engine, NullPool, create_engine, make_url, text
from sqlalchemy.orm import Session

from tests.data.real_documents import CASES
from tests.databases.alembic_runs import CHECKOUT
from tests.databases.devices import add_device
from tests.reference.json_values import equal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from iot_models.testing import PostgresServer

pytestmark = pytest.mark.repeats

EXAMPLE = CHECKOUT / "examples" / "fastapi_twin.py"
START_SECONDS = 30

# What is deferred runs at COMMIT, which so takes a tenth of a second.
SLOW_COMMIT = """
    CREATE FUNCTION slow_commit() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.1); RETURN NULL; END';
    CREATE CONSTRAINT TRIGGER slow_commit AFTER UPDATE ON device_state
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow_commit();
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: the status, the entity tag if there is one, the body, and when to try again."""

    status: int
    etag: str | None
    body: Any
    retry_after: str | None = None

    @property
    def error(self) -> str:
        return f"{self.status} {self.body['error']}"


@dataclass(frozen=True, slots=True)
class Client:
    """Speaks HTTP for one tenant, as an operator or as one of its devices."""

    port: int
    tenant: str
    headers: dict[str, str] = field(default_factory=dict)

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """A `str` or `bytes` is sent as it is, anything else as JSON; `if_match` is the header If-Match."""
        if body is not None and not isinstance(body, (str, bytes)):
            body = json.dumps(body)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=10)) as connection:
            connection.request(method, path, body, {"X-Tenant-Id": self.tenant} | self.headers | named)
            response = connection.getresponse()
            etag, retry_after = response.headers["ETag"], response.headers["Retry-After"]
            return Answer(response.status, etag, json.loads(response.read() or "null"), retry_after)

    def twin(self, device_id: str = "t-1", **headers: str) -> Answer:
        return self.send("GET", f"/devices/{device_id}/twin", **headers)

    def delta(self, device_id: str = "t-1") -> Any:
        return self.send("GET", f"/devices/{device_id}/twin/delta").body["delta"]

    def patch(self, patch: Any, device_id: str = "t-1", query: str = "", **headers: str) -> Answer:
        return self.send("PATCH", f"/devices/{device_id}/twin/desired{query}", patch, **headers)

    def restore(self, body: Any, query: str = "", **headers: str) -> Answer:
        return self.send("POST", f"/devices/t-1/twin/desired/restore{query}", body, **headers)

    def history(self, query: str = "", **headers: str) -> Answer:
        return self.send("GET", f"/devices/t-1/twin/desired/history{query}", **headers)

    def version(self, version: object) -> Answer:
        return self.send("GET", f"/devices/t-1/twin/desired/versions/{version}")

    def register(self, device_id: str, body: Any) -> Answer:
        return self.send("PUT", f"/devices/{device_id}", body)

    def remove(self, query: str = "", **headers: str) -> Answer:
        return self.send("DELETE", f"/devices/t-1{query}", **headers)

    def shadow(self) -> Answer:
        return self.send("GET", "/device/v1/shadow")

    def report(self, body: Any) -> Answer:
        return self.send("POST", "/device/v1/shadow/reported", body)

    def refuse(self, body: Any) -> Answer:
        return self.send("POST", "/device/v1/shadow/refusal", body)

    def device(self, device_id: str = "t-1") -> Client:
        return Client(self.port, self.tenant, {"X-Device-Id": device_id})


@pytest.fixture(scope="module")
def database(server: PostgresServer, migrated_url: str) -> Iterator[Engine]:
    """A migrated database for this file: what the tests write has to be committed."""
    name = f"iot_models_example_{secrets.token_hex(8)}"
    admin = create_engine(server.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {make_url(migrated_url).database}"))
    engine = create_engine(make_url(server.url).set(database=name))
    yield engine
    engine.dispose()
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server says."""
    return tmp_path_factory.mktemp("uvicorn") / "log"


@pytest.fixture(scope="module")
def port(database: Engine, log: Path) -> Iterator[int]:
    """The loopback port of a running uvicorn, which picked it itself."""
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("DATABASE_URL")}
    url = database.url.render_as_string(hide_password=False)
    command = [sys.executable, "-m", "uvicorn", "--app-dir", "examples", "fastapi_twin:app", "--port", "0"]
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command,
            cwd=CHECKOUT,
            env=inherited | {"IOT_MODELS_DATABASE_URL": url},
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as server,
    ):
        try:
            yield _port(server, log)
        finally:
            server.terminate()


def _port(server: subprocess.Popen[bytes], log: Path) -> int:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and server.poll() is None:
        if running := re.search(r"running on http://127\.0\.0\.1:(\d+)", log.read_text()):
            return int(running[1])
        time.sleep(0.01)
    raise AssertionError(f"uvicorn did not start:\n{log.read_text()}")


@pytest.fixture
def operator(port: int, database: Engine, log: Path) -> Iterator[Client]:
    """An operator of a tenant with two devices; no request of the test may make the server stumble."""
    tenant = f"tenant-{secrets.token_hex(4)}"
    with Session(database) as session, session.begin():
        add_device(session, "t-1", tenant_id=tenant)
        add_device(session, "t-2", tenant_id=tenant)
    said = log.stat().st_size
    yield Client(port, tenant)
    assert "Traceback" not in log.read_bytes()[said:].decode()


def test_the_example_is_short_enough_to_be_copied() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 365


def test_a_shadow_lives_its_whole_life_over_http(operator: Client) -> None:
    device = operator.device()

    fresh = operator.twin()
    assert (fresh.status, fresh.etag) == (200, '"0"')
    assert fresh.body["desired"] == fresh.body["reported"] == {}

    wanted = operator.patch({"target_c": 21.5, "mode": "auto"}, if_match=fresh.etag or "")
    assert (wanted.status, wanted.etag) == (200, '"1"')
    assert wanted.body["desired"] == {"target_c": 21.5, "mode": "auto"}
    assert operator.twin() == wanted
    assert operator.delta() == {"target_c": 21.5, "mode": "auto"}

    seen = device.shadow()
    assert (seen.status, seen.etag) == (200, '"1"')
    assert seen.body["delta"] == {"target_c": 21.5, "mode": "auto"}

    halfway = device.report({"reported": {"target_c": 21.5, "temp_c": 18.2}})
    assert (halfway.status, halfway.body["desired_version"], halfway.body["reported_version"]) == (200, 1, 0)
    assert operator.delta() == {"mode": "auto"}

    done = device.report({"reported": {"target_c": 21.5, "mode": "auto"}, "acked_version": 1})
    assert (done.status, done.etag, done.body["reported_version"]) == (200, '"1"', 1)
    assert done.body["reported"] == {"target_c": 21.5, "mode": "auto"}
    assert operator.twin().body["sync_status"] == "synced"
    assert operator.delta() == {}


def test_documents_of_real_kinds_of_devices_travel_over_http(operator: Client, database: Engine) -> None:
    with Session(database) as session, session.begin():
        for case in CASES:
            before = case.desired if case.merge_patch is None else case.reported
            add_device(session, case.id, tenant_id=operator.tenant, desired_state=before)

    for case in CASES:
        in_path = quote(case.id)
        patched = operator.patch(case.merge_patch or {}, in_path, if_match='"0"')
        reported = operator.device(case.id).report({"reported": case.reported, "acked_version": 1})
        twin = operator.twin(in_path)

        assert [answer.status for answer in (patched, reported, twin)] == [200, 200, 200], case.id
        assert patched.etag == reported.etag == twin.etag == '"1"', case.id
        assert equal(patched.body["desired"], case.desired), case.id
        assert equal(twin.body["desired"], case.desired), case.id
        assert equal(twin.body["reported"], case.reported), case.id
        assert equal(twin.body["delta"], case.delta), case.id
        assert equal(operator.delta(in_path), case.delta), case.id
        assert twin.body["reported_version"] == 1, case.id


def test_the_delta_says_in_words_why_the_device_is_out_of_sync(operator: Client) -> None:
    operator.patch({"mode": "eco"}, if_match="*")
    operator.device().report({"reported": {"mode": "auto"}, "acked_version": 1})

    answer = operator.send("GET", "/devices/t-1/twin/delta")

    assert answer.body["explanation"].startswith("t-1 has drifted: version 1 is acknowledged, but 'mode' differs")


def test_the_delta_has_the_versions_that_it_is_about(operator: Client) -> None:
    for _ in range(3):
        operator.patch({"mode": "eco"}, if_match="*")
    operator.device().report({"reported": {}, "acked_version": 2})

    answer = operator.send("GET", "/devices/t-1/twin/delta")

    assert (answer.status, answer.etag, answer.body["delta"]) == (200, '"3"', {"mode": "eco"})
    assert (answer.body["desired_version"], answer.body["reported_version"]) == (3, 2)
    assert operator.patch({"mode": "auto"}, if_match=answer.etag or "").etag == '"4"'


def test_a_patch_removes_what_is_null_and_leaves_what_it_does_not_name(operator: Client) -> None:
    operator.patch({"mode": "auto", "limits": {"min": 5, "max": 30}}, if_match="*")

    patched = operator.patch({"mode": None, "limits": {"max": 25}}, if_match='"1"')

    assert patched.body["desired"] == {"limits": {"min": 5, "max": 25}}


def test_a_patch_without_if_match_is_asked_for_one(operator: Client) -> None:
    assert operator.patch({"mode": "eco"}).status == 428
    assert operator.twin().etag == '"0"'


def test_a_patch_with_an_old_etag_is_a_conflict_that_names_the_current_one(operator: Client) -> None:
    operator.patch({"mode": "auto"}, if_match='"0"')

    late = operator.patch({"mode": "eco"}, if_match='"0"')

    assert (late.error, late.etag) == ("409 VersionConflict", '"1"')
    assert (late.body["device_id"], late.body["expected"], late.body["actual"]) == ("t-1", 0, 1)
    assert "read the shadow again" in late.body["message"]
    assert operator.twin().body["desired"] == {"mode": "auto"}


def test_a_patch_with_an_asterisk_is_written_over_any_version(operator: Client) -> None:
    for version in (1, 2):
        assert operator.patch({"mode": "auto"}, if_match="*").etag == f'"{version}"'


@pytest.mark.parametrize(
    "if_match",
    ['0"', '"0', '"x"', 'W/"0"', '"0", "1"', '"-1"', "-1", '"00"', "00", "0,1", "0x0", '""', '"' + "9" * 30 + '"'],
)
def test_an_if_match_that_is_no_etag_of_ours_is_a_bad_request(operator: Client, if_match: str) -> None:
    assert operator.patch({"mode": "eco"}, if_match=if_match).status == 400
    assert operator.twin().etag == '"0"'


def test_a_bare_version_in_if_match_is_understood_like_the_etag(operator: Client) -> None:
    assert operator.patch({"mode": "auto"}, if_match="0").etag == '"1"'
    assert operator.patch({"mode": "eco"}, if_match="0").error == "409 VersionConflict"
    assert operator.patch({"mode": "eco"}, if_match="1").etag == '"2"'


@pytest.mark.parametrize(
    ("wrapped", "path"),
    [
        ({"desired": {"mode": "eco"}}, "/desired"),
        ({"desired": {"mode": "eco"}, "expected_version": 0}, "/desired"),
        ({"desired": {}}, "/desired"),
        ({"state": {"desired": {"mode": "eco"}}, "version": 3}, "/state/desired"),
        ({"properties": {"desired": {"mode": "eco"}}}, "/properties/desired"),
    ],
    ids=json.dumps,
)
def test_a_document_in_a_wrapper_is_refused_with_what_to_send(operator: Client, wrapped: Any, path: str) -> None:
    answer = operator.patch(wrapped, if_match="*")

    assert (answer.error, answer.body["path"]) == ("400 InvalidDocument", path)
    assert 'send the patch itself, as in {"target_c": 21.5}' in answer.body["message"]
    assert operator.twin().etag == '"0"'


def test_a_key_that_only_looks_like_a_wrapper_is_stored(operator: Client) -> None:
    patch = {"state": "on", "properties": {"colour": "red"}, "desired": None}
    assert operator.patch(patch, if_match="*").body["desired"] == {"state": "on", "properties": {"colour": "red"}}


def test_of_two_racing_patches_with_one_etag_exactly_one_is_written(operator: Client) -> None:
    start = Barrier(2)

    def patch(who: str, etag: str) -> int:
        start.wait()
        return operator.patch({"by": who}, if_match=etag).status

    with ThreadPoolExecutor(2) as pool:
        for version in range(20):
            etag = f'"{version}"'
            assert sorted(pool.map(patch, ("one", "two"), (etag, etag))) == [200, 409]
    assert operator.twin().etag == '"20"'


def test_a_write_is_committed_before_it_is_answered(operator: Client, database: Engine) -> None:
    with database.begin() as connection:
        connection.execute(text(SLOW_COMMIT))

    operator.patch({"mode": "eco"}, "t-2", if_match="*")

    with database.connect() as connection:
        version = text("SELECT desired_version FROM device_state WHERE (tenant_id, device_id) = (:tenant, 't-2')")
        assert connection.scalar(version, {"tenant": operator.tenant}) == 1
    with database.begin() as connection:
        connection.execute(text("DROP FUNCTION slow_commit CASCADE"))


def test_the_history_says_who_wrote_what_and_why(operator: Client) -> None:
    why = "ночью здесь никого нет 🌙"
    operator.patch({"target_c": 21.5}, if_match="*", x_user="anna@example.com")
    operator.patch(
        {"mode": "eco"}, query=f"?reason={quote(why)}", if_match="*", x_user="night-job", idempotency_key="night-1"
    )
    operator.patch({"mode": "auto"}, if_match="*")

    answer = operator.history()

    assert answer.status == 200
    names = ("version", "actor", "reason", "request_id", "desired")
    assert [tuple(version[name] for name in names) for version in answer.body] == [
        (3, None, None, None, {"target_c": 21.5, "mode": "auto"}),
        (2, "night-job", why, "night-1", {"target_c": 21.5, "mode": "eco"}),
        (1, "anna@example.com", None, None, {"target_c": 21.5}),
        (0, None, None, None, {}),
    ]
    assert operator.version(2).body == answer.body[1]


def test_the_history_is_read_page_by_page_the_newest_first(operator: Client) -> None:
    for number in range(5):
        operator.patch({"number": number}, if_match="*")

    first = operator.history("?limit=2").body
    second = operator.history(f"?limit=2&before={first[-1]['version']}").body

    assert [version["version"] for version in first + second] == [5, 4, 3, 2]
    assert operator.history("?before=0").body == []


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=101", "limit=x", "limit=", "before=x", "before=1.5", "before=-1", f"before={2**63}"]
)
def test_a_page_that_cannot_be_is_a_bad_request(operator: Client, query: str) -> None:
    answer = operator.history(f"?{query}")

    assert answer.status == 400
    assert query.partition("=")[0] in answer.body.get("detail", answer.body.get("name"))
    assert not [name for name in answer.body if name.startswith("_")]


def test_a_version_that_is_not_kept_is_not_found_and_the_answer_names_those_that_are(operator: Client) -> None:
    operator.patch({"mode": "eco"}, if_match="*")

    for answer in (operator.version(2), operator.restore({"version": 2}, if_match="*")):
        assert answer.error == "404 VersionNotKept"
        assert (answer.body["version"], answer.body["oldest"], answer.body["newest"]) == (2, 0, 1)
    for version in ("x", "1.5"):
        assert operator.version(version).status == 400
    assert operator.version(2**63).error == "400 InvalidVersion"
    assert operator.twin().etag == '"1"'


def test_the_changes_of_all_devices_are_read_from_cursor_to_cursor(operator: Client, database: Engine) -> None:
    operator.register("t-9", {"site_id": "berlin"})
    operator.patch({"mode": "eco"}, "t-9", if_match="*", x_user="anna")
    until = time.monotonic() + START_SECONDS
    while (first := operator.send("GET", "/changes?limit=1").body)["held_back_since"]:
        assert time.monotonic() < until

    second = operator.send("GET", f"/changes?after={first['cursor']}")

    assert (second.status, [len(page["changes"]) for page in (first, second.body)]) == (200, [1, 1])
    assert second.body["changes"][0] == operator.send("GET", "/devices/t-9/twin/desired/versions/1").body
    assert operator.send("GET", f"/changes?after={second.body['cursor']}").body["changes"] == []
    assert operator.send("GET", "/changes?limit=101").status == 400
    assert operator.send("GET", "/changes?after=x").error == "400 InvalidCursor"
    with database.begin() as connection:
        connection.execute(
            text("DELETE FROM device_shadow_history WHERE tenant_id = :tenant"), {"tenant": operator.tenant}
        )
    assert operator.send("GET", f"/changes?after={first['cursor']}").error == "410 CursorExpired"


def test_a_restore_writes_an_earlier_version_again_as_a_new_one(operator: Client) -> None:
    operator.patch({"target_c": 21.5}, if_match="*")
    operator.patch({"target_c": 5}, if_match="*", x_user="night-job")

    restored = operator.restore({"version": 1}, "?reason=too%20cold", if_match='"2"', x_user="anna")

    assert (restored.status, restored.etag, restored.body["desired"]) == (200, '"3"', {"target_c": 21.5})
    assert operator.twin() == restored
    newest = operator.history("?limit=1").body[0]
    assert (newest["actor"], newest["reason"], newest["desired"]) == ("anna", "too cold", {"target_c": 21.5})


def test_a_restore_is_guarded_like_a_patch(operator: Client) -> None:
    operator.patch({"mode": "eco"}, if_match="*")

    assert operator.restore({"version": 0}).status == 428
    old = operator.restore({"version": 0}, if_match='"0"')
    assert (old.error, old.etag) == ("409 VersionConflict", '"1"')
    assert operator.twin().body["desired"] == {"mode": "eco"}


@pytest.mark.parametrize(
    "body",
    [[], 0, "null", {}, {"version": "0"}, {"version": True}, {"version": 0.0}, {"version": None}],
    ids=json.dumps,
)
def test_what_names_no_version_restores_nothing_and_refuses_nothing(operator: Client, body: Any) -> None:
    refusal = body | {"reason": "too warm"} if isinstance(body, dict) else body

    for answer in (operator.restore(body, if_match="*"), operator.device().refuse(refusal)):
        assert answer.status == 400
        assert ("version" if isinstance(body, dict) else "body") in answer.body["detail"]
    assert operator.twin().etag == '"0"'


def test_a_request_that_is_sent_again_with_its_key_and_its_old_etag_is_written_once(operator: Client) -> None:
    def patch() -> Answer:
        return operator.patch({"target_c": 21.5}, if_match='"0"', idempotency_key="request-1")

    first = patch()
    assert (first.status, first.etag) == (200, '"1"')
    assert patch() == first

    operator.patch({"mode": "eco"}, if_match="*")
    later = patch()

    assert (later.status, later.etag, later.body["desired"]) == (200, '"2"', {"target_c": 21.5, "mode": "eco"})
    assert [version["request_id"] for version in operator.history().body] == [None, "request-1", None]


def test_a_restore_that_is_sent_again_with_its_key_is_written_once(operator: Client) -> None:
    operator.patch({"target_c": 21.5}, if_match="*")

    for _ in range(2):
        restored = operator.restore({"version": 0}, if_match='"1"', idempotency_key="request-1")
        assert (restored.status, restored.etag, restored.body["desired"]) == (200, '"2"', {})


def test_a_request_that_is_sent_twice_at_the_same_moment_is_written_once(operator: Client) -> None:
    start = Barrier(2)

    def patch(key: str) -> int:
        start.wait()
        return operator.patch({"by": key}, if_match="*", idempotency_key=key).status

    with ThreadPoolExecutor(2) as pool:
        for number in range(10):
            key = f"request-{number}"
            assert [*pool.map(patch, (key, key))] == [200, 200]
    assert operator.twin().etag == '"10"'


def test_the_key_of_another_request_is_a_conflict_and_another_device_has_keys_of_its_own(operator: Client) -> None:
    operator.patch({"target_c": 21.5}, if_match="*", idempotency_key="request-1")

    reused = operator.patch({"target_c": 30}, if_match="*", idempotency_key="request-1")

    assert (reused.error, reused.etag) == ("409 RequestReused", None)
    assert (reused.body["request_id"], reused.body["version"]) == ("request-1", 1)
    assert operator.restore({"version": 0}, if_match="*", idempotency_key="request-1").error == "409 RequestReused"
    assert operator.twin().body["desired"] == {"target_c": 21.5}
    assert operator.patch({"target_c": 30}, "t-2", if_match="*", idempotency_key="request-1").etag == '"1"'


@pytest.mark.parametrize("name", ["Idempotency-Key", "X-User"])
@pytest.mark.parametrize("value", ["", "   ", "\xa0", "x" * 256], ids=ascii)
def test_a_key_or_a_user_that_cannot_be_kept_is_a_bad_request(operator: Client, name: str, value: str) -> None:
    answer = operator.patch({"mode": "eco"}, if_match="*", **{name: value})

    assert answer.status == 400
    assert name in answer.body["detail"]
    assert operator.twin().etag == '"0"'


@pytest.mark.parametrize("reason", ["", "%20", "a%00b", "%1c", "x" * 1001], ids=lambda reason: reason[:5])
def test_a_reason_that_cannot_be_kept_is_a_bad_request(operator: Client, reason: str) -> None:
    for answer in (
        operator.patch({"mode": "eco"}, query=f"?reason={reason}", if_match="*"),
        operator.restore({"version": 0}, f"?reason={reason}", if_match="*"),
        operator.remove(f"?reason={reason}", if_match="*"),
    ):
        assert answer.status == 400
        assert "reason" in answer.body["detail"]
    assert operator.twin().etag == '"0"'


def test_a_device_that_refuses_says_why_until_something_else_is_desired(operator: Client) -> None:
    operator.patch({"mode": "turbo"}, if_match="*")

    refused = operator.device().refuse({"version": 1, "reason": "mode 'turbo' is not supported"})

    assert (refused.status, refused.etag, refused.body["sync_status"]) == (200, '"1"', "pending")
    assert operator.twin().body["refusal"] == "mode 'turbo' is not supported"
    assert "version 1 is refused" in operator.send("GET", "/devices/t-1/twin/delta").body["explanation"]
    assert operator.patch({"mode": "eco"}, if_match='"1"').body["refusal"] is None


def test_a_refusal_that_comes_late_is_a_conflict_and_one_of_a_version_to_come_a_bad_request(operator: Client) -> None:
    device = operator.device()
    operator.patch({"mode": "turbo"}, if_match="*")
    operator.patch({"mode": "eco"}, if_match="*")

    late = device.refuse({"version": 1, "reason": "mode 'turbo' is not supported"})
    assert (late.error, late.body["acked"], late.body["current"]) == ("409 LateReport", 1, 2)

    device.report({"reported": {"mode": "eco"}, "acked_version": 2})
    assert device.refuse({"version": 2, "reason": "too late"}).error == "409 LateReport"
    assert device.refuse({"version": 3, "reason": "too early"}).error == "400 UnknownVersion"
    assert operator.twin().body["refusal"] is None


@pytest.mark.parametrize("reason", ["", " ", "\0", "\ud83d", "x" * 1001, None, 7, ["x"]], ids=lambda it: ascii(it)[:9])
def test_a_refusal_without_words_is_a_bad_request(operator: Client, reason: Any) -> None:
    operator.patch({"mode": "turbo"}, if_match="*")

    answer = operator.device().refuse({"version": 1, "reason": reason})

    assert answer.status == 400
    assert answer.body["detail"].startswith("reason: ")
    assert operator.twin().body["refusal"] is None


def test_a_device_is_registered_once_however_often_it_is_asked(operator: Client) -> None:
    registered = operator.register("t-3", {"site_id": "berlin"})

    assert (registered.status, registered.etag, registered.body["desired"]) == (200, '"0"', {})
    operator.patch({"mode": "eco"}, "t-3", if_match='"0"')
    again = operator.register("t-3", {"site_id": "berlin"})
    assert (again.status, again.etag, again.body["desired"]) == (200, '"1"', {"mode": "eco"})
    assert Client(operator.port, "stranger").twin("t-3").status == 404


@pytest.mark.parametrize(
    "body", [{}, [], {"site_id": ""}, {"site_id": None}, {"site_id": "\0"}, {"site_id": "x" * 256}]
)
def test_a_device_without_a_place_is_not_registered(operator: Client, body: Any) -> None:
    assert operator.register("t-3", body).status == 400
    assert operator.twin("t-3").status == 404


@pytest.mark.parametrize("device_id", ["%00", "%20", "x" * 256], ids=lambda device_id: device_id[:5])
def test_a_device_that_no_row_can_carry_is_not_registered(operator: Client, device_id: str) -> None:
    answer = operator.register(device_id, {"site_id": "berlin"})

    assert answer.status == 400
    assert "device_id" in answer.body["detail"]


def test_a_removed_device_is_gone_and_its_history_ends_with_who_removed_it(operator: Client) -> None:
    operator.patch({"mode": "eco"}, if_match="*")

    removed = operator.remove("?reason=sold", if_match='"1"', x_user="anna")

    assert (removed.status, removed.body) == (204, None)
    for answer in (operator.twin(), operator.device().shadow(), operator.remove(if_match="*")):
        assert answer.error == "404 DeviceNotFound"
    newest, before, *_ = operator.history().body
    assert (newest["version"], newest["desired"], newest["actor"], newest["reason"]) == (2, None, "anna", "sold")
    assert (before["version"], before["desired"]) == (1, {"mode": "eco"})


def test_a_removal_is_guarded_like_a_patch(operator: Client) -> None:
    operator.patch({"mode": "eco"}, if_match="*")

    assert operator.remove().status == 428
    old = operator.remove(if_match='"0"')
    assert (old.error, old.etag) == ("409 VersionConflict", '"1"')
    assert operator.twin().etag == '"1"'


def test_a_device_that_comes_back_goes_on_at_its_version_and_no_old_etag_fits(operator: Client) -> None:
    operator.patch({"mode": "eco"}, if_match="*")
    operator.remove(if_match="*")

    back = operator.register("t-1", {"site_id": "berlin"})

    assert (back.status, back.etag, back.body["desired"], back.body["delta"]) == (200, '"2"', {}, {})
    assert operator.patch({"mode": "auto"}, if_match='"1"').error == "409 VersionConflict"
    assert operator.restore({"version": 1}, if_match='"2"').body["desired"] == {"mode": "eco"}


def test_a_report_that_comes_late_never_overwrites_newer_state(operator: Client) -> None:
    device = operator.device()
    operator.patch({"mode": "eco"}, if_match="*")
    operator.patch({"mode": "auto"}, if_match="*")
    device.report({"reported": {"mode": "auto"}, "acked_version": 2})

    late = device.report({"reported": {"mode": "eco"}, "acked_version": 1})

    assert (late.error, late.body["acked"], late.body["current"]) == ("409 LateReport", 1, 2)
    assert operator.twin().body["reported"] == {"mode": "auto"}


def test_a_report_of_a_version_that_was_never_asked_is_a_bad_request(operator: Client) -> None:
    unknown = operator.device().report({"reported": {"mode": "eco"}, "acked_version": 7})

    assert (unknown.error, unknown.body["acked"], unknown.body["desired"]) == ("400 UnknownVersion", 7, 0)
    assert operator.twin().body["reported"] == {}


def test_a_reader_with_the_current_etag_still_sees_what_the_device_reported_since(operator: Client) -> None:
    etag = operator.twin().etag
    assert etag
    operator.device().report({"reported": {"temp_c": 18.2}})

    again = operator.twin(if_none_match=etag)

    assert (again.status, again.etag, again.body["reported"]) == (200, etag, {"temp_c": 18.2})


def test_a_device_reads_and_writes_no_shadow_but_its_own(operator: Client) -> None:
    operator.device("t-2").report({"reported": {"mode": "eco"}})

    assert operator.device("t-2").shadow().body["reported"] == {"mode": "eco"}
    assert operator.device("t-1").shadow().body["reported"] == {}


def test_another_tenants_device_does_not_exist(operator: Client) -> None:
    stranger = Client(operator.port, "stranger")

    for answer in (
        stranger.twin(),
        stranger.send("GET", "/devices/t-1/twin/delta"),
        stranger.patch({"mode": "eco"}, if_match="*"),
        stranger.device().shadow(),
        stranger.device().report({"reported": {}}),
        stranger.history(),
        stranger.restore({"version": 0}, if_match="*"),
        stranger.remove(if_match="*"),
        stranger.device().refuse({"version": 0, "reason": "too warm"}),
    ):
        assert (answer.error, answer.body["tenant_id"]) == ("404 DeviceNotFound", "stranger")
    assert stranger.version(0).error == "404 VersionNotKept"
    assert operator.twin().etag == '"0"'


def test_who_does_not_say_who_it_is_is_turned_away(operator: Client) -> None:
    nobody = Client(operator.port, "")
    for answer in (
        nobody.twin(),
        nobody.patch({}, if_match="*"),
        nobody.device().shadow(),
        nobody.history(),
        nobody.version(0),
        nobody.restore({"version": 0}, if_match="*"),
        nobody.register("t-3", {"site_id": "berlin"}),
        nobody.remove(if_match="*"),
        nobody.device().refuse({"version": 0, "reason": "too warm"}),
    ):
        assert (answer.status, answer.body) == (401, {"detail": "X-Tenant-Id is missing"})

    for answer in (
        operator.shadow(),
        operator.report({"reported": {}}),
        operator.refuse({"version": 0, "reason": "too warm"}),
    ):
        assert (answer.status, answer.body) == (401, {"detail": "X-Device-Id is missing"})


@pytest.mark.parametrize("name", ["X-Tenant-Id", "X-User", "X-Device-Id", "If-Match", "Idempotency-Key"])
@pytest.mark.parametrize("others", [["globex", "acme"], ["acme", "acme"]])
def test_a_header_that_is_there_twice_is_a_bad_request(operator: Client, name: str, others: list[str]) -> None:
    mine = {
        "X-Tenant-Id": operator.tenant,
        "X-User": "anna",
        "X-Device-Id": "t-1",
        "If-Match": "*",
        "Idempotency-Key": "request-1",
    }
    for method, path in (
        ("GET", "/devices/t-1/twin"),
        ("PATCH", "/devices/t-1/twin/desired"),
        ("GET", "/devices/t-1/twin/delta"),
        ("GET", "/device/v1/shadow"),
        ("POST", "/device/v1/shadow/reported"),
        ("GET", "/devices/t-1/twin/desired/history"),
        ("GET", "/devices/t-1/twin/desired/versions/0"),
        ("GET", "/changes"),
        ("POST", "/devices/t-1/twin/desired/restore"),
        ("PUT", "/devices/t-1"),
        ("DELETE", "/devices/t-1"),
        ("POST", "/device/v1/shadow/refusal"),
    ):
        with closing(HTTPConnection("127.0.0.1", operator.port, timeout=10)) as connection:
            connection.putrequest(method, path)
            for header, value in mine.items():
                for each in (value, *others) if header == name else (value,):
                    connection.putheader(header, each)
            connection.putheader("Content-Length", "2")
            connection.endheaders(b"{}")
            response = connection.getresponse()
            assert (response.status, json.loads(response.read())) == (400, {"detail": f"{name} must be there once"})
    assert operator.twin().etag == '"0"'


def test_a_locked_device_is_answered_with_try_again_and_holds_up_no_other_tenant(
    operator: Client, database: Engine
) -> None:
    other = f"other-{secrets.token_hex(4)}"
    with Session(database) as session, session.begin():
        add_device(session, "t-1", tenant_id=other)
    mine = {"tenant": operator.tenant}
    with database.connect() as lock, ThreadPoolExecutor(60) as pool:
        lock.execute(text("SELECT FROM device_state WHERE tenant_id = :tenant FOR UPDATE"), mine)
        patches = [pool.submit(operator.patch, {"mode": "eco"}, if_match="*") for _ in range(60)]
        waiting = text(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        at_once = database.execution_options(isolation_level="AUTOCOMMIT")
        with at_once.connect() as observer:
            while observer.scalars(waiting).one() < 30:
                assert not all(patch.done() for patch in patches)
        began = time.monotonic()
        assert Client(operator.port, other).twin().status == 200
        assert time.monotonic() - began < 8  # twice lock_timeout where there is nothing else to do
        answers = [patch.result() for patch in patches]

    assert {answer.error for answer in answers} == {"503 Busy"}
    assert {answer.retry_after for answer in answers} == {"1"}
    assert operator.twin().etag == '"0"'


def test_an_error_of_the_database_that_no_repetition_mends_is_a_server_error(
    port: int, database: Engine, log: Path
) -> None:
    tenant = f"tenant-{secrets.token_hex(4)}"
    with Session(database) as session, session.begin():
        add_device(session, "t-1", tenant_id=tenant)
    with database.begin() as connection:
        connection.execute(
            text(f"ALTER TABLE device_state ADD CONSTRAINT no CHECK (tenant_id <> '{tenant}') NOT VALID")
        )
    said = log.stat().st_size
    with closing(HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("PATCH", "/devices/t-1/twin/desired", "{}", {"X-Tenant-Id": tenant, "If-Match": "*"})
        assert connection.getresponse().status == 500
    with database.begin() as connection:
        connection.execute(text("ALTER TABLE device_state DROP CONSTRAINT no"))
    # The traceback is written after the answer is sent; this is its last line. The next test wants to see none.
    until = time.monotonic() + START_SECONDS
    while b"Background on this error at" not in log.read_bytes()[said:]:
        assert time.monotonic() < until


def test_openapi_shows_the_bodies_the_answers_and_the_errors_of_each_endpoint(operator: Client) -> None:
    document = operator.send("GET", "/openapi.json").body
    operations = {
        f"{method} {path}": operation for path, item in document["paths"].items() for method, operation in item.items()
    }
    assert operations.keys() == {
        "get /devices/{device_id}/twin",
        "patch /devices/{device_id}/twin/desired",
        "get /devices/{device_id}/twin/delta",
        "get /device/v1/shadow",
        "post /device/v1/shadow/reported",
        "get /devices/{device_id}/twin/desired/history",
        "get /devices/{device_id}/twin/desired/versions/{version}",
        "get /changes",
        "post /devices/{device_id}/twin/desired/restore",
        "put /devices/{device_id}",
        "delete /devices/{device_id}",
        "post /device/v1/shadow/refusal",
    }
    guarded = {
        "patch /devices/{device_id}/twin/desired",
        "post /devices/{device_id}/twin/desired/restore",
        "delete /devices/{device_id}",
    }
    for name, operation in operations.items():
        answers = operation["responses"]
        has_body = name.startswith("p")
        expected = {"204" if name.startswith("delete") else "200", "400", "401", "503", "default"}
        expected |= {"413"} if has_body else set()
        expected |= {"410"} if name == "get /changes" else set() if name.startswith("put") else {"404"}
        expected |= {"409"} if name.startswith("post") or name in guarded else set()
        assert answers.keys() == expected | ({"428"} if name in guarded else set())
        no_twin = ("delete", "get /changes"), ("/desired/history", "/desired/versions")
        shows_a_version = name.startswith(no_twin[0]) or any(part in name for part in no_twin[1])
        assert ("headers" in answers.get("200", {})) != shows_a_version
        assert answers["503"]["headers"].keys() == {"Retry-After"}
        bodies = answers.keys() - {"default", "204"}
        assert all(answers[status]["content"]["application/json"]["schema"] for status in bodies)
        assert ("requestBody" in operation) == has_body
        headers = {one["name"] for one in operation["parameters"] if one["in"] == "header"}
        assert headers >= ({"X-Device-Id"} if "/device/v1" in name else set()) | {"X-Tenant-Id", "X-User"}
        assert ("If-Match" in headers) == (name in guarded)
        assert ("Idempotency-Key" in headers) == (name in guarded and has_body)
    patch = operations["patch /devices/{device_id}/twin/desired"]
    assert patch["requestBody"]["content"]["application/json"]["schema"]["type"] == "object"
    report = operations["post /device/v1/shadow/reported"]["requestBody"]["content"]["application/json"]
    assert report["schema"]["required"] == ["reported"]
    assert operator.device().report(report["example"] | {"acked_version": 0}).status == 200
    place, restore, refusal = (
        operations[name]["requestBody"]["content"]["application/json"]["example"]
        for name in (
            "put /devices/{device_id}",
            "post /devices/{device_id}/twin/desired/restore",
            "post /device/v1/shadow/refusal",
        )
    )
    assert operator.register("t-3", place).status == 200
    assert operator.restore(restore | {"version": 0}, if_match="*").status == 200
    assert operator.device().refuse(refusal | {"version": 1}).status == 200


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/devices/t-1/twin", "Twin"),
        ("/devices/t-1/twin/delta", "Delta"),
        ("/devices/t-1/twin/desired/versions/0", "DesiredVersion"),
    ],
)
def test_what_openapi_says_of_an_answer_is_what_is_answered(operator: Client, path: str, name: str) -> None:
    documented = operator.send("GET", "/openapi.json").body["components"]["schemas"][name]["properties"]

    assert operator.send("GET", path).body.keys() == documented.keys()


# No document of these can be stored; each with the JSON Pointer to what is wrong.
INVALID = {
    "nothing": ("", ""),
    "cut off": ('{"mode": "eco"', ""),
    "no UTF-8": (b'{"mode": "\xff"}', ""),
    "an array": ("[1, 2]", ""),
    "null": ("null", ""),
    "text": ('"eco"', ""),
    "a number": ("7", ""),
    "NaN": ('{"limits": {"max": NaN}}', "/limits/max"),
    "infinite": ('{"max": -Infinity}', "/max"),
    "too large for a float": ('{"max": 1e999}', "/max"),
    "an endless integer": (f'{{"max": {"9" * 5000}}}', ""),
    "a key twice": ('{"a": {"mode": "eco", "mode": "auto"}}', ""),
    "a zero character": (r'{"mode": "\u0000"}', "/mode"),
    "half a character": (r'{"mode": "\ud83d"}', "/mode"),
    "half a character as key": (r'{"\ud83d": 1}', "/\ud83d"),
    "deeper than allowed": ('{"a":' * 12 + "1" + "}" * 12, "/a" * 11),
    "deeper than Python reads": ("[" * 100_000, ""),
}


@pytest.mark.parametrize(("body", "path"), INVALID.values(), ids=INVALID)
def test_what_is_no_document_is_a_bad_request_that_names_the_place(
    operator: Client, body: str | bytes, path: str
) -> None:
    raw = body.encode() if isinstance(body, str) else body

    for answer in (
        operator.patch(raw, if_match="*"),
        operator.device().report(b'{"reported": ' + raw + b"}"),
    ):
        assert (answer.error, answer.body["path"]) == ("400 InvalidDocument", path)
        assert answer.body["reason"] in answer.body["message"]
    assert (operator.twin().etag, operator.twin().body["reported"]) == ('"0"', {})


@pytest.mark.parametrize(
    ("report", "path"),
    [
        ([], ""),
        ({}, ""),
        ({"acked_version": 1}, ""),
        ({"reported": {}, "version": 1}, ""),
        ({"reported": {}, "acked_version": "1"}, "/acked_version"),
        ({"reported": {}, "acked_version": True}, "/acked_version"),
        ({"reported": {}, "acked_version": 1.0}, "/acked_version"),
        ({"reported": {}, "acked_version": -1}, "/acked_version"),
        ({"reported": {}, "acked_version": 2**63}, "/acked_version"),
        ({"reported": {}, "acked_version": [1]}, "/acked_version"),
        ({"reported": {}, "ack_if_converged": 1}, "/ack_if_converged"),
        ({"reported": {}, "ack_if_converged": True, "acked_version": 1}, "/ack_if_converged"),
    ],
    ids=json.dumps,
)
def test_what_is_no_report_is_a_bad_request(operator: Client, report: Any, path: str) -> None:
    answer = operator.device().report(report)

    assert (answer.error, answer.body["path"]) == ("400 InvalidDocument", path)
    assert operator.twin().body["sync_status"] == "stale"  # not even seen


def test_a_document_of_more_than_32_kib_is_too_large(operator: Client) -> None:
    fits = {"a": "x" * (32_768 - len('{"a":""}'))}
    assert operator.patch(fits, if_match="*").status == 200
    assert operator.device().report({"reported": fits}).status == 200

    # As sent, a document may be larger: with indentation, and with each letter as an escape of six bytes.
    assert operator.patch(json.dumps({"a": "ж" * 16_000}, indent=40_000), if_match="*").status == 413
    assert operator.patch(json.dumps({"a": "ж" * 16_000}), if_match="*").status == 200

    larger = {"a": fits["a"] + "x"}
    assert operator.patch(larger, if_match="*").error == "413 DocumentTooLarge"
    assert operator.device().report({"reported": larger}).error == "413 DocumentTooLarge"
    assert operator.patch({"b": 1}, if_match="*").status == 200


def test_a_body_larger_than_any_document_is_not_read_to_its_end(operator: Client) -> None:
    with closing(socket.create_connection(("127.0.0.1", operator.port), timeout=10)) as connection:
        connection.sendall(
            b"PATCH /devices/t-1/twin/desired HTTP/1.1\r\nHost: iot\r\nIf-Match: *\r\n"
            b"X-Tenant-Id: %b\r\nContent-Length: 1000000000\r\n\r\n" % operator.tenant.encode()
        )
        connection.sendall(b" " * 140_000)
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_a_device_whose_link_breaks_in_the_middle_of_a_report_leaves_no_trace(operator: Client) -> None:
    with closing(socket.create_connection(("127.0.0.1", operator.port), timeout=10)) as connection:
        connection.sendall(
            b"POST /device/v1/shadow/reported HTTP/1.1\r\nHost: iot\r\nX-Device-Id: t-1\r\n"
            b'X-Tenant-Id: %b\r\nContent-Length: 100\r\n\r\n{"reported": {}' % operator.tenant.encode()
        )

    time.sleep(0.1)  # for the traceback that the fixture looks for
    assert operator.twin().body["sync_status"] == "stale"
