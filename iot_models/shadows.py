"""Shadows: what a device should be, what it says it is, and the service that reads and writes both."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import inspect
from sqlalchemy.exc import OperationalError, ProgrammingError
from sqlalchemy.orm.attributes import set_committed_value

from iot_models import statements, twin
from iot_models.documents import DocumentLimits, check_document, decode_document, encode_document, storable_text
from iot_models.errors import DeviceNotFound, StaleReport, UnknownVersion, VersionConflict
from iot_models.models import DeviceState

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import TypeAlias

    from sqlalchemy import Executable, Result, Row
    from sqlalchemy.orm import Session

    _Row: TypeAlias = Row[*tuple[Any, ...]]

_STALE_AFTER: Final = timedelta(minutes=twin.STALE_THRESHOLD_MINUTES)
_VERSION_BOUND: Final = 2**63  # bound as bigint; the columns are integer, so that no larger number is ever current
_KEYS_SHOWN: Final = 5

# One round does, or a second where somebody wrote in between. Each further one means that somebody else got through.
_ATTEMPTS: Final = 100


@dataclass(frozen=True, slots=True)
class Shadow:
    """One device's shadow as the database had it when it was read: a value, no live object.

    Attributes:
        desired: What the operator wants. A copy: changing it changes nothing else.
        reported: What the device last confirmed. A copy too.
        desired_version: Raised by one by every write of desired.
        reported_version: The `desired_version` that the device last acknowledged.
        shadow_updated_at: When desired was last written; None if never.
        last_seen_at: When the device last reported or was otherwise heard of; None if never.
        stale_after: The silence after which `sync_status` says `stale`; no part of equality.
    """

    tenant_id: str
    device_id: str
    desired: dict[str, Any]
    reported: dict[str, Any]
    desired_version: int
    reported_version: int
    shadow_updated_at: datetime | None
    last_seen_at: datetime | None
    stale_after: timedelta = field(default=_STALE_AFTER, repr=False, compare=False, kw_only=True)

    @property
    def delta(self) -> dict[str, Any]:
        """What desired asks and reported lacks, by top-level keys; see `twin.compute_delta`."""
        return twin.compute_delta(self.desired, self.reported)

    @property
    def nested_delta(self) -> dict[str, Any]:
        """The same down to the differing leaves, as AWS computes it; see `twin.compute_nested_delta`."""
        return twin.compute_nested_delta(self.desired, self.reported)

    @property
    def is_pending(self) -> bool:
        """Whether the device has yet to acknowledge the newest desired version."""
        return self.desired_version > self.reported_version

    @property
    def is_drifted(self) -> bool:
        """Whether the device acknowledged the newest version and yet runs something else."""
        return self.desired_version == self.reported_version and not self.in_sync

    @property
    def in_sync(self) -> bool:
        """Whether the delta is empty, whatever the versions say."""
        return not self.delta

    @property
    def etag(self) -> str:
        """`desired_version` as a strong HTTP entity tag, quotes included: for `ETag` and `If-Match`."""
        return f'"{self.desired_version}"'

    def sync_status(self, now: datetime | None = None) -> twin.SyncStatus:
        """Synced, pending or stale; see `twin.sync_status`.

        Raises:
            ValueError: If `now` has no time zone.
        """
        return twin.sync_status(
            self.desired_version, self.reported_version, self.last_seen_at, now=now, stale_after=self.stale_after
        )

    def explain(self, now: datetime | None = None) -> str:
        """Say in one sentence how the device stands, and if it is out of sync, why.

        Raises:
            ValueError: If `now` has no time zone.
        """
        status = self.sync_status(now)
        if self.last_seen_at is None:
            seen = "it was never seen"
        else:
            word = "silent since" if status is twin.SyncStatus.STALE else "last seen at"
            seen = f"{word} {self.last_seen_at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
        if self.is_pending:
            why = f"version {self.desired_version} is not acknowledged (the device is at {self.reported_version})"
        elif self.desired_version < self.reported_version:
            why = (
                f"the device acknowledged version {self.reported_version}, "
                f"which is ahead of the desired version {self.desired_version}"
            )
        else:
            why = f"version {self.desired_version} is acknowledged"
        # A stale device is first of all silent; "synced" alone would hide that it runs something else.
        stands = "has drifted" if self.is_drifted and status is twin.SyncStatus.SYNCED else f"is {status}"
        return f"{self.device_id} {stands}: {why}{self._difference()}, {seen}."

    def to_dict(self) -> dict[str, Any]:
        """The shape that an HTTP API returns, ready for `json.dumps`; times are ISO 8601 in UTC."""
        return {
            "device_id": self.device_id,
            "desired": self.desired,
            "reported": self.reported,
            "delta": self.delta,
            "desired_version": self.desired_version,
            "reported_version": self.reported_version,
            "sync_status": self.sync_status().value,
            "shadow_updated_at": _iso(self.shadow_updated_at) if self.shadow_updated_at else None,
        }

    def _difference(self) -> str:
        keys = list(self.delta)
        if not keys:
            return " and nothing differs"
        rest = f" and {len(keys) - _KEYS_SHOWN} more" if len(keys) > _KEYS_SHOWN else ""
        link = "and" if self.is_pending else "but"
        return f", {link} {', '.join(map(repr, keys[:_KEYS_SHOWN]))}{rest} differ{'s' if len(keys) == 1 else ''}"


class ShadowService:
    """Reads and writes the shadows of one tenant's devices, inside the caller's session and transaction.

    It never commits, never rolls back and never retries a transaction. Before each statement the session flushes, if
    it autoflushes. After a write, a `DeviceState` that the session has loaded shows the new values; changes of yours
    that are not flushed yet are kept.

    Args:
        session: The caller's session, in a transaction or in AUTOCOMMIT mode.
        tenant_id: The only tenant whose devices exist here.
        limits: What a document may weigh.
        stale_after: The silence after which a shadow's `sync_status` is `stale`.

    Raises:
        TypeError: If `tenant_id` is no string.
        ValueError: If `tenant_id` is empty or cannot be stored as text.

    Example:
        >>> with Session(engine) as session, session.begin():
        ...     shadow = ShadowService(session, "acme").patch_desired("thermostat-1", {"target_c": 21.5})
        ...     shadow.delta
        {'target_c': 21.5}
    """

    def __init__(
        self,
        session: Session,
        tenant_id: str,
        *,
        limits: DocumentLimits = DocumentLimits(),  # noqa: B008 - frozen
        stale_after: timedelta = _STALE_AFTER,
    ) -> None:
        _require_text("tenant_id", tenant_id)
        if not tenant_id or not storable_text(tenant_id):
            raise ValueError(f"tenant_id must be text that PostgreSQL can store and not empty, got {tenant_id!a}")
        self.tenant_id = tenant_id
        self._session = session
        self._limits = limits
        self._stale_after = stale_after

    def get(self, device_id: str) -> Shadow:
        """Read one shadow.

        Raises:
            DeviceNotFound: If this tenant has no such device.
        """
        row = self._execute(statements.one_shadow(), self._device(device_id)).one_or_none()
        if row is None:
            raise DeviceNotFound(self.tenant_id, device_id)
        return self._shadow(row)

    def get_many(self, device_ids: Iterable[str]) -> dict[str, Shadow]:
        """Read several shadows in one statement, in the order asked for; devices that do not exist are left out.

        Raises:
            TypeError: If `device_ids` is one string, or holds anything but strings.
        """
        if isinstance(device_ids, str):
            raise TypeError(f"device_ids must be several ids, got the one string {device_ids!r}: put it in a list")
        wanted = list(device_ids)
        for device_id in wanted:
            _require_text("device_id", device_id)
        storable = [device_id for device_id in wanted if storable_text(device_id)]
        rows = self._execute(statements.many_shadows(), {"tenant": self.tenant_id, "devices": storable})
        found = {shadow.device_id: shadow for shadow in map(self._shadow, rows)}
        return {device_id: found[device_id] for device_id in wanted if device_id in found}

    def replace_desired(
        self, device_id: str, desired: Mapping[str, object], *, expected_version: int | None = None
    ) -> Shadow:
        """Make `desired` the whole desired document; its version rises by one, also where nothing differs.

        One guarded `UPDATE`. Without `expected_version` the last writer wins.

        Raises:
            DeviceNotFound: If this tenant has no such device.
            VersionConflict: If `expected_version` is not the current `desired_version`; nothing is written.
            InvalidDocument: If `desired` cannot be stored (`DocumentTooLarge`: is too large); nothing is sent.
            TypeError, ValueError: If `expected_version` is no int, or negative.
        """
        expected = _version("expected_version", expected_version)
        binds = self._device(device_id) | {"document": encode_document(desired, self._limits), "expected": expected}
        for _ in range(_ATTEMPTS):
            row = self._execute(statements.write_desired(guarded=expected is not None), binds).one_or_none()
            if row is not None:
                return self._written(row)
            # Missed. Unless the device or version appeared since, this raises; if it did appear, the write holds now.
            _refuse_desired(device_id, expected, self._versions(device_id).desired_version)
        raise _suppressed(device_id)

    def patch_desired(
        self, device_id: str, patch: Mapping[str, object], *, expected_version: int | None = None
    ) -> Shadow:
        """Apply an RFC 7396 merge patch to the desired document; its version rises by one, also where nothing differs.

        `None` removes a key. Reads and locks the row, merges, writes: two statements. Concurrent patches without
        `expected_version` wait for each other and all take effect.

        Raises:
            DeviceNotFound: If this tenant has no such device.
            VersionConflict: If `expected_version` is not the current `desired_version`; nothing is written.
            InvalidDocument: If the patch, or the document after it, cannot be stored; nothing is written.
            TypeError, ValueError: If `expected_version` is no int, or negative.
        """
        expected = _version("expected_version", expected_version)
        device = self._device(device_id)
        check_document(patch, self._limits)
        for _ in range(_ATTEMPTS):
            seen, desired_version, _ = self._locked("desired_state", device_id)
            _refuse_desired(device_id, expected, desired_version)
            document = encode_document(twin.merge_patch(decode_document(seen), patch), self._limits)
            binds = device | {"document": document, "expected": desired_version}
            row = self._execute(statements.write_desired(guarded=True), binds).one_or_none()
            if row is not None:
                return self._written(row)
            # Only in AUTOCOMMIT mode, where the lock ended with its statement: somebody wrote since, merge with that.
        raise _suppressed(device_id)

    def replace_reported(
        self, device_id: str, reported: Mapping[str, object], *, acked_version: int | None = None
    ) -> Shadow:
        """Make `reported` the whole reported document and set `last_seen_at`.

        One guarded `UPDATE`. `acked_version` becomes `reported_version`: the device says that it applied that version
        of desired. Without it only the document changes.

        Raises:
            DeviceNotFound: If this tenant has no such device.
            StaleReport: If a newer version was acknowledged already; nothing is written.
            UnknownVersion: If `acked_version` is above `desired_version`; nothing is written.
            InvalidDocument: If `reported` cannot be stored (`DocumentTooLarge`: is too large); nothing is sent.
            TypeError, ValueError: If `acked_version` is no int, or negative.
        """
        acked = _version("acked_version", acked_version)
        binds = self._device(device_id) | {"document": encode_document(reported, self._limits), "acked": acked}
        statement = statements.write_reported(acked=acked is not None, unchanged=False)
        for _ in range(_ATTEMPTS):
            row = self._execute(statement, binds).one_or_none()
            if row is not None:
                return self._written(row)
            # Missed, as in replace_desired.
            versions = self._versions(device_id)
            _refuse_reported(device_id, acked, versions.desired_version, versions.reported_version)
        raise _suppressed(device_id)

    def patch_reported(
        self, device_id: str, patch: Mapping[str, object], *, acked_version: int | None = None
    ) -> Shadow:
        """Apply an RFC 7396 merge patch to the reported document and set `last_seen_at`.

        Two statements, as `patch_desired`; `acked_version` as in `replace_reported`.

        Raises:
            DeviceNotFound: If this tenant has no such device.
            StaleReport: If a newer version was acknowledged already; nothing is written.
            UnknownVersion: If `acked_version` is above `desired_version`; nothing is written.
            InvalidDocument: If the patch, or the document after it, cannot be stored; nothing is written.
            TypeError, ValueError: If `acked_version` is no int, or negative.
        """
        acked = _version("acked_version", acked_version)
        device = self._device(device_id)
        check_document(patch, self._limits)
        statement = statements.write_reported(acked=acked is not None, unchanged=True)
        for _ in range(_ATTEMPTS):
            seen, desired_version, reported_version = self._locked("reported_state", device_id)
            _refuse_reported(device_id, acked, desired_version, reported_version)
            document = encode_document(twin.merge_patch(decode_document(seen), patch), self._limits)
            row = self._execute(statement, device | {"document": document, "acked": acked, "seen": seen}).one_or_none()
            if row is not None:
                return self._written(row)
            # Only in AUTOCOMMIT mode, as in patch_desired.
        raise _suppressed(device_id)

    def pending(self, *, limit: int = 100, after: str | None = None) -> list[Shadow]:
        """A page of the devices that have yet to acknowledge the newest version, by `device_id`.

        Args:
            limit: How many at most; 0 gives none.
            after: The last `device_id` of the page before. It need not exist any more.

        Raises:
            TypeError: If `limit` is no int, or `after` no string.
            ValueError: If `limit` is negative, or `after` is text that PostgreSQL cannot store.
        """
        binds: dict[str, object] = {"tenant": self.tenant_id, "limit": _whole("limit", limit)}
        if after is not None:
            _require_text("after", after)
            if not storable_text(after):
                raise ValueError(f"after must be a device_id of a page before, got {after!a}")
            binds["after"] = after
        return [self._shadow(row) for row in self._execute(statements.pending_page(after=after is not None), binds)]

    def count_pending(self) -> int:
        """How many devices have yet to acknowledge the newest version."""
        count: int = self._execute(statements.pending_count(), {"tenant": self.tenant_id}).scalar_one()
        return count

    def _device(self, device_id: str) -> dict[str, object]:
        _require_text("device_id", device_id)
        if not storable_text(device_id):  # no row can carry it
            raise DeviceNotFound(self.tenant_id, device_id)
        return {"tenant": self.tenant_id, "device": device_id}

    def _versions(self, device_id: str) -> _Row:
        row = self._execute(statements.versions(), self._device(device_id)).one_or_none()
        if row is None:
            raise DeviceNotFound(self.tenant_id, device_id)
        return row

    def _locked(self, section: statements.Section, device_id: str) -> _Row:
        row = self._execute(statements.locked_document(section), self._device(device_id)).one_or_none()
        if row is None:
            raise DeviceNotFound(self.tenant_id, device_id)
        return row

    def _execute(self, statement: Executable, binds: Mapping[str, object]) -> Result[*tuple[Any, ...]]:
        session = self._session
        if session.autoflush:  # SQLAlchemy 2.0 does so for ORM statements only, 2.1 for these too
            session.flush()
        try:
            # The mapper, so that a session bound per class finds its engine too.
            return session.execute(statement, binds, bind_arguments={"mapper": DeviceState.__mapper__})
        except (OperationalError, ProgrammingError) as error:
            _say_what_to_run(error)
            raise

    def _shadow(self, row: _Row) -> Shadow:
        return Shadow(*row, stale_after=self._stale_after)

    def _written(self, row: _Row) -> Shadow:
        """The shadow that a write returned, shown to the loaded object as well, if there is one."""
        mapper = DeviceState.__mapper__
        key = mapper.identity_key_from_primary_key((row.tenant_id, row.device_id))
        loaded = self._session.identity_map.get(key)
        if loaded is not None:
            state = inspect(loaded)
            for name, value in row._mapping.items():  # noqa: SLF001 - Row's public name for it
                if not state.attrs[name].history.has_changes():  # a change not flushed yet is the caller's
                    set_committed_value(loaded, name, deepcopy(value))
        return self._shadow(row)


def _refuse_desired(device_id: str, expected: int | None, actual: int) -> None:
    if expected is not None and expected != actual:
        raise VersionConflict(device_id, expected, actual)


def _refuse_reported(device_id: str, acked: int | None, desired_version: int, reported_version: int) -> None:
    if acked is None:
        return
    # In this order: after a restore that left desired behind reported, the report is unknown, not merely late.
    if acked > desired_version:
        raise UnknownVersion(device_id, acked, desired_version)
    if acked < reported_version:
        raise StaleReport(device_id, acked, reported_version)


def _suppressed(device_id: str) -> RuntimeError:
    return RuntimeError(
        f"device {device_id!r} is there and nothing stands against the write, yet PostgreSQL does not update its row: "
        "look for a trigger or a row level security policy on device_state that lets this role read but not write"
    )


def _say_what_to_run(error: OperationalError | ProgrammingError) -> None:
    """Add the way out to the two errors of a deployment that is not finished; the error itself stays what it was."""
    if getattr(error.orig, "sqlstate", None) in {"42P01", "42703"}:  # undefined_table, undefined_column
        error.add_detail("The database is not migrated to revision 076: run `alembic upgrade head` against it.")
    elif error.statement is None:  # failed before any statement: no connection
        error.add_detail("PostgreSQL cannot be reached: start it, or correct the engine's URL.")


def _require_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {value!r}")


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not 0 <= value < _VERSION_BOUND:
        raise ValueError(f"{name} must be 0 or more and below 2**63, got {value}")
    return value


def _version(name: str, value: object) -> int | None:
    return None if value is None else _whole(name, value)


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat()
