"""An MQTT broker of a test's own, as a process: amqtt, and mosquitto where it is installed. Neither keeps anything.

What was retained, and what was on its way to a client, is gone when it starts again: the hardest case for a bridge.
"""

from __future__ import annotations

import asyncio
import getpass
import logging
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_SECONDS: Final = 30.0
BROKERS: Final = ["amqtt", *(["mosquitto"] if shutil.which("mosquitto") else [])]


class Broker:
    """A broker on a loopback port, which stays the same from one start to the next; made by `mqtt_broker`."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.port = free_port()
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self._log = folder / f"{kind}.log"
        self._process: subprocess.Popen[bytes] | None = None
        if kind == "mosquitto":
            configuration = folder / "mosquitto.conf"
            # Without limits, because one client stands for a thousand devices.
            configuration.write_text(
                f"listener {self.port} 127.0.0.1\nallow_anonymous true\nuser {getpass.getuser()}\n"
                "max_queued_messages 0\nmax_inflight_messages 0\n"
            )
            self._command = ["mosquitto", "-c", str(configuration)]
        else:
            self._command = [sys.executable, "-m", "tests.mqtt.broker", str(self.port)]

    def start(self) -> None:
        """Start it, and return once it accepts connections; nothing if it runs already."""
        if self._process is not None and self._process.poll() is None:
            return
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + _SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        raise RuntimeError(f"the broker did not start:\n{self._log.read_text()[-2000:]}")

    def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it, and return when it has gone."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(_SECONDS)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


@contextmanager
def mqtt_broker(kind: str, folder: Path, *, started: bool = True) -> Iterator[Broker]:
    """A broker for the block.

    Args:
        kind: One of BROKERS.
        folder: For its log and its configuration.
        started: Whether it runs when the block begins.
    """
    broker = Broker(kind, folder)
    if started:
        broker.start()
    try:
        yield broker
    finally:
        broker.stop()


async def _serve(port: int) -> None:
    from amqtt.broker import Broker as Amqtt  # noqa: PLC0415 - for this process only

    logging.basicConfig(level=logging.CRITICAL)
    plugins = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
    broker = Amqtt({"listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}}, "plugins": plugins})
    await broker.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
