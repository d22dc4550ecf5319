"""The command `alembic`: where its database URL comes from, and its errors if the URL is wrong."""

from __future__ import annotations

import pytest
from sqlalchemy import make_url

from tests.databases.alembic_runs import run_alembic
from tests.migrations.commands import alembic
from tests.migrations.revisions import HEAD, TO_HEAD

pytestmark = pytest.mark.repeats

NOWHERE = "postgresql://iot:hunter2@127.0.0.1:1/nowhere"


@pytest.fixture
def url(empty: str) -> str:
    """As most platforms write it: without the name of a driver."""
    return make_url(empty).set(drivername="postgres").render_as_string(hide_password=False)


def test_the_x_argument_comes_before_the_environment(url: str) -> None:
    run = alembic("-x", f"url={url}", "upgrade", "head", IOT_MODELS_DATABASE_URL=NOWHERE)
    assert run.code == 0, run.err
    assert TO_HEAD in run.err


def test_our_variable_comes_before_the_general_one(url: str) -> None:
    run = alembic("upgrade", "head", IOT_MODELS_DATABASE_URL=url, DATABASE_URL=NOWHERE)
    assert run.code == 0, run.err


def test_the_general_variable_is_enough(url: str) -> None:
    """Unlike the other tests in a process of its own, to assert that the command starts."""
    run = run_alembic("upgrade", "head", DATABASE_URL=url)
    assert run.returncode == 0, run.stderr

    current = alembic("current", DATABASE_URL=url)
    assert current.out.strip() == f"{HEAD} (head)"


def test_without_a_url_the_error_lists_the_ways_to_give_one() -> None:
    run = run_alembic("upgrade", "head")
    assert run.returncode != 0
    assert "set IOT_MODELS_DATABASE_URL (or DATABASE_URL)" in run.stdout + run.stderr
    assert "-x url=" in run.stdout + run.stderr
    assert "Traceback" not in run.stderr


def test_an_unreachable_server_is_an_error_that_hides_the_password() -> None:
    run = alembic("upgrade", "head", DATABASE_URL=NOWHERE)
    assert run.code != 0
    assert "cannot reach database nowhere at 127.0.0.1:1" in run.out + run.err
    assert "hunter2" not in run.out + run.err


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg_async"])
def test_an_async_driver_is_an_error_that_names_it_and_what_to_write_instead(url: str, driver: str) -> None:
    asynchronous = make_url(url).set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)

    run = alembic("upgrade", "head", DATABASE_URL=asynchronous)

    said = run.out + run.err
    assert run.code != 0
    assert f"postgresql+{driver} is an async driver" in said
    assert "postgresql+psycopg://" in said


def test_a_percent_sign_in_the_url_is_no_interpolation(url: str) -> None:
    named = make_url(url).update_query_dict({"application_name": "50%"}).render_as_string(hide_password=False)
    assert "50%25" in named

    run = alembic("current", DATABASE_URL=named)

    assert run.code == 0, run.err


def test_sql_is_printed_without_any_url() -> None:
    run = alembic("upgrade", "075:076", "--sql")
    assert run.code == 0, run.err
    assert "CREATE INDEX" in run.out


@pytest.mark.parametrize("driver", ["psycopg2cffi", "nosuch", "psycopg+x"])
def test_a_driver_that_cannot_be_loaded_is_an_error_that_names_it_and_what_to_write_instead(driver: str) -> None:
    run = alembic("-x", f"url=postgresql+{driver}://iot:hunter2@127.0.0.1:1/nowhere", "current")

    said = run.out + run.err
    assert run.code != 0
    assert f"postgresql+{driver}: " in said
    assert "write the URL as postgresql+psycopg://" in said
    assert "hunter2" not in said


@pytest.mark.parametrize("url", [f"{NOWHERE}?password=hunter2&sslpassword=hunter2", f"\n{NOWHERE}"], ids=ascii)
def test_a_password_is_hidden_wherever_it_stands_in_the_url(url: str) -> None:
    run = alembic("-x", f"url={url}", "current")

    assert run.code != 0
    assert "hunter2" not in run.out + run.err
