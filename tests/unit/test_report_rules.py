"""What becomes of reports, decided from versions alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iot_models import DocumentLimits, LateReport, Report, ReportOutcome, ReportStatus, UnknownVersion
from iot_models._core.report_rules import Accepted, Stored, Versions, check, fold, judge, require_refusable
from tests.fuzz.corpus.hostile_types import LyingInt

LIMITS = DocumentLimits(max_bytes=100)
ACCEPTED, LATE, UNKNOWN_DEVICE, UNKNOWN_VERSION, INVALID = ReportStatus

acknowledged = st.none() | st.integers(0, 4)
standings = st.builds(Versions, st.integers(0, 3), st.integers(0, 4))


def decide(
    reports: list[Report], versions: dict[str, Versions]
) -> tuple[list[ReportOutcome], dict[str, Accepted]]:  # fmt: skip
    stored = {device_id: Stored(standing) for device_id, standing in versions.items()}
    return fold([check(report, LIMITS, patches=False) for report in reports], stored, "acme", LIMITS)


def test_a_report_and_its_outcome_are_frozen_values() -> None:
    assert Report("d", {}) == Report(device_id="d", reported={}, acked_version=None)
    for value, name in ((Report("d", {}), "device_id"), (ReportOutcome("d", LATE, 1, 1), "status")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, "other")


def test_a_status_is_its_word() -> None:
    assert [str(status) for status in ReportStatus] == [
        "accepted", "late", "unknown_device", "unknown_version", "invalid"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("acked", "desired", "reported", "status"),
    [
        (None, 7, 5, ACCEPTED),
        (None, 3, 9, ACCEPTED),
        (4, 7, 5, LATE),
        (5, 7, 5, ACCEPTED),
        (7, 7, 5, ACCEPTED),
        (8, 7, 5, UNKNOWN_VERSION),
        (8, 3, 9, UNKNOWN_VERSION),  # restored from a backup: desired fell behind
        (3, 3, 9, LATE),
    ],
)
def test_a_report_is_judged_by_both_versions(
    acked: int | None, desired: int, reported: int, status: ReportStatus
) -> None:
    assert judge(acked, Versions(desired, reported)) is status


def test_each_report_is_judged_by_what_those_before_it_left_behind() -> None:
    reports = [Report("d", {"n": n}, acked) for n, acked in enumerate((5, 7, 6, None, 8))]

    outcomes, accepted = decide(reports, {"d": Versions(7, 5)})

    assert [outcome.status for outcome in outcomes] == [ACCEPTED, ACCEPTED, LATE, ACCEPTED, UNKNOWN_VERSION]
    assert [outcome.reported_version for outcome in outcomes] == [5, 7, 7, 7, 7]
    assert accepted == {"d": Accepted('{"n":3}', seen=Stored(Versions(7, 5)), reported_version=7)}


@pytest.mark.parametrize(
    ("report", "looked_up"),
    [
        (Report("d", {"a": float("nan")}), True),
        (Report("d", {"a": "\0"}), True),
        (Report("d", {"a": "x" * 200}), True),
        (Report("d", [1]), True),  # type: ignore[arg-type]
        (Report("d", None), True),  # type: ignore[arg-type]
        (Report("d", {}, -1), True),
        (Report("d", {}, 2**63), True),
        (Report("d", {}, True), True),  # noqa: FBT003 - no version
        (Report("d", {}, "7"), True),  # type: ignore[arg-type]
        (Report("d", {}, 7.0), True),  # type: ignore[arg-type]
        (Report("d\0", {}, -1), False),
        (Report(5, {}), False),  # type: ignore[arg-type]
        (Report(None, {}), False),  # type: ignore[arg-type]
        (Report([], {}), False),  # type: ignore[arg-type]
    ],
    ids=str,
)
def test_an_invalid_report_is_an_outcome_with_the_versions_as_they_are(report: Report, *, looked_up: bool) -> None:
    outcomes, accepted = decide([report], {"d": Versions(7, 5)})

    versions = (7, 5) if looked_up else (None, None)
    assert outcomes == [ReportOutcome(report.device_id, INVALID, *versions)]
    assert accepted == {}
    assert decide([report], {})[0] == [ReportOutcome(report.device_id, INVALID, None, None)]


@pytest.mark.parametrize("device_id", ["nobody", "", "a\0b", "\ud800"], ids=ascii)
def test_a_device_that_does_not_exist_has_no_versions(device_id: str) -> None:
    outcomes, accepted = decide([Report(device_id, {}, 1)], {"d": Versions(7, 5)})

    assert outcomes == [ReportOutcome(device_id, UNKNOWN_DEVICE, None, None)]
    assert accepted == {}


@pytest.mark.parametrize("stranger", [None, ("d", {}), {"device_id": "d", "reported": {}}])
def test_what_is_no_report_is_a_mistake_of_the_caller(stranger: Any) -> None:
    with pytest.raises(TypeError, match="reports must be Report objects, got"):
        check(stranger, LIMITS, patches=False)


@given(
    reports=st.lists(st.builds(Report, st.sampled_from("abc"), st.just({}), acknowledged)),
    versions=st.dictionaries(st.sampled_from("ab"), standings),
    cut=st.integers(0, 10),
)
def test_a_batch_may_be_cut_in_two_anywhere(reports: list[Report], versions: dict[str, Versions], cut: int) -> None:
    whole, written = decide(reports, versions)

    first, after_first = decide(reports[:cut], versions)
    between = versions | {
        device_id: Versions(versions[device_id].desired, write.reported_version)
        for device_id, write in after_first.items()
    }
    second, after_second = decide(reports[cut:], between)

    assert whole == first + second
    both = after_first | after_second
    assert {d: (w.document, w.reported_version) for d, w in written.items()} == {
        d: (w.document, w.reported_version) for d, w in both.items()
    }


@given(
    reports=st.lists(st.builds(Report, st.sampled_from("abc"), st.just({}), acknowledged)),
    versions=st.dictionaries(st.sampled_from("abc"), standings),
)
def test_no_device_depends_on_another(reports: list[Report], versions: dict[str, Versions]) -> None:
    outcomes, accepted = decide(reports, versions)

    for device_id in "abc":
        alone, written = decide([report for report in reports if report.device_id == device_id], versions)
        assert alone == [outcome for outcome in outcomes if outcome.device_id == device_id]
        assert written.get(device_id) == accepted.get(device_id)


@given(reports=st.lists(st.builds(Report, st.just("d"), st.just({}), acknowledged)), versions=standings)
def test_the_reported_version_never_falls_and_nothing_seen_is_changed(
    reports: list[Report], versions: Versions
) -> None:
    stored = {"d": versions}
    outcomes, accepted = decide(reports, stored)

    steps = [versions.reported, *(outcome.reported_version or 0 for outcome in outcomes)]
    assert steps == sorted(steps)
    assert stored == {"d": versions}
    assert ("d" in accepted) == any(outcome.status is ACCEPTED for outcome in outcomes)
    assert all(write.seen.versions == versions for write in accepted.values())


def test_a_version_that_cannot_be_shown_makes_its_report_invalid_and_stops_no_other() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    reports = [Report("d", {"n": 1}), Report("d", {"n": 2}, deep), Report("d", {"n": 3}, 10**5_000), Report("d", {}, 1)]

    outcomes, accepted = decide(reports, {"d": Versions(1, 0)})

    assert [outcome.status for outcome in outcomes] == [ACCEPTED, INVALID, INVALID, ACCEPTED]
    assert accepted == {"d": Accepted("{}", Stored(Versions(1, 0)), 1)}


def test_what_is_written_of_a_version_is_the_number_that_it_holds() -> None:
    _, accepted = decide([Report("d", {}, LyingInt(2))], {"d": Versions(2, 1)})

    assert type(accepted["d"].reported_version) is int
    assert accepted["d"].reported_version == 2


def test_what_is_no_report_is_refused_however_deep_it_is() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]

    with pytest.raises(TypeError, match=r"reports must be Report objects, got \[\["):
        check(deep, LIMITS, patches=False)


def test_a_refusal_is_taken_of_the_newest_version_while_it_is_not_acknowledged() -> None:
    require_refusable("d", 5, Versions(5, 4))
    for version, versions, error in (
        (4, Versions(5, 3), LateReport),
        (5, Versions(5, 5), LateReport),
        (6, Versions(5, 3), UnknownVersion),
    ):
        with pytest.raises(error):
            require_refusable("d", version, versions)
