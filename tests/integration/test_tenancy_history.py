"""Row level security covers the history as it covers `device_state`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import NullPool, create_engine, select, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Session

from iot_models import DeviceNotFound, ShadowHistory, ShadowService, VersionNotKept, migrate, tenancy
from tests.databases.devices import DEVICE, TENANT
from tests.databases.tenants import ON_HISTORY, OTHER, PRIVILEGES, application, login, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Engine


@pytest.fixture
def app(own_engine: Engine, server_role: str) -> Iterator[Engine]:
    """The engine of a role that is limited to one tenant; the other tenant has a history."""
    with application(own_engine, server_role) as engine:
        with Session(own_engine) as session, session.begin():
            ShadowService(session, OTHER, actor="theirs").patch_desired(DEVICE, {"secret": 1}, request_id="r-1")
        yield engine


def test_every_call_works_for_the_bound_tenant_and_reads_none_of_another(app: Engine) -> None:
    with Session(app) as session, session.begin():
        ours = ShadowService(session, TENANT, bind_tenant=True)
        ours.patch_desired(DEVICE, {"n": 1}, request_id="r-1")
        ours.patch_desired(DEVICE, {"n": 1}, request_id="r-1")
        ours.restore_desired(DEVICE, 1)
        ours.replace_desired_many({DEVICE: {}})
        ours.remove(DEVICE)
        ours.register(DEVICE, "s")
        assert [v.version for v in ours.history(DEVICE)] == [5, 4, 3, 2, 1]
        assert {row.tenant_id for row in session.scalars(select(ShadowHistory))} == {TENANT}


def test_a_history_that_somebody_else_made_before_the_migration_gets_no_policy(
    new_database: Callable[..., str], server_role: str
) -> None:
    url = new_database()
    migrate.upgrade(url, "077")
    with create_engine(url, poolclass=NullPool).begin() as connection:
        run(connection, f"GRANT SELECT ON device_state TO {server_role}")
        run(connection, "CREATE TABLE device_shadow_history (tenant_id text)")
        run(
            connection,
            f"CREATE ROLE {server_role}_other; ALTER TABLE device_shadow_history OWNER TO {server_role}_other",
        )
        with pytest.raises(
            ValueError, match=f"device_shadow_history belongs to {server_role}_other, and device_state to"
        ):
            tenancy.enable(connection, server_role)
        connection.rollback()


def test_without_a_tenant_there_is_no_history(app: Engine) -> None:
    with Session(app) as session, session.begin():
        assert session.scalars(select(ShadowHistory)).all() == []
    with Session(app) as session, session.begin():
        tenancy.bind_tenant(session, TENANT)
        theirs = ShadowService(session, OTHER)
        with pytest.raises(DeviceNotFound):
            theirs.history(DEVICE)
        with pytest.raises(VersionNotKept):
            theirs.desired_at(DEVICE, 2)


@pytest.mark.repeats
def test_a_version_of_another_tenant_cannot_be_forged_or_deleted(app: Engine, own_engine: Engine) -> None:
    forged = "INSERT INTO device_shadow_history (tenant_id, device_id, desired_version) VALUES ('globex', 'x', 1)"
    with Session(app) as session, session.begin():
        tenancy.bind_tenant(session, TENANT)
        with pytest.raises(ProgrammingError, match="row-level security"), session.begin_nested():
            session.execute(text(forged))
        with pytest.raises(ProgrammingError, match="permission denied"), session.begin_nested():
            session.execute(text("UPDATE device_shadow_history SET reason = 'x'"))
        session.execute(text("DELETE FROM device_shadow_history"))
    with Session(own_engine) as session:
        assert ShadowService(session, OTHER).history(DEVICE)[0].actor == "theirs"


@pytest.mark.repeats
def test_a_role_that_was_limited_before_there_was_a_history_is_limited_there_too(
    own_engine: Engine, server_role: str
) -> None:
    migrate.downgrade(own_engine, "077")
    with own_engine.begin() as connection:
        run(connection, f"GRANT {PRIVILEGES} ON device_state TO {server_role}")
    with own_engine.begin() as connection:
        tenancy.enable(connection, server_role)
        assert tenancy.check(connection, server_role) == []
    migrate.upgrade(own_engine)
    with own_engine.begin() as connection:
        assert tenancy.check(connection, server_role) == []
        run(connection, "DROP POLICY iot_models_tenant ON device_shadow_history")
        (found,) = tenancy.check(connection, server_role)
        assert "does not limit it: call tenancy.enable" in found
        tenancy.enable(connection, server_role)
        assert tenancy.check(connection, server_role) == []
        tenancy.disable(connection, server_role)
        assert connection.scalar(text("SELECT count(*) FROM pg_policy")) == 0
        run(connection, f"DROP OWNED BY {server_role}")


def test_a_right_on_the_history_that_no_policy_limits_is_named(own_engine: Engine, server_role: str) -> None:
    with own_engine.begin() as connection:
        run(connection, f"GRANT TRUNCATE ON device_shadow_history TO {server_role}")
        with pytest.raises(ValueError, match=rf"REVOKE TRUNCATE ON device_shadow_history FROM {server_role}"):
            tenancy.enable(connection, server_role)
        connection.rollback()


@pytest.mark.repeats
def test_without_its_rights_on_the_history_a_write_says_which_are_missing(own_engine: Engine, server_role: str) -> None:
    with own_engine.begin() as connection:
        run(connection, f"GRANT {PRIVILEGES} ON device_state TO {server_role}")
    try:
        with Session(create_engine(login(own_engine, server_role), poolclass=NullPool)) as session:
            with pytest.raises(ProgrammingError, match=f"(?s){ON_HISTORY} on device_shadow_history.*permission denied"):
                ShadowService(session, TENANT).replace_desired(DEVICE, {})
            session.rollback()
            with pytest.raises(DeviceNotFound):
                ShadowService(session, TENANT, history=False).patch_desired(DEVICE, {})
    finally:
        with own_engine.begin() as connection:
            run(connection, f"DROP OWNED BY {server_role}")
