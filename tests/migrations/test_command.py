"""`alembic ...` as it is typed: where its database URL comes from, and what it says when that is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from alembic_runs import run_alembic
from sqlalchemy import make_url

if TYPE_CHECKING:
    from collections.abc import Callable

NOWHERE = "postgresql://iot:hunter2@127.0.0.1:1/nowhere"


@pytest.fixture
def url(new_database: Callable[[], str]) -> str:
    """As most platforms hand it out: without a driver's name."""
    return make_url(new_database()).set(drivername="postgres").render_as_string(hide_password=False)


def test_the_x_argument_comes_before_the_environment(url: str) -> None:
    run = run_alembic("-x", f"url={url}", "upgrade", "head", IOT_MODELS_DATABASE_URL=NOWHERE)
    assert run.returncode == 0, run.stderr
    assert "075 -> 076" in run.stderr


def test_our_variable_comes_before_the_general_one(url: str) -> None:
    run = run_alembic("upgrade", "head", IOT_MODELS_DATABASE_URL=url, DATABASE_URL=NOWHERE)
    assert run.returncode == 0, run.stderr


def test_the_general_variable_is_enough(url: str) -> None:
    run = run_alembic("upgrade", "head", DATABASE_URL=url)
    assert run.returncode == 0, run.stderr

    current = run_alembic("current", DATABASE_URL=url)
    assert current.stdout.strip() == "076 (head)"


def test_no_url_is_an_error_that_lists_the_ways_to_give_one() -> None:
    run = run_alembic("upgrade", "head")
    assert run.returncode != 0
    assert "set IOT_MODELS_DATABASE_URL (or DATABASE_URL)" in run.stdout + run.stderr
    assert "-x url=" in run.stdout + run.stderr
    assert "Traceback" not in run.stderr


def test_a_server_that_is_not_there_is_an_error_that_says_so_and_hides_the_password() -> None:
    run = run_alembic("upgrade", "head", DATABASE_URL=NOWHERE)
    assert run.returncode != 0
    assert "cannot reach postgresql+psycopg://iot:***@127.0.0.1:1/nowhere" in run.stdout + run.stderr
    assert "hunter2" not in run.stdout + run.stderr
    assert "Traceback" not in run.stderr


def test_a_percent_sign_in_the_url_is_no_interpolation(url: str) -> None:
    run = run_alembic("current", DATABASE_URL=f"{url}&application_name=50%25")
    assert run.returncode == 0, run.stderr


def test_sql_is_printed_without_any_url() -> None:
    run = run_alembic("upgrade", "075:076", "--sql")
    assert run.returncode == 0, run.stderr
    assert "CREATE INDEX" in run.stdout
