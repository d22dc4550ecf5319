"""Measuring side by side: contenders take turns, round by round, so that what else the machine does hits all alike."""

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
        section: The kind of measurement: "one device", "batches" ...
        work: What was done: "replace desired", "1,000 reports" ...
        contender: Who did it.
        setting: Durability, or the fleet's size; "" where there is but one.
        unit: Of `rounds`: "s" a piece of work, "bytes", "operations/s".
        rounds: One value a round; round n of one contender ran beside round n of all others of its work.
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
        """The fastest and the slowest round."""
        return min(self.rounds), max(self.rounds)


def ratio(over: Figure, under: Figure) -> float:
    """How often `under` goes into `over`: the median over the rounds, each compared within itself."""
    return median(a / b for a, b in zip(over.rounds, under.rounds, strict=True))


class Progress:
    """One line on standard error, at most every two seconds."""

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
    """Run every contender once a round, in another order each time; one more round before warms up and is not counted.

    Args:
        contenders: By name, what runs one turn and returns its figure (seconds a piece of work, operations a second).
        rounds: How many count.
        progress: Where to say how far it is.
        label: What is being measured.
    """
    order = list(contenders)
    shuffle = random.Random(label).shuffle  # the same order each run
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
    """A turn that repeats `once` for about `seconds` and returns the seconds a piece."""
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
