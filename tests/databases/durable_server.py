"""A PostgreSQL of one's own that keeps what it promised: to be shut down at once, killed, and started again.

Its commits are durable (`fsync`, `full_page_writes` and `synchronous_commit` are on) and its data folder outlives each
run of the server, which is what the throwaway server of the other tests leaves out. Nothing of it outlives the `with`
block: a guard process, this very file run as a script, cleans up where this process could not.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_PLACE: Final = "run"  # the server's own folder, as the throwaway server's; beside it is the log
_SECONDS: Final = 60.0  # for initdb, for crash recovery, for all processes to end
_SETTINGS: Final = {
    "fsync": "on",
    "full_page_writes": "on",
    "listen_addresses": "",
    "max_connections": "100",
    "port": "5432",
    "synchronous_commit": "on",
}
_SIGNALS: Final = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}  # as pg_ctl sends them


class DurableServer:
    """A server whose data folder stays while it is stopped, killed and started; made by `durable_postgres`.

    Attributes:
        url: SQLAlchemy URL of the database `postgres`, as the superuser `postgres`; the same after each start.
        bin: Folder with `psql`, `pg_dump`, `pg_ctl`.
    """

    def __init__(self, folder: Path, binaries: Path, account: Mapping[str, Any], settings: Mapping[str, str]) -> None:
        self._folder = folder
        self._place = folder / _PLACE
        self.url = f"postgresql+psycopg://postgres@/postgres?host={self._place}&port={settings['port']}"
        self.bin = binaries
        self._account = account
        self._settings = {**settings, "unix_socket_directories": str(self._place)}
        self._postmaster: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process id of the postmaster; None while the server is down."""
        return None if self._postmaster is None or self._postmaster.poll() is not None else self._postmaster.pid

    def start(self) -> None:
        """Start the server, let it recover, and return once it accepts connections; nothing if it runs already.

        Raises:
            RuntimeError: If it ends instead or is not ready in time; with the end of its log.
        """
        if self.pid is not None:
            return
        command = [str(self.bin / "postgres"), "-D", str(self._place / "data")]
        for name, value in self._settings.items():
            command += ["-c", f"{name}={value}"]
        with (self._folder / "log").open("ab") as log:
            _await_end(log)  # all processes of a server share its lock on its log: it is free when the last has ended
            # A session of its own: Ctrl-C reaches this process only, which then decides.
            self._postmaster = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, **self._account
            )
        self._await_ready(self._postmaster)

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Do what `pg_ctl stop -m MODE` does; return when every process of the server has ended.

        `immediate` is a crash as far as the data is concerned: the next start recovers. `smart` waits for the clients.
        """
        self._end(_SIGNALS[mode])

    def kill(self) -> None:
        """`kill -9` of the postmaster; return when its orphans have ended too, as they do by themselves."""
        self._end(signal.SIGKILL)

    def log(self) -> str:
        """All that the server has written to its log."""
        return (self._folder / "log").read_text(errors="replace")

    def _end(self, number: signal.Signals) -> None:
        if self._postmaster is None:
            return
        self._postmaster.send_signal(number)
        self._postmaster.wait(_SECONDS)
        with (self._folder / "log").open("ab") as log:
            _await_end(log)

    def _await_ready(self, postmaster: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _SECONDS
        while not self._is_ready(postmaster.pid):
            if postmaster.poll() is not None:
                raise RuntimeError(f"the server ended with {postmaster.returncode}:\n{self.log()[-2000:]}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server was not ready after {_SECONDS:g} seconds:\n{self.log()[-2000:]}")
            time.sleep(0.01)

    def _is_ready(self, pid: int) -> bool:
        """By its pid file, which a server that was killed leaves behind: so whose file it is counts too."""
        try:
            lines = (self._place / "data" / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return lines[:1] == [str(pid)] and lines[7:8] == ["ready   "]


@contextlib.contextmanager
def durable_postgres(*, settings: Mapping[str, str] | None = None) -> Iterator[DurableServer]:
    """Run a durable PostgreSQL for the `with` block; afterwards no process and no file of it is left.

    It listens on a Unix socket only. As root the server runs as `nobody`.

    Args:
        settings: Server settings, laid over the durable ones.

    Example:
        >>> with durable_postgres() as server:
        ...     engine = sqlalchemy.create_engine(server.url)
        ...     server.stop("immediate")
        ...     server.start()
    """
    # Not above: the guard is this file run with -I, where nothing but the standard library can be imported.
    from iot_models.testing.throwaway import (  # noqa: PLC0415
        _BUILTIN_LOCALE,
        _INITDB,
        _copy,
        _place_in,
        _temporary_folder,
        _version,
        wheel_binaries,
    )

    folder = _temporary_folder() / f"iot_models_durable_{secrets.token_hex(6)}"
    with _guarded(folder):
        place, account = _place_in(folder)
        options = {"env": {"LC_ALL": "C", "TZ": "UTC"}, "cwd": place, **account}
        binaries = wheel_binaries().resolve()
        try:
            _version(binaries, options)
        except PermissionError:
            binaries = _copy(binaries, folder)
        initdb = [str(binaries / "initdb"), f"--pgdata={place / 'data'}", *_INITDB, *_BUILTIN_LOCALE]
        subprocess.run(initdb, check=True, timeout=_SECONDS, capture_output=True, **options)
        server = DurableServer(folder, binaries, options, {**_SETTINGS, **(settings or {})})
        server.start()
        yield server


@contextlib.contextmanager
def _guarded(folder: Path) -> Iterator[None]:
    """Make the folder; end the server in it and remove it after the block, or when this process dies in any way."""
    folder.mkdir(mode=0o700)
    guard = subprocess.Popen(
        [sys.executable, "-I", __file__, str(folder)], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield
    finally:
        guard.communicate()  # its standard input ends, as it does when this process dies
        if guard.returncode != 0:  # the guard itself was killed
            _clean_up(folder)


def _clean_up(folder: Path) -> None:
    """End the server in the folder, wait until its last process has gone, remove the folder."""
    with (folder / "log").open("ab") as log:
        while not _has_ended(log):
            with contextlib.suppress(FileNotFoundError, IndexError, ProcessLookupError):
                pid = int((folder / _PLACE / "data" / "postmaster.pid").read_text().splitlines()[0])
                os.kill(pid, signal.SIGQUIT)  # immediate shutdown
            time.sleep(0.02)
    shutil.rmtree(folder, ignore_errors=True)


def _await_end(log: IO[bytes]) -> None:
    deadline = time.monotonic() + _SECONDS
    while not _has_ended(log):
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes of the server are still running after {_SECONDS:g} seconds")
        time.sleep(0.01)


def _has_ended(log: IO[bytes]) -> bool:
    """Whether every process that inherited the lock on the server's log has gone; the lock is then `log`'s."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


if __name__ == "__main__":
    # Whoever ends all processes of a job ends the parent too: the guard has to outlive it to clean up.
    for ignored in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    sys.stdin.buffer.read()
    _clean_up(Path(sys.argv[1]))
