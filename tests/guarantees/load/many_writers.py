"""Many writers at once, from their start until the checker has seen what is left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from sqlalchemy import NullPool, create_engine, text

from tests.databases.alembic_runs import CHECKOUT
from tests.guarantees.load import writer
from tests.guarantees.load.checker import violations
from tests.guarantees.load.history import forget_history, read_fleet, read_history
from tests.guarantees.load.record import read_records

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sqlalchemy import Connection

    from tests.guarantees.load.history import Change, Fleet
    from tests.guarantees.load.record import Unit
    from tests.guarantees.load.writer import Plan

_DRAIN_SECONDS: Final = 30.0
_OUTCOMES: Final = {name: f'"outcome":"{name}"'.encode() for name in ("acknowledged", "refused", "unknown")}

SERIALIZATION: Final = "OperationalError 40001"

# What a unit of work may meet while faults are injected; that it left nothing behind is the checker's business.
_FAULTS: Final = frozenset(
    {
        "writer killed",
        "TimeoutError",  # the pool is full
        "OperationalError 55P03",  # lock_timeout
        "OperationalError 57014",  # statement_timeout, pg_cancel_backend
        "OperationalError 57P01",  # pg_terminate_backend, a shutdown
        "OperationalError 57P02",  # another backend crashed
        "OperationalError 57P03",  # starting up, shutting down
        "OperationalError without SQLSTATE",  # the connection is gone, or refused
        writer.NOT_RESET,
        "ProgrammingError 42703",  # the database is rolled back to revision 075: undefined column
        "ProgrammingError 42P01",  # on the way there: undefined table, the history
    }
)


@dataclass
class Findings:
    """What one load came to."""

    violations: list[str]
    units: list[Unit]
    history: list[Change]
    after: Fleet
    errors: Counter[str] = field(init=False)

    def __post_init__(self) -> None:
        self.errors = Counter(unit.error for unit in self.units if unit.error is not None)

    def requests(self) -> Counter[tuple[str, str, str]]:
        """How often each request was made, by its device and id."""
        return Counter(
            (operation.tenant, entry.device, entry.request)
            for unit in self.units
            for operation in unit.operations
            for entry in operation.entries
            if entry.request is not None
        )

    def answers(self) -> Counter[tuple[str, str]]:
        """How often each kind of operation got which answer."""
        return Counter(
            (operation.kind, answer.status)
            for unit in self.units
            for operation, answers in zip(unit.operations, unit.answers or (), strict=False)
            for answer in answers
        )


class Load:
    """Some writers on one database. Used as `with load.writers(): ...`, and then `load.findings(before)`."""

    def __init__(self, plan: Plan, processes: int) -> None:
        """`plan.name` is a prefix, `plan.seed` the first writer's."""
        self._plan = plan
        self._processes = processes
        self._writers: dict[Plan, subprocess.Popen[bytes]] = {}
        self._plans: list[Plan] = []
        self._read: Counter[Path] = Counter()
        self.broken: list[str] = []
        self.counts: Counter[str] = Counter()

    @contextlib.contextmanager
    def writers(self) -> Iterator[None]:
        """The writers run during the block; after it they and their connections have ended."""
        try:
            for _ in range(self._processes):
                self._start_one()
            while not all(plan.path.exists() for plan in self._writers):  # importing all it needs takes a while
                self._notice_deaths()
                time.sleep(0.02)
            yield
        finally:
            self._drain()

    def kill_one(self, number: int) -> None:
        """`kill -9` of a writer, and another one in its place."""
        if not self._writers:
            return
        plan = list(self._writers)[number % len(self._writers)]
        process = self._writers.pop(plan)
        process.kill()
        process.wait()
        self._start_one()

    def count(self) -> Counter[str]:
        """How many units have ended how, so far."""
        for plan in self._plans:
            if not plan.path.exists():
                continue
            with plan.path.open("rb") as file:
                file.seek(self._read[plan.path])
                new = file.read()
            new = new[: new.rfind(b"\n") + 1]
            self._read[plan.path] += len(new)
            self.counts.update({name: new.count(mark) for name, mark in _OUTCOMES.items()})
        self._notice_deaths()
        return self.counts

    def findings(self, before: Fleet) -> Findings:
        """Check everything; forget the history and the records if nothing is wrong. `before`: when writers began."""
        units = read_records(plan.path for plan in self._plans if plan.path.exists())
        with self._connection("REPEATABLE READ") as connection:
            history, after = read_history(connection), read_fleet(connection)
        found = self.broken + violations(units, history, before, after)
        found += [f"{u.name} ({u.mode}) met {u.error}" for u in units if not _may_meet_that(u, self._plan)]
        if not found:
            with self._connection("READ COMMITTED") as connection:
                forget_history(connection)
                connection.commit()
            for plan in self._plans:
                plan.path.unlink(missing_ok=True)
        return Findings(found, units, history, after)

    def _start_one(self) -> None:
        number = len(self._plans)
        base = self._plan
        name, seed = f"{base.name}-w{number}", base.seed + number
        plan = dataclasses.replace(base, name=name, seed=seed)
        self._plans.append(plan)
        command = [sys.executable, "-m", writer.__name__, plan.as_json(), str(os.getpid())]
        # A session of its own: Ctrl-C reaches this process only, which lets the writers finish what they are at.
        self._writers[plan] = subprocess.Popen(command, cwd=CHECKOUT, start_new_session=True)

    def _notice_deaths(self) -> None:
        for plan, process in self._writers.items():
            if process.poll() is not None:
                self.broken.append(f"writer {plan.name} ended by itself, with {process.returncode}")
        self._writers = {plan: process for plan, process in self._writers.items() if process.poll() is None}

    def _drain(self) -> None:
        """Let each writer finish its unit; then wait for what killed writers left running on the server."""
        self._notice_deaths()
        for process in self._writers.values():
            process.terminate()
        for plan, process in self._writers.items():
            try:
                code = process.wait(_DRAIN_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
            if code != 0 and not (code == -signal.SIGTERM and not plan.path.exists()):  # it had not begun
                self.broken.append(f"writer {plan.name} did not end when it was told to, or with {code}")
        self._writers = {}
        with self._connection("AUTOCOMMIT") as connection:
            deadline = time.monotonic() + _DRAIN_SECONDS
            while connection.scalar(text(_BACKENDS), {"name": writer.APPLICATION}):
                if time.monotonic() > deadline:
                    raise RuntimeError("connections of writers that have ended are still open on the server")
                time.sleep(0.02)

    @contextlib.contextmanager
    def _connection(self, isolation: str) -> Iterator[Connection]:
        engine = create_engine(self._plan.url, poolclass=NullPool, isolation_level=isolation)
        with engine.connect() as connection:
            yield connection


def _may_meet_that(unit: Unit, plan: Plan) -> bool:
    match unit.error:
        case None | writer.ROLLED_BACK:
            return True
        case "StaleDataError" | writer.UNGUARDED | writer.GONE:
            return any(
                operation.kind.startswith("orm_") or operation.kind == "heartbeat" for operation in unit.operations
            )
        case "OperationalError 40P01":
            # Calls lock in one order: a deadlock takes transactions of several. Its victim can be any that waits, also
            # one call for one row: being the first in the row's queue is a lock too.
            return plan.longest > 1
        case "OperationalError 40001":
            return unit.mode in {"REPEATABLE READ", "SERIALIZABLE"}
    return plan.hostile and unit.error in _FAULTS


_BACKENDS: Final = (
    "SELECT count(*) FROM pg_stat_activity WHERE application_name = :name AND datname = current_database()"
)
