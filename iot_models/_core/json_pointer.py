"""Where in a document something is: as a chain of steps while it is looked at, as a JSON Pointer in a message."""

from __future__ import annotations

from typing import TypeAlias, Union

# From the innermost step outwards: the place of the container, and the key in it; () for the document. A pointer is
# made of it only where a message needs one.
Place: TypeAlias = Union[tuple["Place", "str | int"], tuple[()]]  # noqa: UP007 - it names itself


def pointer(place: Place) -> str:
    """Return the place as a JSON Pointer (RFC 6901), in which `~` is written `~0` and `/` is written `~1`."""
    text = ""
    while place:
        place, step = place
        text = f"/{str(step).replace('~', '~0').replace('/', '~1')}{text}"
    return text
