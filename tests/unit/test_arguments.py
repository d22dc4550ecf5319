"""What callers pass besides documents."""

from __future__ import annotations

import pytest

from iot_models import arguments


def test_ids_keep_their_order_and_each_is_sent_once() -> None:
    assert arguments.device_id_list(iter(["b", "a", "b", "c", "a"])) == ["b", "a", "c"]


def test_a_whole_number_may_be_anything_from_its_least_to_what_bigint_holds() -> None:
    assert [arguments.whole("n", number) for number in (0, 7, 2**63 - 1)] == [0, 7, 2**63 - 1]
    assert arguments.whole("n", 1, least=1) == 1
    for number, least in ((0, 1), (-1, 0), (2**63, 0)):
        with pytest.raises(ValueError, match=f"n must be {least} or more and below 2\\*\\*63, got {number}"):
            arguments.whole("n", number, least=least)


def test_no_versions_are_no_guards() -> None:
    assert arguments.version("v", None) is None
    assert arguments.versions("v", None, of={"a": {}}) == {}
    assert arguments.versions("v", {"a": 0}, of={"a": {}, "b": {}}) == {"a": 0}


def test_devices_that_cannot_be_printed_are_named_too() -> None:
    with pytest.raises(ValueError, match=r"the batch does not: 'a\\ud800'"):
        arguments.versions("v", {"a\ud800": 0}, of={})
