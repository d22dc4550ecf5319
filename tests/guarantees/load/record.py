"""What a writer sets down: what it is about to do, and what it was told. One JSON line each, in a file of its own.

A line goes to the operating system before the writer goes on, so that a writer that is killed loses nothing it was
told. What the file says of a unit of work in the end is one of three things, see `Unit.outcome`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

from tests.reference.methods import WRITES, Section, Write

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from tests.reference.versions import Acknowledges

Document: TypeAlias = dict[str, Any]
Outcome: TypeAlias = Literal["acknowledged", "refused", "unknown"]

AUTOCOMMIT: Final = "AUTOCOMMIT"
WRITTEN: Final = "written"  # of a request: now, or by an attempt before
READ: Final = "read"
STANDS: Final = "stands"  # registered now, or there before: the shadow as it stands
NOTHING_OLD: Final = "nothing old"  # nothing of the history was old enough to be pruned
# Under these keys a document names the write that it is of: two, so that a report can hold all of a desired document. A
# write without a document is named by the reason for it in our own history, a refusal by its words, a device that is
# registered by its site.
MARKS: Final[dict[Section, str]] = {"desired": "by", "reported": "reported by"}

_LATEST_BYTES: Final = 8_192

# The kinds of an operation, and how each writes: the service's methods, and what a program does with an object.
KINDS: Final[dict[str, Write | None]] = {
    **WRITES,
    "orm_replace": Write("desired"),
    "orm_change": Write("desired", merges=True),
    "heartbeat": None,
    "get": None,
}


class Entry(NamedTuple):
    """One device of an operation.

    Attributes:
        device: Its id.
        document: The document or patch. Where the method takes none, it holds only the token: see `MARKS`.
        guard: The `expected_version`, or what a report acknowledges.
        request: The `request_id`. Attempts of one request are one write: they have the same token.
        version: The version that is restored or refused.
    """

    device: str
    document: Document
    guard: Acknowledges = None
    request: str | None = None
    version: int | None = None

    @property
    def token(self) -> str:
        """Which write it is; no other write of this device carries it."""
        return str(self.document.get(MARKS["reported"]) or self.document[MARKS["desired"]])


class Answer(NamedTuple):
    """What came back for an entry: WRITTEN, READ, or the refusal by its name, and where the device stands."""

    status: str
    desired_version: int | None = None
    reported_version: int | None = None
    document: Document | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    """One call, by the name of the service's method (or `orm_replace`, `orm_change`, `heartbeat`)."""

    kind: str
    tenant: str
    entries: tuple[Entry, ...]

    @property
    def section(self) -> Section | None:
        """What it writes; None if nothing of a shadow."""
        write = KINDS[self.kind]
        return write.section if write else None

    @property
    def merges(self) -> bool:
        """Whether the documents are merge patches."""
        write = KINDS[self.kind]
        return write is not None and write.merges

    @property
    def all_or_nothing(self) -> bool:
        """Whether all its entries are written, or none."""
        write = KINDS[self.kind]
        return write is not None and write.devices == "all"

    @property
    def gives_reason(self) -> bool:
        """Whether the token of its entry is the reason that our own history has of the write.

        So the history names a write whose document does not: one that restores or removes.
        """
        return self.kind in {"replace_desired", "patch_desired", "restore_desired", "remove"}

    @property
    def is_request(self) -> bool:
        """Whether it can be repeated, and is done once."""
        return any(entry.request is not None for entry in self.entries)


@dataclass(frozen=True, slots=True)
class Unit:
    """One transaction, or one call in AUTOCOMMIT mode.

    Attributes:
        name: Unique in a run.
        mode: The isolation level, or AUTOCOMMIT.
        start: When it began, by a clock that all processes share.
        end: When the writer was told; infinite if it never was.
        outcome: `acknowledged`: COMMIT returned. `refused`: nothing of it may be there. `unknown`: the connection (or
            the writer) was lost while it committed, so that all of it is there, or nothing.
        error: Why not acknowledged: a class, with its SQLSTATE if it has one.
        operations: What was to be done, in order.
        answers: What came back for each, an entry each; shorter than `operations` where it ended before, None where
            the writer was killed before it could tell.
    """

    name: str
    mode: str
    start: float
    end: float
    outcome: Outcome
    error: str | None
    operations: tuple[Operation, ...]
    answers: tuple[tuple[Answer, ...], ...] | None


class Recorder:
    """Appends to one file; the lines of one unit are `begin`, `committing` (transactions only) and `end`."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def begin(self, name: str, mode: str, operations: Sequence[Operation]) -> None:
        plan = [[o.kind, o.tenant, o.entries] for o in operations]
        self._append({"event": "begin", "unit": name, "mode": mode, "start": time.monotonic(), "operations": plan})

    def committing(self, name: str, answers: Sequence[Sequence[Answer]]) -> None:
        """To be called right before COMMIT: a writer killed before it has committed nothing."""
        self._append({"event": "committing", "unit": name, "answers": answers})

    def end(self, name: str, outcome: Outcome, error: str | None, answers: Sequence[Sequence[Answer]]) -> None:
        end = time.monotonic()
        line = {"event": "end", "unit": name, "outcome": outcome, "end": end, "error": error, "answers": answers}
        self._append(line)

    def close(self) -> None:
        os.close(self._file)

    def _append(self, line: dict[str, object]) -> None:
        os.write(self._file, json.dumps(line, separators=(",", ":")).encode() + b"\n")  # to the kernel, in one piece


def read_records(paths: Iterable[Path]) -> list[Unit]:
    """All units in these files."""
    return [unit for path in paths for unit in _units(path)]


def latest_requests(path: Path) -> list[Operation]:
    """The requests that this file's writer made of late; the last one may be under way."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LATEST_BYTES))
        lines = file.read().split(b"\n")[1:-1]  # the first and the last one can be torn
    begun = [json.loads(line) for line in lines if line.startswith(b'{"event":"begin"')]
    return [operation for line in begun for operation in _operations(line) if operation.is_request]


def _units(path: Path) -> Iterator[Unit]:
    open_unit: Unit | None = None
    for line in _lines(path):
        match line["event"]:
            case "begin":
                if open_unit is not None:
                    raise ValueError(f"{path}: {open_unit.name} has not ended, yet {line['unit']} begins")
                open_unit = _begun(line)
            case "committing":
                open_unit = _of(open_unit, line, path, outcome="unknown", answers=_answers(line))
            case "end":
                ended = {"outcome": line["outcome"], "end": line["end"], "error": line["error"]}
                yield _of(open_unit, line, path, answers=_answers(line), **ended)
                open_unit = None
    if open_unit is not None:
        yield open_unit


def _begun(line: dict[str, Any]) -> Unit:
    """A unit as it stands if nothing more is heard of it: in a transaction, COMMIT was not sent."""
    operations = _operations(line)
    outcome: Outcome = "unknown" if line["mode"] == AUTOCOMMIT else "refused"
    return Unit(line["unit"], line["mode"], line["start"], float("inf"), outcome, "writer killed", operations, None)


def _operations(line: dict[str, Any]) -> tuple[Operation, ...]:
    return tuple(
        Operation(kind, tenant, tuple(Entry(*entry) for entry in entries))
        for kind, tenant, entries in line["operations"]
    )


def _of(unit: Unit | None, line: dict[str, Any], path: Path, **changes: Any) -> Unit:
    if unit is None or unit.name != line["unit"]:
        raise ValueError(f"{path}: {line['unit']} ends, but it has not begun")
    return dataclasses.replace(unit, **changes)


def _answers(line: dict[str, Any]) -> tuple[tuple[Answer, ...], ...]:
    return tuple(tuple(Answer(*answer) for answer in answers) for answers in line["answers"])


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):  # the writer was killed here: only the last line can be torn
                return
            yield json.loads(line)
