"""A bridge between an MQTT broker and the shadows: reports in, desired documents out. Copy it and adapt it.

    pip install aiomqtt
    export IOT_MODELS_DATABASE_URL=postgresql://user:password@host:5432/database
    python examples/mqtt_bridge.py mqtt://localhost:1883 --tenant acme

    {tenant}/{device}/reported           from the device, QoS 1, never retained. All that it is, each time:
                                         {"reported": {...}, "acked_version": 3, "token": "a7"}, and where it refuses a
                                         version {..., "acked_version": 2, "refused_version": 3, "refusal": "too hot"}
    {tenant}/{device}/reported/accepted  to the device: committed. {"token", "desired_version", "reported_version"}
    {tenant}/{device}/reported/rejected  to the device: not written. {"token", "status", "what_to_do" and the versions}
    {tenant}/{device}/desired            to the device, QoS 1, retained: {"version", "desired", "delta"}

Both directions carry states and no events, so that anything can be lost or come twice:

* A device publishes its newest report, repeats it, with pauses that grow, until an answer has its token, and publishes
  it anew every few minutes. aiomqtt confirms a message to the broker when it reads it: a bridge that dies before the
  commit has lost it, as a broker without persistence has, and the repetition is what brings it. `accepted` comes after
  the commit. While the database is away there is no answer. Of a device whose reports wait, the newest is kept.
* A device ignores a desired message whose version it knows or that is older, since two bridges may publish out of
  order. What is pending is published again after --repeat-after, and all of it after each connect. A device that
  acknowledges an older version than before has read an old message, or has lost its memory: it is `late`, and the
  newest version is published. The retained message stays when it is acknowledged: a device that was replaced needs it,
  and clearing it could erase a newer one. Whoever removes a device clears its topic.

THE BROKER MUST ENFORCE WHO PUBLISHES WHERE: a client may publish to its own {tenant}/{device}/reported, and subscribe
to its own {tenant}/{device}/# (mosquitto: `pattern write %u/reported`, `pattern read %u/#` for user names "acme/t-1").
The bridge takes tenant and device from the topic and believes it. Only the bridge may publish desired and answers.

Several bridges divide the reports among them by --share NAME, where the broker has shared subscriptions (MQTT 5;
mosquitto and EMQX for older clients too). Without it each writes every report, which is waste and no harm.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import ssl
import time
from collections.abc import Coroutine
from contextlib import aclosing, suppress
from datetime import timedelta
from typing import Any, NoReturn
from urllib.parse import unquote, urlsplit

from aiomqtt import Client, Message, MqttError
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from iot_models import AsyncShadowService, Report, ReportStatus, Shadow
from iot_models.bus import ReportBuffer, watch_pending
from iot_models.engine import create_async_engine

MAX_PAYLOAD = 131_072  # bytes on the wire: room for a document of 32 KiB with indentation and \u escapes
MAX_QUEUE, MAX_REPORTS, MAX_PUBLISHES = 20_000, 2_000, 100  # devices that wait; reports and publishes at once
LONGEST_PAUSE = 10.0  # seconds, between two attempts to reach the broker
SAY_AGAIN = 60.0  # seconds: a failure that goes on is one line of the log in this time
FIELDS = {"reported", "acked_version", "ack_if_converged", "refused_version", "refusal", "token"}
MAX_TOKEN, MAX_LEVEL = 100, 255  # characters of a token, and of an id in a topic
WHAT_TO_DO = {
    "late": "it names an older version than the device has acknowledged: apply the one that is published, report again",
    "unknown_version": "there is no such version: forget yours, apply the one that is published, and report again",
    "unknown_device": "the tenant has no such device: have it registered, and report again later",
    "invalid": "it cannot be stored, and repeating it does not help: correct it",
    "malformed": 'send one JSON object such as {"reported": {...}, "acked_version": 3, "token": "a7"}, in UTF-8',
    "too_large": f"send {MAX_PAYLOAD:,} bytes at most",
}
log = logging.getLogger("mqtt_bridge")


class Newest(asyncio.Queue[Message]):
    """The newest message of each topic, in the order of the topics' first ones. No device takes two places."""

    def _init(self, _maxsize: int) -> None:  # the three methods that asyncio's own kinds of queues have
        self._queue: dict[str, Message] = {}

    def _get(self) -> Message:
        return self._queue.pop(next(iter(self._queue)))

    def _put(self, message: Message) -> None:
        self._queue[message.topic.value] = message

    def put_nowait(self, message: Message) -> None:
        """Called by aiomqtt, which cannot stop reading: where the queue is full, the devices have to repeat."""
        if message.topic.value in self._queue:
            self._put(message)
        elif self.full():
            say("reports come faster than they are written", f"{MAX_QUEUE:,} devices wait, others have to repeat")
        else:
            super().put_nowait(message)


class Bridge:
    """Between one broker and one database. What it knows outlives its connections: the newest version of each topic."""

    def __init__(self, engine: AsyncEngine, buffer: ReportBuffer, given: argparse.Namespace) -> None:
        self.engine, self.buffer, self.given = engine, buffer, given
        self.published: dict[str, int] = {}
        self.asked_for: set[tuple[str, str]] = set()  # devices whose newest version is to be published again
        self.asked = asyncio.Event()
        self.is_stopped = False

    def stop(self, task: "asyncio.Task[None]") -> None:
        """End `run`, which that task awaits."""
        self.is_stopped = True
        task.cancel()

    async def run(self) -> None:
        """Connect, and connect again whenever the broker is lost; in pauses that grow."""
        asyncio.get_running_loop().set_exception_handler(lambda _, context: say("the event loop", context["message"]))
        pause = 0.5
        while True:
            try:
                async with client_of(self.given.broker) as client, asyncio.TaskGroup() as tasks:
                    client.pending_calls_threshold = MAX_REPORTS + MAX_PUBLISHES  # above it aiomqtt warns
                    share = f"$share/{self.given.share}/" if self.given.share else ""
                    await client.subscribe(f"{share}{self.given.tenant or '+'}/+/reported", qos=1)
                    pause = 0.5
                    log.info("connected to the broker, subscribed to %s%s/+/reported", share, self.given.tenant or "+")
                    tasks.create_task(self.reports(client))
                    tasks.create_task(self.desired(client))
                    tasks.create_task(self.asked_again(client))
            except* MqttError as errors:
                say("the broker is lost", first_of(errors))
            if self.is_stopped:  # the cancellation came together with the errors, and a TaskGroup raises only these
                return
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)

    async def reports(self, client: Client) -> None:
        """Take reports as fast as they can be written."""
        async with Several(MAX_REPORTS) as several:
            async for message in client.messages:
                await several.start(self.report(client, message))  # waits for room; meanwhile the queue fills up

    async def report(self, client: Client, message: Message) -> None:
        """Write one report and answer it, whatever it is."""
        match message.topic.value.split("/"):
            case [tenant, device, "reported"] if is_level(tenant) and is_level(device) and not message.retain:
                pass
            case _:
                say("messages ignored", f"one on {message.topic.value[:300]!r}: retained, or no device's topic")
                return
        token, status, versions = None, "malformed", {}
        try:
            if len(message.payload) > MAX_PAYLOAD:
                status = "too_large"
            else:
                token, report = read(device, message.payload)
                status = "invalid"
                outcome = await self.buffer.report(tenant, report)
                status = outcome.status.value
                versions = {"desired_version": outcome.desired_version, "reported_version": outcome.reported_version}
        except (ValueError, TypeError, RecursionError, DataError, IntegrityError) as error:
            log.debug("%s: %s", message.topic, error)
        except Exception as error:  # noqa: BLE001 - the database is away: without an answer, the device repeats
            say("reports are not written", error)
            return
        if status in {ReportStatus.LATE, ReportStatus.UNKNOWN_VERSION}:
            if status == ReportStatus.UNKNOWN_VERSION:  # after a restore of the database, for one
                self.published.pop(f"{tenant}/{device}/desired", None)
            self.asked_for.add((tenant, device))
            self.asked.set()
        answer = {"token": token, **versions}
        if status != ReportStatus.ACCEPTED:
            answer |= {"status": status, "what_to_do": WHAT_TO_DO[status]}
        topic = f"{message.topic}/{'accepted' if status == ReportStatus.ACCEPTED else 'rejected'}"
        await client.publish(topic, json.dumps(answer), qos=0)  # if it is lost, the device repeats

    async def desired(self, client: Client) -> None:
        """Publish what is pending: all of it after each connect, since a broker may have lost what it had retained."""
        poll, repeat_after = timedelta(seconds=self.given.poll), timedelta(seconds=self.given.repeat_after)
        pending = watch_pending(self.engine, self.given.tenant, poll=poll, repeat_after=repeat_after)
        async with Several(MAX_PUBLISHES) as several, aclosing(pending) as shadows:
            async for shadow in shadows:
                await several.start(self.publish(client, shadow))

    async def asked_again(self, client: Client) -> None:
        """Publish the newest version for devices that are behind or ahead, once a second however often they say so."""
        while await self.asked.wait():
            await asyncio.sleep(1)
            asked_for, self.asked_for = self.asked_for, set()
            self.asked.clear()
            for tenant in {tenant for tenant, _ in asked_for}:
                try:
                    async with AsyncSession(self.engine) as session:
                        service = AsyncShadowService(session, tenant)
                        shadows = await service.get_many([device for owner, device in asked_for if owner == tenant])
                except Exception as error:  # noqa: BLE001 - the devices will ask again
                    say("shadows are not read", error)
                else:
                    for shadow in shadows.values():
                        await self.publish(client, shadow)

    async def publish(self, client: Client, shadow: Shadow) -> None:
        """Publish what the device should be, and never an older version after a newer one."""
        if not (is_level(shadow.tenant_id) and is_level(shadow.device_id)):
            say("devices without a topic", f"{shadow.device_id[:300]!r} cannot be part of one")
            return
        topic = f"{shadow.tenant_id}/{shadow.device_id}/desired"
        if shadow.desired_version < self.published.get(topic, 0):
            return  # read before a newer one was published: an older one would be retained in its place
        self.published[topic] = shadow.desired_version
        message = {"version": shadow.desired_version, "desired": shadow.desired, "delta": shadow.delta}
        await client.publish(topic, json.dumps(message), qos=1, retain=True)


class Several(asyncio.TaskGroup):
    """A task group of so many tasks at once."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.room = asyncio.Semaphore(most)

    async def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for room, and begin; in the order of the calls."""
        await self.room.acquire()
        self.create_task(work).add_done_callback(lambda _: self.room.release())


def read(device: str, payload: bytes) -> tuple[str | None, Report]:
    # decode(): json.loads would take UTF-16 too. What is in the report is checked when it is written.
    body = json.loads(payload.decode(), object_pairs_hook=each_key_once, parse_constant=no_number)
    if not isinstance(body, dict) or not {"reported"} <= body.keys() <= FIELDS:
        raise ValueError("it has not the fields of a report")
    token = body.pop("token", None)
    if not (token is None or (isinstance(token, str) and len(token) <= MAX_TOKEN)):
        raise ValueError("token is no short text")
    return token, Report(device, **body)


def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("an object has the same key twice")
    return dict(pairs)


def no_number(word: str) -> float:
    raise ValueError(f"{word} is not JSON")


def is_level(name: str) -> bool:
    """Whether an id can be one level of a topic. Brokers end the connection of a client that sends another one."""
    return 0 < len(name) <= MAX_LEVEL and name.isprintable() and name[0] != "$" and not {"/", "+", "#"} & set(name)


def say(what: str, why: object) -> None:
    """Once in SAY_AGAIN seconds, however often it happens; how often it did is said the next time."""
    last, times = said.get(what, (-SAY_AGAIN, 0))
    if time.monotonic() - last < SAY_AGAIN:
        said[what] = last, times + 1
        return
    said[what] = time.monotonic(), 0
    log.warning("%s: %s%s", what, " ".join(str(why).split())[:500], f" (and {times} times before)" if times else "")


said: dict[str, tuple[float, int]] = {}


def first_of(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def client_of(broker: str) -> Client:
    url = urlsplit(broker)
    tls = {"mqtt": None, "mqtts": ssl.create_default_context()}[url.scheme]
    return Client(
        url.hostname or "localhost",
        url.port or (8883 if tls else 1883),
        username=unquote(url.username) if url.username else None,
        password=unquote(url.password) if url.password else None,
        tls_context=tls,
        queue_type=Newest,
        max_queued_incoming_messages=MAX_QUEUE,
    )


def is_broker(given: str) -> bool:
    """Whether it is a URL that `client_of` takes. With a bare / or # in its password, it would be of another host."""
    try:
        url = urlsplit(given)
        return url.scheme in {"mqtt", "mqtts"} and url.port != 0 and not url.path.strip("/") + url.query + url.fragment
    except ValueError:
        return False


class Parser(argparse.ArgumentParser):
    """It does not repeat what it is given: that may be a URL with its password."""

    def error(self, message: str) -> NoReturn:
        """Say which option is wrong, without its value, which stands behind the colon."""
        super().error(f"{message.partition(': ')[0]}: --help says what there is")


async def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description="Bridges an MQTT broker and the shadows of one tenant, or of all.", allow_abbrev=False)
    parser.add_argument("broker", help="mqtt://user:password@host:1883, or mqtts://")
    parser.add_argument("--tenant", default=os.environ.get("IOT_MODELS_TENANT"), help="IOT_MODELS_TENANT; all if none")
    parser.add_argument("--share", metavar="NAME", help="divide the reports among the bridges that have this name")
    parser.add_argument("--poll", type=float, default=10, help="seconds until a write that does not notify is found")
    parser.add_argument("--repeat-after", type=float, default=300, help="seconds until what is pending is sent again")
    given = parser.parse_args(arguments)
    if not is_broker(given.broker):
        parser.error("broker is a URL, mqtt://user:password@host:1883 or mqtts://, with %2F for a / in the password")
    engine = create_async_engine(application_name="mqtt_bridge", pool_size=5)
    async with ReportBuffer(engine) as buffer:  # which writes what it has, also when the bridge is stopped
        bridge = Bridge(engine, buffer, given)
        running = asyncio.create_task(bridge.run())
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, bridge.stop, running)
        with suppress(asyncio.CancelledError):
            await running
    await engine.dispose()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("mqtt").setLevel(logging.CRITICAL)  # each lost connection, which the bridge says itself
    asyncio.run(main())
