"""A simulated fleet behind `examples/mqtt_bridge.py`, with faults; proves every minute that nothing was lost.

    python -m tests.guarantees.soak_bridge --minutes 30 --seed 7

Devices report, apply and refuse over a real broker, and lose their memory now and then. Two bridges write and publish,
the service writes desired documents, with and without a notification. Meanwhile the broker, the bridges and the
durable database are stopped, killed and started again. Each phase ends with a rest, in which all devices have to
converge, and with a check: the newest version is acknowledged or refused; what the device runs is stored, after
another regular report at the latest (docs/bus.md, "Order"); each report that was answered `accepted` was committed,
and is stored or overtaken; each desired write that was acknowledged is in the history, and no version is skipped. Exit
code 1 on any violation: the logs then stay in the folder that is named.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final

from sqlalchemy import create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from iot_models import ShadowService, migrate
from tests.databases.durable_server import DurableServer, durable_postgres
from tests.mqtt.bridge import BridgeProcess, mqtt_bridge
from tests.mqtt.broker import BROKERS, Broker, mqtt_broker
from tests.mqtt.checker import keep_reports, violations
from tests.mqtt.fleet import Fleet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sqlalchemy import Engine

_TENANT: Final = "acme"
_BRIDGE: Final = ("--tenant", _TENANT, "--poll", "2", "--repeat-after", "6")
_REST_SECONDS: Final = 180.0  # in which all devices converge
_HEARTBEAT_SECONDS: Final = 20.0
_RESTARTED: Final = ("broker", "bridge", "database")


@dataclass
class Tally:
    """What the run has come to so far."""

    began: float = field(default_factory=time.monotonic)
    faults: Counter[str] = field(default_factory=Counter)
    writes: Counter[str] = field(default_factory=Counter)
    written: list[tuple[str, int]] = field(default_factory=list)
    longest_rest: float = 0.0
    put_right: int = 0
    checks: int = 0
    violations: list[str] = field(default_factory=list)

    def restarts(self) -> int:
        return sum(count for name, count in self.faults.items() if name.startswith(_RESTARTED))

    def minutes(self) -> float:
        return (time.monotonic() - self.began) / 60


class Faults:
    """What goes wrong: one thing after the other, and sometimes the next one before the last is over."""

    def __init__(
        self, server: DurableServer, broker: Broker, bridges: list[BridgeProcess], fleet: Fleet, random: Random
    ) -> None:
        self._server, self._broker, self._bridges, self._fleet, self._random = server, broker, bridges, fleet, random
        self.counts: Counter[str] = Counter()

    def inject(self) -> None:
        kinds: list[Callable[[], str]] = [self._of_broker, self._of_bridge, self._of_database]
        kind = self._random.choice([*kinds, *kinds, self._of_device])
        self.counts[kind()] += 1
        self._start_all()

    def _of_broker(self) -> str:
        number = self._random.choice([signal.SIGKILL, signal.SIGTERM])
        self._broker.stop(number)
        self._away()
        return f"broker {'killed' if number == signal.SIGKILL else 'restarted'}"

    def _of_bridge(self) -> str:
        number = self._random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        bridge = self._random.choice(self._bridges)
        if bridge.is_running:
            bridge.stop(number)
        self._away()
        return f"bridge {'killed' if number == signal.SIGKILL else 'restarted'}"

    def _of_database(self) -> str:
        how = self._random.choice(["killed", "stopped at once", "restarted"])
        if how == "killed":
            self._server.kill()
        else:
            self._server.stop("fast" if how == "restarted" else "immediate")
        self._away()
        return f"database {how}"

    def _of_device(self) -> str:
        """Devices are replaced by others of the same name, which remember nothing."""
        for device in self._random.sample(list(self._fleet.devices.values()), 10):
            self._fleet.call(device.forget)
        return "ten devices replaced"

    def _away(self) -> None:
        if self._random.random() < 0.2:
            self.counts[self._random.choice([self._of_broker, self._of_bridge, self._of_database])()] += 1
        time.sleep(self._random.uniform(0.0, 2.0))

    def _start_all(self) -> None:
        self._server.start()
        self._broker.start()
        for bridge in self._bridges:
            bridge.start()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code: 0 if nothing was lost, 1 if something was, 130 for Ctrl-C with nothing lost so far."""
    parser = argparse.ArgumentParser(description="A simulated fleet behind the MQTT bridge, with faults.")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=None, help="of all random choices; printed, and random by default")
    parser.add_argument("--devices", type=int, default=300)
    parser.add_argument("--phase", type=float, default=60, metavar="SECONDS", help="from one check to the next")
    parser.add_argument("--broker", choices=BROKERS, default=BROKERS[-1], help="mosquitto where it is installed")
    given = parser.parse_args(arguments)
    given.seed = given.seed if given.seed is not None else time.time_ns() % 1_000_000
    folder = Path(tempfile.mkdtemp(prefix="iot_models_soak_bridge_"))
    tally, interrupted, answers = Tally(), False, Counter[str]()
    _say(f"{given.minutes:g} minutes, {given.devices} devices, {given.broker}, seed {given.seed}; logs in {folder}")
    with durable_postgres() as server:
        engine = create_engine(server.url, pool_pre_ping=True)
        try:
            answers = _run(server, engine, folder, tally, given)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            engine.dispose()
        server.stop("fast")
        if tally.violations:
            (folder / "server.log").write_text(server.log())
    _say(_summary(tally, answers, given))
    if tally.violations:
        _say(f"The logs are in {folder}")
        return 1
    shutil.rmtree(folder)
    return 130 if interrupted else 0


def _run(server: DurableServer, engine: Engine, folder: Path, tally: Tally, given: argparse.Namespace) -> Counter[str]:
    """Phase after phase until the time is up or something is lost; returns what the devices heard."""
    random = Random(given.seed)  # noqa: S311 - to be repeated
    names = [f"device-{number:04}" for number in range(given.devices)]
    migrate.upgrade(engine)
    with Session(engine) as session, session.begin():
        ShadowService(session, _TENANT).register_many(dict.fromkeys(names, "berlin"))
    keep_reports(engine)
    with ExitStack() as stack:
        broker = stack.enter_context(mqtt_broker(given.broker, folder))
        share = ("--share", "soak") if given.broker == "mosquitto" else ()
        bridges = [
            stack.enter_context(mqtt_bridge(broker.url, server.url, folder, *_BRIDGE, *share, name=name))
            for name in ("first", "second")
        ]
        fleet = stack.enter_context(Fleet(broker.port, _TENANT, names, refuses=0.1, heartbeat=_HEARTBEAT_SECONDS))
        faults = Faults(server, broker, bridges, fleet, random)
        tally.faults = faults.counts
        deadline = tally.began + given.minutes * 60
        while (left := deadline - time.monotonic()) > 0 and not tally.violations:
            with _writing(engine, names, tally, Random(random.random())):  # noqa: S311 - to be repeated
                _phase(faults, fleet, tally, random, min(left, given.phase))
            began = time.monotonic()
            with fleet.resting():
                heartbeat = began + _HEARTBEAT_SECONDS
                while found := violations(engine, _TENANT, fleet, tally.written):
                    if time.monotonic() > began + _REST_SECONDS:
                        break
                    if time.monotonic() > heartbeat:  # what puts right that a repeated older report was written last
                        tally.put_right += len(found)
                        fleet.report_anew()
                        heartbeat += _HEARTBEAT_SECONDS
                    time.sleep(0.5)
            tally.longest_rest = max(tally.longest_rest, time.monotonic() - began)
            tally.checks += 1
            tally.violations += found
            for bridge in bridges:
                if bridge.has_ended or any("Traceback" in line for line in bridge.said()):
                    tally.violations.append("a bridge ended by itself, or stumbled: see its log")
        return fleet.counts()


def _phase(faults: Faults, fleet: Fleet, tally: Tally, random: Random, seconds: float) -> None:
    """Faults at random intervals; a line of progress after each fifth."""
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        time.sleep(random.uniform(0.5, 4.0))
        faults.inject()
        number += 1
        if number % 5 == 1:
            heard = fleet.counts()
            _say(
                f"{tally.minutes():5.1f} min  {tally.writes['acknowledged']:,} versions  "
                f"{heard['accepted']:,} reports accepted  {heard['late']:,} late  {tally.restarts()} restarts  "
                f"{tally.checks} checks  {len(tally.violations)} violations"
            )


@contextmanager
def _writing(engine: Engine, names: list[str], tally: Tally, random: Random) -> Iterator[None]:
    """Write desired documents, every second time with a notification, for the block."""
    stopping = threading.Event()

    def write() -> None:
        while not stopping.wait(random.uniform(0.0, 0.3)):
            some = random.sample(names, random.choice([1, 1, 1, 20]))
            documents = {name: {"mode": random.choice(["eco", "auto"]), "target_c": random.random()} for name in some}
            try:
                with Session(engine) as session, session.begin():
                    service = ShadowService(session, _TENANT, notify=random.choice([True, False]))
                    shadows = service.replace_desired_many(documents)
            except DBAPIError:
                tally.writes["lost with the database"] += len(some)
            else:
                tally.writes["acknowledged"] += len(some)
                tally.written += [(name, shadow.desired_version) for name, shadow in shadows.items()]

    thread = threading.Thread(target=write, name="writer")
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _summary(tally: Tally, answers: Counter[str], given: argparse.Namespace) -> str:
    def listed(counts: Counter[str]) -> str:
        return ", ".join(f"{name} {count:,}" for name, count in counts.most_common()) or "none"

    return "\n".join(
        [
            "",
            f"    python -m tests.guarantees.soak_bridge --minutes {given.minutes:g} --seed {given.seed} "
            f"--devices {given.devices} --broker {given.broker}",
            "",
            "| | |",
            "|---|---|",
            f"| time | {tally.minutes():.1f} minutes, {tally.checks} checks; the longest rest until all had converged "
            f"{tally.longest_rest:.0f} s |",
            f"| what waited for the next regular report of its device | {tally.put_right} |",
            f"| desired versions | {listed(tally.writes)} |",
            f"| what {given.devices} devices heard | {listed(answers)} |",
            f"| restarts | {tally.restarts()} of broker, bridges and database |",
            f"| faults | {listed(tally.faults)} |",
            f"| **violations** | **{len(tally.violations)}** |",
            *[f"* {violation}" for violation in tally.violations[:20]],
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
