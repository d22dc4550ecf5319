"""What callers pass besides documents (ids, whole numbers, versions, times), checked before anything is sent."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# Bound as bigint; the columns are integer, so that no larger number is ever current.
_WHOLE_BOUND: Final = 2**63


def require_text(name: str, value: object) -> None:
    """Refuse anything but a string.

    Raises:
        TypeError: If it is none.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {value!r}")


def device_id_list(device_ids: Iterable[str]) -> list[str]:
    """The ids in the order given, each once.

    Raises:
        TypeError: If `device_ids` is one string, or holds anything but strings.
    """
    if isinstance(device_ids, str):
        raise TypeError(f"device_ids must be several ids, got the one string {device_ids!r}: put it in a list")
    wanted = list(device_ids)
    for device_id in wanted:
        require_text("device_id", device_id)
    return list(dict.fromkeys(wanted))


def whole(name: str, value: object, *, least: int = 0) -> int:
    """A whole number from `least` to the largest that PostgreSQL's bigint holds.

    Raises:
        TypeError: If it is no int; a bool is none.
        ValueError: If it is out of these bounds.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not least <= value < _WHOLE_BOUND:
        raise ValueError(f"{name} must be {least} or more and below 2**63, got {value}")
    return value


def version(name: str, value: object) -> int | None:
    """A version, or None where the caller gave none.

    Raises:
        TypeError, ValueError: See `whole`.
    """
    return None if value is None else whole(name, value)


def versions(name: str, values: Mapping[str, int] | None, *, of: Mapping[str, object]) -> dict[str, int]:
    """The versions by device_id, none where the caller gave none. A device without one is left out, not None.

    Args:
        name: The argument's name.
        values: What the caller gave.
        of: The devices of the batch.

    Raises:
        TypeError: If one is no int.
        ValueError: If one is negative, or of a device that is not in the batch: it would guard nothing.
    """
    given = {} if values is None else values
    if strangers := [device_id for device_id in given if device_id not in of]:
        raise ValueError(f"{name} holds devices that the batch does not: {', '.join(map(ascii, strangers))}")
    return {device_id: whole(f"{name}[{device_id!a}]", value) for device_id, value in given.items()}


def require_aware(name: str, value: object) -> None:
    """Refuse anything but a time with its zone.

    Raises:
        TypeError: If it is no datetime.
        ValueError: If it has no time zone.
    """
    if not isinstance(value, datetime):
        raise TypeError(f"{name} must be a datetime, got {value!r}")
    if value.utcoffset() is None:
        raise ValueError(f"{name} must be timezone-aware, as datetime.now(timezone.utc) is; got the naive {value!r}")
