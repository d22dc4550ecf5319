"""The checker itself: a small honest history passes, and each kind of lie in it is found."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.guarantees.load.checker import violations
from tests.guarantees.load.history import Change, State
from tests.guarantees.load.record import (
    AUTOCOMMIT,
    READ,
    WRITTEN,
    Answer,
    Entry,
    Operation,
    Recorder,
    Unit,
    read_records,
)

if TYPE_CHECKING:
    from pathlib import Path

KEY = ("acme", "fan")
OTHER = ("acme", "lamp")
NOTHING = State(0, 0, {}, {})


def operation(kind: str, *entries: Entry) -> Operation:
    return Operation(kind, "acme", entries)


def unit(name: str, at: float, *work: tuple[Operation, Any], **changes: Any) -> Unit:
    """Acknowledged, and half a second long."""
    operations, answers = tuple(o for o, _ in work), tuple(answer for _, answer in work)
    made = Unit(name, "READ COMMITTED", at, at + 0.5, "acknowledged", None, operations, answers)
    return replace(made, **changes)


# A replaces, B patches, a batch C replaces both devices, R reports what it was asked at version 2.
A, B, C, R = {"by": "A", "a": 1}, {"by": "B", "b": 1}, {"by": "C"}, {"reported by": "R", "a": 1}
AB = {"by": "B", "a": 1, "b": 1}
WRITE_A = unit("A", 1, (operation("replace_desired", Entry("fan", A, 0)), (Answer(WRITTEN, 1, 0, A),)))
WRITE_B = unit("B", 2, (operation("patch_desired", Entry("fan", B)), (Answer(WRITTEN, 2, 0, AB),)))
REPORT = unit("R", 3, (operation("replace_reported", Entry("fan", R, 2)), (Answer(WRITTEN, 2, 2, R),)))
BATCH = operation("replace_desired_many", Entry("fan", C), Entry("lamp", C))
WRITE_C = unit("C", 4, (BATCH, (Answer(WRITTEN, 3, 2, C), Answer(WRITTEN, 1, 0, C))))

UNITS = [WRITE_A, WRITE_B, REPORT, WRITE_C]
HISTORY = [
    Change(KEY, State(1, 0, A, {})),
    Change(KEY, State(2, 0, AB, {})),
    Change(KEY, State(2, 2, AB, R)),
    Change(KEY, State(3, 2, C, R)),
    Change(OTHER, State(1, 0, C, {})),
]


def found(units: list[Unit], history: list[Change], **rows: State) -> str:
    """What the checker says of it, if the rows are what the history leaves behind; `fan=` and `lamp=` are other rows."""
    before = {KEY: NOTHING, OTHER: NOTHING}
    after = before | dict(history) | {("acme", device): state for device, state in rows.items()}
    return "\n".join(violations(units, history, before, after))


def test_an_honest_history_has_no_violation() -> None:
    assert found(UNITS, HISTORY) == ""


def test_a_lost_update_is_found() -> None:
    """B was merged with what was there before A, or A was overwritten by what B had read before."""
    lost = [HISTORY[0], Change(KEY, State(2, 0, B, {}))]
    assert "a write in between was lost" in found([WRITE_A, WRITE_B], lost)


def test_a_version_that_two_writers_were_told_is_found() -> None:
    again = unit(
        "D", 2, (operation("replace_desired", Entry("fan", {"by": "D"})), (Answer(WRITTEN, 1, 0, {"by": "D"}),))
    )
    history = [HISTORY[0], Change(KEY, State(1, 0, {"by": "D"}, {}))]
    reasons = found([WRITE_A, again], history)
    assert "both told version 1" in reasons
    assert "from desired_version 1 to 1: a desired write raises the version by one" in reasons


def test_a_gap_is_found() -> None:
    answer = (Answer(WRITTEN, 3, 0, AB),)
    skipping = replace(WRITE_B, answers=(answer,))
    assert "from desired_version 1 to 3: a desired write raises" in found(
        [WRITE_A, skipping], [HISTORY[0], Change(KEY, State(3, 0, AB, {}))]
    )


@pytest.mark.parametrize("missing", range(len(UNITS)))
def test_an_acknowledged_write_that_is_not_there_is_found(missing: int) -> None:
    name = UNITS[missing].name
    assert f" {name} of " in found(UNITS, [change for change in HISTORY if name not in str(change.state)])
    assert "(acknowledged) is not there" in found(UNITS, [])


def test_a_refused_write_that_left_a_trace_is_found() -> None:
    for why in ("rolled back on purpose", "OperationalError 40001"):
        refused = replace(WRITE_B, outcome="refused", error=why)
        assert f"was refused ({why}), and left a trace" in found([WRITE_A, refused], HISTORY[:2])
    conflict = replace(WRITE_B, answers=((Answer("VersionConflict", 1),),))
    assert "was refused (VersionConflict), and left a trace" in found([WRITE_A, conflict], HISTORY[:2])


def test_a_write_of_unknown_outcome_may_be_there_or_not() -> None:
    for answers in (None, WRITE_B.answers):
        unknown = replace(WRITE_B, outcome="unknown", end=float("inf"), answers=answers)
        assert found([WRITE_A, unknown], HISTORY[:2]) == ""
        assert found([WRITE_A, unknown], HISTORY[:1]) == ""


@pytest.mark.parametrize("answers", [None, WRITE_C.answers])
def test_half_of_a_batch_is_found_even_where_its_outcome_is_unknown(answers: Any) -> None:
    unknown = replace(WRITE_C, outcome="unknown", answers=answers)
    assert "half of a unit was written" in found([*UNITS[:3], unknown], HISTORY[:4])
    assert found([*UNITS[:3], unknown], HISTORY) == ""
    assert found([*UNITS[:3], unknown], HISTORY[:3]) == ""


def test_half_of_a_transaction_is_found() -> None:
    both = unit("AR", 1, *zip(WRITE_A.operations, WRITE_A.answers or (), strict=True))
    lamp = (operation("replace_desired", Entry("lamp", B)), (Answer(WRITTEN, 1, 0, B),))
    both = replace(both, outcome="unknown", operations=(*both.operations, lamp[0]), answers=(both.answers[0], lamp[1]))  # type: ignore[index]
    assert "half of a unit was written" in found([both], HISTORY[:1])


def test_a_reported_version_that_goes_down_is_found() -> None:
    late = unit(
        "L", 5, (operation("replace_reported", Entry("fan", {"reported by": "L"}, 1)), (Answer(WRITTEN, 3, 1),))
    )
    reasons = found([*UNITS, late], [*HISTORY, Change(KEY, State(3, 1, C, {"reported by": "L"}))])
    assert "reported_version went down from 2 to 1" in reasons


def test_a_late_report_that_was_accepted_is_found_even_if_the_version_stays() -> None:
    late = unit(
        "L", 5, (operation("replace_reported", Entry("fan", {"reported by": "L"}, 1)), (Answer(WRITTEN, 3, 2),))
    )
    reasons = found([*UNITS, late], [*HISTORY, Change(KEY, State(3, 2, C, {"reported by": "L"}))])
    assert "acknowledged 1, with 2 acknowledged and 3 asked for" in reasons
    assert "there was no reason for that" in reasons


def test_an_acknowledgement_of_what_was_never_asked_is_found() -> None:
    early = unit(
        "E", 5, (operation("replace_reported", Entry("fan", {"reported by": "E"}, 9)), (Answer(WRITTEN, 3, 9),))
    )
    reasons = found([*UNITS, early], [*HISTORY, Change(KEY, State(3, 9, C, {"reported by": "E"}))])
    assert "reported_version 9 was never asked for" in reasons


def test_a_write_at_another_version_than_the_expected_one_is_found() -> None:
    guarded = replace(WRITE_B, operations=(operation("patch_desired", Entry("fan", B, 0)),))
    assert "expected version 0, but replaced version 1" in found([WRITE_A, guarded], HISTORY[:2])


def test_a_desired_write_that_touches_the_reported_document_is_found() -> None:
    assert "touched 2 documents" in found([WRITE_A], [Change(KEY, State(1, 0, A, {"by": "A"}))])


def test_a_shadow_that_a_migration_put_back_as_it_was_is_no_change() -> None:
    assert found([WRITE_A], [HISTORY[0], HISTORY[0]]) == ""
    assert "raises the version by one" in found(UNITS[:2], [*HISTORY[:2], HISTORY[0]])


def test_a_write_that_nobody_recorded_is_found() -> None:
    assert "no record knows that write" in found([], HISTORY[:1])


def test_a_row_that_is_not_what_the_last_change_made_is_found() -> None:
    assert "the row of acme/fan is" in found(UNITS, HISTORY, fan=State(3, 2, {"by": "C", "x": 1}, R))


def test_an_answer_that_differs_from_what_was_stored_is_found() -> None:
    wrong = replace(WRITE_A, answers=((Answer(WRITTEN, 1, 0, {**A, "a": 2}),),))
    assert "but {'by': 'A', 'a': 1} was stored" in found([wrong], HISTORY[:1])
    wrong = replace(WRITE_A, answers=((Answer(WRITTEN, 2, 0, A),),))
    assert "was told versions 2 and 0, but 1 and 0" in found([wrong], HISTORY[:1])


def test_an_order_that_contradicts_the_clock_is_found() -> None:
    early_b = replace(WRITE_B, start=0.1, end=0.2)
    assert "B was acknowledged before A began, yet comes after it" in found([WRITE_A, early_b], HISTORY[:2])


@pytest.mark.parametrize(
    ("guard", "answer"),
    [
        (1, Answer("VersionConflict", 1)),  # it was the current version
        (0, Answer("VersionConflict", 3)),  # which it never stood at
        (None, Answer("VersionConflict", 2)),
        (0, Answer("DeviceNotFound")),
        (0, Answer("InvalidDocument")),
        (0, Answer("SomethingElse", 2)),
    ],
)
def test_a_refusal_without_a_reason_is_found(guard: int | None, answer: Answer) -> None:
    refused = unit("D", 6, (operation("replace_desired", Entry("fan", {"by": "D"}, guard)), (answer,)))
    assert "D, replace_desired of acme/fan" in found([WRITE_A, WRITE_B, refused], HISTORY[:2])


def test_a_conflict_with_the_version_of_long_ago_is_found() -> None:
    for at, honest in ((1.9, True), (2.4, True), (6, False)):
        conflict = (operation("replace_desired", Entry("fan", {"by": "D"}, 2)), (Answer("VersionConflict", 1),))
        reasons = found([WRITE_A, WRITE_B, unit("D", at, conflict)], HISTORY[:2])
        assert (reasons == "") == honest


@pytest.mark.parametrize(
    ("acked", "answer", "honest"),
    [
        (1, Answer("LateReport", 2, 2), True),
        (2, Answer("LateReport", 2, 2), False),
        (0, Answer("LateReport", 2, 1), False),
        (9, Answer("UnknownVersion", 3), True),
        (3, Answer("UnknownVersion", 3), False),
    ],
)
def test_a_refused_report_needs_its_reason(acked: int, answer: Answer, honest: bool) -> None:  # noqa: FBT001
    refused = unit("D", 6, (operation("replace_reported", Entry("fan", {"by": "D"}, acked)), (answer,)))
    assert (found([*UNITS, refused], HISTORY) == "") == honest


@pytest.mark.parametrize(
    ("answer", "honest"),
    [
        (Answer(READ, 3, 2, C), True),
        (Answer(READ, 3, 2, AB), False),
        (Answer(READ, 2, 2, AB), False),  # long replaced
        (Answer(READ, 4, 2, C), False),
    ],
)
def test_a_read_shows_what_was_committed(answer: Answer, honest: bool) -> None:  # noqa: FBT001
    reading = unit("G", 6, (operation("get", Entry("fan", {"by": "G"})), (answer,)))
    assert (found([*UNITS, reading], HISTORY) == "") == honest


def test_of_several_reports_of_a_device_in_a_batch_the_last_accepted_one_is_there() -> None:
    reports = operation("replace_reported_many", *(Entry("fan", {"reported by": f"R{n}"}, n) for n in (2, 1)))
    reports = replace(reports, entries=(*reports.entries, Entry("fan", {"reported by": "R"})))
    answer = (Answer(WRITTEN, 2, 2), Answer("LateReport", 2, 2), Answer(WRITTEN, 2, 2))
    batch = unit("R", 3, (reports, answer))
    assert found([WRITE_A, WRITE_B, batch], [*HISTORY[:2], Change(KEY, State(2, 2, AB, {"reported by": "R"}))]) == ""
    first = [*HISTORY[:2], Change(KEY, State(2, 2, AB, {"reported by": "R2"}))]
    assert "R of acme/fan (acknowledged) is not there" in found([WRITE_A, WRITE_B, batch], first)


def test_a_record_says_what_a_killed_writer_was_told(tmp_path: Path) -> None:
    """Killed before its COMMIT nothing is there; killed after it was sent, or in AUTOCOMMIT mode, nobody knows."""
    work = WRITE_A.operations
    path = tmp_path / "w.jsonl"

    def last(*, mode: str = "READ COMMITTED", committing: bool = False, end: bool = False, torn: int = 0) -> Unit:
        recorder = Recorder(path)
        recorder.begin("A", mode, work)
        if committing:
            recorder.committing("A", WRITE_A.answers or ())
        if end:
            recorder.end("A", "acknowledged", None, WRITE_A.answers or ())
        recorder.close()
        path.write_bytes(path.read_bytes()[: -torn or None])
        (unit,) = read_records([path])
        path.unlink()
        return unit

    ended = last(committing=True, end=True)
    assert (ended.outcome, ended.operations, ended.answers) == ("acknowledged", work, WRITE_A.answers)
    assert ended.start < ended.end < float("inf")
    assert last(committing=True, end=True, torn=1).outcome == "unknown"
    assert last(committing=True).outcome == "unknown"
    assert last(committing=True).answers == WRITE_A.answers
    assert last(committing=True, torn=1).outcome == "refused"
    assert last().outcome == "refused"
    assert last(mode=AUTOCOMMIT).outcome == "unknown"
