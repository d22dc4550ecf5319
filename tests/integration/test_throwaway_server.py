"""A throwaway server runs where it can, says why where it cannot, and leaves nothing behind however its parent ends."""

from __future__ import annotations

import os
import pickle
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import NullPool, create_engine, text

from iot_models.testing import throwaway
from iot_models.testing.throwaway import Server, ThrowawayPostgresError, postgres, wheel_binaries
from tests.databases.in_memory import short_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = os.geteuid() == 0
MODULE = Path(throwaway.__file__)
WAY_OUT = "set IOT_MODELS_TEST_DATABASE_URL to a PostgreSQL server of your own."
SHORT = "/tmp"  # noqa: S108 - where a server goes whose temporary folder has too long a name
SOON = 10

# The module by itself, without its package: it starts fast, and a copy of it runs as any user.
PARENT = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
sys.path.insert(0, sys.argv[1])
from throwaway import postgres
with postgres(binaries=Path(sys.argv[2])) as server:
    print(server.url, flush=True)
    time.sleep(60)
"""


def ask(server: Server, question: str) -> object:
    with create_engine(server.url, poolclass=NullPool).connect() as connection:
        return connection.scalar(text(question))


def folder_of(server: Server) -> Path:
    return Path(server.url.partition("host=")[2].partition("&")[0])


def processes_naming(words: str) -> dict[int, str]:
    """The processes whose command line contains `words`, by process id."""
    found = {}
    if Path("/proc/self/cmdline").exists():
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                found[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            except OSError:  # it ended meanwhile
                continue
    else:
        lines = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,args="], check=True, stdout=subprocess.PIPE, text=True)  # noqa: S607 - wherever it is
        for line in lines.stdout.splitlines():
            pid, _, found_command = line.strip().partition(" ")
            found[int(pid)] = found_command
    return {pid: command for pid, command in found.items() if words in command}


def guard_in(folder: Path) -> int:
    (guard,) = (pid for pid, command in processes_naming(str(folder)).items() if MODULE.name in command)
    return guard


def ended_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""], start_new_session=True) as process:
        return process.pid


def eventually(happens: Callable[[], object]) -> bool:
    deadline = time.monotonic() + SOON
    while not happens():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def use_as_temporary_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)  # where Python keeps the answer


@pytest.fixture
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary folder during the test. Soon after the test no file in it and no process of it may be left."""
    tmp_path_factory.getbasetemp()  # pytest's own folder goes where it always goes
    with tempfile.TemporaryDirectory(prefix="t-", dir=short_folder()) as name:
        folder = Path(name).resolve()
        folder.chmod(0o1777)
        use_as_temporary_folder(folder, monkeypatch)
        yield folder
        assert eventually(lambda: not list(folder.iterdir())), list(folder.iterdir())
        assert eventually(lambda: not processes_naming(str(folder))), processes_naming(str(folder))


@contextmanager
def parent(
    *, module: Path = MODULE, binaries: Path | None = None, prefix: tuple[str, ...] = (), **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """A process that runs a throwaway server for a minute; ended after the block."""
    python = options.pop("python", sys.executable)
    command = [*prefix, python, "-c", PARENT, str(module.parent), str(binaries or wheel_binaries())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def fake_postgres(folder: Path, *, initdb: str = "exit 0", server: str = "exit 0") -> Path:
    """A `bin` folder of shell scripts, for what no real PostgreSQL does on request.

    Not executable, so that it is copied, as any tree that lost its executable bits.
    """
    binaries = folder / "package" / "pginstall" / "bin"
    binaries.mkdir(parents=True)
    version = 'if [ "$1" = --version ]; then echo "initdb (PostgreSQL) 16.4 (Fake)"; exit; fi'
    (binaries / "initdb").write_text(f"#!/bin/sh\n{version}\n{initdb}\n")
    (binaries / "postgres").write_text(f"#!/bin/sh\n{server}\n")
    return binaries


@contextmanager
def killing_the_guard(temporary: Path) -> Iterator[None]:
    """The guard is killed as soon as a fake initdb has made the file `started`."""

    def kill() -> None:
        assert eventually(lambda: list(temporary.glob("*/run/started")))
        os.kill(guard_in(temporary), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    yield
    killer.join()


def error_of(**arguments: Any) -> str:
    """What `postgres` says when it fails; every such message names the way out."""
    with pytest.raises(ThrowawayPostgresError) as caught, postgres(**arguments):
        pass
    assert WAY_OUT in str(caught.value)
    return str(caught.value)


# It runs.


@pytest.mark.repeats
@pytest.mark.usefixtures("temporary")
def test_two_servers_at_once_each_with_its_settings() -> None:
    with postgres() as one, postgres(settings={"work_mem": "7MB", "fsync": "on", "port": "6543"}) as two:
        assert folder_of(one) != folder_of(two)
        assert ask(one, "SHOW server_version") == one.version
        assert [ask(one, f"SHOW {name}") for name in ("fsync", "synchronous_commit", "full_page_writes")] == ["off"] * 3
        assert ask(one, "SHOW listen_addresses") == ""
        assert ask(one, "SELECT upper('zürich')") == "ZÜRICH"
        assert [ask(two, f"SHOW {name}") for name in ("work_mem", "fsync", "port")] == ["7MB", "on", "6543"]
        assert folder_of(one).stat().st_mode & 0o777 == 0o700
        assert {"psql", "pg_dump", "pgbench"} <= {tool.name for tool in one.bin.iterdir()}
    assert not folder_of(one).exists()
    assert not processes_naming(str(folder_of(one)))


@pytest.mark.repeats
def test_a_broken_environment_and_a_temporary_folder_with_spaces_do_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "with spaces"
    folder.mkdir()
    use_as_temporary_folder(folder, monkeypatch)
    for name in ("LANG", "LC_ALL", "PGDATA", "PGPORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PGOPTIONS", "-c work_mem=7MB")

    with postgres() as server:
        assert str(folder_of(server).parents[1]) == SHORT
        assert ask(server, "SHOW work_mem") == "7MB"  # libpq's own variables count for clients
    assert not folder_of(server).exists()


@pytest.mark.usefixtures("temporary")
def test_the_tools_see_nothing_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("PGDATA", "/nonexistent")
    message = error_of(binaries=fake_postgres(tmp_path, initdb="env; exit 1"))
    assert "\nLC_ALL=C\n" in message
    assert "LD_LIBRARY_PATH" not in message
    assert "PGDATA" not in message


def test_the_socket_stays_out_of_a_folder_with_a_long_path(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = fake_postgres(tmp_path, initdb="pwd; exit 1")
    assert f"\n{temporary}/iot_models_" in error_of(binaries=fake)

    use_as_temporary_folder(tmp_path / ("n" * 60), monkeypatch)
    Path(os.environ["TMPDIR"]).mkdir()
    assert f"\n{SHORT}/iot_models_" in error_of(binaries=fake)


@pytest.mark.skipif(not ROOT, reason="only root runs the server as another user")
def test_the_socket_stays_out_of_a_folder_that_is_open_to_root_only(temporary: Path, tmp_path: Path) -> None:
    temporary.chmod(0o700)
    assert f"\n{SHORT}/iot_models_" in error_of(binaries=fake_postgres(tmp_path, initdb="pwd; exit 1"))


def test_binaries_that_the_user_of_the_server_cannot_run_are_copied(temporary: Path, tmp_path: Path) -> None:
    package = wheel_binaries().parents[1]
    for source in (package, package.with_name(f"{package.name}.libs")):
        shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("include", "*.a"))
    binaries = tmp_path / package.name / "pginstall" / "bin"
    (binaries / "initdb").chmod(0o600)

    with postgres(binaries=binaries) as server:
        assert server.bin.is_relative_to(temporary)
        assert ask(server, "SELECT 1") == 1
        subprocess.run([server.bin / "psql", "--version"], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.repeats
@pytest.mark.skipif(not ROOT, reason="any other user runs all of these tests as what it is")
def test_an_ordinary_user_runs_it_too(temporary: Path, readable: dict[str, Any]) -> None:
    nobody = pwd.getpwnam("nobody")
    with parent(user=nobody.pw_uid, group=nobody.pw_gid, extra_groups=[], **readable) as process:
        assert str(temporary) in first_line(process)
        (folder,) = temporary.iterdir()
        assert folder.stat().st_uid == nobody.pw_uid


# It ends.


@pytest.mark.repeats
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_a_signal_ends_the_parent(number: signal.Signals, temporary: Path) -> None:
    with parent() as process:
        assert str(temporary) in first_line(process)
        process.send_signal(number)
        assert process.wait(SOON) != 0


@pytest.mark.repeats
def test_nothing_is_left_when_the_parent_is_killed_while_the_server_is_being_made(temporary: Path) -> None:
    with parent() as process:
        assert eventually(lambda: list(temporary.glob("*/run/data/base")))
        process.kill()


@pytest.mark.repeats
def test_nothing_is_left_when_the_parent_is_killed_at_once(temporary: Path) -> None:
    with parent() as process:
        assert eventually(lambda: processes_naming(f"{MODULE.name} {temporary}"))
        process.kill()


@pytest.mark.repeats
def test_a_polite_end_of_the_guard_waits_for_the_parent(temporary: Path) -> None:
    with postgres() as server:
        guard = guard_in(temporary)
        os.kill(guard, signal.SIGTERM)
        assert ask(server, "SELECT 1") == 1
        assert guard_in(temporary) == guard

        # And a killed one leaves its work to the parent.
        os.kill(guard, signal.SIGKILL)
        assert ask(server, "SELECT 1") == 1
    assert not folder_of(server).exists()
    assert not processes_naming(str(temporary))


def test_a_guard_that_is_killed_before_the_server_is_ready_is_an_error_that_leaves_nothing(
    temporary: Path, tmp_path: Path
) -> None:
    fake = fake_postgres(tmp_path, initdb="touch started; exec sleep 60")
    with killing_the_guard(temporary):
        assert "The guard process ended before the server was ready." in error_of(binaries=fake)
    assert not list(temporary.iterdir())


def test_a_guard_whose_parent_has_ended_at_once_makes_nothing(temporary: Path) -> None:
    guard = [sys.executable, "-I", str(MODULE), str(temporary)]
    ended = subprocess.run(guard, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    assert (ended.stdout, ended.stderr) == (b"", b"")
    assert not list(temporary.iterdir())


def test_a_process_that_keeps_the_log_of_a_killed_guard_locked_is_waited_for_only_so_long(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throwaway, "_STOP_SECONDS", 0.2)
    fake = fake_postgres(tmp_path, initdb="trap '' QUIT; touch started; sleep 4 & wait; sleep 4")
    with killing_the_guard(temporary):
        began = time.monotonic()
        assert "The guard process ended" in error_of(binaries=fake)
        assert time.monotonic() - began < 4
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(
    "trap", ["mkfifo log", "ln -s /dev/zero log", "mkdir log"], ids=["a pipe", "a link", "a folder"]
)
def test_what_is_no_log_does_not_hold_up_the_cleaning(trap: str, temporary: Path) -> None:
    folder = temporary / "iot_models_made"
    folder.mkdir()
    subprocess.run(["/bin/sh", "-c", trap], check=True, cwd=folder)
    throwaway._clean_up_after(ended_process(), folder)  # noqa: SLF001 - what a killed guard leaves
    assert not folder.exists()


def test_a_folder_that_somebody_else_made_is_not_cleaned(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = temporary / "iot_models_made"
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 54_321)
        throwaway._clean_up_after(ended_process(), folder)  # noqa: SLF001 - what a killed guard leaves
    folder.rmdir()


def test_no_command_line_names_the_folder_before_it_is_made(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[str] = []

    class Popen(subprocess.Popen[bytes]):
        def __init__(self, command: list[str], **options: Any) -> None:
            commands.append(" ".join(command))
            super().__init__(command, **options)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    assert f"\n{temporary}/iot_models_" in error_of(binaries=fake_postgres(tmp_path, initdb="pwd; exit 1"))
    (guard,) = commands
    assert "iot_models_" not in guard.partition(MODULE.name)[2]


# It says why it cannot run.


def test_a_missing_wheel_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    assert "pip install" in error_of()


def test_windows_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert "Windows" in error_of()


@pytest.mark.usefixtures("temporary")
def test_a_setting_that_the_server_refuses_is_quoted_in_the_server_s_words() -> None:
    message = error_of(settings={"work_mem": "plenty"})
    assert "the server ended with exit code 1" in message
    assert 'invalid value for parameter "work_mem": "plenty"' in message


@pytest.mark.usefixtures("temporary")
def test_the_end_of_what_initdb_says_is_in_the_error(tmp_path: Path) -> None:
    fake = fake_postgres(
        tmp_path, initdb='for line in $(seq 1 30); do echo "line $line"; done; echo no space >&2; exit 7'
    )
    message = error_of(binaries=fake)
    assert "returned non-zero exit status 7" in message
    assert "\nline 30\nno space\n" in message
    assert "line 3\n" not in message


@pytest.mark.usefixtures("temporary")
def test_before_17_initdb_is_not_asked_for_a_builtin_locale(tmp_path: Path) -> None:
    message = error_of(binaries=fake_postgres(tmp_path, initdb='echo "$@"; exit 1'))
    assert "--no-locale" in message
    assert "builtin" not in message


@pytest.mark.usefixtures("temporary")
@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({"initdb": "exec sleep 60"}, "timed out after"),
        ({"server": "exec sleep 60"}, "the server was not ready after 0.3 seconds"),
    ],
)
def test_a_start_that_takes_too_long_is_given_up(
    tools: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throwaway, "_START_SECONDS", 0.3)
    assert message in error_of(binaries=fake_postgres(tmp_path, **tools))


@pytest.mark.usefixtures("temporary")
def test_a_folder_without_postgresql_is_named(tmp_path: Path) -> None:
    assert f"There is no initdb in {tmp_path}." in error_of(binaries=tmp_path)


@pytest.mark.repeats
@pytest.mark.skipif(not ROOT, reason="only root can become a user that has no name")
@pytest.mark.usefixtures("temporary")
def test_a_user_without_an_entry_in_the_password_file_is_told_so(readable: dict[str, Any]) -> None:
    with parent(user=54_321, group=54_321, extra_groups=[], **readable) as process:
        assert "the user needs an entry in /etc/passwd" in process.communicate(timeout=SOON)[1]


@pytest.mark.skipif(not ROOT or not shutil.which("setpriv"), reason="only root can give up CAP_SETUID, with setpriv")
@pytest.mark.usefixtures("temporary")
def test_root_without_the_right_to_become_another_user_is_told_so() -> None:
    with parent(prefix=("setpriv", "--bounding-set=-setuid", "--inh-caps=-setuid")) as process:
        assert "root must be able to become the user nobody" in process.communicate(timeout=SOON)[1]


def test_an_unknown_user_is_told_apart_from_a_known_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 54_321)  # for those who run these tests without being root
    with pytest.raises(RuntimeError, match=r"needs an entry in /etc/passwd .*54321"):
        throwaway._account(tmp_path)  # noqa: SLF001 - the guard calls it in another process


def test_the_error_survives_pickling() -> None:
    error = ThrowawayPostgresError("It is Monday.")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(error).count(WAY_OUT) == 1


@pytest.fixture
def readable() -> Iterator[dict[str, Any]]:
    """Arguments of `parent` that any user can read: a Python, a copy of the module, a copy of the binaries."""
    with tempfile.TemporaryDirectory(prefix="t-", dir=SHORT) as name:
        folder = Path(name)
        package = wheel_binaries().parents[1]
        module = Path(shutil.copy(MODULE, folder))
        for source in (package, package.with_name(f"{package.name}.libs")):
            shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("include", "*.a"))
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode | 0o055)
        yield {
            "module": module,
            "binaries": folder / package.name / "pginstall" / "bin",
            "python": python_for_anyone(),
            "cwd": folder,
        }


def python_for_anyone() -> str:
    """This Python, or the system's where ours is in a home that is closed to others."""
    check = "import sys; sys.exit(sys.version_info < (3, 11))"
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            subprocess.run([python, "-c", check], check=True, user="nobody", cwd="/")
        except (OSError, subprocess.CalledProcessError):
            continue
        return python
    pytest.skip("no Python 3.11 that a user other than root can run")
