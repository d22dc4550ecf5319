"""The models in another schema, by SQLAlchemy's means: `schema_translate_map`, or the search path."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Engine, NullPool, make_url, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError

from iot_models import DeviceState, Report, ReportStatus, ShadowService, migrate, tenancy
from iot_models.engine import create_engine
from iot_models.models import Base
from iot_models.testing import add_sample_fleet, database
from tests.migrations.raw_sql import as_role, run_sql

if TYPE_CHECKING:
    from collections.abc import Callable

    from iot_models.testing import PostgresServer

OPTIONS: dict[str, dict[str, Any]] = {
    "schema_translate_map": {"execution_options": {"schema_translate_map": {None: 'I "ot:'}}},
    "the search path": {"connect_args": {"options": '-c search_path="I\\ \\"\\"ot:"'}},
}


@pytest.fixture(params=OPTIONS)
def elsewhere(new_database: Callable[..., str], request: pytest.FixtureRequest) -> Engine:
    """A migrated schema of another name; in `public`, where nobody may look, is another table of the same name."""
    url = new_database()
    run_sql(url, 'CREATE SCHEMA "I ""ot:"; CREATE TABLE public.device_state (a int)')
    engine = create_engine(url, poolclass=NullPool, **OPTIONS[request.param])
    migrate.upgrade(engine)
    assert migrate.check(engine) == []
    return engine


@pytest.mark.repeats
def test_the_service_the_guard_and_the_hybrids_work_there(elsewhere: Engine) -> None:
    with Session(elsewhere) as session:
        fleet = add_sample_fleet(session)
        session.commit()
        shadows = ShadowService(session, fleet.tenant_id)
        assert [shadow.device_id for shadow in shadows.iter_pending(batch_size=1)] == [
            fleet.pending,
            fleet.refused,
        ]
        assert [shadow.device_id for shadow in shadows.drifted()] == [fleet.drifted]
        assert shadows.patch_desired_many([fleet.synced, fleet.stale], {"a": 1})[fleet.synced].desired_version == 4
        assert [outcome.status for outcome in shadows.replace_reported_many([Report(fleet.synced, {}, 4)])] == [
            ReportStatus.ACCEPTED
        ]
        wrong = select(DeviceState.device_id).where(DeviceState.is_drifted, DeviceState.tenant_id == fleet.tenant_id)
        assert {*session.scalars(wrong)} == {fleet.synced, fleet.drifted}
        session.commit()

        device = session.get_one(DeviceState, (fleet.tenant_id, fleet.new))
        device.desired_state["x"] = 1
        with Session(elsewhere) as other:
            ShadowService(other, fleet.tenant_id).patch_desired(fleet.new, {"y": 1})
            other.commit()
        with pytest.raises(StaleDataError):
            session.commit()
        session.rollback()

        assert shadows.restore_desired(fleet.new, 0).desired_version == 2
        shadows.remove(fleet.new)
        session.delete(session.get_one(DeviceState, (fleet.tenant_id, fleet.stale)))
        session.flush()
        assert [v.version for v in shadows.history(fleet.new)] == [3, 2, 1, 0]
        assert shadows.register_many({fleet.new: "s", fleet.stale: "s"})[fleet.new].desired_version == 3
        assert shadows.prune_history(older_than=timedelta(days=1)) == 0
        session.commit()


@pytest.mark.repeats
def test_create_all_makes_the_same_there(elsewhere: Engine) -> None:
    migrate.downgrade(elsewhere, "base")
    Base.metadata.create_all(elsewhere)
    migrate.upgrade(elsewhere)
    assert migrate.check(elsewhere) == []


@pytest.mark.repeats
def test_tenants_are_kept_apart_there(elsewhere: Engine, server_role: str) -> None:
    url = elsewhere.url.render_as_string(hide_password=False)
    run_sql(url, f'GRANT USAGE ON SCHEMA "I ""ot:" TO {server_role}; '
            f'GRANT SELECT, INSERT, UPDATE, DELETE ON "I ""ot:".device_state TO {server_role}')  # fmt: skip
    with Session(elsewhere) as session:
        fleet = add_sample_fleet(session)
        session.commit()
    with elsewhere.begin() as connection:
        assert tenancy.check(connection, server_role) != []
        tenancy.enable(connection, server_role)
        assert tenancy.check(connection, server_role) == []

    app = create_engine(as_role(url, server_role), poolclass=NullPool, **_options(elsewhere))
    with Session(app) as session, session.begin():
        assert session.scalars(select(DeviceState)).all() == []
    with Session(app) as session, session.begin():
        tenancy.bind_tenant(session, fleet.tenant_id)
        assert {device.tenant_id for device in session.scalars(select(DeviceState))} == {fleet.tenant_id}
        with pytest.raises(Exception, match="row-level security"), session.begin_nested():
            session.add(DeviceState(tenant_id=fleet.other_tenant_id, site_id="s", device_id="x"))
    with elsewhere.begin() as connection:
        tenancy.disable(connection, server_role)
        assert connection.scalar(text("SELECT count(*) FROM pg_policy")) == 0
    run_sql(url, f"DROP OWNED BY {server_role}")


def _options(engine: Engine) -> dict[str, Any]:
    translates = engine.get_execution_options().get("schema_translate_map")
    return OPTIONS["schema_translate_map" if translates else "the search path"]


def test_a_team_s_not_null_columns_are_filled_in_the_sample_fleet(new_database: Callable[..., str]) -> None:
    url = new_database()
    migrate.upgrade(url)
    run_sql(url, "ALTER TABLE device_state ADD firmware text NOT NULL, ADD line int NOT NULL")
    with Session(create_engine(url, poolclass=NullPool)) as session:
        with pytest.raises(IntegrityError), session.begin_nested():
            add_sample_fleet(session)
        fleet = add_sample_fleet(session, {"firmware": "4.2", "line": 7})
        rows = session.execute(text("SELECT DISTINCT firmware, line, count(*) FROM device_state GROUP BY 1, 2")).all()
        assert rows == [("4.2", 7, 12)]
        assert ShadowService(session, fleet.tenant_id).count_pending() == 2
        with pytest.raises(ValueError, match=r"desired_state.* of the sample fleet"):
            add_sample_fleet(session, {"desired_state": {}})


def test_the_databases_of_tests_are_copies_with_the_search_path_of_their_template(server: PostgresServer) -> None:
    with database(server) as template:
        name = make_url(template).database
        run_sql(template, 'CREATE SCHEMA "a b"', f'ALTER DATABASE {name} SET search_path = "a b", public')
        run_sql(template, f"ALTER DATABASE {name} SET application_name = 'it''s, \"a\" name'")
        migrate.upgrade(template)
        with database(server, template) as url, Session(create_engine(url, poolclass=NullPool)) as session:
            fleet = add_sample_fleet(session)
            assert ShadowService(session, fleet.tenant_id).count_pending() == 2
            assert session.scalar(text('SELECT count(*) FROM "a b".device_state')) == 12
            row = run_sql(url, "SELECT current_setting('search_path'), current_setting('application_name')")
            assert row == [('"a b", public', 'it\'s, "a" name')]
