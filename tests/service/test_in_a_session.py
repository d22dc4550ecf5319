"""The service inside the caller's session and transaction: what it sees, what it shows, what it leaves alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import create_engine, func, inspect, make_url, select, text
from sqlalchemy.exc import DataError, OperationalError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from iot_models import (
    AsyncShadowService,
    Base,
    DeviceNotFound,
    DeviceState,
    DocumentLimits,
    InvalidDocument,
    Report,
    ShadowService,
    VersionConflict,
)
from tests.databases.async_engines import async_engine, in_event_loop
from tests.databases.backends import backend_pid, end_backend
from tests.databases.devices import DEVICE, TENANT, add_device

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine


@pytest.fixture
def service(session: Session) -> ShadowService:
    add_device(session, desired_state={"mode": "eco"}, desired_version=7, reported_version=7)
    return ShadowService(session, TENANT)


def load(session: Session) -> DeviceState:
    device = session.get(DeviceState, (TENANT, DEVICE))
    assert device is not None
    return device


def test_a_loaded_object_shows_what_the_service_wrote_without_another_statement(
    session: Session, service: ShadowService
) -> None:
    device = load(session)

    service.patch_desired(DEVICE, {"target_c": 21})
    service.replace_reported(DEVICE, {"mode": "eco"}, acked_version=8)

    assert device.desired_state == {"mode": "eco", "target_c": 21}
    assert (device.desired_version, device.reported_version) == (8, 8)
    assert device.reported_state == {"mode": "eco"}
    assert device.shadow_updated_at == device.last_seen_at == session.scalar(select(func.now()))
    assert device not in session.dirty


def test_what_a_loaded_object_shows_is_not_the_dict_that_the_caller_got(
    session: Session, service: ShadowService
) -> None:
    device = load(session)

    shadow = service.replace_desired(DEVICE, {"fan": {"speed": 1}})
    shadow.desired["fan"]["speed"] = 9

    assert device.desired_state == {"fan": {"speed": 1}}


def test_an_expired_object_reads_the_new_values_when_asked(session: Session, service: ShadowService) -> None:
    device = load(session)
    session.expire(device)

    service.replace_desired(DEVICE, {"mode": "heat"})

    assert device.desired_state == {"mode": "heat"}
    assert device.site_id == "berlin"


def test_changes_not_flushed_yet_are_flushed_before_the_service_reads_or_writes(
    session: Session, service: ShadowService
) -> None:
    device = load(session)
    device.status = "ONLINE"
    session.add(DeviceState(tenant_id=TENANT, site_id="berlin", device_id="new"))

    service.replace_desired("new", {"a": 1})

    assert session.scalar(select(DeviceState.status).where(DeviceState.device_id == DEVICE)) == "ONLINE"


def test_without_autoflush_changes_not_flushed_yet_are_kept_for_the_callers_flush(
    session: Session, service: ShadowService
) -> None:
    device = load(session)
    with session.no_autoflush:
        device.status = "ONLINE"
        device.reported_state = {"mine": 1}
        service.replace_reported(DEVICE, {"theirs": 1})
        assert device.status == "ONLINE"
        assert device.reported_state == {"mine": 1}
        assert inspect(device).attrs.reported_state.history.has_changes()
    session.flush()

    assert service.get(DEVICE).reported == {"mine": 1}


def test_the_service_never_commits_and_the_caller_may_roll_back(session: Session, service: ShadowService) -> None:
    savepoint = session.begin_nested()
    service.replace_desired(DEVICE, {"mode": "heat"})
    savepoint.rollback()

    assert service.get(DEVICE).desired == {"mode": "eco"}


each_write = pytest.mark.parametrize(
    "write",
    [
        lambda service: service.replace_desired(DEVICE, {"mode": "heat"}),
        lambda service: service.patch_desired_many([DEVICE], {"mode": "heat"}),
        lambda service: service.replace_reported_many([Report(DEVICE, {"mode": "heat"})]),
    ],
)


@each_write
def test_after_a_rollback_to_a_savepoint_a_loaded_object_shows_what_its_row_says(
    session: Session, service: ShadowService, write: Callable[[ShadowService], object]
) -> None:
    device = load(session)
    savepoint = session.begin_nested()
    write(service)
    savepoint.rollback()

    assert (device.desired_state, device.desired_version) == ({"mode": "eco"}, 7)
    assert (device.reported_state, device.last_seen_at) == ({}, None)


@each_write
def test_an_object_that_is_loaded_inside_a_savepoint_is_read_anew_after_its_rollback(
    session: Session, service: ShadowService, write: Callable[[ShadowService], object]
) -> None:
    outer = session.begin_nested()
    inner = session.begin_nested()
    write(service)
    device = load(session)
    inner.commit()
    outer.rollback()

    assert (device.desired_state, device.desired_version) == ({"mode": "eco"}, 7)
    assert (device.reported_state, device.last_seen_at) == ({}, None)
    with session.begin_nested() as again:
        write(service)
        again.rollback()
    assert (device.desired_state, device.reported_state) == ({"mode": "eco"}, {})


def test_after_a_rollback_of_the_whole_transaction_a_loaded_object_shows_what_its_row_says(own_engine: Engine) -> None:
    with Session(own_engine) as session, session.begin():
        add_device(session, desired_state={"mode": "eco"}, desired_version=7)
    with Session(own_engine) as session:
        device = load(session)
        with session.begin_nested():
            ShadowService(session, TENANT).patch_desired(DEVICE, {"never": "happened"})
        session.rollback()

        assert (device.desired_state, device.desired_version) == ({"mode": "eco"}, 7)


def test_a_write_that_a_savepoint_took_back_does_not_hide_somebody_elses(own_engine: Engine) -> None:
    with Session(own_engine) as session, session.begin():
        add_device(session, desired_state={"mode": "eco"}, desired_version=7)
    with Session(own_engine) as session:
        device = load(session)
        with session.begin_nested() as savepoint:
            ShadowService(session, TENANT).patch_desired(DEVICE, {"never": "happened"})
            savepoint.rollback()
        with Session(own_engine) as theirs, theirs.begin():
            ShadowService(theirs, TENANT).patch_desired(DEVICE, {"operator": "B"})

        device.desired_state["mode"] = "heat"
        session.commit()

        assert device.desired_state == {"mode": "heat", "operator": "B"}
        assert device.desired_version == 9


@pytest.mark.parametrize(
    "refused",
    [
        lambda service: service.replace_desired(DEVICE, {"a": float("nan")}),
        lambda service: service.patch_desired(DEVICE, {"a": "\0"}),
        lambda service: service.patch_desired(DEVICE, {"a": "x" * 40_000}),
        lambda service: service.replace_reported(DEVICE, {"a": {1: 2}}),
        lambda service: service.patch_reported(DEVICE, []),
        lambda service: service.replace_desired(DEVICE, None),
        lambda service: service.replace_desired("no\0body", {}),
        lambda service: service.get("\ud800"),
        lambda service: service.replace_desired(DEVICE, {}, expected_version=3),
    ],
)
def test_after_a_refusal_nothing_is_written_and_the_transaction_stays_usable(
    service: ShadowService, refused: Callable[[ShadowService], object]
) -> None:
    before = service.get(DEVICE)

    with pytest.raises((InvalidDocument, DeviceNotFound, VersionConflict)):
        refused(service)

    assert service.get(DEVICE) == before
    assert service.replace_desired(DEVICE, {"mode": "heat"}, expected_version=7).desired_version == 8


def test_an_invalid_document_names_its_place_and_is_refused_before_any_statement(engine: Engine) -> None:
    with Session(engine) as session:
        for write in ("replace_desired", "patch_desired", "replace_reported", "patch_reported"):
            with pytest.raises(InvalidDocument) as caught:
                getattr(ShadowService(session, TENANT), write)(DEVICE, {"fan": [{"speed": float("inf")}]})
            assert caught.value.path == "/fan/0/speed"
        assert not session.in_transaction()


def test_the_limits_are_the_callers(session: Session) -> None:
    add_device(session)
    service = ShadowService(session, TENANT, limits=DocumentLimits(max_depth=0))

    with pytest.raises(InvalidDocument, match="nested too deep"):
        service.replace_desired(DEVICE, {"a": {}})


def test_a_session_that_is_bound_per_class_finds_its_engine(engine: Engine) -> None:
    with Session(binds={Base: engine}) as session:
        assert ShadowService(session, TENANT).count_pending() == 0


def test_an_unmigrated_database_is_an_error_that_says_what_to_run(new_database: Callable[[], str]) -> None:
    engine = create_engine(new_database())
    with Session(engine) as session, pytest.raises(ProgrammingError, match="run `alembic upgrade head`"):
        ShadowService(session, TENANT).get(DEVICE)

    with Session(engine) as session:
        session.execute(text("CREATE TABLE device_state (tenant_id text, device_id text)"))
        with pytest.raises(ProgrammingError, match="run `alembic upgrade head`"):
            ShadowService(session, TENANT).replace_desired(DEVICE, {})
    engine.dispose()


def test_a_server_that_is_not_there_is_an_error_that_says_so() -> None:
    engine = create_engine("postgresql+psycopg://nobody@127.0.0.1:1/nothing")

    with Session(engine) as session, pytest.raises(OperationalError, match=r"cannot be reached: start it, or correct"):
        ShadowService(session, TENANT).get(DEVICE)


@pytest.mark.parametrize("method", ["replace_desired", "patch_desired", "replace_reported", "patch_reported"])
def test_a_write_that_the_database_suppresses_is_an_error_and_no_endless_loop(
    session: Session, service: ShadowService, method: str
) -> None:
    session.execute(text("CREATE FUNCTION pg_temp.skip() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"))
    session.execute(
        text("CREATE TRIGGER skip BEFORE UPDATE ON device_state FOR EACH ROW EXECUTE FUNCTION pg_temp.skip()")
    )

    with pytest.raises(
        RuntimeError, match=r"'thermostat-1' exists .* look for a trigger or a row level security policy"
    ):
        getattr(service, method)(DEVICE, {"a": 1})


def test_any_other_database_error_is_passed_on_as_it_is(session: Session, service: ShadowService) -> None:
    session.execute(text("ALTER TABLE device_state ADD CONSTRAINT slow CHECK (pg_sleep(0.2) IS NOT NULL) NOT VALID"))
    session.execute(text("SET LOCAL statement_timeout = '20ms'"))

    with pytest.raises(OperationalError, match="statement timeout") as caught:
        service.replace_desired(DEVICE, {})
    assert "alembic" not in str(caught.value)


def test_a_lost_connection_is_an_error_that_says_what_to_do(own_engine: Engine) -> None:
    with Session(own_engine) as session:
        end_backend(own_engine, backend_pid(session.connection()))

        with pytest.raises(OperationalError, match=r"The connection is lost, .* roll back, and run all of it again"):
            ShadowService(session, TENANT).get(DEVICE)


def test_a_version_that_no_integer_holds_is_the_databases_error_as_it_is(session: Session) -> None:
    add_device(session, desired_version=2**31 - 1)

    with pytest.raises(DataError, match="integer out of range"):
        ShadowService(session, TENANT).replace_desired(DEVICE, {})


@in_event_loop
async def test_an_async_driver_without_a_server_is_an_error_with_a_note_that_says_so() -> None:
    url = make_url("postgresql+asyncpg://nobody@127.0.0.1:1/nothing")
    async with async_engine(url) as engine, AsyncSession(engine) as session:
        with pytest.raises(OSError, match="Connect call failed") as caught:
            await AsyncShadowService(session, TENANT).get(DEVICE)
    assert caught.value.__notes__ == ["PostgreSQL cannot be reached: start it, or correct the engine's URL."]


def test_a_service_binds_the_transaction_to_its_tenant_where_it_is_told_to(session: Session) -> None:
    ShadowService(session, TENANT, bind_tenant=True).count_pending()

    assert session.scalar(text("SELECT current_setting('app.tenant_id')")) == TENANT
