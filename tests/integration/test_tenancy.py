"""Tenants kept apart by PostgreSQL: what a role sees and writes once isolation is enabled for it."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import delete, insert, select, text, update
from sqlalchemy.exc import DBAPIError, ProgrammingError
from sqlalchemy.orm import Session

from iot_models import DeviceNotFound, DeviceState, Report, ShadowService, SyncStatus
from iot_models.tenancy import bind_tenant
from tests.databases.devices import DEVICE, TENANT
from tests.databases.statements import counted_statements
from tests.databases.tenants import OTHER, STRANGE, application, rows, tenants

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Engine

REFUSED = "violates row-level security policy"


@pytest.fixture
def app(engine: Engine, server_role: str) -> Iterator[Engine]:
    with application(engine, server_role) as engine_of_the_role:
        yield engine_of_the_role


# One tenant


def test_raw_sql_without_any_condition_reads_and_writes_one_tenant(app: Engine, engine: Engine) -> None:
    others = [row for row in rows(engine) if OTHER in row]

    with Session(app) as session, session.begin():
        bind_tenant(session, TENANT)
        assert tenants(session) == [TENANT]
        assert session.scalar(text("SELECT count(*) FROM device_state WHERE tenant_id = 'globex'")) == 0
        changed = session.scalars(text("UPDATE device_state SET status = 'ONLINE' RETURNING tenant_id")).all()
        deleted = session.scalars(text("DELETE FROM device_state RETURNING tenant_id")).all()

    assert changed == deleted == [TENANT, TENANT]
    assert rows(engine) == others


def test_the_orm_without_any_condition_reads_and_writes_one_tenant(app: Engine, engine: Engine) -> None:
    others = [row for row in rows(engine) if OTHER in row]

    with Session(app) as session, session.begin():
        bind_tenant(session, TENANT)
        devices = session.scalars(select(DeviceState)).all()
        assert {device.tenant_id for device in devices} == {TENANT}
        assert session.get(DeviceState, (OTHER, DEVICE)) is None
        devices[0].desired_state["fan"] = 3
        session.flush()
        session.execute(update(DeviceState).values(site_id="moved"))
        session.execute(delete(DeviceState).where(DeviceState.device_id == DEVICE))

    assert [row for row in rows(engine) if OTHER in row] == others
    assert len(rows(engine)) == 3


@pytest.mark.repeats
@pytest.mark.parametrize(
    "write",
    [
        lambda s: s.execute(text("INSERT INTO device_state (tenant_id, site_id, device_id) VALUES ('globex', 's', 'n')")),
        lambda s: s.execute(insert(DeviceState).values(tenant_id=OTHER, site_id="s", device_id="n")),
        lambda s: (s.add(DeviceState(tenant_id=OTHER, site_id="s", device_id="n")), s.flush()),
        lambda s: s.execute(text("UPDATE device_state SET tenant_id = 'globex', device_id = device_id || '-moved'")),
        lambda s: s.execute(
            text("""INSERT INTO device_state (tenant_id, site_id, device_id) VALUES ('globex', 's', 'thermostat-1')
                    ON CONFLICT (tenant_id, device_id) DO UPDATE SET status = 'ONLINE'""")
        ),
        lambda s: s.execute(text("COPY device_state (tenant_id, site_id, device_id) FROM STDIN")),
        lambda s: s.execute(text("TRUNCATE device_state")),
    ],
)  # fmt: skip
def test_no_row_can_be_written_for_another_tenant(
    app: Engine, engine: Engine, write: Callable[[Session], object]
) -> None:
    before = rows(engine)

    with Session(app) as session:
        bind_tenant(session, TENANT)
        with pytest.raises(DBAPIError, match=rf"{REFUSED}|COPY FROM not supported with row-level|permission denied"):
            write(session)

    assert rows(engine) == before


def test_every_method_of_the_service_works_for_its_tenant(app: Engine, engine: Engine) -> None:
    others = [row for row in rows(engine) if OTHER in row]

    with Session(app) as session, session.begin():
        shadows = ShadowService(session, TENANT, bind_tenant=True)
        assert shadows.get(DEVICE).desired == {"of": TENANT}
        assert shadows.replace_desired(DEVICE, {"a": 1}, expected_version=1).desired_version == 2
        assert shadows.patch_desired(DEVICE, {"b": 2}).desired == {"a": 1, "b": 2}
        assert shadows.replace_reported(DEVICE, {"a": 1}, acked_version=3).reported_version == 3
        assert shadows.patch_reported(DEVICE, {"b": 0}).is_drifted
        assert [shadow.device_id for shadow in shadows.drifted()] == [DEVICE]
        assert set(shadows.replace_desired_many({DEVICE: {}, "thermostat-2": {}})) == {DEVICE, "thermostat-2"}
        assert set(shadows.patch_desired_many([DEVICE, "thermostat-2"], {"c": 3})) == {DEVICE, "thermostat-2"}
        assert [o.status for o in shadows.replace_reported_many([Report(DEVICE, {"c": 3}, 5)])] == ["accepted"]
        assert [shadow.device_id for shadow in shadows.pending()] == ["thermostat-2"]
        assert [shadow.device_id for shadow in shadows.iter_pending()] == ["thermostat-2"]
        assert shadows.count_pending() == 1
        assert set(shadows.get_many([DEVICE, "thermostat-2", "nobody"])) == {DEVICE, "thermostat-2"}
        assert shadows.status_counts()[SyncStatus.SYNCED] == 1

    assert [row for row in rows(engine) if OTHER in row] == others


def test_a_service_of_another_tenant_finds_nothing_to_read_or_write(app: Engine, engine: Engine) -> None:
    before = rows(engine)

    with Session(app) as session, session.begin():
        bind_tenant(session, TENANT)
        theirs = ShadowService(session, OTHER)
        with pytest.raises(DeviceNotFound):
            theirs.get(DEVICE)
        with pytest.raises(DeviceNotFound):
            theirs.replace_desired(DEVICE, {})
        with pytest.raises(DeviceNotFound):
            theirs.patch_reported(DEVICE, {})
        assert theirs.pending() == theirs.drifted() == []
        assert [o.status for o in theirs.replace_reported_many([Report(DEVICE, {})])] == ["unknown_device"]
        assert set(theirs.status_counts().values()) == {0}

    assert rows(engine) == before


# Bound to none


def nothing_is_there(session: Session) -> None:
    assert session.scalar(text("SELECT count(*) FROM device_state")) == 0
    assert session.scalars(select(DeviceState)).all() == []
    assert session.scalars(text("UPDATE device_state SET site_id = 'x' RETURNING 1")).all() == []
    assert session.scalars(text("DELETE FROM device_state RETURNING 1")).all() == []
    with pytest.raises(DeviceNotFound):
        ShadowService(session, TENANT).get(DEVICE)
    for tenant in (TENANT, ""):
        with pytest.raises(ProgrammingError, match=REFUSED), session.begin_nested():
            session.execute(insert(DeviceState).values(tenant_id=tenant, site_id="s", device_id="new"))


def test_whoever_forgets_to_bind_sees_and_writes_nothing(app: Engine, engine: Engine) -> None:
    with Session(engine) as session, session.begin():  # what '' would match, to which an ended SET LOCAL falls back
        session.add(DeviceState(tenant_id="", site_id="s", device_id="nobody's"))
    before = rows(engine)

    with Session(app) as session, session.begin():
        assert session.scalar(text("SELECT current_setting('app.tenant_id', true)")) is None
        nothing_is_there(session)
    with Session(app) as session, session.begin():
        bind_tenant(session, TENANT)
    with Session(app) as session, session.begin():
        assert session.scalar(text("SELECT current_setting('app.tenant_id', true)")) == ""
        nothing_is_there(session)

    assert rows(engine) == before


def commit(session: Session) -> None:
    session.commit()


def roll_back(session: Session) -> None:
    session.rollback()


def close(session: Session) -> None:
    session.close()


def fail(session: Session) -> None:
    with pytest.raises(ProgrammingError, match="nonsense"):
        session.execute(text("SELECT nonsense"))


def forget(session: Session) -> None:
    session.begin_nested()
    bind_tenant(session, TENANT)


@pytest.mark.repeats
@pytest.mark.parametrize("leave", [commit, roll_back, close, fail, forget])
def test_the_next_user_of_a_pooled_connection_is_bound_to_nobody(
    app: Engine, leave: Callable[[Session], object]
) -> None:
    with Session(app) as session:
        bind_tenant(session, TENANT)
        pid = session.scalar(text("SELECT pg_backend_pid()"))
        leave(session)
    with Session(app) as session:
        assert session.scalar(text("SELECT pg_backend_pid()")) == pid
        nothing_is_there(session)
    with Session(app) as session:
        bind_tenant(session, OTHER)
        assert session.scalar(text("SELECT pg_backend_pid()")) == pid
        assert tenants(session) == [OTHER]


def test_a_session_that_nobody_closed_gives_its_connection_back(app: Engine) -> None:
    bind_tenant(Session(app), TENANT)
    gc.collect()

    with Session(app) as session:
        assert tenants(session) == []


def test_the_next_transaction_of_the_same_session_is_bound_to_nobody(app: Engine) -> None:
    with Session(app) as session:
        bind_tenant(session, TENANT)
        for end in (session.commit, session.rollback):
            assert tenants(session) == [TENANT]
            end()
            assert tenants(session) == []
            session.rollback()
            bind_tenant(session, TENANT)


def test_one_session_serves_tenants_one_transaction_after_another(app: Engine) -> None:
    with Session(app) as session:
        for tenant in [TENANT, OTHER] * 6:  # so often that psycopg prepares all of these statements
            with session.begin():
                bind_tenant(session, tenant)
                assert tenants(session) == [tenant]
                assert {device.tenant_id for device in session.scalars(select(DeviceState))} == {tenant}


def test_the_service_binds_each_transaction_once_and_again_after_a_commit(app: Engine) -> None:
    with Session(app) as session, counted_statements(app) as statements:
        shadows = ShadowService(session, TENANT, bind_tenant=True)
        for _ in range(3):
            shadows.patch_desired(DEVICE, {"a": 1})
            assert shadows.get(DEVICE).desired["a"] == 1
            session.commit()

    assert len([statement for statement in statements if statement.startswith("SET")]) == 3


def test_the_service_binds_before_it_flushes_what_the_caller_changed(app: Engine) -> None:
    with Session(app) as session, session.begin():
        session.add(DeviceState(tenant_id=TENANT, site_id="s", device_id="new"))

        assert ShadowService(session, TENANT, bind_tenant=True).patch_desired("new", {"a": 1}).desired_version == 1


def test_the_service_binds_nothing_unless_it_is_asked_to(app: Engine) -> None:
    with Session(app) as session, counted_statements(app) as statements:
        assert ShadowService(session, TENANT).count_pending() == 0

    assert len(statements) == 1


# Strange ids


@pytest.mark.repeats
@pytest.mark.parametrize("conforming", ["on", "off"])
def test_a_tenant_may_have_any_id(app: Engine, engine: Engine, conforming: str) -> None:
    with Session(engine) as session, session.begin():
        session.add_all(DeviceState(tenant_id=tenant, site_id="s", device_id=DEVICE) for tenant in STRANGE)

    with Session(app) as session:
        session.execute(text(f"SET standard_conforming_strings = {conforming}"))
        session.execute(text("SET escape_string_warning = off"))
        session.commit()
        for tenant in STRANGE:
            bind_tenant(session, tenant)
            assert tenants(session) == [tenant]
            assert session.scalar(text("SELECT current_setting('app.tenant_id')")) == tenant
            assert ShadowService(session, tenant, bind_tenant=True).get(DEVICE).tenant_id == tenant
            session.commit()
