"""The twin helpers on documents in the shape of real kinds of devices: `tests/data/real_documents.py`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from iot_models import twin
from tests.data.real_documents import CASES, Case
from tests.reference import documents, json_values, shadows
from tests.reference.json_values import equal

if TYPE_CHECKING:
    from collections.abc import Iterator

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def with_one_member_less(patch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for key, value in patch.items():
        yield {other: kept for other, kept in patch.items() if other != key}
        if isinstance(value, dict):
            for smaller in with_one_member_less(value):
                yield patch | {key: smaller}


def at(pointer: str, value: Any) -> Any:
    for key in pointer.split("/")[1:]:
        value = value.get(key.replace("~1", "/").replace("~0", "~"), "absent") if isinstance(value, dict) else "absent"
    return value


# The cases themselves


def test_each_case_has_a_name_of_its_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@each_case
def test_what_a_case_expects_is_what_the_reference_says(case: Case) -> None:
    assert documents.storable(case.desired)
    assert documents.storable(case.reported)
    assert equal(shadows.delta(case.desired, case.reported), case.delta)
    assert equal(shadows.nested_delta(case.desired, case.reported), case.nested_delta)
    if case.merge_patch is None:
        assert case.no_patch_at
        assert at(case.no_patch_at, case.desired) is None
        assert at(case.no_patch_at, case.reported) is not None
    else:
        assert equal(json_values.merge_patch(case.reported, case.merge_patch), case.desired)
        for smaller in with_one_member_less(case.merge_patch):
            assert not equal(json_values.merge_patch(case.reported, smaller), case.desired)


# The helpers


@each_case
def test_both_deltas_are_as_expected(case: Case) -> None:
    assert equal(twin.compute_delta(case.desired, case.reported), case.delta)
    assert equal(twin.compute_nested_delta(case.desired, case.reported), case.nested_delta)


@each_case
def test_the_comparison_tells_added_removed_and_changed_keys(case: Case) -> None:
    expected = shadows.comparison(case.desired, case.reported)
    comparison = twin.compare(case.desired, case.reported)

    assert equal(comparison.added, expected["added"])
    assert equal(comparison.removed, expected["removed"])
    assert equal({key: list(change) for key, change in comparison.changed.items()}, expected["changed"])
    assert comparison.unchanged_count == expected["unchanged_count"]
    assert {*comparison.added, *comparison.changed} == case.delta.keys()


@each_case
def test_the_patch_makes_desired_of_reported(case: Case) -> None:
    if case.merge_patch is not None:
        assert equal(twin.merge_patch(case.reported, case.merge_patch), case.desired)


@each_case
def test_the_patch_is_found_or_the_error_names_the_place_where_none_exists(case: Case) -> None:
    if case.merge_patch is not None:
        assert equal(twin.create_merge_patch(case.reported, case.desired), case.merge_patch)
    else:
        assert case.no_patch_at
        with pytest.raises(ValueError, match=re.escape(case.no_patch_at)):
            twin.create_merge_patch(case.reported, case.desired)
