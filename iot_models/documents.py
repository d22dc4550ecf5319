"""What may be stored: every document is checked and measured here before the database sees it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

from iot_models.errors import DocumentTooLarge, InvalidDocument

if TYPE_CHECKING:
    from collections.abc import Iterator

    Place = tuple[str | int, ...]

# json's encoder recurses once a level; this leaves it room below Python's default recursion limit of 1,000.
_DEEPEST: Final = 200

# Python converts integers of up to 4,300 digits from and to text (CVE-2020-10735); a longer one could not be read back.
_INTEGER_BOUND: Final = 10**4300

# This many characters of a number hold at most 15 digits, which a float keeps; jsonb writes no exponents.
_FLOAT_KEEPS: Final = 16


class _StoredNumber(Decimal):
    """A number that the database holds and no float does: read only to be written back as it was."""


def _mark(number: _StoredNumber) -> str:
    """Stand in for the one type that json does not know: a string that no string of a document can equal."""
    return f"\0{number}"


_MARKED: Final = re.compile(r'"\\u0000([^"]*)"')
_encode = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"), default=_mark
).encode


@dataclass(frozen=True, slots=True)
class DocumentLimits:
    """How large and how deep one section (desired or reported) may be, measured after a merge.

    The defaults are those of Azure device twins for a section.

    Attributes:
        max_bytes: Size as compact UTF-8 JSON.
        max_depth: Objects and arrays nested in each other, the document itself being the first; 200 at most.

    Raises:
        ValueError: If a limit is below 1, or `max_depth` above 200.
    """

    max_bytes: int = 32_768
    max_depth: int = 10

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {self.max_bytes}")
        if not 1 <= self.max_depth <= _DEEPEST:
            raise ValueError(f"max_depth must be from 1 to {_DEEPEST}, got {self.max_depth}")


def check_document(document: object, limits: DocumentLimits) -> None:
    """Refuse what is no JSON object, what PostgreSQL's jsonb cannot hold, and what nests too deep.

    Raises:
        InvalidDocument: With the JSON Pointer to the first such place.
    """
    if not isinstance(document, dict):
        raise InvalidDocument("", f"a document is a JSON object (a dict), not {_name(document)}")
    _check(document, (), limits.max_depth)


def encode_document(document: object, limits: DocumentLimits) -> str:
    """Check a document and return it as compact JSON text, ready to be bound.

    Raises:
        InvalidDocument: See `check_document`.
        DocumentTooLarge: If the text is larger than `limits.max_bytes` in UTF-8.
    """
    check_document(document, limits)
    text = _encode(document)
    if "\\u0000" in text:
        text = _MARKED.sub(r"\1", text)
    size = len(text) if text.isascii() else len(text.encode())
    if size > limits.max_bytes:
        raise DocumentTooLarge(
            "",
            f"{size:,} bytes as compact UTF-8 JSON, at most {limits.max_bytes:,} are allowed: "
            "store bulky values elsewhere and keep a reference here",
        )
    return text


def decode_document(text: str) -> dict[str, Any]:
    """Read a stored document in order to change it: what is not changed will be written back to the last digit.

    Numbers that a float would round are kept aside in a type that `encode_document` alone understands.
    """
    document: dict[str, Any] = json.loads(text, parse_float=_number)
    return document


def _number(literal: str) -> float | _StoredNumber:
    value = float(literal)
    if len(literal) <= _FLOAT_KEEPS or Decimal(literal) == Decimal(repr(value)):
        return value
    return _StoredNumber(literal)


def storable_text(value: str) -> bool:
    r"""Whether PostgreSQL's text can hold this string: no `\u0000` and no lone surrogate."""
    if value.isascii():
        return "\0" not in value
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def _check(container: dict[object, object] | list[object], place: Place, room: int) -> None:  # noqa: C901 - one branch a JSON type
    """Check what a container holds; `room` levels are left, this one included."""
    if room == 0:
        raise InvalidDocument(_pointer(place), "nested too deep: flatten it, or raise DocumentLimits.max_depth")
    for key, value in _items(container, place):
        if isinstance(value, str):
            if not storable_text(value):
                raise InvalidDocument(_pointer((*place, key)), _TEXT_REASON)
        elif isinstance(value, int):  # bool is one too
            if not -_INTEGER_BOUND < value < _INTEGER_BOUND:
                raise InvalidDocument(_pointer((*place, key)), "an integer of more than 4,300 digits")
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise InvalidDocument(_pointer((*place, key)), f"{value} is no JSON number: send null, or leave it out")
        elif isinstance(value, (dict, list)):
            _check(value, (*place, key), room - 1)
        elif value is not None and not isinstance(value, _StoredNumber):
            raise InvalidDocument(_pointer((*place, key)), f"{_name(value)} is no JSON type: convert it before")


_TEXT_REASON: Final = r"PostgreSQL stores neither \u0000 nor a lone surrogate in a string: remove it before"


def _items(container: dict[object, object] | list[object], place: Place) -> Iterator[tuple[str | int, object]]:
    if isinstance(container, list):
        yield from enumerate(container)
        return
    for key, value in container.items():
        if not isinstance(key, str):
            # json would write 1, None and True as "1", "null" and "true", and so merge keys without a word
            raise InvalidDocument(_pointer((*place, str(key))), f"keys are strings, {key!r} is {_name(key)}")
        if not storable_text(key):
            raise InvalidDocument(_pointer((*place, key)), _TEXT_REASON)
        yield key, value


def _pointer(place: Place) -> str:
    """RFC 6901: `~` is written `~0`, `/` is written `~1`."""
    return "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in place)


def _name(value: object) -> str:
    return "null (None)" if value is None else type(value).__name__
