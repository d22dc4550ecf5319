"""The cursor of `ShadowService.changes`: what a reader has seen, and whether that still says what it missed.

Versions are read in the order of the transactions that wrote them, up to the oldest transaction that is open. So
whatever commits later stands behind the cursor. The cursor is the last version that was read, never the end of what
could be read: only the number of a transaction that left something behind is safe from being given again after a crash.

A cursor has expired if the database does not have that version, though it was not pruned (a restore, a failover or a
crash has lost it); if the cluster or the database is another one (transactions are counted anew there); or if a version
behind it was pruned.

Where a dump of another cluster was restored, versions have numbers of transactions that this cluster has yet to reach.
They are foreign, come first in a listing, and a second time when this cluster has reached their numbers.
"""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from iot_models._core.validation import require_text, storable_text
from iot_models.errors import CursorExpired, InvalidCursor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Row

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_FORMAT: Final = 1
_LONGEST: Final = 50_000
_LARGEST: Final = 2**63 - 1


class Place(NamedTuple):
    """A place in the order of the changes, as PostgreSQL has it: the transaction, and the version among its others."""

    is_local: bool  # False: foreign
    transaction_id: int
    device_id: str
    version: int
    written_at: int | None  # microseconds; what is another version under the same number has another time

    @classmethod
    def of(cls, row: Row[Any]) -> Place:
        """The place of a row of `history_statements.changes_page`."""
        at = None if row.written_at is None else (row.written_at - _EPOCH) // _MICROSECOND
        return cls(row.is_local, row.transaction_id, row.device_id, row.desired_version, at)


_NO_PLACE: Final = Place(is_local=False, transaction_id=-1, device_id="", version=-1, written_at=None)


@dataclass(frozen=True)
class Cursor:
    """What a reader has seen.

    Attributes:
        origin: The cluster and the database.
        place: The last version; None before the first one.
        is_whole: Whether that transaction was read to its end.
        known: The marks of what was pruned behind the place before the listing came there.
    """

    origin: str
    place: Place | None
    is_whole: bool
    known: frozenset[int]

    def encoded(self, tenant_id: str) -> str:
        """The cursor as a text for the reader, who needs not know what it says."""
        values = [_FORMAT, tenant_id, self.origin, self.place, self.is_whole, sorted(self.known)]
        text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
        return urlsafe_b64encode(text.encode()).decode().rstrip("=")


def decode(after: object, tenant_id: str) -> Cursor:
    """The cursor that a reader passes.

    Raises:
        TypeError: If it is no string.
        InvalidCursor: If it is none, or one of another tenant.
    """
    require_text("after", after)
    text = str(after)
    try:
        values = json.loads(urlsafe_b64decode(text + "=" * (-len(text) % 4))) if len(text) <= _LONGEST else None
    except (ValueError, RecursionError):
        values = None
    match values:
        case [1, str(tenant), str(origin), places, bool(is_whole), list(known)] if (
            place := _place(places)
        ) != _NO_PLACE and all(type(mark) is int for mark in known):
            if tenant != tenant_id:
                raise InvalidCursor("is a cursor of another tenant")
            return Cursor(origin, place, is_whole, frozenset(known))
    raise InvalidCursor("is no cursor of changes()")


def _place(values: object) -> Place | None:
    match values:
        case None:
            return None
        case [bool(is_local), int(transaction_id), str(device_id), int(version), int() | None as written_at] if (
            bool not in {type(transaction_id), type(version), type(written_at)}
            and 0 <= transaction_id <= _LARGEST
            and 0 <= version <= _LARGEST
            and storable_text(device_id)
        ):
            return Place(is_local, transaction_id, device_id, version, written_at)
    return _NO_PLACE


def follow(
    cursor: Cursor | None, rows: Sequence[Row[Any]], *, tenant_id: str, limit: int
) -> tuple[list[Row[Any]], Cursor]:
    """The versions behind the cursor, and the next one; rows of `history_statements.changes_page`.

    Args:
        cursor: Where the page begins; None at the start.
        rows: As they were read: the version of the cursor first, if it is there.
        tenant_id: The tenant.
        limit: How many rows there are at most behind that version.

    Raises:
        CursorExpired: If versions could be missed.
    """
    head = rows[0]
    origin = f"{head.system_identifier}.{head.database}"
    marks: dict[int, int] = {int(name): up_to for name, up_to in json.loads(head.marks or "{}").items()}
    found = [row for row in rows if row.device_id is not None]
    is_whole = len(found) < limit + (cursor is not None and cursor.place is not None)
    if cursor is None:
        cursor = Cursor(origin, None, is_whole=False, known=frozenset(marks))
    elif cursor.origin != origin:
        raise CursorExpired(tenant_id)
    place, known = cursor.place, cursor.known
    if place is not None and found and Place.of(found[0])[:4] == place[:4]:
        if Place.of(found[0]) != place:
            raise CursorExpired(tenant_id)  # another version took its number
        found = found[1:]
    elif place is not None and not any(_is_behind(up_to, head, place, is_whole=False) for up_to in marks.values()):
        raise CursorExpired(tenant_id)  # it was not pruned: it is lost
    if any(_is_behind(marks[name], head, place, is_whole=cursor.is_whole) for name in marks.keys() - known):
        raise CursorExpired(tenant_id)
    found = found[:limit]
    if found:
        place = Place.of(found[-1])
    else:
        is_whole |= cursor.is_whole
    known = frozenset(name for name in marks.keys() & known if _is_behind(marks[name], head, place, is_whole=is_whole))
    return found, Cursor(origin, place, is_whole, known)


def _is_behind(up_to: int, head: Row[Any], place: Place | None, *, is_whole: bool) -> bool:
    """Whether versions behind the place can be among those that were pruned, up to this transaction."""
    if place is None:
        return True
    pruned, seen = (up_to < head.xmax, up_to), (place.is_local, place.transaction_id)
    return pruned > seen or (pruned == seen and not is_whole)
