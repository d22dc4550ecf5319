"""The errors that mean something to an application: a missing device, a conflict, a document that cannot be stored.

Each keeps its values as attributes, can be pickled (for a task queue or a process pool), and says in its message what
to do next. `http_status` is the status code for an HTTP API, so that one handler can map all of them.

Wrong arguments raise Python's `TypeError` and `ValueError`; database errors are raised as SQLAlchemy raises them.
"""

from __future__ import annotations

import reprlib
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from itertools import islice
from types import MappingProxyType, NoneType
from typing import TYPE_CHECKING, ClassVar, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping


class _Short(reprlib.Repr):
    """An id or a time is shown in full, of a list the first few values, and of what may hold a secret its type only.

    That is a dict, which may be a document, and an object of another library, which may be an engine with its URL.
    """

    def repr_dict(self, x: object, level: int) -> str:  # noqa: ARG002 - reprlib's
        return f"<{type(x).__name__}>"

    def repr_instance(self, x: object, level: int) -> str:
        return super().repr_instance(x, level) if isinstance(x, _PLAIN) else f"<{type(x).__name__}>"


_PLAIN: Final = (bool, float, complex, bytes, type(None), type, Decimal, Enum, date, time, timedelta)
_SHORT: Final = _Short()
_SHORT.maxlevel = 1
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def shown(value: object) -> str:
    """Return a caller's value as text for a message: its repr, cut short where it is long or deeply nested.

    A value whose repr fails is shown as its type.
    """
    try:
        return _SHORT.repr(value)
    except Exception:  # noqa: BLE001 - an int of more than 4,300 digits, or a repr that raises: the message matters more
        return f"<{type(value).__name__} that cannot be shown>"


# How many values a message shows.
_LISTED: Final = 5


def listed(values: Collection[object], *, text: Callable[[object], str] = repr, separator: str = ", ") -> str:
    """Return the first five values as text for a message, and how many more there are.

    Args:
        values: What to list.
        text: Turns one value into text.
        separator: Stands between two values: a comma, or a semicolon where the values are sentences.

    Example:
        >>> listed("abcdefg")
        "'a', 'b', 'c', 'd', 'e' and 2 more"
    """
    first = separator.join(map(text, islice(values, _LISTED)))
    more = len(values) - _LISTED
    # A comma before "and" is left out. A semicolon stays: it ends the sentence before it.
    return f"{first}{separator.rstrip(', ')} and {more} more" if more > 0 else first


class IotModelsError(Exception):
    """Base class of the errors in this module; it is not raised itself.

    A subclass hands the arguments of its constructor to `Exception`. pickle and copy make an error from these again.
    """

    http_status: ClassVar[int] = 500


class DeviceNotFound(IotModelsError, LookupError):
    """The tenant has no device with this id. Devices of other tenants do not count."""

    http_status = 404

    def __init__(self, tenant_id: str, device_id: str) -> None:
        super().__init__(tenant_id, device_id)
        self.tenant_id = tenant_id
        self.device_id = device_id

    def __str__(self) -> str:
        return (
            f"tenant {self.tenant_id!r} has no device {self.device_id!r}: "
            "check both ids, or register it first (ShadowService.register)"
        )


class UnreadableShadow(IotModelsError):
    """The device's row holds what is no shadow: SQL by hand put it there. Nothing was written.

    `replace_desired` and `replace_reported` of the service mend the section that they replace.
    """

    http_status = 500

    def __init__(self, tenant_id: str, device_id: str, reason: str) -> None:
        super().__init__(tenant_id, device_id, reason)
        self.tenant_id = tenant_id
        self.device_id = device_id
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"the row of device {self.device_id!r} of tenant {self.tenant_id!r} is no shadow: {self.reason}; "
            "replace that document (replace_desired, replace_reported)"
        )


class InvalidVersion(IotModelsError, ValueError):
    """A version that none can be: negative, too large, or no integer. Nothing was sent.

    `name` is the argument that it was given as, `value` the value; where it is no number and no text, it is the text by
    which the message shows it.
    """

    http_status = 400

    def __init__(self, name: str, value: object, shown_as: str | None = None) -> None:
        text = shown(value) if shown_as is None else shown_as
        # Anything may come off the wire, and an error has to pickle.
        plain = value if type(value) in {int, float, str, bool, NoneType} else text
        super().__init__(name, plain, text)
        self.name = name
        self.value = plain
        self._text = text

    def __str__(self) -> str:
        return f"{self.name} must be an integer from 0 to 2**63 - 1, got {self._text}"


class VersionConflict(IotModelsError):
    """`expected_version` is not the current `desired_version`: another write came first. Nothing was written."""

    http_status = 409

    def __init__(self, device_id: str, expected: int, actual: int) -> None:
        super().__init__(device_id, expected, actual)
        self.device_id = device_id
        self.expected = expected
        self.actual = actual

    def __str__(self) -> str:
        return (
            f"device {self.device_id!r} is at desired_version {self.actual}, not at the expected {self.expected}: "
            "read the shadow again, decide by its current content, and write with its current version"
        )


class LateReport(IotModelsError):
    """An old message of a device came late: it is about a version that was overtaken. Nothing was written.

    It acknowledges a version below `reported_version`, which is `current`; or it refuses a version that is not the
    newest one, which is `current`, or that is acknowledged.
    """

    http_status = 409

    def __init__(self, device_id: str, acked: int, current: int) -> None:
        super().__init__(device_id, acked, current)
        self.device_id = device_id
        self.acked = acked
        self.current = current

    def __str__(self) -> str:
        if self.acked == self.current:
            return f"device {self.device_id!r} acknowledged version {self.acked} before it refused it: drop the refusal"
        return (
            f"device {self.device_id!r} is at version {self.current} already, "
            f"and this message is about version {self.acked}: it is an older one, drop it"
        )


class UnknownVersion(IotModelsError, ValueError):
    """A device acknowledges or refuses a version above `desired_version`: there is none. Nothing was written."""

    http_status = 400

    def __init__(self, device_id: str, acked: int, desired: int) -> None:
        super().__init__(device_id, acked, desired)
        self.device_id = device_id
        self.acked = acked
        self.desired = desired

    def __str__(self) -> str:
        return (
            f"device {self.device_id!r} answers version {self.acked}, but the newest desired_version is "
            f"{self.desired}: let it fetch its shadow again (was the database restored from an older backup?)"
        )


class VersionNotKept(IotModelsError, LookupError):
    """The history has no document of this version: it never was, is to come, was pruned, or removed the device.

    `oldest` and `newest` are the versions between which there are some; None if there are none. Code that knows no
    history (SQL by hand, an older release) leaves versions out.
    """

    http_status = 404

    def __init__(self, device_id: str, version: int, oldest: int | None, newest: int | None) -> None:
        super().__init__(device_id, version, oldest, newest)
        self.device_id = device_id
        self.version = version
        self.oldest = oldest
        self.newest = newest

    def __str__(self) -> str:
        kept = "none is kept" if self.oldest is None else f"kept are versions from {self.oldest} to {self.newest}"
        return (
            f"no document of version {self.version} of device {self.device_id!r} is kept, {kept}: "
            "ShadowService.history lists them"
        )


class RequestReused(IotModelsError):
    """The request id is that of another request, which wrote `version`. Nothing was written."""

    http_status = 409

    def __init__(self, device_id: str, request_id: str, version: int) -> None:
        super().__init__(device_id, request_id, version)
        self.device_id = device_id
        self.request_id = request_id
        self.version = version

    def __str__(self) -> str:
        return (
            f"request {self.request_id!r} of device {self.device_id!r} wrote version {self.version}, which has other "
            "content: repeat a request as it was, and give each new one an id of its own"
        )


class CursorExpired(IotModelsError):
    """The cursor of `ShadowService.changes` does not say any more what was read, so versions could be missed.

    Versions behind it were pruned, or the database is another one than it was read from, or is not in the state any
    more that was read: it was restored, or a server took over that had not received the last commits.
    """

    http_status = 410

    def __init__(self, tenant_id: str) -> None:
        super().__init__(tenant_id)
        self.tenant_id = tenant_id

    def __str__(self) -> str:
        return (
            f"the cursor of the changes of tenant {self.tenant_id!r} has expired: versions behind it were pruned, or "
            "the database was restored. List all again, from the start (after=None)"
        )


class InvalidCursor(IotModelsError, ValueError):
    """What was passed as a cursor of `ShadowService.changes` is none, or one of another tenant. Nothing was sent."""

    http_status = 400

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"after {self.reason}: pass ChangePage.cursor as it is, or None to begin from the start"


class InvalidDocument(IotModelsError, ValueError):
    """A document that cannot be stored: JSON or PostgreSQL cannot represent it, or it is nested too deep.

    It is refused before it is sent to the database. `path` is the JSON Pointer (RFC 6901) to the place of the problem;
    `""` is the document itself.
    """

    http_status = 400

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        # !a, because the pointer may contain the lone surrogate that is the problem, and a log file could not take it.
        place = f"at {self.path!a}" if self.path else "at its root"
        return f"invalid document {place}: {self.reason}"


class DocumentTooLarge(InvalidDocument):
    """A document of more than `DocumentLimits.max_bytes` bytes of compact UTF-8 JSON, measured after a merge.

    A patch or a replacement that is far too large is refused before it is measured exactly.
    """

    http_status = 413


class BatchRejected(IotModelsError):
    """An all-or-nothing batch in which at least one device was refused. Nothing was written.

    The transaction stays usable. `errors` maps the `device_id` of each refused device to its error.
    """

    http_status = 409

    def __init__(self, errors: Mapping[str, IotModelsError]) -> None:
        super().__init__(dict(errors))
        self.errors: Mapping[str, IotModelsError] = MappingProxyType(dict(errors))

    def __reduce__(self) -> tuple[type[BatchRejected], tuple[dict[str, IotModelsError]]]:
        """Make it picklable: a mapping proxy cannot be pickled, a dict can."""
        return type(self), (dict(self.errors),)

    def __str__(self) -> str:
        refused = listed(self.errors.values(), text=str, separator="; ")
        return (
            f"nothing was written, {len(self.errors)} of the batch were refused: {refused}. "
            "Correct the devices that `errors` lists, or leave them out, and send the batch again"
        )
