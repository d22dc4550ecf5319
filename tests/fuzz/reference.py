"""What must become of a document, an id or a version: said again, slowly and in other words than the product's."""

from __future__ import annotations

import json
import math
import re
from typing import Any, Final

MAX_BYTES: Final = 32_768
MAX_DEPTH: Final = 10
# An ORM attribute takes whatever jsonb holds and Python reads back.
ORM_DEPTH: Final = 200

_TOO_LARGE: Final = 10**4_300
_UNSTORABLE: Final = re.compile("[\0\ud800-\udfff]")


def storable_text(text: str) -> bool:
    return not _UNSTORABLE.search(text)


def storable(document: object, *, max_depth: int = MAX_DEPTH, max_bytes: float = MAX_BYTES) -> bool | None:
    """True: it must be stored. False: it must be refused. None: hostile types, of which either may become."""
    if not isinstance(document, dict):
        return False
    verdicts: set[bool | None] = set()
    left: list[tuple[object, int]] = [(document, 1)]
    while left:
        value, depth = left.pop()
        if isinstance(value, (dict, list)) and type(value) in {dict, list}:
            if depth > max_depth:
                verdicts |= {False}
                continue
            left += [(item, depth + 1) for item in (value.values() if isinstance(value, dict) else value)]
            left += [(_Key(key), depth) for key in value if isinstance(value, dict)]
        else:
            verdicts.add(_scalar(value))
    for verdict in (None, False):
        if verdict in verdicts:
            return verdict
    return _size(document) <= max_bytes


class _Key:
    """An object's key: text, or no JSON."""

    def __init__(self, key: object) -> None:
        self.key = key


def _scalar(value: object) -> bool | None:
    if isinstance(value, _Key):
        value = value.key
        if not isinstance(value, str):
            return False
    kind = type(value)
    if kind is str:
        return storable_text(str(value))
    if isinstance(value, int) and kind in {int, bool}:
        return abs(value) < _TOO_LARGE
    if isinstance(value, float) and kind is float:
        return math.isfinite(value)
    if value is None:
        return True
    return None if isinstance(value, (dict, list, str, int, float)) else False


def _size(document: object) -> int:
    return len(json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode())


def merged(target: object, patch: object) -> Any:
    """RFC 7396, section 2, as its pseudo code has it."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result
