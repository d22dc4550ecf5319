"""A PgBouncer in front of the server of this run, where one is installed."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import make_url

if TYPE_CHECKING:
    from collections.abc import Iterator

PGBOUNCER: Final = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
WHY_NOT: Final = "PgBouncer is not installed: Debian has it as `pgbouncer`"
_SECONDS: Final = 10


@contextmanager
def pgbouncer(url: str, **settings: str) -> Iterator[str]:
    """Run PgBouncer in transaction mode for the `with` block, in front of the server at `url`.

    It listens on a Unix socket only. For root, it runs as the user `nobody`, as the throwaway server does.

    Args:
        url: A database on the server. PgBouncer logs in as this role, whoever its client is.
        settings: Settings of PgBouncer.

    Yields:
        The URL of the same database through PgBouncer.
    """
    assert PGBOUNCER
    target = make_url(url)
    account = pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as name:
        folder = Path(name)
        values = {
            "auth_type": "any",
            "default_pool_size": "2",
            "listen_addr": "",
            "listen_port": "6432",
            "pool_mode": "transaction",
            "unix_socket_dir": name,
            **settings,
        }
        server = {
            "host": target.host or target.query["host"],
            "port": target.port or target.query.get("port", "5432"),
            "user": target.username,
            "password": target.password,
        }
        words = " ".join(f"{key}={value}" for key, value in server.items() if value is not None)
        lines = [f"{key} = {value}" for key, value in values.items()]
        (folder / "ini").write_text("\n".join(["[databases]", f"* = {words}", "[pgbouncer]", *lines, ""]))
        # Opened before the folder is the account's: later, a process of the account could put a link in its place.
        log = (folder / "log").open("w+")
        for path in (folder / "ini", folder):
            os.chown(path, account.pw_uid, -1)
        become: dict[str, Any] = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        if os.geteuid() != 0:
            become = {}
        with log, subprocess.Popen([PGBOUNCER, "-q", name + "/ini"], stdout=log, stderr=log, **become) as process:
            try:
                until = time.monotonic() + _SECONDS
                while not _answers(folder / ".s.PGSQL.6432"):
                    log.seek(0)
                    assert process.poll() is None, log.read()
                    assert time.monotonic() < until, log.read()
                    time.sleep(0.01)
                reached = target.set(host=None, port=None, password=None, query={"host": name, "port": "6432"})
                yield reached.render_as_string()
            finally:
                process.kill()


def _answers(path: Path) -> bool:
    """Whether somebody listens on that Unix socket: its file is there before."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0
