"""Which documents can be stored: checks on their content, their depth and their size.

`ShadowService` checks each document before it sends it to the database. A `DeviceState` checks its documents when they
are assigned and when they are flushed, with the limits of PostgreSQL's `jsonb` instead of the service's.
"""

from __future__ import annotations

import json
import math
import re
import sys
from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final, cast

from iot_models._core.json_pointer import pointer
from iot_models._core.stored_json import read_json, why_no_document
from iot_models._core.validation import storable_text
from iot_models.errors import DocumentTooLarge, InvalidDocument, UnreadableShadow, shown

if TYPE_CHECKING:
    from collections.abc import Iterable

    from iot_models._core.json_pointer import Place

# The upper bound of max_depth. json's encoder needs one recursion per level; Python's default limit is 1,000.
_DEEPEST: Final = 200

# Python converts integers of at most 4,300 digits to and from text (CVE-2020-10735), or of fewer where a process says
# so: a longer one cannot be read back. 640 is the lowest bound that a process can set: 2,126 bits.
_MOST_DIGITS: Final = 4300
_FEW_BITS: Final = 2126

# A number with a decimal point and at most this many characters has at most 15 digits, which a float does not round.
# jsonb writes no exponents.
_FLOAT_KEEPS: Final = 16

# An array or object costs many times as much as another value, because Python's garbage collector looks after each; its
# text may take two bytes. With so many bytes for each, no document costs much more than another one of its size.
_BYTES_A_CONTAINER: Final = 16
_ALWAYS_ENOUGH: Final = 1_024


# From here to there Python writes a float without an exponent.
_LOW: Final = 1e-4
_HIGH: Final = 1e16
# How much a smaller one grows when PostgreSQL writes it out depends on its power of ten, and on whether it has one
# digit (1e-05) or several (1.5e-05). Tables know it many times as fast as the text. They have the powers of which a
# document can hold thousands.
_TENS: Final = range(-32, -4)
_POWERS: Final = [float(f"1e{tens}") for tens in _TENS]
_ONE_DIGIT: Final = frozenset(float(f"{digit}e{tens}") for tens in _TENS for digit in range(1, 10))


class _StoredNumber(Decimal):
    """A number from the database that a float would round. It is written back exactly as it was read."""


def _mark(number: _StoredNumber) -> str:
    """Return a string that stands for the number in the encoded text. No document contains it: NUL is refused."""
    return f"\0{number:f}"


_MARKED: Final = re.compile(r'"\\u0000([^"]*)"')
_encode = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"), default=_mark
).encode


@dataclass(frozen=True, slots=True)
class DocumentLimits:
    """How large and how deep one section (desired or reported) may be, measured after a merge.

    The default numbers are those of Azure device twins for a section.

    Attributes:
        max_bytes: The size as compact UTF-8 JSON, in which a number takes what PostgreSQL stores of it. PostgreSQL
            writes exponents out: `1e308` takes 309 bytes. A document has at most `max_bytes / 16` arrays and
            objects (and may always have 1,024).
        max_depth: The number of levels of objects and arrays below the document, which itself is none. At most 200.

    Raises:
        ValueError: If `max_bytes` is below 1, or `max_depth` is below 0 or above 200.

    Example:
        >>> ShadowService(session, "acme", limits=DocumentLimits(max_bytes=8_192, max_depth=5))
    """

    max_bytes: int = 32_768
    max_depth: int = 10

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {shown(self.max_bytes)}")
        if not 0 <= self.max_depth <= _DEEPEST:
            raise ValueError(f"max_depth must be from 0 to {_DEEPEST}, got {shown(self.max_depth)}")


def check_document(document: object, limits: DocumentLimits) -> None:
    """Refuse a document that is not a dict, that PostgreSQL's `jsonb` cannot hold, or that is nested too deep.

    Its exact size is checked by `encode_document`, because a merge patch may be larger than its result. But a useful
    patch is at most twice as large as a document may be: one half for what it sets, one half for what it removes. This
    upper bound keeps the work small where few bytes in memory are a huge document: a list that contains the same list a
    million times, as a YAML file with aliases can make it.

    Raises:
        InvalidDocument: With the JSON Pointer to the first place that cannot be stored.
        DocumentTooLarge: If it is certainly larger than twice `limits.max_bytes`.
    """
    _weigh(_object(document), limits)


def encode_document(document: object, limits: DocumentLimits) -> str:
    """Check a document and return it as compact JSON text, to be bound as a parameter of a statement.

    Raises:
        InvalidDocument: See `check_document`.
        DocumentTooLarge: If the text takes more than `limits.max_bytes` bytes in UTF-8.
    """
    content = _object(document)
    written_out = _weigh(content, limits)
    text = _encode(content)
    if "\\u0000" in text:
        text = _MARKED.sub(r"\1", text)
    size = (len(text) if text.isascii() else len(text.encode())) + written_out
    if size > limits.max_bytes:
        raise _too_large(f"{size:,}", limits)
    return text


def json_object(texts: Mapping[str, str]) -> str:
    """Put JSON texts together into the text of one JSON object."""
    return "{" + ",".join(f"{_encode(name)}:{text}" for name, text in texts.items()) + "}"


def decode_document(text: str, tenant_id: str, device_id: str) -> dict[str, Any]:
    """Return a device's stored document in a form that can be changed and written back without rounding a number.

    Numbers that a float would round have a type of their own, which only `encode_document` can write.

    Raises:
        UnreadableShadow: If the text is no JSON object, or holds what Python cannot.
    """
    document = read_json(text, parse_float=_number)
    if reason := why_no_document(document):
        raise UnreadableShadow(tenant_id, device_id, f"a section {reason}")
    return cast("dict[str, Any]", document)


def _object(document: object) -> dict[Any, Any]:
    if isinstance(document, dict):
        return document
    if isinstance(document, Mapping):
        return dict(document)
    raise InvalidDocument("", f"a document is a JSON object (a dict), not {_name(document)}")


class _Weight:
    """What the check of a document counts.

    Attributes:
        written_out: By how many bytes its numbers grow that PostgreSQL writes without their exponents.
        containers_left: How many more arrays and objects it may have.
    """

    __slots__ = ("containers_left", "written_out")

    def __init__(self, limits: DocumentLimits) -> None:
        self.written_out = 0
        self.containers_left = _most_containers(limits)


def _most_containers(limits: DocumentLimits) -> int:
    return max(_ALWAYS_ENOUGH, limits.max_bytes // _BYTES_A_CONTAINER)


def _weigh(document: dict[Any, Any], limits: DocumentLimits) -> int:
    """Check a document; return how many bytes its numbers take in PostgreSQL beyond what JSON text takes."""
    weight = _Weight(limits)
    _check(document, (), 0, limits, 2 * limits.max_bytes, weight)
    return weight.written_out


def _number(literal: str) -> float | _StoredNumber:
    value = float(literal)
    if len(literal) <= _FLOAT_KEEPS or Decimal(literal) == Decimal(repr(value)):
        return value
    return _StoredNumber(literal)


def _check(  # noqa: C901, PLR0912 - one branch per JSON type
    container: dict[Any, Any] | list[object],
    place: Place,
    depth: int,
    limits: DocumentLimits,
    left: int,
    weight: _Weight,
) -> int:
    """Check a container, for which `left` bytes are left; return how many are left after it.

    No value is counted larger than it is, so the result is an upper bound. `weight` is added to.
    """
    weight.containers_left -= 1
    if depth > limits.max_depth:
        raise InvalidDocument(
            pointer(place),
            f"nested too deep: this is level {depth}, at most {limits.max_depth} are allowed below the document",
        )
    keyed = isinstance(container, dict)
    members: Iterable[tuple[Any, object]] = container.items() if isinstance(container, dict) else enumerate(container)
    # At least one byte for a value and one for a comma or bracket; for a key, two quotes, a colon and its characters.
    left -= 1 + len(container) * (5 if keyed else 2)
    for key, value in members:
        if keyed:
            # Nearly all text is ASCII without NUL and needs no further test. This loop is most of the time of a check.
            if not (type(key) is str and key.isascii() and "\0" not in key):
                _check_key(key, place)
            left -= len(key)
        if isinstance(value, str):
            if not ((value.isascii() and "\0" not in value) or storable_text(value)):
                raise InvalidDocument(pointer((place, key)), _TEXT_REASON)
            left -= len(value) + 1
        elif value is None or value is True or value is False:
            left -= 3
        elif isinstance(value, int):
            if value.bit_length() > _FEW_BITS:
                if abs(value) >= 10 ** (most := _most_digits()):
                    raise InvalidDocument(pointer((place, key)), f"an integer of more than {most:,} digits")
                left -= value.bit_length() * 3 // 10  # a digit is 3.3 bits
        elif isinstance(value, float):
            if _LOW <= value < _HIGH or -_HIGH < value <= -_LOW or value == 0:
                left -= 2  # 0.5
            else:
                left -= _check_float(value, place, key, weight)
        elif isinstance(value, (dict, list)):
            # A document can be nothing but empty containers: they must cost no more than other values.
            if value or depth == limits.max_depth:
                left = _check(value, (place, key), depth + 1, limits, left, weight)
            else:
                weight.containers_left -= 1
        elif not isinstance(value, _StoredNumber):
            raise InvalidDocument(pointer((place, key)), f"{_name(value)} is not a JSON type: convert it first")
        if left < 0:
            raise _too_large(f"more than {2 * limits.max_bytes:,}", limits)
        if weight.containers_left < 0:
            most = _most_containers(limits)
            raise DocumentTooLarge("", f"more arrays and objects than the {most:,} that are allowed")
    return left


def _check_float(value: float, place: Place, key: str | int, weight: _Weight) -> int:
    """Check a number that Python writes with an exponent, or not at all; return how many bytes it takes beyond one.

    That is a lower bound. `weight` is added to: by how much PostgreSQL writes more than Python.
    """
    size = abs(value)
    if _POWERS[0] <= size < _LOW:
        tens = _TENS[bisect(_POWERS, size) - 1]
        grows = -tens - 3 - (size not in _ONE_DIGIT)
    elif math.isfinite(value):
        text = float.__repr__(value)
        grows = len(f"{Decimal(text):f}") - len(text)
    else:
        raise InvalidDocument(pointer((place, key)), f"{value} is not a JSON number: send null, or omit it")
    weight.written_out += grows
    return grows + 4  # 1e-05 or more


def _most_digits() -> int:
    set_for_process = sys.get_int_max_str_digits()  # 0: no bound
    return min(set_for_process, _MOST_DIGITS) if set_for_process else _MOST_DIGITS


def _check_key(key: object, place: Place) -> None:
    if not isinstance(key, str):
        # json would write 1, None and True as "1", "null" and "true": two keys could become one without an error.
        raise InvalidDocument(pointer((place, shown(key))), f"keys are strings, {shown(key)} is {_name(key)}")
    if not storable_text(key):
        raise InvalidDocument(pointer((place, key)), _TEXT_REASON)


_TEXT_REASON: Final = r"PostgreSQL cannot store \u0000 or a lone surrogate in a string: remove it first"


def _too_large(size: str, limits: DocumentLimits) -> DocumentTooLarge:
    return DocumentTooLarge(
        "",
        f"{size} bytes as compact UTF-8 JSON, at most {limits.max_bytes:,} are allowed: "
        "store large values elsewhere and keep a reference here",
    )


def _name(value: object) -> str:
    return "null (None)" if value is None else type(value).__name__
