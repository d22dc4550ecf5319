"""What may be stored: every document is checked and measured here before the database sees it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

from iot_models._core.validation import storable_text
from iot_models.errors import DocumentTooLarge, InvalidDocument, shown

if TYPE_CHECKING:
    from collections.abc import Iterable

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
            raise ValueError(f"max_bytes must be at least 1, got {shown(self.max_bytes)}")
        if not 1 <= self.max_depth <= _DEEPEST:
            raise ValueError(f"max_depth must be from 1 to {_DEEPEST}, got {shown(self.max_depth)}")


def check_document(document: object, limits: DocumentLimits) -> None:
    """Refuse what is no JSON object, what PostgreSQL's jsonb cannot hold, and what nests too deep.

    Its size is left to `encode_document`: a merge patch may be larger than what becomes of it. But no sensible one
    is more than twice as large as a document may be, half of it being what it removes. That bound keeps the work
    small where little memory is a huge document: the same list a million times, as the aliases of YAML make it.

    Raises:
        InvalidDocument: With the JSON Pointer to the first such place.
        DocumentTooLarge: If it is larger than twice `limits.max_bytes` beyond doubt.
    """
    if not isinstance(document, dict):
        raise InvalidDocument("", f"a document is a JSON object (a dict), not {_name(document)}")
    _check(document, (), limits, 2 * limits.max_bytes)


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
        raise _too_large(f"{size:,}", limits)
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


def _check(  # noqa: C901, PLR0912 - one branch a JSON type
    container: dict[object, object] | list[object], place: Place, limits: DocumentLimits, left: int
) -> int:
    """Check what a container holds, `left` bytes at most; returns how many may follow it, rather too many."""
    if len(place) == limits.max_depth:
        raise InvalidDocument(_pointer(place), "nested too deep: flatten it, or raise DocumentLimits.max_depth")
    keyed = isinstance(container, dict)
    members: Iterable[tuple[Any, object]] = container.items() if isinstance(container, dict) else enumerate(container)
    left -= len(container)  # each value takes a byte at least, and text a byte a character
    for key, value in members:
        if keyed:
            # ASCII without NUL, as nearly all text is, needs no further look: this loop is most of what a check costs.
            if not (type(key) is str and key.isascii() and "\0" not in key):
                _check_key(key, place)
            left -= len(key)
        if isinstance(value, str):
            if not ((value.isascii() and "\0" not in value) or storable_text(value)):
                raise InvalidDocument(_pointer((*place, key)), _TEXT_REASON)
            left -= len(value)
        elif value is None or value is True or value is False:
            pass
        elif isinstance(value, int):
            if not -_INTEGER_BOUND < value < _INTEGER_BOUND:
                raise InvalidDocument(_pointer((*place, key)), "an integer of more than 4,300 digits")
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise InvalidDocument(_pointer((*place, key)), f"{value} is no JSON number: send null, or leave it out")
        elif isinstance(value, (dict, list)):
            left = _check(value, (*place, key), limits, left)
        elif not isinstance(value, _StoredNumber):
            raise InvalidDocument(_pointer((*place, key)), f"{_name(value)} is no JSON type: convert it before")
        if left < 0:
            raise _too_large(f"more than {2 * limits.max_bytes:,}", limits)
    return left


def _check_key(key: object, place: Place) -> None:
    if not isinstance(key, str):
        # json would write 1, None and True as "1", "null" and "true", and so merge keys without a word
        raise InvalidDocument(_pointer((*place, shown(key))), f"keys are strings, {shown(key)} is {_name(key)}")
    if not storable_text(key):
        raise InvalidDocument(_pointer((*place, key)), _TEXT_REASON)


_TEXT_REASON: Final = r"PostgreSQL stores neither \u0000 nor a lone surrogate in a string: remove it before"


def _too_large(size: str, limits: DocumentLimits) -> DocumentTooLarge:
    return DocumentTooLarge(
        "",
        f"{size} bytes as compact UTF-8 JSON, at most {limits.max_bytes:,} are allowed: "
        "store bulky values elsewhere and keep a reference here",
    )


def _pointer(place: Place) -> str:
    """RFC 6901: `~` is written `~0`, `/` is written `~1`."""
    return "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in place)


def _name(value: object) -> str:
    return "null (None)" if value is None else type(value).__name__
