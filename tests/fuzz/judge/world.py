"""One judge for the corpus and for the fuzzer: what an attempt may do to a world of tenants that look alike.

An attempt is stored and reads back equal, or is refused by an error that is documented, and then nothing is written.
Either way no other row changes, no other tenant's row is shown, no statement reaches the driver that harmless data do
not send, and the transaction goes on.
"""

from __future__ import annotations

import json
import pickle
import re
import traceback
import typing
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import bindparam, event, insert, null, text
from sqlalchemy.exc import DBAPIError, IntegrityError

import iot_models
from iot_models import (
    BatchRejected,
    DesiredVersion,
    DeviceState,
    InvalidVersion,
    IotModelsError,
    ReportOutcome,
    ReportStatus,
    Shadow,
)
from iot_models.models import ShadowHistory
from tests.fuzz.judge.entry_points import ENTRY_POINTS, NEIGHBOUR, Attempt, EntryPoint
from tests.fuzz.judge.expected import (
    DESIRED_VERSION,
    DEVICE,
    DONE,
    DONE_VERSION,
    GONE,
    TENANT,
    TENANTS,
    devices_of,
    expected,
    expected_of_document,
    held,
    kept,
    repeats,
    reported_version_of,
)
from tests.reference.json_values import equal, merge_patch
from tests.reference.versions import ERRORS, reported_version_after

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import RowMapping, Table
    from sqlalchemy.orm import Session

    from tests.fuzz.judge.entry_points import Answer

_PACKAGE: Final = Path(iot_models.__file__).parent
# An error of Python's own kind says which argument it is about.
_NAMES_THE_ARGUMENT: Final = re.compile(
    r"\b(device_ids?|acked_version|expected_versions?|after|documents"
    r"|iot_models\.actor|iot_models\.reason|actor|reason|request_id|refusal|site_id|keep|limit|older_than)\b"
)
# What a batch answers where a single report raises.
_REPORTED_AS: Final[dict[type[Exception], ReportStatus]] = {
    **{error: status for status, error in ERRORS.items()},
    TypeError: ReportStatus.INVALID,
    ValueError: ReportStatus.INVALID,
    InvalidVersion: ReportStatus.INVALID,
}
_CHANGED: Final = text("""
    SELECT coalesce(now.tenant_id, was.tenant_id), coalesce(now.device_id, was.device_id)
    FROM device_state AS now FULL JOIN fuzz_was AS was USING (tenant_id, device_id)
    WHERE now IS DISTINCT FROM was
    UNION
    SELECT coalesce(now.tenant_id, was.tenant_id), coalesce(now.device_id, was.device_id)
    FROM device_shadow_history AS now FULL JOIN fuzz_history_was AS was USING (tenant_id, device_id, desired_version)
    WHERE now IS DISTINCT FROM was
""")
_VERSIONS: Final = text("""
    SELECT desired_version, CAST(desired_state AS text) AS desired, actor, reason, request_id FROM device_shadow_history
    WHERE tenant_id = :tenant AND device_id = :device""")
_ROWS: Final = text("SELECT * FROM device_state WHERE tenant_id = :tenant AND device_id IN :devices").bindparams(
    bindparam("devices", expanding=True)
)
# How old the versions of the history are: no age that an attempt asks for is near it.
_AGE: Final = timedelta(hours=12)
_HOLDS: Final = {
    section: text(f"""
        SELECT {section} = CAST(:document AS jsonb) FROM device_state
        WHERE tenant_id = :tenant AND device_id = :device""")
    for section in ("desired_state", "reported_state", "state")
}


class FindingError(AssertionError):
    """What an attempt did and must not do."""


class NotApplicableError(Exception):
    """What cannot be passed to this entry point at all: a dict takes no list for a key, whoever asks."""


# Whatever was sent: these say that it was looked at too late.
_NEVER: Final = (RecursionError, UnicodeError, DBAPIError)


class World:
    """Tenants whose ids look alike, each with the same device ids and its own documents.

    Made inside the session's transaction, and as it was after each attempt.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._sent: set[str] | None = None
        self._harmless: dict[str, set[str]] = {}
        rows = [
            {
                "tenant_id": tenant,
                "site_id": "berlin",
                "device_id": device,
                "desired_version": DESIRED_VERSION,
                "reported_version": reported_version_of(device),
                "refused_version": DESIRED_VERSION if device == DEVICE else None,
                "refusal": "cannot" if device == DEVICE else None,
                **{section: held(section, tenant, device) for section in _HOLDS},
            }
            for tenant in TENANTS
            for device in devices_of(tenant)
        ]
        versions = [
            {
                "tenant_id": tenant,
                "device_id": device,
                "desired_version": version,
                "desired_state": null() if document is None else document,
                "written_at": datetime.now(UTC) - _AGE,
                "request_id": DONE if version == DONE_VERSION else None,
            }
            for tenant in TENANTS
            for device in [*devices_of(tenant), GONE]
            for version, document in kept(tenant, device).items()
            if version != DESIRED_VERSION
        ]
        # Asked beside the session: after a flush that failed it would answer nothing before a rollback.
        self._connection = session.connection()
        self._connection.execute(insert(typing.cast("Table", DeviceState.__table__)), rows)
        self._connection.execute(insert(typing.cast("Table", ShadowHistory.__table__)), versions)
        for name, table in (("fuzz_was", "device_state"), ("fuzz_history_was", "device_shadow_history")):
            self._connection.execute(text(f"CREATE TEMPORARY TABLE {name} ON COMMIT DROP AS TABLE {table}"))
        event.listen(self._connection, "before_cursor_execute", self._record)

    def judge(self, name: str, attempt: Attempt) -> str:
        """Make the attempt and look at all that it did; returns in a word what became of it.

        Raises:
            FindingError: What it must not have done.
            NotApplicableError: The entry point cannot take such a thing.
        """
        point = ENTRY_POINTS[name]
        _require_applicable(point, attempt)
        if name not in self._harmless:
            self._harmless[name] = self._statements_of_harmless(point)
        with self._undone():
            answer, error, sent = self._make(point, attempt)
            if built := sent - self._harmless[name]:
                raise FindingError(f"sends statements that harmless data do not: {sorted(built)}")
            if error is not None:
                self._check_refusal(point, attempt, error)
                return "refused"
            return self._check_answer(point, attempt, answer)

    def _statements_of_harmless(self, point: EntryPoint) -> set[str]:
        attempts = [Attempt(TENANT, DEVICE), Attempt(TENANT, DEVICE, version=DESIRED_VERSION)]
        if point.kind != "orm":
            attempts += [Attempt(TENANT, DEVICE, version=DESIRED_VERSION + 1), Attempt(TENANT, "absent")]
        if "request_id" in point.takes:  # of a version that is not kept, too, and one that is done
            usual = attempts[:]
            attempts += [replace(one, request_id=request) for one in usual for request in ("request", DONE)]
            attempts.append(Attempt(TENANT, DEVICE, version=DONE_VERSION, request_id=DONE))
        if "refused_version" in point.takes:
            refusing: dict[str, Any] = {"refused_version": DESIRED_VERSION, "refusal": "no"}
            attempts += [replace(one, **refusing) for one in attempts]
            attempts.append(Attempt(TENANT, DEVICE, None, **refusing))
        if point.kind == "tenant":
            attempts += [Attempt(TENANT, DEVICE, version=version) for version in (0, 1, 2**40)]
        if point.kind == "after":
            attempts.append(Attempt(TENANT, None))
        if point.kind == "each":  # a report that is invalid sends the others another way
            attempts.append(Attempt(TENANT, DEVICE, None))
        sent: set[str] = set()
        for attempt in attempts:
            with self._undone():
                sent |= self._make(point, attempt)[2]
        return sent

    @contextmanager
    def _undone(self) -> Iterator[None]:
        savepoint = self._session.begin_nested()
        self._session.connection()  # sends the SAVEPOINT, which is no statement of the entry point's
        try:
            yield
        finally:
            savepoint.rollback()
            self._session.expunge_all()

    def _make(self, point: EntryPoint, attempt: Attempt) -> tuple[Answer, Exception | None, set[str]]:
        sent: set[str] = set()
        self._sent = sent
        try:
            return point.call(self._session, attempt), None, sent
        except Exception as error:  # noqa: BLE001 - to be judged
            return [], error, sent
        finally:
            self._sent = None

    def _record(self, _connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        # A flush that fails rolls back what it did by a statement that has a number in it.
        if self._sent is not None and not statement.startswith("ROLLBACK TO SAVEPOINT"):
            self._sent.add(statement)

    def _check_refusal(self, point: EntryPoint, attempt: Attempt, error: Exception) -> None:
        right = expected(point, attempt)
        of_device = error
        if isinstance(error, BatchRejected):
            # One patch may be too much for both.
            others = set(error.errors) - {attempt.device_id} - ({NEIGHBOUR} if point.merges else set())
            if others or attempt.device_id not in error.errors:
                raise FindingError(f"rejects the batch for others: {_shown(error)}")
            of_device = error.errors[attempt.device_id]
        if not isinstance(of_device, right.demanded + right.possible):
            raise FindingError(f"raises {_shown(of_device)}") from error
        check_error(error, odd=bool(right.possible))
        if point.kind != "orm":
            self._session.connection()  # goes on without a rollback
        if changed := self._changed():
            raise FindingError(f"raises {type(error).__name__}, and wrote {sorted(changed)}")

    def _check_answer(self, point: EntryPoint, attempt: Attempt, answer: Answer) -> str:
        right = expected(point, attempt)
        shadows = [one for one in answer if isinstance(one, Shadow)]
        versions = [one for one in answer if isinstance(one, DesiredVersion)]
        outcomes = [one for one in answer if isinstance(one, ReportOutcome)]
        accepted = True
        if point.kind == "each":
            status = outcomes[-1].status
            accepted = status is ReportStatus.ACCEPTED
            may = {_REPORTED_AS[kind] for kind in right.demanded} or {ReportStatus.ACCEPTED}
            if status not in (set(ReportStatus) if right.possible else may):
                raise FindingError(f"says {status}, where {sorted(may)} is right")
            if not _odd(attempt.device_id) and outcomes[-1].device_id != attempt.device_id:
                raise FindingError(f"answers for {outcomes[-1].device_id!a}")
        elif right.demanded:
            raise FindingError(f"accepts it, where {[kind.__name__ for kind in right.demanded]} is right")
        self._check_shadows(point, attempt, shadows)
        if point.kind == "tenant":
            self._check_pruned(point, attempt, answer)
        else:
            self._check_rows(point, attempt, accepted=accepted and not repeats(point, attempt))
        if point.kind == "after":
            self._check_page(point, attempt, shadows)
        if point.section is None and point.version in {"kept", "before"}:
            self._check_versions(point, attempt, versions)
        return "stored" if point.section and accepted else "refused" if not accepted else "read"

    def _check_rows(self, point: EntryPoint, attempt: Attempt, *, accepted: bool) -> None:
        written: set[tuple[str, object]] = set()
        is_registration = "site_id" in point.takes
        if point.section:
            # An id of a hostile class is a plain one in the row.
            device_id = str.__str__(attempt.device_id) if isinstance(attempt.device_id, str) else attempt.device_id
            if accepted and not (is_registration and device_id in devices_of(attempt.tenant_id)):
                written.add((attempt.tenant_id, device_id))
            if point.kind in {"all", "each"} and not is_registration:
                written.add((attempt.tenant_id, NEIGHBOUR))
        changed = self._changed()
        if {tenant for tenant, _ in changed} - {attempt.tenant_id}:
            raise FindingError(f"wrote to another tenant: {sorted(changed)}")
        if not _odd(attempt.device_id) and changed != written:
            raise FindingError(f"wrote {sorted(changed)}, and not {sorted(written)}")
        if written and accepted and not _odd(attempt.device_id):
            if point.section == "life":
                self._check_life(attempt, is_there=is_registration)
            else:
                self._check_document(point, attempt)
            if not is_registration and point.section in {"desired_state", "life"}:
                self._check_history(point, attempt)

    def _check_life(self, attempt: Attempt, *, is_there: bool) -> None:
        row = self._rows(attempt.tenant_id, {attempt.device_id}).get(attempt.device_id)
        if (row is not None) != is_there:
            raise FindingError("leaves no row" if is_there else "leaves the row")
        if row is not None:
            newest = max(kept(attempt.tenant_id, attempt.device_id), default=0)
            versions = (row["desired_version"], row["reported_version"])
            if versions != (newest, newest) or (row["desired_state"], row["reported_state"]) != ({}, {}):
                raise FindingError(f"registers it at {versions} with {row['desired_state']}, {row['reported_state']}")
            if row["site_id"] != attempt.site_id and not _odd(attempt.site_id):
                raise FindingError(f"registers it at the site {row['site_id']!a}")

    def _check_history(self, point: EntryPoint, attempt: Attempt) -> None:
        """The history has all that it had, the version before the write, and the new one with its author."""
        found = self._versions(attempt.tenant_id, attempt.device_id)
        newest = DESIRED_VERSION + 1
        wanted = set(kept(attempt.tenant_id, attempt.device_id)) | {newest}
        if set(found) != wanted:
            raise FindingError(f"leaves the versions {sorted(found)} in the history, and not {sorted(wanted)}")
        row = self._rows(attempt.tenant_id, {attempt.device_id}).get(attempt.device_id)
        document = None if found[newest]["desired"] is None else json.loads(found[newest]["desired"])
        if not equal(document, None if row is None else row["desired_state"]):
            raise FindingError(f"records another document: {str(document)[:200]}")
        for part in ("actor", "reason", "request_id"):
            given = getattr(attempt, part) if part in point.takes else None
            if (given is None or not _odd(given)) and found[newest][part] != given:
                raise FindingError(f"records the {part} {found[newest][part]!a}")

    def _check_versions(self, point: EntryPoint, attempt: Attempt, versions: list[DesiredVersion]) -> None:
        """What is shown of the history is the tenant's own device, and can be sent on."""
        if _odd(attempt.device_id):
            return
        wanted = kept(attempt.tenant_id, attempt.device_id)
        bound = point.version_of(attempt)
        if type(bound) is int or bound is None:
            numbers = sorted((version for version in wanted if bound is None or version < bound), reverse=True)
            if [one.version for one in versions] != ([bound] if point.version == "kept" else numbers):
                raise FindingError(f"shows the versions {[one.version for one in versions]}")
        for one in versions:
            if (one.tenant_id, one.device_id) != (attempt.tenant_id, attempt.device_id):
                raise FindingError(f"shows a version of {one.device_id!a} of tenant {one.tenant_id!a}")
            if not equal(one.desired, wanted[one.version]):
                raise FindingError(f"shows another document at version {one.version}: {str(one.desired)[:200]}")
            json.dumps(one.to_dict(), allow_nan=False).encode()
            repr(one).encode()

    def _check_pruned(self, point: EntryPoint, attempt: Attempt, answer: Answer) -> None:
        """Of each device as many as are kept are left; older ones are deleted up to the limit."""
        if _odd(attempt.tenant_id) or type(number := point.version_of(attempt)) is not int:
            return
        recorded = [set(kept(attempt.tenant_id, device)) - {DESIRED_VERSION} for device in self._devices(attempt)]
        old = sum(max(0, len(versions) - number) for versions in recorded) if attempt.age < _AGE else 0
        deleted = min(old, 10_000 if attempt.version is None else number)
        left = sum(map(len, recorded)) - deleted
        found = self._connection.execute(
            text("SELECT count(*) FROM device_shadow_history WHERE tenant_id = :tenant AND desired_version >= 0"),
            {"tenant": attempt.tenant_id},
        ).scalar_one()
        if (answer, found) != ([deleted], left):
            raise FindingError(f"says that it deleted {answer}, and left {found}: {deleted} and {left} are right")
        if strangers := {tenant for tenant, _ in self._changed()} - {attempt.tenant_id}:
            raise FindingError(f"forgets versions of other tenants: {sorted(strangers)}")

    def _devices(self, attempt: Attempt) -> list[str]:
        return [*devices_of(attempt.tenant_id), GONE]

    def _versions(self, tenant_id: str, device_id: str) -> dict[int, RowMapping]:
        found = self._connection.execute(_VERSIONS, {"tenant": tenant_id, "device": device_id}).mappings()
        return {row["desired_version"]: row for row in found}

    def _check_document(self, point: EntryPoint, attempt: Attempt) -> None:
        section = typing.cast("str", point.section)
        row = self._rows(attempt.tenant_id, {attempt.device_id})[attempt.device_id]
        versions = (row["desired_version"], row["reported_version"])
        if versions != self._versions_after(point, attempt):
            raise FindingError(f"leaves the versions at {versions}")
        if (point.section == "desired_state") != (row["shadow_updated_at"] is not None):
            raise FindingError(f"leaves shadow_updated_at at {row['shadow_updated_at']}")
        if expected_of_document(point, attempt).possible:
            return  # what such a thing means is its own secret; that it could be read back is enough
        self._check_refusal_of_device(point, attempt, row)
        document = dict(attempt.document) if isinstance(attempt.document, Mapping) else attempt.document
        if "document" not in point.takes:  # a refusal, or what was at another version
            document = held(section, attempt.tenant_id, attempt.device_id)
            if point.version == "kept":
                if type(version := point.version_of(attempt)) is not int:
                    return
                document = kept(attempt.tenant_id, attempt.device_id)[version]
        elif point.merges:
            document = merge_patch(held(section, attempt.tenant_id, attempt.device_id), document)
        binds = {
            "tenant": attempt.tenant_id,
            "device": attempt.device_id,
            "document": json.dumps(document, allow_nan=False),
        }
        if self._connection.execute(_HOLDS[section], binds).scalar_one() is not True:
            raise FindingError(f"stores another document: {str(row[section])[:200]}")

    def _check_refusal_of_device(self, point: EntryPoint, attempt: Attempt, row: RowMapping) -> None:
        """A device's own words, until the next desired write."""
        before = (DESIRED_VERSION, "cannot") if attempt.device_id == DEVICE else (None, None)
        wanted: tuple[Any, Any] = (None, None) if point.section == "desired_state" else before
        if point.version == "refused":
            wanted = (DESIRED_VERSION, "no" if attempt.refusal is None else attempt.refusal)
        elif "refused_version" in point.takes and attempt.refused_version is not None:
            wanted = (DESIRED_VERSION, attempt.refusal)
        if (row["refused_version"], row["refusal"]) != wanted and not _odd(attempt.refusal or ""):
            raise FindingError(f"leaves the refusal {(row['refused_version'], row['refusal'])!a}")

    def _versions_after(self, point: EntryPoint, attempt: Attempt) -> tuple[int, int]:
        desired = DESIRED_VERSION + (point.section == "desired_state")
        was = reported_version_of(attempt.device_id)
        acknowledges = point.version == "acked"
        acked = attempt.version if acknowledges else None
        return desired, reported_version_after(acked, desired, was, is_converged=False)

    def _check_shadows(self, point: EntryPoint, attempt: Attempt, shadows: list[Shadow]) -> None:
        """What is shown is the tenant's own row as it is stored, and what `Shadow` makes of it can be sent on."""
        rows = self._rows(attempt.tenant_id, {shadow.device_id for shadow in shadows}) if shadows else {}
        for shadow in shadows:
            if shadow.tenant_id != attempt.tenant_id:
                raise FindingError(f"shows a device of tenant {shadow.tenant_id!a}")
            row = rows[shadow.device_id]
            for section, document in (("desired_state", shadow.desired), ("reported_state", shadow.reported)):
                if not equal(document, row[section]):
                    raise FindingError(f"shows another {section} than it stores: {str(document)[:200]}")
                owner = {"of": [shadow.tenant_id, shadow.device_id]}
                if shadow.device_id not in devices_of(attempt.tenant_id):  # just registered
                    owner = {}
                if point.section != section and not owner.items() <= document.items():
                    raise FindingError(f"shows what another holds: {document}")
            json.dumps(shadow.to_dict(), allow_nan=False).encode()
            for line in (shadow.explain(), shadow.etag, repr(shadow)):
                line.encode()

    def _rows(self, tenant_id: str, devices: set[Any]) -> dict[str, RowMapping]:
        found = self._connection.execute(_ROWS, {"tenant": tenant_id, "devices": [str.__str__(one) for one in devices]})
        return {row["device_id"]: row for row in found.mappings()}

    def _check_page(self, point: EntryPoint, attempt: Attempt, shadows: list[Shadow]) -> None:
        if point.call is ENTRY_POINTS["pending"].call:
            devices = set(devices_of(attempt.tenant_id)) - {NEIGHBOUR}
        else:
            devices = {DEVICE} if point.call is ENTRY_POINTS["refused"].call else {NEIGHBOUR}
        found = self._connection.execute(
            text("SELECT device_id FROM device_state WHERE tenant_id = :tenant AND device_id > :after ORDER BY 1"),
            {"tenant": attempt.tenant_id, "after": "" if attempt.device_id is None else attempt.device_id},
        )
        wanted = [device for device in found.scalars() if device in devices]
        if attempt.device_id is None and "" in devices:
            wanted.insert(0, "")
        if [shadow.device_id for shadow in shadows] != wanted:
            raise FindingError(f"gives the page {[shadow.device_id for shadow in shadows]}, and not {wanted}")

    def _changed(self) -> set[tuple[str, object]]:
        return {(tenant, device) for tenant, device in self._connection.execute(_CHANGED)}


def check_error(error: Exception, *, odd: bool = False) -> None:
    """What every error owes to whoever logs it, sends it to another process, or wants to mend the call.

    What an object that lies about itself brings about may also be an error of Python's.

    Raises:
        FindingError: It does not.
    """
    if isinstance(error, _NEVER) and not isinstance(error, IntegrityError):
        raise FindingError(f"raises {_shown(error)}") from error
    if odd or isinstance(error, IntegrityError):
        return
    message = str(error)
    message.encode()
    if isinstance(error, IotModelsError):
        if str(pickle.loads(pickle.dumps(error))) != message:
            raise FindingError(f"{type(error).__name__} is another one after pickling")
        return
    last = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if type(error) not in {TypeError, ValueError} or _PACKAGE not in last.parents:
        raise FindingError(f"an error that is not ours, from {last.name}: {_shown(error)}") from error
    if not _NAMES_THE_ARGUMENT.search(message):
        raise FindingError(f"does not name the argument: {_shown(error)}") from error


def _require_applicable(point: EntryPoint, attempt: Attempt) -> None:
    if point.kind == "orm":  # an object is loaded to be written, and a dict updated with a dict
        inside = point.call is ENTRY_POINTS["DeviceState.desired_state.update"].call
        if (
            _odd(attempt.device_id)
            or attempt.device_id not in devices_of(attempt.tenant_id)
            or (inside and not isinstance(attempt.document, dict))
        ):
            raise NotApplicableError
    if point.kind == "all":
        try:
            hash(attempt.device_id)
        except Exception as error:
            raise NotApplicableError from error
    if attempt.device_id == NEIGHBOUR and point.kind in {"all", "each"}:
        raise NotApplicableError


def _odd(device_id: object) -> bool:
    return type(device_id) is not str


def _shown(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except Exception:  # noqa: BLE001 - it says so itself
        return f"{type(error).__name__}, which cannot be shown"
