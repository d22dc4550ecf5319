"""The targets, as ratios within one run, and whether this run meets them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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
        *_documents(run),
        *_limits(figures, run),
    ]


def _writes(run: Run, setting: str) -> Iterator[Target]:
    one = "one device"
    hand = run.figure(one, "replace desired", "psycopg by hand, autocommit", setting)
    long = run.figure(one, "replace desired", "ours, long session, AUTOCOMMIT", setting)
    bare = run.figure(one, "replace desired", "ours, long session, AUTOCOMMIT, no history", setting)
    yield Target(
        "a write, long session on AUTOCOMMIT, no history: of psycopg by hand", setting, 0.75, ratio(hand, bare)
    )
    yield Target("a write with its history: of one without", setting, 1.15, ratio(long, bare), at_most=True)
    of_1000 = [
        run.figure("batches", f"patches, {setting}", name, "1,000") for name in ("ours, one call", "ours, no history")
    ]
    yield Target("1,000 patches with their history: of as many without", setting, 1.3, ratio(*of_1000), at_most=True)
    orm = run.figure(one, "replace desired", "ORM, session per write", setting)
    short = run.figure(one, "replace desired", "ours, session per write", setting)
    yield Target("a session per write: times the ORM", setting, 1.6, ratio(orm, short))

    work, size = f"reports, {setting}", "1,000"
    ours = run.figure("batches", work, "ours, one call", size)
    for driver in ("psycopg", "asyncpg"):
        hand = run.figure("batches", work, f"{driver} by hand, one statement", size)
        yield Target(f"1,000 reports in one call: of one statement by hand, {driver}", setting, 0.75, ratio(hand, ours))
    loop = run.figure("batches", work, "ORM, loop", size)
    yield Target("1,000 reports in one call: times the ORM loop", setting, 20, ratio(loop, ours))

    tasks, work = "32 tasks", f"report, {setting}"
    hand = run.figure("tasks", work, "asyncpg by hand", tasks)
    ours = run.figure("tasks", work, "ours (asyncpg), long sessions", tasks)
    yield Target("32 async tasks: of asyncpg by hand", setting, 0.6, ratio(ours, hand))


def _fleet(run: Run) -> Iterator[Target]:
    for page in ("first", "deep"):
        small, large = (
            run.figure("fleet", f"page of pending, {page}", "ours", f"{devices:,} devices")
            for devices in ((10_000 if page == "first" else 100_000), 1_000_000)
        )
        since = small.setting.split()[0]
        yield Target(
            f"a page of pending, {page}: at 1,000,000 devices over {since}", "", 1.5, ratio(large, small), at_most=True
        )


def _documents(run: Run) -> Iterator[Target]:
    for document in ("small", "ordinary", "large"):
        for state in ("in sync", "5 % differ"):
            name = f"{document}, {state}"
            ours, loop, deepdiff = (
                run.figure("documents", "compute_delta", contender, name)
                for contender in ("ours", "plain loop with ==", "deepdiff")
            )
            yield Target(f"compute_delta, {name}: times a plain loop", "", 3, ratio(ours, loop), at_most=True)
            yield Target(f"compute_delta, {name}: faster than deepdiff", "", 20, ratio(deepdiff, ours))


def _limits(figures: list[Figure], run: Run) -> Iterator[Target]:
    """The dearest document of each kind of work."""
    for work in dict.fromkeys(f.setting for f in figures if f.section == "limits"):
        ordinary = run.figure("limits", "ordinary", "ours", work)
        dear = {f.work: ratio(f, ordinary) for f in figures if (f.section, f.setting) == ("limits", work)}
        kind = max(dear, key=dear.__getitem__)
        yield Target(f"{work}: the dearest document ({kind}) over an ordinary one", "", 5, dear[kind], at_most=True)
