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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import bindparam, event, insert, text
from sqlalchemy.exc import DBAPIError, IntegrityError

import iot_models
from iot_models import (
    BatchRejected,
    DeviceState,
    InvalidVersion,
    IotModelsError,
    ReportOutcome,
    ReportStatus,
    Shadow,
)
from tests.fuzz.judge.entry_points import ENTRY_POINTS, NEIGHBOUR, Attempt, EntryPoint
from tests.fuzz.judge.expected import (
    DESIRED_VERSION,
    DEVICE,
    TENANT,
    TENANTS,
    devices_of,
    expected,
    expected_of_document,
    held,
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
_NAMES_THE_ARGUMENT: Final = re.compile(r"\b(device_ids?|acked_version|expected_versions?|after|documents)\b")
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
""")
_ROWS: Final = text("SELECT * FROM device_state WHERE tenant_id = :tenant AND device_id IN :devices").bindparams(
    bindparam("devices", expanding=True)
)
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
                **{section: held(section, tenant, device) for section in _HOLDS},
            }
            for tenant in TENANTS
            for device in devices_of(tenant)
        ]
        # Asked beside the session: after a flush that failed it would answer nothing before a rollback.
        self._connection = session.connection()
        self._connection.execute(insert(typing.cast("Table", DeviceState.__table__)), rows)
        self._connection.execute(text("CREATE TEMPORARY TABLE fuzz_was ON COMMIT DROP AS TABLE device_state"))
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
        self._check_rows(point, attempt, accepted=accepted)
        if point.kind == "after":
            self._check_page(point, attempt, shadows)
        return "stored" if point.section and accepted else "refused" if not accepted else "read"

    def _check_rows(self, point: EntryPoint, attempt: Attempt, *, accepted: bool) -> None:
        written: set[tuple[str, object]] = set()
        if point.section:
            if accepted:
                written.add((attempt.tenant_id, attempt.device_id))
            if point.kind in {"all", "each"}:
                written.add((attempt.tenant_id, NEIGHBOUR))
        changed = self._changed()
        if {tenant for tenant, _ in changed} - {attempt.tenant_id}:
            raise FindingError(f"wrote to another tenant: {sorted(changed)}")
        if not _odd(attempt.device_id) and changed != written:
            raise FindingError(f"wrote {sorted(changed)}, and not {sorted(written)}")
        if point.section and accepted and not _odd(attempt.device_id):
            self._check_document(point, attempt)

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
        document = dict(attempt.document) if isinstance(attempt.document, Mapping) else attempt.document
        if point.merges:
            document = merge_patch(held(section, attempt.tenant_id, attempt.device_id), document)
        binds = {
            "tenant": attempt.tenant_id,
            "device": attempt.device_id,
            "document": json.dumps(document, allow_nan=False),
        }
        if self._connection.execute(_HOLDS[section], binds).scalar_one() is not True:
            raise FindingError(f"stores another document: {str(row[section])[:200]}")

    def _versions_after(self, point: EntryPoint, attempt: Attempt) -> tuple[int, int]:
        desired = DESIRED_VERSION + (point.section == "desired_state")
        was = reported_version_of(attempt.device_id)
        acknowledges = point.section == "reported_state" and point.kind != "orm"
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
                if point.section != section and not owner.items() <= document.items():
                    raise FindingError(f"shows what another holds: {document}")
            json.dumps(shadow.to_dict(), allow_nan=False).encode()
            for line in (shadow.explain(), shadow.etag, repr(shadow)):
                line.encode()

    def _rows(self, tenant_id: str, devices: set[Any]) -> dict[str, RowMapping]:
        found = self._connection.execute(_ROWS, {"tenant": tenant_id, "devices": [str.__str__(one) for one in devices]})
        return {row["device_id"]: row for row in found.mappings()}

    def _check_page(self, point: EntryPoint, attempt: Attempt, shadows: list[Shadow]) -> None:
        devices = (
            set(devices_of(attempt.tenant_id)) - {NEIGHBOUR}
            if point.call is ENTRY_POINTS["pending"].call
            else {NEIGHBOUR}
        )
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
