"""How often a guarded write is tried again, and what is raised when it never takes effect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

from iot_models.errors import listed

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

_T = TypeVar("_T")

# One attempt does, or a second one where another transaction wrote in between. Each further attempt means that yet
# another transaction was quicker.
_ATTEMPTS: Final = 100

_LOOK: Final = (
    "look for a trigger or a row level security policy on device_state that lets this role read but not write"
)


def until_written(attempt: Callable[[], _T | None], not_written: Callable[[], RuntimeError]) -> _T:
    """Call `attempt` until it returns something.

    Args:
        attempt: Writes and returns what was written. Where its guard refused the write, it raises the reason; where it
            finds no reason (the row changed back, or a lock ended with its statement), it returns None.
        not_written: Makes the error for an attempt that never writes and never finds a reason.

    Raises:
        RuntimeError: What `not_written` makes.
    """
    for _ in range(_ATTEMPTS):
        written = attempt()
        if written is not None:
            return written
    raise not_written()


def device_not_written(device_id: str) -> RuntimeError:
    """The error where nothing explains why one device is not written."""
    return RuntimeError(
        f"device {device_id!r} exists and nothing refuses the write, yet PostgreSQL does not update its row: {_LOOK}"
    )


def devices_not_written(device_ids: Collection[str]) -> RuntimeError:
    """The error where nothing explains why these devices of a batch are not written."""
    return RuntimeError(
        f"{listed(device_ids)} of the batch: they exist and nothing refuses the write, yet PostgreSQL does not update "
        f"every row: {_LOOK}. In AUTOCOMMIT mode, where locks end with their statement, devices that others write all "
        "the time can cause this too: send the batch in a transaction"
    )
