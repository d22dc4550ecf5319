"""Queries over a whole fleet of ten thousand to a million devices, of which one in a hundred is pending."""

from __future__ import annotations

import resource
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
from fleet_data import COLUMNS, TENANT, plain
from rounds import Figure, Progress, interleaved, timed
from sqlalchemy import select
from sqlalchemy.orm import Session

from iot_models import DeviceState, ShadowService
from iot_models.engine import create_engine

if TYPE_CHECKING:
    from collections.abc import Callable

SECTION = "fleet"
PAGE = 100

PENDING = f"""
    SELECT {COLUMNS} FROM device_state
     WHERE tenant_id = %s AND desired_version > reported_version AND device_id > %s ORDER BY device_id LIMIT {PAGE}
"""


def measure(url: str, devices: int, rounds: int, progress: Progress) -> list[Figure]:
    """Measure the first page and a deep page of pending devices, and counts. The fleet must be loaded."""
    setting = f"{devices:,} devices"
    _record(url)
    deep = f"device-{devices * 9 // 10:07}"
    figures: list[Figure] = []
    with ExitStack() as stack:
        connection = stack.enter_context(psycopg.connect(plain(url), autocommit=True))
        engine = create_engine(url, isolation_level="AUTOCOMMIT")
        stack.callback(engine.dispose)
        session = stack.enter_context(Session(engine))
        service = ShadowService(session, TENANT)

        read = _after_nine_tenths(service, devices)

        def by_hand(after: str) -> int:
            return len(connection.execute(PENDING, (TENANT, after)).fetchall())

        def by_offset(offset: int) -> int:
            with Session(engine) as own:
                query = select(DeviceState).where(DeviceState.tenant_id == TENANT, DeviceState.is_pending)
                return len(own.scalars(query.order_by(DeviceState.device_id).offset(offset).limit(PAGE)).all())

        def counted() -> int:
            sql = "SELECT count(*) FROM device_state WHERE tenant_id = %s AND desired_version > reported_version"
            (count,) = connection.execute(sql, (TENANT,)).fetchone()
            return count

        depth = max(devices // 100 * 9 // 10, 1) - 1
        full = min(PAGE, devices // 1000)  # what is left after nine tenths of the fleet
        works: dict[str, dict[str, Callable[[], float]]] = {
            "page of pending, first": {
                "ours": timed(lambda: _full(len(service.pending(limit=PAGE)), PAGE)),
                "psycopg by hand, keyset": timed(lambda: _full(by_hand(""), PAGE)),
                "ORM, OFFSET": timed(lambda: _full(by_offset(0), PAGE)),
            },
            "page of pending, deep": {
                "ours": timed(lambda: _full(len(service.pending(limit=PAGE, after=deep)), full - 1)),
                "psycopg by hand, keyset": timed(lambda: _full(by_hand(deep), full - 1)),
                "ORM, OFFSET": timed(lambda: _full(by_offset(depth), full)),
            },
            "page of changes, first": {"ours": timed(lambda: _full(len(service.changes(limit=PAGE).changes), PAGE))},
            "page of changes, deep": {
                "ours": timed(lambda: _full(len(service.changes(after=read, limit=PAGE).changes), PAGE))
            },
            "page of refused": {
                "ours": timed(lambda: _full(len(service.refused(limit=PAGE)), min(PAGE, devices // 500)))
            },
            "count_pending": {
                "ours": timed(lambda: _full(service.count_pending(), devices // 100)),
                "psycopg by hand": timed(lambda: _full(counted(), devices // 100)),
            },
            "status_counts": {"ours": timed(lambda: _full(sum(service.status_counts().values()), devices))},
            "drifted, none found": {"ours": timed(lambda: service.drifted(limit=PAGE))},
        }
        for work, turns in works.items():
            # The slow ones take about a second each for a million devices.
            some = rounds if work.startswith(("page", "count")) else min(rounds, 3)
            for name, measured in interleaved(turns, some, progress, f"{work}, {setting}").items():
                figures.append(Figure(SECTION, work, name, setting, "s", measured))
    return figures


def _record(url: str) -> None:
    """A version of each device in the history, written by ten transactions."""
    with psycopg.connect(plain(url), autocommit=True) as connection:
        for turn in range(10):
            connection.execute(
                """INSERT INTO device_shadow_history (tenant_id, device_id, desired_version, desired_state, written_at)
                   SELECT tenant_id, device_id, desired_version, desired_state, now() FROM device_state
                    WHERE hashtext(device_id) %% 10 IN (%(turn)s, -%(turn)s)""",
                {"turn": turn},
            )
        connection.execute("VACUUM ANALYZE device_shadow_history")


def _after_nine_tenths(service: ShadowService, devices: int) -> str | None:
    cursor = None
    for _ in range(9):
        cursor = service.changes(after=cursor, limit=devices // 10).cursor
    return cursor


def _full(found: int, least: int) -> None:
    if found < least:
        raise AssertionError(f"{found} found, at least {least} expected")


def memory(url: str, devices: int, progress: Progress) -> list[Figure]:
    """Measure the peak memory of two processes: one iterates over 100 pending devices, one over all."""
    figures = []
    for limit in (100, devices):
        progress.say(f"iter_pending over {limit:,}", at_once=True)
        done = subprocess.run([sys.executable, __file__, url, str(limit)], check=True, capture_output=True, text=True)
        figures.append(
            Figure(SECTION, "peak memory of iter_pending", "ours", f"{limit:,} devices", "bytes", (float(done.stdout),))
        )
    return figures


def make_all_pending(url: str) -> None:
    with psycopg.connect(plain(url), autocommit=True) as connection:
        connection.execute(
            "UPDATE device_state SET reported_version = 1 WHERE desired_version = 2 AND reported_version = 2"
        )
        connection.execute("VACUUM ANALYZE device_state")


def _iterate(url: str, limit: int) -> int:
    with Session(create_engine(url, isolation_level="AUTOCOMMIT")) as session:
        seen = 0
        for _ in ShadowService(session, TENANT).iter_pending():
            seen += 1
            if seen == limit:
                break
        _full(seen, limit)
    status = Path("/proc/self/status")
    # Not ru_maxrss where it can be avoided: it includes what the parent used when it started this process.
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    print(_iterate(sys.argv[1], int(sys.argv[2])))
