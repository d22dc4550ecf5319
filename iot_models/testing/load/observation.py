"""What is asked of the server: what our sessions wait for while they write, and what the writes cost it."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

CPU: Final = "CPU"
CLIENT: Final = "Client"

_INTERVAL: Final = 0.2
_AT_AN_END: Final = 5.0  # how long to wait for the end of our sessions: then their counts are in the statistics
# Only what waits for a lock asks whom it waits for: that is dear.
_ACTIVITY: Final = text("""
    SELECT state, wait_event_type, wait_event,
           CASE WHEN wait_event_type = 'Lock' THEN ARRAY(
             SELECT CAST(application_name AS text) FROM pg_catalog.pg_stat_activity AS other
              WHERE other.pid = ANY (pg_catalog.pg_blocking_pids(mine.pid))) END AS blockers
      FROM pg_catalog.pg_stat_activity AS mine
     WHERE application_name = :application AND datname = pg_catalog.current_database()
       AND state <> 'idle'
""")
_SESSIONS: Final = text("SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE application_name = :application")
_WAL: Final = text("SELECT CAST(pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), '0/0') AS bigint)")
_UPDATES: Final = text("""
    SELECT CAST(sum(n_tup_upd) AS bigint), CAST(sum(n_tup_hot_upd) AS bigint) FROM pg_catalog.pg_stat_all_tables
     WHERE relid = pg_catalog.to_regclass('device_state')
        OR relid IN (SELECT partition.relid
                       FROM pg_catalog.pg_partition_tree(pg_catalog.to_regclass('device_state')) AS partition)
""")


@dataclass(slots=True)
class Waits:
    """What our sessions were seen to wait for.

    Attributes:
        looks: How often it was looked.
        seen: How often a session that was not idle waited for what: `Lock:transactionid`, `IO:WalSync`; `CPU` is a
            session that works, `Client` one in a transaction that waits for this process.
        blockers: Which applications held what was waited for, and how often.
    """

    looks: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    blockers: Counter[str] = field(default_factory=Counter)

    def add(self, row: Row[*tuple[Any, ...]]) -> None:
        """Count a session."""
        state, kind, what, blockers = row
        if state is None or state.startswith("idle") or kind == CLIENT:
            self.seen[CLIENT] += 1
        else:
            self.seen[f"{kind}:{what}" if kind else CPU] += 1
        self.blockers.update(blockers or ())


def difference(after: int | None, before: int | None) -> int | None:
    """Of two counts, of which the role may have been refused either."""
    return None if after is None or before is None else after - before


class Observer:
    """Looks at the server by a connection that is not one of those that write."""

    def __init__(self, engine: AsyncEngine, application: str) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._application = application
        self.waits = Waits()

    async def watch(self) -> None:
        """Look at our sessions five times a second, until it is cancelled. A server that is away is not looked at."""
        while True:
            with suppress(DBAPIError, OSError):
                async with self._engine.connect() as connection:
                    await self._watch(connection)
            await asyncio.sleep(_INTERVAL)

    async def _watch(self, connection: AsyncConnection) -> None:
        while True:
            rows = (await connection.execute(_ACTIVITY, self._mine)).all()
            self.waits.looks += 1
            for row in rows:
                self.waits.add(row)
            await asyncio.sleep(_INTERVAL)

    async def wal(self) -> int | None:
        """How much WAL the server has written; None if the role may not ask, or on no answer."""
        with suppress(DBAPIError, OSError):
            async with self._engine.connect() as connection:
                written: int | None = await connection.scalar(_WAL)
                return written
        return None

    async def updates(self) -> tuple[int, int] | None:
        """How many rows of the table were updated, and how many of these without a new index entry (HOT).

        It waits until the sessions that write have ended: before, not all of their counts are in the statistics.
        """
        with suppress(DBAPIError, OSError):
            async with self._engine.connect() as connection:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_AT_AN_END):
                        while await connection.scalar(_SESSIONS, self._mine):  # noqa: ASYNC110 - nobody tells us
                            await asyncio.sleep(_INTERVAL / 10)
                updates, hot_updates = (await connection.execute(_UPDATES)).one()
                return updates, hot_updates
        return None

    @property
    def _mine(self) -> Mapping[str, str]:
        return {"application": self._application}
