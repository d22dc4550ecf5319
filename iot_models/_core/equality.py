"""When two JSON values are equal, by PostgreSQL's rule for `jsonb`. Python's `==` follows another rule."""

from __future__ import annotations

import marshal
from decimal import Decimal
from typing import Any, Final

# Two values that have the same one of these types are equal when Python says so. The loops below test this first, so
# that the common case (two strings, two numbers) needs no function call.
SCALARS: Final = frozenset({str, int, float, bool, type(None)})

# Below this bound each integer is a float of its own, so Python is right about an integer and a float, too. The loops
# test that as well, because a document can hold thousands.
_NUMBERS: Final = frozenset({int, float})
_EXACT: Final = 2**53

# The value of an absent key. None cannot be used, because null is a value. It is equal to no other value.
ABSENT: Final = object()


def json_equal(left: Any, right: Any) -> bool:
    """Return whether two JSON values are equal for PostgreSQL as `jsonb`.

    `true` is not equal to `1`; `1` is equal to `1.0`. The order of an object's keys does not matter, the order of an
    array's elements does. A float is the decimal number that its repr shows: `1e23` is equal to `10**23`, although
    `1e23 == 10**23` is False in Python.

    Example:
        >>> json_equal({"on": 1, "level": 20}, {"level": 20.0, "on": 1}), json_equal([1], [True])
        (True, False)
    """
    kind = type(left)
    if (kind is type(right) and kind in SCALARS) or (
        kind in _NUMBERS and type(right) in _NUMBERS and (-_EXACT < left < _EXACT or -_EXACT < right < _EXACT)
    ):
        return bool(left == right)
    if isinstance(left, dict):
        return isinstance(right, dict) and len(left) == len(right) and _objects_equal(left, right)
    if isinstance(left, list):
        return isinstance(right, list) and len(left) == len(right) and _arrays_equal(left, right)
    # From here on only two numbers can be equal. A boolean cannot: two of them were compared above, and true is not 1.
    if isinstance(left, bool) or isinstance(right, bool):
        return False
    # JSON text holds the decimal number that the float's repr shows, and PostgreSQL compares that number.
    if isinstance(left, float):
        left = Decimal(float.__repr__(left))
    if isinstance(right, float):
        right = Decimal(float.__repr__(right))
    return bool(left == right)


def _objects_equal(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Return whether two objects with the same number of keys are equal."""
    for key, one in left.items():
        other = right.get(key, ABSENT)
        if one is other:
            continue
        kind = type(one)
        if (kind is type(other) and kind in SCALARS) or (
            kind in _NUMBERS and type(other) in _NUMBERS and -_EXACT < one < _EXACT
        ):
            if one != other:
                return False
        elif not json_equal(one, other):
            return False
    return True


def _arrays_equal(left: list[Any], right: list[Any]) -> bool:
    """Return whether two arrays of the same length are equal."""
    for one, other in zip(left, right, strict=True):
        if one is other:
            continue
        kind = type(one)
        if (kind is type(other) and kind in SCALARS) or (
            kind in _NUMBERS and type(other) in _NUMBERS and -_EXACT < one < _EXACT
        ):
            if one != other:
                return False
        elif not json_equal(one, other):
            return False
    return True


def surely_equal(left: Any, right: Any) -> bool:
    """Return True only if two values are equal. False means that they may still be equal.

    It compares the bytes that marshal writes, which differ between `true` and `1`. marshal is written in C; comparing
    the values one by one in Python takes several times as long.
    """
    try:
        # Format 4 writes a repeated value as a reference, which is half the work where keys repeat. But its bytes also
        # depend on whether other code holds a reference to a value. Format 2 has no references.
        return marshal.dumps(left) == marshal.dumps(right) or marshal.dumps(left, 2) == marshal.dumps(right, 2)
    except ValueError:  # a type that marshal cannot write, or too many levels
        return False
