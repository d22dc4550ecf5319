from __future__ import annotations

import doctest
import inspect
import json
import re
from copy import deepcopy
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import IntEnum, StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iot_models import twin
from iot_models._core.equality import json_equal, surely_equal
from iot_models.twin import (
    STALE_THRESHOLD_MINUTES,
    Change,
    Comparison,
    SyncStatus,
    compare,
    compute_delta,
    compute_nested_delta,
    create_merge_patch,
    merge_patch,
    sync_status,
)
from tests.generated.documents import document_pairs, documents, documents_of, scalars_without_null, value_pairs, values
from tests.reference.json_values import canonical, equal
from tests.reference.json_values import merge_patch as reference_merge_patch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HELPERS: list[Callable[..., Any]] = [compute_delta, compute_nested_delta, compare, merge_patch]

DATA = Path(__file__).parents[1] / "data"
RFC7396_CASES = json.loads((DATA / "rfc7396_cases.json").read_text())
AWS_DELTAS = json.loads((DATA / "aws_documented_deltas.json").read_text())

NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)
HALF_AN_HOUR = timedelta(minutes=30)
TICK = timedelta(microseconds=1)


def containers(value: object) -> Iterator[dict[str, Any] | list[Any]]:
    if isinstance(value, Comparison):
        value = [value.added, value.removed, value.changed]
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from containers(item)
    elif isinstance(value, list | tuple):
        if isinstance(value, list):
            yield value
        for item in value:
            yield from containers(item)


def seed_compute_delta(desired: dict[str, Any], reported: dict[str, Any]) -> dict[str, Any]:
    delta = {}
    for key, desired_val in desired.items():
        if reported.get(key) != desired_val:
            delta[key] = desired_val  # noqa: PERF403  # the seed's loop, word for word
    return delta


# Equality


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (1, 1.0),
        (0, -0.0),
        (0.0, -0.0),
        (10**23, 1e23),
        (1e23, 10**23),
        ({"a": 1, "b": 2}, {"b": 2.0, "a": 1}),
        ([], []),
        ([1, {"a": None}], [1.0, {"a": None}]),
        ({"a": [1, 10**23], "b": 5}, {"a": [1.0, 1e23], "b": 5.0}),
        (Decimal("0.1"), 0.1),
    ],
)
def test_values_that_postgresql_calls_equal_are_equal(left: object, right: object) -> None:
    assert json_equal(left, right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (True, 1),
        (1.0, True),
        (False, 0),
        ({"a": True}, {"a": 1}),
        ([[0]], [[False]]),
        (99_999_999_999_999_991_611_392, 1e23),
        (2**53 + 1, 2.0**53),
        (None, False),
        (None, {}),
        ("", None),
        ("1", 1),
        ([1, 2], [2, 1]),
        ([1], [1, 2]),
        ([], {}),
        ({}, []),
        ("a", ["a"]),
        ({"a": None}, {}),
        ({"a": None}, {"b": None}),
        ("\u00e9", "e\u0301"),
    ],
)
def test_values_that_postgresql_tells_apart_differ(left: object, right: object) -> None:
    assert not json_equal(left, right)
    assert not json_equal(right, left)


def test_subclasses_of_json_types_are_compared_as_what_json_makes_of_them() -> None:
    class Level(IntEnum):
        LOW = 1

    class Color(StrEnum):
        RED = "red"

    class Settings(dict[str, Any]):
        pass

    class Steps(list[Any]):
        pass

    assert json_equal([Level.LOW], [1.0])
    assert not json_equal([Level.LOW], [True])
    assert json_equal(Color.RED, "red")
    assert json_equal(Settings(a=1), {"a": 1.0})
    assert not json_equal(Settings(a=1), Settings(a=True))
    assert not json_equal(Steps([1]), Steps([True]))


def test_numbers_read_as_exact_decimals_are_numbers() -> None:
    desired = json.loads('{"level": 0.1, "limit": 1e23}', parse_float=Decimal)
    assert compute_delta(desired, {"level": 0.1, "limit": 10**23}) == {}
    assert compute_delta(desired, {"level": 0.2, "limit": 1e23}) == {"level": Decimal("0.1")}


@given(value_pairs)
def test_equality_is_that_of_the_canonical_form(pair: tuple[Any, Any]) -> None:
    left, right = pair
    assert json_equal(left, right) == json_equal(right, left) == (canonical(left) == canonical(right))


@given(values)
def test_a_value_equals_what_its_json_text_reads_back_as(value: Any) -> None:
    assert json_equal(value, json.loads(json.dumps(value)))


# Arguments and results


@pytest.mark.parametrize("helper", [*HELPERS, create_merge_patch])
@pytest.mark.parametrize("wrong", [None, [], "{}", 1])
def test_an_argument_that_is_no_object_is_refused_by_name(helper: Callable[..., Any], wrong: object) -> None:
    first, second = inspect.signature(helper).parameters
    given_type = type(wrong).__name__
    with pytest.raises(TypeError, match=rf"^{first} must be a JSON object \(a dict\), got {given_type}$"):
        helper(wrong, {})
    with pytest.raises(TypeError, match=rf"^{second} must be a JSON object \(a dict\), got {given_type}$"):
        helper({}, wrong)


@pytest.mark.parametrize("helper", [*HELPERS, create_merge_patch])
def test_a_read_only_mapping_is_taken_for_a_document(helper: Callable[..., Any]) -> None:
    desired, reported = {"a": 1, "b": [2]}, {"a": 3, "c": 4}
    assert helper(MappingProxyType(desired), MappingProxyType(reported)) == helper(desired, reported)


@pytest.mark.parametrize("helper", HELPERS)
@given(pair=document_pairs)
def test_an_argument_is_never_modified_not_even_through_the_result(
    helper: Callable[..., Any], pair: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    before = json.dumps(pair)
    result = helper(*pair)
    assert json.dumps(pair) == before
    for container in list(containers(result)):
        container.clear()
    assert json.dumps(pair) == before


# The delta


@pytest.mark.parametrize("case", [pytest.param(case, id=case["id"]) for case in AWS_DELTAS])
def test_the_nested_delta_is_the_one_that_aws_documents(case: dict[str, Any]) -> None:
    # In these examples null stands for "no document" and "no delta".
    assert compute_nested_delta(case["desired"], case["reported"] or {}) == (case["delta"] or {})


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case["id"]) for case in AWS_DELTAS if "nested" not in case["id"]]
)
def test_the_delta_of_flat_documents_is_the_one_that_aws_documents(case: dict[str, Any]) -> None:
    assert compute_delta(case["desired"], case["reported"] or {}) == (case["delta"] or {})


def test_the_delta_has_the_whole_desired_value_of_a_key() -> None:
    assert compute_delta({"color": {"r": 1, "g": 2}}, {"color": {"r": 1, "g": 3}}) == {"color": {"r": 1, "g": 2}}


@pytest.mark.parametrize("delta_of", [compute_delta, compute_nested_delta])
def test_a_null_that_reported_lacks_is_in_the_delta(delta_of: Callable[..., dict[str, Any]]) -> None:
    assert delta_of({"schedule": None}, {}) == {"schedule": None}
    assert delta_of({"schedule": None}, {"schedule": None}) == {}
    assert delta_of({"schedule": None}, {"schedule": 1}) == {"schedule": None}


@pytest.mark.parametrize("delta_of", [compute_delta, compute_nested_delta])
def test_true_is_not_one_in_the_delta(delta_of: Callable[..., dict[str, Any]]) -> None:
    assert canonical(delta_of({"on": True, "level": 1}, {"on": 1, "level": 1.0})) == canonical({"on": True})


@given(documents)
def test_equal_documents_have_no_delta(document: dict[str, Any]) -> None:
    reported = json.loads(json.dumps(document))
    assert compute_delta(document, reported) == {}
    assert compute_nested_delta(document, reported) == {}


@given(document_pairs)
def test_a_device_that_takes_over_the_delta_is_in_sync(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    desired, reported = pair
    delta = compute_delta(desired, reported)
    assert compute_delta(desired, {**reported, **delta}) == {}
    assert compute_delta(delta, desired) == {}
    assert compute_delta(delta, reported) == delta


@given(st.tuples(*[documents_of(st.sampled_from(("off", "on", 2, 3, 0.5)))] * 2))
def test_the_delta_is_the_seeds_where_python_and_json_agree(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert compute_delta(*pair) == seed_compute_delta(*pair)


# The nested delta


@pytest.mark.parametrize(
    ("desired", "reported", "delta"),
    [
        pytest.param({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"c": 1, "d": 3}}}, {"a": {"b": {"d": 2}}}, id="leaf"),
        pytest.param({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}, {}, id="satisfied"),
        pytest.param({"a": {"b": {}}}, {"a": {"b": {"c": 1}}}, {}, id="empty object asks for nothing"),
        pytest.param({"a": {}}, {}, {"a": {}}, id="absent empty object"),
        pytest.param({"a": {"b": None}}, {"a": {}}, {"a": {"b": None}}, id="absent null"),
        pytest.param({"a": {}}, {"a": []}, {"a": {}}, id="empty object for an array"),
        pytest.param({"a": {"b": 1, "c": 2}}, {"a": 1}, {"a": {"b": 1, "c": 2}}, id="object for a scalar"),
        pytest.param({"a": 1}, {"a": {"b": 1}}, {"a": 1}, id="scalar for an object"),
        pytest.param({"a": [{"b": 1}, 2]}, {"a": [{"b": 1}, 3]}, {"a": [{"b": 1}, 2]}, id="array whole"),
    ],
)
def test_the_nested_delta_holds_only_what_differs(
    desired: dict[str, Any], reported: dict[str, Any], delta: dict[str, Any]
) -> None:
    assert compute_nested_delta(desired, reported) == delta


def test_documents_that_only_python_calls_equal_are_compared_as_a_whole_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[object] = []

    def counted(left: object, right: object) -> bool:
        compared.append(left)
        return surely_equal(left, right)

    monkeypatch.setattr(twin, "surely_equal", counted)
    desired, reported = ({"a": {"a": {"a": {"one": one, "on": True}}}} for one in (1, 1.0))
    assert compute_nested_delta(desired, reported) == {}
    assert len(compared) == 1
    reported["a"]["a"]["a"]["on"] = 1
    assert compute_nested_delta(desired, reported) == {"a": {"a": {"a": {"on": True}}}}
    assert len(compared) == 2


@given(documents_of(scalars_without_null), documents)
def test_a_nested_delta_is_a_merge_patch_that_brings_the_device_in_sync(
    desired: dict[str, Any], reported: dict[str, Any]
) -> None:
    patched = merge_patch(reported, compute_nested_delta(desired, reported))
    assert compute_nested_delta(desired, patched) == {}


@given(document_pairs)
def test_the_nested_delta_is_part_of_the_delta(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    delta, nested = compute_delta(*pair), compute_nested_delta(*pair)
    assert set(nested) <= set(delta)
    assert compute_nested_delta(nested, delta) == {}


# The comparison


def test_a_comparison_goes_from_reported_to_desired() -> None:
    comparison = compare({"color": "red", "fan": None, "same": [1]}, {"color": "green", "engine": "on", "same": [1.0]})
    assert comparison == Comparison(
        added={"fan": None},
        removed={"engine": "on"},
        changed={"color": Change(old="green", new="red")},
        unchanged_count=1,
    )


@given(document_pairs)
def test_a_comparison_puts_every_key_in_one_place(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    desired, reported = pair
    comparison = compare(desired, reported)
    unchanged = {key for key in desired if key in reported and json_equal(desired[key], reported[key])}
    assert comparison.unchanged_count == len(unchanged)
    assert sorted([*comparison.added, *comparison.removed, *comparison.changed, *unchanged]) == sorted(
        {*desired, *reported}
    )
    assert set(comparison.added).isdisjoint(reported)
    assert set(comparison.removed).isdisjoint(desired)
    assert set(compute_delta(desired, reported)) == {*comparison.added, *comparison.changed}


@given(document_pairs)
def test_a_comparison_read_backwards_swaps_its_parts(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    forth, back = compare(*pair), compare(*reversed(pair))
    assert (forth.added, forth.removed, forth.unchanged_count) == (back.removed, back.added, back.unchanged_count)
    assert forth.changed == {key: Change(old=new, new=old) for key, (old, new) in back.changed.items()}


# The merge patch


@pytest.mark.parametrize("case", [pytest.param(case, id=case["id"]) for case in RFC7396_CASES])
def test_a_merge_patch_does_what_rfc_7396_shows(case: dict[str, Any]) -> None:
    original, patch, result = case["original"], case["patch"], case["result"]
    if isinstance(original, dict) and isinstance(patch, dict):
        assert merge_patch(original, patch) == result
    # One level down every case is an object's; there a null removes the key.
    assert merge_patch({"at": original}, {"at": patch}) == ({} if patch is None else {"at": result})


@given(document_pairs)
def test_a_merge_patch_is_the_rfcs_pseudo_code(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    document, patch = pair
    expected = reference_merge_patch(document, patch)
    assert canonical(merge_patch(document, patch)) == canonical(expected)


@given(documents)
def test_an_empty_merge_patch_changes_nothing(document: dict[str, Any]) -> None:
    assert canonical(merge_patch(document, {})) == canonical(document)


def test_a_merge_patch_keeps_the_keys_in_their_places() -> None:
    patched = merge_patch({"a": 1, "b": {"x": 1, "y": 2}, "c": 3}, {"d": 4, "b": {"x": 5}, "c": None})
    assert json.dumps(patched) == '{"a": 1, "b": {"x": 5, "y": 2}, "d": 4}'


# The sync status


@pytest.mark.parametrize(
    ("desired_version", "reported_version", "age", "status"),
    [
        (0, 0, timedelta(0), "synced"),
        (8, 7, timedelta(0), "pending"),
        (7, 8, timedelta(0), "pending"),
        (7, 7, HALF_AN_HOUR, "synced"),
        (8, 7, HALF_AN_HOUR, "pending"),
        (7, 7, HALF_AN_HOUR + TICK, "stale"),
        (8, 7, HALF_AN_HOUR + TICK, "stale"),
        (7, 7, -HALF_AN_HOUR - TICK, "synced"),
    ],
)
def test_the_sync_status_follows_the_seeds_rule(
    desired_version: int, reported_version: int, age: timedelta, status: str
) -> None:
    assert sync_status(desired_version, reported_version, NOON - age, now=NOON) == status


def test_a_device_never_seen_is_stale() -> None:
    assert sync_status(0, 0, None) is SyncStatus.STALE


def test_how_long_a_device_may_be_silent_is_the_callers_to_say() -> None:
    last_seen = NOON - timedelta(hours=2)
    assert sync_status(1, 1, last_seen, now=NOON, stale_after=timedelta(hours=2)) is SyncStatus.SYNCED
    assert sync_status(1, 1, last_seen, now=NOON, stale_after=timedelta(hours=2) - TICK) is SyncStatus.STALE


def test_without_a_time_a_device_is_judged_by_the_present() -> None:
    present = datetime.now(UTC)
    minute = timedelta(minutes=1)
    assert sync_status(1, 1, present - (timedelta(minutes=STALE_THRESHOLD_MINUTES) - minute)) is SyncStatus.SYNCED
    assert sync_status(1, 1, present - (timedelta(minutes=STALE_THRESHOLD_MINUTES) + minute)) is SyncStatus.STALE


def test_times_of_different_zones_are_compared_as_instants() -> None:
    tokyo = timezone(timedelta(hours=9))
    last_seen = (NOON - HALF_AN_HOUR).astimezone(tokyo)
    assert sync_status(1, 1, last_seen, now=NOON) is SyncStatus.SYNCED
    assert sync_status(1, 1, last_seen, now=NOON + TICK) is SyncStatus.STALE


def test_a_change_to_summer_time_makes_no_device_stale() -> None:
    class Berlin(tzinfo):
        def utcoffset(self, moment: datetime | None) -> timedelta:
            summer = moment is not None and (moment.month, moment.day, moment.hour) >= (3, 29, 3)
            return timedelta(hours=2 if summer else 1)

        def dst(self, moment: datetime | None) -> timedelta:
            return self.utcoffset(moment) - timedelta(hours=1)

        def tzname(self, _: datetime | None) -> str:
            return "Europe/Berlin"

    berlin = Berlin()
    last_seen = datetime(2026, 3, 29, 1, 50, tzinfo=berlin)
    now = datetime(2026, 3, 29, 3, 10, tzinfo=berlin)  # twenty minutes later
    assert sync_status(1, 1, last_seen, now=now) is SyncStatus.SYNCED


@pytest.mark.parametrize("last_seen", [None, NOON])
def test_a_time_to_judge_by_without_a_zone_is_refused(last_seen: datetime | None) -> None:
    naive = NOON.replace(tzinfo=None)
    with pytest.raises(
        ValueError, match=r"^now must be timezone-aware, .*timezone\.utc.*; got the naive datetime\.datetime\(2026"
    ):
        sync_status(1, 1, last_seen, now=naive)


def test_a_last_seen_time_without_a_zone_is_refused() -> None:
    naive = NOON.replace(tzinfo=None)
    with pytest.raises(
        ValueError, match=r"^last_seen must be timezone-aware, .*; got the naive datetime\.datetime\(2026"
    ):
        sync_status(1, 1, naive, now=NOON)


def test_a_sync_status_is_its_word() -> None:
    assert [*map(str, SyncStatus)] == ["synced", "pending", "stale"]
    assert json.dumps(SyncStatus.PENDING) == '"pending"'


def test_the_examples_in_the_docstrings_hold() -> None:
    results = doctest.testmod(twin)
    assert results.attempted > 0
    assert results.failed == 0


def test_a_comparison_can_be_sent_as_json() -> None:
    comparison = compare({"a": 1, "b": [1], "c": None}, {"b": [2], "c": None, "d": 4})

    assert json.loads(json.dumps(comparison.to_dict())) == {
        "added": {"a": 1},
        "removed": {"d": 4},
        "changed": {"b": {"old": [2], "new": [1]}},
        "unchanged_count": 1,
    }


# Making merge patches


@given(document_pairs)
def test_a_made_patch_makes_the_new_document_of_the_old_one_or_there_is_none(
    pair: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    old, new = pair
    before = deepcopy(pair)

    try:
        patch = create_merge_patch(old, new)
    except ValueError as error:
        named = re.search(r"sets (/.*) to null", str(error), re.DOTALL)
        assert named
        pointer, gained = named[1], new
        for key in pointer.split("/")[1:]:
            gained = gained[key.replace("~1", "/").replace("~0", "~")]
        assert gained is None
        assert not equal(reference_merge_patch(old, new), new)
    else:
        assert equal(reference_merge_patch(old, patch), new)
        assert (patch == {}) == equal(old, new)
        for smaller in without_one_member(patch):
            assert not equal(reference_merge_patch(old, smaller), new)
    assert pair == before


def without_one_member(patch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The patch without each of its members in turn, at any depth."""
    for key, value in patch.items():
        rest = {other: item for other, item in patch.items() if other != key}
        yield rest
        if isinstance(value, dict):
            yield from (rest | {key: smaller} for smaller in without_one_member(value))


@given(documents)
def test_a_made_patch_shares_nothing_with_its_arguments(document: dict[str, Any]) -> None:
    try:
        patch = create_merge_patch({}, document)
    except ValueError:
        return
    emptied = deepcopy(document)
    for value in patch.values():
        if isinstance(value, dict | list):
            value.clear()
    assert document == emptied


def test_a_map_below_the_top_level_is_replaced_by_one_patch() -> None:
    old = {"fan": {"speed": 3, "auto": True, "zones": {"a": 1}}, "mode": "eco"}
    new: dict[str, Any] = {"fan": {"zones": {}, "speed": 3, "list": [None, {"x": None}]}, "mode": "eco"}

    patch = create_merge_patch(old, new)

    assert patch == {"fan": {"auto": None, "zones": {"a": None}, "list": [None, {"x": None}]}}
    assert merge_patch(old, patch) == new


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ({}, {"a": None}, r"no merge patch sets /a to null"),
        ({"a": {"b": 1}}, {"a": {"b": 1, "c/d": {"~": None}}}, r"no merge patch sets /a/c~1d/~0 to null"),
        ({"a": [1]}, {"a": {"b": None}}, r"no merge patch sets /a/b to null"),
        ({"a": 1}, {"a": float("nan")}, r"/a is nan, which is no JSON number"),
        ({}, {"a": [{"b": float("inf")}]}, r"/a/0/b is inf, which is no JSON number"),
    ],
)
def test_where_no_patch_exists_the_error_names_the_place(old: Any, new: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_merge_patch(old, new)


def test_a_null_that_both_documents_have_needs_no_patch() -> None:
    assert create_merge_patch({"a": None, "b": {"c": None}}, {"a": None, "b": {"c": None, "d": 1}}) == {"b": {"d": 1}}
