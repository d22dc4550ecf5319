"""What callers pass besides documents."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import create_engine, make_url

from iot_models._core import statements, validation
from tests.fuzz.corpus.hostile_types import LyingInt, UnshownStr


def test_ids_keep_their_order_and_each_is_sent_once() -> None:
    assert validation.device_id_list(iter(["b", "a", "b", "c", "a"])) == ["b", "a", "c"]


def test_a_whole_number_may_be_anything_from_its_least_to_what_bigint_holds() -> None:
    assert [validation.whole("n", number) for number in (0, 7, 2**63 - 1)] == [0, 7, 2**63 - 1]
    assert validation.whole("n", 1, least=1) == 1
    for number, least in ((0, 1), (-1, 0), (2**63, 0)):
        with pytest.raises(ValueError, match=f"n must be {least} or more and below 2\\*\\*63, got {number}"):
            validation.whole("n", number, least=least)


def test_a_whole_number_is_the_number_that_it_holds_and_not_what_it_says() -> None:
    taken = validation.whole("n", LyingInt(7))
    assert (type(taken), taken) == (int, 7)

    for number in (-1, 2**63, 10**5_000):
        with pytest.raises(ValueError, match="n must be 0 or more"):
            validation.whole("n", LyingInt(number))


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


UNSHOWABLE = {
    "deep": nested(100_000),
    "wide": [["x" * 1_000] * 1_000] * 100,
    "huge": 10**5_000,
    "mute": UnshownStr("text"),
}


@pytest.mark.parametrize("value", UNSHOWABLE.values(), ids=UNSHOWABLE)
@pytest.mark.parametrize(
    "refuse",
    [
        lambda value: validation.require_text("n", [value]),
        lambda value: validation.whole("n", value),
        lambda value: validation.whole("n", [value]),
        lambda value: validation.require_mapping("n", value, to="values"),
        lambda value: validation.require_aware("n", value),
        lambda value: validation.versions("n", {"a": value}, of={"a": {}}),
    ],
)
def test_what_cannot_be_shown_is_refused_by_the_name_of_its_argument(value: object, refuse: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^n(\['a'\])? must ") as caught:
        refuse(value)
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize("value", [None, 7, len], ids=repr)
def test_what_holds_no_ids_is_refused_by_the_name_of_its_argument(value: Any) -> None:
    with pytest.raises(TypeError, match="device_ids must be iterable"):
        validation.device_id_list(value)


@pytest.mark.parametrize("value", [["a"], "a", 7], ids=repr)
def test_versions_that_are_no_mapping_are_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="v must map device ids to versions, got "):
        validation.versions("v", value, of={"a": {}})


def test_no_versions_are_no_guards() -> None:
    assert validation.version("v", None) is None
    assert validation.versions("v", None, of={"a": {}}) == {}
    assert validation.versions("v", {"a": 0}, of={"a": {}, "b": {}}) == {"a": 0}


def test_devices_that_cannot_be_printed_are_named_too() -> None:
    with pytest.raises(ValueError, match=r"the batch does not: 'a\\ud800'"):
        validation.versions("v", {"a\ud800": 0}, of={})


def test_what_is_no_engine_is_refused_with_the_way_to_one() -> None:
    validation.require_engine(create_engine("postgresql+psycopg://"), "AsyncEngine", "Engine")
    with pytest.raises(
        TypeError, match=r"engine must be an AsyncEngine, got .*: iot_models.engine.create_async_engine"
    ):
        validation.require_engine("postgresql://h/d", "AsyncEngine")


@pytest.mark.parametrize(("driver", "sent"), [("asyncpg", ["a", "7", None]), ("psycopg", '{"a",7,NULL}')])
def test_elements_of_an_array_travel_as_texts_to_either_driver(driver: str, sent: object) -> None:
    dialect = make_url(f"postgresql+{driver}://").get_dialect()()
    bound = statements.DEVICES.type.bind_processor(dialect)
    assert bound is not None
    assert bound(["a", 7, None]) == sent
