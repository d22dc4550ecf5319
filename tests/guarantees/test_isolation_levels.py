"""What callers see at REPEATABLE READ and SERIALIZABLE, where a transaction works on the rows as it first saw them.

A row that somebody else has changed since cannot be written there: PostgreSQL refuses with SQLSTATE 40001, and the
service passes that through, as SQLAlchemy's `OperationalError`. The caller rolls back and runs the transaction again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import NullPool, create_engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError

from iot_models import BatchRejected, DeviceState, Report, ShadowService, UnknownVersion, VersionConflict
from tests.databases.devices import TENANT, add_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Engine

pytestmark = pytest.mark.repeats

SNAPSHOT_LEVELS = ["REPEATABLE READ", "SERIALIZABLE"]
DEVICES = ("t-1", "t-2")

WRITES: dict[str, Callable[[ShadowService], object]] = {
    "replace_desired": lambda service: service.replace_desired("t-1", {"ours": 1}),
    "patch_desired": lambda service: service.patch_desired("t-1", {"ours": 1}),
    "replace_reported": lambda service: service.replace_reported("t-1", {"ours": 1}, acked_version=0),
    "patch_reported": lambda service: service.patch_reported("t-1", {"ours": 1}),
    "replace_desired_many": lambda service: service.replace_desired_many({d: {"ours": 1} for d in DEVICES}),
    "patch_desired_many": lambda service: service.patch_desired_many(DEVICES, {"ours": 1}),
    "replace_reported_many": lambda service: service.replace_reported_many([Report(d, {"ours": 1}) for d in DEVICES]),
    "patch_reported_many": lambda service: service.patch_reported_many([Report(d, {"ours": 1}) for d in DEVICES]),
}
each_write = pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)


@pytest.fixture
def fleet(own_engine: Engine) -> Engine:
    """Two devices, committed."""
    with Session(own_engine) as session, session.begin():
        for device in DEVICES:
            add_device(session, device)
    return own_engine


@pytest.fixture(params=SNAPSHOT_LEVELS)
def overtaken(request: pytest.FixtureRequest, fleet: Engine) -> Iterator[Session]:
    """A transaction that has read both devices; then somebody else committed `{"theirs": 1}` as version 1 of t-1."""
    with Session(fleet.execution_options(isolation_level=request.param)) as session:
        ShadowService(session, TENANT).get_many(DEVICES)
        commit_theirs(fleet)
        yield session


def commit_theirs(fleet: Engine) -> None:
    with Session(fleet) as session, session.begin():
        ShadowService(session, TENANT).replace_desired("t-1", {"theirs": 1})


def stored(fleet: Engine) -> list[tuple[int, Any, Any]]:
    with Session(fleet) as session:
        shadows = ShadowService(session, TENANT).get_many(DEVICES).values()
        return [(shadow.desired_version, shadow.desired, shadow.reported) for shadow in shadows]


ONLY_THEIRS: list[tuple[int, Any, Any]] = [(1, {"theirs": 1}, {}), (0, {}, {})]


@each_write
def test_a_write_of_a_row_that_changed_since_raises_40001_and_leaves_nothing(
    fleet: Engine, overtaken: Session, write: Callable[[ShadowService], object]
) -> None:
    with pytest.raises(OperationalError) as raised:
        write(ShadowService(overtaken, TENANT))
    assert getattr(raised.value.orig, "sqlstate", None) == "40001"
    overtaken.rollback()
    assert stored(fleet) == ONLY_THEIRS


@each_write
def test_the_whole_transaction_runs_through_when_it_is_run_again(
    fleet: Engine, overtaken: Session, write: Callable[[ShadowService], object]
) -> None:
    with pytest.raises(OperationalError):
        write(ShadowService(overtaken, TENANT))
    overtaken.rollback()
    write(ShadowService(overtaken, TENANT))
    overtaken.commit()
    assert any("ours" in {**desired, **reported} for _, desired, reported in stored(fleet))


def test_a_transaction_that_met_40001_loses_also_what_it_had_written_before(fleet: Engine, overtaken: Session) -> None:
    service = ShadowService(overtaken, TENANT)
    service.replace_desired("t-2", {"ours": 1})  # nobody else wrote that one
    with pytest.raises(OperationalError):
        service.replace_desired("t-1", {"ours": 1})
    overtaken.rollback()
    assert stored(fleet) == ONLY_THEIRS


def test_a_savepoint_does_not_save_a_transaction_from_its_old_snapshot(overtaken: Session) -> None:
    service = ShadowService(overtaken, TENANT)
    for _ in range(2):
        with pytest.raises(OperationalError), overtaken.begin_nested():
            service.replace_desired("t-1", {"ours": 1})


@pytest.mark.parametrize("method", ["replace_desired", "patch_desired"])
def test_the_version_that_the_snapshot_shows_is_met_with_40001_and_no_version_conflict(
    fleet: Engine, overtaken: Session, method: str
) -> None:
    """The row as this transaction sees it is at version 0: only the write finds out that it is not any more."""
    with pytest.raises(OperationalError) as raised:
        getattr(ShadowService(overtaken, TENANT), method)("t-1", {"ours": 1}, expected_version=0)
    assert getattr(raised.value.orig, "sqlstate", None) == "40001"
    overtaken.rollback()
    assert stored(fleet) == ONLY_THEIRS


def test_a_replacement_at_the_newest_version_is_a_version_conflict_with_the_old_one(
    fleet: Engine, overtaken: Session
) -> None:
    """Version 1 is committed, but not in this snapshot: to this transaction the device stands at 0."""
    service = ShadowService(overtaken, TENANT)
    with pytest.raises(VersionConflict) as raised:
        service.replace_desired("t-1", {"ours": 1}, expected_version=1)
    assert (raised.value.expected, raised.value.actual) == (1, 0)
    with pytest.raises(BatchRejected):
        service.replace_desired_many({d: {"ours": 1} for d in DEVICES}, expected_versions={"t-1": 1})
    overtaken.commit()
    assert stored(fleet) == ONLY_THEIRS


def test_a_report_of_a_version_newer_than_the_snapshot_is_of_an_unknown_version(
    fleet: Engine, overtaken: Session
) -> None:
    """A device that is quick: it acknowledges what was asked after this transaction had begun."""
    with pytest.raises(UnknownVersion) as raised:
        ShadowService(overtaken, TENANT).replace_reported("t-1", {"ours": 1}, acked_version=1)
    assert (raised.value.acked, raised.value.desired) == (1, 0)
    overtaken.commit()
    assert stored(fleet) == ONLY_THEIRS


def test_reads_keep_to_the_snapshot(overtaken: Session) -> None:
    service = ShadowService(overtaken, TENANT)
    assert service.get("t-1").desired_version == 0
    assert service.count_pending() == 0
    overtaken.rollback()
    assert service.get("t-1").desired_version == 1
    assert service.count_pending() == 1


@pytest.mark.parametrize("level", ["READ COMMITTED", *SNAPSHOT_LEVELS])
def test_an_orm_write_of_desired_fails_either_way_and_says_which(fleet: Engine, level: str) -> None:
    """READ COMMITTED sees the other's version, and the guard misses: the ORM's StaleDataError. The others: 40001."""
    with Session(fleet.execution_options(isolation_level=level)) as session:
        device = session.get_one(DeviceState, (TENANT, "t-1"))
        commit_theirs(fleet)
        device.desired_state = {"ours": 1}
        with pytest.raises(StaleDataError if level == "READ COMMITTED" else OperationalError):
            session.flush()
    assert stored(fleet) == ONLY_THEIRS


@each_write
def test_autocommit_on_an_engine_of_a_stricter_level_knows_no_40001(
    fleet: Engine, write: Callable[[ShadowService], object]
) -> None:
    """Each statement is a transaction of its own at the server's default level, READ COMMITTED."""
    strict = create_engine(fleet.url, poolclass=NullPool, isolation_level="SERIALIZABLE")
    with Session(strict.execution_options(isolation_level="AUTOCOMMIT")) as session:
        service = ShadowService(session, TENANT)
        service.get_many(DEVICES)
        with Session(fleet) as theirs, theirs.begin():
            ShadowService(theirs, TENANT).patch_reported("t-1", {"theirs": 1})
        write(service)
    assert any("ours" in {**desired, **reported} for _, desired, reported in stored(fleet))


def test_two_decisions_that_contradict_each_other_are_both_kept_except_at_serializable(fleet: Engine) -> None:
    """Each device is switched on only if the other is off. Only SERIALIZABLE sees that both cannot be right."""
    kept, refused = {}, []
    for level in ["READ COMMITTED", *SNAPSHOT_LEVELS]:
        with Session(fleet) as session, session.begin():
            ShadowService(session, TENANT).replace_desired_many({d: {"on": False} for d in DEVICES})
        engine = fleet.execution_options(isolation_level=level)
        with Session(engine) as first, Session(engine) as second:
            for session, device in ((first, "t-1"), (second, "t-2")):
                (other,) = set(DEVICES) - {device}
                assert ShadowService(session, TENANT).get(other).desired == {"on": False}
            ShadowService(first, TENANT).replace_desired("t-1", {"on": True})
            ShadowService(second, TENANT).replace_desired("t-2", {"on": True})
            first.commit()
            try:
                second.commit()
            except OperationalError as error:
                refused.append(getattr(error.orig, "sqlstate", None))
        kept[level] = sum(desired["on"] for _, desired, _ in stored(fleet))
    assert kept == {"READ COMMITTED": 2, "REPEATABLE READ": 2, "SERIALIZABLE": 1}
    assert refused == ["40001"]
