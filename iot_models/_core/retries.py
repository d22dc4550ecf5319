"""Guarded writes that miss: how often they are tried, and what is said when that was in vain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection

# One round does, or a second where somebody wrote in between. Each further one means that somebody else got through.
ATTEMPTS: Final = 100

_SHOWN: Final = 5
_LOOK: Final = (
    "look for a trigger or a row level security policy on device_state that lets this role read but not write"
)


def suppressed(device_id: str) -> RuntimeError:
    """What to raise when nothing explains why one device is not written."""
    return RuntimeError(
        f"device {device_id!r} is there and nothing stands against the write, yet PostgreSQL does not update its row: "
        f"{_LOOK}"
    )


def suppressed_batch(device_ids: Collection[str]) -> RuntimeError:
    """What to raise when nothing explains why these devices of a batch are not written."""
    shown = ", ".join(map(repr, list(device_ids)[:_SHOWN]))
    more = f" and {len(device_ids) - _SHOWN} more" if len(device_ids) > _SHOWN else ""
    return RuntimeError(
        f"{shown}{more} of the batch: there, and nothing stands against the write, yet PostgreSQL does not update "
        f"every row of it: {_LOOK}. In AUTOCOMMIT mode, where locks do not last, devices that others write all the "
        "time can do this too: send the batch in a transaction"
    )
