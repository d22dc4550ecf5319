"""The service that reads and writes what devices should be and what they report."""

from __future__ import annotations

import logging
import secrets
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar, cast

from iot_models import tenancy, twin
from iot_models._core import (
    batches,
    change_cursors,
    desired_statements,
    history_statements,
    loaded_objects,
    notifications,
    report_rules,
    statements,
    validation,
)
from iot_models._core.database_errors import explained
from iot_models._core.documents import DocumentLimits, check_document, decode_document, encode_document, json_object
from iot_models._core.equality import json_equal
from iot_models._core.report_rules import Versions
from iot_models._core.retries import device_not_written, devices_not_written, until_written
from iot_models._core.statement_names import METHOD
from iot_models._core.stored_json import read_json, why_no_document
from iot_models.errors import (
    DeviceNotFound,
    RequestReused,
    UnreadableShadow,
    VersionConflict,
    VersionNotKept,
)
from iot_models.history import ChangePage, DesiredVersion
from iot_models.models import DeviceState
from iot_models.shadow import STALE_AFTER, Shadow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import TypeAlias

    from sqlalchemy import Executable, Result, Row
    from sqlalchemy.orm import Session, scoped_session

    from iot_models.reports import Report, ReportOutcome

    _Row: TypeAlias = Row[*tuple[Any, ...]]
    _Written: TypeAlias = Row[*tuple[Any, ...]] | Shadow

log = logging.getLogger(__name__)

_T = TypeVar("_T")

# No version is that old, and PostgreSQL's times do not begin much earlier.
_BEFORE_ALL: Final = timedelta(days=365 * 2000)
_LARGEST_PAGE: Final = 2**62


class _Done(NamedTuple):
    """What a request has done: the version that it wrote, and the documents before, None if not kept, and after it."""

    version: int
    before: dict[str, Any] | None
    written: dict[str, Any]


class ShadowService:
    """Reads and writes the shadows of one tenant's devices, inside the caller's session and transaction.

    It never commits, never rolls back and never retries a transaction. Before each statement the session flushes, if
    it autoflushes. After a write, a `DeviceState` that the session has loaded shows the new values; changes of yours
    that are not flushed yet are kept.

    Args:
        session: The caller's session, in a transaction or in AUTOCOMMIT mode; or a `scoped_session`, whose session of
            the current scope is used by each call.
        tenant_id: The only tenant whose devices exist here.
        actor: Who writes, for the history. None: `session.info["iot_models.actor"]`, where the application keeps it.
        limits: How large and how deep a document may be.
        stale_after: A device that was not heard from for longer has the `sync_status` `stale`.
        bind_tenant: Whether to bind each transaction to the tenant first, for row level security: see
            `iot_models.tenancy`.
        history: Whether desired writes leave a row in the history. Without, there is no actor, reason or request, no
            version to restore but those of other writers, and writes are up to a fifth cheaper.
        notify: Whether desired writes wake those who wait in `bus.watch_pending`: one statement more for each
            transaction, or for each call in AUTOCOMMIT mode. A transaction that notified cannot be prepared (two-phase
            commit).

    Raises:
        TypeError: If `session` is neither, or `tenant_id` or `actor` is no string.
        ValueError: If `tenant_id` or `actor` is empty or cannot be stored as text, or the actor is longer than 255
            characters.

    Example:
        >>> with Session(engine) as session, session.begin():
        ...     shadow = ShadowService(session, "acme").patch_desired("thermostat-1", {"target_c": 21.5})
        ...     shadow.delta
        {'target_c': 21.5}
    """

    def __init__(  # noqa: PLR0913 - keywords
        self,
        session: Session | scoped_session[Any],
        tenant_id: str,
        *,
        actor: str | None = None,
        limits: DocumentLimits = DocumentLimits(),  # noqa: B008 - frozen
        stale_after: timedelta = STALE_AFTER,
        bind_tenant: bool = False,
        history: bool = True,
        notify: bool = False,
    ) -> None:
        validation.require_session(session, "Session", "scoped_session")
        validation.require_tenant(tenant_id)
        self.tenant_id = tenant_id
        self._actor = validation.identifier("actor", actor)
        self._records = history
        self._session_or_registry = session
        self._limits = limits
        self._stale_after = stale_after
        self._bind_tenant = bind_tenant
        self._notify = notify

    def get(self, device_id: str) -> Shadow:
        """Read one shadow.

        Raises:
            DeviceNotFound: If this tenant has no such device.
            UnreadableShadow: If its row holds what is no shadow.
        """
        return self._shadow(self._one("get", statements.one_shadow(), device_id))

    def get_many(self, device_ids: Iterable[str]) -> dict[str, Shadow]:
        """Read several shadows in one statement, in the order asked for; devices that do not exist are left out.

        So is a device whose row holds what is no shadow; the log names it.

        Raises:
            TypeError: If `device_ids` is one string or no iterable, or holds anything but strings.
        """
        wanted = validation.device_id_list(device_ids)
        binds = {"tenant": self.tenant_id, "devices": validation.findable(wanted)}
        rows = self._execute("get_many", statements.many_shadows(), binds)
        found = {shadow.device_id: shadow for shadow in self._readable(rows, self._shadow)}
        return {device_id: found[device_id] for device_id in wanted if device_id in found}

    def replace_desired(
        self,
        device_id: str,
        desired: Mapping[str, object],
        *,
        expected_version: int | None = None,
        reason: str | None = None,
        request_id: str | None = None,
    ) -> Shadow:
        """Make `desired` the whole desired document; its version rises by one, also where nothing differs.

        One guarded statement. Without `expected_version` the last writer wins.

        With `request_id`, a repeat of the call (its first answer was lost) writes nothing and returns the shadow as it
        stands, also at the same moment, and also if `expected_version` is overtaken by then. That holds as long as the
        history has the version that the request wrote.

        Args:
            device_id: The device.
            desired: The document.
            expected_version: The version that was read; None writes on top of any.
            reason: Why, for the history: 1,000 characters at most.
            request_id: An id of this request, new for each one, 255 characters at most. It is the device's own.

        Raises:
            DeviceNotFound: If this tenant has no such device.
            VersionConflict: If `expected_version` is not the current `desired_version`; nothing is written.
            RequestReused: If the request wrote another document; nothing is written.
            InvalidDocument: If `desired` cannot be stored (`DocumentTooLarge`: is too large); nothing is sent.
            InvalidVersion: If `expected_version` is no version.
            TypeError: If `reason` or `request_id` is no string.
            ValueError: If one of these is empty, too long, or cannot be stored as text; or if there is a `request_id`
                and no history.
        """
        expected = validation.version("expected_version", expected_version)
        binds = self._desired(device_id, expected, reason, request_id)
        binds["document"] = encode_document(desired, self._limits)
        statement = desired_statements.write_desired(
            guarded=expected is not None, recorded=self._records, once=request_id is not None
        )
        document = read_json(binds["document"])
        return self._write("replace_desired", statement, binds, lambda done: json_equal(done.written, document))

    def patch_desired(
        self,
        device_id: str,
        patch: Mapping[str, object],
        *,
        expected_version: int | None = None,
        reason: str | None = None,
        request_id: str | None = None,
    ) -> Shadow:
        """Apply an RFC 7396 merge patch to the desired document; its version rises by one, also where nothing differs.

        `None` removes a key. Reads and locks the row, merges, writes: two statements. Concurrent patches without
        `expected_version` wait for each other and all take effect. `reason` and `request_id` are as in
        `replace_desired`.

        Raises:
            DeviceNotFound: If this tenant has no such device.
            VersionConflict: If `expected_version` is not the current `desired_version`; nothing is written.
            RequestReused: If the request was another patch; nothing is written.
            UnreadableShadow: If the stored document is no JSON object; nothing is written.
            InvalidDocument: If the patch, or the document after it, cannot be stored; nothing is written.
            InvalidVersion: If `expected_version` is no version.
            TypeError: As `replace_desired`.
            ValueError: As `replace_desired`.
        """
        expected = validation.version("expected_version", expected_version)
        device = self._desired(device_id, expected, reason, request_id)
        check_document(patch, self._limits)
        statement = desired_statements.write_desired(guarded=True, recorded=self._records, once=request_id is not None)

        def is_same(done: _Done) -> bool:
            # Where the version before is not kept, the patch is the same if it changes nothing in what was written.
            before = done.written if done.before is None else done.before
            return json_equal(twin.merge_patch(before, read_json(encode_document(patch, self._limits))), done.written)

        def attempt() -> _Written | None:
            seen, versions = self._locked("patch_desired", "desired_state", device_id)
            if request_id is not None and (done := self._done("patch_desired", device, is_same)) is not None:
                return done
            _require_version(device_id, expected, versions.desired)
            stored = decode_document(seen, self.tenant_id, device_id)
            document = encode_document(twin.merge_patch(stored, patch), self._limits)
            binds = device | {"document": document, "expected": versions.desired}
            # No row only in AUTOCOMMIT mode, where the lock ended with its statement and another transaction wrote
            # since: the next attempt merges with what that wrote.
            row: _Row | None = self._execute("patch_desired", statement, binds).one_or_none()
            return row

        return self._result(
            "patch_desired", cast("_Written", until_written(attempt, lambda: device_not_written(device_id)))
        )

    def restore_desired(
        self,
        device_id: str,
        version: int,
        *,
        expected_version: int | None = None,
        reason: str | None = None,
        request_id: str | None = None,
    ) -> Shadow:
        """Make the desired document what it was at an earlier version, as a new version: a write like any other.

        One guarded statement. `reason` and `request_id` are as in `replace_desired`.

        Raises:
            DeviceNotFound: If this tenant has no such device.
            VersionNotKept: If the history has no document of that version; nothing is written.
            VersionConflict: If `expected_version` is not the current `desired_version`; nothing is written.
            RequestReused: If the request wrote another document; nothing is written.
            UnreadableShadow: If that version is no JSON object; nothing is written.
            InvalidVersion: If `version` or `expected_version` is no version.
            TypeError: As `replace_desired`.
            ValueError: As `replace_desired`.
        """
        wanted = validation.require_version("version", version)
        expected = validation.version("expected_version", expected_version)
        # It is recorded in any case: who restores reads the history.
        binds = self._desired(device_id, expected, reason, request_id) | self._author(reason) | {"version": wanted}
        statement = desired_statements.restore_desired(guarded=expected is not None, once=request_id is not None)

        def is_same(done: _Done) -> bool:
            try:
                # The version of a removal: of a device that was registered again there, which has asked for nothing.
                restored = self._version("restore_desired", device_id, wanted).desired or {}
                return json_equal(restored, done.written)
            except VersionNotKept:
                return wanted < done.version  # pruned since: nobody can tell

        def require_version() -> None:
            if self._version("restore_desired", device_id, wanted).desired is None:
                raise self._not_kept("restore_desired", device_id, wanted)

        return self._write("restore_desired", statement, binds, is_same, require_version)

    def replace_reported(
        self,
        device_id: str,
        reported: Mapping[str, object],
        *,
        acked_version: int | None = None,
        ack_if_converged: bool = False,
    ) -> Shadow:
        """Make `reported` the whole reported document and set `last_seen_at`.

        One guarded `UPDATE`. `acked_version` becomes `reported_version`: the device says that it applied that version
        of desired. Without it only the document changes.

        `ack_if_converged` is for a device that sends no version: where it is converged after this report,
        `reported_version` becomes `desired_version` in the same statement; otherwise it stays. Only the version whose
        document was compared is acknowledged: a desired write at the same moment is compared with, or comes after.

        Raises:
            DeviceNotFound: If this tenant has no such device.
            LateReport: If a newer version was acknowledged already; nothing is written.
            UnknownVersion: If `acked_version` is above `desired_version`; nothing is written.
            InvalidDocument: If `reported` cannot be stored (`DocumentTooLarge`: is too large); nothing is sent.
            InvalidVersion: If `acked_version` is no version.
            ValueError: If `acked_version` and `ack_if_converged` are both given; nothing is sent.
        """
        acked = validation.acknowledgement(acked_version, ack_if_converged)
        binds = self._device(device_id) | {"document": encode_document(reported, self._limits), "acked": acked}
        statement = statements.write_reported(acked=acked is not None, if_converged=ack_if_converged, unchanged=False)

        def attempt() -> _Row | None:
            row = self._execute("replace_reported", statement, binds).one_or_none()
            if row is None:
                # This raises, unless the device appeared or its versions changed since, as in replace_desired.
                report_rules.require_accepted(device_id, acked, self._versions("replace_reported", device_id))
            return row

        return self._written(until_written(attempt, lambda: device_not_written(device_id)))

    def patch_reported(
        self,
        device_id: str,
        patch: Mapping[str, object],
        *,
        acked_version: int | None = None,
        ack_if_converged: bool = False,
    ) -> Shadow:
        """Apply an RFC 7396 merge patch to the reported document and set `last_seen_at`.

        Two statements, as `patch_desired`; `acked_version` and `ack_if_converged` as in `replace_reported`.

        Raises:
            DeviceNotFound: If this tenant has no such device.
            LateReport: If a newer version was acknowledged already; nothing is written.
            UnknownVersion: If `acked_version` is above `desired_version`; nothing is written.
            UnreadableShadow: If the stored document is no JSON object; nothing is written.
            InvalidDocument: If the patch, or the document after it, cannot be stored; nothing is written.
            InvalidVersion: If `acked_version` is no version.
            ValueError: If `acked_version` and `ack_if_converged` are both given; nothing is sent.
        """
        acked = validation.acknowledgement(acked_version, ack_if_converged)
        device = self._device(device_id)
        check_document(patch, self._limits)
        statement = statements.write_reported(acked=acked is not None, if_converged=ack_if_converged, unchanged=True)

        def attempt() -> _Row | None:
            seen, versions = self._locked("patch_reported", "reported_state", device_id)
            report_rules.require_accepted(device_id, acked, versions)
            stored = decode_document(seen, self.tenant_id, device_id)
            document = encode_document(twin.merge_patch(stored, patch), self._limits)
            # No row only in AUTOCOMMIT mode, as in patch_desired.
            return self._execute(
                "patch_reported", statement, device | {"document": document, "acked": acked, "seen": seen}
            ).one_or_none()

        return self._written(until_written(attempt, lambda: device_not_written(device_id)))

    def refuse_desired(self, device_id: str, version: int, reason: str) -> Shadow:
        """Record that a device will not apply the newest desired version, and why; sets `last_seen_at`.

        One guarded `UPDATE`. The device stays pending, and `Shadow.refusal` is its reason, until the next desired
        write, or until it acknowledges the version in the end. Refused again, the newer reason counts.

        Args:
            device_id: The device.
            version: The version that it refuses.
            reason: In its own words: 1,000 characters at most.

        Raises:
            DeviceNotFound: If this tenant has no such device.
            LateReport: If there is a newer version, or the device acknowledged this one already; nothing is written.
            UnknownVersion: If `version` is above `desired_version`; nothing is written.
            InvalidVersion: If `version` is no version.
            TypeError: If `reason` is no string.
            ValueError: If `reason` is empty, too long, or cannot be stored as text.
        """
        refused = validation.require_version("version", version)
        binds = self._device(device_id) | {"version": refused, "words": validation.words("reason", reason)}

        def attempt() -> _Row | None:
            row = self._execute("refuse_desired", statements.refuse_desired(), binds).one_or_none()
            if row is None:
                report_rules.require_refusable(device_id, refused, self._versions("refuse_desired", device_id))
            return row

        return self._written(until_written(attempt, lambda: device_not_written(device_id)))

    def register(self, device_id: str, site_id: str) -> Shadow:
        """Make a device, or return it where it is there already, at whichever site. Two statements.

        A device that was removed goes on at the version of its removal, acknowledged, with empty documents: nothing is
        pending, and no message or object of its earlier life fits. Where your team added columns to the table that need
        a value, add a `DeviceState` to the session instead: it goes on in the same way.

        Raises:
            TypeError: If one of the ids is no string.
            ValueError: If one is empty, longer than 1,000 bytes, or cannot be stored as text.
        """
        (shadow,) = self._register("register", [(device_id, site_id)]).values()
        return shadow

    def register_many(self, sites: Mapping[str, str]) -> dict[str, Shadow]:
        """Make several devices, or return those that are there already, as `register`: two statements for all of them.

        The rows are locked in the order of `device_id`. No devices: `{}`, and no statement.

        Args:
            sites: The `site_id` of each device, by device_id.

        Returns:
            The shadows, in the order of `sites`.

        Raises:
            TypeError: If `sites` is no mapping, or an id no string.
            ValueError: If an id is empty, longer than 1,000 bytes, or cannot be stored as text.
        """
        validation.require_mapping("sites", sites, to="site ids")
        return self._register("register_many", sites.items()) if sites else {}

    def remove(self, device_id: str, *, expected_version: int | None = None, reason: str | None = None) -> None:
        """Delete the row of a device. Its history stays, and ends with a version that has no document.

        One statement, whether this service records the history or not: without that version, messages of this life
        could fit the next one.

        Raises:
            DeviceNotFound: If this tenant has no such device.
            VersionConflict: If `expected_version` is not the current `desired_version`; nothing is written.
            InvalidVersion: If `expected_version` is no version.
            TypeError: If `reason` is no string.
            ValueError: If `reason` is empty, too long, or cannot be stored as text.
        """
        expected = validation.version("expected_version", expected_version)
        binds = self._device(device_id) | self._author(reason) | {"expected": expected}
        statement = desired_statements.remove(guarded=expected is not None)

        def attempt() -> _Row | None:
            row = self._execute("remove", statement, binds).one_or_none()
            if row is None:
                _require_version(device_id, expected, self._versions("remove", device_id).desired)
            return row

        until_written(attempt, lambda: device_not_written(device_id))
        loaded_objects.remember(self._session, self.tenant_id, [device_id])
        loaded_objects.expire(self._session, self.tenant_id, [device_id])

    def replace_desired_many(
        self,
        documents: Mapping[str, Mapping[str, object]],
        *,
        expected_versions: Mapping[str, int] | None = None,
        reason: str | None = None,
    ) -> dict[str, Shadow]:
        """Make each document the whole desired document of its device, all or none; every version rises by one.

        One guarded `UPDATE`, also all or nothing in AUTOCOMMIT mode; where it wrote nothing, a second statement asks
        why. The rows are locked in the order of `device_id`, so that batches that cross wait and never deadlock (two
        batches in one transaction are two orders). No documents: `{}`, and no statement. 100,000 in one call work; all
        of a batch travels in one message, of which PostgreSQL takes 1 GB.

        Args:
            documents: By device_id.
            expected_versions: By device_id, for those that the write shall be guarded for; of the others the last
                writer wins.
            reason: Why, for the history of each: 1,000 characters at most.

        Returns:
            The new shadows, in the order of `documents`.

        Raises:
            BatchRejected: With the error of every device that is missing (`DeviceNotFound`), not at its expected
                version (`VersionConflict`) or whose document cannot be stored (`InvalidDocument`,
                `DocumentTooLarge`); nothing is written, the transaction stays usable.
            TypeError: If `documents` or `expected_versions` is no mapping, or a device_id or `reason` no string.
            InvalidVersion: If an expected version is no version.
            ValueError: If a version is of a device that is not in `documents`; or `reason` is empty, too long, or
                cannot be stored as text.
        """
        validation.require_mapping("documents", documents, to="documents")
        for device_id in documents:
            validation.require_text("device_id", device_id)
        expected = validation.versions("expected_versions", expected_versions, of=documents)
        author = self._author_of_desired(reason)
        if not documents:
            return {}
        execute = partial(self._execute, "replace_desired_many")
        rows = batches.replace_desired(execute, self.tenant_id, documents, expected, self._limits, author)
        self._wake("replace_desired_many")
        return self._written_in_order(documents, rows)

    def patch_desired_many(
        self, device_ids: Iterable[str], patch: Mapping[str, object], *, reason: str | None = None
    ) -> dict[str, Shadow]:
        """Apply one RFC 7396 merge patch to the desired documents of several devices, all or none.

        Reads and locks the rows, merges, writes: two statements, and as `replace_desired_many` in everything else.
        Concurrent patches wait for each other and all take effect. A device that is named twice is patched once. No
        devices: `{}`, and no statement.

        Returns:
            The new shadows, in the order asked for.

        Raises:
            BatchRejected: With the error of every device that is missing (`DeviceNotFound`), whose stored document is
                no JSON object (`UnreadableShadow`), or whose document cannot be stored once it is merged
                (`InvalidDocument`, `DocumentTooLarge`); nothing is written, the transaction stays usable.
            InvalidDocument: If the patch itself cannot be stored; nothing is sent.
            TypeError: If `device_ids` is one string or no iterable, or holds anything but strings; or `reason` is none.
            ValueError: If `reason` is empty, too long, or cannot be stored as text.
        """
        wanted = validation.device_id_list(device_ids)
        check_document(patch, self._limits)
        author = self._author_of_desired(reason)
        if not wanted:
            return {}
        execute = partial(self._execute, "patch_desired_many")
        rows = batches.patch_desired(execute, self.tenant_id, wanted, patch, self._limits, author)
        self._wake("patch_desired_many")
        return self._written_in_order(wanted, rows)

    def replace_reported_many(self, reports: Iterable[Report]) -> list[ReportOutcome]:
        """Apply reports as if one after another with `replace_reported`, each with an outcome instead of an error.

        One guarded `UPDATE`; a second statement asks what became of those that it did not write. Where a report is
        invalid, or a device reports twice, the rows are read and locked first: two statements. One more where the
        session has loaded some of the devices. Rows are locked in the order of `device_id`, as in
        `replace_desired_many`. A device may report several times: each report is judged by what those before it left
        behind, and the document of the last accepted one stays. No reports: `[]`, and no statement. 100,000 in one
        call work, with 1 GB of documents at most.

        In AUTOCOMMIT mode each of these statements is a transaction of its own: where one fails (a lost connection, a
        timeout), what those before it wrote stays. Send the reports again: what was accepted is accepted again, unless
        something newer came since.

        Returns:
            One outcome per report, in order.

        Raises:
            TypeError: If `reports` is no iterable, or one is no `Report`; nothing is sent. What is wrong inside a
                report is an outcome, see `ReportOutcome`: it stops no other and raises nothing.
        """
        return self._report("replace_reported_many", reports, patches=False)

    def patch_reported_many(self, reports: Iterable[Report]) -> list[ReportOutcome]:
        """Apply reports whose documents are RFC 7396 merge patches, as if one after another with `patch_reported`.

        Reads and locks the rows, merges, writes: two statements, and as `replace_reported_many` in everything else.
        Several patches of one device are merged one after another. A patch that cannot be applied to what is stored
        (`UnreadableShadow`), or leaves behind what cannot be stored, is `invalid`; the log says why.

        Returns:
            One outcome per report, in order.

        Raises:
            TypeError: If `reports` is no iterable, or one is no `Report`; nothing is sent.
        """
        return self._report("patch_reported_many", reports, patches=True)

    def pending(self, *, limit: int = 100, after: str | None = None) -> list[Shadow]:
        """A page of the devices that have yet to acknowledge the newest version, by `device_id`.

        Args:
            limit: How many at most; 0 gives none.
            after: The last `device_id` of the page before. It need not exist any more.

        Raises:
            TypeError: If `limit` is no int, or `after` no string.
            ValueError: If `limit` is negative, or `after` is text that PostgreSQL cannot store.
        """
        return self._page("pending", statements.pending_page, limit, after)

    def iter_pending(self, *, batch_size: int = 1000) -> Iterator[Shadow]:
        """All devices that have yet to acknowledge the newest version, by `device_id`, read page by page.

        No cursor stays open, so you may write and commit while you iterate. One page is in memory at a time. Each page
        is read when it is reached; a device that becomes pending before the place that was reached is left out.

        Args:
            batch_size: How many are read by one statement.

        Raises:
            TypeError: If `batch_size` is no int.
            ValueError: If `batch_size` is below 1. Both at the call, not at the first device.
        """
        return self._pages_of_pending(validation.whole("batch_size", batch_size, least=1))

    def count_pending(self) -> int:
        """How many devices have yet to acknowledge the newest version."""
        count: int = self._execute("count_pending", statements.pending_count(), {"tenant": self.tenant_id}).scalar_one()
        return count

    def drifted(self, *, limit: int = 100, after: str | None = None) -> list[Shadow]:
        """A page of the devices that acknowledged the newest version and yet run something else, by `device_id`.

        Those whose `Shadow.is_drifted` is true. No index holds them: a page reads rows until it is full.

        Args:
            limit: How many at most; 0 gives none.
            after: The last `device_id` of the page before. It need not exist any more.

        Raises:
            TypeError: If `limit` is no int, or `after` no string.
            ValueError: If `limit` is negative, or `after` is text that PostgreSQL cannot store.
        """
        return self._page("drifted", statements.drifted_page, limit, after)

    def refused(self, *, limit: int = 100, after: str | None = None) -> list[Shadow]:
        """A page of the devices that will not apply the newest version, by `device_id`: `Shadow.refusal` says why.

        All of them are pending, too.

        Args:
            limit: How many at most; 0 gives none.
            after: The last `device_id` of the page before. It need not exist any more.

        Raises:
            TypeError: If `limit` is no int, or `after` no string.
            ValueError: If `limit` is negative, or `after` is text that PostgreSQL cannot store.
        """
        return self._page("refused", statements.refused_page, limit, after)

    def count_refused(self) -> int:
        """How many devices will not apply the newest version."""
        count: int = self._execute("count_refused", statements.refused_count(), {"tenant": self.tenant_id}).scalar_one()
        return count

    def history(self, device_id: str, *, limit: int = 100, before: int | None = None) -> list[DesiredVersion]:
        """The desired versions of a device, the newest first, also if it was removed. One statement.

        The version that the device is at is among them even if no write recorded it. Versions that were written by code
        that knows no history (SQL by hand, an older release) are missing. So is one that is no JSON object; the log
        names it.

        Args:
            device_id: The device.
            limit: How many at most; 0 gives none.
            before: Only those before this version: the last one of the page before.

        Raises:
            DeviceNotFound: If this tenant has no such device, and none of its history.
            TypeError: If `limit` is no int.
            ValueError: If `limit` is negative.
            InvalidVersion: If `before` is no version.
        """
        bound = validation.version("before", before)
        binds = self._device(device_id) | {"limit": validation.whole("limit", limit)}
        if bound is not None:
            binds["before"] = bound
        statement = history_statements.history_page(before=bound is not None)
        rows = self._execute("history", statement, binds).all()
        if not rows and limit and bound is None:
            raise DeviceNotFound(self.tenant_id, device_id)
        return self._readable(rows, _desired_version)

    def desired_at(self, device_id: str, version: int) -> DesiredVersion:
        """One desired version of a device, also if it was removed. One statement.

        Raises:
            VersionNotKept: If there is none: it never was, is to come, was pruned, or was written by code that knows no
                history.
            UnreadableShadow: If it is no JSON object.
            InvalidVersion: If `version` is no version.
        """
        return self._version("desired_at", device_id, validation.require_version("version", version))

    def changes(self, *, after: str | None = None, limit: int = 1000) -> ChangePage:
        """A page of all desired versions of the tenant, removals included: for a search index, a cache, an audit.

        One statement. Whoever goes from cursor to cursor reads each version that is kept once: nothing that commits
        later stands before the cursor. Versions of one transaction come in the order of `device_id` and version.
        Transactions come in the order in which they began to write. So of two that overlapped the later version of a
        device can come first: of a device, keep the highest version.

        What an open transaction might precede is held back until that has ended, and so is what this transaction has
        written itself. In a dump of another cluster that was restored, versions of before can come twice.

        Versions that a row held before its first recorded write are there from that write on.

        Args:
            after: The `cursor` of the page before; None begins with the oldest version that is kept.
            limit: How many at most.

        Raises:
            CursorExpired: If versions behind the cursor were pruned, or the database is not the one, or not in the
                state, that the cursor was read from.
            InvalidCursor: If `after` is no cursor of this tenant.
            TypeError: If `after` is no string, or `limit` no int.
            ValueError: If `limit` is negative.
        """
        limit = min(validation.whole("limit", limit), _LARGEST_PAGE)
        cursor = None if after is None else change_cursors.decode(after, self.tenant_id)
        place = None if cursor is None else cursor.place
        binds: dict[str, object] = {"tenant": self.tenant_id, "limit": limit + (place is not None)}
        if place is not None:
            binds |= {"transaction": place.transaction_id, "device": place.device_id, "version": place.version}
        is_foreign = place is None or not place.is_local
        statement = history_statements.changes_page(foreign=is_foreign, after=place is not None)
        rows = self._execute("changes", statement, binds).all()
        found, cursor = change_cursors.follow(cursor, rows, tenant_id=self.tenant_id, limit=limit)
        changes = self._readable(found, _desired_version)
        return ChangePage(changes, cursor.encoded(self.tenant_id), rows[0].held_back_since)

    def prune_history(self, *, older_than: timedelta, keep: int = 1, limit: int = 10_000) -> int:
        """Delete a page of the tenant's oldest versions; returns how many. Call it until that is 0.

        One statement. The newest `keep` versions of each device stay, whatever their age. A request whose version is
        deleted can be done again. With `keep=0` the removal of a device is forgotten, too: registered again, it starts
        at version 0.

        Readers of `changes` that have not come to a version that is deleted get `CursorExpired`: let `older_than` be
        longer than the longest time that one may be away.

        Args:
            older_than: The age from which on a version is deleted.
            keep: How many of each device stay.
            limit: How many are deleted at most.

        Raises:
            TypeError: If `older_than` is no timedelta, or `keep` or `limit` no int.
            ValueError: If one of them is negative.
        """
        age = validation.duration("older_than", older_than)
        keep = validation.whole("keep", keep)
        binds: dict[str, object] = {
            "tenant": self.tenant_id,
            "age": min(age, _BEFORE_ALL),
            "limit": validation.whole("limit", limit),
        }
        binds["mark"] = -2 - secrets.randbelow(2**31 - 3)
        count: int = self._execute("prune_history", history_statements.prune_history(keep=keep), binds).scalar_one()
        return count

    def status_counts(self, *, now: datetime | None = None) -> dict[twin.SyncStatus, int]:
        """How many devices are synced, pending and stale, as `twin.sync_status` says; all three, in one statement.

        Args:
            now: The time to judge by; None is the present by this machine's clock, as in `sync_status`.

        Raises:
            TypeError: If `now` is no datetime.
            ValueError: If `now` has no time zone.
        """
        now = datetime.now(UTC) if now is None else now
        validation.require_aware("now", now)
        binds = {"tenant": self.tenant_id, "now": now, "stale_after": self._stale_after}
        counts = {
            row.sync_status: row.devices for row in self._execute("status_counts", statements.status_counts(), binds)
        }
        return {status: counts.get(status, 0) for status in twin.SyncStatus}

    def _report(self, method: str, reports: Iterable[Report], *, patches: bool) -> list[ReportOutcome]:
        validation.require_several("reports", reports)
        checked = [report_rules.check(report, self._limits, patches=patches) for report in reports]
        outcomes, written = batches.report(partial(self._execute, method), self.tenant_id, checked, self._limits)
        loaded_objects.remember(self._session, self.tenant_id, written)
        if loaded := list(loaded_objects.loaded(self._session, self.tenant_id, written)):
            binds = {"tenant": self.tenant_id, "devices": loaded}
            for row in self._execute(method, statements.many_shadows(), binds):
                loaded_objects.show(self._session, row)
        return outcomes

    def _device(self, device_id: str) -> dict[str, object]:
        validation.require_findable(self.tenant_id, device_id)
        return {"tenant": self.tenant_id, "device": device_id}

    def _desired(
        self, device_id: str, expected: int | None, reason: str | None, request_id: str | None
    ) -> dict[str, Any]:
        """The binds of a desired write of one device, but for what it writes."""
        binds = self._device(device_id) | (self._author_of_desired(reason) or {}) | {"expected": expected}
        if request_id is not None:
            binds["request"] = validation.identifier("request_id", request_id)
            self._require_history("request_id")
        return binds

    def _author_of_desired(self, reason: str | None) -> dict[str, str | None] | None:
        """What the history says of a desired write; None if this service does not record it."""
        if reason is not None:
            self._require_history("reason")
        return self._author(reason) if self._records else None

    def _author(self, reason: str | None) -> dict[str, str | None]:
        reason = None if reason is None else validation.words("reason", reason)
        return loaded_objects.author(self._session, self._actor, reason)

    def _require_history(self, name: str) -> None:
        if not self._records:
            raise ValueError(f"{name} is kept in the history, and this service was made with history=False")

    def _write(
        self,
        method: str,
        statement: Executable,
        binds: Mapping[str, Any],
        is_same: Callable[[_Done], bool],
        refused: Callable[[], None] = lambda: None,
    ) -> Shadow:
        """Write the desired document of one device by one statement.

        Args:
            method: The method of the service.
            statement: Writes, and returns the new row.
            binds: Its binds.
            is_same: Whether a request that is done wrote what is to be written.
            refused: Raises, if something besides the version refuses the write.
        """
        device_id = binds["device"]

        def attempt() -> _Written | None:
            row: _Row | None = self._execute(method, statement, binds).one_or_none()
            if row is None:
                if "request" in binds and (done := self._done(method, binds, is_same)) is not None:
                    return done
                # This raises, unless the device or the version appeared since: then the next attempt writes.
                _require_version(device_id, binds["expected"], self._versions(method, device_id).desired)
                refused()
            return row

        return self._result(method, cast("_Written", until_written(attempt, lambda: device_not_written(device_id))))

    def _done(
        self,
        method: str,
        binds: Mapping[str, Any],
        is_same: Callable[[_Done], bool],
    ) -> Shadow | None:
        """The shadow as it stands, if the request of these binds is done.

        Raises:
            RequestReused: If it wrote something else.
        """
        row = self._execute(method, history_statements.request_done(), binds).one_or_none()
        if row is None:
            return None
        before = None if row.before is None else read_json(row.before)
        done = _Done(row.desired_version, before if isinstance(before, dict) else None, read_json(row.desired))
        if not is_same(done):
            raise RequestReused(binds["device"], binds["request"], row.desired_version)
        return self._shadow(self._one(method, statements.one_shadow(), binds["device"]))

    def _result(self, method: str, written: _Written) -> Shadow:
        """The shadow that a desired write returned, or that stands because the request was done before."""
        if isinstance(written, Shadow):
            return written
        self._wake(method)
        return self._written(written)

    def _wake(self, method: str) -> None:
        """Notify those who wait for desired documents of this tenant, once for each transaction."""
        if not self._notify:
            return
        connection = self._session.connection(bind_arguments={"mapper": DeviceState.__mapper__})
        if not notifications.is_notified(connection, self.tenant_id):
            self._execute(method, notifications.notify(self.tenant_id), {})

    def _version(self, method: str, device_id: str, version: int) -> DesiredVersion:
        binds = self._device(device_id) | {"version": version}
        row = self._execute(method, history_statements.version_of_device(), binds).one_or_none()
        if row is None:
            raise self._not_kept(method, device_id, version)
        return _desired_version(row)

    def _not_kept(self, method: str, device_id: str, version: int) -> VersionNotKept:
        kept = self._execute(method, history_statements.versions_kept(), self._device(device_id)).one()
        return VersionNotKept(device_id, version, *kept)

    def _register(self, method: str, wanted: Iterable[tuple[str, str]]) -> dict[str, Shadow]:
        sites = {
            validation.new_id("device_id", device_id): validation.new_id("site_id", site_id)
            for device_id, site_id in wanted
        }
        binds: dict[str, object] = {"tenant": self.tenant_id, "devices": list(sites), "sites": list(sites.values())}

        def attempt() -> list[_Row] | None:
            new = self._execute(method, desired_statements.register(), binds)
            inserted: dict[str, int] = {row.device_id: row.desired_version for row in new}
            rows = {row.device_id: row for row in self._execute(method, desired_statements.registered(), binds)}
            # The INSERT may have waited for another device, and this one lived and was removed meanwhile.
            if behind := {
                name: str(version)
                for name, version in inserted.items()
                if name in rows and rows[name].desired_version == version < (rows[name].resume or 0)
            }:
                asked = binds | {"devices": [*behind], "inserted": json_object(behind)}
                gone_on = self._execute(method, desired_statements.go_on(), asked)
                rows |= {row.device_id: row for row in gone_on}
            return [*rows.values()] if len(rows) == len(sites) else None  # one was removed in between

        rows = until_written(attempt, lambda: devices_not_written(list(sites)))
        return self._written_in_order(sites, rows)

    def _versions(self, method: str, device_id: str) -> Versions:
        row = self._one(method, statements.versions(), device_id)
        return Versions(row.desired_version, row.reported_version)

    def _locked(self, method: str, section: statements.Section, device_id: str) -> tuple[str, Versions]:
        """One section as JSON text, and both versions; the row is locked."""
        row = self._one(method, statements.locked_document(section), device_id)
        return row.document, Versions(row.desired_version, row.reported_version)

    def _one(self, method: str, statement: Executable, device_id: str) -> _Row:
        row = self._execute(method, statement, self._device(device_id)).one_or_none()
        if row is None:
            raise DeviceNotFound(self.tenant_id, device_id)
        return row

    def _page(self, method: str, page: Callable[..., Executable], limit: int, after: str | None) -> list[Shadow]:
        """A page of the statement that `page` makes, without rows that hold no shadow: others take their places."""
        validation.whole("limit", limit)
        if after is not None:
            validation.require_text("after", after)
            if not validation.storable_text(after):
                raise ValueError(f"after must be a device_id of a page before, got {after!a}")
        shadows: list[Shadow] = []
        while True:
            wanted = limit - len(shadows)
            binds: dict[str, object] = {"tenant": self.tenant_id, "limit": wanted}
            if after is not None:
                binds["after"] = after
            rows = self._execute(method, page(after=after is not None), binds).all()
            shadows += self._readable(rows, self._shadow)
            if len(rows) < wanted or len(shadows) == limit:
                return shadows
            after = rows[-1].device_id

    def _pages_of_pending(self, size: int) -> Iterator[Shadow]:
        after: str | None = None
        while page := self._page("iter_pending", statements.pending_page, size, after):
            yield from page
            if len(page) < size:
                return
            after = page[-1].device_id

    @property
    def _session(self) -> Session:
        return loaded_objects.session_of(self._session_or_registry)

    def _execute(self, method: str, statement: Executable, binds: Mapping[str, object]) -> Result[*tuple[Any, ...]]:
        session = self._session
        with explained():
            if self._bind_tenant:
                tenancy.bind_tenant(session, self.tenant_id)
            if session.autoflush:  # SQLAlchemy 2.0 does so for ORM statements only, 2.1 for these too
                session.flush()
            # The mapper, so that a session bound per class finds its engine too.
            return session.execute(
                statement,
                binds,
                execution_options={METHOD: method},
                bind_arguments={"mapper": DeviceState.__mapper__},
            )

    def _shadow(self, row: _Row) -> Shadow:
        """The shadow of a row.

        Raises:
            UnreadableShadow: If the row holds none.
        """
        for name in ("desired_state", "reported_state"):
            if reason := why_no_document(getattr(row, name)):
                raise UnreadableShadow(row.tenant_id, row.device_id, f"{name} {reason}")
        return self._shadow_of(row, row.desired_state, row.reported_state)

    def _readable(self, rows: Iterable[_Row], read: Callable[[_Row], _T]) -> list[_T]:
        """What those rows hold that can be read; the log names the others."""
        values = []
        for row in rows:
            try:
                values.append(read(row))
            except UnreadableShadow as error:
                log.warning("left out: %s", error)
        return values

    def _shadow_of(self, row: _Row, desired: dict[str, Any], reported: dict[str, Any]) -> Shadow:
        is_refused = row.refused_version == row.desired_version > row.reported_version
        return Shadow(
            tenant_id=row.tenant_id,
            device_id=row.device_id,
            desired=desired,
            reported=reported,
            desired_version=row.desired_version,
            reported_version=row.reported_version,
            shadow_updated_at=row.shadow_updated_at,
            last_seen_at=row.last_seen_at,
            refusal=(row.refusal or "") if is_refused else None,
            refused_at=row.refused_at if is_refused else None,
            stale_after=self._stale_after,
        )

    def _written(self, row: _Row) -> Shadow:
        """The shadow that a write returned; the loaded object, if there is one, shows it too.

        The write took effect, and so this is no place for an error: a section that is no document is shown as empty.
        """
        loaded_objects.remember(self._session, row.tenant_id, [row.device_id])
        loaded_objects.show(self._session, row)
        try:
            return self._shadow(row)
        except UnreadableShadow as error:
            log.warning("written, and shown without the other section: %s", error)
            sections = (row.desired_state, row.reported_state)
            desired, reported = ({} if why_no_document(section) else section for section in sections)
            return self._shadow_of(row, desired, reported)

    def _written_in_order(self, device_ids: Iterable[str], rows: Iterable[_Row]) -> dict[str, Shadow]:
        shadows = {row.device_id: self._written(row) for row in rows}
        return {device_id: shadows[device_id] for device_id in device_ids}


def _require_version(device_id: str, expected: int | None, actual: int) -> None:
    if expected is not None and expected != actual:
        raise VersionConflict(device_id, expected, actual)


def _desired_version(row: _Row) -> DesiredVersion:
    """The version that a row of the history holds.

    Raises:
        UnreadableShadow: If it is no JSON object.
    """
    if not row.is_removal and (reason := why_no_document(row.desired_state)):
        raise UnreadableShadow(row.tenant_id, row.device_id, f"desired_state of version {row.desired_version} {reason}")
    return DesiredVersion(
        tenant_id=row.tenant_id,
        device_id=row.device_id,
        version=row.desired_version,
        desired=row.desired_state,
        written_at=row.written_at,
        actor=row.actor,
        reason=row.reason,
        request_id=row.request_id,
    )
