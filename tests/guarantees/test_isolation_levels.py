"""What callers see at REPEATABLE READ and SERIALIZABLE, where a transaction works on the rows as it first saw them.

A row that somebody else has changed since cannot be written there: PostgreSQL refuses with SQLSTATE 40001, and the
service passes that through, as SQLAlchemy's `OperationalError`. The caller rolls back and runs the transaction again.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import NullPool, create_engine, insert, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError

from iot_models import BatchRejected, DeviceState, Report, Shadow, ShadowService, UnknownVersion, VersionConflict
from iot_models.models import ShadowHistory
from tests.databases.backends import await_lock_waits
from tests.databases.devices import TENANT, add_device
from tests.databases.statements import before_statement

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from sqlalchemy import Engine

pytestmark = pytest.mark.repeats

SNAPSHOT_LEVELS = ["REPEATABLE READ", "SERIALIZABLE"]
EVERY_LEVEL = ["READ COMMITTED", "AUTOCOMMIT", *SNAPSHOT_LEVELS]
DEVICES = ("t-1", "t-2")

WRITES: dict[str, Callable[[ShadowService], object]] = {
    "replace_desired": lambda service: service.replace_desired("t-1", {"ours": 1}),
    "patch_desired": lambda service: service.patch_desired("t-1", {"ours": 1}),
    "restore_desired": lambda service: service.restore_desired("t-1", 0, reason="ours"),
    "refuse_desired": lambda service: service.refuse_desired("t-1", service.get("t-1").desired_version, "ours"),
    "remove": lambda service: service.remove("t-1", reason="ours"),
    "register": lambda service: service.register("t-3", "ours"),
    "register_many": lambda service: service.register_many({"t-3": "ours", "t-4": "ours"}),
    "prune_history": lambda service: service.prune_history(older_than=timedelta(days=1)),
    "replace_reported": lambda service: service.replace_reported("t-1", {"ours": 1}, acked_version=0),
    "patch_reported": lambda service: service.patch_reported("t-1", {"ours": 1}),
    "replace_desired_many": lambda service: service.replace_desired_many({d: {"ours": 1} for d in DEVICES}),
    "patch_desired_many": lambda service: service.patch_desired_many(DEVICES, {"ours": 1}),
    "replace_reported_many": lambda service: service.replace_reported_many([Report(d, {"ours": 1}) for d in DEVICES]),
    "patch_reported_many": lambda service: service.patch_reported_many([Report(d, {"ours": 1}) for d in DEVICES]),
}
each_write = pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
# Those that write a row of device_state that is there.
OF_ROWS = {name: write for name, write in WRITES.items() if name not in {"register", "register_many", "prune_history"}}
each_write_of_a_row = pytest.mark.parametrize("write", OF_ROWS.values(), ids=OF_ROWS)

REQUESTS: dict[str, Callable[[ShadowService], Shadow]] = {
    "replace_desired": lambda service: service.replace_desired("t-1", {"ours": 1}, request_id="request-1"),
    "patch_desired": lambda service: service.patch_desired("t-1", {"ours": 1}, request_id="request-1"),
    "restore_desired": lambda service: service.restore_desired("t-1", 0, request_id="request-1"),
}
each_request = pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)


@pytest.fixture
def fleet(own_engine: Engine) -> Engine:
    """Two devices at version 1, and version 0 in their history, committed."""
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)
    with Session(own_engine) as session, session.begin():
        for device in DEVICES:
            add_device(session, device, desired_version=1)
            for version, document in enumerate([{"ours": 0}, {}]):
                values = {"tenant_id": TENANT, "device_id": device, "desired_version": version}
                session.execute(insert(ShadowHistory).values(**values, desired_state=document, written_at=long_ago))
    return own_engine


@pytest.fixture(params=SNAPSHOT_LEVELS)
def overtaken(request: pytest.FixtureRequest, fleet: Engine) -> Iterator[Session]:
    """A transaction that has read both devices; then somebody else committed `{"theirs": 1}` as version 2 of t-1."""
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


def rows(fleet: Engine) -> str:
    """All that both tables hold, in one text."""
    with fleet.connect() as connection:
        statement = (
            "SELECT CAST(t AS text) FROM device_state t UNION ALL SELECT CAST(h AS text) FROM {history} h ORDER BY 1"
        )
        return "\n".join(connection.scalars(text(statement.format(history=ShadowHistory.__tablename__))))


def versions(fleet: Engine, device: str = "t-1") -> dict[int, Any]:
    """The history of a device, by version."""
    with Session(fleet) as session:
        return {kept.version: kept.desired for kept in ShadowService(session, TENANT).history(device)}


ONLY_THEIRS: list[tuple[int, Any, Any]] = [(2, {"theirs": 1}, {}), (1, {}, {})]


@each_write_of_a_row
def test_a_write_of_a_row_that_changed_since_raises_40001_and_leaves_nothing(
    fleet: Engine, overtaken: Session, write: Callable[[ShadowService], object]
) -> None:
    with pytest.raises(OperationalError) as raised:
        write(ShadowService(overtaken, TENANT))
    assert getattr(raised.value.orig, "sqlstate", None) == "40001"
    overtaken.rollback()
    assert stored(fleet) == ONLY_THEIRS
    assert versions(fleet) == {2: {"theirs": 1}, 1: {}, 0: {"ours": 0}}


@each_write_of_a_row
def test_the_whole_transaction_runs_through_when_it_is_run_again(
    fleet: Engine, overtaken: Session, write: Callable[[ShadowService], object]
) -> None:
    with pytest.raises(OperationalError):
        write(ShadowService(overtaken, TENANT))
    overtaken.rollback()
    before = rows(fleet)
    write(ShadowService(overtaken, TENANT))
    overtaken.commit()
    assert rows(fleet).count("ours") > before.count("ours")


@pytest.mark.parametrize("level", SNAPSHOT_LEVELS)
def test_a_registration_of_a_device_that_was_made_since_raises_40001_and_finds_it_when_it_is_run_again(
    fleet: Engine, level: str
) -> None:
    with Session(fleet.execution_options(isolation_level=level)) as session:
        service = ShadowService(session, TENANT)
        assert service.get_many(["t-3"]) == {}
        with Session(fleet) as theirs, theirs.begin():
            ShadowService(theirs, TENANT).register("t-3", "theirs")
        before = rows(fleet)
        with pytest.raises(OperationalError) as raised:
            service.register_many({"t-3": "ours", "t-4": "ours"})
        assert getattr(raised.value.orig, "sqlstate", None) == "40001"
        session.rollback()
        assert rows(fleet) == before

        assert [*service.register_many({"t-3": "ours", "t-4": "ours"})] == ["t-3", "t-4"]
        session.commit()
    assert [device in rows(fleet) for device in ("theirs,t-3", "ours,t-3", "ours,t-4")] == [True, False, True]


@pytest.mark.parametrize("level", SNAPSHOT_LEVELS)
def test_versions_that_others_have_pruned_since_raise_40001_and_are_none_when_it_is_run_again(
    fleet: Engine, level: str
) -> None:
    with Session(fleet.execution_options(isolation_level=level)) as session:
        service = ShadowService(session, TENANT)
        service.get_many(DEVICES)
        with Session(fleet) as theirs, theirs.begin():
            assert ShadowService(theirs, TENANT).prune_history(older_than=timedelta(days=1)) == 2
        with pytest.raises(OperationalError) as raised:
            service.prune_history(older_than=timedelta(days=1))
        assert getattr(raised.value.orig, "sqlstate", None) == "40001"
        session.rollback()

        assert service.prune_history(older_than=timedelta(days=1)) == 0


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
    """The row as this transaction sees it is at version 1: only the write finds out that it is not any more."""
    with pytest.raises(OperationalError) as raised:
        getattr(ShadowService(overtaken, TENANT), method)("t-1", {"ours": 1}, expected_version=1)
    assert getattr(raised.value.orig, "sqlstate", None) == "40001"
    overtaken.rollback()
    assert stored(fleet) == ONLY_THEIRS


def test_a_replacement_at_the_newest_version_is_a_version_conflict_with_the_old_one(
    fleet: Engine, overtaken: Session
) -> None:
    """Version 2 is committed, but not in this snapshot: to this transaction the device stands at 1."""
    service = ShadowService(overtaken, TENANT)
    with pytest.raises(VersionConflict) as raised:
        service.replace_desired("t-1", {"ours": 1}, expected_version=2)
    assert (raised.value.expected, raised.value.actual) == (2, 1)
    with pytest.raises(BatchRejected):
        service.replace_desired_many({d: {"ours": 1} for d in DEVICES}, expected_versions={"t-1": 2})
    overtaken.commit()
    assert stored(fleet) == ONLY_THEIRS


def test_a_report_of_a_version_newer_than_the_snapshot_is_of_an_unknown_version(
    fleet: Engine, overtaken: Session
) -> None:
    """A device that is quick: it acknowledges what was asked after this transaction had begun."""
    with pytest.raises(UnknownVersion) as raised:
        ShadowService(overtaken, TENANT).replace_reported("t-1", {"ours": 1}, acked_version=2)
    assert (raised.value.acked, raised.value.desired) == (2, 1)
    overtaken.commit()
    assert stored(fleet) == ONLY_THEIRS


def test_reads_keep_to_the_snapshot(overtaken: Session) -> None:
    service = ShadowService(overtaken, TENANT)
    assert service.get("t-1").desired_version == 1
    assert [shadow.desired_version for shadow in service.pending()] == [1, 1]
    assert [kept.version for kept in service.history("t-1")] == [1, 0]
    overtaken.rollback()
    assert service.get("t-1").desired_version == 2
    assert [shadow.desired_version for shadow in service.pending()] == [2, 1]
    assert [kept.version for kept in service.history("t-1")] == [2, 1, 0]


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
        before = rows(fleet)
        write(service)
    assert rows(fleet) != before


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


def waiting(
    pool: ThreadPoolExecutor, fleet: Engine, session: Session, call: Callable[[ShadowService], Shadow]
) -> Future[Shadow]:
    """The call in a thread; it waits for another transaction by now."""
    future = pool.submit(call, ShadowService(session, TENANT))
    await_lock_waits(fleet, 1)
    return future


@pytest.mark.parametrize("level", EVERY_LEVEL)
@each_request
def test_a_request_that_is_repeated_at_the_same_moment_is_done_once(
    fleet: Engine, request_: Callable[[ShadowService], Shadow], level: str
) -> None:
    """The repeat waits for the first, writes nothing, and answers with the shadow; after a 40001, when run again."""
    with (
        Session(fleet) as first,
        Session(fleet.execution_options(isolation_level=level)) as repeat,
        ThreadPoolExecutor(1) as pool,
    ):
        written = request_(ShadowService(first, TENANT))
        repeated = waiting(pool, fleet, repeat, request_)
        first.commit()
        if level in SNAPSHOT_LEVELS:
            with pytest.raises(OperationalError) as raised:
                repeated.result(timeout=10)
            assert getattr(raised.value.orig, "sqlstate", None) == "40001"
            repeat.rollback()
            assert request_(ShadowService(repeat, TENANT)) == written
        else:
            assert repeated.result(timeout=10) == written
        repeat.commit()
    assert [version for version, *_ in stored(fleet)] == [2, 1]
    assert versions(fleet) == {2: written.desired, 1: {}, 0: {"ours": 0}}


@pytest.mark.parametrize("level", EVERY_LEVEL)
@each_request
def test_a_request_whose_first_try_is_rolled_back_is_done_by_the_repeat_that_waited_for_it(
    fleet: Engine, request_: Callable[[ShadowService], Shadow], level: str
) -> None:
    with (
        Session(fleet) as first,
        Session(fleet.execution_options(isolation_level=level)) as repeat,
        ThreadPoolExecutor(1) as pool,
    ):
        request_(ShadowService(first, TENANT))
        repeated = waiting(pool, fleet, repeat, request_)
        first.rollback()
        written = repeated.result(timeout=10)
        repeat.commit()
    assert written.desired_version == 2
    assert versions(fleet) == {2: written.desired, 1: {}, 0: {"ours": 0}}


@pytest.mark.parametrize("level", ["READ COMMITTED", "AUTOCOMMIT"])
@pytest.mark.parametrize("is_recorded", [True, False], ids=["with a history", "without a history"])
def test_a_device_that_is_removed_while_it_is_registered_goes_on_at_the_version_of_the_removal(
    fleet: Engine, level: str, *, is_recorded: bool
) -> None:
    """The removal is committed between the two statements: the first one found the device, the second finds none."""
    if not is_recorded:
        with fleet.begin() as connection:
            connection.execute(text("DELETE FROM device_shadow_history"))

    def remove() -> None:
        with Session(fleet) as theirs, theirs.begin():
            ShadowService(theirs, TENANT).remove("t-1")

    with Session(fleet.execution_options(isolation_level=level)) as session:
        service = ShadowService(session, TENANT)
        before_statement(service, 2, remove)
        shadow = service.register("t-1", "berlin")
        session.commit()
    assert (shadow.desired_version, shadow.reported_version, shadow.desired) == (2, 2, {})
    assert stored(fleet)[0] == (2, {}, {})
    assert versions(fleet)[2] is None


@pytest.mark.parametrize("level", EVERY_LEVEL)
def test_a_device_is_there_for_a_registration_until_its_removal_is_committed(fleet: Engine, level: str) -> None:
    with Session(fleet) as theirs, Session(fleet.execution_options(isolation_level=level)) as session:
        ShadowService(theirs, TENANT).remove("t-1")
        shadow = ShadowService(session, TENANT).register("t-1", "berlin")
        session.commit()
        assert (shadow.desired_version, shadow.reported_version) == (1, 0)
        assert stored(fleet)[0] == (1, {}, {})
        theirs.commit()

        shadow = ShadowService(session, TENANT).register("t-1", "berlin")
        session.commit()
        assert (shadow.desired_version, shadow.reported_version) == (2, 2)
    assert versions(fleet) == {2: None, 1: {}, 0: {"ours": 0}}
