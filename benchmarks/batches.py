"""Many devices in one call: 1 to 10,000 reports or patches."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import asyncpg
import psycopg
from by_hand import numbered
from fleet_data import DOCUMENT, PATCH, TENANT, load, plain
from orm import Unversioned, Versioned
from psycopg.types.json import Jsonb
from rounds import Figure, Progress, interleaved
from sqlalchemy import func, make_url, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from iot_models import AsyncShadowService, Report, ShadowService, twin
from iot_models.engine import create_async_engine, create_engine

if TYPE_CHECKING:
    from collections.abc import Callable

SECTION = "batches"
SIZES = (1, 10, 100, 1_000, 10_000)
LOOP_UP_TO = 1_000  # at 600 µs per device or more, a loop over 10,000 devices would take most of the run
DEVICES = 20_000

# The best that can be written by hand: one statement with the guards in it.
REPORTS = """
    UPDATE device_state d SET reported_state = n.document::jsonb, reported_version = n.acked, last_seen_at = now()
      FROM unnest(%s::text[], %s::text[], %s::int[]) AS n(device_id, document, acked)
     WHERE d.tenant_id = %s AND d.device_id = n.device_id AND n.acked BETWEEN d.reported_version AND d.desired_version
    RETURNING d.device_id, d.desired_version, d.reported_version
"""
# The same with what the service promises: locks in the order of the ids, and an outcome for each report. All values
# travel as one JSON text, the fastest way of those tried.
GUARANTEED = """
    WITH sent AS (
      SELECT n.device_id, n.document, n.acked, n.place FROM jsonb_to_recordset({documents}::text::jsonb)
          AS n(device_id text, document jsonb, acked int, place int)
    ), locked AS MATERIALIZED (
      SELECT d.device_id, d.desired_version, d.reported_version
        FROM device_state d JOIN sent n ON n.device_id = d.device_id
       WHERE d.tenant_id = {tenant} ORDER BY d.device_id FOR NO KEY UPDATE OF d
    ), written AS (
      UPDATE device_state d SET reported_state = n.document, reported_version = n.acked,
                                last_seen_at = greatest(d.last_seen_at, now())
        FROM sent n JOIN locked l ON l.device_id = n.device_id
       WHERE d.tenant_id = {tenant} AND d.device_id = l.device_id
         AND n.acked BETWEEN l.reported_version AND l.desired_version
      RETURNING d.device_id, d.desired_version, d.reported_version
    )
    SELECT n.place, w.device_id IS NOT NULL, coalesce(w.desired_version, l.desired_version),
           coalesce(w.reported_version, l.reported_version)
      FROM sent n LEFT JOIN locked l ON l.device_id = n.device_id LEFT JOIN written w ON w.device_id = n.device_id
     ORDER BY n.place
"""
PSYCOPG_GUARANTEED = GUARANTEED.format(documents="%(documents)s", tenant="%(tenant)s")
ASYNCPG_GUARANTEED = GUARANTEED.format(documents="$1", tenant="$2")
REPORT = """
    UPDATE device_state SET reported_state = %s, reported_version = %s, last_seen_at = now()
     WHERE tenant_id = %s AND device_id = %s AND %s BETWEEN reported_version AND desired_version
"""
LOCK = """
    SELECT device_id, desired_state FROM device_state WHERE tenant_id = %s AND device_id = ANY(%s)
     ORDER BY device_id FOR NO KEY UPDATE
"""
PATCHES = """
    UPDATE device_state d SET desired_state = n.document::jsonb, desired_version = desired_version + 1,
                              shadow_updated_at = now()
      FROM unnest(%s::text[], %s::text[]) AS n(device_id, document)
     WHERE d.tenant_id = %s AND d.device_id = n.device_id
    RETURNING d.device_id, d.desired_state, d.reported_state, d.desired_version, d.reported_version,
              d.shadow_updated_at, d.last_seen_at
"""


class Slices:
    """Returns the next `size` devices of the fleet; after the last device comes the first again."""

    def __init__(self) -> None:
        self._place = 0

    def next(self, size: int) -> list[str]:
        places = range(self._place, self._place + size)
        self._place = places.stop % DEVICES
        return [f"device-{place % DEVICES:07}" for place in places]


def measure(url: str, setting: str, rounds: int, progress: Progress) -> list[Figure]:
    load(url, DEVICES)
    figures: list[Figure] = []
    with ExitStack() as stack:
        for work, contenders in (
            ("reports", _reports(stack, url) | _reports_by_asyncpg(stack, url)),
            ("patches", _patches(stack, url)),
        ):
            for size in SIZES:
                turns = {
                    name: _turn(call, size)
                    for name, call in contenders.items()
                    if size <= LOOP_UP_TO or not name.startswith("ORM, loop")
                }
                label = f"{size:,} {work}, {setting}"
                for name, measured in interleaved(turns, rounds, progress, label).items():
                    figures.append(Figure(SECTION, f"{work}, {setting}", name, f"{size:,}", "s", measured))
    return figures


def _turn(call: Callable[[list[str]], None], size: int) -> Callable[[], float]:
    slices = Slices()
    repeats = max(1, 20 // size)

    def turn() -> float:
        batches = [slices.next(size) for _ in range(repeats)]
        started = time.perf_counter()
        for devices in batches:
            call(devices)
        return (time.perf_counter() - started) / repeats

    return turn


def _reports(stack: ExitStack, url: str) -> dict[str, Callable[[list[str]], None]]:
    connection = stack.enter_context(psycopg.connect(plain(url)))
    engine = create_engine(url)
    stack.callback(engine.dispose)
    turns = itertools.count()

    def by_hand(devices: list[str]) -> None:
        documents = [json.dumps(DOCUMENT) for _ in devices]
        rows = connection.execute(REPORTS, (devices, documents, [2] * len(devices), TENANT)).fetchall()
        assert len(rows) == len(devices)
        connection.commit()

    def guaranteed(devices: list[str]) -> None:
        rows = connection.execute(PSYCOPG_GUARANTEED, {"documents": _sent(devices), "tenant": TENANT}).fetchall()
        assert all(written for _, written, *_ in rows)
        connection.commit()

    def executemany(devices: list[str]) -> None:
        with connection.cursor() as cursor:
            cursor.executemany(REPORT, [(Jsonb(DOCUMENT), 2, TENANT, device, 2) for device in devices])
            assert cursor.rowcount == len(devices)
        connection.commit()

    def bulk(devices: list[str]) -> None:
        with Session(engine) as session, session.begin():
            rows = [
                {"tenant_id": TENANT, "device_id": device, "reported_state": DOCUMENT, "reported_version": 2}
                for device in devices
            ]
            session.execute(update(Unversioned), rows)

    def loop(devices: list[str]) -> None:
        turn = next(turns)
        with Session(engine) as session, session.begin():
            for device_id in devices:
                device = session.get_one(Unversioned, (TENANT, device_id))
                assert device.reported_version <= 2 <= device.desired_version
                device.reported_state = DOCUMENT | {"turn": turn}
                device.last_seen_at = func.now()
                session.flush()

    def ours(devices: list[str]) -> None:
        with Session(engine) as session, session.begin():
            outcomes = ShadowService(session, TENANT).replace_reported_many(
                Report(device, DOCUMENT, 2) for device in devices
            )
        assert all(outcome.status == "accepted" for outcome in outcomes)

    return {
        "psycopg by hand, one statement": by_hand,
        "psycopg by hand, with our guarantees": guaranteed,
        "psycopg by hand, executemany": executemany,
        "ORM, bulk update by primary key": bulk,
        "ORM, loop": loop,
        "ours, one call": ours,
    }


def _reports_by_asyncpg(stack: ExitStack, url: str) -> dict[str, Callable[[list[str]], None]]:
    runner = stack.enter_context(asyncio.Runner())
    other = runner.run(asyncpg.connect(plain(url)))
    stack.callback(lambda: runner.run(other.close()))
    engine = create_async_engine(make_url(url).set(drivername="postgresql+asyncpg"))
    stack.callback(lambda: runner.run(engine.dispose()))

    async def by_hand(devices: list[str]) -> None:
        documents = [json.dumps(DOCUMENT) for _ in devices]
        async with other.transaction():
            rows = await other.fetch(ASYNCPG_REPORTS, devices, documents, [2] * len(devices), TENANT)
        assert len(rows) == len(devices)

    async def guaranteed(devices: list[str]) -> None:
        async with other.transaction():
            rows = await other.fetch(ASYNCPG_GUARANTEED, _sent(devices), TENANT)
        assert all(written for _, written, *_ in rows)

    async def ours(devices: list[str]) -> None:
        async with AsyncSession(engine) as session, session.begin():
            outcomes = await AsyncShadowService(session, TENANT).replace_reported_many(
                Report(device, DOCUMENT, 2) for device in devices
            )
        assert all(outcome.status == "accepted" for outcome in outcomes)

    contenders = {
        "asyncpg by hand, one statement": by_hand,
        "asyncpg by hand, with our guarantees": guaranteed,
        "ours (asyncpg), one call": ours,
    }
    return {name: lambda devices, call=call: runner.run(call(devices)) for name, call in contenders.items()}


def _sent(devices: list[str]) -> str:
    return json.dumps(
        [
            {"device_id": device, "document": DOCUMENT, "acked": 2, "place": place}
            for place, device in enumerate(devices)
        ]
    )


ASYNCPG_REPORTS = numbered(REPORTS)


def _patches(stack: ExitStack, url: str) -> dict[str, Callable[[list[str]], None]]:
    connection = stack.enter_context(psycopg.connect(plain(url)))
    engine = create_engine(url)
    stack.callback(engine.dispose)
    turns = itertools.count()

    def patch() -> dict[str, Any]:
        return PATCH | {"turn": next(turns)}

    def by_hand(devices: list[str]) -> None:
        found = connection.execute(LOCK, (TENANT, devices)).fetchall()
        change = patch()
        documents = [json.dumps(twin.merge_patch(document, change)) for _, document in found]
        rows = connection.execute(PATCHES, ([device for device, _ in found], documents, TENANT)).fetchall()
        assert len(rows) == len(devices)
        connection.commit()

    def loop(devices: list[str]) -> None:
        change = patch()
        with Session(engine) as session, session.begin():
            for device_id in devices:
                device = session.get_one(Versioned, (TENANT, device_id))
                device.desired_state = twin.merge_patch(device.desired_state, change)
                device.shadow_updated_at = func.now()
                session.flush()

    def ours(devices: list[str], *, history: bool = True) -> None:
        with Session(engine) as session, session.begin():
            service = ShadowService(session, TENANT, history=history)
            assert len(service.patch_desired_many(devices, patch())) == len(devices)

    return {
        "psycopg by hand, two statements": by_hand,
        "ORM, loop": loop,
        "ours, one call": ours,
        "ours, no history": partial(ours, history=False),
    }
