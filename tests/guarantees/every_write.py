"""A fleet, every way to write to it, and what each leaves behind when nothing goes wrong."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import pytest
from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from iot_models import DeviceState, Report
from iot_models.models import ShadowHistory
from tests.databases.devices import TENANT, add_device
from tests.reference.methods import WRITES as METHODS
from tests.reference.methods import Section

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sqlalchemy import Connection, Engine

FLEET = "abcd"  # each letter a device; no write names d
BATCH = "abc"
ONE = "b"  # in the middle of the batch
GONE = "e"  # was removed
NEVER = "f"  # has never been there
LONG_AGO: Final = datetime(2020, 1, 1, tzinfo=UTC)


class Row(NamedTuple):
    """A device as an independent connection sees it: its row, and what the history table has of it.

    The history is the document of each version; None is the removal of the device.
    """

    desired: Mapping[str, Any]
    reported: Mapping[str, Any]
    desired_version: int
    reported_version: int
    has_been_asked: bool = False  # shadow_updated_at is set
    has_been_heard: bool = False  # last_seen_at is set
    refused: tuple[int | None, str | None] = (None, None)  # the version, and why
    history: Mapping[int, Mapping[str, Any] | None] = {}
    is_there: bool = True

    def asked(self, document: Mapping[str, Any]) -> Row:
        """The row after one more desired write; the history has the version before it, too."""
        version = self.desired_version + 1
        return self._replace(
            desired=document,
            desired_version=version,
            has_been_asked=True,
            refused=(None, None),
            history={self.desired_version: self.desired} | {**self.history} | {version: document},
        )

    def heard(self, document: Mapping[str, Any], acked_version: int) -> Row:
        """The row after a report."""
        return self._replace(reported=document, reported_version=acked_version, has_been_heard=True)

    def removed(self) -> Row:
        """What is left of a device."""
        ended = {self.desired_version: self.desired} | {**self.history} | {self.desired_version + 1: None}
        return removed(ended)

    def pruned(self) -> Row:
        """The row without the oldest version of its history."""
        return self._replace(history={version: self.history[version] for version in sorted(self.history)[1:]})


def removed(history: Mapping[int, Mapping[str, Any] | None]) -> Row:
    return Row({}, {}, 0, 0, history=history, is_there=False)


Rows: TypeAlias = dict[str, Row]

# The history lacks the version that the devices are at: code that knew no history wrote it.
START: Rows = dict.fromkeys(FLEET, Row({"old": 1}, {"old": 1}, 7, 5, history={5: {"oldest": 1}, 6: {"older": 1}})) | {
    GONE: removed({2: {"older": 1}, 3: None})
}


@dataclass(frozen=True)
class Write:
    """One call of a writing method, of the synchronous or the asynchronous service, and what it does to `START`.

    Attributes:
        method: Of the service.
        statements: How many it sends.
        changes: The devices that it changes, as they are afterwards.
        arguments: Of the call.
        keywords: Of the call.
        writes_first: Whether the first of its statements writes. Else the last one does.
    """

    method: str
    statements: int
    changes: Rows
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    writes_first: bool = False

    @property
    def section(self) -> Section:
        return METHODS[self.method].section

    @property
    def name(self) -> str:
        request = " with a request" if "request_id" in self.keywords else ""
        return f"{self.method}{request}, {self.statements}"

    def __call__(self, service: Any) -> Any:
        return getattr(service, self.method)(*self.arguments, **self.keywords)

    def done(self) -> Rows:
        return START | self.changes

    def ended_before(self, statement: int, *, is_committed: bool) -> Rows:
        """What is there if the call ends just before the statement of that number, from 0 on.

        Args:
            statement: The number.
            is_committed: Whether the statements before it are committed, as in AUTOCOMMIT mode.
        """
        return self.done() if is_committed and self.writes_first and statement else START


_NEW = {"new": 2}
_MERGED = {"old": 1, "new": 2}
_OF_REQUEST = {"request_id": "request-1"}


def _asked(devices: str, document: Mapping[str, Any]) -> Rows:
    return dict.fromkeys(devices, START[ONE].asked(document))


def _heard(devices: str, document: Mapping[str, Any]) -> Rows:
    return dict.fromkeys(devices, START[ONE].heard(document, 7))


REFUSE_DESIRED = Write(
    "refuse_desired", 1, {ONE: START[ONE]._replace(refused=(7, "no"), has_been_heard=True)}, (ONE, 7, "no"), {}
)
REPLACE_DESIRED = Write("replace_desired", 1, _asked(ONE, _NEW), (ONE, _NEW), {})
REPLACE_DESIRED_ONCE = Write("replace_desired", 1, _asked(ONE, _NEW), (ONE, _NEW), _OF_REQUEST)
PATCH_DESIRED = Write("patch_desired", 2, _asked(ONE, _MERGED), (ONE, _NEW), {})
# One statement more, which asks whether the request is done.
PATCH_DESIRED_ONCE = Write("patch_desired", 3, _asked(ONE, _MERGED), (ONE, _NEW), {"request_id": "request-2"})
RESTORE_DESIRED = Write("restore_desired", 1, _asked(ONE, {"older": 1}), (ONE, 6), {})
REPLACE_REPORTED = Write("replace_reported", 1, _heard(ONE, _NEW), (ONE, _NEW), {"acked_version": 7})
PATCH_REPORTED = Write("patch_reported", 2, _heard(ONE, _MERGED), (ONE, _NEW), {"acked_version": 7})
REPLACE_DESIRED_MANY = Write("replace_desired_many", 1, _asked(BATCH, _NEW), (dict.fromkeys(BATCH, _NEW),), {})
PATCH_DESIRED_MANY = Write("patch_desired_many", 2, _asked(BATCH, _MERGED), (list(BATCH), _NEW), {})
_REPORTS = [Report(device_id, _NEW, 7) for device_id in BATCH]
REPLACE_REPORTED_MANY = Write("replace_reported_many", 1, _heard(BATCH, _NEW), (_REPORTS,), {})
# A device reports twice: judged before anything is written.
REPORTED_TWICE = Write("replace_reported_many", 2, _heard(BATCH, _NEW), ([*_REPORTS, _REPORTS[0]],), {})
PATCH_REPORTED_MANY = Write("patch_reported_many", 2, _heard(BATCH, _MERGED), (_REPORTS,), {})
# A device that was removed goes on at the version of its removal.
_BACK = {GONE: Row({}, {}, 3, 3, history=START[GONE].history)}
REGISTER = Write("register", 2, _BACK, (GONE, "berlin"), {}, writes_first=True)
REGISTER_MANY = Write(
    "register_many",
    2,
    _BACK | {NEVER: Row({}, {}, 0, 0)},
    (dict.fromkeys((NEVER, GONE), "berlin"),),
    {},
    writes_first=True,
)
PRUNE_HISTORY = Write(
    "prune_history",
    1,
    {device_id: row.pruned() for device_id, row in START.items()},
    (),
    {"older_than": timedelta(days=1)},
)
REMOVE = Write("remove", 1, {ONE: START[ONE].removed()}, (ONE,), {})

# They lock rows that are there, one after another.
BATCHES = (REPLACE_DESIRED_MANY, PATCH_DESIRED_MANY, REPLACE_REPORTED_MANY, REPORTED_TWICE, PATCH_REPORTED_MANY)
# All can be done one after another in this order; those of AGAIN in any, and as often as one likes.
AGAIN = (
    REPLACE_DESIRED,
    REPLACE_DESIRED_ONCE,
    PATCH_DESIRED,
    PATCH_DESIRED_ONCE,
    RESTORE_DESIRED,
    REPLACE_REPORTED,
    PATCH_REPORTED,
    *BATCHES,
    REGISTER,
    REGISTER_MANY,
)
WRITES = (REFUSE_DESIRED, *AGAIN, PRUNE_HISTORY, REMOVE)


def each_of(*writes: Write) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("write", writes, ids=lambda write: write.name)


each_write = each_of(*WRITES)
each_batch = each_of(*BATCHES)
each_mode = pytest.mark.parametrize("mode", ["READ COMMITTED", "AUTOCOMMIT"])


@contextmanager
def fleet_in(engine: Engine) -> Iterator[Engine]:
    """The devices of `START`, committed for the block; the database is left empty."""
    put_back(engine)
    try:
        yield engine
    finally:
        with engine.begin() as connection:
            _clear(connection)


def put_back(engine: Engine) -> None:
    """Make the fleet `START`, with its history: a row that is behind its history would go on above it."""
    with Session(engine) as session, session.begin():
        _clear(session.connection())
        for device_id, row in START.items():
            if row.is_there:
                add_device(
                    session,
                    device_id,
                    desired_state=row.desired,
                    reported_state=row.reported,
                    desired_version=row.desired_version,
                    reported_version=row.reported_version,
                )
            for version, document in row.history.items():
                session.execute(
                    insert(ShadowHistory).values(
                        tenant_id=TENANT,
                        device_id=device_id,
                        desired_version=version,
                        desired_state=document,
                        written_at=LONG_AGO,
                    )
                )


def _clear(connection: Connection) -> None:
    connection.execute(delete(DeviceState))
    connection.execute(delete(ShadowHistory))


def committed(engine: Engine) -> Rows:
    """What the database holds, past all sessions."""
    history: dict[str, dict[int, Any]] = {}
    with engine.connect() as connection:
        rows = connection.execute(select(DeviceState.__table__).where(DeviceState.tenant_id == TENANT)).all()
        versions = select(ShadowHistory.__table__).where(
            ShadowHistory.tenant_id == TENANT, ShadowHistory.desired_version >= 0
        )
        for version in connection.execute(versions):
            history.setdefault(version.device_id, {})[version.desired_version] = version.desired_state
    found = {
        row.device_id: Row(
            row.desired_state,
            row.reported_state,
            row.desired_version,
            row.reported_version,
            row.shadow_updated_at is not None,
            row.last_seen_at is not None,
            (row.refused_version, row.refusal),
            history.get(row.device_id, {}),
        )
        for row in rows
    }
    return {device_id: removed(kept) for device_id, kept in history.items()} | found
