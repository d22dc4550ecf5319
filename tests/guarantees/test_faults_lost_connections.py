"""A connection that is lost: before any statement, before the commit, between two pages, inside a savepoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, InvalidRequestError, PendingRollbackError
from sqlalchemy.orm import Session

from iot_models import DeviceState, Report, ShadowService
from iot_models.engine import create_engine
from tests.databases.backends import await_end, backend_pid, cut, end_backend
from tests.databases.devices import TENANT
from tests.databases.statements import at_statement
from tests.guarantees.every_write import (
    BATCH,
    ONE,
    PATCH_DESIRED,
    PATCH_DESIRED_ONCE,
    REPLACE_DESIRED_ONCE,
    REPLACE_REPORTED_MANY,
    START,
    Write,
    committed,
    each_mode,
    each_of,
    each_write,
    fleet_in,
    put_back,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Engine

pytestmark = pytest.mark.repeats

WRITE = START | {ONE: START[ONE].asked({"new": 2})}


@pytest.fixture
def independent(engine: Engine) -> Iterator[Engine]:
    """Another way to the same database, with the fleet committed."""
    with fleet_in(engine):
        yield engine


@pytest.fixture
def engine_of(independent: Engine) -> Iterator[Callable[..., Engine]]:
    """Makes engines with our settings and one connection each: none can be lost without being missed."""
    engines: list[Engine] = []

    def make(mode: str = "READ COMMITTED", **options: Any) -> Engine:
        options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 1} | options
        engines.append(create_engine(independent.url, isolation_level=mode, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.dispose()


@each_mode
@each_write
def test_a_connection_cut_before_any_statement_of_a_write_leaves_nothing_written(
    independent: Engine, engine_of: Callable[..., Engine], write: Write, mode: str
) -> None:
    """In AUTOCOMMIT mode the first statement of a registration is done, and the second only reads."""
    engine = engine_of(mode)

    for number in range(write.statements):
        with Session(engine) as session, at_statement(engine, number, cut(independent)) as begun:
            service = ShadowService(session, TENANT)
            with pytest.raises(DBAPIError, match="The connection is lost, and its transaction is not") as caught:
                write(service)
            assert caught.value.connection_invalidated  # whatever the driver got to read before the end
            assert len(begun) == number + 1
            with pytest.raises(PendingRollbackError, match="rolled back"):  # broken, and it says so
                service.get(ONE)

            session.rollback()

            assert service.get(ONE).desired_version == 7  # the same session, on a new connection
        assert committed(independent) == write.ended_before(number, is_committed=mode == "AUTOCOMMIT")
        put_back(independent)

    with Session(engine) as session, session.begin(), at_statement(engine, write.statements, cut(independent)) as begun:
        write(ShadowService(session, TENANT))
    assert len(begun) == write.statements  # so none was left out above
    assert committed(independent) == write.done()


@each_write
def test_a_connection_cut_before_the_commit_leaves_nothing_written(
    independent: Engine, engine_of: Callable[..., Engine], write: Write
) -> None:
    engine = engine_of()

    with Session(engine) as session:
        write(ShadowService(session, TENANT))
        cut(independent)(session.connection())
        with pytest.raises(DBAPIError) as caught:
            session.commit()
        assert caught.value.connection_invalidated
        with pytest.raises(InvalidRequestError):  # broken, and it says so
            ShadowService(session, TENANT).get(ONE)
        session.rollback()
        assert committed(independent) == START

        write(ShadowService(session, TENANT))
        session.commit()
    assert committed(independent) == write.done()


@each_mode
@each_of(REPLACE_DESIRED_ONCE, PATCH_DESIRED_ONCE)
def test_a_request_whose_answer_was_lost_is_repeated_and_written_once(
    independent: Engine, engine_of: Callable[..., Engine], write: Write, mode: str
) -> None:
    """The connection ends behind the commit: whether the write is there, only the repeat can tell."""
    engine = engine_of(mode)
    with Session(engine) as session:
        lost = write(ShadowService(session, TENANT))
        pid = backend_pid(session.connection())
        session.commit()
    end_backend(independent, pid)

    with Session(engine) as session, session.begin():
        assert write(ShadowService(session, TENANT)) == lost
    assert committed(independent) == write.done()


def test_a_connection_cut_inside_a_savepoint_takes_the_whole_transaction_and_is_the_error_that_is_seen(
    independent: Engine, engine_of: Callable[..., Engine]
) -> None:
    engine = engine_of()

    def work(session: Session) -> None:
        service = ShadowService(session, TENANT)
        service.replace_desired("a", {"before": 1})
        with session.begin_nested():
            service.replace_desired("b", {"inside": 1})
            cut(independent)(session.connection())
            service.replace_desired("c", {"inside": 2})

    with Session(engine) as session:
        with pytest.raises(DBAPIError) as caught, session.begin():
            work(session)
        assert caught.value.connection_invalidated
        assert committed(independent) == START

        with session.begin():
            ShadowService(session, TENANT).replace_desired(ONE, {"new": 2})
    assert committed(independent) == WRITE


@each_mode
def test_a_call_that_fails_behind_its_write_says_nothing_about_the_write(
    independent: Engine, engine_of: Callable[..., Engine], mode: str
) -> None:
    """Only the commit says that a write is there, and in AUTOCOMMIT mode only the call's return.

    Reports on loaded objects read the devices again, for the objects to show.
    """
    engine = engine_of(mode)
    reports = [Report(device_id, {"new": 2}, 7) for device_id in BATCH]

    with Session(engine) as session:
        device = session.get_one(DeviceState, (TENANT, "a"))
        with at_statement(engine, 1, cut(independent)), pytest.raises(DBAPIError):
            ShadowService(session, TENANT).replace_reported_many(reports)
        assert device.reported_state == {"old": 1}

    written = START[ONE].heard({"new": 2}, 7)
    assert committed(independent) == (START | dict.fromkeys(BATCH, written) if mode == "AUTOCOMMIT" else START)

    with Session(engine) as session, session.begin():  # to send the same again does no harm
        outcomes = ShadowService(session, TENANT).replace_reported_many(reports)
    assert [outcome.status for outcome in outcomes] == ["accepted"] * 3
    assert committed(independent) == START | dict.fromkeys(BATCH, written)


@each_mode
def test_an_iteration_that_loses_its_connection_ends_with_an_error_and_goes_on_behind_the_last_device(
    independent: Engine, engine_of: Callable[..., Engine], mode: str
) -> None:
    engine = engine_of(mode)
    met: list[str] = []

    with Session(engine) as session:
        service = ShadowService(session, TENANT)
        with at_statement(engine, 1, cut(independent)), pytest.raises(DBAPIError) as caught:
            met.extend(shadow.device_id for shadow in service.iter_pending(batch_size=2))
        assert caught.value.connection_invalidated
        assert met == ["a", "b"]

        session.rollback()
        met += [shadow.device_id for shadow in service.pending(after=met[-1])]
    assert met == ["a", "b", "c", "d"]


def test_a_flush_that_loses_its_connection_is_no_race_lost_and_the_change_has_to_be_made_again(
    independent: Engine, engine_of: Callable[..., Engine]
) -> None:
    with Session(engine_of()) as session:
        device = session.get_one(DeviceState, (TENANT, ONE))
        document = device.desired_state
        document["new"] = 2
        cut(independent)(session.connection())

        with pytest.raises(DBAPIError) as caught:  # StaleDataError would blame a rival
            session.flush()
        assert caught.value.connection_invalidated
        session.rollback()

        assert committed(independent) == START
        assert (device.desired_state, device.desired_version) == ({"old": 1}, 7)  # what the database says
        with pytest.raises(InvalidRequestError, match="read the attribute again"):
            document["new"] = 2

        device.desired_state = {"new": 2}
        session.commit()
    assert committed(independent) == WRITE


@each_of(PATCH_DESIRED, REPLACE_REPORTED_MANY)
def test_a_transaction_that_idled_too_long_is_ended_by_the_server_with_nothing_written(
    independent: Engine, engine_of: Callable[..., Engine], write: Write
) -> None:
    with Session(engine_of()) as session:
        service = ShadowService(session, TENANT)
        write(service)
        session.execute(text("SET LOCAL idle_in_transaction_session_timeout = '1ms'"))
        await_end(independent, backend_pid(session.connection()))

        with pytest.raises(DBAPIError) as caught:
            session.commit()
        assert caught.value.connection_invalidated
        session.rollback()
        assert committed(independent) == START
        assert service.get(ONE).desired_version == 7


def test_a_transaction_block_leaves_the_session_usable_when_the_commit_fails(
    independent: Engine, engine_of: Callable[..., Engine]
) -> None:
    def write(session: Session) -> None:
        with session.begin():
            ShadowService(session, TENANT).replace_desired(ONE, {"lost": 1})
            cut(independent)(session.connection())

    with Session(engine_of()) as session:
        with pytest.raises(DBAPIError):
            write(session)

        with session.begin():
            ShadowService(session, TENANT).replace_desired(ONE, {"new": 2})
    assert committed(independent) == WRITE


def test_a_dead_connection_in_the_pool_costs_a_write_no_error(
    independent: Engine, engine_of: Callable[..., Engine]
) -> None:
    engine = engine_of()
    with Session(engine) as session:
        pid = backend_pid(session.connection())
    end_backend(independent, pid)

    with Session(engine) as session, session.begin():
        ShadowService(session, TENANT).replace_desired(ONE, {"new": 2})
    assert committed(independent) == WRITE
