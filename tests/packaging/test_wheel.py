"""The wheel: what is in it, and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING

import pytest

from iot_models._migrations import runner
from tests.databases.alembic_runs import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from iot_models.testing import PostgresServer

pytestmark = pytest.mark.repeats


def test_the_wheel_holds_the_package_with_the_migrations_inside_it_the_pytest_plugin_and_nothing_else(
    wheel: Path,
) -> None:
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}

    package = {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "iot_models").rglob("*.py")}
    migrations = {
        f"iot_models/{path.relative_to(CHECKOUT)}"
        for path in (CHECKOUT / "alembic").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert any(name.startswith("iot_models/alembic/versions/075_") for name in migrations)
    assert len([name for name in migrations if "/versions/" in name]) == len(runner.revisions())
    assert files == package | migrations | {"iot_models/py.typed", "pytest_iot_models.py"}


def test_the_wheel_asks_for_three_libraries_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()

    required = [line.split(": ")[1] for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert [requirement.split(">=")[0] for requirement in required] == ["alembic", "psycopg", "sqlalchemy"]


def test_the_readme_of_the_package_has_no_link_that_leads_nowhere(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        shown = archive.read(name).decode().partition("\n\n")[2]

    assert [link for link in re.findall(r"\]\(([^)]*)\)", shown) if not link.startswith(("http", "#"))] == []
    assert "`docs/your-application.md` (in the source distribution)" in shown


def test_an_installed_wheel_migrates_without_a_checkout_and_writes_to_no_folder(
    installed: Path, tmp_path: Path, new_database: Callable[..., str]
) -> None:
    # Not to be written to; since root may all the same, what is there is compared too.
    folders = (installed, tmp_path)
    for path in (*folders, *installed.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = [sorted(folder.rglob("*")) for folder in folders]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        # PYTHONPATH comes before the checkout that an editable installation may point at.
        environment = {"PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1", "DATABASE_URL": url}
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")} | environment,
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )

    url = new_database()
    where = run("-c", "from iot_models._migrations import history; print(history.FOLDER)")
    upgraded = run("-m", "iot_models.migrate", "upgrade", "head")
    checked = run("-m", "iot_models.migrate", "check")

    assert where.stdout == f"{installed / 'iot_models' / 'alembic'}\n"
    assert upgraded.returncode == 0, upgraded.stderr
    head = runner.revisions()[-1]
    assert f" -> {head}, " in upgraded.stderr
    assert (checked.returncode, checked.stderr) == (0, "")
    assert f"stands at head ({head}) and equals the models" in checked.stdout
    assert [sorted(folder.rglob("*")) for folder in folders] == before


def test_a_new_team_installs_the_wheel_and_the_tests_of_the_documentation_pass_without_a_word_of_set_up(
    installed: Path, tmp_path: Path, server: PostgresServer
) -> None:
    (example, *_) = re.findall(r"```python\n(.*?)```", (CHECKOUT / "docs/testing.md").read_text(), re.DOTALL)
    came_from = (
        "\n\ndef test_wheel(): import iot_models, pytest_iot_models as p; print(p.__file__, iot_models.__file__)\n"
    )
    (tmp_path / "test_shadows.py").write_text(example + came_from)

    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-rP", "-p", "no:cacheprovider", "-W", "error"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
        | {"PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1", "IOT_MODELS_TEST_DATABASE_URL": server.url},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"^shadow_server: PostgreSQL [\d.]+, from IOT_MODELS_TEST_DATABASE_URL$", run.stdout, re.MULTILINE)
    assert f"{installed / 'pytest_iot_models.py'} {installed / 'iot_models' / '__init__.py'}\n" in run.stdout
    assert "4 passed" in run.stdout
