"""What goes wrong in production, done on purpose: to the server, its connections, its locks, and the writers."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from alembic.util import CommandError
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError

from iot_models import migrate
from tests.guarantees.load.writer import APPLICATION

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from sqlalchemy import Connection

    from tests.databases.durable_server import DurableServer
    from tests.guarantees.load.many_writers import Load

_WRITERS: Final = "SELECT pid FROM pg_stat_activity WHERE application_name = :writer AND pid <> pg_backend_pid()"


class Faults:
    """Injects one fault at a time; each call returns when the server is up again."""

    def __init__(self, server: DurableServer, random: Random) -> None:
        self._server = server
        self._random = random
        self._engine = create_engine(server.url, poolclass=NullPool)
        self.injected: Counter[str] = Counter()

    def inject(self, load: Load) -> None:
        """Any of them, at random."""
        kinds: dict[str, tuple[int, Callable[[Load], object]]] = {
            "connections cut": (10, self._cut),
            "statements cancelled": (6, self._cancel),
            "rows locked": (6, self._lock),
            "idle in transaction": (4, self._sit_idle),
            "writer killed": (3, self._kill_writer),
            "immediate shutdown": (3, self._crash),
            "postmaster killed": (2, self._kill_postmaster),
            "backend killed": (2, self._kill_backend),
        }
        (name,) = self._random.choices(list(kinds), [weight for weight, _ in kinds.values()])
        try:
            kinds[name][1](load)
        except DBAPIError:  # the server crashed under this very session: wait for it, the fault itself is done
            self._await_server()
        self.injected[name] += 1

    def roll_back(self) -> None:
        """Downgrade to 075 under load, and let the writers find out; what is held up is tried again, as it says."""
        for attempt in range(3):
            try:
                migrate.downgrade(self._engine, "075")
                break
            except (CommandError, DBAPIError):
                if attempt == 2:
                    raise
        self.injected["rollback to 075"] += 1
        time.sleep(1.0)

    def _cut(self, _: Load) -> None:
        self._on_some_writers("pg_terminate_backend")

    def _cancel(self, _: Load) -> None:
        self._on_some_writers("pg_cancel_backend")

    def _on_some_writers(self, function: str) -> None:
        with self._engine.connect() as connection:
            for pid in self._some_writers(connection):
                connection.execute(text(f"SELECT {function}(:pid)"), {"pid": pid})

    def _some_writers(self, connection: Connection) -> list[int]:
        pids = list(connection.scalars(text(_WRITERS), {"writer": APPLICATION}))
        return self._random.sample(pids, min(len(pids), self._random.randint(1, 3)))

    def _lock(self, _: Load) -> None:
        """A session of somebody else that holds two rows while it thinks."""
        with self._engine.begin() as connection:
            self._take_two_rows(connection)
            time.sleep(self._random.uniform(0.1, 1.0))

    def _sit_idle(self, _: Load) -> None:
        """A session that forgot to commit: its timeout ends it, and its connection with it."""
        with self._engine.connect() as connection:
            connection.execute(text("SET idle_in_transaction_session_timeout = '500ms'"))
            self._take_two_rows(connection)
            time.sleep(0.7)
            connection.execute(text("SELECT 1"))  # raises: the server has ended it

    def _take_two_rows(self, connection: Connection) -> None:
        rows: list[Any] = list(connection.execute(text("SELECT tenant_id, device_id FROM device_state")))
        for tenant, device in self._random.sample(rows, min(len(rows), 2)):  # devices are removed, too
            connection.execute(
                text("SELECT FROM device_state WHERE tenant_id = :tenant AND device_id = :device FOR UPDATE"),
                {"tenant": tenant, "device": device},
            )

    def _kill_writer(self, load: Load) -> None:
        load.kill_one(self._random.randrange(100))

    def _crash(self, _: Load) -> None:
        self._server.stop("immediate")
        time.sleep(self._random.uniform(0, 0.3))
        self._server.start()

    def _kill_postmaster(self, _: Load) -> None:
        self._server.kill()
        time.sleep(self._random.uniform(0, 0.3))
        self._server.start()

    def _kill_backend(self, _: Load) -> None:
        """`kill -9` of one backend: the postmaster throws out all others and recovers, as after a crash."""
        with self._engine.connect() as connection:
            for pid in self._some_writers(connection)[:1]:
                os.kill(pid, signal.SIGKILL)
            connection.execute(text("SELECT pg_sleep(1)"))  # raises as soon as the postmaster has noticed

    def _await_server(self) -> None:
        for _ in range(600):
            try:
                with self._engine.connect():
                    return
            except DBAPIError:
                time.sleep(0.05)
        raise RuntimeError("the server did not come back within 30 seconds")
