"""Isolation switched on and off for a role: what it changes, and for whom."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError, ProgrammingError

from iot_models import tenancy
from tests.databases.devices import TENANT
from tests.databases.tenants import OFF, OTHER, PRIVILEGES, run, security, tenants_for

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

# On and off


def test_enabled_the_role_sees_one_tenant_and_the_owner_all(owner: Connection, app: str) -> None:
    assert tenants_for(owner, app) == {TENANT, OTHER}

    tenancy.enable(owner, app)

    assert tenants_for(owner, app) == {TENANT}
    assert tenants_for(owner, app, OTHER) == {OTHER}
    assert tenants_for(owner, app, "nobody") == set()
    assert owner.scalar(text("SELECT count(*) FROM device_state")) == 2


@pytest.mark.parametrize("quoted", ["off", "on"])
def test_enabling_twice_changes_nothing_and_takes_no_lock(owner: Connection, app: str, quoted: str) -> None:
    run(owner, f"SET LOCAL quote_all_identifiers = {quoted}")
    tenancy.enable(owner, app)
    before = security(owner)

    with owner.begin_nested() as savepoint:
        run(owner, "SET TRANSACTION READ ONLY")
        tenancy.enable(owner, app)
        savepoint.rollback()

    assert security(owner) == before


def test_disabled_the_role_sees_all_tenants_again(owner: Connection, app: str) -> None:
    tenancy.enable(owner, app)
    tenancy.disable(owner, app)

    assert tenants_for(owner, app) == {TENANT, OTHER}
    assert security(owner) == OFF


def test_disabling_what_is_not_enabled_changes_nothing(owner: Connection, app: str) -> None:
    tenancy.disable(owner, app)
    assert security(owner) == OFF

    run(owner, f"CREATE ROLE {app}_2")
    tenancy.enable(owner, app)
    before = security(owner)
    tenancy.disable(owner, f"{app}_2")
    assert security(owner) == before


def test_several_roles_are_isolated_each_by_itself(
    owner: Connection, app: str, caplog: pytest.LogCaptureFixture
) -> None:
    run(owner, f"CREATE ROLE {app}_2")
    run(owner, f"GRANT {PRIVILEGES} ON device_state TO {app}_2")
    tenancy.enable(owner, app)
    tenancy.enable(owner, f"{app}_2")
    assert tenants_for(owner, app) == {TENANT}
    assert tenants_for(owner, f"{app}_2", OTHER) == {OTHER}

    caplog.clear()
    tenancy.disable(owner, app)
    assert tenants_for(owner, app) == set()  # row level security is still on
    assert f"hides every row from {app}:" in caplog.text
    assert tenants_for(owner, f"{app}_2", OTHER) == {OTHER}

    tenancy.disable(owner, f"{app}_2")
    assert tenants_for(owner, app) == {TENANT, OTHER}


@pytest.mark.repeats
@pytest.mark.parametrize("name", ["App-1", 'quo"ted', "per%cent", "co:lon", "größe", "x" * 63])
def test_a_role_may_have_any_name(owner: Connection, name: str) -> None:
    quoted = '"' + name.replace('"', '""') + '"'
    run(owner, f"CREATE ROLE {quoted}")
    run(owner, f"GRANT {PRIVILEGES} ON device_state TO {quoted}")

    tenancy.enable(owner, name)
    assert tenants_for(owner, quoted) == {TENANT}
    tenancy.enable(owner, name)
    tenancy.disable(owner, name)
    assert security(owner) == OFF


def test_a_group_is_isolated_with_its_members(owner: Connection, app: str) -> None:
    run(owner, f"CREATE ROLE {app}_group")
    run(owner, f"GRANT {app}_group TO {app}")

    tenancy.enable(owner, f"{app}_group")

    assert tenants_for(owner, app) == {TENANT}
    assert tenancy.check(owner, app) == []


@pytest.mark.repeats
@pytest.mark.parametrize(
    "damage",
    [
        "ALTER POLICY iot_models_tenant ON device_state USING (true)",
        "ALTER POLICY iot_models_tenant ON device_state WITH CHECK (true)",
        "ALTER TABLE device_state DISABLE ROW LEVEL SECURITY",
        "ALTER POLICY iot_models_tenant ON device_state TO pg_monitor",
        "DROP POLICY iot_models_tenant ON device_state",
    ],
)
def test_a_check_finds_what_somebody_changed_and_enabling_again_mends_it(
    owner: Connection, app: str, damage: str
) -> None:
    tenancy.enable(owner, app)
    run(owner, damage)
    (found,) = tenancy.check(owner, app)
    assert found == f"the policy iot_models_tenant does not limit it: call tenancy.enable(connection, '{app}')"

    tenancy.enable(owner, app)

    assert tenants_for(owner, app) == {TENANT}
    (_, _, _, _, _, permissive, command, using, check) = security(owner)[0]
    assert (permissive, command, using) == (True, "*", check)
    assert "current_setting('app.tenant_id'" in str(check)


def test_policies_of_a_teams_own_stay_and_row_level_security_with_them(owner: Connection, app: str) -> None:
    run(owner, "ALTER TABLE device_state ENABLE ROW LEVEL SECURITY")
    run(owner, "CREATE POLICY reports ON device_state TO pg_monitor USING (true)")
    run(owner, "CREATE POLICY here ON device_state AS RESTRICTIVE USING (site_id = 's')")
    before = security(owner)

    tenancy.enable(owner, app)
    assert tenants_for(owner, app) == {TENANT}
    tenancy.disable(owner, app)

    assert security(owner) == before


# Whom it would shut out


def test_a_warning_names_the_roles_that_see_nothing_any_more(
    owner: Connection, app: str, caplog: pytest.LogCaptureFixture
) -> None:
    for role, kind in (
        ("reports", ""),
        ("ingest", ""),
        ("backup", "BYPASSRLS"),
        ("support", ""),
        ("boss", "SUPERUSER"),
    ):
        run(owner, f"CREATE ROLE {app}_{role} {kind}")
        run(owner, f"GRANT SELECT ON device_state TO {app}_{role}")
    run(owner, f"CREATE POLICY support ON device_state TO {app}_support USING (true)")

    with caplog.at_level(logging.WARNING, "iot_models.tenancy"):
        tenancy.enable(owner, app)

    (record,) = caplog.records
    assert f"now hides every row from {app}_ingest, {app}_reports: enable isolation for them too" in record.message
    assert tenants_for(owner, f"{app}_ingest") == set()
    assert tenants_for(owner, f"{app}_support") == {TENANT, OTHER}
    caplog.clear()
    run(owner, "GRANT SELECT ON device_state TO PUBLIC")
    tenancy.enable(owner, f"{app}_ingest")
    assert f"from PUBLIC, {app}_reports:" in caplog.text


def test_a_warning_names_who_may_create_objects_in_the_search_path(
    owner: Connection, app: str, caplog: pytest.LogCaptureFixture
) -> None:
    run(owner, "GRANT CREATE ON SCHEMA public TO PUBLIC")
    run(owner, f"GRANT CREATE ON SCHEMA public TO {app}")

    tenancy.enable(owner, app)

    for who, whom in (("everybody", "PUBLIC"), (f"role {app}", app)):
        assert (
            f"{who} may create functions and operators in schema public, where statements of others find them "
            f"(REVOKE CREATE ON SCHEMA public FROM {whom})"
        ) in caplog.messages


def test_nobody_is_warned_where_nobody_is_shut_out(
    owner: Connection, app: str, caplog: pytest.LogCaptureFixture
) -> None:
    tenancy.enable(owner, app)
    tenancy.disable(owner, app)

    assert not caplog.records


# Locks and transactions


def test_only_the_owner_may_enable_and_disable(owner: Connection, app: str) -> None:
    run(owner, f"SET LOCAL ROLE {app}")

    with pytest.raises(ProgrammingError, match="must be owner of table device_state"):
        tenancy.enable(owner, app)


def test_a_transaction_that_is_rolled_back_leaves_nothing_behind(own_engine: Engine, app: str) -> None:
    with own_engine.connect() as connection:
        tenancy.enable(connection, app)
        connection.rollback()
        assert security(connection) == OFF


def test_autocommit_mode_is_refused_since_nobody_may_see_half_of_it(engine: Engine, app: str) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for call in (tenancy.enable, tenancy.disable):
            with pytest.raises(RuntimeError, match="AUTOCOMMIT mode"):
                call(connection, app)
        assert security(connection) == OFF


def test_a_lock_that_is_not_had_in_time_is_an_error_that_says_what_to_do(own_engine: Engine, app: str) -> None:
    with own_engine.connect() as reader, own_engine.connect() as connection:
        reader.execute(text("SELECT FROM device_state"))
        run(connection, "SET lock_timeout = '50ms'")
        with pytest.raises(
            OperationalError, match="Other transactions use device_state or its history: nothing was changed"
        ):
            tenancy.enable(connection, app)
        connection.rollback()
        assert connection.scalar(text("SHOW lock_timeout")) == "0"
        assert security(connection) == OFF


def test_no_lock_is_waited_for_longer_than_four_seconds_unless_the_caller_says_so(owner: Connection, app: str) -> None:
    tenancy.enable(owner, app)
    assert owner.scalar(text("SHOW lock_timeout")) == "4s"

    run(owner, "SET LOCAL lock_timeout = '1min'")
    tenancy.disable(owner, app)
    assert owner.scalar(text("SHOW lock_timeout")) == "1min"


def test_autovacuum_is_asked_to_leave_at_once_if_the_role_may_do_so(owner: Connection, app: str) -> None:
    assert owner.scalar(text("SHOW deadlock_timeout")) == "1s"

    tenancy.enable(owner, app)

    assert owner.scalar(text("SHOW deadlock_timeout")) == "20ms"


def test_another_error_while_the_lock_is_taken_is_passed_on_as_it_is(own_engine: Engine, app: str) -> None:
    with own_engine.connect() as reader, own_engine.connect() as connection:
        reader.execute(text("SELECT FROM device_state"))

        @event.listens_for(connection, "before_cursor_execute")
        def _only_the_lock(_c: object, cursor: Any, statement: str, *_rest: object) -> None:
            if statement.startswith("LOCK TABLE"):
                cursor.execute("SET LOCAL statement_timeout = '50ms'")

        with pytest.raises(OperationalError, match="statement timeout") as caught:
            tenancy.enable(connection, app)
        assert "nothing was changed" not in str(caught.value)


def test_two_that_enable_at_once_both_take_effect(own_engine: Engine, app: str) -> None:
    with own_engine.begin() as connection:
        run(connection, f"CREATE ROLE {app}_2")

    def enable(role: str) -> None:
        with own_engine.begin() as connection:
            tenancy.enable(connection, role)

    try:
        with own_engine.connect() as reader, ThreadPoolExecutor(2) as pool:
            reader.execute(text("SELECT FROM device_state"))
            both = [pool.submit(enable, role) for role in (app, f"{app}_2")]
            waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = to_regclass('device_state')")
            deadline = time.monotonic() + 3
            while reader.scalar(waiting) != 2:
                assert time.monotonic() < deadline
            reader.rollback()
            for each in both:
                each.result()
        with own_engine.connect() as connection:
            ((roles,),) = connection.execute(
                text("""SELECT ARRAY(SELECT CAST(r AS regrole)::text FROM unnest(polroles) r ORDER BY 1)
                          FROM pg_policy GROUP BY 1""")
            )
        assert roles == [app, f"{app}_2"]
    finally:
        with own_engine.begin() as connection:
            run(connection, f"DROP OWNED BY {app}_2")
            run(connection, f"DROP ROLE {app}_2")
