"""Whether what writers were told was true when they were told: reads and refusals, judged by the history.

A version can have been seen if its write had begun by then, and must have been passed if a later one was acknowledged
before the question.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING, Final, NamedTuple

from iot_models import ReportStatus
from tests.guarantees.load.record import NOTHING_OLD, READ, STANDS, WRITTEN, Answer, Entry, Operation, Unit
from tests.reference.versions import is_conflict, status_of_report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tests.guarantees.load.history import Kept, Key, State

REJECTED: Final = "rejected"  # a good entry in a batch that was rejected for another


class _Timeline:
    """At which `desired_version` a device can have stood at any time, and when it can have been gone."""

    def __init__(self, chain: Sequence[State], authors: Sequence[Unit | None], kept: Mapping[int, Kept]) -> None:
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
        self._gone = list(_absences(chain, authors))
        self.documents = {state.desired_version: state.desired for state in (chain[0], *(new for new, _ in steps))}
        self.restorable = {version for version, row in kept.items() if row.document is not None}
        self.restorable |= {new.desired_version for new, _ in steps if new.is_there}
        if self._base not in kept:  # the state before the first recorded write
            self.restorable.add(self._base)
        self.reported_versions = {state.reported_version for state in chain}

    def can_have_stood(self, version: int | None, unit: Unit, own: int) -> bool:
        """Whether the unit can have met this version; `own` writes of its own, even if undone, come on top."""
        highest = self._base + bisect_left(self._started, unit.end) + own
        return version is not None and self.surely(unit) <= version <= highest

    def surely(self, unit: Unit) -> int:
        """The version that was committed before the unit began, or a newer one."""
        return self._base + bisect_left(self._committed, unit.start)

    def can_have_been_gone(self, unit: Unit) -> bool:
        return any(start < unit.end and unit.start < end for start, end in self._gone)


def _absences(chain: Sequence[State], authors: Sequence[Unit | None]) -> Iterator[tuple[float, float]]:
    """From when until when there can have been no row."""
    start = float("-inf") if not chain[0].is_there else None
    for state, unit in zip(chain[1:], authors, strict=False):
        if not state.is_there:
            start = unit.start if unit else float("-inf")
        elif start is not None:
            yield start, unit.end if unit else float("inf")
            start = None
    if start is not None:
        yield start, float("inf")


class _Question(NamedTuple):
    """What a writer asked for and was told; `own`: how many writes of its unit came before, even if undone."""

    unit: Unit
    operation: Operation
    entry: Entry
    answer: Answer
    timeline: _Timeline | None
    own: int
    was_removed: bool  # by an operation of the unit before


def unfounded_answers(
    units: Sequence[Unit],
    chains: Mapping[Key, Sequence[State]],
    authors: Mapping[Key, Sequence[Unit | None]],
    kept: Mapping[Key, Mapping[int, Kept]],
) -> list[str]:
    """A sentence for each answer that cannot have been true. `kept`: our own history, as it was before all units."""
    timelines = {key: _Timeline(chain, authors.get(key, ()), kept.get(key, {})) for key, chain in chains.items()}
    found: list[str] = []
    for unit in units:
        written: set[Key] = set()
        removed: set[Key] = set()
        for operation, answers in zip(unit.operations, unit.answers or (), strict=False):
            for entry, answer in zip(operation.entries, answers, strict=True):
                key = operation.tenant, entry.device
                own = sum(len(each.entries) for each in unit.operations) if key in written else 0
                question = _Question(unit, operation, entry, answer, timelines.get(key), own, key in removed)
                written.add(key)
                if operation.kind == "remove":
                    removed.add(key)
                found += [
                    f"{unit.name}, {operation.kind} of {'/'.join(key)} with {entry.guard}: {wrong}, got {answer}"
                    for wrong in _wrong(question)
                ]
    return found


def _wrong(question: _Question) -> Iterator[str]:
    answer, timeline, own = question.answer, question.timeline, question.own
    if answer.status == REJECTED:
        return  # another entry stands for it
    if answer.status not in _FOUNDED:
        yield "an answer that the contract does not have"
    elif not _FOUNDED[answer.status](question):
        yield "there was no reason for that"
    elif timeline is None:
        return
    elif _shows_what_stood(question) and not timeline.can_have_stood(answer.desired_version, question.unit, own):
        yield "the device did not stand at that version then"
    elif answer.document is not None and not own and _shows_what_stood(question):
        if answer.document != timeline.documents.get(answer.desired_version or 0):
            yield f"that version is {timeline.documents.get(answer.desired_version or 0)}"
    elif answer.status == "LateReport" and not own and not _was_acknowledged(question, timeline):
        yield "that version was never acknowledged"


def _shows_what_stood(question: _Question) -> bool:
    """Whether the answer is how the device stood: not what a write left behind that may be undone."""
    answer = question.answer
    if answer.status == WRITTEN:  # a request may have been done before
        return question.entry.request is not None and question.unit.outcome == "acknowledged"
    if answer.status == STANDS:  # one that was registered by itself stands as well
        return True
    is_refusal = answer.status == "LateReport" and question.operation.kind == "refuse_desired"
    return is_refusal or answer.status in {READ, "VersionConflict", "UnknownVersion"}


def _was_acknowledged(question: _Question, timeline: _Timeline) -> bool:
    """Whether the version that a late report came after was ever acknowledged; a refusal may be late without one."""
    answer, refused = question.answer, question.entry.version
    if refused is not None and refused < (answer.desired_version or 0):
        return True
    return (refused if answer.reported_version is None else answer.reported_version) in timeline.reported_versions


def _is_written(question: _Question) -> bool:
    entry = question.entry
    acknowledges = question.operation.section == "reported" and isinstance(entry.guard, int)
    return question.timeline is not None and (not acknowledges or question.answer.reported_version == entry.guard)


def _is_gone(question: _Question) -> bool:
    timeline = question.timeline
    return timeline is None or question.was_removed or timeline.can_have_been_gone(question.unit)


def _is_not_kept(question: _Question) -> bool:
    """Whether the version to restore can have been none that has a document."""
    timeline, version = question.timeline, question.entry.version
    if timeline is None or version is None or question.operation.kind != "restore_desired":
        return False
    return version not in timeline.restorable or version > timeline.surely(question.unit)


def _is_late(question: _Question) -> bool:
    answer, version = question.answer, question.entry.version
    newest = answer.desired_version or 2**63
    if question.operation.kind == "refuse_desired":  # it is told the newest version, and not which is acknowledged
        return status_of_report(None, newest, newest, version) is ReportStatus.LATE
    status = status_of_report(question.entry.guard, newest, answer.reported_version or 0, version)
    return status is ReportStatus.LATE


def _is_unknown(question: _Question) -> bool:
    refused = question.entry.version if question.operation.section == "reported" else None
    status = status_of_report(question.entry.guard, question.answer.desired_version or 0, 0, refused)
    return status is ReportStatus.UNKNOWN_VERSION


# By answer: whether the question and what came with the answer bear it out.
_FOUNDED: Final[dict[str, Callable[[_Question], bool]]] = {
    WRITTEN: _is_written,
    READ: lambda question: question.timeline is not None,
    STANDS: lambda question: question.timeline is not None and question.operation.section == "life",
    NOTHING_OLD: lambda question: question.operation.section == "history",
    "DeviceNotFound": _is_gone,
    "InvalidDocument": lambda question: "\0" in question.entry.document.values(),
    "VersionConflict": lambda question: is_conflict(question.entry.guard, question.answer.desired_version or 0),
    "VersionNotKept": _is_not_kept,
    "UnknownVersion": _is_unknown,
    "LateReport": _is_late,
}
