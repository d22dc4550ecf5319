"""`examples/shadow_stream.py`: a browser follows a device over real HTTP."""

from __future__ import annotations

import http.client
import importlib
import inspect
import json
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn
from sqlalchemy import text
from sqlalchemy.orm import Session

from iot_models import ShadowService
from tests.databases.backends import end_backend
from tests.databases.devices import TENANT, add_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from http.client import HTTPResponse

    from sqlalchemy import Engine

pytestmark = pytest.mark.repeats


class Stream:
    """The running example: its port, its module, and browsers that follow."""

    def __init__(self, port: int, module: Any) -> None:
        self.port, self.module = port, module

    @contextmanager
    def follow(self, device_id: str, tenant_id: str = TENANT) -> Iterator[HTTPResponse]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)) as connection:
            connection.request("GET", f"/devices/{device_id}/events", headers={"X-Tenant-Id": tenant_id})
            with closing(connection.getresponse()) as response:
                yield response

    def followers(self) -> dict[tuple[str, str], int]:
        return {key: device.followers for key, device in self.module.followed.items()}


@pytest.fixture
def stream(fleet: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stream]:
    """The example on acme's devices a, b and c; its heartbeat is short."""
    monkeypatch.setenv("IOT_MODELS_DATABASE_URL", fleet.url.render_as_string(hide_password=False))
    monkeypatch.delitem(sys.modules, "shadow_stream", raising=False)
    module = importlib.import_module("shadow_stream")
    monkeypatch.setattr(module, "PERIOD", 0.1)
    monkeypatch.setattr(module, "HEARTBEAT", 0.5)
    config = uvicorn.Config(module.app, port=0, log_config=None, ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield Stream(server.servers[0].sockets[0].getsockname()[1], module)
    finally:
        server.should_exit = True
        thread.join()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def next_event(response: HTTPResponse) -> tuple[str, dict[str, Any]]:
    """The kind and the data of the next event; heartbeats are passed over."""
    kind = ""
    while True:
        line = response.readline().decode().rstrip("\n")
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            return kind, json.loads(line.removeprefix("data: "))


def next_shadow(response: HTTPResponse) -> tuple[int, int, dict[str, Any], dict[str, Any]]:
    kind, data = next_event(response)
    assert kind == "shadow"
    return data["desired_version"], data["reported_version"], data["desired"], data["reported"]


def test_a_browser_has_the_shadow_at_once_and_again_whenever_desired_or_reported_changes(
    stream: Stream, fleet: Engine
) -> None:
    with stream.follow("a") as browser:
        assert browser.headers["Content-Type"].startswith("text/event-stream")
        assert next_shadow(browser) == (0, 0, {}, {})
        with Session(fleet) as session, session.begin():
            ShadowService(session, TENANT).replace_desired("a", {"text": "two\nlines\u2028and\r"})
        assert next_shadow(browser) == (1, 0, {"text": "two\nlines\u2028and\r"}, {})
        with Session(fleet) as session, session.begin():
            ShadowService(session, TENANT).replace_reported("a", {"t": 1}, acked_version=1)
        assert next_shadow(browser)[1:4:2] == (1, {"t": 1})
        with Session(fleet) as session, session.begin():
            ShadowService(session, TENANT).remove("a")
        assert next_event(browser) == ("removed", {})


def test_of_a_device_at_rest_comes_a_comment_now_and_then(stream: Stream) -> None:
    with stream.follow("a") as browser:
        next_shadow(browser)
        assert browser.readline() == b"\n"
        assert [browser.readline() for _ in range(4)] == [b": still here\n", b"\n"] * 2


def test_many_browsers_need_one_statement_a_period_and_no_connection_of_their_own(
    stream: Stream, fleet: Engine
) -> None:
    connections = text("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'shadow_stream'")
    browsers = [stream.follow(device_id) for device_id in "abc" * 10]
    responses = [browser.__enter__() for browser in browsers]
    for response in responses:
        next_shadow(response)
    assert stream.followers() == {(TENANT, device_id): 10 for device_id in "abc"}
    with fleet.connect() as connection:
        assert connection.scalar(connections) <= 2
    with Session(fleet) as session, session.begin():
        ShadowService(session, TENANT).patch_desired_many(["a", "b", "c"], {"n": 1})
    assert {next_shadow(response)[2]["n"] for response in responses} == {1}
    for browser in browsers:
        browser.__exit__(None, None, None)


def test_when_a_browser_goes_away_its_device_is_no_longer_read(stream: Stream) -> None:
    with stream.follow("a") as one, stream.follow("a") as other:
        next_shadow(one), next_shadow(other)
        assert stream.followers() == {(TENANT, "a"): 2}
    until(lambda: not stream.followers())


def test_tenants_see_their_own_devices_and_others_are_not_there(stream: Stream, fleet: Engine) -> None:
    with Session(fleet) as session, session.begin():
        add_device(session, "a", tenant_id="other", desired_state={"whose": "other"})
        add_device(session, "x", tenant_id="other")
    with stream.follow("a") as ours, stream.follow("a", "other") as theirs:
        assert (next_shadow(ours)[2], next_shadow(theirs)[2]) == ({}, {"whose": "other"})
    for device_id, tenant_id, status in (("x", TENANT, 404), ("%00", TENANT, 404), ("a", "", 401)):
        with stream.follow(device_id, tenant_id) as answer:
            assert answer.status == status


@pytest.mark.parametrize("tenants", [(TENANT, "other"), ("other", TENANT), (TENANT, TENANT)])
def test_a_browser_whose_proxy_adds_a_tenant_to_the_one_that_was_sent_follows_nothing(
    stream: Stream, fleet: Engine, tenants: tuple[str, str]
) -> None:
    with Session(fleet) as session, session.begin():
        add_device(session, "a", tenant_id="other", desired_state={"whose": "other"})
    with closing(http.client.HTTPConnection("127.0.0.1", stream.port, timeout=20)) as connection:
        connection.putrequest("GET", "/devices/a/events")
        for tenant in tenants:
            connection.putheader("X-Tenant-Id", tenant)
        connection.endheaders()
        with closing(connection.getresponse()) as answer:
            assert (answer.status, answer.read()) == (400, b'{"detail":"X-Tenant-Id must be there once"}')
    assert not stream.followers()


def test_both_examples_over_http_have_the_same_rule_for_headers(stream: Stream) -> None:
    """Each example is one file, to be copied."""
    twin = importlib.import_module("fastapi_twin")
    for name in ("each_header_once", "tenant"):
        assert inspect.getsource(getattr(stream.module, name)) == inspect.getsource(getattr(twin, name))


def test_a_connection_that_is_lost_stops_no_browser(stream: Stream, fleet: Engine) -> None:
    with stream.follow("a") as browser:
        next_shadow(browser)
        with fleet.connect() as connection:
            pids = connection.scalars(
                text("SELECT pid FROM pg_stat_activity WHERE application_name = 'shadow_stream'")
            ).all()
        for pid in pids:
            end_backend(fleet, pid)
        with Session(fleet) as session, session.begin():
            ShadowService(session, TENANT).replace_desired("a", {"n": 1})
        assert next_shadow(browser)[2] == {"n": 1}


def test_there_is_an_end_to_how_many_browsers_are_served(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream.module, "MOST", 1)
    with stream.follow("a") as one:
        next_shadow(one)
        with stream.follow("b", "other") as other:
            assert (other.status, other.headers["Retry-After"]) == (503, "60")


def test_a_tenant_that_follows_as_much_as_it_can_leaves_room_for_others(
    stream: Stream, fleet: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many requests come before the first of them is answered."""
    monkeypatch.setattr(stream.module, "EACH", 3)
    monkeypatch.setattr(stream.module, "MOST", 4)
    with Session(fleet) as session, session.begin():
        add_device(session, "a", tenant_id="other")
    with ExitStack() as open_ones, ThreadPoolExecutor(20) as pool:
        asked = pool.map(lambda _: open_ones.enter_context(stream.follow("a")), range(20))
        assert Counter(answer.status for answer in asked) == {200: 3, 503: 17}
        with stream.follow("a", "other") as other:
            assert other.status == 200
            next_shadow(other)
    until(lambda: not stream.followers() and not stream.module.browsers)
    with stream.follow("none") as unknown, stream.follow("a") as again:
        assert (unknown.status, again.status) == (404, 200)
