"""Checks of what callers pass besides documents: ids, whole numbers, versions, times. Nothing is sent before them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

from iot_models.errors import DeviceNotFound, InvalidVersion, shown

if TYPE_CHECKING:
    from iot_models.reports import Report

# Bound as bigint; the columns are integer, so that no larger number is ever current.
_WHOLE_BOUND: Final = 2**63


def storable_text(value: str) -> bool:
    r"""Whether PostgreSQL's text can hold this string: it has no `\u0000` and no lone surrogate."""
    if value.isascii():
        return "\0" not in value
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def findable(device_ids: Iterable[str]) -> list[str]:
    """Those ids that a row can carry. A device with any other id does not exist, and no statement has to ask for it."""
    return list(filter(storable_text, device_ids))


def require_findable(tenant_id: str, device_id: str) -> None:
    """Refuse an id that no row can carry, as `findable` does.

    Raises:
        TypeError: If it is no string.
        DeviceNotFound: If no row can carry it.
    """
    require_text("device_id", device_id)
    if not storable_text(device_id):
        raise DeviceNotFound(tenant_id, device_id)


_SESSIONS: Final = {
    "AsyncSession": "use AsyncShadowService for it",
    "async_scoped_session": "call it, and give the AsyncSession to AsyncShadowService",
    "Session": "use ShadowService for it",
    "scoped_session": "use ShadowService for it",
    "Connection": "pass Session(connection)",
    "AsyncConnection": "pass AsyncSession(connection)",
    "Engine": "pass Session(engine)",
    "AsyncEngine": "pass AsyncSession(engine)",
    "sessionmaker": "call it, and pass what it returns",
    "async_sessionmaker": "call it, and pass what it returns",
}


def require_session(session: object, *kinds: str) -> None:
    """Refuse anything but a session of these kinds, by the names of SQLAlchemy's classes.

    By name, because importing SQLAlchemy's async classes needs greenlet, which `import iot_models` does not.

    Raises:
        TypeError: With what to pass instead.
    """
    names = [cls.__name__ for cls in type(session).__mro__]
    if not set(kinds) & set(names):
        way = next((_SESSIONS[name] for name in names if name in _SESSIONS), f"pass SQLAlchemy's {kinds[0]}")
        raise TypeError(f"session must be a {' or a '.join(kinds)}, got {_kind(session)}: {way}")


_ENGINES: Final = {
    "AsyncEngine": "create_async_engine makes one",
    "Engine": "create_engine makes one",
}


def require_engine(engine: object, *kinds: str) -> None:
    """Refuse anything but an engine of these kinds, by the names of SQLAlchemy's classes, as `require_session` does.

    Raises:
        TypeError: With what to pass instead.
    """
    if not set(kinds) & {cls.__name__ for cls in type(engine).__mro__}:
        ways = ", ".join(f"iot_models.engine.{_ENGINES[kind]}" for kind in kinds)
        raise TypeError(f"engine must be an {' or an '.join(kinds)}, got {_kind(engine)}: {ways}")


def duration(name: str, value: object) -> timedelta:
    """A time that something may take, zero included.

    Raises:
        TypeError: If it is no timedelta.
        ValueError: If it is negative.
    """
    if not isinstance(value, timedelta):
        raise TypeError(f"{name} must be a timedelta, got {shown(value)}")
    if value < timedelta():
        raise ValueError(f"{name} must be 0 or more, got {value!r}")
    return value


def _kind(value: object) -> str:
    """The type of what is no argument at all: its value may be a URL with its password, or a document."""
    return "None" if value is None else f"<{type(value).__name__}>"


def require_text(name: str, value: object) -> None:
    """Refuse anything but a string.

    Raises:
        TypeError: If it is none.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {shown(value)}")


def require_several(name: str, values: object) -> None:
    """Refuse what holds no values that could be taken one after another.

    Raises:
        TypeError: If it does not.
    """
    if not isinstance(values, Iterable):
        raise TypeError(f"{name} must be iterable, a list for instance, got {_kind(values)}")


def require_mapping(name: str, values: object, *, to: str) -> None:
    """Refuse what maps nothing.

    Args:
        name: The argument's name.
        values: What the caller gave.
        to: What device ids are to be mapped to.

    Raises:
        TypeError: If it is no mapping.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{name} must map device ids to {to}, got {_kind(values)}")


def require_tenant(tenant_id: str) -> None:
    """Refuse what is no tenant's id.

    Raises:
        TypeError: If it is no string.
        ValueError: If it is empty, or text that PostgreSQL cannot store.
    """
    require_text("tenant_id", tenant_id)
    if not tenant_id or not storable_text(tenant_id):
        raise ValueError(f"tenant_id must be text that PostgreSQL can store and not empty, got {shown(tenant_id)}")


def device_id_list(device_ids: Iterable[str]) -> list[str]:
    """The ids in the order given, each once.

    Raises:
        TypeError: If `device_ids` is one string, no iterable, or holds anything but strings.
    """
    if isinstance(device_ids, str):
        raise TypeError(f"device_ids must be several ids, got the one string {shown(device_ids)}: put it in a list")
    require_several("device_ids", device_ids)
    wanted = list(device_ids)
    for device_id in wanted:
        require_text("device_id", device_id)
    return list(dict.fromkeys(wanted))


def whole(name: str, value: object, *, least: int = 0) -> int:
    """A whole number from `least` to the largest that PostgreSQL's bigint holds, as a plain int.

    Raises:
        TypeError: If it is no int; a bool is none.
        ValueError: If it is out of these bounds.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {shown(value)}")
    value = operator.index(value)  # the number itself, whatever a subclass says that it is
    if not least <= value < _WHOLE_BOUND:
        raise ValueError(f"{name} must be {least} or more and below 2**63, got {shown(value)}")
    return value


def version(name: str, value: object) -> int | None:
    """A version, or None where the caller gave none.

    Raises:
        InvalidVersion: If it is no int (a bool is none), negative, or too large for PostgreSQL's bigint.
    """
    return None if value is None else _version(name, value)


def require_version(name: str, value: object) -> int:
    """A version.

    Raises:
        InvalidVersion: As `version`, and if it is None.
    """
    return _version(name, value)


# In bytes. An index of PostgreSQL takes 2,700 for all ids of a row together.
_LONGEST_NEW_ID: Final = 1000


def new_id(name: str, value: object) -> str:
    """An id of a row that is to be made, as a plain str.

    Raises:
        TypeError: If it is no string.
        ValueError: If it is empty, longer than 1,000 bytes, or text that PostgreSQL cannot store.
    """
    text = _plain(name, value)
    if not text or not storable_text(text) or len(text.encode()) > _LONGEST_NEW_ID:
        raise ValueError(
            f"{name} must be text that PostgreSQL can store, not empty and of {_LONGEST_NEW_ID:,} bytes at most, "
            f"got {shown(text)}"
        )
    return text


def _plain(name: str, value: object) -> str:
    """The text itself, whatever a subclass says that it is."""
    require_text(name, value)
    return str.__str__(value)


def _version(name: str, value: object) -> int:
    try:
        return whole(name, value)
    except (TypeError, ValueError):
        raise InvalidVersion(name, value) from None


def acknowledgement(acked_version: object, ack_if_converged: object) -> int | None:
    """The version that a report acknowledges; None where it names none.

    Raises:
        TypeError: If `ack_if_converged` is no bool.
        ValueError: If the report acknowledges in both ways.
        InvalidVersion: If `acked_version` is no version.
    """
    if not isinstance(ack_if_converged, bool):
        raise TypeError(f"ack_if_converged must be a bool, got {shown(ack_if_converged)}")
    acked = version("acked_version", acked_version)
    if ack_if_converged and acked is not None:
        raise ValueError(
            f"a report acknowledges in one way: got acked_version={acked} and ack_if_converged=True. "
            "Pass the version that the device sent, or ack_if_converged for a device that sends none"
        )
    return acked


# In characters. An actor and a request id are ids; PostgreSQL's indexes take no longer ones together with others.
_LONGEST_ID: Final = 255
_LONGEST_WORDS: Final = 1000


def identifier(name: str, value: object) -> str | None:
    """An actor, or a request id; None where the caller gave none.

    Raises:
        TypeError: If it is no string.
        ValueError: If it is empty, longer than 255 characters, or text that PostgreSQL cannot store.
    """
    return None if value is None else _label(name, value, _LONGEST_ID)


def words(name: str, value: object) -> str:
    """A reason.

    Raises:
        TypeError: If it is no string.
        ValueError: If it is empty, longer than 1,000 characters, or text that PostgreSQL cannot store.
    """
    return _label(name, value, _LONGEST_WORDS)


def _label(name: str, value: object, longest: int) -> str:
    text = _plain(name, value)
    if not text.strip() or len(text) > longest or not storable_text(text):
        raise ValueError(
            f"{name} must be text that PostgreSQL can store, not empty and of {longest:,} characters at most, "
            f"got {len(text):,} characters: {shown(text)}"
        )
    return text


def refusal(report: Report) -> tuple[int, str] | None:
    """The version that a report refuses, and why; None where it refuses none.

    Raises:
        TypeError: If its reason is no string.
        InvalidVersion: If it is no version.
        ValueError: If it has no reason, or one without a version, or the report acknowledges the same or a newer one.
    """
    refused = version("refused_version", report.refused_version)
    if refused is None:
        if report.refusal is not None:
            raise ValueError("a report has a refusal, and no refused_version")
        return None
    why = words("refusal", report.refusal)
    acked = version("acked_version", report.acked_version)
    if report.ack_if_converged or (acked is not None and acked >= refused):
        raise ValueError(f"a report that refuses version {refused} acknowledges an older one, or none")
    return refused, why


def versions(name: str, values: Mapping[str, int] | None, *, of: Mapping[str, object]) -> dict[str, int]:
    """The versions by device_id, none where the caller gave none. A device without one is left out, not None.

    Args:
        name: The argument's name.
        values: What the caller gave.
        of: The devices of the batch.

    Raises:
        TypeError: If it is no mapping.
        InvalidVersion: If one is no version.
        ValueError: If one is of a device that is not in the batch: it would guard nothing.
    """
    if values is None:
        return {}
    require_mapping(name, values, to="versions")
    if strangers := [device_id for device_id in values if device_id not in of]:
        raise ValueError(f"{name} holds devices that the batch does not: {shown(strangers)[1:-1]}")
    return {device_id: _version(f"{name}[{shown(device_id)}]", value) for device_id, value in values.items()}


def require_aware(name: str, value: object) -> None:
    """Refuse anything but a time with its zone.

    Raises:
        TypeError: If it is no datetime.
        ValueError: If it has no time zone.
    """
    if not isinstance(value, datetime):
        raise TypeError(f"{name} must be a datetime, got {shown(value)}")
    if value.utcoffset() is None:
        raise ValueError(
            f"{name} must be timezone-aware, as datetime.now(timezone.utc) is; got the naive {shown(value)}"
        )
