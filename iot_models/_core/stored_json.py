"""What is read from a `jsonb` column, and when that is no document. SQL by hand can store what no shadow holds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_KINDS: Final = {type(None): "null", bool: "a boolean", str: "a string", list: "an array"}


def read_json(text: str, parse_float: Callable[[str], Any] | None = None) -> Any:
    """The value that a JSON text stands for; the text itself where Python cannot hold the value."""
    try:
        return json.loads(text, parse_float=parse_float)
    except (ValueError, RecursionError):
        return text


def why_no_document(value: object) -> str | None:
    """Why a value that `Document` read cannot be shown as a document; None if it can."""
    if isinstance(value, dict):
        return None
    if isinstance(value, str) and value.startswith(("{", "[")):
        return "Python cannot hold a number in it (more than 4,300 digits), or it is nested too deep"
    # Its type only: what was meant to be a document may hold a secret of the device.
    return f"is no JSON object but {_KINDS.get(type(value), 'a number')}"
