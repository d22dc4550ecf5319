"""What may be stored, and the JSON Pointer to what may not."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import json
import sys
import time
from collections import ChainMap
from decimal import Decimal
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iot_models import DocumentLimits, DocumentTooLarge, InvalidDocument
from iot_models._core.documents import check_document, decode_document, encode_document
from iot_models._core.equality import json_equal
from iot_models.errors import shown
from tests.generated.documents import documents
from tests.reference.documents import size

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMITS = DocumentLimits()


def nested(levels: int) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for _ in range(levels - 1):
        document = {"a": document}
    return document


@given(documents)
def test_a_document_that_json_has_is_encoded_as_the_same_document(document: dict[str, Any]) -> None:
    wide = DocumentLimits(max_bytes=10**9, max_depth=200)

    assert json.loads(encode_document(document, wide)) == document


@given(documents)
def test_a_stored_document_is_read_as_json_reads_it_where_floats_hold_its_numbers(document: dict[str, Any]) -> None:
    assert json_equal(decode_document(json.dumps(document), "acme", "t"), document)


@pytest.mark.parametrize(
    "number", ["0.1000000000000000000001", "-52.12345678901234567", "1" + "0" * 400 + ".5", "0.12345678901234567"]
)
def test_a_stored_number_that_no_float_holds_is_written_back_as_it_was(number: str) -> None:
    assert encode_document(decode_document(f'{{"a":[{number}]}}', "acme", "t"), LIMITS) == f'{{"a":[{number}]}}'


def test_the_text_is_compact_utf8() -> None:
    assert (
        encode_document({"name": "Küche", "on": [True, None, 1.5]}, LIMITS) == '{"name":"Küche","on":[true,null,1.5]}'
    )


@pytest.mark.parametrize("root", [None, [], "text", 1, 1.5, True, (), {"a"}], ids=repr)
def test_a_root_that_is_no_object_is_refused(root: object) -> None:
    with pytest.raises(InvalidDocument, match="a document is a JSON object") as caught:
        encode_document(root, LIMITS)
    assert caught.value.path == ""


@pytest.mark.parametrize("key", [1, None, True, 1.5, ("a",), b"a"], ids=repr)
def test_a_key_that_is_no_string_is_refused(key: object) -> None:
    with pytest.raises(InvalidDocument, match="keys are strings") as caught:
        encode_document({"a": {key: 1}}, LIMITS)
    assert caught.value.path == f"/a/{key}"


def nested_tuples(levels: int) -> tuple[Any, ...]:
    value: tuple[Any, ...] = ()
    for _ in range(levels - 1):
        value = (value,)
    return value


@pytest.mark.parametrize("key", [10**5_000, nested_tuples(100_000)], ids=["huge", "deep"])
def test_a_key_that_cannot_be_shown_is_refused_like_any_other(key: object) -> None:
    with pytest.raises(InvalidDocument, match=f"is {type(key).__name__}") as caught:
        encode_document({"a": {key: 1}}, LIMITS)
    assert caught.value.path.startswith("/a/")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_a_number_that_json_lacks_is_refused(number: float) -> None:
    with pytest.raises(InvalidDocument, match="not a JSON number") as caught:
        encode_document({"a": [0, {"b": number}]}, LIMITS)
    assert caught.value.path == "/a/1/b"


@pytest.mark.parametrize("text", ["\0", "a\0b", "ü\0", "\ud800", "a\udfffb"], ids=ascii)
def test_text_that_postgresql_cannot_store_is_refused_in_values_and_in_keys(text: str) -> None:
    with pytest.raises(InvalidDocument, match="lone surrogate") as caught:
        encode_document({"a": {"b": text}}, LIMITS)
    assert caught.value.path == "/a/b"

    with pytest.raises(InvalidDocument, match="lone surrogate") as caught:
        encode_document({"a": {text: 1}}, LIMITS)
    assert caught.value.path == f"/a/{text}"
    str(caught.value).encode()  # the message itself can be logged


@pytest.mark.parametrize("text", ["", "\x01", "\\u0000", "\U0001f321", "\ufffe", "é"], ids=ascii)
def test_any_other_text_is_accepted(text: str) -> None:
    assert json.loads(encode_document({"a": text, text: 1}, LIMITS))["a" if text != "a" else text] == text


@pytest.mark.parametrize(
    "value",
    [(1, 2), {1}, b"x", decimal.Decimal("1.5"), dt.datetime.now(dt.UTC), object(), 1j, range(3)],
    ids=lambda value: type(value).__name__,
)
def test_a_type_that_json_lacks_is_refused_and_named(value: object) -> None:
    with pytest.raises(InvalidDocument, match=f"{type(value).__name__} is not a JSON type") as caught:
        encode_document({"a": [value]}, LIMITS)
    assert caught.value.path == "/a/0"


def test_enumerations_of_text_and_numbers_are_their_values() -> None:
    class Mode(enum.StrEnum):
        ECO = "eco"

    class Level(enum.IntEnum):
        HIGH = 3

    assert encode_document({"mode": Mode.ECO, "level": Level.HIGH}, LIMITS) == '{"mode":"eco","level":3}'


@pytest.mark.parametrize("sign", [1, -1])
def test_an_integer_that_could_not_be_read_back_is_refused(sign: int) -> None:
    longest = sign * (10**4300 - 1)
    assert json.loads(encode_document({"a": longest}, LIMITS)) == {"a": longest}

    with pytest.raises(InvalidDocument, match="4,300 digits") as caught:
        encode_document({"a": sign * 10**4300}, LIMITS)
    assert caught.value.path == "/a"


def test_the_pointer_escapes_as_rfc_6901_says() -> None:
    with pytest.raises(InvalidDocument) as caught:
        encode_document({"a/b": {"c~d": {"": [float("nan")]}}}, LIMITS)
    assert caught.value.path == "/a~1b/c~0d//0"


def test_ten_levels_below_the_document_are_accepted_and_the_eleventh_is_refused_at_its_place() -> None:
    encode_document(nested(1 + 10), LIMITS)

    with pytest.raises(InvalidDocument) as caught:
        encode_document(nested(1 + 11), LIMITS)
    assert caught.value.path == "/a" * 11
    assert caught.value.reason == "nested too deep: this is level 11, at most 10 are allowed below the document"
    assert caught.value.http_status == 400


@pytest.mark.parametrize("innermost", [{}, {"property": 1}, []], ids=str)
def test_levels_are_counted_as_azure_counts_them(innermost: Any) -> None:
    document = innermost
    for level in range(10, 0, -1):
        document = {f"level{level}": document}

    assert json.loads(encode_document(document, LIMITS)) == document
    with pytest.raises(InvalidDocument, match="level 11"):
        encode_document({"level0": document}, LIMITS)


def test_arrays_count_as_levels_too() -> None:
    with pytest.raises(InvalidDocument, match="nested too deep") as caught:
        encode_document({"a": [[0]]}, DocumentLimits(max_depth=1))
    assert caught.value.path == "/a/0"


def test_a_document_deeper_than_python_recurses_is_refused_like_any_other() -> None:
    with pytest.raises(InvalidDocument, match="nested too deep"):
        encode_document(nested(100_000), LIMITS)


def test_a_document_that_contains_itself_is_refused_as_too_deep() -> None:
    document: dict[str, Any] = {}
    document["a"] = document

    with pytest.raises(InvalidDocument, match="nested too deep"):
        encode_document(document, LIMITS)


def test_the_deepest_limit_that_is_admitted_works() -> None:
    encode_document(nested(1 + 200), DocumentLimits(max_depth=200))


def test_a_document_may_be_required_to_be_flat() -> None:
    encode_document({"a": 1}, DocumentLimits(max_depth=0))

    inner: Any
    for inner in ({}, []):
        with pytest.raises(InvalidDocument, match="this is level 1, at most 0 are allowed") as caught:
            encode_document({"a": inner}, DocumentLimits(max_depth=0))
        assert caught.value.path == "/a"


def test_size_is_counted_in_bytes_of_utf8_and_the_limit_itself_is_allowed() -> None:
    limits = DocumentLimits(max_bytes=14)
    encode_document({"a": "1234567"[:6]}, limits)
    encode_document({"a": "üüü"}, limits)  # 8 + 6

    with pytest.raises(DocumentTooLarge, match=r"15 bytes.*at most 14") as caught:
        encode_document({"a": "üüü!"}, limits)
    assert caught.value.path == ""
    assert caught.value.http_status == 413


def laughs(value: Any, levels: int) -> dict[str, Any]:
    """Ten references to one list, level by level: little memory, 10**levels values."""
    for _ in range(levels):
        value = [value] * 10
    return {"a": value}


@pytest.mark.parametrize(
    "document",
    [
        laughs("lol", 8),
        laughs({}, 8),
        laughs({"k" * 30_000: 1}, 5),
        laughs("ü" * 30_000, 5),
        laughs({"fan": None}, 8),
    ],
    ids=["values", "empty objects", "keys", "texts", "nulls"],
)
def test_a_document_that_is_huge_by_repetition_is_refused_before_all_of_it_is_looked_at(
    document: dict[str, Any],
) -> None:
    for refuse in (check_document, encode_document):
        began = time.process_time()
        with pytest.raises(
            DocumentTooLarge, match=r"more (than 65,536 bytes|arrays and objects than the 2,048)"
        ) as caught:
            refuse(document, LIMITS)
        assert time.process_time() - began < 5  # all of it takes minutes
        assert caught.value.path == ""


@pytest.mark.parametrize(("max_bytes", "most"), [(32_768, 2_048), (100_000, 6_250), (16_384, 1_024), (4_000, 1_024)])
def test_arrays_and_objects_are_counted_because_each_costs_more_than_it_takes(max_bytes: int, most: int) -> None:
    limits = DocumentLimits(max_bytes=max_bytes)
    allowed: dict[str, list[Any]] = {
        "a": [[] if number % 2 else {} for number in range(most - 2)]
    }  # two more: the document, and its list

    encode_document(allowed, limits)
    allowed["a"].append([])
    with pytest.raises(DocumentTooLarge, match=f"more arrays and objects than the {most:,} that are allowed"):
        check_document(allowed, limits)


def test_a_patch_may_be_twice_as_large_as_a_document_for_what_it_removes() -> None:
    document = {f"key-{number:04}": number for number in range(2_100)}
    assert 30_000 < len(encode_document(document, LIMITS)) < 32_768
    renamed = dict.fromkeys(document) | {f"new-{number:04}": number for number in range(2_100)}

    check_document(renamed, LIMITS)
    with pytest.raises(DocumentTooLarge, match=r"^invalid document at its root: [56]\d,\d{3} bytes"):
        encode_document(renamed, LIMITS)


@given(documents, st.integers(1, 200))
def test_whatever_fits_is_never_taken_for_too_large(document: dict[str, Any], room: int) -> None:
    weight = size(document)

    if weight <= room:
        encode_document(document, DocumentLimits(max_bytes=room, max_depth=200))
    else:
        with pytest.raises(DocumentTooLarge):
            encode_document(document, DocumentLimits(max_bytes=room, max_depth=200))
    if weight <= 2 * room:
        check_document(document, DocumentLimits(max_bytes=room, max_depth=200))


@pytest.mark.parametrize(
    ("name", "value"), [("max_bytes", 0), ("max_bytes", -(10**5_000)), ("max_depth", -1), ("max_depth", 201)], ids=shown
)
def test_a_limit_that_makes_no_sense_is_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .* got {shown(value)}"):
        DocumentLimits(**{name: value})


# Numbers weigh what PostgreSQL stores of them.


@pytest.mark.parametrize(
    ("number", "weight"),
    [
        (1e308, 309),
        (5e-324, 326),
        (-2.5e-7, 11),
        (1e16, 17),
        (0.0001, 6),
        (1e22, 23),
        (1.5, 3),
        (1e-05, 7),
        (9e-32, 34),
    ],
)
def test_a_number_weighs_what_postgresql_stores_of_it(number: float, weight: int) -> None:
    document = {"a": number}
    encode_document(document, DocumentLimits(max_bytes=6 + weight))
    with pytest.raises(DocumentTooLarge, match=f"{6 + weight} bytes"):
        encode_document(document, DocumentLimits(max_bytes=5 + weight))


@given(st.floats(-1e-3, 1e-3) | st.floats(allow_nan=False, allow_infinity=False))
def test_any_float_weighs_what_postgresql_stores_of_it(number: float) -> None:
    weight = len(f"{Decimal(repr(number)):f}")
    encode_document({"a": number}, DocumentLimits(max_bytes=6 + weight))
    with pytest.raises(DocumentTooLarge):
        encode_document({"a": number}, DocumentLimits(max_bytes=5 + weight))


@pytest.mark.parametrize(
    "number", ["1e308", "5e-324", "0.00000012345678901234567890", "123456789012345678901234567890.5"]
)
def test_a_number_weighs_the_same_once_it_was_stored(number: str) -> None:
    stored = format(Decimal(number), "f")
    text = encode_document(decode_document(f'{{"a": {stored}}}', "acme", "t"), LIMITS)
    assert Decimal(json.loads(text, parse_float=str, parse_int=str)["a"]) == Decimal(number)
    document = decode_document(f'{{"a": {stored}}}', "acme", "t")
    encode_document(document, DocumentLimits(max_bytes=len(stored) + 6))
    with pytest.raises(DocumentTooLarge):
        encode_document(document, DocumentLimits(max_bytes=len(stored) + 5))


@pytest.mark.parametrize(
    ("number", "most"), [(5e-324, 300), (10**4299, 300), (1e-05, 9_000), (1.5, 20_000), (1, 1), (None, 14_000)]
)
def test_few_bytes_of_memory_that_are_a_huge_document_are_refused_after_few_of_them(
    number: float | None, most: int
) -> None:
    class Counted(list[float | None]):
        looked_at = 0

        def __iter__(self) -> Iterator[float | None]:
            for value in super().__iter__():
                Counted.looked_at += 1
                yield value

    with pytest.raises(DocumentTooLarge, match="more than 65,536 bytes"):
        encode_document({"a": Counted([number] * 60_000)}, LIMITS)
    assert Counted.looked_at <= most


def test_the_bound_of_digits_is_the_processs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "get_int_max_str_digits", lambda: 640)
    encode_document({"a": 10**639}, LIMITS)
    with pytest.raises(InvalidDocument, match="an integer of more than 640 digits"):
        encode_document({"a": 10**640}, LIMITS)
    monkeypatch.setattr(sys, "get_int_max_str_digits", lambda: 0)
    encode_document({"a": 10**4299}, LIMITS)


def test_any_mapping_is_a_document() -> None:
    assert encode_document(MappingProxyType({"a": 1}), LIMITS) == '{"a":1}'
    check_document(ChainMap({"a": 1}), LIMITS)
