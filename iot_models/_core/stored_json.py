"""What is read from a `jsonb` column, and when that is no document. SQL by hand can store what no shadow holds."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_KINDS: Final = {type(None): "null", bool: "a boolean", str: "a string", list: "an array"}


# An integer of more than 64 bits has at least 20 digits, and a float's repr at most 17 before the zeros.
_ZEROS_OF_A_LONG_FLOAT: Final = "000"


def read_json(text: str, parse_float: Callable[[str], Any] | None = None) -> Any:
    """The value that a JSON text stands for; the text itself where Python cannot hold the value.

    jsonb writes no exponents, so the float `1e22` is stored as an integer of 23 digits. An integer of more than 64 bits
    that is exactly what a float's repr shows is read as that float; any other integer is read as an int.
    """
    # Python calls a function of ours for each integer, which takes time: only where there may be such a float.
    parse_int = _integer if _ZEROS_OF_A_LONG_FLOAT in text else None
    try:
        return json.loads(text, parse_float=parse_float, parse_int=parse_int)
    except (ValueError, RecursionError):
        return text


def _integer(literal: str) -> int | float:
    value = int(literal)
    if -(2**63) <= value < 2**64:
        return value
    try:
        as_float = float(value)
    except OverflowError:
        return value
    return as_float if Decimal(repr(as_float)) == value else value


def why_no_document(value: object) -> str | None:
    """Why a value that `Document` read cannot be shown as a document; None if it can."""
    if isinstance(value, dict):
        return None
    if isinstance(value, str) and value.startswith(("{", "[")):
        return "Python cannot hold a number in it (more than 4,300 digits), or it is nested too deep"
    # Its type only: what was meant to be a document may hold a secret of the device.
    return f"is no JSON object but {_KINDS.get(type(value), 'a number')}"
