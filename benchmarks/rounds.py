"""Measuring in rounds: each contender has a turn in each round, so that other load on the machine affects all alike."""

from __future__ import annotations

import random
import sys
import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PROGRESS_EVERY = 2.0


@dataclass(frozen=True, slots=True)
class Figure:
    """What one contender needed for one kind of work.

    Attributes:
        section: The group of measurements: "one device", "batches" and so on.
        work: What was done: "replace desired", "1,000 reports" and so on.
        contender: What did it: "ours, long session", "psycopg by hand, autocommit" and so on.
        setting: The durability, or the size of the fleet; "" if there is only one.
        unit: The unit of `rounds`: "s" (for one operation), "bytes", "share" or "operations/s".
        rounds: One value per round. Round n of all contenders of the same work ran at about the same time.
    """

    section: str
    work: str
    contender: str
    setting: str
    unit: str
    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.rounds)

    @property
    def spread(self) -> tuple[float, float]:
        """The lowest and the highest value of a round."""
        return min(self.rounds), max(self.rounds)


def ratio(over: Figure, under: Figure) -> float:
    """Return `over` divided by `under`: the median of the ratios of the rounds."""
    return median(a / b for a, b in zip(over.rounds, under.rounds, strict=True))


class Progress:
    """Prints a line on standard error, at most every two seconds."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._said = 0.0

    def say(self, what: str, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if at_once or now - self._said >= PROGRESS_EVERY:
            self._said = now
            print(f"[{now - self._started:4.0f} s] {what}", file=sys.stderr, flush=True)


def interleaved(
    contenders: Mapping[str, Callable[[], float]], rounds: int, progress: Progress, label: str
) -> dict[str, tuple[float, ...]]:
    """Run each contender once per round, in a different order each time. A first round warms up and is not measured.

    Args:
        contenders: By name, a function that runs one turn and returns its figure, for example seconds per operation.
        rounds: The number of measured rounds.
        progress: Prints how far the measurement is.
        label: What is measured. It also determines the order of the contenders.

    Returns:
        The figures of each contender, one per round.
    """
    order = list(contenders)
    shuffle = random.Random(label).shuffle  # the same orders in each run
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        shuffle(order)
        for name in order:
            progress.say(f"{label}: round {turn} of {rounds}, {name}")
            figure = contenders[name]()
            if turn:
                figures[name].append(figure)
    return {name: tuple(values) for name, values in figures.items()}


def timed(once: Callable[[], object], seconds: float = 0.05) -> Callable[[], float]:
    """Return a turn that repeats `once` for about `seconds` and returns the seconds per call."""
    repeats = 0

    def turn() -> float:
        nonlocal repeats
        if not repeats:
            started = time.perf_counter()
            once()
            repeats = max(1, round(seconds / max(time.perf_counter() - started, 1e-9)))
            once()
        started = time.perf_counter()
        for _ in range(repeats):
            once()
        return (time.perf_counter() - started) / repeats

    return turn
