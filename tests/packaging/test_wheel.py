"""The wheel: what is in it, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING

import pytest
from alembic_runs import CHECKOUT

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(CHECKOUT)],
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_with_the_migrations_inside_it_and_nothing_else(wheel: Path) -> None:
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}

    package = {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "iot_models").glob("*.py")}
    migrations = {
        f"iot_models/{path.relative_to(CHECKOUT)}"
        for path in (CHECKOUT / "alembic").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "iot_models/alembic/versions/076_device_shadow.py" in migrations
    assert files == package | migrations | {"iot_models/py.typed"}


def test_the_wheel_asks_for_three_libraries_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()

    required = [line.split(": ")[1] for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert [requirement.split(">=")[0] for requirement in required] == ["alembic", "psycopg", "sqlalchemy"]
