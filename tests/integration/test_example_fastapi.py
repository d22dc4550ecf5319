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
            return Answer(response.status, etag, json.loads(response.read()), retry_after)

    def twin(self, device_id: str = "t-1", **headers: str) -> Answer:
        return self.send("GET", f"/devices/{device_id}/twin", **headers)

    def delta(self, device_id: str = "t-1") -> Any:
        return self.send("GET", f"/devices/{device_id}/twin/delta").body["delta"]

    def patch(self, patch: Any, device_id: str = "t-1", **headers: str) -> Answer:
        return self.send("PATCH", f"/devices/{device_id}/twin/desired", patch, **headers)

    def shadow(self) -> Answer:
        return self.send("GET", "/device/v1/shadow")

    def report(self, body: Any) -> Answer:
        return self.send("POST", "/device/v1/shadow/reported", body)

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
    assert len(EXAMPLE.read_text().splitlines()) < 250


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
    ):
        assert (answer.error, answer.body["tenant_id"]) == ("404 DeviceNotFound", "stranger")
    assert operator.twin().etag == '"0"'


def test_who_does_not_say_who_it_is_is_turned_away(operator: Client) -> None:
    nobody = Client(operator.port, "")
    for answer in (nobody.twin(), nobody.patch({}, if_match="*"), nobody.device().shadow()):
        assert (answer.status, answer.body) == (401, {"detail": "X-Tenant-Id is missing"})

    for answer in (operator.shadow(), operator.report({"reported": {}})):
        assert (answer.status, answer.body) == (401, {"detail": "X-Device-Id is missing"})


@pytest.mark.parametrize("name", ["X-Tenant-Id", "X-Device-Id", "If-Match"])
@pytest.mark.parametrize("others", [["globex", "acme"], ["acme", "acme"]])
def test_a_header_that_is_there_twice_is_a_bad_request(operator: Client, name: str, others: list[str]) -> None:
    mine = {"X-Tenant-Id": operator.tenant, "X-Device-Id": "t-1", "If-Match": "*"}
    for method, path in (
        ("GET", "/devices/t-1/twin"),
        ("PATCH", "/devices/t-1/twin/desired"),
        ("GET", "/devices/t-1/twin/delta"),
        ("GET", "/device/v1/shadow"),
        ("POST", "/device/v1/shadow/reported"),
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
    }
    for name, operation in operations.items():
        answers = operation["responses"]
        writes = not name.startswith("get")
        expected = {"200", "400", "401", "404", "503", "default"} | ({"409", "413"} if writes else set())
        assert answers.keys() == expected | ({"428"} if name.startswith("patch") else set())
        assert answers["200"]["headers"].keys() == {"ETag"}
        assert answers["503"]["headers"].keys() == {"Retry-After"}
        assert all(answers[status]["content"]["application/json"]["schema"] for status in answers.keys() - {"default"})
        assert ("requestBody" in operation) == writes
        headers = {one["name"] for one in operation["parameters"] if one["in"] == "header"}
        assert headers >= ({"X-Device-Id"} if "/device/v1" in name else set()) | {"X-Tenant-Id"}
    patch = operations["patch /devices/{device_id}/twin/desired"]
    assert patch["requestBody"]["content"]["application/json"]["schema"]["type"] == "object"
    report = operations["post /device/v1/shadow/reported"]["requestBody"]["content"]["application/json"]
    assert report["schema"]["required"] == ["reported"]
    assert operator.device().report(report["example"] | {"acked_version": 0}).status == 200


@pytest.mark.parametrize(("path", "name"), [("/devices/t-1/twin", "Twin"), ("/devices/t-1/twin/delta", "Delta")])
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
