"""The checker itself: a small honest history passes, and each kind of lie in it is found."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.guarantees.load.checker import violations
from tests.guarantees.load.history import Change, Fleet, Kept, Key, State
from tests.guarantees.load.record import (
    AUTOCOMMIT,
    READ,
    STANDS,
    WRITTEN,
    Answer,
    Entry,
    Operation,
    Recorder,
    Unit,
    latest_requests,
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


def found(
    units: list[Unit], history: list[Change], kept: dict[Key, dict[int, Kept]] | None = None, **rows: State
) -> str:
    """What the checker says of it, if the rows are what the log leaves behind; `fan=` and `lamp=` are other rows.

    `kept` is another history than the one that the product makes of these changes.
    """
    before = {KEY: NOTHING, OTHER: NOTHING}
    last = before | {change.key: change.state for change in history}
    after = {key: state for key, state in last.items() if state.is_there}
    after |= {("acme", device): state for device, state in rows.items()}
    kept = rows_of(units, history) if kept is None else kept
    return "\n".join(violations(units, history, Fleet(before, {}), Fleet(after, kept)))


def rows_of(units: list[Unit], history: list[Change]) -> dict[Key, dict[int, Kept]]:
    """The rows of our own history, if the product is honest."""
    writes = {entry.token: (work, entry) for unit in units for work in unit.operations for entry in work.entries}
    removal = next((token for token, (work, _) in writes.items() if work.kind == "remove"), None)
    kept: dict[Key, dict[int, Kept]] = {}
    for key, state, _ in history:
        rows = kept.setdefault(key, {0: Kept({})})
        if not state.is_there:
            rows[state.desired_version + 1] = Kept(None, None, removal)
        elif state.desired_version not in rows:
            work, entry = writes.get(str(state.desired.get("by")), (None, None))
            reason = entry.token if entry is not None and work is not None and work.gives_reason else None
            rows[state.desired_version] = Kept(state.desired, entry.request if entry is not None else None, reason)
    return kept


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


# A request P, made three times: the first answer was lost, then B wrote, then it was answered.
P = {"by": "P", "p": 1}
PB = P | B
REQUEST = operation("replace_desired", Entry("fan", P, 0, "request P"))
LOST = unit("P", 1, (REQUEST, (Answer(WRITTEN, 1, 0, P),)), outcome="unknown", answers=None, end=1.5)
AFTER_P = replace(WRITE_B, answers=((Answer(WRITTEN, 2, 0, PB),),))
REPEAT = unit("P again", 3, (REQUEST, (Answer(WRITTEN, 2, 0, PB),)))
DONE_ONCE = [Change(KEY, State(1, 0, P, {})), Change(KEY, State(2, 0, PB, {}))]


def test_a_request_that_was_repeated_is_one_write_at_any_of_its_attempts() -> None:
    assert found([LOST, AFTER_P, REPEAT], DONE_ONCE) == ""
    first = replace(LOST, outcome="acknowledged", answers=((Answer(WRITTEN, 1, 0, P),),))
    assert found([first, AFTER_P, REPEAT], DONE_ONCE) == ""
    # Two attempts at the same moment: either can have written.
    both = [unit(name, 1, (REQUEST, (Answer(WRITTEN, 1, 0, P),))) for name in ("P", "P again")]
    assert found(both, DONE_ONCE[:1]) == ""
    # One that was refused is none, unless it is the only one.
    refused = replace(LOST, name="P refused", outcome="refused", error="rolled back on purpose")
    assert found([refused, *both], DONE_ONCE[:1]) == ""
    assert "was refused (rolled back on purpose), and left a trace" in found([refused], DONE_ONCE[:1])


def test_a_request_of_unknown_outcome_may_be_there_or_not_until_a_repeat_is_answered() -> None:
    again = replace(LOST, name="P again")
    assert found([LOST, again], []) == ""
    assert found([LOST, again], DONE_ONCE[:1]) == ""
    answered = replace(REPEAT, answers=((Answer(WRITTEN, 1, 0, P),),))
    assert "P of acme/fan (acknowledged) is not there" in found([LOST, answered], [])


def test_a_request_that_was_done_twice_is_found() -> None:
    """A repeat that wrote, whether it was told so or not."""
    twice = [*DONE_ONCE, Change(KEY, State(3, 0, P, {}))]
    for answer in (Answer(WRITTEN, 3, 0, P), Answer(WRITTEN, 2, 0, PB)):
        repeat = replace(REPEAT, answers=((answer,),))
        assert "P was applied 2 times to acme/fan" in found([LOST, AFTER_P, repeat], twice)
    assert "P was applied 2 times to acme/fan" in found([LOST, AFTER_P, replace(LOST, name="P again")], twice)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(WRITTEN, 0, 0, {}), "was told versions 0 and 0, but 1 and 0 were stored"),  # from before the request
        (Answer(WRITTEN, 1, 0, P), "did not stand at that version then"),  # B was acknowledged before
        (Answer(WRITTEN, 3, 0, PB), "did not stand at that version then"),
        (Answer(WRITTEN, 2, 0, P), f"that version is {PB}"),
        (Answer("VersionConflict", 2), ""),  # refused, and the outcome of the first attempt is still unknown
        (Answer("RequestReused"), "an answer that the contract does not have"),
    ],
)
def test_a_repeat_is_answered_by_the_shadow_as_it_stands(answer: Answer, reason: str) -> None:
    reasons = found([LOST, AFTER_P, replace(REPEAT, answers=((answer,),))], DONE_ONCE)
    assert reason in reasons
    assert bool(reason) == bool(reasons)


def test_half_of_a_unit_is_found_if_a_repeat_cannot_have_written_that_half() -> None:
    lamp = operation("replace_desired", Entry("lamp", B))
    both = replace(LOST, operations=(REQUEST, lamp), answers=((Answer(WRITTEN, 1, 0, P),), (Answer(WRITTEN, 1, 0, B),)))
    on_lamp = Change(OTHER, State(1, 0, B, {}))
    assert "half of a unit was written" in found([both], DONE_ONCE[:1])
    assert "half of a unit was written" in found([both], [on_lamp])
    repeat = replace(REPEAT, answers=((Answer(WRITTEN, 1, 0, P),),))
    assert found([both, repeat], DONE_ONCE[:1]) == ""
    assert found([both, repeat], [*DONE_ONCE[:1], on_lamp]) == ""


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ({2: None}, "version 2 of acme/fan has no row in the history"),
        ({0: None}, "version 0 of acme/fan has no row in the history"),  # the state before the first write
        ({3: Kept(P)}, "the history has version 3 of acme/fan, "),
        ({2: Kept(B, None, "B")}, "as version 2 of acme/fan, which is "),
        ({1: Kept(P, None, "P")}, "as version 1 of acme/fan, which is "),  # a request that the history forgot
        ({2: Kept(PB, "request P", "B")}, "as version 2 of acme/fan, which is "),  # recorded twice
        ({2: Kept(PB, None, None)}, "as version 2 of acme/fan, which is "),
    ],
)
def test_a_history_that_is_not_that_of_the_changes_is_found(rows: dict[int, Kept | None], reason: str) -> None:
    units = [LOST, AFTER_P, REPEAT]
    kept = {**rows_of(units, DONE_ONCE)[KEY], **rows}
    assert reason in found(units, DONE_ONCE, {KEY: {version: row for version, row in kept.items() if row is not None}})


def test_a_history_without_a_change_is_found() -> None:
    assert "the history has version 1 of acme/lamp" in found([], [], {OTHER: {1: Kept(B)}})


# X removes what A and B wrote; G registers it again.
REMOVAL = unit("X", 3, (operation("remove", Entry("fan", {"by": "X"}, 2)), (Answer(WRITTEN),)))
REGISTRATION = unit("G", 4, (operation("register", Entry("fan", {"by": "G"})), (Answer(STANDS, 3, 3, {}),)))
LIFE = [*HISTORY[:2], Change(KEY, State(2, 0, AB, {}, is_there=False))]
NEXT_LIFE = [*LIFE, Change(KEY, State(3, 3, {}, {}), "G")]


def test_a_device_that_is_registered_again_goes_on_at_the_version_of_its_removal() -> None:
    lives = [WRITE_A, WRITE_B, REMOVAL, REGISTRATION]
    assert found(lives[:3], LIFE) == ""
    assert found(lives, NEXT_LIFE) == ""
    for version in (0, 2, 4):
        registered = Change(KEY, State(version, version, {}, {}), "G")
        assert f"from desired_version 3 to {version}: registered as" in found(lives, [*LIFE, registered])
    pending = Change(KEY, State(3, 0, {}, {}), "G")
    assert "registered as" in found(lives, [*LIFE, pending])
    documents = Change(KEY, State(3, 3, AB, {}), "G")
    assert "registered as" in found(lives, [*LIFE, documents])
    assert "registered as" in found(lives, [*HISTORY[:2], Change(KEY, State(3, 3, {}, {}), "G")])  # it was there


def test_a_removal_is_a_version_of_its_own() -> None:
    lives = [WRITE_A, WRITE_B, REMOVAL]
    rows = rows_of(lives, LIFE)[KEY]
    assert "version 3 of acme/fan has no row" in found(lives, LIFE, {KEY: {n: rows[n] for n in range(3)}})
    assert "acme/fan is gone" in found(lives[:2], LIFE[:2], fan=State(3, 3, {}, {}, is_there=False))
    assert "X of acme/fan (acknowledged) is not there" in found(lives, LIFE[:2])
    guarded = replace(REMOVAL, operations=(operation("remove", Entry("fan", {"by": "X"}, 1)),))
    assert "expected version 1, but replaced version 2" in found([WRITE_A, WRITE_B, guarded], LIFE)
    other = [*LIFE[:2], Change(KEY, State(1, 0, A, {}, is_there=False))]
    assert "its last change says" in found(lives, other)


def test_an_acknowledgement_of_the_life_before_that_was_accepted_is_found() -> None:
    late = unit(
        "L", 5, (operation("replace_reported", Entry("fan", {"reported by": "L"}, 2)), (Answer(WRITTEN, 3, 2),))
    )
    lives = [WRITE_A, WRITE_B, REMOVAL, REGISTRATION, late]
    reasons = found(lives, [*NEXT_LIFE, Change(KEY, State(3, 2, {}, {"reported by": "L"}))])
    assert "reported_version went down from 3 to 2" in reasons
    assert "acknowledged 2, with 3 acknowledged and 3 asked for" in reasons


def test_an_object_of_the_life_before_that_was_written_is_found() -> None:
    change = unit("O", 5, (operation("orm_change", Entry("fan", {"by": "O"})), (Answer(WRITTEN),)))
    lives = [WRITE_A, WRITE_B, REMOVAL, REGISTRATION, change]
    assert found(lives, [*NEXT_LIFE, Change(KEY, State(4, 3, {"by": "O"}, {}))]) == ""
    old = [*NEXT_LIFE, Change(KEY, State(4, 3, AB | {"by": "O"}, {}))]
    assert "a write in between was lost" in found(lives, old)


def test_a_device_is_not_found_only_while_it_is_gone() -> None:
    lives = [WRITE_A, WRITE_B, REMOVAL, REGISTRATION]
    for at, honest in ((2.9, True), (3.8, True), (4.4, True), (2.1, False), (5, False)):
        reading = unit("D", at, (operation("get", Entry("fan", {"by": "D"})), (Answer("DeviceNotFound"),)))
        assert (found([*lives, reading], NEXT_LIFE) == "") == honest
        assert ("there was no reason for that" in found([*lives, reading], NEXT_LIFE)) != honest


def test_a_device_that_was_there_is_registered_without_a_trace() -> None:
    stands = unit("G", 3, (operation("register", Entry("fan", {"by": "G"})), (Answer(STANDS, 2, 0, AB),)))
    assert found([WRITE_A, WRITE_B, stands], HISTORY[:2]) == ""
    wrong = replace(stands, answers=((Answer(STANDS, 2, 0, A),),))
    assert "that version is" in found([WRITE_A, WRITE_B, wrong], HISTORY[:2])


def refusal(name: str, at: float, version: int, answer: Answer) -> Unit:
    return unit(
        name, at, (operation("refuse_desired", Entry("fan", {"reported by": name}, version=version)), (answer,))
    )


REFUSED = [*HISTORY[:2], Change(KEY, State(2, 0, AB, {}, "F"))]


def test_a_refusal_of_the_newest_version_is_honest_and_ends_with_the_next_write() -> None:
    refuses = refusal("F", 3, 2, Answer(WRITTEN, 2, 0))
    assert found([WRITE_A, WRITE_B, refuses], REFUSED) == ""
    after = {"by": "D"}
    writes = unit("D", 4, (operation("replace_desired", Entry("fan", after)), (Answer(WRITTEN, 3, 0, after),)))
    units = [WRITE_A, WRITE_B, refuses, writes]
    assert found(units, [*REFUSED, Change(KEY, State(3, 0, after, {}))]) == ""
    stays = Change(KEY, State(3, 0, after, {}, "F"))
    assert "one change touched 2 documents" in found(units, [*REFUSED, stays])
    report = replace(REPORT, start=4, end=4.5)
    assert found([WRITE_A, WRITE_B, refuses, report], [*REFUSED, Change(KEY, State(2, 2, AB, R))]) == ""
    assert "is not there" in found([WRITE_A, WRITE_B, refuses], HISTORY[:2])


@pytest.mark.parametrize(
    ("version", "stands", "wrong"),
    [
        (1, State(2, 0, AB, {}), "refused 1, with 0 acknowledged and 2 asked for"),  # there is a newer version
        (2, State(2, 2, AB, R), "refused 2, with 2 acknowledged and 2 asked for"),  # it is acknowledged
        (3, State(2, 0, AB, {}), "refused 3, with 0 acknowledged and 2 asked for"),  # it was never asked for
    ],
)
def test_a_refusal_that_is_not_of_the_newest_version_and_was_accepted_is_found(
    version: int, stands: State, wrong: str
) -> None:
    refuses = refusal("F", 4, version, Answer(WRITTEN, 2, stands.reported_version))
    history = [*HISTORY[:2], *([HISTORY[2]] if stands.reported else []), Change(KEY, stands._replace(refusal="F"))]
    assert wrong in found([*UNITS[: len(history) - 1], refuses], history)


@pytest.mark.parametrize(
    ("version", "answer", "honest"),
    [
        (1, Answer("LateReport", 2), True),
        (2, Answer("LateReport", 2), True),  # REPORT acknowledges it
        (2, Answer("LateReport", 3), False),  # it never stood there
        (3, Answer("UnknownVersion", 2), True),
        (2, Answer("UnknownVersion", 2), False),
    ],
)
def test_a_refusal_that_was_not_accepted_needs_its_reason(version: int, answer: Answer, honest: bool) -> None:  # noqa: FBT001
    assert (found([*UNITS[:3], refusal("F", 6, version, answer)], HISTORY[:3]) == "") == honest


def test_a_refusal_called_late_though_nothing_was_acknowledged_is_found() -> None:
    assert "that version was never acknowledged" in found(
        [WRITE_A, WRITE_B, refusal("F", 6, 2, Answer("LateReport", 2))], HISTORY[:2]
    )


def test_a_report_that_refuses_leaves_its_own_words() -> None:
    entry = Entry("fan", {"reported by": "F"}, None, version=2)
    report = unit("F", 3, (operation("replace_reported_many", entry), (Answer(WRITTEN, 2, 0),)))
    for words, honest in (("F", True), ("another", False), (None, False)):
        history = [*HISTORY[:2], Change(KEY, State(2, 0, AB, {"reported by": "F"}, words))]
        assert (found([WRITE_A, WRITE_B, report], history) == "") == honest


def restoring(version: int, answer: Answer) -> Unit:
    return unit("S", 3, (operation("restore_desired", Entry("fan", {"by": "S"}, version=version)), (answer,)))


def test_what_is_restored_is_the_document_of_that_version() -> None:
    """The document names A; it is the history that names the write."""
    restores = restoring(1, Answer(WRITTEN, 3, 0, A))
    rows = {0: Kept({}), 1: Kept(A, None, "A"), 2: Kept(AB, None, "B"), 3: Kept(A, None, "S")}
    restored = [*HISTORY[:2], Change(KEY, State(3, 0, A, {}))]
    assert found([WRITE_A, WRITE_B, restores], restored, {KEY: rows}) == ""
    other = restoring(2, Answer(WRITTEN, 3, 0, A))
    assert "but {'by': 'A', 'a': 1} was stored" in found([WRITE_A, WRITE_B, other], restored, {KEY: rows})


@pytest.mark.parametrize(("version", "honest"), [(0, False), (1, False), (2, False), (3, True)])
def test_a_version_that_is_said_not_to_be_kept_is_none(version: int, honest: bool) -> None:  # noqa: FBT001
    restores = restoring(version, Answer("VersionNotKept"))
    assert (found([WRITE_A, WRITE_B, restores], HISTORY[:2]) == "") == honest


def test_the_latest_requests_of_a_record_are_those_that_can_be_repeated(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    recorder = Recorder(path)
    recorder.begin("A", "READ COMMITTED", WRITE_A.operations)
    recorder.begin("P", "READ COMMITTED", (*WRITE_B.operations, REQUEST))
    recorder.committing("P", ())
    recorder.close()
    assert latest_requests(path) == [REQUEST]


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
