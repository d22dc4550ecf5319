"""Proves from the records, the history and the rows that nothing was lost: every violation is a sentence.

The history is replayed device by device. Each change has to be one step of the contract (one version more, or a report
that goes on), made by a write that the records know, with the very document that this write makes of the one before.
Then every unit of work is looked at the other way round: what it was told has to be in the history, all of it, and what
was refused may not. Only where the connection was lost during a commit both are right, for the unit as a whole.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from iot_models import ReportStatus
from tests.guarantees.load.history import Change, Key, State
from tests.guarantees.load.reads_and_refusals import unfounded_answers
from tests.guarantees.load.record import MARKS, WRITTEN, Answer, Entry, Operation, Unit
from tests.reference.json_values import merge_patch
from tests.reference.methods import Section
from tests.reference.shadows import nested_delta
from tests.reference.versions import is_conflict, reported_version_after, status_of_report

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

Sign: TypeAlias = tuple[Key, Section, str]  # a device, one of its documents, and a token: one write


class Write(NamedTuple):
    """One entry of an operation that writes a document, and what the writer was told of it, if it was."""

    unit: Unit
    operation: Operation
    entry: Entry
    answer: Answer | None

    @property
    def key(self) -> Key:
        return self.operation.tenant, self.entry.device

    def __str__(self) -> str:
        return f"{self.operation.kind} {self.entry.token} of {'/'.join(self.key)} ({self.unit.outcome})"


def violations(
    units: Sequence[Unit], history: Iterable[Change], before: Mapping[Key, State], after: Mapping[Key, State]
) -> list[str]:
    """What is wrong, a sentence each; nothing if the records, the history and the rows tell the same story.

    Args:
        units: All units of work of all writers between the two moments.
        history: Every change of a shadow, in the order of each device.
        before: How every device stood at first.
        after: How every device stands now.
    """
    writes = {
        (write.key, section, write.entry.token): write
        for unit in units
        for write in _writes(unit)
        if (section := write.operation.section) is not None
    }
    chains = {key: [state] for key, state in before.items()}
    applied: Counter[Sign] = Counter()
    authors: dict[Key, list[Unit | None]] = defaultdict(list)
    found: list[str] = []
    for key, state in history:
        chain = chains.setdefault(key, [State(0, 0, {}, {})])
        if state == chain[-1]:  # a migration took the shadow away and put it back
            continue
        signs = _signs(key, chain[-1], state)
        found += _step(key, chain[-1], state, signs)
        for sign in signs:
            applied[sign] += 1
            found += _replayed(writes.get(sign), sign, chain[-1], state)
        authors[key].append(writes[signs[0]].unit if signs and signs[0] in writes else None)
        chain.append(state)
    found += [f"{_name(key)} is gone" for key in chains.keys() - after.keys()]
    for key, state in after.items():
        if state != chains.get(key, [None])[-1]:
            found.append(f"the row of {_name(key)} is {state}, its last change says {chains.get(key, [None])[-1]}")
    found += [
        f"{sign[2]} was applied {times} times to {_name(sign[0])}" for sign, times in applied.items() if times > 1
    ]
    found += _one_version_twice(writes.values())
    for unit in units:
        found += _complete(unit, applied)
    for key in chains:
        found += _out_of_order(key, authors[key])
    return found + unfounded_answers(units, chains, authors)


def _writes(unit: Unit) -> Iterator[Write]:
    for place, operation in enumerate(unit.operations):
        if operation.section is None:
            continue
        answers = unit.answers[place] if unit.answers is not None and place < len(unit.answers) else None
        for number, entry in enumerate(operation.entries):
            yield Write(unit, operation, entry, answers[number] if answers is not None else None)


def _signs(key: Key, old: State, new: State) -> list[Sign]:
    """Which writes this change shows, by the tokens in the documents that it touched."""
    signs: list[Sign] = []
    if (old.desired_version, old.desired) != (new.desired_version, new.desired):
        signs.append((key, "desired", str(new.desired.get(MARKS["desired"]))))
    if (old.reported_version, old.reported) != (new.reported_version, new.reported):
        signs.append((key, "reported", str(new.reported.get(MARKS["reported"]))))
    return signs


def _step(key: Key, old: State, new: State, signs: Sequence[Sign]) -> Iterator[str]:
    """What the versions alone say about a change."""
    where = f"{_name(key)}, from desired_version {old.desired_version} to {new.desired_version}"
    if len(signs) != 1:
        yield f"{where}: one change touched {len(signs)} documents"
    if any(section == "desired" for _, section, _ in signs) and new.desired_version != old.desired_version + 1:
        yield f"{where}: a desired write raises the version by one"
    if new.reported_version < old.reported_version:
        yield f"{where}: reported_version went down from {old.reported_version} to {new.reported_version}"
    if new.reported_version > new.desired_version:
        yield f"{where}: reported_version {new.reported_version} was never asked for"


def _replayed(write: Write | None, sign: Sign, old: State, new: State) -> Iterator[str]:
    """What the write that made this change says about it."""
    key, section, token = sign
    if write is None:
        yield f"{_name(key)}: {token} is in the {section} document, but no record knows that write"
        return
    if write.unit.outcome == "refused" or (write.answer is not None and write.answer.status != WRITTEN):
        why = write.unit.error or (write.answer and write.answer.status)
        yield f"{write} was refused ({why}), and left a trace"
    seen, document = (old.desired, new.desired) if section == "desired" else (old.reported, new.reported)
    expected = merge_patch(seen, write.entry.document) if write.operation.merges else write.entry.document
    if document != expected:
        yield f"{write} makes {expected} of {seen}, but {document} was stored: a write in between was lost, or this one"
    if write.answer is not None and write.answer.status == WRITTEN:
        yield from _as_answered(write, write.answer, new, document)
    guard = write.entry.guard
    if section == "desired":
        if is_conflict(guard, old.desired_version):
            yield f"{write} expected version {guard}, but replaced version {old.desired_version}"
        return
    is_converged = not nested_delta(new.desired, new.reported)
    if status_of_report(guard, new.desired_version, old.reported_version) is not ReportStatus.ACCEPTED:
        yield f"{write} acknowledged {guard}, with {old.reported_version} acknowledged and {new.desired_version} asked for"
    # In a batch an earlier report of the same device may have raised it: then what the writer was told counts.
    if sum(entry.device == write.entry.device for entry in write.operation.entries) == 1:
        wanted = reported_version_after(guard, new.desired_version, old.reported_version, is_converged=is_converged)
        if new.reported_version != wanted:
            yield f"{write} left reported_version at {new.reported_version} instead of {wanted}"


def _as_answered(write: Write, answer: Answer, new: State, document: dict[str, Any]) -> Iterator[str]:
    if answer.desired_version is None:  # written later, with COMMIT: there was nothing to tell yet
        return
    if answer.desired_version != new.desired_version or answer.reported_version not in {None, new.reported_version}:
        yield (
            f"{write} was told versions {answer.desired_version} and {answer.reported_version}, "
            f"but {new.desired_version} and {new.reported_version} were stored"
        )
    if answer.document is not None and answer.document != document:
        yield f"{write} was told {answer.document}, but {document} was stored"


def _complete(unit: Unit, applied: Mapping[Sign, int]) -> Iterator[str]:
    """Whether what has to be in the history of an acknowledged unit is there, and of an unknown one all or nothing."""
    if unit.outcome == "refused":
        return  # what is there of it was reported where it was found
    there: list[Write] = []
    missing: list[Write] = []
    for write in _last_of_each_device(unit):
        section = write.operation.section
        if section is not None:
            (there if (write.key, section, write.entry.token) in applied else missing).append(write)
    if unit.outcome == "acknowledged":
        yield from (f"{write} is not there" for write in missing)
    elif there and missing and (unit.answers or there[0].operation.all_or_nothing):
        yield f"half of a unit was written: {there[0]} is there, {missing[0]} is not"


def _last_of_each_device(unit: Unit) -> Iterator[Write]:
    """The writes that leave their own trace: of several reports of one device in a batch only the last accepted."""
    last: dict[tuple[int, Key], Write] = {}
    for write in _writes(unit):
        if (write.answer is None and not unit.answers) or (write.answer is not None and write.answer.status == WRITTEN):
            last[id(write.operation), write.key] = write
    yield from last.values()


def _one_version_twice(writes: Iterable[Write]) -> Iterator[str]:
    """From the records alone: no two desired writes of a device were told one version."""
    first: dict[tuple[Key, int | None], Write] = {}
    for write in writes:
        if write.unit.outcome != "acknowledged" or write.operation.section != "desired":
            continue
        if write.answer is not None and write.answer.status == WRITTEN and write.answer.desired_version is not None:
            other = first.setdefault((write.key, write.answer.desired_version), write)
            if other is not write:
                yield f"{other} and {write} were both told version {write.answer.desired_version}"


def _out_of_order(key: Key, authors: Iterable[Unit | None]) -> Iterator[str]:
    """Whether a write that was acknowledged before another began also comes before it."""
    latest: Unit | None = None
    for unit in authors:
        if unit is None:
            continue
        if latest is not None and unit.end < latest.start:
            yield f"{_name(key)}: {unit.name} was acknowledged before {latest.name} began, yet comes after it"
        if latest is None or unit.start > latest.start:
            latest = unit


def _name(key: Key) -> str:
    return "/".join(key)
