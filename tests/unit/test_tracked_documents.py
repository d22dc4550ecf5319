"""Tracked documents behave as plain ones; what they do in a session is shown in tests/integration/test_orm_guard.py."""

from __future__ import annotations

import json
import pickle
from copy import copy, deepcopy
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given

from iot_models import DeviceState, InvalidDocument
from iot_models._core.tracked_documents import Document
from tests.generated.documents import documents

if TYPE_CHECKING:
    from collections.abc import Callable

# Whatever else these two types do, now or in a later Python, changes them: it would go unnoticed.
DICT_READERS = {"__class_getitem__", "__contains__", "__eq__", "__ge__", "__getattribute__", "__getitem__", "__gt__",
    "__hash__", "__init__", "__iter__", "__le__", "__len__", "__lt__", "__ne__", "__new__", "__or__", "__repr__",
    "__reversed__", "__ror__", "__sizeof__", "copy", "fromkeys", "get", "items", "keys", "values"}  # fmt: skip
LIST_READERS = {"__add__", "__class_getitem__", "__contains__", "__eq__", "__ge__", "__getattribute__", "__getitem__",
    "__gt__", "__hash__", "__init__", "__iter__", "__le__", "__len__", "__lt__", "__mul__", "__ne__", "__new__",
    "__repr__", "__reversed__", "__rmul__", "__sizeof__", "copy", "count", "index"}  # fmt: skip


def device_with(document: dict[str, Any]) -> DeviceState:
    return DeviceState(tenant_id="acme", site_id="berlin", device_id="thermostat-1", desired_state=document)


def test_every_method_that_changes_a_dict_or_list_is_noticed() -> None:
    tracked: Any = device_with({"object": {}, "array": []}).desired_state

    for plain, container, readers in (
        (dict, tracked["object"], DICT_READERS),
        (list, tracked["array"], LIST_READERS),
    ):
        changing = {name for name, value in vars(plain).items() if callable(value)} - readers
        assert {name for name in changing if getattr(type(container), name) is getattr(plain, name)} == set()


@given(documents)
def test_a_tracked_document_equals_prints_and_serializes_as_the_plain_one(document: dict[str, Any]) -> None:
    tracked = device_with(document).desired_state

    assert tracked == document
    assert document == tracked
    assert repr(tracked) == repr(document)
    assert json.dumps(tracked) == json.dumps(document)


@given(documents)
def test_a_copy_of_a_tracked_document_is_the_same_document(document: dict[str, Any]) -> None:
    tracked = device_with(document).desired_state

    for copied in (copy(tracked), deepcopy(tracked), pickle.loads(pickle.dumps(tracked)), tracked.copy()):
        assert copied == document


def test_a_deep_copy_is_the_callers_alone() -> None:
    device = device_with({"fan": {"speed": 1}, "zones": [[1]]})

    ways: list[Callable[[Any], Any]] = [copy, deepcopy, lambda value: pickle.loads(pickle.dumps(value))]
    for copied in ways:
        whole = copied(device.desired_state)
        whole["new"] = 1
        whole["fan"]["speed"] = 9
        for part in ("fan", "zones"):
            copied(device.desired_state[part]).clear()
            assert type(copied(device.desired_state[part])) in {dict, list}

    assert device.desired_state == {"fan": {"speed": 1}, "zones": [[1]]}


def test_what_is_put_into_a_document_is_copied() -> None:
    mine = {"fan": {"speed": 1}}
    device, other = device_with(mine), device_with({})
    other.desired_state["fan"] = device.desired_state["fan"]
    device.reported_state = device.desired_state

    mine["fan"]["speed"] = 9
    device.desired_state["fan"]["mode"] = "eco"

    assert device.desired_state == {"fan": {"speed": 1, "mode": "eco"}}
    assert other.desired_state == device.reported_state == {"fan": {"speed": 1}}


def test_a_container_that_is_put_where_it_already_is_remains_the_same_one() -> None:
    device = device_with({"zones": [{"at": 2}, {"at": 1}], "fan": {"speed": 1}})
    zones, first, fan = device.desired_state["zones"], device.desired_state["zones"][0], device.desired_state["fan"]

    device.desired_state["zones"] += [{"at": 3}]
    device.desired_state["fan"] |= {"speed": 2}
    zones.sort(key=lambda zone: zone["at"])
    first["at"] = 20

    assert device.desired_state["zones"] is zones
    assert device.desired_state["fan"] is fan
    assert device.desired_state == {"zones": [{"at": 1}, {"at": 20}, {"at": 3}], "fan": {"speed": 2}}


@pytest.mark.parametrize(
    "fails",
    [
        lambda document: document.update((key, 1 / (5 - key)) for key in range(9)),
        lambda document: document["zones"].extend(1 / (5 - number) for number in range(9)),
        lambda document: document["zones"].sort(),
        lambda document: document["zones"].remove("nowhere"),
        lambda document: document["zones"].pop(7),
        lambda document: document["zones"].__setitem__(slice(0, 2, 2), [1, 2, 3]),
        lambda document: document.pop("nowhere"),
        lambda document: document.__delitem__("nowhere"),
    ],
)
def test_a_change_that_fails_changes_nothing(fails: Any) -> None:
    device = device_with({"zones": [1, 3, 2, "x"]})

    with pytest.raises((ZeroDivisionError, TypeError, ValueError, IndexError, KeyError)):
        fails(device.desired_state)

    assert device.desired_state == {"zones": [1, 3, 2, "x"]}


@pytest.mark.parametrize(
    ("document", "path"),
    [
        ([], ""),
        ("{}", ""),
        ({"fan": {"speed": float("nan")}}, "/fan/speed"),
        ({"fan": ("a", "tuple")}, "/fan"),
        ({1: "one"}, "/1"),
        ({"name": "no\0body"}, "/name"),
        (DeviceState.reported_state, ""),
    ],
)
@pytest.mark.parametrize("name", ["state", "desired_state", "reported_state"])
def test_assigning_what_is_no_storable_document_is_refused_at_once(name: str, document: Any, path: str) -> None:
    device = device_with({"mode": "eco"})

    with pytest.raises(InvalidDocument) as caught:
        setattr(device, name, document)

    assert caught.value.path == path
    assert device.desired_state == {"mode": "eco"}


@pytest.mark.parametrize(
    "put",
    [
        lambda document, value: document.update({"a": value}),
        lambda document, value: document.__setitem__("a", value),
        lambda document, value: document["zones"].append(value),
        lambda document, value: document["zones"].__setitem__(0, value),
    ],
)
def test_what_is_too_deep_to_be_copied_is_refused_where_it_is_put_in(put: Callable[[Any, Any], None]) -> None:
    itself: dict[str, Any] = {}
    itself["a"] = [itself]
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    device = device_with({"zones": [1]})

    for value in (itself, deep):
        with pytest.raises(InvalidDocument, match="nested too deep"):
            put(device.desired_state, value)

    assert device.desired_state == {"zones": [1]}


def test_as_deep_as_a_document_may_be_it_can_be_tracked_copied_and_pickled() -> None:
    document: dict[str, Any] = {}
    for _ in range(199):
        document = {"deeper": document}

    tracked = device_with(document).desired_state

    assert type(tracked) is Document
    assert json.dumps(deepcopy(tracked)) == json.dumps(pickle.loads(pickle.dumps(tracked))) == json.dumps(document)


def test_before_its_first_flush_a_device_has_the_twin_that_it_will_have() -> None:
    device = DeviceState(tenant_id="acme", site_id="berlin", device_id="thermostat-1")
    assert (device.is_pending, device.is_drifted, device.delta) == (False, False, {})

    device.desired_state = {"mode": "eco"}
    assert (device.is_pending, device.is_drifted, device.delta) == (False, True, {"mode": "eco"})

    device.desired_version = 1
    assert (device.is_pending, device.is_drifted) == (True, False)
