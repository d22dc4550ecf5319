"""Roles for which isolation would not hold: refused, with every reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from iot_models import tenancy
from tests.databases.devices import TENANT
from tests.databases.tenants import OFF, rolled_back, run, security, tenants_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Engine


@pytest.fixture
def app(server_role: str) -> str:
    """The application's role."""
    return server_role


@pytest.fixture
def owner(engine: Engine, app: str) -> Iterator[Connection]:
    with rolled_back(engine, app) as connection:
        yield connection


WAYS = {
    "it is a superuser": ["ALTER ROLE {app} SUPERUSER"],
    "it has BYPASSRLS": ["ALTER ROLE {app} BYPASSRLS"],
    "it owns the table": ["ALTER TABLE device_state OWNER TO {app}"],
    "{app}_b owns the table": [
        "CREATE ROLE {app}_b",
        "ALTER TABLE device_state OWNER TO {app}_b",
        "GRANT {app}_b TO {app}",
    ],
    "{app}_b has BYPASSRLS": [  # by way of another role, and without inheriting: SET ROLE would do
        "CREATE ROLE {app}_b BYPASSRLS",
        "CREATE ROLE {app}_a NOINHERIT",
        "GRANT {app}_b TO {app}_a",
        "ALTER ROLE {app} NOINHERIT",
        "GRANT {app}_a TO {app}",
    ],
    "{app}_b is a superuser": ["CREATE ROLE {app}_b SUPERUSER", "GRANT {app}_b TO {app}"],
    "it may use what no policy limits (REVOKE REFERENCES, TRIGGER, TRUNCATE ON device_state FROM {app})": [
        "GRANT ALL ON device_state TO {app}"
    ],
    "{app}_b may use what no policy limits (REVOKE TRUNCATE ON device_state FROM {app}_b)": [
        "CREATE ROLE {app}_b",
        "GRANT TRUNCATE ON device_state TO {app}_b",
        "GRANT {app}_b TO {app}",
    ],
    "everybody may use what no policy limits (REVOKE TRIGGER ON device_state FROM PUBLIC)": [
        "GRANT TRIGGER ON device_state TO PUBLIC"
    ],
    "the policy open shows it rows too": ["CREATE POLICY open ON device_state USING (true)"],
    "the policy mine shows it rows too": ["CREATE POLICY mine ON device_state FOR SELECT TO {app} USING (true)"],
    'the policy "The Group\'s" shows it rows too': [
        "CREATE ROLE {app}_b",
        "GRANT {app}_b TO {app}",
        'CREATE POLICY "The Group\'s" ON device_state TO {app}_b USING (true)',
    ],
    "it has BYPASSRLS; it owns the table; everybody may use what no policy limits": [
        "ALTER ROLE {app} BYPASSRLS",
        "ALTER TABLE device_state OWNER TO {app}",
        "GRANT TRUNCATE ON device_state TO PUBLIC",
    ],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_role_that_a_policy_would_not_stop_is_refused_with_every_reason(
    owner: Connection, app: str, way: str
) -> None:
    for statement in WAYS[way]:
        run(owner, statement.replace("{app}", app))
    before = security(owner)

    with pytest.raises(ValueError) as caught:
        tenancy.enable(owner, app)

    assert str(caught.value).startswith(f"isolation would not hold for role '{app}': {way.replace('{app}', app)}")
    assert "Take that away, or let the application log in as a role of its own" in str(caught.value)
    assert security(owner) == before


def test_once_the_reason_is_gone_the_same_call_goes_through(owner: Connection, app: str) -> None:
    run(owner, f"GRANT ALL ON device_state TO {app}")
    with pytest.raises(ValueError, match="REFERENCES, TRIGGER, TRUNCATE"):
        tenancy.enable(owner, app)

    run(owner, f"REVOKE REFERENCES, TRIGGER, TRUNCATE ON device_state FROM {app}")
    tenancy.enable(owner, app)

    assert tenants_for(owner, app) == {TENANT}


@pytest.mark.parametrize("name", ["nobody at all", "", "public", "current_user", "x" * 64, "'"])
def test_a_role_that_does_not_exist_is_refused(owner: Connection, name: str) -> None:
    if name == "x" * 64:
        run(owner, f"CREATE ROLE {'x' * 63}")  # what PostgreSQL would cut the name down to

    for call in (tenancy.enable, tenancy.disable):
        with pytest.raises(LookupError, match=r"there is no role .* check the name, or CREATE ROLE first"):
            call(owner, name)
        with pytest.raises(TypeError, match="role must be a str, got None"):
            call(owner, None)  # type: ignore[arg-type]
    assert security(owner) == OFF
