"""`examples/mqtt_bridge.py` on a real broker: amqtt, and mosquitto where it is installed."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import signal
import time
from argparse import Namespace
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mqtt_bridge as example
import pytest
from aiomqtt import Client, Message
from sqlalchemy import Engine, NullPool, create_engine, make_url, text
from sqlalchemy.orm import Session

from iot_models import Shadow, ShadowService, migrate
from iot_models.bus import ReportBuffer
from tests.databases.async_engines import async_engine, in_event_loop
from tests.databases.devices import TENANT, add_device
from tests.databases.durable_server import durable_postgres
from tests.mqtt.bridge import BridgeProcess, mqtt_bridge
from tests.mqtt.broker import BROKERS, mqtt_broker
from tests.mqtt.checker import keep_reports, violations
from tests.mqtt.fleet import Fleet

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from iot_models.testing import PostgresServer

pytestmark = pytest.mark.repeats

TELEMETRY = {"reported": {"t": 1}, "token": "x"}


@dataclass(frozen=True, slots=True)
class Bridged:
    """A running bridge for the tenant acme, its broker's port and its database."""

    engine: Engine
    port: int
    process: BridgeProcess

    def device(self, **columns: Any) -> str:
        """A device of the test's own."""
        name = f"device-{secrets.token_hex(4)}"
        with Session(self.engine) as session, session.begin():
            add_device(session, name, **columns)
        return name

    def desire(self, name: str, document: dict[str, Any]) -> None:
        with Session(self.engine) as session, session.begin():
            ShadowService(session, TENANT, notify=True).replace_desired(name, document)

    def shadow(self, name: str, tenant_id: str = TENANT) -> Shadow:
        with Session(self.engine) as session:
            return ShadowService(session, tenant_id).get(name)


@pytest.fixture(scope="module", params=BROKERS)
def bridged(
    request: pytest.FixtureRequest,
    server: PostgresServer,
    migrated_url: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Bridged]:
    folder = tmp_path_factory.mktemp("bridge")
    name = f"iot_models_bridge_{secrets.token_hex(8)}"
    admin = create_engine(server.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {make_url(migrated_url).database}"))
    engine = create_engine(make_url(server.url).set(database=name))
    url = engine.url.render_as_string(hide_password=False)
    with (
        mqtt_broker(request.param, folder) as broker,
        mqtt_bridge(broker.url, url, folder, "--tenant", TENANT, "--repeat-after", "600") as process,
    ):
        until(lambda: any("connected" in line for line in process.said()))
        yield Bridged(engine, broker.port, process)
        assert process.stop(signal.SIGTERM) == 0
        assert not any("Traceback" in line for line in process.said())
    engine.dispose()
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


def until(condition: Callable[[], object], seconds: float = 30.0, pause: float = 0.05) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(pause)


class Talk:
    """A device's side of the conversation."""

    def __init__(self, client: Client, name: str, tenant_id: str) -> None:
        self._client, self._base = client, f"{tenant_id}/{name}"

    async def say(self, report: Any) -> None:
        """Bytes and text are sent as they are, anything else as JSON."""
        payload = report if isinstance(report, (bytes, str)) else json.dumps(report)
        await self._client.publish(f"{self._base}/reported", payload, qos=1)

    async def hear(self) -> tuple[str, dict[str, Any]]:
        """What comes next: `desired`, `reported/accepted` or `reported/rejected`, and its content."""
        async with asyncio.timeout(15):
            async for message in self._client.messages:
                # amqtt greets each new client with what is retained for anybody.
                if message.topic.value.startswith(f"{self._base}/"):
                    return message.topic.value.removeprefix(f"{self._base}/"), json.loads(message.payload)
        raise AssertionError("the broker is gone")

    async def ask(self, report: Any) -> dict[str, Any]:
        """The answer to a report; `status` is `accepted` too. Desired messages are passed over."""
        await self.say(report)
        while True:
            kind, body = await self.hear()
            if kind != "desired":
                return {"status": "accepted"} | body


@asynccontextmanager
async def talking(bridged: Bridged, name: str, tenant_id: str = TENANT) -> AsyncIterator[Talk]:
    async with Client("127.0.0.1", bridged.port) as client:
        await client.subscribe([(f"{tenant_id}/{name}/desired", 1), (f"{tenant_id}/{name}/reported/+", 0)])
        yield Talk(client, name, tenant_id)


@in_event_loop
async def test_what_is_desired_is_published_and_a_report_is_answered_once_it_is_committed(bridged: Bridged) -> None:
    name = bridged.device()
    async with talking(bridged, name) as device:
        bridged.desire(name, {"mode": "eco"})
        assert await device.hear() == ("desired", {"version": 1, "desired": {"mode": "eco"}, "delta": {"mode": "eco"}})
        answer = await device.ask({"reported": {"mode": "eco"}, "acked_version": 1, "token": "a7"})
    assert answer == {"status": "accepted", "token": "a7", "desired_version": 1, "reported_version": 1}
    assert (bridged.shadow(name).reported, bridged.shadow(name).is_pending) == ({"mode": "eco"}, False)


@in_event_loop
async def test_a_device_that_subscribes_later_reads_what_is_desired_also_once_it_is_acknowledged(
    bridged: Bridged,
) -> None:
    name = bridged.device()
    bridged.desire(name, {"mode": "eco"})
    for _ in range(2):
        async with talking(bridged, name) as device:
            kind, body = await device.hear()
            assert (kind, body["version"], body["desired"]) == ("desired", 1, {"mode": "eco"})
            await device.ask({"reported": {"mode": "eco"}, "acked_version": 1})


@in_event_loop
async def test_a_refusal_is_written_with_its_reason(bridged: Bridged) -> None:
    name = bridged.device()
    bridged.desire(name, {"target_c": 99})
    async with talking(bridged, name) as device:
        report = {"reported": {}, "acked_version": 0, "refused_version": 1, "refusal": "too hot"}
        assert (await device.ask(report))["status"] == "accepted"
    assert bridged.shadow(name).refusal == "too hot"


@in_event_loop
async def test_a_report_that_is_not_written_is_answered_with_why_the_versions_and_what_to_do(bridged: Bridged) -> None:
    name = bridged.device(desired_version=3, reported_version=2, reported_state={"t": 0})
    reports = {
        "late": TELEMETRY | {"acked_version": 1},
        "unknown_version": TELEMETRY | {"acked_version": 4},
        "invalid": TELEMETRY | {"acked_version": "three"},
    }
    async with talking(bridged, name) as device:
        for status, report in reports.items():
            answer = await device.ask(report)
            assert answer == {
                "status": status,
                "token": "x",
                "desired_version": 3,
                "reported_version": 2,
                "what_to_do": example.WHAT_TO_DO[status],
            }
    async with talking(bridged, "nobody") as device:
        answer = await device.ask(TELEMETRY)
        assert (answer["status"], answer["desired_version"]) == ("unknown_device", None)
    assert bridged.shadow(name).reported == {"t": 0}


@in_event_loop
async def test_a_payload_that_is_no_report_is_answered_and_harms_nobody(bridged: Bridged) -> None:
    name = bridged.device()
    large = {"reported": {"text": "x" * 40_000}}
    payloads: dict[str, list[Any]] = {
        "malformed": [
            b"", b"\xff\xfe", b"{", b"[]", b"null", b'"text"', b"7", "{}", '{"reported": {}, "reported": {}}',
            '{"reported": {"t": NaN}}', '{"reported": {}, "tenant": "other"}', '{"reported": {}, "token": {}}',
            '{"reported": ' * 5_000, "[" * 100_000, '{"reported": {"n": ' + "9" * 5_000 + "}}",
            '{"reported": {}}'.encode("utf-16"),
        ],
        "invalid": [
            {"reported": []}, large, '{"reported": {"t": 1e999}}', '{"reported": {"t": "\\u0000"}}',
            '{"reported": {"t": "\\ud800"}}', '{"reported": {"a": ' * 50 + "1" + "}}" * 50,
            {"reported": {}, "acked_version": -1}, {"reported": {}, "acked_version": True},
            {"reported": {}, "refused_version": 1, "refusal": 7}, {"reported": {}, "refusal": "no"},
        ],
        "too_large": [b" " * (example.MAX_PAYLOAD + 1)],
    }  # fmt: skip
    async with talking(bridged, name) as device:
        for status, hostile in payloads.items():
            for payload in hostile:
                assert (await device.ask(payload))["status"] == status, str(payload)[:100]
        assert (await device.ask(TELEMETRY))["status"] == "accepted"


@in_event_loop
async def test_topics_lead_to_no_other_tenants_devices_and_odd_ones_harm_nobody(bridged: Bridged) -> None:
    name = bridged.device()
    with Session(bridged.engine) as session, session.begin():
        add_device(session, name, tenant_id="other")
    async with Client("127.0.0.1", bridged.port) as client:
        odd = ["", " ", "$SYS", "..", "%2F", "\u202e", "x" * 300, "' OR 1=1", f"../other/{name}"]
        for topic in [
            f"other/{name}/reported",
            f"{TENANT}/{name}/reported/reported",
            *(f"{TENANT}/{o}/reported" for o in odd),
        ]:
            await client.publish(topic, json.dumps(TELEMETRY), qos=1)
    async with talking(bridged, name) as device:
        assert (await device.ask({"reported": {"t": 2}}))["status"] == "accepted"
    assert bridged.shadow(name, "other").reported == {}


@in_event_loop
async def test_a_report_that_a_broker_retained_is_not_written_again(bridged: Bridged, tmp_path: Path) -> None:
    name = bridged.device()
    topic = f"{TENANT}/{name}/reported"
    url = bridged.engine.url.render_as_string(hide_password=False)
    async with Client("127.0.0.1", bridged.port) as client:
        await client.publish(topic, json.dumps(TELEMETRY), qos=1, retain=True)
        await asyncio.to_thread(until, lambda: bridged.shadow(name).reported == {"t": 1})
        with Session(bridged.engine) as session, session.begin():
            ShadowService(session, TENANT).replace_reported(name, {"t": 2})
        with mqtt_bridge(f"mqtt://127.0.0.1:{bridged.port}", url, tmp_path, "--tenant", TENANT) as late:
            await asyncio.to_thread(until, lambda: any("retained" in line for line in late.said()))
        await client.publish(topic, b"", qos=1, retain=True)
    assert bridged.shadow(name).reported == {"t": 2}


@in_event_loop
async def test_an_older_version_that_was_retained_is_replaced_once_a_device_acknowledges_it(bridged: Bridged) -> None:
    name = bridged.device()
    bridged.desire(name, {"n": 1})
    bridged.desire(name, {"n": 2})
    async with talking(bridged, name) as device:
        while (await device.hear())[1]["version"] != 2:
            pass
        await device.ask({"reported": {"n": 2}, "acked_version": 2})
    async with Client("127.0.0.1", bridged.port) as other_bridge:
        old = json.dumps({"version": 1, "desired": {"n": 1}, "delta": {}})
        await other_bridge.publish(f"{TENANT}/{name}/desired", old, qos=1, retain=True)
    async with talking(bridged, name) as replaced:
        assert (await replaced.hear())[1]["version"] == 1
        assert (await replaced.ask({"reported": {"n": 1}, "acked_version": 1}))["status"] == "late"
        assert (await replaced.hear())[1]["version"] == 2
    async with talking(bridged, name) as replaced_again:
        assert (await replaced_again.hear())[1]["version"] == 2


@in_event_loop
async def test_a_device_whose_id_is_no_part_of_a_topic_is_left_out_and_named_once(bridged: Bridged) -> None:
    odd = ["x/y", "x+", "#", "$x", "line\nbreak"]
    with Session(bridged.engine) as session, session.begin():
        for name in odd:
            add_device(session, name)
        ShadowService(session, TENANT, notify=True).patch_desired_many(odd, {"n": 1})
    name = bridged.device()
    async with talking(bridged, name) as device:
        bridged.desire(name, {"n": 1})
        assert (await device.hear())[1]["version"] == 1
    assert sum("devices without a topic" in line for line in bridged.process.said()) == 1


def test_a_thousand_devices_converge_and_nothing_accepted_is_lost_whatever_restarts(tmp_path: Path) -> None:
    names = [f"device-{number:04}" for number in range(1000)]
    with durable_postgres() as server, mqtt_broker(BROKERS[-1], tmp_path, started=False) as broker:
        engine = create_engine(server.url, pool_pre_ping=True)
        migrate.upgrade(engine)
        with Session(engine) as session, session.begin():
            ShadowService(session, TENANT).register_many(dict.fromkeys(names, "berlin"))
        keep_reports(engine)
        written = desire(engine, names, {"mode": "eco"})
        server.stop("fast")
        options = ("--tenant", TENANT, "--poll", "1", "--repeat-after", "15")
        # At its start, the bridge has neither a broker nor a database.
        with (
            mqtt_bridge(broker.url, server.url, tmp_path, *options) as bridge,
            Fleet(broker.port, TENANT, names, refuses=0.05) as fleet,
        ):
            until(lambda: any("broker is lost" in line for line in bridge.said()))
            broker.start()
            until(lambda: any("watch_pending" in line for line in bridge.said()))
            server.start()
            until(lambda: fleet.counts()["accepted"] > 200)
            server.stop("immediate")
            server.start()
            written += desire(engine, names[:300], {"mode": "auto"})
            broker.stop()
            bridge.stop(signal.SIGKILL)
            broker.start()
            bridge.start()
            until(lambda: all(device.is_answered and device.seen for device in fleet.devices.values()), 90)
            until(lambda: not violations(engine, TENANT, fleet, written), 90, pause=1.0)
            assert bridge.stop() == 0
        engine.dispose()
        server.stop("fast")
    said = "\n".join(bridge.said())
    assert "Traceback" not in said
    assert len(bridge.said()) < 40
    assert said.count("reports are not written") <= 2


def desire(engine: Engine, names: list[str], patch: dict[str, Any]) -> list[tuple[str, int]]:
    with Session(engine) as session, session.begin():
        shadows = ShadowService(session, TENANT, notify=True).patch_desired_many(names, patch)
    return [(name, shadow.desired_version) for name, shadow in shadows.items()]


def message(topic: str, payload: bytes) -> Message:
    return Message(topic, payload, 1, retain=False, mid=1, properties=None)


@in_event_loop
async def test_of_a_device_whose_reports_wait_the_newest_is_kept_in_its_place(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "said", {})
    queue = example.Newest(maxsize=2)
    for payload in (b"1", b"2", b"3"):
        queue.put_nowait(message("acme/a/reported", payload))
        queue.put_nowait(message("acme/b/reported", payload))
        queue.put_nowait(message("acme/one too many/reported", payload))
    assert [(await queue.get()).payload for _ in range(2)] == [b"3", b"3"]
    assert queue.empty()
    assert len(caplog.records) == 1


def test_a_failure_that_goes_on_is_said_once_in_a_while_with_how_often_it_happened(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "said", {})
    for _ in range(1000):
        example.say("the broker is lost", ConnectionError("no route\nDETAIL"))
    monkeypatch.setattr(example, "SAY_AGAIN", 0)
    example.say("the broker is lost", ConnectionError("no route"))
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (logging.WARNING, "the broker is lost: no route DETAIL"),
        (logging.WARNING, "the broker is lost: no route (and 999 times before)"),
    ]


class Recorder:
    """In the place of a client: what is published."""

    def __init__(self) -> None:
        self.versions: list[int] = []

    async def publish(self, _topic: str, payload: str, *, qos: int, retain: bool) -> None:
        assert (qos, retain) == (1, True)
        self.versions.append(json.loads(payload)["version"])


@in_event_loop
async def test_one_bridge_publishes_no_older_version_after_a_newer_one(engine: Engine) -> None:
    async with async_engine(engine.url) as async_:
        bridge = example.Bridge(async_, ReportBuffer(async_), Namespace())
        recorder: Any = Recorder()
        for version in (3, 2, 3, 4):
            await bridge.publish(recorder, Shadow(TENANT, "a", {}, {}, version, 0, None, None))
    assert recorder.versions == [3, 3, 4]


@pytest.mark.parametrize("broker", ["localhost:1883", "http://localhost"])
def test_a_broker_that_is_no_mqtt_url_is_refused_at_once(broker: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        asyncio.run(example.main([broker]))
    assert "broker is a URL" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [
        ["mqtt://bridge:s3c/ret@127.0.0.1:1"],
        ["mqtt://bridge:1883/s3cret@127.0.0.1:1"],
        ["mqtt://bridge:s3c#ret@127.0.0.1:1"],
        ["mqtt://bridge:1883?s3cret@127.0.0.1:1"],
        ["mqtt://bridge:s3cret@127.0.0.1:70000"],
        ["mqtt://[bridge:s3cret@h"],
        ["mqtt://bridge:s3cret\u2100@h"],
        ["http://bridge:s3cret@h"],
        ["mqtt://h", "mqtt://bridge:s3cret@h"],
        ["--brokr", "mqtt://bridge:s3cret@h"],
        ["mqtt://h", "--poll", "mqtt://bridge:s3cret@h"],
        ["--po=mqtt://bridge:s3cret@h", "mqtt://h"],
    ],
)
def test_a_broker_that_is_none_is_refused_and_its_password_not_shown(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        asyncio.run(example.main(given))
    printed = capsys.readouterr()
    assert "error: " in printed.err
    assert "s3c" not in printed.out + printed.err


def test_a_password_of_a_broker_may_have_any_character() -> None:
    for url in ("mqtt://b:s3c%2Fr%23et@h:1", "mqtt://b:s3c:r@et@h", "mqtts://h/", "mqtt://[::1]:1883"):
        assert example.is_broker(url)
