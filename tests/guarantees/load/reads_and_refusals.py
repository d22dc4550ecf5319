"""Whether what writers were told was true when they were told: reads and refusals, judged by the history.

A version can have been seen if its write had begun by then, and must have been passed if a later one was acknowledged
before the question.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from tests.guarantees.load.record import READ, WRITTEN, Entry, Operation, Told, Unit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tests.guarantees.load.history import Key, Stand

REJECTED: Final = "rejected"  # a good entry in a batch that was rejected for another


class _Timeline:
    """Which `desired_version` a device can have stood at, at any time."""

    def __init__(self, chain: Sequence[Stand], makers: Sequence[Unit | None]) -> None:
        steps = [
            (new, unit)
            for old, new, unit in zip(chain, chain[1:], makers, strict=False)
            if new.desired_version != old.desired_version
        ]
        starts = [unit.start if unit else float("-inf") for _, unit in steps]
        ends = [unit.end if unit else float("inf") for _, unit in steps]
        self._base = chain[0].desired_version
        # Later versions cannot have begun to be visible earlier, nor have been committed later.
        self._started = list(accumulate(starts, max))
        self._committed = list(accumulate(reversed(ends), min))[::-1]
        self.documents = {stand.desired_version: stand.desired for stand in (chain[0], *(new for new, _ in steps))}
        self.reported_versions = {stand.reported_version for stand in chain}

    def can_have_stood(self, version: int | None, unit: Unit, own: int) -> bool:
        """Whether the unit can have met this version; `own` writes of its own, even if undone, come on top."""
        lowest = self._base + bisect_left(self._committed, unit.start)
        highest = self._base + bisect_left(self._started, unit.end) + own
        return version is not None and lowest <= version <= highest


def unfounded_answers(
    units: Sequence[Unit], chains: Mapping[Key, Sequence[Stand]], makers: Mapping[Key, Sequence[Unit | None]]
) -> list[str]:
    """A sentence for each answer that cannot have been true."""
    timelines = {key: _Timeline(chain, makers.get(key, ())) for key, chain in chains.items()}
    found: list[str] = []
    for unit in units:
        written: set[Key] = set()
        for operation, answer in zip(unit.operations, unit.answers or (), strict=False):
            for entry, told in zip(operation.entries, answer, strict=True):
                key = operation.tenant, entry.device
                own = sum(len(each.entries) for each in unit.operations) if key in written else 0
                written.add(key)
                found += [
                    f"{unit.name}, {operation.kind} of {'/'.join(key)} with {entry.guard}: {wrong}, got {told}"
                    for wrong in _wrong(operation, entry, told, unit, timelines.get(key), own)
                ]
    return found


def _wrong(
    operation: Operation, entry: Entry, told: Told, unit: Unit, timeline: _Timeline | None, own: int
) -> Iterator[str]:
    if told.status == REJECTED:
        return  # another entry stands for it
    if told.status not in _FOUNDED:
        yield "an answer that the contract does not have"
    elif not _FOUNDED[told.status](operation, entry, told, timeline):
        yield "there was no reason for that"
    elif told.status in {READ, "VersionConflict", "UnknownVersion"} and timeline is not None:
        if not timeline.can_have_stood(told.desired_version, unit, own):
            yield "the device did not stand at that version then"
        elif told.status == READ and not own and told.document != timeline.documents.get(told.desired_version or 0):
            yield f"that version is {timeline.documents.get(told.desired_version or 0)}"
    elif (
        told.status == "LateReport"
        and timeline is not None
        and not (own or told.reported_version in timeline.reported_versions)
    ):
        yield "that version was never acknowledged"


def _is_written(operation: Operation, entry: Entry, told: Told, timeline: _Timeline | None) -> bool:
    acknowledges = operation.section == "reported" and entry.guard is not None
    return timeline is not None and (not acknowledges or told.reported_version == entry.guard)


# By answer: whether the question and what came with the answer bear it out.
_FOUNDED: Final[dict[str, Callable[[Operation, Entry, Told, _Timeline | None], bool]]] = {
    WRITTEN: _is_written,
    READ: lambda _operation, _entry, _told, timeline: timeline is not None,
    "DeviceNotFound": lambda _operation, _entry, _told, timeline: timeline is None,
    "InvalidDocument": lambda _operation, entry, _told, _timeline: "\0" in entry.document.values(),
    "VersionConflict": lambda _operation, entry, told, _timeline: entry.guard not in {None, told.desired_version},
    "UnknownVersion": lambda _operation, entry, told, _timeline: (entry.guard or 0) > (told.desired_version or 0),
    "LateReport": lambda _operation, entry, told, _timeline: (
        entry.guard is not None and entry.guard < (told.reported_version or 0)
    ),
}
