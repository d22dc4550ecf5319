"""Which documents may be stored, how deep and how large: said slowly, and in other words than the product's."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Final

from iot_models import DocumentTooLarge, InvalidDocument

# An attribute of a mapped object takes whatever jsonb holds and Python reads back.
ORM_DEPTH: Final = 200

_INTEGER_BOUND: Final = 10**4_300  # Python reads no integer of more digits from text
_UNSTORABLE: Final = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True)
class Limits:
    """How large and how deep a document may be; the defaults are the product's."""

    max_bytes: float = 32_768
    max_depth: int = 10

    def refusal(self, document: object) -> type[InvalidDocument] | None:
        """What a document is refused with; None if it is stored."""
        if not storable(document, max_depth=self.max_depth, max_bytes=math.inf):
            return InvalidDocument
        return DocumentTooLarge if size(document) > self.max_bytes else None

    def refusal_of_patch(self, patch: object) -> type[InvalidDocument] | None:
        """What a merge patch is refused with before it is merged: it may be larger than what becomes of it."""
        return None if storable(patch, max_depth=self.max_depth, max_bytes=math.inf) else InvalidDocument


LIMITS: Final = Limits()


def storable_text(text: str) -> bool:
    return not _UNSTORABLE.search(text)


def size(document: object) -> int:
    """In bytes, as compact UTF-8 with every number as PostgreSQL writes it: without an exponent."""
    if isinstance(document, dict):
        return 1 + max(1, sum(size(key) + size(value) + 2 for key, value in document.items()))
    if isinstance(document, list):
        return 1 + max(1, sum(size(value) + 1 for value in document))
    if isinstance(document, float):
        return len(format(Decimal(float.__repr__(document)), "f"))
    return len(json.dumps(document, ensure_ascii=False).encode())


def storable(
    document: object, *, max_depth: int = LIMITS.max_depth, max_bytes: float = LIMITS.max_bytes
) -> bool | None:
    """Whether a document may be stored; None where its types do not say what they are.

    None is for subclasses of dict, list, str and so on: what they hold and what they show may differ, and the product
    may go by either.
    """
    if not isinstance(document, Mapping):
        return False
    if not isinstance(document, dict):
        document = dict(document)
    verdicts: set[bool | None] = set()
    containers = 0
    left: list[tuple[object, int]] = [
        (document, 0)
    ]  # the document is no level; no recursion: documents may be deeper than Python's stack
    while left:
        value, depth = left.pop()
        if isinstance(value, dict | list) and type(value) in {dict, list}:
            containers += 1
            if depth > max_depth:
                verdicts |= {False}
                continue
            left += [(item, depth + 1) for item in (value.values() if isinstance(value, dict) else value)]
            verdicts.update(_key(key) for key in value if isinstance(value, dict))
        else:
            verdicts.add(_scalar(value))
    for verdict in (None, False):
        if verdict in verdicts:
            return verdict
    return size(document) <= max_bytes and containers <= max(1_024, max_bytes / 16)


def _key(key: object) -> bool | None:
    return _scalar(key) if isinstance(key, str) else False


def _scalar(value: object) -> bool | None:
    kind = type(value)
    if kind is str:
        return storable_text(str(value))
    if isinstance(value, int) and kind in {int, bool}:
        return abs(value) < _INTEGER_BOUND
    if isinstance(value, float) and kind is float:
        return math.isfinite(value)
    if value is None:
        return True
    return None if isinstance(value, dict | list | str | int | float) else False
