"""The targets, as ratios within one run, and whether this run meets them."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import buffer
from by_hand import CORE
from rounds import ratio

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rounds import Figure

DURABLE = "durable"
RELAXED = "synchronous_commit=off"


@dataclass(frozen=True, slots=True)
class Target:
    """One target: `value` must be at least `wanted`, or with `at_most` no more than `wanted`."""

    promise: str
    setting: str
    wanted: float
    value: float
    at_most: bool = False

    @property
    def is_met(self) -> bool:
        return self.value <= self.wanted if self.at_most else self.value >= self.wanted


class Run:
    """The figures of a run, by section, work, contender and setting."""

    def __init__(self, figures: list[Figure]) -> None:
        self._figures = {(f.section, f.work, f.contender, f.setting): f for f in figures}

    def figure(self, section: str, work: str, contender: str, setting: str) -> Figure:
        return self._figures[section, work, contender, setting]


def judge(figures: list[Figure]) -> list[Target]:
    run = Run(figures)
    return [
        *(target for setting in (DURABLE, RELAXED) for target in _writes(run, setting)),
        *_fleet(run),
        *_limits(figures, run),
    ]


def _writes(run: Run, setting: str) -> Iterator[Target]:
    """Each is compared with what has the same to do: nobody here can change what SQLAlchemy and the driver cost."""
    one = "one device"
    for work in ("replace desired", "report"):
        by_core = run.figure(one, work, f"{CORE}, history", setting)
        ours = run.figure(one, work, "ours, long session, AUTOCOMMIT", setting)
        yield Target(f"{work}, long session: over Core by hand", setting, 1.05, ratio(ours, by_core), at_most=True)
    bare = run.figure(one, "replace desired", "ours, long session, AUTOCOMMIT, no history", setting)
    ours = run.figure(one, "replace desired", "ours, long session, AUTOCOMMIT", setting)
    yield Target("a write with its history: over one without", setting, 1.15, ratio(ours, bare), at_most=True)
    of_1000 = [
        run.figure("batches", f"patches, {setting}", name, "1,000") for name in ("ours, one call", "ours, no history")
    ]
    yield Target("1,000 patches with their history: over as many without", setting, 1.3, ratio(*of_1000), at_most=True)

    work, size = f"reports, {setting}", "1,000"
    for driver, name in (("psycopg", "ours, one call"), ("asyncpg", "ours (asyncpg), one call")):
        hand = run.figure("batches", work, f"{driver} by hand, with our guarantees", size)
        ours = run.figure("batches", work, name, size)
        promise = f"1,000 reports in one call: over one statement by hand, {driver}"
        yield Target(promise, setting, 1.5, ratio(ours, hand), at_most=True)

    work = f"reports, {buffer.TASKS} tasks"
    for driver in ("psycopg", "asyncpg"):
        calls, buffered = (f"ours ({driver}), {name}" for name in ("a call for each report", "ReportBuffer"))
        times = ratio(run.figure("buffer", work, buffered, setting), run.figure("buffer", work, calls, setting))
        yield Target(f"ReportBuffer, {driver}: times a call for each report", setting, 5, times)
        latency = run.figure("buffer", buffer.LATENCY, buffered, setting)
        batch = run.figure("buffer", buffer.BATCH, buffered, setting)
        share = median(a / (buffer.MAX_DELAY + 2 * b) for a, b in zip(latency.rounds, batch.rounds, strict=True))
        promise = f"ReportBuffer, {driver}: 99th percentile over max_delay and two batches"
        yield Target(promise, setting, 1, share, at_most=True)


def _fleet(run: Run) -> Iterator[Target]:
    """From the smallest fleet that has a full page on: a deep page has its last tenth, one in 500 is refused."""
    for page, smallest in (
        ("page of pending, first", 10_000),
        ("page of pending, deep", 100_000),
        ("page of refused", 100_000),
        ("page of changes, first", 10_000),
        ("page of changes, deep", 10_000),
    ):
        small, large = (run.figure("fleet", page, "ours", f"{devices:,} devices") for devices in (smallest, 1_000_000))
        yield Target(f"{page}: at 1,000,000 devices over {smallest:,}", "", 1.5, ratio(large, small), at_most=True)


def _limits(figures: list[Figure], run: Run) -> Iterator[Target]:
    """The dearest document of each kind of work."""
    for work in dict.fromkeys(f.setting for f in figures if f.section == "limits"):
        ordinary = run.figure("limits", "ordinary", "ours", work)
        dear = {f.work: ratio(f, ordinary) for f in figures if (f.section, f.setting) == ("limits", work)}
        kind = max(dear, key=dear.__getitem__)
        yield Target(f"{work}: the dearest document ({kind}) over an ordinary one", "", 5, dear[kind], at_most=True)
