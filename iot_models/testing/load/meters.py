"""What is measured in this process: latencies, how busy the pool is, how busy the event loop is."""

from __future__ import annotations

import math
import selectors
import time
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import event

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

_STEPS: Final = 100  # of a bucket's logarithm: a percentile is exact to one in a hundred
_SHORTEST: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of latencies, in seconds."""

    p50: float
    p95: float
    p99: float
    max: float


class Latencies:
    """A histogram: its memory does not grow with the number of latencies."""

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()
        self._max = 0.0

    def add(self, seconds: float) -> None:
        """Count a latency."""
        self._buckets[math.ceil(math.log(max(seconds, _SHORTEST)) * _STEPS)] += 1
        self._max = max(self._max, seconds)

    def percentiles(self) -> Percentiles | None:
        """None if there are none."""
        if not self._buckets:
            return None
        return Percentiles(self._at(50), self._at(95), self._at(99), self._max)

    def _at(self, percent: int) -> float:
        reached = self._buckets.total() * percent / 100
        seen = accumulate(self._buckets[bucket] for bucket in sorted(self._buckets))
        bucket = next(bucket for bucket, count in zip(sorted(self._buckets), seen, strict=True) if count >= reached)
        return min(math.exp(bucket / _STEPS), self._max)


class LoopClock(selectors.DefaultSelector):
    """An event loop's selector, which knows how long the loop had nothing to do."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """As the selector's; the time in it is idle time."""
        began = time.perf_counter()
        try:
            return super().select(timeout)
        finally:
            self.idle += time.perf_counter() - began


class PoolClock:
    """How long connections of a pool were in use, and how long all of them were at once.

    Attributes:
        used: Seconds, of all connections together.
        full: Seconds in which no connection was free.
    """

    def __init__(self, engine: AsyncEngine, size: int) -> None:
        self.used = self.full = 0.0
        self._size = size
        self._in_use = 0
        self._is_on = False
        self._since = 0.0
        event.listen(engine.sync_engine, "checkout", self._out)
        event.listen(engine.sync_engine, "checkin", self._in)

    def start(self) -> None:
        """Count from now on."""
        self._since = time.perf_counter()
        self._is_on = True

    def stop(self) -> None:
        """Count until now."""
        self._count()
        self._is_on = False

    def _out(self, *_: Any) -> None:
        self._count()
        self._in_use += 1

    def _in(self, *_: Any) -> None:
        self._count()
        self._in_use -= 1

    def _count(self) -> None:
        if self._is_on:
            now = time.perf_counter()
            passed, self._since = now - self._since, now
            self.used += passed * self._in_use
            self.full += passed * (self._in_use >= self._size)
