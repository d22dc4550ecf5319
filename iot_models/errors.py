"""Every error that iot_models raises on purpose.

Each keeps its values as attributes, survives pickling (a task queue, a process pool), and says in its message what to
do next. `http_status` is what an HTTP API answers, so that one handler can map them all.
"""

from __future__ import annotations

import reprlib
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

# An id or a time is shown whole, of what holds others the first few.
_SHORT: Final = reprlib.Repr()
_SHORT.maxlevel = 1
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80

_LISTED: Final = 5


def shown(value: object) -> str:
    """A caller's value for a message: its repr, cut where it is long or deep; its type where it has none."""
    try:
        return _SHORT.repr(value)
    except Exception:  # noqa: BLE001 - an int of more than 4,300 digits, or a repr that raises: the message matters more
        return f"<{type(value).__name__} that cannot be shown>"


def listed(items: Collection[object]) -> str:
    """The first five of several things as their reprs, and how many more there are."""
    first = ", ".join(map(repr, islice(items, _LISTED)))
    more = len(items) - _LISTED
    return f"{first} and {more} more" if more > 0 else first


class IotModelsError(Exception):
    """Base of all errors of this package; never raised itself.

    The constructor's arguments are `args`: that is what makes pickle and copy work without any code here.
    """

    http_status: ClassVar[int] = 500


class DeviceNotFound(IotModelsError, LookupError):
    """The tenant has no device of that id; another tenant's device counts as absent."""

    http_status = 404

    def __init__(self, tenant_id: str, device_id: str) -> None:
        super().__init__(tenant_id, device_id)
        self.tenant_id = tenant_id
        self.device_id = device_id

    def __str__(self) -> str:
        return (
            f"tenant {self.tenant_id!r} has no device {self.device_id!r}: "
            "check both ids, or insert its device_state row first"
        )


class VersionConflict(IotModelsError):
    """`expected_version` is not the current `desired_version`: somebody else wrote in between; nothing was written."""

    http_status = 409

    def __init__(self, device_id: str, expected: int, actual: int) -> None:
        super().__init__(device_id, expected, actual)
        self.device_id = device_id
        self.expected = expected
        self.actual = actual

    def __str__(self) -> str:
        return (
            f"device {self.device_id!r} stands at desired_version {self.actual}, not at the expected {self.expected}: "
            "read the shadow again, decide on what it says now, and write with that version"
        )


class LateReport(IotModelsError):
    """`acked_version` is below the stored `reported_version`: an old message came late; nothing was written."""

    http_status = 409

    def __init__(self, device_id: str, acked: int, current: int) -> None:
        super().__init__(device_id, acked, current)
        self.device_id = device_id
        self.acked = acked
        self.current = current

    def __str__(self) -> str:
        return (
            f"device {self.device_id!r} already acknowledged version {self.current}, "
            f"this report acknowledges {self.acked}: it is an older message, drop it"
        )


class UnknownVersion(IotModelsError, ValueError):
    """`acked_version` is above `desired_version`: the device claims what was never asked; nothing was written."""

    http_status = 400

    def __init__(self, device_id: str, acked: int, desired: int) -> None:
        super().__init__(device_id, acked, desired)
        self.device_id = device_id
        self.acked = acked
        self.desired = desired

    def __str__(self) -> str:
        return (
            f"device {self.device_id!r} acknowledges version {self.acked}, but the newest desired_version is "
            f"{self.desired}: let it fetch its shadow again (was the database restored from an older backup?)"
        )


class InvalidDocument(IotModelsError, ValueError):
    """A document that PostgreSQL or JSON cannot hold, refused before the database saw it.

    `path` is the JSON Pointer (RFC 6901) to the place, `""` for the document itself.
    """

    http_status = 400

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        # !a: a pointer may hold the very lone surrogate that it points to, which no log file would take
        place = f"at {self.path!a}" if self.path else "at its root"
        return f"invalid document {place}: {self.reason}"


class DocumentTooLarge(InvalidDocument):
    """A document of more than `DocumentLimits.max_bytes` as compact UTF-8 JSON, measured after a merge."""

    http_status = 413


class BatchRejected(IotModelsError):
    """An all-or-nothing batch with at least one bad entry; nothing was written, the transaction stays usable.

    `errors` maps each device_id that stood in the way to its own error.
    """

    http_status = 409
    _SHOWN: ClassVar[int] = 5

    def __init__(self, errors: Mapping[str, IotModelsError]) -> None:
        super().__init__(dict(errors))
        self.errors: Mapping[str, IotModelsError] = MappingProxyType(dict(errors))

    def __reduce__(self) -> tuple[type[BatchRejected], tuple[dict[str, IotModelsError]]]:
        """A mapping proxy does not pickle; a dict does."""
        return type(self), (dict(self.errors),)

    def __str__(self) -> str:
        shown = "; ".join(str(error) for error in list(self.errors.values())[: self._SHOWN])
        more = len(self.errors) - self._SHOWN
        rest = f"; and {more} more" if more > 0 else ""
        return (
            f"nothing was written, {len(self.errors)} of the batch stood in the way: {shown}{rest}. "
            "Mend or leave out what `errors` lists and send the batch again"
        )
