"""A transaction bound to a tenant: savepoints, sessions that share a connection, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from iot_models import ShadowService
from iot_models.tenancy import bind_tenant
from tests.databases.devices import DEVICE, TENANT
from tests.databases.statements import counted_statements
from tests.databases.tenants import OTHER, application, tenants

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine


@pytest.fixture
def app(engine: Engine, server_role: str) -> Iterator[Engine]:
    with application(engine, server_role) as engine_of_the_role:
        yield engine_of_the_role


# Savepoints


def test_a_savepoint_that_is_rolled_back_leaves_what_was_bound_before_it(app: Engine) -> None:
    with Session(app) as session:
        bind_tenant(session, TENANT)
        savepoint = session.begin_nested()
        bind_tenant(session, TENANT)
        savepoint.rollback()

        assert tenants(session) == [TENANT]


def test_bound_in_a_savepoint_that_is_rolled_back_nothing_is_shown_until_it_is_bound_again(app: Engine) -> None:
    with Session(app) as session:
        savepoint = session.begin_nested()
        bind_tenant(session, TENANT)
        savepoint.rollback()
        assert tenants(session) == []

        with pytest.raises(RuntimeError, match="bound to tenant 'acme'"):
            bind_tenant(session, OTHER)
        bind_tenant(session, TENANT)
        assert tenants(session) == [TENANT]


def test_a_savepoint_that_is_rolled_back_gives_the_tenant_of_another_session_back(app: Engine) -> None:
    with app.connect() as connection, connection.begin():
        with Session(connection) as session:
            bind_tenant(session, TENANT)
            session.commit()
        savepoint = connection.begin_nested()
        with Session(connection) as session:
            bind_tenant(session, OTHER)
            assert tenants(session) == [OTHER]
        savepoint.rollback()

        with Session(connection) as session:
            assert tenants(session) == [TENANT]


def test_bound_in_a_savepoint_that_is_released_the_transaction_stays_bound(app: Engine) -> None:
    with Session(app) as session:
        with session.begin_nested(), session.begin_nested():
            bind_tenant(session, TENANT)
        assert tenants(session) == [TENANT]

        bind_tenant(session, TENANT)
        assert tenants(session) == [TENANT]
        with pytest.raises(RuntimeError, match="bound to tenant 'acme'"):
            bind_tenant(session, OTHER)


@pytest.mark.parametrize("own_savepoints", ["the session's", "the connection's"])
def test_the_service_binds_again_after_a_savepoint_took_its_tenant_away(app: Engine, own_savepoints: str) -> None:
    with Session(app) as session:
        shadows = ShadowService(session, TENANT, bind_tenant=True)
        owner = session if own_savepoints == "the session's" else session.connection()
        for _ in range(2):
            outer = owner.begin_nested()
            inner = owner.begin_nested()
            assert shadows.get(DEVICE).tenant_id == TENANT
            inner.rollback()
            assert shadows.get(DEVICE).tenant_id == TENANT
            outer.rollback()
        assert shadows.get(DEVICE).tenant_id == TENANT


def test_after_an_error_is_rolled_back_to_a_savepoint_the_tenant_is_still_bound(app: Engine) -> None:
    with Session(app) as session:
        shadows = ShadowService(session, TENANT, bind_tenant=True)
        shadows.patch_desired(DEVICE, {"kept": 1})
        with pytest.raises(ProgrammingError, match="nonsense"), session.begin_nested():
            session.execute(text("SELECT nonsense"))

        assert shadows.get(DEVICE).desired["kept"] == 1
        assert tenants(session) == [TENANT]


def test_sessions_that_join_one_transaction_may_serve_tenants_after_each_other_but_not_at_once(app: Engine) -> None:
    with app.connect() as connection, connection.begin():
        for tenant in (TENANT, OTHER):
            with Session(connection, join_transaction_mode="create_savepoint") as session, session.begin():
                bind_tenant(session, tenant)
                assert tenants(session) == [tenant]

        with (
            Session(connection, join_transaction_mode="create_savepoint") as session,
            Session(connection, join_transaction_mode="create_savepoint") as another,
        ):
            bind_tenant(session, TENANT)
            bind_tenant(another, TENANT)
            with pytest.raises(RuntimeError, match="bound to tenant 'acme'"):
                bind_tenant(another, OTHER)
            assert tenants(session) == [TENANT]


# Refusals


def test_a_transaction_is_bound_to_one_tenant_and_refuses_a_second_one(app: Engine) -> None:
    with Session(app) as session, counted_statements(app) as statements:
        bind_tenant(session, TENANT)
        bind_tenant(session, TENANT)
        assert len(statements) == 1

        with pytest.raises(
            RuntimeError,
            match=r"^this transaction is bound to tenant 'acme' and works for no other: .* binding 'globex'$",
        ):
            bind_tenant(session, OTHER)
        with pytest.raises(RuntimeError, match="bound to tenant 'acme'"):
            ShadowService(session, OTHER, bind_tenant=True).get(DEVICE)
        assert tenants(session) == [TENANT]


@pytest.mark.parametrize("tenant", ["", "nul\0", "\ud800"])
def test_what_cannot_be_a_tenant_is_refused_before_anything_is_sent(app: Engine, tenant: str) -> None:
    with Session(app) as session:
        with pytest.raises(ValueError, match="tenant_id must be text"):
            bind_tenant(session, tenant)
        with pytest.raises(TypeError, match="tenant_id must be a str, got None"):
            bind_tenant(session, None)  # type: ignore[arg-type]
        assert not session.in_transaction()


def test_autocommit_mode_is_refused_for_no_statement_would_find_the_tenant(app: Engine) -> None:
    with Session(app.execution_options(isolation_level="AUTOCOMMIT")) as session:
        with pytest.raises(RuntimeError, match="AUTOCOMMIT mode"):
            bind_tenant(session, TENANT)
        with pytest.raises(RuntimeError, match="AUTOCOMMIT mode"):
            ShadowService(session, TENANT, bind_tenant=True).get(DEVICE)
        assert tenants(session) == []
    with Session(app) as session:
        bind_tenant(session, TENANT)
        assert tenants(session) == [TENANT]


def test_the_session_of_the_current_scope_is_bound(app: Engine) -> None:
    sessions = scoped_session(sessionmaker(app))
    bind_tenant(sessions, TENANT)

    assert tenants(sessions()) == [TENANT]
    sessions.remove()
