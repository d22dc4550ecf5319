"""When two JSON values are equal, and what an RFC 7396 merge patch makes of one."""

from __future__ import annotations

from decimal import Decimal
from typing import Any


def canonical(value: Any) -> Any:
    """A form of the value, such that Python's `==` of two forms says whether the JSON values are equal.

    To Python `True == 1` and `1e23 != 10**23`; to JSON and PostgreSQL it is the other way round.
    """
    if isinstance(value, bool):
        return ("boolean", value)
    if isinstance(value, int | float | Decimal):
        return Decimal(str(value))
    if isinstance(value, dict):
        return {key: canonical(item) for key, item in value.items()}
    return [canonical(item) for item in value] if isinstance(value, list) else value


def equal(left: Any, right: Any) -> bool:
    return bool(canonical(left) == canonical(right))


def merge_patch(target: Any, patch: Any) -> Any:
    """The pseudo code of RFC 7396, section 2, line by line, on a copy of the target's objects."""
    if isinstance(patch, dict):
        target = dict(target) if isinstance(target, dict) else {}
        for name, value in patch.items():
            if value is None:
                if name in target:
                    del target[name]
            else:
                target[name] = merge_patch(target.get(name), value)
        return target
    return patch
