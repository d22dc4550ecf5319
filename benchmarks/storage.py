"""How many bytes a device takes on disk, and how many a write takes in the write-ahead log (WAL)."""

from __future__ import annotations

import random
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import psycopg
from fleet_data import DOCUMENT, PATCH, TENANT, plain
from rounds import Figure, Progress
from sqlalchemy.orm import Session

from iot_models import Report, ShadowService
from iot_models.engine import create_engine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Connection = psycopg.Connection[tuple[float, ...]]
    Works = dict[str, Callable[[], None]]

SECTION = "storage"
DEVICES = 1_000  # the devices that are written, one by one and in one batch
PASSES = 3  # measured passes

SIZES = """
    SELECT 'table with TOAST', pg_table_size('device_state'), false
     UNION ALL
    SELECT indexrelid::regclass::text, pg_relation_size(indexrelid), indpred IS NOT NULL
      FROM pg_index WHERE indrelid = 'device_state'::regclass
"""
HISTORY_SIZES = """
    SELECT 'device_shadow_history with TOAST', pg_table_size('device_shadow_history')
     UNION ALL
    SELECT indexrelid::regclass::text, pg_relation_size(indexrelid)
      FROM pg_index WHERE indrelid = 'device_shadow_history'::regclass
"""
HEARTBEAT = """
    UPDATE device_state SET last_heartbeat_at = now(), last_seen_at = now() WHERE tenant_id = %s AND device_id = %s
"""
UPDATES = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relid = 'device_state'::regclass"
WRITTEN = (
    "last_heartbeat_at, last_seen_at, desired_state, reported_state, desired_version, reported_version, "
    "shadow_updated_at"
)
KEEP = f"""
    CREATE TEMPORARY TABLE kept AS
    SELECT tenant_id, device_id, {WRITTEN} FROM device_state WHERE tenant_id = %s AND device_id = ANY(%s)
"""
PUT_BACK = f"""
    UPDATE device_state d SET ({WRITTEN}) = (SELECT {WRITTEN} FROM kept k WHERE k.device_id = d.device_id)
      FROM kept WHERE (d.tenant_id, d.device_id) = (kept.tenant_id, kept.device_id)
"""


def measure(url: str, devices: int, progress: Progress) -> list[Figure]:
    """Measure the sizes of the loaded fleet, then the WAL of each kind of write.

    Each write is a transaction. The WAL of a thousand writes is measured by the position of the WAL's end before and
    after them, so other writes of the server during this time count, too. The devices are neighbours in the table, so
    that each page gets as many writes as in a fleet in which all devices are active. After a checkpoint the first write
    of a page also writes the whole page to the WAL: the first pass takes that and is not measured. A checkpoint in a
    later pass shows as the highest value of its row.

    Afterwards the rows have the same values as before. They have moved: the table is some pages longer.
    """
    setting = f"{devices:,} devices"
    with ExitStack() as stack:
        connection = stack.enter_context(psycopg.connect(plain(url), autocommit=True))
        figures = list(_sizes(connection, devices, setting))
        begin = max(0, devices // 2 - DEVICES // 2)
        chosen = [f"device-{n:07}" for n in range(begin, min(devices, begin + DEVICES))]
        random.Random(0).shuffle(chosen)
        stack.enter_context(_undisturbed(connection, chosen))
        figures += _heartbeats(connection, chosen, setting, progress)
        engine = create_engine(url, isolation_level="AUTOCOMMIT")
        stack.callback(engine.dispose)
        works = _service_works(stack.enter_context(Session(engine)), chosen)
        figures += _wal(connection, works, len(chosen), setting, progress)
        figures += _history(connection, setting)
    return figures


def _history(connection: Connection, setting: str) -> Iterator[Figure]:
    """What a version takes, of those that the writes before have recorded."""
    (versions,) = connection.execute("SELECT count(*) FROM device_shadow_history").fetchone() or (0,)
    for name, size in connection.execute(HISTORY_SIZES).fetchall():
        yield Figure(SECTION, "size a version", str(name), setting, "bytes", (size / versions,))


def _sizes(connection: Connection, devices: int, setting: str) -> Iterator[Figure]:
    pending = connection.execute("SELECT count(*) FROM device_state WHERE desired_version > reported_version")
    (pending_devices,) = pending.fetchone() or (0,)
    for name, size, is_partial in connection.execute(SIZES).fetchall():
        work, count = ("size a pending device", pending_devices) if is_partial else ("size a device", devices)
        yield Figure(SECTION, work, str(name), setting, "bytes", (size / max(count, 1),))


@contextmanager
def _undisturbed(connection: Connection, chosen: list[str]) -> Iterator[None]:
    """Keep autovacuum away. Afterwards restore the rows and remove their dead versions."""
    connection.execute(KEEP, (TENANT, chosen))
    connection.execute("ALTER TABLE device_state SET (autovacuum_enabled = off)")  # also ends a running one
    try:
        yield
    finally:
        connection.execute(PUT_BACK)
        connection.execute("ALTER TABLE device_state RESET (autovacuum_enabled)")
        connection.execute("VACUUM device_state")


def _heartbeats(connection: Connection, chosen: list[str], setting: str, progress: Progress) -> list[Figure]:
    """Measure the WAL of heartbeats, and the share of HOT updates. Call it first: later updates would be counted."""
    shares: list[float] = []

    def heartbeats() -> None:
        before = _updates(connection)
        for device_id in chosen:
            connection.execute(HEARTBEAT, (TENANT, device_id))
        updates, hot = (now - then for now, then in zip(_updates(connection), before, strict=True))
        shares.append(hot / updates)

    figures = _wal(connection, {"WAL of a heartbeat": heartbeats}, len(chosen), setting, progress, "SQL by hand")
    return [*figures, Figure(SECTION, "HOT heartbeats", "SQL by hand", setting, "share", tuple(shares[-PASSES:]))]


def _updates(connection: Connection) -> tuple[float, ...]:
    connection.execute("SELECT pg_stat_force_next_flush()")
    return connection.execute(UPDATES).fetchone() or ()


def _service_works(session: Session, chosen: list[str]) -> Works:
    """Return the writes in the order of a shadow's life. Each report acknowledges the desired version just written.

    The exception is the second report, which acknowledges nothing.
    """
    service = ShadowService(session, TENANT)
    desired: dict[str, dict[str, object]] = {}
    versions: dict[str, int] = {}
    temperature = 15.0

    def replace() -> None:
        nonlocal temperature
        temperature += 0.5
        for device_id in chosen:
            shadow = service.replace_desired(device_id, DOCUMENT | {"target_c": temperature})
            desired[device_id], versions[device_id] = shadow.desired, shadow.desired_version

    def patch() -> None:
        for device_id in chosen:
            shadow = service.patch_desired(device_id, PATCH)
            desired[device_id], versions[device_id] = shadow.desired, shadow.desired_version

    def report() -> None:
        for device_id in chosen:
            service.replace_reported(device_id, desired[device_id], acked_version=versions[device_id])

    def report_again() -> None:
        for device_id in chosen:
            service.replace_reported(device_id, DOCUMENT | {"target_c": temperature, "uptime_s": 3600})

    def report_all() -> None:
        outcomes = service.replace_reported_many(
            Report(device_id, desired[device_id], versions[device_id]) for device_id in chosen
        )
        assert all(outcome.status == "accepted" for outcome in outcomes)

    return {
        "WAL of a desired write": replace,
        "WAL of an acknowledging report": report,
        "WAL of a report that acknowledges nothing new": report_again,
        "WAL of a patch": patch,
        f"WAL of an acknowledging report in a batch of {len(chosen):,}": report_all,
    }


def _wal(
    connection: Connection, works: Works, devices: int, setting: str, progress: Progress, contender: str = "ours"
) -> list[Figure]:
    taken: dict[str, list[float]] = {work: [] for work in works}
    for turn in range(PASSES + 1):
        for work, run in works.items():
            progress.say(f"{work}, {setting}: pass {turn} of {PASSES}")
            before = _wal_end(connection)
            run()
            taken[work].append((_wal_end(connection) - before) / devices)
    return [Figure(SECTION, work, contender, setting, "bytes", tuple(bytes_[1:])) for work, bytes_ in taken.items()]


def _wal_end(connection: Connection) -> float:
    (bytes_,) = (
        connection.execute("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::float8").fetchone() or ()
    )
    return bytes_
