"""What fuzzing runs have found, as they print it; each was mended, and stays so."""

from __future__ import annotations

import json
from datetime import timedelta  # noqa: F401
from typing import TYPE_CHECKING, Any, Final

# The names that a run writes its findings with.
from tests.fuzz.corpus.documents import (  # noqa: F401
    AGES,
    DEVICE_IDS,
    DOCUMENTS,
    LOOK_ALIKES,
    NUMBERS,
    ODD_DEVICE_IDS,
    TEXTS,
    TYPES,
    UNSTORABLE_TEXTS,
    VERSIONS,
    WORDS,
)
from tests.fuzz.corpus.wire import JSON_TEXTS, URLS  # noqa: F401
from tests.fuzz.judge.entry_points import Attempt  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import Callable

inf: Final = float("inf")
nan: Final = float("nan")


class UnmakeableError(Exception):
    """A text that is no JSON: there is no document to send."""


def wrapped(levels: int, document: dict[str, Any]) -> dict[str, Any]:
    """The document inside of others."""
    for level in range(levels):
        document = {"fan": document} if level % 2 else {"a": [document]}
    return document


def reading(body: bytes, place: int, inserted: bytes) -> Any:
    """The document of a JSON text into which something was inserted."""
    try:
        return json.loads(body[:place] + inserted + body[place:])
    except (ValueError, RecursionError) as error:
        raise UnmakeableError from error


# The entry point's name (`helpers` for a document, `url` for a URL), and what was passed to it.
FOUND: Final[list[tuple[str, Callable[[], Any]]]] = []
