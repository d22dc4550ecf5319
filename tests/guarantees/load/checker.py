"""Proves from the records, the history and the rows that nothing was lost: every violation is a sentence.

The log of changes is replayed device by device. Each change has to be one step of the contract (one version more, a
report that goes on, a removal, a new life at the version of the removal), made by a write that the records know, with
the very document that this write makes of the one before. Then every unit of work is looked at the other way round:
what it was told has to be in the log, all of it, and what was refused may not. Only where the connection was lost
during a commit both are right, for the unit as a whole.

A request may have several attempts, and is one write: it is in the log once if one of them was acknowledged, and never
twice. Our own history has a row for each change of a desired document, and no other.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from iot_models import ReportStatus
from tests.guarantees.load.history import PARKED, Change, Fleet, Kept, Key, State, gone_at
from tests.guarantees.load.reads_and_refusals import unfounded_answers
from tests.guarantees.load.record import MARKS, STANDS, WRITTEN, Answer, Entry, Operation, Unit
from tests.guarantees.load.workload import REGISTERS
from tests.reference.json_values import merge_patch
from tests.reference.shadows import nested_delta
from tests.reference.versions import is_conflict, refusal_after, removed_at, reported_version_after, status_of_report

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

Part: TypeAlias = Literal["desired", "reported", "refusal", "life"]
Sign: TypeAlias = tuple[Key, str]  # a device and a token: one write


class Write(NamedTuple):
    """One entry of an operation that writes to a device, and what the writer was told of it, if it was."""

    unit: Unit
    operation: Operation
    entry: Entry
    answer: Answer | None

    @property
    def key(self) -> Key:
        return self.operation.tenant, self.entry.device

    @property
    def sign(self) -> Sign:
        return self.key, self.entry.token

    @property
    def is_refused(self) -> bool:
        return self.unit.outcome == "refused" or (
            self.answer is not None and self.answer.status not in {WRITTEN, STANDS}
        )

    def __str__(self) -> str:
        return f"{self.operation.kind} {self.entry.token} of {'/'.join(self.key)} ({self.unit.outcome})"


# The attempts of each write: several only of a request.
Writes: TypeAlias = "Mapping[Sign, Sequence[Write]]"


def violations(units: Sequence[Unit], history: Iterable[Change], before: Fleet, after: Fleet) -> list[str]:
    """What is wrong, a sentence each; nothing if the records, the log of changes and the rows tell the same story.

    Args:
        units: All units of work of all writers between the two moments.
        history: The log of changes: every change of a shadow, in the order of each device.
        before: How every device stood at first.
        after: How every device stands now.
    """
    writes: dict[Sign, list[Write]] = defaultdict(list)
    for unit in units:
        for write in _writes(unit):
            writes[write.sign].append(write)
    chains = {key: [state] for key, state in before.states.items()}
    kept = defaultdict(dict, {key: dict(rows) for key, rows in before.kept.items()})
    applied: Counter[Sign] = Counter()
    authors: dict[Key, list[Unit | None]] = defaultdict(list)
    found: list[str] = []
    for change in history:
        key = change.key
        chain = chains.setdefault(key, [gone_at(0)])
        old, new = chain[-1], _as_seen(chain[-1], change.state)
        if new == old:  # a migration took the shadow away and put it back
            continue
        touched = _touched(old, new)
        token = _token(change, new, touched, after.kept.get(key, {}))
        attempts = writes.get((key, token), [])
        # In AUTOCOMMIT mode a device that is removed between the two statements of its registration is made again.
        is_again = change.site is not None and any(write.unit.mode == "AUTOCOMMIT" for write in attempts)
        applied[key, token] += not is_again
        found += _step(change, old, new, touched)
        found += _replayed(attempts, token, touched, old, new, kept[key])
        _keep(kept[key], old, new, attempts, after.kept.get(key, {}))
        authors[key].append(_author(attempts))
        chain.append(new)
    for key in chains.keys() | after.states.keys():
        found += _stands(key, chains.get(key, [gone_at(0)])[-1], after.states.get(key))
    for key in kept.keys() | after.kept.keys():
        found += _rows(key, kept[key], after.kept.get(key, {}))
    found += [
        f"{token} was applied {times} times to {_name(key)}" for (key, token), times in applied.items() if times > 1
    ]
    found += _one_version_twice(attempts[0] for attempts in writes.values() if len(attempts) == 1)
    for unit in units:
        found += _complete(unit, applied, writes)
    for key in chains:
        found += _out_of_order(key, authors[key])
    return found + unfounded_answers(units, chains, authors, before.kept)


def _writes(unit: Unit) -> Iterator[Write]:
    for place, operation in enumerate(unit.operations):
        if operation.section in {None, "history"}:
            continue
        answers = unit.answers[place] if unit.answers is not None and place < len(unit.answers) else None
        for number, entry in enumerate(operation.entries):
            yield Write(unit, operation, entry, answers[number] if answers is not None else None)


def _as_seen(old: State, logged: State) -> State:
    """How a device stands after a change that was logged: what the log does not say is as the contract has it."""
    if not logged.is_there:
        return gone_at(removed_at(old.desired_version))
    if logged.refusal == PARKED:
        return logged._replace(refusal=_left_of_refusal(old, logged))
    return logged


def _touched(old: State, new: State) -> list[Part]:
    """Which parts of a shadow a change touched."""
    if old.is_there != new.is_there:
        return ["life"]
    touched: list[Part] = []
    if (old.desired_version, old.desired) != (new.desired_version, new.desired):
        touched.append("desired")
    if (old.reported_version, old.reported) != (new.reported_version, new.reported):
        touched.append("reported")
    if new.refusal != _left_of_refusal(old, new):
        touched.append("refusal")
    return touched


def _left_of_refusal(old: State, new: State) -> str | None:
    return refusal_after(old.refusal, old.desired_version, new.desired_version, new.reported_version)


def _token(change: Change, new: State, touched: Sequence[Part], kept: Mapping[int, Kept]) -> str:
    """Which write made a change: see `MARKS`."""
    if change.site is not None:
        return change.site
    if touched[:1] in (["life"], ["desired"]):
        row = kept.get(new.desired_version)
        reason = row.reason if row is not None else None
        return reason if reason is not None else str(new.desired.get(MARKS["desired"]))
    return str(new.reported.get(MARKS["reported"]) if "reported" in touched else new.refusal)


def _step(change: Change, old: State, new: State, touched: Sequence[Part]) -> Iterator[str]:
    """What the versions alone say about a change."""
    where = f"{_name(change.key)}, from desired_version {old.desired_version} to {new.desired_version}"
    if change.site is not None:
        if old.is_there or new != gone_at(old.desired_version)._replace(is_there=True):
            yield f"{where}: registered as {new}, after {old}"
        return
    if not change.state.is_there:
        if (removed := old._replace(refusal=None, is_there=False)) != change.state._replace(refusal=None):
            yield f"{where}: {change.state} was removed, its last change says {removed}"
        return
    if not old.is_there:
        yield f"{where}: a device that is not there was changed"
    # A report may refuse a version besides: with words of its own.
    if len(touched) != 1 and not (touched == ["reported", "refusal"] and new.refusal == _reporter(new)):
        yield f"{where}: one change touched {len(touched)} documents"
    if "desired" in touched and new.desired_version != old.desired_version + 1:
        yield f"{where}: a desired write raises the version by one"
    if new.reported_version < old.reported_version:
        yield f"{where}: reported_version went down from {old.reported_version} to {new.reported_version}"
    if new.reported_version > new.desired_version:
        yield f"{where}: reported_version {new.reported_version} was never asked for"


def _reporter(state: State) -> str:
    return str(state.reported.get(MARKS["reported"]))


def _replayed(
    attempts: Sequence[Write],
    token: str,
    touched: Sequence[Part],
    old: State,
    new: State,
    kept: Mapping[int, Kept],
) -> Iterator[str]:
    """What the write that made this change says about it."""
    possible = [write for write in attempts if not write.is_refused]
    if not attempts:
        yield f"{token} changed {' and '.join(touched)} to {new}, but no record knows that write"
        return
    write = (possible or attempts)[0]
    if not possible:
        why = write.unit.error or (write.answer and write.answer.status)
        yield f"{write} was refused ({why}), and left a trace"
    if touched != ["refusal"] and "life" not in touched:
        yield from _document_of(write, touched, old, new, kept)
    yield from _as_answered(possible, new, len(attempts))
    if "desired" in touched or "life" in touched:
        if is_conflict(write.entry.guard, old.desired_version):
            yield f"{write} expected version {write.entry.guard}, but replaced version {old.desired_version}"
        return
    yield from _accepted(write, old, new)


def _document_of(
    write: Write, touched: Sequence[Part], old: State, new: State, kept: Mapping[int, Kept]
) -> Iterator[str]:
    """Whether the document is what this write makes of the one before."""
    seen, document = (old.desired, new.desired) if "desired" in touched else (old.reported, new.reported)
    version = write.entry.version
    if write.operation.kind == "restore_desired" and version is not None:
        earlier = kept.get(version, Kept(None)).document
        expected = old.desired if version == old.desired_version else earlier
    else:
        expected = merge_patch(seen, write.entry.document) if write.operation.merges else write.entry.document
    if document != expected:
        yield f"{write} makes {expected} of {seen}, but {document} was stored: a write in between was lost, or this one"


def _accepted(write: Write, old: State, new: State) -> Iterator[str]:
    """Whether a report or a refusal is one that the contract accepts, and left behind what it says."""
    guard, refused = write.entry.guard, write.entry.version
    is_converged = not nested_delta(new.desired, new.reported)
    status = status_of_report(guard, new.desired_version, old.reported_version, refused)
    if status is not ReportStatus.ACCEPTED:
        said = f"acknowledged {guard}" if refused is None else f"acknowledged {guard} and refused {refused}"
        yield f"{write} {said}, with {old.reported_version} acknowledged and {new.desired_version} asked for"
    # In a batch an earlier report of the same device may have raised it: then what the writer was told counts.
    if sum(entry.device == write.entry.device for entry in write.operation.entries) == 1:
        wanted = reported_version_after(guard, new.desired_version, old.reported_version, is_converged=is_converged)
        if new.reported_version != wanted:
            yield f"{write} left reported_version at {new.reported_version} instead of {wanted}"
    if refused is not None and new.refusal != write.entry.token:
        yield f"{write} left the refusal {new.refusal}"


def _as_answered(possible: Sequence[Write], new: State, attempts: int) -> Iterator[str]:
    """What writers were told of a change. Of a request any attempt can have made it; the others got what stood then."""
    for write in possible:
        answer = write.answer
        if answer is None or answer.status != WRITTEN or answer.desired_version is None:
            continue  # written later, with COMMIT: there was nothing to tell yet
        if attempts > 1 and write.unit.outcome != "acknowledged":
            continue  # its own write may have been taken back
        if attempts > 1 and answer.desired_version > new.desired_version:
            continue  # a repeat: `unfounded_answers` looks at it
        reported_versions = {None, new.reported_version, answer.reported_version if attempts > 1 else None}
        if answer.desired_version != new.desired_version or answer.reported_version not in reported_versions:
            yield (
                f"{write} was told versions {answer.desired_version} and {answer.reported_version}, "
                f"but {new.desired_version} and {new.reported_version} were stored"
            )
        document = new.desired if write.operation.section == "desired" else new.reported
        if answer.document is not None and answer.document != document:
            yield f"{write} was told {answer.document}, but {document} was stored"


def _keep(kept: dict[int, Kept], old: State, new: State, attempts: Sequence[Write], rows: Mapping[int, Kept]) -> None:
    """Add the rows that our own history has to have after a change, among them the state before the first one."""
    if new.desired_version == old.desired_version:
        return
    kept.setdefault(old.desired_version, Kept(old.desired))
    row = Kept(new.desired if new.is_there else None)
    if attempts:
        operation, entry = attempts[0].operation, attempts[0].entry
        row = row._replace(request=entry.request, reason=entry.token if operation.gives_reason else None)
    elif new.desired_version in rows:  # a write that no record knows has been reported already
        row = row._replace(request=rows[new.desired_version].request, reason=rows[new.desired_version].reason)
    kept[new.desired_version] = row


def _rows(key: Key, wanted: Mapping[int, Kept], rows: Mapping[int, Kept]) -> Iterator[str]:
    """Whether our own history has each change of a desired document, and nothing else."""
    for version in sorted(wanted.keys() | rows.keys()):
        if version not in rows:
            yield f"version {version} of {_name(key)} has no row in the history"
        elif version not in wanted:
            yield f"the history has version {version} of {_name(key)}, {rows[version]}, which no change made"
        elif rows[version] != wanted[version]:
            yield f"the history has {rows[version]} as version {version} of {_name(key)}, which is {wanted[version]}"


def _stands(key: Key, last: State, row: State | None) -> Iterator[str]:
    if last.is_there and (row is None or not row.is_there):
        yield f"{_name(key)} is gone"
    elif row is not None and row != last and (row.is_there or last.is_there):
        yield f"the row of {_name(key)} is {row}, its last change says {last}"


def _author(attempts: Sequence[Write]) -> Unit | None:
    """Who made a change. Of a request it was one of several: after the first began, and before one was acknowledged."""
    units = [write.unit for write in attempts if not write.is_refused] or [write.unit for write in attempts[:1]]
    if not units:
        return None
    told = [unit.end for unit in units if unit.outcome == "acknowledged"]
    end = min(told) if told else max(unit.end for unit in units)
    return dataclasses.replace(units[0], start=min(unit.start for unit in units), end=end)


def _complete(unit: Unit, applied: Mapping[Sign, int], writes: Writes) -> Iterator[str]:
    """Whether what has to be in the log of an acknowledged unit is there, and of an unknown one all or nothing."""
    if unit.outcome == "refused":
        return  # what is there of it was reported where it was found
    there: list[Write] = []
    missing: list[Write] = []
    for write in _last_of_each_device(unit):
        if write.sign not in applied:
            missing.append(write)
        elif unit.outcome == "acknowledged" or len(writes[write.sign]) == 1:  # else another attempt can have done it
            there.append(write)
    if unit.outcome == "acknowledged":
        yield from (f"{write} is not there" for write in missing)
    elif there and missing and (unit.answers or there[0].operation.all_or_nothing):
        yield f"half of a unit was written: {there[0]} is there, {missing[0]} is not"


def _last_of_each_device(unit: Unit) -> Iterator[Write]:
    """The writes that leave their own trace: of several reports of one device in a batch only the last accepted.

    None that registers a device: it may have been there.
    """
    last: dict[tuple[int, Key], Write] = {}
    for write in _writes(unit):
        if write.operation.kind in REGISTERS:
            continue
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
