"""Writes to many devices at once: what is sent for a batch, and what the answer means for each device of it.

Functions over an `Execute`, which is all they know of a session. A batch costs as many statements as one device does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iot_models import twin
from iot_models._core import statements
from iot_models._core.documents import decode_document, encode_document, storable_text
from iot_models._core.retries import ATTEMPTS, suppressed_batch
from iot_models.errors import BatchRejected, DeviceNotFound, IotModelsError, VersionConflict
from iot_models.reports import CheckedReport, ReportOutcome, ReportStatus, Versions, fold

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
    from typing import Any, TypeAlias

    from sqlalchemy import Executable, Result, Row

    from iot_models._core.documents import DocumentLimits
    from iot_models.reports import Accepted

    _Row: TypeAlias = Row[*tuple[Any, ...]]
    Execute: TypeAlias = Callable[[Executable, Mapping[str, object]], Result[*tuple[Any, ...]]]
    _Errors: TypeAlias = dict[str, IotModelsError]


def replace_desired(
    execute: Execute,
    tenant_id: str,
    documents: Mapping[str, Mapping[str, object]],
    expected: Mapping[str, int],
    limits: DocumentLimits,
) -> Sequence[_Row]:
    """Replace the desired documents of all these devices, or of none; returns the rows as they are then, unordered.

    One statement; a second asks what stood against it where it wrote nothing.

    Raises:
        BatchRejected: See `ShadowService.replace_desired_many`.
        RuntimeError: If nothing explains why rows are not written.
    """

    def encode(device_id: str) -> str:
        if not storable_text(device_id):  # no row can carry it
            raise DeviceNotFound(tenant_id, device_id)
        return encode_document(documents[device_id], limits)

    texts, errors = _each(documents, encode)
    for _ in range(ATTEMPTS):
        rows = [] if errors else _write_desired(execute, tenant_id, texts, expected)
        if rows:
            return rows
        # Missed. Unless the device or version appeared since, this raises; if it did appear, the write holds now.
        errors |= _standing_against(execute, tenant_id, texts, expected)
        if errors:
            raise BatchRejected({device_id: errors[device_id] for device_id in documents if device_id in errors})
    raise suppressed_batch(texts)


def patch_desired(
    execute: Execute, tenant_id: str, device_ids: Collection[str], patch: Mapping[str, object], limits: DocumentLimits
) -> Sequence[_Row]:
    """Merge a patch into the desired documents of all these devices, or of none; returns the rows as `replace_desired`.

    Two statements: reads and locks the rows, merges, writes.

    Raises:
        BatchRejected: See `ShadowService.patch_desired_many`.
        RuntimeError: If nothing explains why rows are not written.
    """
    binds = {"tenant": tenant_id, "devices": list(filter(storable_text, device_ids))}
    for _ in range(ATTEMPTS):
        seen = {row.device_id: row for row in execute(statements.locked_desired_documents(), binds)}

        def merge(device_id: str, seen: Mapping[str, _Row] = seen) -> str:
            if device_id not in seen:
                raise DeviceNotFound(tenant_id, device_id)
            return encode_document(twin.merge_patch(decode_document(seen[device_id].document), patch), limits)

        texts, errors = _each(device_ids, merge)
        if errors:
            raise BatchRejected(errors)
        expected = {device_id: row.desired_version for device_id, row in seen.items()}
        if rows := _write_desired(execute, tenant_id, texts, expected):
            return rows
        # Only in AUTOCOMMIT mode, where the locks ended with their statement: somebody wrote since, merge with that.
    raise suppressed_batch(device_ids)


def replace_reported(
    execute: Execute, tenant_id: str, reports: Sequence[CheckedReport]
) -> tuple[list[ReportOutcome], set[str]]:
    """Apply reports as if one after another; returns an outcome for each, in order, and the devices written.

    One guarded statement; a second asks what became of those that it did not write. Where a report is invalid or a
    device reports twice, two statements instead: reads and locks the rows, decides, writes.

    Raises:
        RuntimeError: If nothing explains why rows are not written.
    """
    accepted = _write_guarded(execute, tenant_id, reports)
    written = set(accepted)
    outcomes: dict[int, ReportOutcome] = {}
    left: dict[int, CheckedReport] = {}
    for place, report in enumerate(reports):
        if report.device_id in written:
            outcomes[place] = ReportOutcome(report.device_id, ReportStatus.ACCEPTED, *accepted[report.device_id])
        else:
            left[place] = report
    for _ in range(ATTEMPTS):
        if not left:
            break
        decided, to_write = fold(left.values(), _versions(execute, tenant_id, left.values()))
        outcomes.update(zip(left, decided, strict=True))
        written |= _write_decided(execute, tenant_id, to_write)
        # Missed only in AUTOCOMMIT mode, where a version changed since: these start anew, no other depends on them.
        missed = to_write.keys() - written
        left = {place: report for place, report in left.items() if report.device_id in missed}
    if left:
        raise suppressed_batch(list(dict.fromkeys(str(report.device_id) for report in left.values())))
    return [outcomes[place] for place in range(len(reports))], written


def _each(device_ids: Iterable[str], encode: Callable[[str], str]) -> tuple[dict[str, str], _Errors]:
    """The documents to write as JSON text, and the errors of those devices that have none."""
    texts: dict[str, str] = {}
    errors: _Errors = {}
    for device_id in device_ids:
        try:
            texts[device_id] = encode(device_id)
        except IotModelsError as error:
            errors[device_id] = error.with_traceback(None)  # it would keep every frame, and so the whole batch
    return texts, errors


def _write_desired(
    execute: Execute, tenant_id: str, texts: Mapping[str, str], expected: Mapping[str, int]
) -> Sequence[_Row]:
    rows = execute(
        statements.write_desired_many(),
        {
            "tenant": tenant_id,
            "devices": list(texts),
            "documents": list(texts.values()),
            "expected": [expected.get(device_id) for device_id in texts],
        },
    ).all()
    if rows and len(rows) < len(texts):  # all were there, and locked
        written = {row.device_id for row in rows}
        raise suppressed_batch([device_id for device_id in texts if device_id not in written])
    return rows


def _standing_against(
    execute: Execute, tenant_id: str, device_ids: Collection[str], expected: Mapping[str, int]
) -> _Errors:
    """Why these devices cannot be written, as far as it is in the database."""
    if not device_ids:
        return {}
    binds = {"tenant": tenant_id, "devices": list(device_ids)}
    actual = {row.device_id: row.desired_version for row in execute(statements.versions_of_many(), binds)}
    errors: _Errors = {}
    for device_id in device_ids:
        if device_id not in actual:
            errors[device_id] = DeviceNotFound(tenant_id, device_id)
        elif expected.get(device_id, actual[device_id]) != actual[device_id]:
            errors[device_id] = VersionConflict(device_id, expected[device_id], actual[device_id])
    return errors


def _versions(execute: Execute, tenant_id: str, reports: Iterable[CheckedReport]) -> dict[str, Versions]:
    """How the devices stand that are reported on, their rows locked; absent ones are left out."""
    devices = list({report.device_id for report in reports if report.device_id is not None})
    if not devices:
        return {}
    rows = execute(statements.locked_versions(), {"tenant": tenant_id, "devices": devices})
    return {row.device_id: Versions(row.desired_version, row.reported_version) for row in rows}


def _write_guarded(execute: Execute, tenant_id: str, reports: Sequence[CheckedReport]) -> dict[str, Versions]:
    """Write whose acknowledged version is neither late nor unknown; returns who was written.

    Nobody where a report is invalid or a device reports twice. What has to be looked at afterwards is then locked by
    this statement already, in its order.
    """
    writable = {report.device_id: report for report in reports if report.document is not None}
    if len(writable) < len(reports) or None in writable or not reports:
        return {}
    binds = {
        "tenant": tenant_id,
        "devices": list(writable),
        "documents": [report.document for report in reports],
        "acked": [report.acked_version for report in reports],
    }
    rows = execute(statements.write_reported_many(decided=False), binds)
    return {row.device_id: Versions(row.desired_version, row.reported_version) for row in rows}


def _write_decided(execute: Execute, tenant_id: str, accepted: Mapping[str, Accepted]) -> set[str]:
    """Write where the versions are still those seen; returns who was written."""
    if not accepted:
        return set()
    binds = {
        "tenant": tenant_id,
        "devices": list(accepted),
        "documents": [write.document for write in accepted.values()],
        "acked": [write.reported_version for write in accepted.values()],
        "desired": [write.seen.desired for write in accepted.values()],
        "reported": [write.seen.reported for write in accepted.values()],
    }
    return set(execute(statements.write_reported_many(decided=True), binds).scalars())
