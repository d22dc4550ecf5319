"""What an index of drifted devices would gain, and what each report would pay for it.

    python benchmarks/drift_index.py [--devices 10000 100000 1000000] [--rounds 9]

It decided against an index of ours. docs/performance.md has the figures, and the index for a team that decides
otherwise.
PostgreSQL has no subquery in the predicate of an index. So this one holds candidates: devices that acknowledged the
newest version and lack something of desired's top level. `drifted` then asks the rule itself of these.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import psycopg
from bench import SERVER
from fleet_data import DOCUMENT, TENANT, database, load, plain
from rounds import Progress, interleaved, timed
from sqlalchemy.orm import Session

from iot_models import ShadowService
from iot_models.engine import create_engine
from iot_models.testing import throwaway

if TYPE_CHECKING:
    from collections.abc import Callable

INDEX = """
    CREATE INDEX drifted_device ON device_state (tenant_id, device_id)
     WHERE desired_version = reported_version AND reported_state || desired_state <> reported_state
"""
DRIFT = """
    UPDATE device_state SET reported_state = reported_state || '{"mode": "off", "uptime": 1}' WHERE device_id LIKE '%50'
"""
CURE = "UPDATE device_state SET reported_state = desired_state || '{\"uptime\": 1}' WHERE device_id LIKE '%50'"
PAGE = 100
WRITES = 300
WITHOUT, WITH = "without", "with"
NEW, SAME, DESIRED = "a report of something new", "a report that changes nothing", "a desired write"
UPDATES = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relid = 'device_state'::regclass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    progress = Progress()
    with throwaway.postgres(settings=SERVER) as server:
        for devices in arguments.devices:
            with ExitStack() as stack:
                urls = {
                    name: stack.enter_context(database(server.url, f"iot_models_{name}", synchronous_commit="off"))
                    for name in (WITHOUT, WITH)
                }
                for url in urls.values():
                    progress.say(f"loading {devices:,} devices", at_once=True)
                    load(url, devices)
                _prepare(urls[WITH], INDEX)
                _pages(urls, devices, arguments.rounds, progress)
                if devices == arguments.devices[-1]:
                    for work in (NEW, SAME, DESIRED):
                        _writes(urls, work, arguments.rounds, progress)


def _prepare(url: str, sql: str) -> None:
    with psycopg.connect(plain(url), autocommit=True) as connection:
        connection.execute(sql)
        connection.execute("VACUUM ANALYZE device_state")


def _pages(urls: dict[str, str], devices: int, rounds: int, progress: Progress) -> None:
    for state, sql in (("1 in 100 drifted", DRIFT), ("none drifted", CURE)):
        with ExitStack() as stack:
            turns: dict[str, Callable[[], float]] = {}
            for name, url in urls.items():
                _prepare(url, sql)
                engine = create_engine(url, isolation_level="AUTOCOMMIT")
                stack.callback(engine.dispose)
                service = ShadowService(stack.enter_context(Session(engine)), TENANT)
                turns[name] = timed(partial(service.drifted, limit=PAGE))
            for name, values in interleaved(turns, rounds, progress, f"{devices:,}, {state}").items():
                print(f"{devices:>9,} devices, {state}, a page of {PAGE}, {name}: {median(values) * 1e3:.2f} ms")


def _writes(urls: dict[str, str], work: str, rounds: int, progress: Progress) -> None:
    turns: dict[str, Callable[[], float]] = {}
    costs: dict[str, list[tuple[float, float]]] = {}
    with ExitStack() as stack:
        for name, url in urls.items():
            engine = create_engine(url, isolation_level="AUTOCOMMIT")
            stack.callback(engine.dispose)
            service = ShadowService(stack.enter_context(Session(engine)), TENANT, history=False)
            admin = stack.enter_context(psycopg.connect(plain(url), autocommit=True))
            costs[name] = []
            turns[name] = partial(_turn, work, service, admin, costs[name])
        found = interleaved(turns, rounds, progress, work)
    for name, values in found.items():
        wal, hot = (median(column) for column in zip(*costs[name], strict=True))
        print(f"{work}, {name} the index: {median(values) * 1e6:.0f} µs, {wal:,.0f} B of WAL, {hot:.0%} HOT")
    ratios = [b / a for a, b in zip(found[WITHOUT], found[WITH], strict=True)]
    print(f"{work}: {median(ratios):.2f} times the time with the index")


def _turn(work: str, service: ShadowService, admin: psycopg.Connection, costs: list[tuple[float, float]]) -> float:
    ids = [f"device-{n:07}" for n in range(1, WRITES + 1)]
    turn = len(costs)
    before, updates, hot = _counters(admin)
    started = time.perf_counter()
    for device_id in ids:
        if work == DESIRED:
            service.replace_desired(device_id, DOCUMENT | {"turn": turn})
        else:
            service.replace_reported(device_id, DOCUMENT | {"uptime": turn if work == NEW else 0})
    taken = (time.perf_counter() - started) / WRITES
    after, updates_after, hot_after = _counters(admin)
    costs.append(((after - before) / WRITES, (hot_after - hot) / max(updates_after - updates, 1)))
    return taken


def _counters(admin: psycopg.Connection) -> tuple[float, int, int]:
    admin.execute("SELECT pg_stat_force_next_flush(), pg_stat_clear_snapshot()")
    time.sleep(1.1)  # the writer's own counters arrive within a second
    (lsn,) = admin.execute("SELECT pg_current_wal_insert_lsn() - '0/0'").fetchone()
    return float(lsn), *admin.execute(UPDATES).fetchone()


if __name__ == "__main__":
    main()
