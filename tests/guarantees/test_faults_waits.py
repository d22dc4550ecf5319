"""Waits that come to nothing: a row locked by somebody else in the middle of a batch, a deadlock, Ctrl-C, a full pool."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from iot_models import ShadowService
from iot_models.engine import create_engine
from tests.databases.backends import await_lock_waits, unlocked
from tests.databases.devices import TENANT
from tests.guarantees.every_write import (
    BATCHES,
    NEVER,
    ONE,
    PATCH_DESIRED_MANY,
    REGISTER_MANY,
    START,
    Write,
    committed,
    each_batch,
    each_mode,
    fleet_in,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Engine

pytestmark = pytest.mark.repeats

TIMEOUTS = {
    "lock_timeout": ("55P03", "canceling statement due to lock timeout"),
    "statement_timeout": ("57014", "canceling statement due to statement timeout"),
}
each_timeout = pytest.mark.parametrize("timeout", TIMEOUTS)


@pytest.fixture
def independent(engine: Engine) -> Iterator[Engine]:
    """Another way to the same database, with the fleet committed."""
    with fleet_in(engine):
        yield engine


@pytest.fixture
def engine_of(independent: Engine) -> Iterator[Callable[..., Engine]]:
    """Makes engines with our settings, one connection each, and one setting of the server's."""
    engines: list[Engine] = []

    def make(mode: str = "READ COMMITTED", **settings: str) -> Engine:
        options = " ".join(f"-c {name}={value}" for name, value in settings.items())
        engine = create_engine(
            independent.url,
            isolation_level=mode,
            pool_size=1,
            max_overflow=0,
            pool_timeout=0.05,
            connect_args={"options": options},
        )
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.dispose()


@contextmanager
def locked(by: Engine, device_id: str) -> Iterator[Connection]:
    """Somebody else's transaction that holds the device's row."""
    with by.connect() as connection, connection.begin():
        lock(connection, device_id)
        yield connection


def lock(connection: Connection, device_id: str) -> None:
    connection.execute(text("SELECT FROM device_state WHERE device_id = :device FOR UPDATE"), {"device": device_id})


def sqlstate(error: DBAPIError) -> str | None:
    return getattr(error.orig, "sqlstate", None)


@each_timeout
@each_batch
def test_a_batch_that_times_out_at_a_locked_row_writes_nothing_and_frees_the_rows_before_it(
    independent: Engine, engine_of: Callable[..., Engine], write: Write, timeout: str
) -> None:
    with Session(engine_of()) as session:
        service = ShadowService(session, TENANT)
        session.execute(text(f"SET LOCAL {timeout} = '50ms'"))
        with locked(independent, "b"):
            with pytest.raises(OperationalError, match=TIMEOUTS[timeout][1]) as caught:
                write(service)
            assert sqlstate(caught.value) == TIMEOUTS[timeout][0]
            assert timeout in str(caught.value)  # what to look at
            assert "roll back, to the savepoint if there is one, and try again" in str(caught.value)
            assert not caught.value.connection_invalidated
            with pytest.raises(InternalError, match="transaction is aborted"):  # broken, and it says so
                service.get("d")
            assert unlocked(independent) == "acd"  # though nobody has rolled back yet
            assert committed(independent) == START
            session.rollback()
        write(service)
        session.commit()
    assert committed(independent) == write.done()


@each_timeout
@each_batch
def test_a_savepoint_around_the_batch_keeps_what_the_transaction_wrote_before(
    independent: Engine, engine_of: Callable[..., Engine], write: Write, timeout: str
) -> None:
    def attempt(session: Session) -> None:
        with session.begin_nested():
            session.execute(text(f"SET LOCAL {timeout} = '50ms'"))
            write(ShadowService(session, TENANT))

    with Session(engine_of()) as session, session.begin():
        service = ShadowService(session, TENANT)
        service.replace_desired("d", {"new": 2})
        with locked(independent, "b"):
            with pytest.raises(OperationalError, match=TIMEOUTS[timeout][1]):
                attempt(session)
            assert unlocked(independent) == "ac"
        service.patch_desired("a", {"new": 2})

    assert committed(independent) == START | {
        "a": START["a"].asked({"old": 1, "new": 2}),
        "d": START["d"].asked({"new": 2}),
    }


@each_timeout
@each_batch
def test_in_autocommit_mode_a_batch_that_times_out_leaves_nothing_written_and_nothing_locked(
    independent: Engine, engine_of: Callable[..., Engine], write: Write, timeout: str
) -> None:
    with Session(engine_of("AUTOCOMMIT")) as session:
        service = ShadowService(session, TENANT)
        session.execute(text(f"SET {timeout} = '50ms'"))
        with locked(independent, "b"):
            with pytest.raises(OperationalError, match=TIMEOUTS[timeout][1]):
                write(service)
            assert unlocked(independent) == "acd"
            assert committed(independent) == START

        session.execute(text(f"RESET {timeout}"))  # without a rollback: there is no transaction
        write(service)
    assert committed(independent) == write.done()


@each_timeout
@each_mode
def test_a_registration_that_times_out_behind_another_one_of_the_same_device_makes_none_of_its_devices(
    independent: Engine, engine_of: Callable[..., Engine], mode: str, timeout: str
) -> None:
    with Session(engine_of(mode)) as session:
        session.execute(text(f"SET {timeout} = '50ms'"))
        session.commit()
        with Session(independent) as theirs:
            ShadowService(theirs, TENANT).register(NEVER, "berlin")  # its other device comes first
            with pytest.raises(OperationalError, match=TIMEOUTS[timeout][1]):
                REGISTER_MANY(ShadowService(session, TENANT))
            session.rollback()
            assert committed(independent) == START
        REGISTER_MANY(ShadowService(session, TENANT))
        session.commit()
    assert committed(independent) == REGISTER_MANY.done()


@pytest.mark.parametrize(
    ("body", "limit", "message"),
    [
        ("PERFORM pg_sleep(10); RETURN NEW", "100ms", "canceling statement due to statement timeout"),
        ("RAISE 'could not extend file: no space left' USING ERRCODE = 'disk_full'", "10s", "no space left"),
    ],
    ids=["timeout", "disk full"],
)
def test_a_batch_that_fails_between_two_of_its_rows_leaves_none_of_them_written(
    own_engine: Engine, body: str, limit: str, message: str
) -> None:
    """The statement has written `a` when `b` takes too long, or finds no room."""
    settings = {"options": f"-c statement_timeout={limit}"}
    with fleet_in(own_engine) as independent:
        with independent.begin() as connection:
            function = f"CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body}; END $$"
            connection.execute(text(function))
            trigger = "BEFORE UPDATE ON device_state FOR EACH ROW WHEN (NEW.device_id = 'b') EXECUTE FUNCTION fail()"
            connection.execute(text(f"CREATE TRIGGER fail {trigger}"))
        for mode in ("READ COMMITTED", "AUTOCOMMIT"):
            engine = create_engine(independent.url, isolation_level=mode, connect_args=settings)
            for write in BATCHES:
                with Session(engine) as session, pytest.raises(OperationalError, match=message):
                    write(ShadowService(session, TENANT))
                assert committed(independent) == START
                assert unlocked(independent) == "abcd"
            engine.dispose()


@each_batch
def test_of_a_deadlock_with_a_transaction_that_locks_in_another_order_nothing_is_written(
    independent: Engine, engine_of: Callable[..., Engine], write: Write
) -> None:
    """Batches that lock in one order cannot do this; a transaction that locks `d` and then `b` can."""
    ours = engine_of(deadlock_timeout="10ms")  # who looks for the deadlock first is its victim
    with locked(independent, "b") as theirs, Session(ours) as session, ThreadPoolExecutor(1) as pool:
        theirs.execute(text("SET LOCAL deadlock_timeout = '1min'"))
        service = ShadowService(session, TENANT)
        service.replace_desired("d", {"mine": 1})
        waiting = pool.submit(lock, theirs, "d")
        try:
            await_lock_waits(independent, 1)
            with pytest.raises(OperationalError, match="deadlock detected") as caught:
                write(service)
        finally:
            session.rollback()
        assert sqlstate(caught.value) == "40P01"
        assert "roll back, and run all of it again" in str(caught.value)
        waiting.result(timeout=10)  # they got through
        assert committed(independent) == START

        theirs.commit()
        service.replace_desired("d", {"mine": 1})
        write(service)
        session.commit()
    assert committed(independent) == write.done() | {"d": START["d"].asked({"mine": 1})}


def test_under_repeatable_read_a_write_behind_somebody_elses_fails_whole_and_the_transaction_can_be_run_again(
    independent: Engine, engine_of: Callable[..., Engine]
) -> None:
    write = PATCH_DESIRED_MANY
    with Session(engine_of("REPEATABLE READ")) as session:
        service = ShadowService(session, TENANT)
        assert service.count_pending() == 4  # from here on the transaction sees the past
        with Session(independent) as theirs, theirs.begin():
            ShadowService(theirs, TENANT).replace_desired("b", {"theirs": 1})

        with pytest.raises(OperationalError, match="could not serialize access") as caught:
            write(service)
        assert sqlstate(caught.value) == "40001"
        assert "roll back, and run all of it again" in str(caught.value)
        session.rollback()
        write(service)
        session.commit()

    rows = committed(independent)
    assert rows["b"].desired == {"theirs": 1, "new": 2}
    assert [rows[device_id].desired_version for device_id in "abcd"] == [8, 9, 8, 7]


@each_mode
@each_batch
def test_ctrl_c_while_a_batch_waits_ends_it_on_the_server_too(
    independent: Engine, engine_of: Callable[..., Engine], write: Write, mode: str
) -> None:
    engine = engine_of(mode)
    seen: list[str] = []

    def press() -> None:
        await_lock_waits(independent, 1)
        seen.append(unlocked(independent))
        os.kill(os.getpid(), signal.SIGINT)

    with locked(independent, "b"), Session(engine) as session:
        pressing = threading.Thread(target=press)
        pressing.start()
        with pytest.raises(KeyboardInterrupt):
            write(ShadowService(session, TENANT))
        pressing.join()
        await_lock_waits(independent, 0)
    assert seen == ["cd"]  # a was ours, b theirs: it stood in the middle
    assert committed(independent) == START

    with Session(engine) as session, session.begin():
        write(ShadowService(session, TENANT))
    assert committed(independent) == write.done()


def test_a_full_pool_is_an_error_for_the_one_that_waits_and_the_others_lose_nothing(
    independent: Engine, engine_of: Callable[..., Engine]
) -> None:
    engine = engine_of()
    with Session(engine) as first, Session(engine) as second:
        ShadowService(first, TENANT).patch_desired(ONE, {"first": 1})
        with pytest.raises(PoolTimeoutError, match="QueuePool limit of size 1 overflow 0 reached"):
            ShadowService(second, TENANT).patch_desired(ONE, {"second": 2})
        first.commit()

        ShadowService(second, TENANT).patch_desired(ONE, {"second": 2})  # the same session, with no rollback
        second.commit()
    assert committed(independent)[ONE].desired == {"old": 1, "first": 1, "second": 2}


def test_a_server_without_a_free_connection_says_so_and_the_session_works_once_there_is_one(
    own_engine: Engine, server_role: str
) -> None:
    with fleet_in(own_engine) as independent:
        with independent.begin() as connection:
            connection.execute(text(f"ALTER ROLE {server_role} CONNECTION LIMIT 1"))
            connection.execute(text(f"GRANT SELECT, UPDATE ON device_state TO {server_role}"))
            connection.execute(text(f"GRANT SELECT, INSERT ON device_shadow_history TO {server_role}"))
        engine = create_engine(independent.url.set(username=server_role, password=server_role), pool_size=2)
        with Session(engine) as first, Session(engine) as second:
            ShadowService(first, TENANT).patch_desired(ONE, {"first": 1})
            with pytest.raises(OperationalError, match=r"(?s)says why below.*too many connections"):
                ShadowService(second, TENANT).patch_desired(ONE, {"second": 2})
            first.commit()

            ShadowService(second, TENANT).patch_desired(ONE, {"second": 2})
            second.commit()
        engine.dispose()
        assert committed(independent)[ONE].desired == {"old": 1, "first": 1, "second": 2}
