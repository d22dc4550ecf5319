"""What the measurements mean: whether the rate was reached, and if not, what the bottleneck is and what shows it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from iot_models.testing.load.observation import CLIENT, CPU

if TYPE_CHECKING:
    from collections.abc import Mapping

    from iot_models.testing.load.meters import Percentiles

# How much of what was due may be missing at the end, besides what any run has under way at its end.
_MISSING: Final = 0.02
_UNDER_WAY: Final = 0.25  # seconds at most
# Shares from which on something counts as busy nearly all the time, as what happens mostly, and as full.
_BUSY: Final = 0.85
_MOSTLY: Final = 0.5
_FULL: Final = 0.8
# How many of our sessions are at work in the server on average, where it is the bottleneck.
_SERVER: Final = 0.75
_SMALL_BATCH: Final = 200
_INSIDE: Final = {
    CPU: "the server's processors",
    "IO": "the server's disk",
    "IPC": "other processes that the server waits for, such as a synchronous standby",
    "LWLock": "locks inside of the server, which many writers want at once",
    "Timeout": "a pause that a trigger or a setting of the server makes",
}


@dataclass(frozen=True)
class Measured:
    """What a run measured. Times are in seconds, shares between 0 and 1.

    Attributes:
        rate: Reports a second that were asked for.
        seconds: For how long.
        due: How many reports were due.
        done: How many were accepted.
        done_in_time: How many of them before the end.
        unsent: How many were never begun, because too many were under way.
        unanswered: How many had no outcome half a minute after the end.
        refused: How many had another outcome, by its name.
        errors: How many ended in an error, by SQLSTATE.
        latency: From the time at which a report was due.
        desired_due: As `due`, of the desired writes; so are those that follow.
        desired_done: See there.
        desired_errors: See there.
        desired_latency: See there.
        batches: How many transactions wrote the reports.
        max_batch: How many reports a batch may have.
        max_delay: How long the first one of a batch waits for others.
        tenants: How many tenants there are.
        connections: How many connections the pool has.
        pool_used: Which share of the connections was in use.
        pool_full: Which share of the time no connection was free.
        cpu: How many cores this process used.
        busy: Which share of the time the event loop had something to do.
        looks: How often it was looked what our sessions do.
        waits: What they waited for, by how often it was seen.
        blockers: Which applications held locks that they waited for, by how often it was seen.
        wal: Bytes of WAL that the server wrote.
        updates: How many rows of the table were updated.
        hot_updates: How many of them without a new index entry.
    """

    rate: float
    seconds: float
    due: int
    done: int
    done_in_time: int
    unsent: int
    unanswered: int
    refused: Mapping[str, int]
    errors: Mapping[str, int]
    latency: Percentiles | None
    desired_due: int
    desired_done: int
    desired_errors: Mapping[str, int]
    desired_latency: Percentiles | None
    batches: int
    max_batch: int
    max_delay: float
    tenants: int
    connections: int
    pool_used: float
    pool_full: float
    cpu: float
    busy: float
    looks: int
    waits: Mapping[str, int]
    blockers: Mapping[str, int]
    wal: int | None
    updates: int | None
    hot_updates: int | None

    @property
    def achieved(self) -> float:
        """Reports a second that were accepted until the end."""
        return self.done_in_time / self.seconds

    @property
    def is_reached(self) -> bool:
        """Whether the database kept up with the rate until the end."""
        under_way = self.rate * min(self.max_delay + (self.latency.p50 if self.latency else 0), _UNDER_WAY)
        return self.done_in_time >= self.due * (1 - _MISSING) - under_way

    @property
    def inside(self) -> Counter[str]:
        """What our sessions waited for inside of the server."""
        return Counter({what: times for what, times in self.waits.items() if what != CLIENT})

    @property
    def batch(self) -> float:
        """How many reports a batch had on average."""
        return (self.done + sum(self.refused.values())) / max(self.batches, 1)

    @property
    def batch_seconds(self) -> float:
        """How long a connection was taken for a batch; desired writes count in."""
        return self.pool_used * self.connections * self.seconds / max(self.batches, 1)


def verdict(measured: Measured) -> str:
    """Whether the rate was reached, and what that is owed to, in a sentence or two."""
    if measured.is_reached:
        return f"The rate was reached: {measured.achieved:,.0f} reports/s. {_where_the_latency_is_from(measured)}"
    return (
        f"Only {measured.achieved:,.0f} of {measured.rate:,.0f} reports/s were reached. "
        f"Bottleneck: {bottleneck(measured)}"
    )


def _where_the_latency_is_from(measured: Measured) -> str:
    if measured.latency and measured.batch < measured.max_batch / 2:
        half, waited = measured.latency.p50 * 1000, measured.max_delay * 1000
        return (
            f"There is room for more: batches go out with {measured.batch:,.0f} of {measured.max_batch:,} reports. "
            f"Half of the reports take {half:,.0f} ms or less, of which they wait up to {waited:,.0f} ms for others "
            "(--max-delay-ms)."
        )
    return f"There is not much room for more: batches have {measured.batch:,.0f} of {measured.max_batch:,} reports."


def bottleneck(measured: Measured) -> str:
    """What kept the rate from being reached, and what shows it."""
    return (
        _errors(measured)
        or _locks(measured)
        or _this_process(measured)
        or _pool(measured)
        or _server(measured)
        or _order(measured)
    )


def _errors(measured: Measured) -> str | None:
    failed = Counter(measured.errors) + Counter(measured.refused)
    if failed.total() <= measured.done:
        return None
    (name, times), *_ = failed.most_common()
    return f"writes fail. {times:,} of {failed.total() + measured.done:,} reports ended in {name}."


def _locks(measured: Measured) -> str | None:
    locks = sum(times for what, times in measured.waits.items() if what.startswith("Lock:"))
    if locks < _MOSTLY * sum(measured.waits.values()) or not locks:
        return None
    holders = ", ".join(repr(name) for name, _ in Counter(measured.blockers).most_common(3))
    by = f", held by {holders or 'a session that has gone'}"
    return f"rows or tables that are locked. Our sessions wait for a lock {_share(locks, measured)}{by}."


def _this_process(measured: Measured) -> str | None:
    if measured.busy < _BUSY:
        return None
    if measured.cpu >= _BUSY * measured.busy:
        return (
            f"this process. Its event loop is busy {measured.busy:.0%} of the time and uses {measured.cpu:.2f} cores: "
            "run several of them at once, as the service behind it would."
        )
    return (
        f"the processors of this machine. The event loop is busy {measured.busy:.0%} of the time, and got only "
        f"{measured.cpu:.2f} cores for it: others run here, the server perhaps."
    )


def _pool(measured: Measured) -> str | None:
    wanted = measured.tenants + (1 if measured.desired_due else 0)
    if measured.pool_full < _FULL or wanted <= measured.connections:
        return None
    return (
        f"the connection pool. No connection of {measured.connections} was free {measured.pool_full:.0%} of the time, "
        f"and {measured.tenants} tenants have batches to write (--connections). {_sessions(measured)}"
    )


def _server(measured: Measured) -> str | None:
    inside = measured.inside
    if inside.total() < _SERVER * measured.looks or not inside:
        return None
    ((what, times),) = inside.most_common(1)
    kind = what.partition(":")[0]
    if what.lower().endswith(("walsync", "walwrite")):
        named = "the server's disk, to which each commit writes its WAL"
    else:
        named = _INSIDE.get(kind, f"what the server calls {kind}")
    return f"{named}. {_sessions(measured)} Most often: {what}, {_share(times, measured)}."


def _order(measured: Measured) -> str:
    """The batches of a tenant are written one after another, and neither side is busy all the time."""
    waiting = measured.inside.total() / max(measured.looks, 1)
    if measured.busy + waiting >= _FULL:
        why = "this process and the server work in turns"
    else:
        why = "most of the time both wait: for the network between them, or for processors that others use"
    small = measured.max_batch <= _SMALL_BATCH <= measured.batch * _SMALL_BATCH / (_FULL * measured.max_batch)
    return (
        f"the order of a tenant's reports: its batches are written one after another, and {why}. A batch of "
        f"{measured.batch:,.0f} reports takes {measured.batch_seconds * 1000:,.1f} ms; the event loop is busy "
        f"{measured.busy:.0%} of the time. {_sessions(measured)} More tenants would be written at once (--tenants)"
        f"{', and larger batches cost less a report (--max-batch)' if small else ''}."
    )


def _sessions(measured: Measured) -> str:
    return f"In {measured.looks} looks at our sessions, {measured.inside.total()} were at work in the server."


def _share(times: int, measured: Measured) -> str:
    return f"{times / max(sum(measured.waits.values()), 1):.0%} of the times that they were seen in a transaction"
