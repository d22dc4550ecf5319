"""A standby of a server, fed by streaming replication as a managed PostgreSQL's replica is."""

from __future__ import annotations

import contextlib
import secrets
import subprocess
from typing import TYPE_CHECKING

from sqlalchemy import create_engine, make_url, text

from iot_models.testing.throwaway import _place_in, _temporary_folder
from tests.databases.durable_server import _SETTINGS, DurableServer, _guarded

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def standby_of(primary: DurableServer, name: str) -> Iterator[DurableServer]:
    """Run a hot standby for the `with` block, known to the primary by that name; afterwards nothing of it is left.

    It is a copy of the primary as it is now, and follows it. `promote` makes it a primary.
    """
    folder = _temporary_folder() / f"iot_models_standby_{secrets.token_hex(6)}"
    query = make_url(primary.url).query
    with _guarded(folder):
        place, account = _place_in(folder)
        options = {"env": {"LC_ALL": "C", "TZ": "UTC"}, "cwd": place, **account}
        source = f"host={query['host']} port={query['port']} user=postgres application_name={name}"
        copy = [str(primary.bin / "pg_basebackup"), f"--pgdata={place / 'data'}", f"--dbname={source}"]
        copy += ["--checkpoint=fast", "--wal-method=stream", "--write-recovery-conf", "--no-sync"]
        subprocess.run(copy, check=True, timeout=60, capture_output=True, **options)
        standby = DurableServer(folder, primary.bin, options, _SETTINGS)
        standby.start()
        try:
            yield standby
        finally:
            standby.stop("immediate")


def promote(standby: DurableServer) -> None:
    """Make the standby a primary; return when it takes writes."""
    engine = create_engine(standby.url)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT pg_promote()"))
    engine.dispose()
