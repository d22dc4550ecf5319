"""How long does a writer wait while `device_state` is migrated?

Four processes write heartbeats, with a short pause between two writes. Meanwhile the table is migrated, by our Alembic
revisions or by raw SQL, each time on a new copy of the same data. The figure is the longest single write, compared with
the longest write of an idle run of the same length, which is what scheduling and the disk cost anyway.

    python benchmarks/stall.py [--rows 100000 1000000 4000000] [--rounds 3] [--durable] [--report benchmarks/stall.md]
    python benchmarks/stall.py --distributed [--rows 100000] ...
    python benchmarks/stall.py --partitioning [--rows 100000] ...

The second asks what a downgrade costs where Citus has distributed the table: on one PostgreSQL, with the revisions told
that it is. Its writers patch desired documents, each until the column is gone. The third follows the steps by which
docs/migrations.md turns a plain table into a partitioned one.

It runs on a throwaway server. The exit code is 1 if a write failed, a shadow was lost, or a target was missed; the
report says which.
"""

from __future__ import annotations

import argparse
import gc
import io
import logging
import multiprocessing
import os
import random
import re
import subprocess
import sys
import time
from argparse import Namespace
from array import array
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

import psycopg
from alembic import command
from alembic.config import Config
from sqlalchemy import make_url

from iot_models._migrations import operations
from iot_models._migrations.places import Distribution
from iot_models.testing import throwaway

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.synchronize import Event

CHECKOUT = Path(__file__).resolve().parents[1]
WRITERS: Final = 4
WARM_UP_SECONDS: Final = 2.0
OBSERVED_SECONDS: Final = 2.0  # at least: writes that a short migration delays end after it
IDLE_SECONDS: Final = 20.0
TARGET: Final = 3.0  # times the longest write of an idle run
ALL_UP_TO: Final = 1_000_000  # rows, in the cases in which each device has a shadow
DURABLE: Final = {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on"}

HEARTBEAT = """
    UPDATE device_state SET last_heartbeat_at = now(), last_seen_at = now() WHERE tenant_id = %s AND device_id = %s
"""
PATCH = """
    UPDATE device_state
       SET desired_state = desired_state || '{"interval_s": 30}', desired_version = desired_version + 1,
           shadow_updated_at = now()
     WHERE tenant_id = %s AND device_id = %s
"""
TENANTS: Final = 20
ROWS = """
    SELECT 'tenant-' || i % {tenants} AS tenant_id, 'site-' || i % 500 AS site_id, 'device-' || i AS device_id,
           'ONLINE' AS status, now() AS last_heartbeat_at, now() AS last_seen_at,
           jsonb_build_object(
             'temperature', round((20 + 10 * random())::numeric, 1), 'humidity', i % 100, 'battery_mv', 3000 + i % 900,
             'rssi', -40 - i % 60, 'firmware', '2.' || i % 7 || '.1', 'uptime_s', i,
             'location', jsonb_build_object('lat', 52.5, 'lon', 13.4, 'building', i % 40)) AS state
      FROM generate_series(1, {rows}) AS i
"""
SHADOWS = """
    jsonb_build_object('interval_s', 60, 'firmware', '2.8.0', 'leds', jsonb_build_object('on', true, 'level', 7)),
    jsonb_build_object('interval_s', 60, 'firmware', '2.7.1', 'leds', jsonb_build_object('on', true, 'level', 7)),
    4, CASE WHEN random() < 0.1 THEN 3 ELSE 4 END, now()
"""
SHADOW_COLUMNS = "desired_state, reported_state, desired_version, reported_version, shadow_updated_at"
CHECKSUM = f"""
    SELECT count(*), sum(hashtextextended(ROW(tenant_id, device_id, {SHADOW_COLUMNS})::text, 0))
      FROM device_state WHERE desired_version > 0
"""

RAW_DOWN = """
    BEGIN;
    DROP INDEX idx_device_state_shadow_pending;
    ALTER TABLE device_state
      DROP COLUMN desired_state, DROP COLUMN reported_state, DROP COLUMN desired_version, DROP COLUMN reported_version,
      DROP COLUMN shadow_updated_at;
    COMMIT;
"""
NAIVE_DOWN = RAW_DOWN.replace(
    "BEGIN;",
    f"""BEGIN;
    LOCK TABLE device_state IN ACCESS EXCLUSIVE MODE;
    CREATE TABLE shadows AS
      SELECT tenant_id, device_id, {SHADOW_COLUMNS} FROM device_state
       WHERE desired_version > 0 OR reported_version > 0 OR desired_state <> '{{}}' OR reported_state <> '{{}}';
    """,
)


@dataclass(frozen=True, slots=True)
class Writes:
    """The writes of a run: when each began and how long it took, in seconds, and the messages of failed ones."""

    began: array[float]
    took: array[float]
    errors: list[str]

    def within(self, begin: float, end: float) -> list[float]:
        """Return the sorted durations of the writes that overlap with the time from `begin` to `end`."""
        return sorted(
            took for began, took in zip(self.began, self.took, strict=True) if began < end and began + took > begin
        )


@dataclass(frozen=True, slots=True)
class Observation:
    """The writes during one case, in seconds."""

    began: float
    seconds: float  # how long the migration took
    window: float
    took: list[float]
    errors: list[str]

    @property
    def longest(self) -> float:
        return self.took[-1]

    def quantile(self, share: float) -> float:
        return self.took[min(len(self.took) - 1, int(share * len(self.took)))]


@dataclass(frozen=True, slots=True)
class Work:
    """What a writer does: a statement for one random device of `rows`, then a pause in seconds."""

    url: str
    statement: str
    rows: int
    pause: float


def _write(work: Work, seed: int, stop: Event, results: Connection) -> None:
    """Write until `stop` is set, or a column is gone. This is the program of one writer process."""
    chosen = random.Random(seed)
    began, took = array("d"), array("d")
    errors: list[str] = []
    with psycopg.connect(work.url, autocommit=True, application_name="writer") as connection:
        results.send("connected")
        gc.disable()  # its pauses would look like pauses of the server
        while not stop.is_set():
            number = chosen.randint(1, work.rows)
            start = time.monotonic()
            try:
                device = (f"tenant-{number % TENANTS}", f"device-{number}")
                cursor = connection.execute(work.statement, device, prepare=True)
                if cursor.rowcount != 1:
                    errors.append(f"{cursor.rowcount} rows updated")
            except psycopg.errors.UndefinedColumn:
                stop.set()  # the others wait for the same lock, and end with their own write
            except psycopg.Error as error:
                errors.append(str(error))
            began.append(start)
            took.append(time.monotonic() - start)
            if work.pause:
                time.sleep(work.pause)
    results.send((began, took, errors))


@contextmanager
def _writers(work: Work) -> Iterator[Callable[[], Writes]]:
    """Run the writers. The function that it provides ends them and returns their writes."""
    context = multiprocessing.get_context("spawn")  # a forked child would keep the throwaway server running
    stop = context.Event()
    started = []
    for seed in range(WRITERS):
        ours, theirs = context.Pipe()
        process = context.Process(target=_write, args=(work, seed, stop, theirs), daemon=True)
        process.start()
        started.append((process, ours))

    def finish() -> Writes:
        stop.set()
        writes = Writes(array("d"), array("d"), [])
        for _, results in started:
            began, took, errors = results.recv()
            writes.began.extend(began)
            writes.took.extend(took)
            writes.errors.extend(errors)
        return writes

    try:
        for _, results in started:
            results.recv()
        yield finish
    finally:
        stop.set()
        for process, _ in started:
            process.join(10)
            process.kill()


class Bench:
    """A server, its databases, and the operations on them."""

    def __init__(self, server: throwaway.Server, pause: float) -> None:
        self.server = server
        self.pause = pause

    def url(self, database: str) -> str:
        return make_url(self.server.url).set(database=database).render_as_string()

    def libpq(self, database: str) -> str:
        return make_url(self.server.url).set(drivername="postgresql", database=database).render_as_string()

    def execute(self, database: str, *statements: str) -> None:
        with psycopg.connect(self.libpq(database), autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement)

    def fill(self, database: str, rows: int, *, every: int | None) -> None:
        """Create a database with `rows` devices.

        With `every` it is migrated to head, and one in `every` devices has a shadow. Otherwise it is at revision 075.
        """
        self.execute("postgres", f"CREATE DATABASE {database}")
        self.execute(database, (CHECKOUT / "tests" / "data" / "075.sql").read_text())
        every_row = ROWS.format(tenants=TENANTS, rows=rows)
        columns = "tenant_id, site_id, device_id, status, last_heartbeat_at, last_seen_at, state"
        if every is None:
            self.execute(database, f"INSERT INTO device_state ({columns}) {every_row}")
        else:
            self.upgrade(database)
            self.execute(
                database,
                f"INSERT INTO device_state ({columns}, {SHADOW_COLUMNS}) SELECT f.*, {SHADOWS} FROM ({every_row}"
                f" WHERE i / {TENANTS} % {every} = 0) f",
            )
            if every > 1:
                self.execute(
                    database, f"INSERT INTO device_state ({columns}) {every_row} WHERE i / {TENANTS} % {every} > 0"
                )
        # A table in use has free space on its pages, where heartbeats left dead versions of rows.
        self.execute(
            database,
            "UPDATE device_state SET last_seen_at = now() WHERE right(device_id, 1) = '7'",
            "VACUUM (ANALYZE) device_state",
        )

    @contextmanager
    def copy(self, template: str) -> Iterator[str]:
        """Copy the database, and drop the copy after the block. The copy is on the disk when the block begins."""
        name = "bench_copy"
        self.execute("postgres", f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
        self.execute("postgres", "CHECKPOINT")
        os.sync()
        try:
            yield name
        finally:
            self.execute("postgres", f"DROP DATABASE {name} WITH (FORCE)")

    @contextmanager
    def autovacuum(self, database: str) -> Iterator[Callable[[], None]]:
        """Make autovacuum work slowly on the table. The function that it provides waits until it works."""
        self.execute(
            database,
            "ALTER TABLE device_state SET (autovacuum_vacuum_threshold = 1, autovacuum_vacuum_scale_factor = 0,"
            " autovacuum_vacuum_cost_delay = 20, autovacuum_vacuum_cost_limit = 10)",
            "ALTER SYSTEM SET autovacuum_naptime = 1",
            "SELECT pg_reload_conf()",
        )

        def at_work() -> None:
            deadline = time.monotonic() + 30
            with psycopg.connect(self.libpq(database), autocommit=True) as connection:
                while not connection.execute("SELECT FROM pg_stat_progress_vacuum").rowcount:
                    if time.monotonic() > deadline:
                        raise TimeoutError("autovacuum did not start")
                    time.sleep(0.05)

        try:
            yield at_work
        finally:
            self.execute(database, "ALTER SYSTEM RESET autovacuum_naptime", "SELECT pg_reload_conf()")

    def observe(
        self,
        database: str,
        rows: int,
        operation: Callable[[str], None],
        ready: Callable[[], None] = lambda: None,
        statement: str = HEARTBEAT,
    ) -> tuple[Observation, Writes]:
        """Run `operation` while writers execute `statement`, after `ready` has returned."""
        with _writers(Work(self.libpq(database), statement, rows, self.pause)) as finish:
            time.sleep(WARM_UP_SECONDS)
            ready()
            begin = time.monotonic()
            operation(database)
            end = time.monotonic()
            time.sleep(max(0.0, begin + OBSERVED_SECONDS - end))
            until = time.monotonic()
            writes = finish()
        return Observation(begin, end - begin, until - begin, writes.within(begin, until), writes.errors), writes

    def upgrade(self, database: str) -> None:
        command.upgrade(self._config(database), "head")

    def downgrade(self, database: str) -> None:
        command.downgrade(self._config(database), "075")

    def downgrade_as_distributed(self, database: str) -> None:
        """Take the way of a distributed table, which this one is not."""
        by_tenant = Distribution("tenant_id", hashed=True, group=1)
        with mock.patch.object(operations, "distribution", return_value=by_tenant):
            self.downgrade(database)

    def printed_downgrade(self) -> str:
        """The SQL for those who migrate by hand: one transaction."""
        printed = io.StringIO()
        config = Config(output_buffer=printed)
        config.set_main_option("script_location", str(CHECKOUT / "alembic"))
        command.downgrade(config, "head:075", sql=True)
        return printed.getvalue()

    def psql(self, sql: str, database: str) -> None:
        subprocess.run(
            [self.server.bin / "psql", "-qX", "-v", "ON_ERROR_STOP=1", "-o", os.devnull, self.libpq(database)],
            input=sql,
            text=True,
            check=True,
        )

    def shadows(self, database: str) -> Any:
        with psycopg.connect(self.libpq(database)) as connection:
            return connection.execute(CHECKSUM).fetchone()

    def _config(self, database: str) -> Config:
        config = Config(cmd_opts=Namespace(x=[f"url={self.url(database)}"]))
        config.set_main_option("script_location", str(CHECKOUT / "alembic"))
        return config


class Report:
    """The observations so far. It prints a line when a case ends, and makes the table at the end."""

    def __init__(self) -> None:
        self.idle: dict[int, list[tuple[Writes, float, float]]] = defaultdict(list)
        self.seen: dict[tuple[int, str], list[Observation]] = defaultdict(list)
        self.lost: list[str] = []

    def add(self, rows: int, case: str, seen: Observation) -> None:
        """Keep one observation and print it."""
        self.seen[rows, case].append(seen)
        p50, p99, p999 = (1000 * seen.quantile(share) for share in (0.5, 0.99, 0.999))
        print(
            f"{time.strftime('%H:%M:%S')} {rows:>9,} rows  {case:<55} {seen.seconds:6.2f} s  "
            f"p50 {p50:.2f}  p99 {p99:.2f}  p99.9 {p999:.2f}  longest {1000 * seen.longest:.1f} ms  "
            f"{len(seen.took):,} writes, {len(seen.errors)} failed",
            flush=True,
        )

    def idle_longest(self, rows: int, window: float) -> float:
        """Return the longest write in `window` seconds of an idle run: the median over all such windows."""
        longest = []
        for writes, begin, until in self.idle[rows]:
            for piece in range(max(1, int((until - begin) / window))):
                start = begin + piece * window
                longest.append(writes.within(start, min(start + window, until))[-1])
        return median(longest)

    def ratio(self, rows: int, case: str) -> float:
        """Return the longest write of a case divided by that of an idle run of the same length; both are medians."""
        seen = self.seen[rows, case]
        return median(each.longest for each in seen) / self.idle_longest(rows, median(each.window for each in seen))

    def table(self) -> Iterator[str]:
        """Yield the lines of a Markdown table with a row for each case and number of rows."""
        yield "| rows | case | takes, s | p50, ms | p99, ms | p99.9, ms | longest, ms | times idle | failed |"
        yield "|---:|---|---:|---:|---:|---:|---:|---:|---:|"
        for (rows, case), seen in self.seen.items():
            quantiles = (median(1000 * each.quantile(share) for each in seen) for share in (0.5, 0.99, 0.999))
            longest = [1000 * each.longest for each in seen]
            cells = [
                f"{rows:,}",
                case,
                f"{median(each.seconds for each in seen):.2f}",
                *(f"{value:.2f}" for value in quantiles),
                f"{median(longest):.1f} ({min(longest):.1f} to {max(longest):.1f})",
                f"{self.ratio(rows, case):.1f}",
                str(sum(len(each.errors) for each in seen)),
            ]
            yield f"| {' | '.join(cells)} |"

    def missed(self) -> Iterator[str]:
        """Yield a sentence for each target that was missed."""
        for (rows, case), seen in self.seen.items():
            failed = [error for each in seen for error in each.errors]
            if failed and "ours" in case:
                yield f"{rows:,} rows, {case}: {len(failed)} writes failed, the first with: {failed[0].strip()}"
            if "ours" in case and self.ratio(rows, case) > TARGET:
                yield f"{rows:,} rows, {case}: {self.ratio(rows, case):.1f} times idle, the target is {TARGET:.0f}"
        for lost in self.lost:
            yield f"{lost}: not every shadow came back as it was"


def run(bench: Bench, report: Report, rows: int, rounds: int, shares: dict[str, int]) -> None:
    """Run all cases on `rows` devices, `rounds` times. A share of 100 means that one in 100 devices has a shadow."""
    raw = (CHECKOUT / "tests" / "data" / "seed_076_device_shadow.md").read_text()
    raw_up = partial(bench.psql, raw.split("```sql")[1].split("```")[0])
    print(f"{time.strftime('%H:%M:%S')} {rows:>9,} rows  filling {1 + len(shares)} databases", flush=True)
    bench.fill("at_075", rows, every=None)
    for every in shares.values():
        bench.fill(f"at_076_{every}", rows, every=every)
    for _ in range(rounds):
        with bench.copy("at_075") as copy:
            seen, writes = bench.observe(copy, rows, lambda _: time.sleep(IDLE_SECONDS))
            report.idle[rows].append((writes, seen.began, seen.began + seen.window))
            report.add(rows, "idle", seen)
        for case, operation in (("raw SQL", raw_up), ("ours", bench.upgrade)):
            with bench.copy("at_075") as copy:
                report.add(rows, f"upgrade: {case}", bench.observe(copy, rows, operation)[0])
        for case, operation in (("raw SQL", raw_up), ("ours", bench.upgrade)):
            with bench.copy("at_075") as copy, bench.autovacuum(copy) as at_work:
                seen, _ = bench.observe(copy, rows, operation, at_work)
                report.add(rows, f"upgrade while autovacuum works: {case}", seen)
        for share, every in shares.items():
            _down_and_up(bench, report, rows, share, f"at_076_{every}")
    for name in ("at_075", *(f"at_076_{every}" for every in shares.values())):
        bench.execute("postgres", f"DROP DATABASE {name} WITH (FORCE)")


def _down_and_up(bench: Bench, report: Report, rows: int, share: str, template: str) -> None:
    before = bench.shadows(template)
    for case, sql in (("raw SQL, shadows lost", RAW_DOWN), ("raw SQL, shadows copied first", NAIVE_DOWN)):
        with bench.copy(template) as copy:
            report.add(rows, f"downgrade, {share}: {case}", bench.observe(copy, rows, partial(bench.psql, sql))[0])
    with bench.copy(template) as copy:
        report.add(rows, f"downgrade, {share}: ours", bench.observe(copy, rows, bench.downgrade)[0])
        report.add(rows, f"upgrade again, {share}: ours", bench.observe(copy, rows, bench.upgrade)[0])
        if bench.shadows(copy) != before:
            report.lost.append(f"{rows:,} rows, {share}")


def run_as_distributed(bench: Bench, report: Report, rows: int, rounds: int) -> None:
    """Run the ways down below 076 on `rows` devices with a shadow each, `rounds` times."""
    bench.fill("at_head", rows, every=1)
    for _ in range(rounds):
        with bench.copy("at_head") as copy:
            seen, writes = bench.observe(copy, rows, lambda _: time.sleep(IDLE_SECONDS), statement=PATCH)
            report.idle[rows].append((writes, seen.began, seen.began + seen.window))
            report.add(rows, "idle", seen)
        for case, operation in (
            ("with the trigger: ours", bench.downgrade),
            ("as on a distributed table", bench.downgrade_as_distributed),
            ("printed SQL, one transaction", partial(bench.psql, bench.printed_downgrade())),
        ):
            with bench.copy("at_head") as copy:
                report.add(rows, f"downgrade, {case}", bench.observe(copy, rows, operation, statement=PATCH)[0])
    bench.execute("postgres", "DROP DATABASE at_head WITH (FORCE)")


def run_partitioning(bench: Bench, report: Report, rows: int, rounds: int) -> None:
    """Run the steps from a plain table to a partitioned one on `rows` devices with a shadow each, `rounds` times."""
    page = (CHECKOUT / "docs" / "migrations.md").read_text()
    steps = re.findall(
        r"```sql\n(.*?)```", page.partition("### From a plain table")[2].partition("\n## ")[0], re.DOTALL
    )
    bench.fill("at_head", rows, every=1)
    for _ in range(rounds):
        with bench.copy("at_head") as copy:
            seen, writes = bench.observe(copy, rows, lambda _: time.sleep(IDLE_SECONDS))
            report.idle[rows].append((writes, seen.began, seen.began + seen.window))
            report.add(rows, "idle", seen)
            for case, sql in zip(("1: made beside it", "2: filled", "3: takes its place"), steps, strict=True):
                report.add(rows, f"partitioning, {case}", bench.observe(copy, rows, partial(bench.psql, sql))[0])
    bench.execute("postgres", "DROP DATABASE at_head WITH (FORCE)")


INTRODUCTION = """# How long a writer waits while `device_state` is migrated

`{command}`: {writers} processes write heartbeats while the table is migrated, with {pause:g} ms between two writes of a
process. A heartbeat is an `UPDATE` of one random row by its primary key, in a transaction of its own. Each case runs on
a new copy of the same data, one case after another. The figures are medians of {rounds} rounds. A case is observed for
at least {observed:g} seconds.

What is compared is **the longest single write of a case, divided by the longest write of an idle run of the same
length** ("times idle"). Milliseconds depend on the machine; the claim is about the ratios, and whether they grow with
the table. The brackets have the lowest and the highest of the rounds; other load on the machine can only add to them.

* *raw SQL*: the same migration as plain SQL through `psql`. Its `CREATE INDEX` blocks writers while it reads the whole
  table.
* *raw SQL, shadows lost*: one transaction drops the index and the columns. *Shadows copied first*: the same after a
  `CREATE TABLE AS SELECT`, under the lock that is needed to lose nothing.
* *autovacuum works*: autovacuum is working on this table, and a lock on the table has to interrupt it first.

PostgreSQL {version}; {durability}.

"""


def main() -> int:
    """Run the benchmark. Return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 4_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pause", type=float, default=2.0, help="milliseconds between two writes of a process")
    parser.add_argument("--durable", action="store_true", help="fsync, synchronous_commit and full_page_writes on")
    parser.add_argument("--distributed", action="store_true", help="the ways down, one of them that of a Citus cluster")
    parser.add_argument("--partitioning", action="store_true", help="the steps from a plain table to a partitioned one")
    parser.add_argument("--report", type=Path, help="a Markdown file for the table")
    arguments = parser.parse_args()

    logging.getLogger("alembic").setLevel(logging.WARNING)
    report = Report()
    settings = {"shared_buffers": "512MB"} | (DURABLE if arguments.durable else {})
    with throwaway.postgres(settings=settings) as server:
        bench = Bench(server, arguments.pause / 1000)
        for rows in arguments.rows:
            if arguments.distributed:
                run_as_distributed(bench, report, rows, arguments.rounds)
                continue
            if arguments.partitioning:
                run_partitioning(bench, report, rows, arguments.rounds)
                continue
            shares = {"1 % with a shadow": 100} | ({"all with a shadow": 1} if rows <= ALL_UP_TO else {})
            run(bench, report, rows, arguments.rounds, shares)

    table = "\n".join(report.table())
    missed = list(report.missed())
    verdict = "\n".join(f"* missed: {each}" for each in missed) or (
        f"No write failed and no shadow was lost; ours stayed within {TARGET:.0f} times idle in every case."
    )
    print(f"\n{table}\n\n{verdict}")
    if arguments.report:
        introduction = INTRODUCTION.format(
            command=" ".join(["python", "benchmarks/stall.py", *sys.argv[1:]]),
            writers=WRITERS,
            pause=arguments.pause,
            rounds=arguments.rounds,
            observed=OBSERVED_SECONDS,
            version=server.version,
            durability="durable" if arguments.durable else "not durable: this measures locks, not the disk",
        )
        arguments.report.write_text(f"{introduction}{table}\n\n{verdict}\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
