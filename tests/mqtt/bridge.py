"""`examples/mqtt_bridge.py` as a process, started as a user starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from tests.databases.alembic_runs import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_SECONDS: Final = 12.0


class BridgeProcess:
    """A bridge that can be ended and started again; made by `mqtt_bridge`."""

    def __init__(self, broker_url: str, database_url: str, log: Path, options: tuple[str, ...]) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.endswith(("DATABASE_URL", "TENANT"))}
        self._environment = inherited | {"IOT_MODELS_DATABASE_URL": database_url}
        self._command = [sys.executable, str(CHECKOUT / "examples" / "mqtt_bridge.py"), broker_url, *options]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def has_ended(self) -> bool:
        """Whether it ended by itself, which it never should."""
        return self._process is not None and self._process.poll() is not None

    def start(self) -> None:
        """Start it; nothing if it was started already."""
        if self._process is not None:
            return
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=CHECKOUT, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it; returns its exit code."""
        assert self._process is not None
        assert self.is_running, f"the bridge ended by itself:\n{self._log.read_text()[-4000:]}"
        self._process.send_signal(number)
        code = self._process.wait(_SECONDS)
        self._process = None
        return code

    def said(self) -> list[str]:
        """The lines of its log."""
        return self._log.read_text().splitlines()


@contextmanager
def mqtt_bridge(
    broker_url: str, database_url: str, folder: Path, *options: str, name: str = "bridge"
) -> Iterator[BridgeProcess]:
    """A running bridge for the block."""
    bridge = BridgeProcess(broker_url, database_url, folder / f"{name}.log", options)
    bridge.start()
    try:
        yield bridge
    finally:
        if bridge.is_running:
            bridge.stop(signal.SIGKILL)
