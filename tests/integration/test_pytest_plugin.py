"""The pytest plugin in the hands of a team: a project of theirs, its conftest.py, its tests."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import asyncpg  # type: ignore[import-untyped]
import psycopg
import pytest
from sqlalchemy import NullPool, create_engine, make_url, text

from iot_models import migrate
from iot_models.testing import sample_fleet

if TYPE_CHECKING:
    from pathlib import Path

    from iot_models.testing import PostgresServer

# pytester forgets the modules that a run inside this process imported first: Alembic would be told of our operations
# twice, and the errors of a driver that is imported twice are of two classes.
LOADED = (migrate, sample_fleet, asyncpg, psycopg)


class Team:
    """Writes tests and runs them on the server of this run, as a role that may make databases and nothing else."""

    def __init__(self, pytester: pytest.Pytester, server: PostgresServer, role: str) -> None:
        self._pytester = pytester
        self._server = server
        self._role = role

    @property
    def url(self) -> str:
        role = make_url(self._server.url).set(username=self._role, password=self._role)
        return role.render_as_string(hide_password=False)

    def write(self, **files: str) -> None:
        self._pytester.makepyfile(**files)

    def run(self, *options: str) -> pytest.RunResult:
        return self._pytester.runpytest_inprocess("-p", "pytest_iot_models", "-p", "no:cacheprovider", *options)

    def run_in_a_process(self, *options: str) -> pytest.RunResult:
        return self._pytester.runpytest_subprocess("-p", "pytest_iot_models", "-p", "no:cacheprovider", *options)

    def databases(self) -> set[str]:
        """Those that the team's runs have made and not dropped; the server has others, of tests beside this one."""
        with create_engine(self._server.url, poolclass=NullPool).connect() as connection:
            owned = text("SELECT datname FROM pg_database WHERE datdba = CAST(:role AS regrole)")
            return set(connection.scalars(owned, {"role": self._role}))


@pytest.fixture
def team(pytester: pytest.Pytester, server: PostgresServer, server_role: str, monkeypatch: pytest.MonkeyPatch) -> Team:
    with create_engine(server.url, poolclass=NullPool).begin() as connection:
        connection.execute(text(f"ALTER ROLE {server_role} CREATEDB"))
    team = Team(pytester, server, server_role)
    monkeypatch.setenv("IOT_MODELS_TEST_DATABASE_URL", team.url)
    return team


def test_a_test_with_a_session_and_a_fleet_takes_three_lines_and_the_run_names_its_server(team: Team) -> None:
    team.write(
        test_of_the_team="""
        from iot_models import ShadowService

        def test_what_is_pending(shadow_session, shadow_fleet):
            shadows = ShadowService(shadow_session, shadow_fleet.tenant_id)
            assert [shadow.device_id for shadow in shadows.pending()] == [shadow_fleet.pending, shadow_fleet.refused]
        """
    )
    result = team.run()

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines("shadow_server: PostgreSQL *, from IOT_MODELS_TEST_DATABASE_URL")
    assert team.databases() == set()


@pytest.mark.repeats
def test_a_run_that_uses_none_of_the_fixtures_loads_nothing_starts_nothing_and_says_nothing(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOT_MODELS_TEST_DATABASE_URL", "postgresql://nobody@nowhere.invalid/x")
    team.write(
        test_of_the_team="""
        import sys

        def test_modules():
            assert "pytest_iot_models" in sys.modules
            assert not {"iot_models", "sqlalchemy", "alembic", "psycopg", "testcontainers"} & set(sys.modules)
        """
    )

    result = team.run_in_a_process("-W", "error")

    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*shadow_server*")


def test_its_fixtures_have_a_prefix_of_their_own_and_say_what_they_give(team: Team) -> None:
    listed = team.run("--fixtures").stdout.str()
    ours = listed.partition("fixtures defined from pytest_iot_models")[2].partition("fixtures defined from")[0]

    names = re.findall(r"^(\w+)(?: \[session scope\])? -- ", ours, re.MULTILINE)
    assert sorted(names) == [
        f"shadow_{name}" for name in ("database", "engine", "fleet", "server", "session", "template")
    ]
    assert "no docstring available" not in ours


@pytest.mark.repeats
def test_what_a_test_commits_in_the_session_is_undone_after_it(team: Team) -> None:
    team.write(
        test_of_the_team="""
        import pytest
        from iot_models import DeviceState
        from sqlalchemy import func, select

        @pytest.mark.parametrize("run", range(3))
        def test_commits(run, shadow_session):
            assert shadow_session.scalar(select(func.count()).select_from(DeviceState)) == 0
            shadow_session.add(DeviceState(tenant_id="acme", site_id="berlin", device_id="t-1"))
            shadow_session.commit()
            assert shadow_session.scalar(select(func.count()).select_from(DeviceState)) == 1
        """
    )
    team.run().assert_outcomes(passed=3)


@pytest.mark.repeats
def test_the_fleet_outlives_a_rollback_in_the_test(team: Team) -> None:
    team.write(
        test_of_the_team="""
        from iot_models import DeviceState

        def test_rolls_back(shadow_session, shadow_fleet):
            device = shadow_session.get(DeviceState, (shadow_fleet.tenant_id, shadow_fleet.new))
            device.desired_state = {"mode": "eco"}
            shadow_session.flush()
            shadow_session.rollback()
            assert device.desired_state == {}
        """
    )
    team.run().assert_outcomes(passed=1)


@pytest.mark.repeats
def test_a_database_of_a_tests_own_is_at_head_and_empty_and_gone_after_the_test(team: Team) -> None:
    team.write(
        test_of_the_team="""
        import pytest
        from iot_models import Base, DeviceState, migrate
        from sqlalchemy import create_engine, func, select
        from sqlalchemy.orm import Session

        @pytest.mark.parametrize("run", range(2))
        def test_commits(run, shadow_database):
            assert migrate.check(shadow_database) == []
            with Session(create_engine(shadow_database)) as session:  # and nobody disposes of its pool
                assert session.scalar(select(func.count()).select_from(DeviceState)) == 0
                session.add(DeviceState(tenant_id="acme", site_id="berlin", device_id="t-1"))
                session.commit()
        """
    )
    team.run_in_a_process().assert_outcomes(passed=2)

    assert team.databases() == set()


def test_async_code_has_the_same_databases_with_either_driver(team: Team) -> None:
    team.write(
        test_of_the_team="""
        import asyncio

        import pytest
        from iot_models import AsyncShadowService
        from iot_models.testing.sample_fleet import add_sample_fleet
        from sqlalchemy import make_url
        from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

        @pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
        def test_commits(driver, shadow_database):
            async def pending():
                engine = create_async_engine(make_url(shadow_database).set(drivername=f"postgresql+{driver}"))
                async with AsyncSession(engine) as session:
                    fleet = await session.run_sync(add_sample_fleet)
                    await session.commit()
                    count = await AsyncShadowService(session, fleet.tenant_id).count_pending()
                await engine.dispose()
                return count

            assert asyncio.run(pending()) == 2
        """
    )
    team.run().assert_outcomes(passed=2)


@pytest.mark.repeats
def test_a_teams_own_tables_are_in_every_database_though_it_leaves_a_connection_open(team: Team) -> None:
    team.write(
        conftest="""
        import pytest
        from sqlalchemy import create_engine, text

        @pytest.fixture(scope="session")
        def shadow_template(shadow_template):
            global pool
            pool = create_engine(shadow_template)
            with pool.begin() as connection:
                connection.execute(text("CREATE TABLE orders (id integer)"))
            return shadow_template
        """,
        test_of_the_team="""
        from sqlalchemy import create_engine, text

        def test_in_the_session(shadow_session):
            assert shadow_session.scalar(text("SELECT count(*) FROM orders")) == 0

        def test_in_a_database(shadow_database):
            engine = create_engine(shadow_database)
            with engine.connect() as connection:
                assert connection.scalar(text("SELECT count(*) FROM orders")) == 0
            engine.dispose()
        """,
    )
    team.run_in_a_process().assert_outcomes(passed=2)


def test_without_a_server_each_test_that_needs_one_fails_with_the_reason_and_no_traceback(
    team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOT_MODELS_TEST_DATABASE_URL", f"postgresql://someone:hunter2@/iot?host={tmp_path}")
    team.write(
        test_of_the_team="""
        def test_one(shadow_session): pass
        def test_other(shadow_fleet): pass
        def test_without(): pass
        """
    )

    result = team.run("-q", "-rN")  # without a summary, which says all of it once more where CI is set

    result.assert_outcomes(passed=1, errors=2)
    said = result.stdout.str()
    assert said.count("IOT_MODELS_TEST_DATABASE_URL is set, but no PostgreSQL answers there") == 2
    for unwanted in ("Traceback", "During handling", "hunter2", "shadow_server:"):
        assert unwanted not in said, unwanted
    assert len(said.splitlines()) < 15
