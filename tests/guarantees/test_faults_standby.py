"""A read-only standby: what works on it, what it refuses, and what is there when it takes over."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from alembic.util import CommandError
from sqlalchemy import NullPool, make_url, text
from sqlalchemy import create_engine as plain_engine
from sqlalchemy.exc import DBAPIError, InternalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from iot_models import AsyncShadowService, CursorExpired, DeviceState, ShadowService, migrate
from iot_models.engine import create_engine
from tests.databases.alembic_runs import upgrade
from tests.databases.async_engines import ASYNC_DRIVERS, async_engine, in_event_loop, url_for
from tests.databases.devices import TENANT
from tests.databases.durable_server import durable_postgres
from tests.databases.standby import promote, standby_of
from tests.guarantees.every_write import (
    BATCH,
    GONE,
    ONE,
    REPLACE_DESIRED,
    START,
    WRITES,
    committed,
    each_mode,
    fleet_in,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import URL, Engine

    from tests.databases.durable_server import DurableServer

READ_ONLY = "25006"
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def primary() -> Iterator[DurableServer]:
    """A migrated server; transactions that ask for more than `local` wait for the standby `heir`."""
    with durable_postgres(settings={"synchronous_standby_names": "heir", "synchronous_commit": "local"}) as server:
        upgrade(server.url)
        yield server
        server.stop("immediate")


@pytest.fixture
def on_primary(primary: DurableServer) -> Iterator[Engine]:
    """The way to the primary, with the fleet committed."""
    with fleet_in(plain_engine(primary.url, poolclass=NullPool)) as engine:
        yield engine
        primary.start()  # where a test has stopped it


@pytest.fixture(scope="module")
def _standby(primary: DurableServer) -> Iterator[DurableServer]:
    with standby_of(primary, "standby") as standby:
        yield standby


@pytest.fixture
def standby(_standby: DurableServer, on_primary: Engine) -> DurableServer:
    """A standby that shows what is committed on the primary now."""
    catch_up(_standby, on_primary)
    return _standby


@pytest.fixture
def engine_of() -> Iterator[Callable[..., Engine]]:
    """Makes engines with our settings."""
    engines: list[Engine] = []

    def make(url: str | URL, **options: Any) -> Engine:
        engines.append(create_engine(url, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.dispose()


def catch_up(standby: DurableServer, on_primary: Engine) -> None:
    """Return as soon as the standby shows what the primary has committed so far."""
    engine = plain_engine(standby.url, isolation_level="AUTOCOMMIT")
    with on_primary.connect() as connection:
        sent = connection.scalar(text("SELECT pg_current_wal_lsn()::text"))
    deadline = time.monotonic() + 10
    with engine.connect() as connection:
        while not connection.scalar(text("SELECT pg_last_wal_replay_lsn() >= CAST(:sent AS pg_lsn)"), {"sent": sent}):
            assert time.monotonic() < deadline, "the standby does not follow"
            time.sleep(0.005)
    engine.dispose()


def all_reads(engine: Engine) -> list[object]:
    with Session(engine) as session:
        service = ShadowService(session, TENANT)
        return [
            service.get(ONE),
            service.get_many(list(BATCH)),
            service.pending(),
            service.pending(limit=1, after="a"),
            list(service.iter_pending(batch_size=2)),
            service.count_pending(),
            service.drifted(),
            service.refused(),
            service.count_refused(),
            service.history(ONE),
            service.history(GONE),
            service.desired_at(ONE, 6),
            service.status_counts(now=NOW),
            session.get_one(DeviceState, (TENANT, ONE)).delta,
        ]


@pytest.mark.repeats
def test_every_read_works_on_a_standby(
    standby: DurableServer, on_primary: Engine, engine_of: Callable[..., Engine]
) -> None:
    with Session(on_primary) as session, session.begin():
        ShadowService(session, TENANT).replace_desired("a", {"mode": "eco"})
        ShadowService(session, TENANT).replace_reported("c", {}, acked_version=7)
        ShadowService(session, TENANT).refuse_desired("d", 7, "no")
    catch_up(standby, on_primary)

    answers = all_reads(engine_of(standby.url))

    assert answers == all_reads(on_primary)
    with Session(engine_of(standby.url)) as session:  # and none of them was empty
        service = ShadowService(session, TENANT)
        assert [shadow.device_id for shadow in service.pending()] == ["a", "b", "d"]
        assert [shadow.device_id for shadow in service.drifted()] == ["c"]
        assert [shadow.device_id for shadow in service.refused()] == ["d"]


@pytest.mark.repeats
@each_mode
def test_every_write_is_refused_by_a_standby_which_says_why(
    standby: DurableServer, on_primary: Engine, engine_of: Callable[..., Engine], mode: str
) -> None:
    with Session(engine_of(standby.url, isolation_level=mode)) as session:
        service = ShadowService(session, TENANT)
        for write in WRITES:
            with pytest.raises(InternalError, match=r"(?s)an engine on the primary.*in a read-only") as caught:
                write(service)
            assert getattr(caught.value.orig, "sqlstate", None) == READ_ONLY
            assert not caught.value.connection_invalidated

            session.rollback()

            assert service.get(ONE).desired_version == 7
    assert committed(on_primary) == START


def test_a_migration_is_refused_by_a_standby_before_it_begins(standby: DurableServer) -> None:
    with pytest.raises(
        CommandError, match=r"this server is a standby, which only reads; nothing was changed\. Migrate on the primary"
    ):
        migrate.downgrade(standby.url, "075")


def test_a_flush_on_a_standby_is_refused_and_is_no_race_lost(
    standby: DurableServer, engine_of: Callable[..., Engine]
) -> None:
    with Session(engine_of(standby.url)) as session:
        device = session.get_one(DeviceState, (TENANT, ONE))
        device.desired_state["new"] = 2
        with pytest.raises(InternalError, match="in a read-only transaction"):
            session.flush()
        session.rollback()
        assert device.desired_state == {"old": 1}


@pytest.mark.repeats
@pytest.mark.parametrize("driver", ASYNC_DRIVERS)
@in_event_loop
async def test_the_async_drivers_read_from_a_standby_and_hear_why_it_refuses(
    standby: DurableServer, on_primary: Engine, driver: str
) -> None:
    async with async_engine(url_for(driver, make_url(standby.url))) as engine, AsyncSession(engine) as session:
        service = AsyncShadowService(session, TENANT)
        for write in WRITES:
            with pytest.raises(DBAPIError, match=r"(?s)an engine on the primary.*in a read-only") as caught:
                await write(service)
            assert getattr(caught.value.orig, "sqlstate", None) == READ_ONLY
            await session.rollback()
        assert await service.count_pending() == 4
    assert committed(on_primary) == START


def test_a_read_only_role_or_session_is_refused_in_the_same_words(
    on_primary: Engine, primary: DurableServer, engine_of: Callable[..., Engine]
) -> None:
    engine = engine_of(primary.url, connect_args={"options": "-c default_transaction_read_only=on"})
    for write in WRITES:
        with Session(engine) as session, pytest.raises(InternalError, match="in a read-only transaction"):
            write(ShadowService(session, TENANT))
    assert committed(on_primary) == START


@pytest.mark.repeats
@pytest.mark.usefixtures("on_primary")
def test_a_synchronous_standby_that_takes_over_has_every_acknowledged_write_and_the_engine_finds_it(
    primary: DurableServer, engine_of: Callable[..., Engine]
) -> None:
    with standby_of(primary, "heir") as heir:
        hosts = [str(make_url(server.url).query["host"]) for server in (heir, primary)]
        either = make_url(primary.url).update_query_dict(
            {"host": ",".join(hosts), "port": "5432,5432", "target_session_attrs": "read-write"}
        )
        engine = engine_of(either, connect_args={"options": "-c synchronous_commit=on"})
        on_heir = engine_of(heir.url)
        with Session(engine) as session, Session(on_heir) as reader:
            service = ShadowService(session, TENANT)
            for number in range(1, 21):
                service.patch_desired_many(list(BATCH), {"number": number})
                session.commit()
            service.replace_desired("d", {"never": "acknowledged"})
            with pytest.raises(InternalError, match="read-only"):
                REPLACE_DESIRED(ShadowService(reader, TENANT))
            reader.rollback()

            primary.stop("immediate")
            promote(heir)

            row = START["a"]
            for number in range(1, 21):
                row = row.asked({"old": 1, "number": number})
            assert committed(on_heir) == START | dict.fromkeys(BATCH, row)
            with pytest.raises(DBAPIError) as caught:
                session.commit()
            assert caught.value.connection_invalidated
            session.rollback()

            service.patch_desired_many(list(BATCH), {"number": 21})  # the same session and engine, on the new primary
            session.execute(text("SET LOCAL synchronous_commit = local"))  # it has no standby
            session.commit()
            REPLACE_DESIRED(ShadowService(reader, TENANT))  # as does what was refused, where it was refused
            reader.commit()

        rows = committed(on_heir)
        assert rows["a"].desired == {"old": 1, "number": 21}
        assert rows[ONE].desired == REPLACE_DESIRED.done()[ONE].desired
        assert [rows[device_id].desired_version for device_id in "abcd"] == [28, 29, 28, 7]


def changes(url: str, after: str | None = None) -> tuple[list[tuple[str, int]], str]:
    engine = plain_engine(url, poolclass=NullPool)
    with Session(engine) as session:
        page = ShadowService(session, TENANT).changes(after=after)
    return [(change.device_id, change.version) for change in page.changes], page.cursor


def test_the_changes_are_read_on_a_standby_too_and_a_cursor_lives_through_a_takeover_that_loses_nothing(
    primary: DurableServer, on_primary: Engine
) -> None:
    with standby_of(primary, "successor") as successor:
        with Session(on_primary) as session, session.begin():
            ShadowService(session, TENANT).replace_desired(ONE, {"n": 1})
        catch_up(successor, on_primary)
        found, cursor = changes(successor.url)
        assert found[-1:] == changes(primary.url)[0][-1:]
        assert found

        promote(successor)

        assert changes(successor.url, cursor)[0] == []
        engine = plain_engine(successor.url, poolclass=NullPool)
        with Session(engine) as session, session.begin():
            written = ShadowService(session, TENANT).replace_desired(ONE, {"n": 2})
        assert changes(successor.url, cursor)[0] == [(ONE, written.desired_version)]


def test_a_cursor_has_expired_after_a_takeover_that_lost_what_it_has_seen(
    primary: DurableServer, on_primary: Engine
) -> None:
    with standby_of(primary, "successor") as successor:
        cut_off = plain_engine(successor.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with cut_off.connect() as connection:
            connection.execute(text("ALTER SYSTEM SET primary_conninfo = ''"))
            connection.execute(text("SELECT pg_reload_conf()"))
            while connection.scalar(text("SELECT count(*) FROM pg_stat_wal_receiver")):
                time.sleep(0.01)
        with Session(on_primary) as session, session.begin():
            ShadowService(session, TENANT).replace_desired(ONE, {"lost": 1})
        found, cursor = changes(primary.url)
        assert found

        promote(successor)

        for number in range(3):  # under the same transaction ids, and the same version
            with Session(plain_engine(successor.url, poolclass=NullPool)) as session, session.begin():
                ShadowService(session, TENANT).replace_desired(ONE, {"n": number})
        with pytest.raises(CursorExpired):
            changes(successor.url, cursor)
