"""What the caller's own code does in the middle of a call: arguments and listeners that raise, counters that are full."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import DataError
from sqlalchemy.orm import Session

from iot_models import DeviceState, Report, ShadowService
from tests.databases.devices import TENANT
from tests.databases.statements import at_statement, counted_statements
from tests.guarantees.every_write import (
    BATCH,
    ONE,
    REPLACE_DESIRED,
    START,
    WRITES,
    Write,
    committed,
    each_of,
    each_write,
    fleet_in,
    put_back,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Connection, Engine

pytestmark = pytest.mark.repeats

LAST_VERSION = 2**31 - 1


class Broken(Exception):
    """No error of ours or of the database's."""


@pytest.fixture
def independent(engine: Engine) -> Iterator[Engine]:
    """Another way to the same database, with the fleet committed."""
    with fleet_in(engine):
        yield engine


@pytest.fixture
def ours(independent: Engine) -> Iterator[Engine]:
    """An engine with one connection: one that is not given back is missed."""
    engine = create_engine(independent.url, pool_size=1, max_overflow=0, pool_timeout=1)
    yield engine
    engine.dispose()


def half(error: type[BaseException], *items: Any) -> Iterator[Any]:
    """An iterable that gives these and then raises."""
    yield from items
    raise error


class HalfMapping(dict[str, Any]):
    """Documents of which the last cannot be had."""

    def __getitem__(self, key: str) -> Any:
        if key == BATCH[-1]:
            raise Broken
        return super().__getitem__(key)


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
@pytest.mark.parametrize(
    "call",
    [
        lambda service, error: service.replace_reported_many(half(error, Report("a", {}), Report("b", {}))),
        lambda service, error: service.patch_desired_many(half(error, "a", "b"), {"new": 2}),
        lambda service, error: service.get_many(half(error, "a", "b")),
    ],
    ids=["reports", "devices to patch", "devices to read"],
)
def test_an_iterable_that_raises_half_way_sends_nothing(
    independent: Engine,
    ours: Engine,
    call: Callable[[ShadowService, type[BaseException]], object],
    error: type[BaseException],
) -> None:
    with Session(ours) as session, counted_statements(ours) as statements:
        service = ShadowService(session, TENANT)
        with pytest.raises(error):
            call(service, error)
        assert statements == []

        service.replace_desired(ONE, {"new": 2})  # the session is as it was
        session.commit()
    assert committed(independent) == REPLACE_DESIRED.done()


def test_a_mapping_that_raises_half_way_sends_nothing(independent: Engine, ours: Engine) -> None:
    with Session(ours) as session, session.begin(), counted_statements(ours) as statements:
        with pytest.raises(Broken):
            ShadowService(session, TENANT).replace_desired_many(HalfMapping.fromkeys(BATCH, {"new": 2}))
        assert statements == []
    assert committed(independent) == START


@each_write
def test_a_listener_that_raises_before_any_statement_leaves_all_or_nothing_written_and_the_transaction_usable(
    independent: Engine, ours: Engine, write: Write
) -> None:
    def fault(_: Connection) -> None:
        raise Broken

    for mode in ("READ COMMITTED", "AUTOCOMMIT"):
        for number in range(write.statements):
            with Session(ours.execution_options(isolation_level=mode)) as session, session.begin():
                service = ShadowService(session, TENANT)
                with at_statement(ours, number, fault) as begun, pytest.raises(Broken):
                    write(service)
                assert len(begun) == number + 1
                assert service.get(ONE).desired_version == 7  # and then it commits
            assert committed(independent) == write.ended_before(number, is_committed=True)
            put_back(independent)

    with Session(ours) as session, session.begin():
        write(ShadowService(session, TENANT))
    assert committed(independent) == write.done()


@each_write
def test_a_listener_that_raises_after_the_write_leaves_it_to_the_caller_to_roll_it_back_whole(
    independent: Engine, ours: Engine, write: Write
) -> None:
    done: list[str] = []

    def fault(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        done.append(statement)
        if len(done) == write.statements:
            raise Broken

    event.listen(ours, "after_cursor_execute", fault)
    with pytest.raises(Broken), Session(ours) as session, session.begin():
        write(ShadowService(session, TENANT))
    event.remove(ours, "after_cursor_execute", fault)

    assert len(done) == write.statements
    assert committed(independent) == START
    with Session(ours) as session, session.begin():
        write(ShadowService(session, TENANT))
    assert committed(independent) == write.done()


@each_of(*(write for write in WRITES if write.section == "desired"))
def test_a_desired_version_at_the_end_of_its_integer_fails_loudly_and_nothing_of_the_batch_is_written(
    independent: Engine, ours: Engine, write: Write
) -> None:
    with independent.begin() as connection:
        connection.execute(
            text("UPDATE device_state SET desired_version = :last WHERE device_id = :device"),
            {"last": LAST_VERSION, "device": ONE},
        )
    before = committed(independent)

    for mode in ("READ COMMITTED", "AUTOCOMMIT"):
        with Session(ours.execution_options(isolation_level=mode)) as session:
            with pytest.raises(DataError, match="integer out of range"):
                write(ShadowService(session, TENANT))
            assert committed(independent) == before

    with Session(ours) as session:
        device = session.get_one(DeviceState, (TENANT, ONE))
        device.desired_state = {"new": 2}
        with pytest.raises(DataError, match="integer out of range"):
            session.flush()
        session.rollback()
        assert committed(independent) == before

        # The device itself can still say that it got there.
        shadow = ShadowService(session, TENANT).replace_reported(ONE, {"old": 1}, acked_version=LAST_VERSION)
        session.commit()
    assert not shadow.is_pending
