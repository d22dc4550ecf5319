"""A fleet, every way to write to it, and what each leaves behind when nothing goes wrong."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import pytest
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from iot_models import DeviceState, Report
from tests.databases.devices import TENANT, add_device
from tests.reference.methods import WRITES as METHODS
from tests.reference.methods import Section

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sqlalchemy import Engine

FLEET = "abcd"  # each letter a device; no write names d
BATCH = "abc"
ONE = "b"  # in the middle of the batch


class Row(NamedTuple):
    """A device as an independent connection sees it."""

    desired: Mapping[str, Any]
    reported: Mapping[str, Any]
    desired_version: int
    reported_version: int
    has_been_asked: bool  # shadow_updated_at is set
    has_been_heard: bool  # last_seen_at is set


Rows: TypeAlias = dict[str, Row]

START: Rows = dict.fromkeys(FLEET, Row({"old": 1}, {"old": 1}, 7, 5, has_been_asked=False, has_been_heard=False))


@dataclass(frozen=True)
class Write:
    """One call of a writing method, of the synchronous or the asynchronous service, and what it does to `START`."""

    method: str
    devices: str
    statements: int
    document: Mapping[str, Any]
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]

    @property
    def section(self) -> Section:
        return METHODS[self.method].section

    def __call__(self, service: Any) -> Any:
        return getattr(service, self.method)(*self.arguments, **self.keywords)

    def done(self) -> Rows:
        before = START[ONE]
        if self.section == "desired":
            after = before._replace(desired=self.document, desired_version=8, has_been_asked=True)
        else:
            after = before._replace(reported=self.document, reported_version=7, has_been_heard=True)
        return START | dict.fromkeys(self.devices, after)


_NEW = {"new": 2}
_MERGED = {"old": 1, "new": 2}

REPLACE_DESIRED = Write("replace_desired", ONE, 1, _NEW, (ONE, _NEW), {})
PATCH_DESIRED = Write("patch_desired", ONE, 2, _MERGED, (ONE, _NEW), {})
REPLACE_REPORTED = Write("replace_reported", ONE, 1, _NEW, (ONE, _NEW), {"acked_version": 7})
PATCH_REPORTED = Write("patch_reported", ONE, 2, _MERGED, (ONE, _NEW), {"acked_version": 7})
REPLACE_DESIRED_MANY = Write("replace_desired_many", BATCH, 1, _NEW, (dict.fromkeys(BATCH, _NEW),), {})
PATCH_DESIRED_MANY = Write("patch_desired_many", BATCH, 2, _MERGED, (list(BATCH), _NEW), {})
_REPORTS = [Report(device_id, _NEW, 7) for device_id in BATCH]
REPLACE_REPORTED_MANY = Write("replace_reported_many", BATCH, 1, _NEW, (_REPORTS,), {})
# A device reports twice: judged before anything is written.
REPORTED_TWICE = Write("replace_reported_many", BATCH, 2, _NEW, ([*_REPORTS, _REPORTS[0]],), {})
PATCH_REPORTED_MANY = Write("patch_reported_many", BATCH, 2, _MERGED, (_REPORTS,), {})

BATCHES = (REPLACE_DESIRED_MANY, PATCH_DESIRED_MANY, REPLACE_REPORTED_MANY, REPORTED_TWICE, PATCH_REPORTED_MANY)
WRITES = (REPLACE_DESIRED, PATCH_DESIRED, REPLACE_REPORTED, PATCH_REPORTED, *BATCHES)


def each_of(*writes: Write) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("write", writes, ids=lambda write: f"{write.method}, {write.statements}")


each_write = each_of(*WRITES)
each_batch = each_of(*BATCHES)
each_mode = pytest.mark.parametrize("mode", ["READ COMMITTED", "AUTOCOMMIT"])


@contextmanager
def fleet_in(engine: Engine) -> Iterator[Engine]:
    """The devices of `START`, committed for the block; the database is left empty."""
    with Session(engine) as session, session.begin():
        for device_id, row in START.items():
            add_device(
                session,
                device_id,
                desired_state=row.desired,
                reported_state=row.reported,
                desired_version=row.desired_version,
                reported_version=row.reported_version,
            )
    try:
        yield engine
    finally:
        with engine.begin() as connection:
            connection.execute(delete(DeviceState))


def put_back(engine: Engine) -> None:
    """Make the fleet `START` again."""
    row = START[ONE]
    with engine.begin() as connection:
        connection.execute(
            update(DeviceState).values(
                desired_state=row.desired,
                reported_state=row.reported,
                desired_version=row.desired_version,
                reported_version=row.reported_version,
                shadow_updated_at=None,
                last_seen_at=None,
            )
        )


def committed(engine: Engine) -> Rows:
    """What the database holds, past all sessions."""
    with engine.connect() as connection:
        rows = connection.execute(select(DeviceState.__table__).where(DeviceState.tenant_id == TENANT)).all()
    return {
        row.device_id: Row(
            row.desired_state,
            row.reported_state,
            row.desired_version,
            row.reported_version,
            row.shadow_updated_at is not None,
            row.last_seen_at is not None,
        )
        for row in rows
    }
