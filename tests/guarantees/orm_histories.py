"""Two sessions that load, change and write the same devices in every order, through objects and through the service.

The rule is judged without versions: what an object was changed on top of is what it showed at that moment, and a flush
that is accepted must have found just that in the row. Everything else that a history may show is said in `Histories`.
"""

from __future__ import annotations

import heapq
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from sqlalchemy import inspect, select, text
from sqlalchemy.exc import InvalidRequestError, OperationalError
from sqlalchemy.orm import Session, defer, load_only
from sqlalchemy.orm.exc import StaleDataError

from iot_models import DeviceState, Report, ShadowService
from tests.reference.json_values import canonical

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine
    from sqlalchemy.orm import SessionTransaction
    from sqlalchemy.sql.base import ExecutableOption


class Machine(DeviceState):
    """What a team makes of `DeviceState`: another class of the same rows."""


TENANT = "acme"
sessions = st.integers(0, 1)
devices = st.sampled_from(("a", "b"))
kinds = st.sampled_from((DeviceState, Machine))
names = st.lists(
    st.sampled_from(("desired_state", "desired_version", "reported_state", "status")),
    min_size=1,
    max_size=2,
    unique=True,
)
OPTIONS: dict[str, Callable[[Any], ExecutableOption]] = {
    "only the document": lambda kind: load_only(kind.desired_state),
    "only the version": lambda kind: load_only(kind.desired_version),
    "only the status": lambda kind: load_only(kind.status),
    "without the document": lambda kind: defer(kind.desired_state),
    "without the version": lambda kind: defer(kind.desired_version),
}
SERVICE_WRITES: dict[str, Callable[[ShadowService, str, Any], object]] = {
    "replace_desired": lambda service, device, value: service.replace_desired(
        device, {"service": value, "queue": [2, 1]}
    ),
    "patch_desired": lambda service, device, value: service.patch_desired(device, {"service": value}),
    "replace_desired_many": lambda service, device, value: service.replace_desired_many({device: {"many": value}}),
    "patch_desired_many": lambda service, device, value: service.patch_desired_many([device], {"many": value}),
    "replace_reported": lambda service, device, value: service.replace_reported(device, {"is": value}),
    "patch_reported": lambda service, device, value: service.patch_reported(device, {"is": value}),
    "replace_reported_many": lambda service, device, value: service.replace_reported_many(
        [Report(device, {"is": value})]
    ),
}


@dataclass
class Change:
    """A change of an object that is not flushed yet."""

    on_top_of: Any  # the document that the object showed
    version: int | None  # the version that it showed beside it; None if the two were not read together
    by_heap_only: bool  # no method of the list was called: the next flush need not notice, the next commit must


class Histories(RuleBasedStateMachine):
    """What must hold: no flush overwrites what its object did not show; none is refused without a reason; a version
    rises by one for each desired write that is acknowledged, and for nothing else.
    """

    engine: ClassVar[Engine]

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        with self.engine.begin() as connection:
            connection.execute(text("DELETE FROM device_state"))
            connection.execute(text("DELETE FROM device_shadow_history"))  # a new row would go on above it
            connection.execute(
                text("""INSERT INTO device_state (tenant_id, site_id, device_id, desired_state)
                        SELECT 'acme', 'berlin', d, '{"queue": [3, 1, 2]}' FROM unnest(ARRAY['a', 'b']) d""")
            )

    @initialize(autoflush=st.booleans(), expire=st.booleans())
    def open_sessions(self, autoflush: bool, expire: bool) -> None:  # noqa: FBT001 - drawn
        self.sessions = [
            Session(self.engine, autoflush=False, expire_on_commit=expire),
            Session(self.engine, autoflush=autoflush, expire_on_commit=expire),
        ]
        self.kept: list[dict[tuple[type, str], DeviceState]] = [{}, {}]  # a session holds its objects weakly
        self.changes: list[dict[DeviceState, Change]] = [{}, {}]
        self.whole: set[int] = set()  # ids of objects whose document and version were last read together
        self.savepoints: list[list[tuple[SessionTransaction, dict[str, int]]]] = [[], []]
        self.written: list[dict[str, int]] = [{}, {}]  # desired writes of the open transactions
        self.committed = dict.fromkeys("ab", 0)

    def teardown(self) -> None:
        for session in getattr(self, "sessions", ()):
            session.close()

    # Objects

    @rule(who=sessions, device=devices, kind=kinds)
    def load(self, who: int, device: str, kind: type[DeviceState]) -> None:
        self.object(who, device, kind)

    @rule(who=sessions, device=devices, kind=kinds, how=st.sampled_from(list(OPTIONS)), again=st.booleans())
    def load_partly(self, who: int, device: str, kind: type[DeviceState], how: str, again: bool) -> None:  # noqa: FBT001 - drawn
        query = select(kind).filter_by(device_id=device).options(OPTIONS[how](kind))

        def read() -> None:
            found = self.sessions[who].scalars(query.execution_options(populate_existing=again)).one()
            self.kept[who][kind, device] = found
            self.whole.discard(id(found))
            if again:
                self.changes[who].pop(found, None)

        self.acts(who, read, flushes=self.sessions[who].autoflush)

    @rule(who=sessions, device=devices, kind=kinds, what=names, read=st.booleans())
    def expire(self, who: int, device: str, kind: type[DeviceState], what: list[str], read: bool) -> None:  # noqa: FBT001 - drawn
        found = self.object(who, device, kind)
        if found is None:
            return
        self.sessions[who].expire(found, what)
        self.forget(who, found, what)
        if read:
            self.acts(who, lambda: [getattr(found, name) for name in what], flushes=self.sessions[who].autoflush)

    @rule(who=sessions, device=devices, kind=kinds, what=names)
    def refresh(self, who: int, device: str, kind: type[DeviceState], what: list[str]) -> None:
        found = self.object(who, device, kind)
        if found is None:
            return

        def read() -> None:
            self.sessions[who].refresh(found, what)

        self.forget(who, found, what)  # SQLAlchemy expires what it refreshes before it flushes the rest
        self.acts(who, read, flushes=self.sessions[who].autoflush)

    @rule(who=sessions, device=devices, kind=kinds, how=st.sampled_from(("inside", "assign", "heap")))
    def change(self, who: int, device: str, kind: type[DeviceState], how: str) -> None:
        found = self.object(who, device, kind)
        flushes = self.sessions[who].autoflush  # so does the loading of an attribute
        if found is None or not self.acts(who, lambda: found.desired_state, flushes=flushes):
            return
        self.number += 1
        before = plain(found.desired_state)
        version = found.desired_version if id(found) in self.whole else None
        if how == "inside":
            found.desired_state["mine"] = self.number
        elif how == "assign":
            found.desired_state = {"mine": self.number, "queue": [9, self.number, 8]}
        elif found.desired_state.get("queue"):
            heapq.heappush(found.desired_state["queue"], -self.number)
        else:
            return
        change = self.changes[who].setdefault(found, Change(before, version, by_heap_only=True))
        change.by_heap_only &= how == "heap"

    # Transactions and the service

    @rule(who=sessions)
    def flush(self, who: int) -> None:
        self.acts(who, self.sessions[who].flush, flushes=True)

    @rule(who=sessions)
    def commit(self, who: int) -> None:
        if self.acts(who, self.sessions[who].commit, flushes=True):
            self.savepoints[who].clear()
            for device, writes in self.written[who].items():
                self.committed[device] += writes
            self.written[who].clear()
            self.check_versions()

    @rule(who=sessions)
    def roll_back(self, who: int) -> None:
        self.sessions[who].rollback()
        self.start_again(who)

    @rule(who=sessions)
    def set_a_savepoint(self, who: int) -> None:
        taken: list[SessionTransaction] = []
        if self.acts(who, lambda: taken.append(self.sessions[who].begin_nested()), flushes=True):
            self.savepoints[who].append((taken[0], dict(self.written[who])))

    @rule(who=sessions)
    def roll_back_to_a_savepoint(self, who: int) -> None:
        if self.savepoints[who]:
            savepoint, self.written[who] = self.savepoints[who].pop()
            savepoint.rollback()
            for found, change in list(self.changes[who].items()):
                # SQLAlchemy expires what is marked as modified; what a heap changed is not marked yet.
                if not change.by_heap_only or "desired_state" not in inspect(found).dict:
                    del self.changes[who][found]

    @rule(who=sessions, device=devices, how=st.sampled_from(list(SERVICE_WRITES)))
    def write_by_the_service(self, who: int, device: str, how: str) -> None:
        self.number += 1
        session = self.sessions[who]
        service = ShadowService(session, TENANT)
        if self.acts(who, lambda: SERVICE_WRITES[how](service, device, self.number), flushes=session.autoflush):
            if "desired" in how:
                self.count(who, device)
            stored, version, _ = self.row(who, device)
            for (_, name), found in self.kept[who].items():
                if name == device and found not in self.changes[who] and found in session:
                    loaded = inspect(found).dict
                    assert canonical(loaded.get("desired_state", stored)) == canonical(stored)
                    assert loaded.get("desired_version", version) == version

    # What is asked after each step

    def acts(self, who: int, step: Callable[[], object], *, flushes: bool) -> bool:
        """Take a step that may flush; whether it was taken."""
        changes = dict(self.changes[who]) if flushes else {}
        before: dict[str, tuple[Any, int, Any]] = {}
        error = None
        try:
            before = {name_of(found): self.row(who, name_of(found)) for found in changes}
            step()
        except (OperationalError, StaleDataError, InvalidRequestError) as raised:
            error = raised
        if error is not None:
            several = len(before) < len(changes)  # objects of one row: the second one is out of date by the first
            waited = isinstance(error, OperationalError) and getattr(error.orig, "sqlstate", None) == "55P03"
            assert (
                waited  # the other session holds the row
                or several
                or any(may_be_refused(change, before[name_of(found)]) for found, change in changes.items())
            ), f"refused without a reason: {error!r}"
            self.sessions[who].rollback()
            self.start_again(who)
            return False
        written: set[str] = set()
        for found, change in changes.items():
            name = name_of(found)
            if inspect(found).attrs.desired_state.history.has_changes():
                continue  # the step did not flush after all
            shown = inspect(found).dict.get("desired_state", ...)
            if change.by_heap_only and shown is not ... and canonical(shown) != canonical(self.row(who, name)[0]):
                continue  # not noticed yet
            stored = before[name][0]
            assert name not in written, f"two objects of the row of {name} wrote it in one flush"
            assert canonical(change.on_top_of) == canonical(stored), (
                f"{found!r} was changed on top of {change.on_top_of}, and overwrote {stored}"
            )
            written.add(name)
            self.count(who, name)
            self.changes[who].pop(found, None)
            self.whole.add(id(found))
        return True

    def check_versions(self) -> None:
        with self.engine.connect() as connection:
            for device, version in connection.execute(text("SELECT device_id, desired_version FROM device_state")):
                assert version == self.committed[device], f"{device} is at {version} after {self.committed} writes"

    def count(self, who: int, device: str) -> None:
        self.written[who][device] = self.written[who].get(device, 0) + 1

    def start_again(self, who: int) -> None:
        self.savepoints[who].clear()
        self.changes[who].clear()
        self.written[who].clear()

    def forget(self, who: int, found: DeviceState, what: list[str]) -> None:
        if {"desired_state", "desired_version"} & set(what):
            self.whole.discard(id(found))
        if "desired_state" in what:
            self.changes[who].pop(found, None)

    def object(self, who: int, device: str, kind: type[DeviceState]) -> DeviceState | None:
        """The session's object of that row, loaded if it is not."""
        found = self.kept[who].get((kind, device))
        if found is not None:
            return found

        def read() -> None:
            self.kept[who][kind, device] = loaded = self.sessions[who].get_one(kind, (TENANT, device))
            self.whole.add(id(loaded))

        taken = self.acts(who, read, flushes=self.sessions[who].autoflush)
        return self.kept[who].get((kind, device)) if taken else None

    def row(self, who: int, device: str) -> tuple[Any, int, Any]:
        """The row as the session's transaction sees it, past all objects."""
        found = (
            self.sessions[who]
            .connection()
            .execute(
                text(
                    "SELECT desired_state::text, desired_version, reported_state::text FROM device_state WHERE device_id = :d"
                ),
                {"d": device},
            )
        )
        desired, version, reported = found.one()
        return json.loads(desired), version, json.loads(reported)


def may_be_refused(change: Change, row: tuple[Any, int, Any]) -> bool:
    """Whether the row is not what the object showed, or nothing says that it is."""
    stored, version, _ = row
    return change.version != version or canonical(stored) != canonical(change.on_top_of)


def name_of(found: DeviceState) -> str:
    identity = inspect(found).identity
    assert identity is not None
    name: str = identity[1]
    return name


def plain(document: Any) -> Any:
    return json.loads(json.dumps(document))
