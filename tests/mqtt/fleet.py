"""Simulated devices that keep to what docs/bus.md asks of a device: many of them over one connection to the broker."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections import Counter
from contextlib import contextmanager
from random import Random
from typing import TYPE_CHECKING, Any, Final, Self

from aiomqtt import Client, MqttError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

_FIRST_REPEAT: Final = 4.0  # seconds
_LONGEST_REPEAT: Final = 15.0
_PUBLISHED_AT_ONCE: Final = 50
_NEVER: Final = 1e9
_LOG: Final = logging.getLogger("fleet")  # paho's errors about lost connections, which are what is tried
_LOG.setLevel(logging.CRITICAL)


class Device:
    """One device: what it runs, what it said last, and which of its reports were answered `accepted`.

    Attributes:
        seen: The newest version that it has read.
        applied: The newest version that it has applied.
        refused: The version that it has read and refused; None if it applied the newest that it knows.
        state: The document that it runs.
        number: How many reports it has made; the newest one's number is in the report and is its token.
        accepted: The numbers of those that were answered `accepted`.
        alone: Those of them that were the newest when they were answered: no later one can have been written in their
            stead, in the same batch.
    """

    def __init__(self, name: str, refuses: float) -> None:
        self.name = name
        self._refuses = refuses
        self.number = 0
        self.accepted: set[int] = set()
        self.alone: set[int] = set()
        self.counts: Counter[str] = Counter()
        self.forget()

    def forget(self) -> None:
        """Lose the memory, as a device that was replaced, and report anew."""
        self.seen = self.applied = 0
        self.refused: int | None = None
        self.state: dict[str, Any] = {}
        self._takes_any = False
        self.report_anew()

    def report_anew(self) -> None:
        self.number += 1
        self.is_answered = False
        self.due = 0.0
        self._pause = _FIRST_REPEAT

    def report(self) -> bytes:
        """The newest report; from now on it is due again after a pause, which grows."""
        self.due = time.monotonic() + self._pause
        self._pause = min(self._pause * 1.5, _LONGEST_REPEAT)
        report: dict[str, Any] = {"reported": self.state | {"n": self.number}, "token": str(self.number)}
        if self.refused is not None:
            report |= {"refused_version": self.refused, "refusal": "not this one"}
        if self.refused is None or self.applied:  # one without a memory, which refuses, has nothing to acknowledge
            report |= {"acked_version": self.applied}
        return json.dumps(report).encode()

    def take(self, message: dict[str, Any]) -> None:
        """What is desired of it."""
        version = message["version"]
        if version <= self.seen and not self._takes_any:
            self.counts["known or older"] += 1
            return
        self.seen, self._takes_any = version, False
        if Random(f"{self.name} {version}").random() < self._refuses:  # noqa: S311 - the same whenever it is asked
            self.refused = version
        else:
            self.applied, self.state, self.refused = version, message["desired"], None
        self.report_anew()

    def hear(self, kind: str, answer: dict[str, Any], heartbeat: float) -> None:
        """An answer to one of its reports."""
        self.counts[answer.get("status", kind)] += 1
        if kind == "accepted":
            self.accepted.add(int(answer["token"]))
        if answer["token"] != str(self.number):
            return
        if kind == "accepted":
            self.alone.add(self.number)
            self.is_answered = True
            self.due = time.monotonic() + heartbeat
        elif answer["status"] == "unknown_version":
            self._takes_any = True


class Fleet:
    """Devices of one tenant, in a thread and an event loop of their own, for a `with` block.

    Args:
        port: The broker's, on the loopback.
        tenant_id: The tenant.
        names: The devices' ids.
        refuses: How often a device refuses a new version, from 0 to 1.
        heartbeat: The seconds after which a device reports anew though nothing changed.
    """

    def __init__(
        self, port: int, tenant_id: str, names: list[str], *, refuses: float = 0.0, heartbeat: float = _NEVER
    ) -> None:
        self.devices = {name: Device(name, refuses) for name in names}
        self._port = port
        self._tenant_id = tenant_id
        self._heartbeat = heartbeat
        self._running = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._run(),), name="fleet")

    def __enter__(self) -> Self:
        self._thread.start()
        self._running.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()

    def counts(self) -> Counter[str]:
        """How often which answer was heard, and how many desired messages were known or older."""
        return sum((device.counts for device in self.devices.values()), Counter())

    def call(self, change: Callable[[], None]) -> None:
        """Change a device from another thread."""
        self._loop.call_soon_threadsafe(change)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Without heartbeats for the block, after a last one of all devices."""
        heartbeat, self._heartbeat = self._heartbeat, _NEVER
        self.report_anew()
        yield
        self._heartbeat = heartbeat
        self.report_anew()

    def report_anew(self) -> None:
        """Let all devices report, as they do after the pause of a heartbeat."""
        for device in self.devices.values():
            self.call(device.report_anew)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(lambda *_: None)  # aiomqtt watches sockets that are closed already
        self._running.set()
        while not self._stopping.is_set():
            try:
                async with Client("127.0.0.1", self._port, logger=_LOG) as client, asyncio.TaskGroup() as tasks:
                    client.pending_calls_threshold = 2 * _PUBLISHED_AT_ONCE
                    await client.subscribe(
                        [(f"{self._tenant_id}/+/desired", 1), (f"{self._tenant_id}/+/reported/+", 0)]
                    )
                    reading = tasks.create_task(self._read(client))  # which ends all when the connection is lost
                    while not self._stopping.is_set():
                        await self._report(client)
                        await asyncio.sleep(0.05)
                    reading.cancel()
            except* MqttError:
                await asyncio.sleep(0.2)

    async def _read(self, client: Client) -> None:
        async for message in client.messages:
            _, name, *rest = message.topic.value.split("/")
            body = json.loads(message.payload)
            if rest == ["desired"]:
                self.devices[name].take(body)
            else:
                self.devices[name].hear(rest[-1], body, self._heartbeat)

    async def _report(self, client: Client) -> None:
        now = time.monotonic()
        due = [device for device in self.devices.values() if device.due <= now]
        for start in range(0, len(due), _PUBLISHED_AT_ONCE):
            for device in due[start : start + _PUBLISHED_AT_ONCE]:
                if device.is_answered:  # it was a heartbeat's pause
                    device.report_anew()
            await asyncio.gather(
                *(
                    client.publish(f"{self._tenant_id}/{device.name}/reported", device.report(), qos=1)
                    for device in due[start : start + _PUBLISHED_AT_ONCE]
                )
            )
