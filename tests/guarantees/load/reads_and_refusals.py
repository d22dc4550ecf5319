"""Whether what writers were told was true when they were told: reads and refusals, judged by the history.

A version can have been seen if its write had begun by then, and must have been passed if a later one was acknowledged
before the question.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from iot_models import ReportStatus
from tests.guarantees.load.record import READ, WRITTEN, Answer, Entry, Operation, Unit
from tests.reference.versions import is_conflict, status_of_report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tests.guarantees.load.history import Key, State

REJECTED: Final = "rejected"  # a good entry in a batch that was rejected for another


class _Timeline:
    """Which `desired_version` a device can have stood at, at any time."""

    def __init__(self, chain: Sequence[State], authors: Sequence[Unit | None]) -> None:
        steps = [
            (new, unit)
            for old, new, unit in zip(chain, chain[1:], authors, strict=False)
            if new.desired_version != old.desired_version
        ]
        starts = [unit.start if unit else float("-inf") for _, unit in steps]
        ends = [unit.end if unit else float("inf") for _, unit in steps]
        self._base = chain[0].desired_version
        # Later versions cannot have begun to be visible earlier, nor have been committed later.
        self._started = list(accumulate(starts, max))
        self._committed = list(accumulate(reversed(ends), min))[::-1]
        self.documents = {state.desired_version: state.desired for state in (chain[0], *(new for new, _ in steps))}
        self.reported_versions = {state.reported_version for state in chain}

    def can_have_stood(self, version: int | None, unit: Unit, own: int) -> bool:
        """Whether the unit can have met this version; `own` writes of its own, even if undone, come on top."""
        lowest = self._base + bisect_left(self._committed, unit.start)
        highest = self._base + bisect_left(self._started, unit.end) + own
        return version is not None and lowest <= version <= highest


def unfounded_answers(
    units: Sequence[Unit], chains: Mapping[Key, Sequence[State]], authors: Mapping[Key, Sequence[Unit | None]]
) -> list[str]:
    """A sentence for each answer that cannot have been true."""
    timelines = {key: _Timeline(chain, authors.get(key, ())) for key, chain in chains.items()}
    found: list[str] = []
    for unit in units:
        written: set[Key] = set()
        for operation, answers in zip(unit.operations, unit.answers or (), strict=False):
            for entry, answer in zip(operation.entries, answers, strict=True):
                key = operation.tenant, entry.device
                own = sum(len(each.entries) for each in unit.operations) if key in written else 0
                written.add(key)
                found += [
                    f"{unit.name}, {operation.kind} of {'/'.join(key)} with {entry.guard}: {wrong}, got {answer}"
                    for wrong in _wrong(operation, entry, answer, unit, timelines.get(key), own)
                ]
    return found


def _wrong(
    operation: Operation, entry: Entry, answer: Answer, unit: Unit, timeline: _Timeline | None, own: int
) -> Iterator[str]:
    if answer.status == REJECTED:
        return  # another entry stands for it
    if answer.status not in _FOUNDED:
        yield "an answer that the contract does not have"
    elif not _FOUNDED[answer.status](operation, entry, answer, timeline):
        yield "there was no reason for that"
    elif answer.status in {READ, "VersionConflict", "UnknownVersion"} and timeline is not None:
        if not timeline.can_have_stood(answer.desired_version, unit, own):
            yield "the device did not stand at that version then"
        elif (
            answer.status == READ and not own and answer.document != timeline.documents.get(answer.desired_version or 0)
        ):
            yield f"that version is {timeline.documents.get(answer.desired_version or 0)}"
    elif (
        answer.status == "LateReport"
        and timeline is not None
        and not (own or answer.reported_version in timeline.reported_versions)
    ):
        yield "that version was never acknowledged"


def _is_written(operation: Operation, entry: Entry, answer: Answer, timeline: _Timeline | None) -> bool:
    acknowledges = operation.section == "reported" and isinstance(entry.guard, int)
    return timeline is not None and (not acknowledges or answer.reported_version == entry.guard)


# By answer: whether the question and what came with the answer bear it out.
_FOUNDED: Final[dict[str, Callable[[Operation, Entry, Answer, _Timeline | None], bool]]] = {
    WRITTEN: _is_written,
    READ: lambda _operation, _entry, _answer, timeline: timeline is not None,
    "DeviceNotFound": lambda _operation, _entry, _answer, timeline: timeline is None,
    "InvalidDocument": lambda _operation, entry, _answer, _timeline: "\0" in entry.document.values(),
    "VersionConflict": lambda _operation, entry, answer, _timeline: is_conflict(
        entry.guard, answer.desired_version or 0
    ),
    "UnknownVersion": lambda _operation, entry, answer, _timeline: (
        status_of_report(entry.guard, answer.desired_version or 0, 0) is ReportStatus.UNKNOWN_VERSION
    ),
    "LateReport": lambda _operation, entry, answer, _timeline: (
        status_of_report(entry.guard, answer.desired_version or 2**63, answer.reported_version or 0)
        is ReportStatus.LATE
    ),
}
