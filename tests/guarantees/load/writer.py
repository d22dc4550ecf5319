"""One writer: a process that runs random units of work until it is told to stop, and records what it was told.

Run as a program with a `Plan` as JSON and its parent's process id. SIGTERM ends it after the unit it is in; it also ends when its parent does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, InvalidRequestError, OperationalError, ProgrammingError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import ObjectDeletedError, StaleDataError

from iot_models.engine import create_engine
from tests.guarantees.load.calls import call
from tests.guarantees.load.record import (
    AUTOCOMMIT,
    STANDS,
    WRITTEN,
    Answer,
    Operation,
    Outcome,
    Recorder,
    latest_requests,
)
from tests.guarantees.load.workload import Workload

if TYPE_CHECKING:
    from sqlalchemy import Engine

APPLICATION: Final = "iot_models_writer"  # by which its connections are found in pg_stat_activity
ROLLED_BACK: Final = "rolled back on purpose"
UNGUARDED: Final = "document read without its version"
GONE: Final = "an object's row was removed"
NOT_RESET: Final = "connection came from the pool in a failed transaction"


@dataclass(frozen=True, slots=True)
class Plan:
    """What one writer is to do.

    Attributes:
        url: The database.
        name: Its own, also that of its records.
        records: The folder for them.
        isolation: The level of its transactions.
        seed: Of its random choices.
        hostile: Whether it sometimes takes its own pool's last connection, and sets timeouts that fire.
        longest: How many calls a transaction may have.
    """

    url: str
    name: str
    records: str
    isolation: str
    seed: int
    hostile: bool
    longest: int = 4

    @property
    def path(self) -> Path:
        return Path(self.records) / f"{self.name}.jsonl"

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


class Writer:
    """Runs units of work, one after another."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._random = Random(plan.seed)  # noqa: S311 - to be repeated, not to be secret
        self._workload = Workload(self._random, plan.name.rpartition("-")[2])
        self._recorder = Recorder(plan.path)
        self._engine = create_engine(
            plan.url,
            application_name=APPLICATION,
            statement_timeout=timedelta(seconds=5),
            isolation_level=plan.isolation,
            connect_args={"options": "-c deadlock_timeout=20ms"},
            pool_size=1,
            max_overflow=0,
            pool_timeout=0.02,
        )
        self._autocommit = self._engine.execution_options(isolation_level=AUTOCOMMIT)
        self._count = 0
        self._unanswered: tuple[Operation, ...] = ()  # requests whose answer was lost: they are made again

    def work(self) -> None:
        """One unit, recorded."""
        self._count += 1
        with contextlib.ExitStack() as stack:
            if self._plan.hostile and self._random.random() < 0.003:
                with contextlib.suppress(DBAPIError):  # the server is down
                    stack.enter_context(self._engine.connect())  # the pool's only one: there is none for the unit
            self._unit()

    def close(self) -> None:
        self._engine.dispose()
        self._recorder.close()

    def _unit(self) -> None:
        name = f"{self._plan.name}-{self._count}"
        alone = self._random.random() < 0.3 and len(self._unanswered) < 2
        # From a snapshot no life can be seen that began and ended after it (docs/history.md): there none is registered.
        registering = 1 if self._plan.isolation == "READ COMMITTED" else 3 * alone
        operations = self._unanswered or self._with_a_repeat(
            self._workload.operations(name, 1 if alone else self._length(), registering=registering)
        )
        unit = _Unit(self._autocommit if alone else self._engine, operations, self._random)
        self._recorder.begin(name, AUTOCOMMIT if alone else self._plan.isolation, operations)
        try:
            if alone:
                unit.run_alone()
            else:
                self._transaction(unit, name)
        except SQLAlchemyError as error:
            unit.fail(error)
        self._recorder.end(name, unit.outcome, unit.error, unit.answers)
        self._remember(unit)
        if unit.is_unanswered:
            self._unanswered = tuple(operation for operation in operations if operation.is_request)
        elif unit.outcome == "acknowledged":
            self._unanswered = ()
        if unit.unreachable:
            time.sleep(0.05)  # the server is down: do not fill the record with that

    def _with_a_repeat(self, operations: tuple[Operation, ...]) -> tuple[Operation, ...]:
        """Now and then the last one is a request that a writer made before, maybe at this very moment."""
        if self._random.random() >= 0.15:
            return operations
        records = sorted(self._plan.path.parent.glob(f"{self._plan.name.rpartition('-')[0]}-w*.jsonl"))
        requests = latest_requests(self._random.choice(records))
        if not requests:
            return operations
        return (*operations[:-1], self._random.choice([requests[-1], self._random.choice(requests)]))

    def _length(self) -> int:
        return min(self._random.choice([1, 1, 1, 1, 2, 3, 4]), self._plan.longest)

    def _transaction(self, unit: _Unit, name: str) -> None:
        with Session(unit.engine, autoflush=self._random.random() < 0.5) as session:
            if self._plan.hostile and self._random.random() < 0.05:
                setting = self._random.choice(["statement_timeout", "lock_timeout"])
                session.execute(text(f"SET LOCAL {setting} = '{self._random.randint(1, 5)}ms'"))
            unit.run(session)
            if self._random.random() < 0.07:
                session.rollback()
                unit.error = ROLLED_BACK
                return
            self._recorder.committing(name, unit.answers)
            unit.committing = True
            session.commit()
            unit.outcome, unit.committing = "acknowledged", False

    def _remember(self, unit: _Unit) -> None:
        for operation, answers in zip(unit.operations, unit.answers, strict=False):
            for entry, answer in zip(operation.entries, answers, strict=True):
                key = operation.tenant, entry.device
                desired, reported = self._workload.seen.get(key, (0, 0))
                current = answer.status in {WRITTEN, STANDS} and unit.outcome == "acknowledged"
                if current or answer.status not in {WRITTEN, STANDS, "InvalidDocument"}:
                    seen = (answer.desired_version or desired, answer.reported_version or reported)
                    self._workload.seen[key] = seen
                if current and operation.section == "desired" and answer.document is not None:
                    self._workload.wanted[key] = answer.document


# See test_report_batch_in_autocommit. To register inserts first, and asks for the shadow then.
_IN_STEPS: Final = {"replace_reported_many", "patch_reported_many", "register", "register_many"}


class _Unit:
    """A unit under way: what has been answered so far, and what has become of it."""

    def __init__(self, engine: Engine, operations: tuple[Operation, ...], random: Random) -> None:
        self.engine = engine
        self._random = random
        self.operations = operations
        self.answers: list[tuple[Answer, ...]] = []
        self.outcome: Outcome = "refused"
        self.error: str | None = None
        self.committing = False
        self.unreachable = False
        self.is_unanswered = False

    def run(self, session: Session) -> None:
        for operation in self.operations:
            self.answers.append(call(session, operation, self._random))

    def run_alone(self) -> None:
        """In AUTOCOMMIT mode the answer is the acknowledgement, whatever befalls the connection after it."""
        self.committing = True
        with Session(self.engine) as session:
            self.run(session)
            self.outcome, self.committing = "acknowledged", False

    def fail(self, error: SQLAlchemyError) -> None:
        """Unknown only if the connection was lost while the work was being committed.

        Also in AUTOCOMMIT mode of what takes several statements that write: of them the first may have been committed.
        """
        self.error = _name(error)
        if self.outcome == "acknowledged":
            return
        if not isinstance(error, DBAPIError):
            return
        self.unreachable = error.statement is None and not self.answers
        self.is_unanswered = not _is_definite(error)
        if self.committing and not self.unreachable:
            in_steps = not self.answers and self.operations[0].kind in _IN_STEPS
            if in_steps or not _is_definite(error):
                self.outcome = "unknown"


def _sqlstate(error: DBAPIError) -> str | None:
    state: str | None = getattr(error.orig, "sqlstate", None)
    return state


def _is_definite(error: DBAPIError) -> bool:
    """Whether the server itself said that it did not do it, and went on: not that it was ending."""
    state = _sqlstate(error)
    return state is not None and not state.startswith(("08", "57P"))


def _name(error: SQLAlchemyError) -> str:
    if isinstance(error, OperationalError) or (isinstance(error, DBAPIError) and _sqlstate(error)):
        return f"{type(error).__name__} {_sqlstate(error) or 'without SQLSTATE'}"
    if isinstance(error, (StaleDataError, PoolTimeoutError)):
        return type(error).__name__
    if isinstance(error, InvalidRequestError) and "was read without the desired_version" in str(error):
        return UNGUARDED
    if isinstance(error, ObjectDeletedError) or "Could not refresh instance" in str(error):
        return GONE
    # Probably a ROLLBACK that was itself cancelled, after which the connection went back to the pool as it was. The ping
    # of the next user fails, and the pool makes another connection.
    if isinstance(error, ProgrammingError) and "can't change 'autocommit' now" in str(error):
        return NOT_RESET
    return f"{type(error).__name__}: {error}"


def main(plan: Plan, parent: int) -> None:
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    writer = Writer(plan)
    while not stopping and os.getppid() == parent:
        writer.work()
    writer.close()


if __name__ == "__main__":
    main(Plan(**json.loads(sys.argv[1])), int(sys.argv[2]))
