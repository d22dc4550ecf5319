"""Progress on stderr, and the result on stdout: for people, or as one JSON document."""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from iot_models.cli.tables import print_json, print_table, say
from iot_models.testing.load.verdict import verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from iot_models.testing.load.meters import Percentiles
    from iot_models.testing.load.verdict import Measured

_EVERY: Final = 5.0  # seconds between two lines, where there is no bar


class Progress:
    """How far it is, on stderr: a bar on a terminal where rich is installed, else a line from time to time."""

    def __init__(self) -> None:
        self._bar = _bar() if sys.stderr.isatty() else None
        self._task: Any = None
        self._what = ""
        self._total = 0.0
        self._next = 0.0

    def begin(self, what: str, total: float) -> None:
        """Something begins that takes so many steps."""
        self.end()
        self._what, self._total = what, total
        self._next = time.monotonic() + _EVERY
        if self._bar:
            self._task = self._bar.add_task(what, total=total, note="")
            self._bar.start()
        else:
            say(sys.stderr, f"{what} ...")

    def at(self, done: float, note: str = "") -> None:
        """So many of the steps are done."""
        if self._bar:
            self._bar.update(self._task, completed=done, note=note)
        elif time.monotonic() >= self._next:
            self._next += _EVERY
            say(sys.stderr, f"{self._what}: {done:,.0f} of {self._total:,.0f}{f', {note}' if note else ''}")

    def end(self) -> None:
        """Nothing goes on any more: what is printed now stands below."""
        if self._bar:
            self._bar.stop()


def _bar() -> Any:
    """None without rich."""
    try:
        from rich.console import Console  # noqa: PLC0415 - it may be missing
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415
    except ImportError:
        return None
    return Progress(
        TextColumn("{task.description:15}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(file=sys.stderr),
    )


def print_measured(measured: Measured) -> None:
    """Print the result for people."""
    print_table(sys.stdout, ("measured", ""), [*_rows(measured)], wide=1)
    say(sys.stdout, "")
    say(sys.stdout, verdict(measured))


def print_measured_as_json(measured: Measured) -> None:
    """Print the result for programs."""
    names = ("achieved", "is_reached", "batch", "batch_seconds")
    computed = {name: getattr(measured, name) for name in names}
    print_json(sys.stdout, computed | {"verdict": verdict(measured)} | asdict(measured))


def _rows(measured: Measured) -> Iterator[tuple[str, str]]:
    m = measured
    yield "reports", f"{m.achieved:,.0f} a second of {m.rate:,.0f} for {m.seconds:,.0f} s"
    yield "accepted", f"{m.done:,} of {m.due:,}{_failures(m.refused, m.errors)}"
    if m.unsent or m.unanswered:
        yield "not written", f"{m.unsent:,} never begun, {m.unanswered:,} without an answer at the end"
    yield "latency", _percentiles(m.latency)
    yield "batches", f"{m.batches:,} of {m.batch:,.1f} reports, {m.batch_seconds * 1000:,.1f} ms each"
    if m.desired_due:
        yield "desired writes", f"{m.desired_done:,} of {m.desired_due:,}{_failures({}, m.desired_errors)}"
        yield "their latency", _percentiles(m.desired_latency)
    yield "this process", f"{m.cpu:.2f} cores, event loop busy {m.busy:.0%}"
    yield "connections", f"{m.connections}, in use {m.pool_used:.0%}; all of them at once {m.pool_full:.0%} of the time"
    yield "our sessions", f"{_counted(m.waits)} (in {m.looks} looks)"
    yield "WAL", _wal(m)
    yield "HOT updates", f"{(m.hot_updates or 0) / m.updates:.0%} of {m.updates:,}" if m.updates else "not counted"


def _wal(measured: Measured) -> str:
    if measured.wal is None:
        return "not for this role to read"
    return f"{measured.wal / max(measured.done_in_time, 1):,.0f} bytes a report; what others wrote meanwhile counts in"


def _failures(refused: Mapping[str, int], errors: Mapping[str, int]) -> str:
    return "".join(f"; {name}: {times:,}" for name, times in (*refused.items(), *errors.items()))


def _percentiles(latency: Percentiles | None) -> str:
    if latency is None:
        return "none"
    values = {"p50": latency.p50, "p95": latency.p95, "p99": latency.p99, "max": latency.max}
    return ", ".join(f"{name} {seconds * 1000:,.1f} ms" for name, seconds in values.items())


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {times}" for name, times in Counter(counts).most_common()) or "never seen at work"
