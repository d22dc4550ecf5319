"""One deployer at a time: an advisory lock, who holds it, and how long one waits for it."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

from alembic.util import CommandError
from sqlalchemy import text

from iot_models._core.shown_names import escaped

if TYPE_CHECKING:
    from sqlalchemy import Connection

log = logging.getLogger("alembic.iot_models")

# Any number works if all deployers of these migrations use the same one ("iot_mode" in ASCII).
ADVISORY_LOCK: Final = 0x696F745F6D6F6465
_POLL_SECONDS: Final = 0.2
_REPORT_SECONDS: Final = 5
# Another deployer may build an index of a large table. But whoever holds the lock must not stop a deployment for ever.
_MOST_SECONDS: Final = 1800.0


def wait_for_other_deployers(connection: Connection) -> None:
    """Take the advisory lock, which ends with the connection. By polling: waiting can deadlock with an index build.

    Raises:
        CommandError: If another connection has held it for half an hour. The message says which.
    """
    began = time.monotonic()
    report_after = 0.0
    while not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": ADVISORY_LOCK}):
        waited = time.monotonic() - began
        if waited > _MOST_SECONDS:
            raise CommandError(
                f"another deployer holds the lock of these migrations for {waited / 60:.0f} minutes: "
                f"{_holder(connection)}; nothing was changed. If it migrates, run the same command again when it is "
                "done; if not, end it."
            )
        if waited >= report_after:
            holder = _holder(connection)
            log.info("another deployer is migrating this database: waiting for %s, %.0f s so far", holder, waited)
            report_after += _REPORT_SECONDS
        connection.commit()  # an index build of the other deployer would wait for an open transaction
        time.sleep(_POLL_SECONDS)
    connection.commit()


def stop_being_a_deployer(connection: Connection) -> None:
    """Give the lock up, if this session has it, as often as it was taken. The caller commits."""
    connection.execute(
        text("""
            SELECT pg_advisory_unlock(:key) FROM pg_locks
             WHERE locktype = 'advisory' AND objsubid = 1 AND pid = pg_backend_pid()
               AND (CAST(classid AS bigint) << 32) + CAST(objid AS bigint) = CAST(:key AS bigint)
        """),
        {"key": ADVISORY_LOCK},
    )


def _holder(connection: Connection) -> str:
    """Who holds the advisory lock. Any role that may log in can take it, so it may be no deployer at all."""
    found: str | None = connection.scalar(
        text("""
            SELECT CASE WHEN p.gid IS NULL
                   THEN pg_catalog.format('pid %s, role %s, application %s', a.pid, a.usename,
                                          coalesce(a.application_name, '?'))
                   ELSE pg_catalog.format('the prepared transaction %L, which stays until ROLLBACK PREPARED', p.gid) END
              FROM pg_locks l LEFT JOIN pg_stat_activity a USING (pid)
              -- A prepared transaction has no process. Its other lock, on its own id, says which one it is.
              LEFT JOIN pg_locks own ON l.pid IS NULL AND own.pid IS NULL AND own.locktype = 'transactionid'
                    AND own.virtualtransaction = l.virtualtransaction
              LEFT JOIN pg_prepared_xacts p ON p.transaction = own.transactionid
             WHERE (a.pid IS NOT NULL OR p.gid IS NOT NULL) AND l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
               AND (CAST(l.classid AS bigint) << 32) + CAST(l.objid AS bigint) = CAST(:key AS bigint)
               AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
             LIMIT 1
        """),
        {"key": ADVISORY_LOCK},
    )
    return escaped(found or "it has just ended")
