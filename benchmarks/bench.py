"""How fast is the service, compared with the upper limit and with what a user would write instead?

    python benchmarks/bench.py [--rounds 9] [--only SECTION ...] [--no-report]

It runs on a throwaway server, once durable (each commit waits for the disk) and once with `synchronous_commit=off`. If
IOT_MODELS_BENCH_URL is set, it runs on that server, in a database of its own (`iot_models_bench`), which it drops. It
prints its tables and writes benchmarks/results.md and the plots beside it. The tables say which targets are missed; the
exit code is 0 all the same.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import batches
import buffer
import fleet
import limits
import psycopg
import single
import storage
import tasks
import twins
from fleet_data import database, load, plain
from plots import draw
from report import markdown, to_terminal
from rounds import Figure, Progress
from targets import DURABLE, RELAXED, judge

from iot_models.engine import normalize_url
from iot_models.testing import throwaway

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).resolve().parent
URL_VARIABLE = "IOT_MODELS_BENCH_URL"
SECTIONS = ("one device", "tasks", "buffer", "batches", "fleet", "storage", "documents", "limits")
FLEETS = (10_000, 100_000, 1_000_000)
SETTINGS = {DURABLE: {"synchronous_commit": "on"}, RELAXED: {"synchronous_commit": "off"}}
# Settings as in production. The throwaway server's own defaults are not durable.
SERVER = {
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    "shared_buffers": "1GB",
    "max_wal_size": "8GB",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="number of measured rounds (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="some sections only")
    parser.add_argument("--no-report", action="store_true", help="print the tables and write no file")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    progress = Progress()
    with server() as (url, tools, name):
        progress.say(f"PostgreSQL {name}", at_once=True)
        figures = measure(url, tools, arguments.rounds, arguments.only, progress)
    targets = judge(figures) if set(arguments.only) == set(SECTIONS) else []
    to_terminal(figures, targets)
    if targets and not arguments.no_report:
        (HERE / "results.md").write_text(markdown(figures, targets, name, arguments.rounds))
        for path in (HERE / "results.md", *draw(figures, HERE / "plots")):
            progress.say(f"wrote {path.relative_to(HERE.parent)}", at_once=True)


@contextmanager
def server() -> Iterator[tuple[str, Path, str]]:
    """Provide the server's URL, the folder of its pgbench, and its description."""
    given = os.environ.get(URL_VARIABLE)
    if not given:
        with throwaway.postgres(settings=SERVER) as own:
            yield own.url, own.bin, f"{own.version}, throwaway"
        return
    url = normalize_url(given).render_as_string(hide_password=False)
    with psycopg.connect(plain(url)) as connection:
        version = connection.info.parameter_status("server_version")
    on_path = shutil.which("pgbench")
    yield url, Path(on_path).parent if on_path else throwaway.wheel_binaries(), f"{version}, {URL_VARIABLE}"


def measure(url: str, tools: Path, rounds: int, only: list[str], progress: Progress) -> list[Figure]:
    figures: list[Figure] = []
    for setting, configuration in SETTINGS.items():
        for section, measured in {
            "one device": partial(single.measure, tools=tools),
            "tasks": tasks.measure,
            "buffer": buffer.measure,
            "batches": batches.measure,
        }.items():
            if section in only:
                with database(url, "iot_models_bench", **configuration) as own:
                    figures += measured(own, setting, rounds=rounds, progress=progress)
    if {"fleet", "storage"} & set(only):
        for devices in FLEETS:
            figures += _fleet(url, devices, rounds, only, progress)
    if "documents" in only:
        figures += twins.measure(rounds, progress)
    if "limits" in only:
        with database(url, "iot_models_bench", **SETTINGS[RELAXED]) as own:
            figures += limits.measure(own, rounds, progress)
    return figures


def _fleet(url: str, devices: int, rounds: int, only: list[str], progress: Progress) -> list[Figure]:
    figures: list[Figure] = []
    with ExitStack() as stack:
        own = stack.enter_context(database(url, "iot_models_bench", **SETTINGS[RELAXED]))
        progress.say(f"loading {devices:,} devices", at_once=True)
        load(own, devices)
        if "fleet" in only:
            figures += fleet.measure(own, devices, rounds, progress)
        if devices == FLEETS[-1]:
            if "storage" in only:
                figures += storage.measure(own, devices, progress)
            if "fleet" in only:
                progress.say(f"making all of {devices:,} devices pending", at_once=True)
                fleet.make_all_pending(own)
                figures += fleet.memory(own, devices, progress)
    return figures


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
