"""The reference model itself, held to what others have written down: RFC 7396, AWS, and the sizes that are documented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from iot_models import DocumentTooLarge, InvalidDocument, ReportStatus
from tests.reference import shadows, versions
from tests.reference.documents import Limits
from tests.reference.json_values import equal, merge_patch

DATA = Path(__file__).parents[1] / "data"
RFC7396_CASES = json.loads((DATA / "rfc7396_cases.json").read_text())
AWS_DELTAS = json.loads((DATA / "aws_documented_deltas.json").read_text())


@pytest.mark.parametrize("case", [pytest.param(case, id=case["id"]) for case in RFC7396_CASES])
def test_its_merge_patch_does_what_rfc_7396_shows(case: dict[str, Any]) -> None:
    assert merge_patch(case["original"], case["patch"]) == case["result"]


def test_its_merge_patch_changes_no_argument() -> None:
    target: dict[str, Any] = {"a": {"b": 1, "c": 2}, "d": [1]}

    patched = merge_patch(target, {"a": {"b": None, "e": {"f": None}}, "d": {"x": 1}})

    assert patched == {"a": {"c": 2, "e": {}}, "d": {"x": 1}}
    assert target == {"a": {"b": 1, "c": 2}, "d": [1]}


@pytest.mark.parametrize("case", [pytest.param(case, id=case["id"]) for case in AWS_DELTAS])
def test_its_nested_delta_is_the_one_that_aws_documents(case: dict[str, Any]) -> None:
    # In these examples null stands for "no document" and "no delta".
    assert shadows.nested_delta(case["desired"], case["reported"] or {}) == (case["delta"] or {})


def test_true_is_not_1_and_a_number_is_what_it_is_written_as() -> None:
    assert not equal({"on": [True]}, {"on": [1]})
    assert equal({"a": 1, "b": 1e23}, {"b": 10**23, "a": 1.0})


def test_a_report_behind_reported_is_late_and_one_ahead_of_desired_is_of_an_unknown_version() -> None:
    judged = [versions.status_of_report(acked, 7, 5) for acked in (None, 4, 5, 7, 8)]
    accepted, late, unknown = ReportStatus.ACCEPTED, ReportStatus.LATE, ReportStatus.UNKNOWN_VERSION

    assert judged == [accepted, late, accepted, accepted, unknown]
    assert versions.status_of_report(8, 3, 9) is unknown  # both: desired lags behind after a restore


@pytest.mark.parametrize(
    ("document", "refusal"),
    [
        ({"a": {}}, None),
        ({"a": {"b": {}}}, InvalidDocument),
        ({"a": "x" * 12}, None),
        ({"a": "x" * 13}, DocumentTooLarge),
        ({"a": "\u00e9" * 7}, DocumentTooLarge),
        ({"a": float("nan")}, InvalidDocument),
        ({"a": "\0"}, InvalidDocument),
        ({1: 2}, InvalidDocument),
        ([], InvalidDocument),
    ],
)
def test_a_document_is_refused_for_its_depth_its_bytes_and_its_types(document: Any, refusal: Any) -> None:
    assert Limits(max_bytes=20, max_depth=1).refusal(document) is refusal
