"""When two JSON values are equal: PostgreSQL's rule for ``jsonb``, which is not Python's."""

from __future__ import annotations

import marshal
from decimal import Decimal
from typing import Any, Final

# Two values of one of these very types are equal when Python says so. The loops below ask this before anything else,
# which keeps the common case (text against text, number against number) free of a function call.
SCALARS: Final = frozenset({str, int, float, bool, type(None)})

# Stands for the value of an absent key: None will not do, because null is a value. It equals nothing else.
ABSENT: Final = object()


def json_equal(left: object, right: object) -> bool:
    """Return whether PostgreSQL would call two JSON values equal as ``jsonb``.

    ``true`` is not ``1``, ``1`` is ``1.0``, the order of an object's keys means nothing, that of an array's elements
    does. A float is the decimal number that it is written as: ``1e23`` equals ``10**23``, which Python denies.

    Example:
        >>> json_equal({"on": 1, "level": 20}, {"level": 20.0, "on": 1}), json_equal([1], [True])
        (True, False)
    """
    kind = type(left)
    if kind is type(right) and kind in SCALARS:
        return left == right
    if isinstance(left, dict):
        return isinstance(right, dict) and len(left) == len(right) and _objects_equal(left, right)
    if isinstance(left, list):
        return isinstance(right, list) and len(left) == len(right) and _arrays_equal(left, right)
    # Of what is left only numbers can be equal: two booleans are of one type, and true is not 1.
    if isinstance(left, bool) or isinstance(right, bool):
        return False
    # JSON, and so PostgreSQL, takes a float for the decimal number that it is written as.
    if isinstance(left, float):
        left = Decimal(float.__repr__(left))
    if isinstance(right, float):
        right = Decimal(float.__repr__(right))
    return left == right


def _objects_equal(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Return whether two objects with as many keys are equal."""
    for key, one in left.items():
        other = right.get(key, ABSENT)
        if one is other:
            continue
        kind = type(one)
        if kind is type(other) and kind in SCALARS:
            if one != other:
                return False
        elif not json_equal(one, other):
            return False
    return True


def _arrays_equal(left: list[Any], right: list[Any]) -> bool:
    """Return whether two arrays of one length are equal."""
    for one, other in zip(left, right, strict=True):
        if one is other:
            continue
        kind = type(one)
        if kind is type(other) and kind in SCALARS:
            if one != other:
                return False
        elif not json_equal(one, other):
            return False
    return True


def surely_equal(left: Any, right: Any) -> bool:
    """Return whether two values are surely equal; that they are not says nothing.

    The same bytes of marshal are the same values of the same types, true and 1 kept apart: at the speed of C, where
    walking in Python takes several times as long.
    """
    try:
        # Format 4 writes a value that is met again as a reference: half the work where keys recur, but other bytes
        # where somebody else holds one of the values. Format 2 has no references.
        return marshal.dumps(left) == marshal.dumps(right) or marshal.dumps(left, 2) == marshal.dumps(right, 2)
    except ValueError:  # a type that marshal does not know, or too deep for it
        return False
