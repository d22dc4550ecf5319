"""`examples/fleetapp` as its team would run it: from the wheel, in an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from typing import TYPE_CHECKING

import pytest

from iot_models import migrate
from tests.databases import partitioned
from tests.databases.alembic_runs import CHECKOUT
from tests.migrations.raw_sql import FLEET, RAW_075, SHADOWS, rows_of, run_sql, tables_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from iot_models.testing import PostgresServer

pytestmark = pytest.mark.repeats

TABLES = {
    "alembic_version",
    "alembic_version_iot_models",
    "device_shadow_history",
    "device_state",
    "machine",
    "machine_order",
    "plant",
}


@pytest.fixture(scope="session")
def python(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the wheel; what the wheel depends on is this environment's."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    shutil.copytree(installed, site, dirs_exist_ok=True)
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder / "bin" / "python"


@pytest.fixture
def run(python: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs a command in a copy of the application; returns what it printed."""
    shutil.copytree(CHECKOUT / "examples" / "fleetapp", tmp_path / "app")

    def run(*command: str, **environment: str) -> str:
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("COVERAGE", "PYTEST_"))}
        done = subprocess.run(
            command,
            cwd=tmp_path / "app",
            env=ours | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"} | environment,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run


def nothing(_: str, __: Callable[..., str]) -> None:
    """An empty database."""


def only_ours(url: str, _: Callable[..., str]) -> None:
    run_sql(url, RAW_075, FLEET)
    migrate.upgrade(url)
    run_sql(url, SHADOWS)


def only_theirs(url: str, run: Callable[..., str]) -> None:
    run("python", "-m", "alembic", "upgrade", "001", DATABASE_URL=url)
    run_sql(url, RAW_075, FLEET)  # a table of devices that raw SQL made


# Each `python -m ...` of a script, one after another in this process: importing what they need takes most of their time.
IN_ONE_PROCESS = """
import pathlib, runpy, sys
for line in pathlib.Path("ci.sh").read_text().splitlines():
    if line.startswith("python -m "):
        _, _, module, *sys.argv[1:] = line.split()
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code:
                raise
"""


@partitioned.needs_one_piece("autogenerate does not know partitions")
@pytest.mark.parametrize("start", [nothing, only_ours, only_theirs])
def test_its_ci_runs_both_histories_up_and_down_and_up_again(
    run: Callable[..., str], new_database: Callable[..., str], start: Callable[[str, Callable[..., str]], None]
) -> None:
    url = new_database()
    start(url, run)
    before = rows_of(url) if start is only_ours else None

    ci = ("sh", "ci.sh") if start is only_ours else ("python", "-c", IN_ONE_PROCESS)
    said = run(*ci, DATABASE_URL=url)

    assert "No new upgrade operations detected" in said
    assert "stands at head" in said
    assert tables_of(url) == TABLES
    assert migrate.check(url) == []
    assert before in (None, rows_of(url))
    if start is only_theirs:
        assert len(rows_of(url)) == 10


def test_its_tests_pass_and_its_types_are_right(run: Callable[..., str], server: PostgresServer) -> None:
    from_the_wheel = run("python", "-c", "import iot_models; print(iot_models.__file__)")
    assert "site-packages" in from_the_wheel
    assert "6 passed" in run("python", "-m", "pytest", "-q", IOT_MODELS_TEST_DATABASE_URL=str(server.url))
    cache = CHECKOUT / ".mypy_cache" / "fleetapp"  # kept for the next run: most of what it looks at are libraries
    assert "Success" in run("python", "-m", "mypy", MYPY_CACHE_DIR=str(cache))
