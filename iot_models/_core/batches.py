"""Writes to many devices at once: what is sent for a batch, and what the answer means for each device of it.

The functions take an `Execute`, which is all that they know of a session. A batch costs as many statements as one
device does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iot_models import twin
from iot_models._core import desired_statements, statements
from iot_models._core.documents import decode_document, encode_document, json_object
from iot_models._core.report_rules import CheckedReport, Stored, Versions, fold
from iot_models._core.retries import devices_not_written, until_written
from iot_models._core.validation import findable, require_findable
from iot_models.errors import BatchRejected, DeviceNotFound, IotModelsError, VersionConflict
from iot_models.reports import ReportOutcome, ReportStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
    from typing import Any, TypeAlias

    from sqlalchemy import Executable, Result, Row

    from iot_models._core.documents import DocumentLimits
    from iot_models._core.report_rules import Accepted

    _Row: TypeAlias = Row[*tuple[Any, ...]]
    # For the history: the binds `author` and `why`. None where it is not to record the writes.
    Author: TypeAlias = Mapping[str, str | None]
    Execute: TypeAlias = Callable[[Executable, Mapping[str, object]], Result[*tuple[Any, ...]]]
    _Errors: TypeAlias = dict[str, IotModelsError]


def replace_desired(
    execute: Execute,
    tenant_id: str,
    documents: Mapping[str, Mapping[str, object]],
    expected: Mapping[str, int],
    limits: DocumentLimits,
    author: Author | None,
) -> Sequence[_Row]:
    """Replace the desired documents of all these devices, or of none; returns the new rows, unordered.

    One statement; where it wrote nothing, a second one asks why.

    Raises:
        BatchRejected: See `ShadowService.replace_desired_many`.
        RuntimeError: If nothing explains why rows are not written.
    """

    def encode(device_id: str) -> str:
        require_findable(tenant_id, device_id)
        return encode_document(documents[device_id], limits)

    texts, errors = _each(documents, encode)

    def attempt() -> Sequence[_Row] | None:
        rows = [] if errors else _write_desired(execute, tenant_id, texts, expected, author)
        if not rows:
            # No error: the device or version appeared since the write, which the next attempt will find.
            found = errors | _refusals(execute, tenant_id, texts, expected)
            if found:
                raise BatchRejected({device_id: found[device_id] for device_id in documents if device_id in found})
        return rows or None

    return until_written(attempt, lambda: devices_not_written(texts))


def patch_desired(
    execute: Execute,
    tenant_id: str,
    device_ids: Collection[str],
    patch: Mapping[str, object],
    limits: DocumentLimits,
    author: Author | None,
) -> Sequence[_Row]:
    """Merge a patch into the desired documents of all these devices, or of none; returns the new rows, unordered.

    Two statements: the first reads and locks the rows, the second writes the merged documents.

    Raises:
        BatchRejected: See `ShadowService.patch_desired_many`.
        RuntimeError: If nothing explains why rows are not written.
    """
    binds = {"tenant": tenant_id, "devices": findable(device_ids)}

    def attempt() -> Sequence[_Row] | None:
        seen = {row.device_id: row for row in execute(statements.locked_devices("desired_state"), binds)}

        def merge(device_id: str) -> str:
            if device_id not in seen:
                raise DeviceNotFound(tenant_id, device_id)
            stored = decode_document(seen[device_id].desired_state, tenant_id, device_id)
            return encode_document(twin.merge_patch(stored, patch), limits)

        texts, errors = _each(device_ids, merge)
        if errors:
            raise BatchRejected(errors)
        expected = {device_id: row.desired_version for device_id, row in seen.items()}
        # Nothing is written only in AUTOCOMMIT mode, where the locks end with their statement, and only if another
        # transaction wrote since: the next attempt merges with what that wrote.
        return _write_desired(execute, tenant_id, texts, expected, author) or None

    return until_written(attempt, lambda: devices_not_written(device_ids))


def report(
    execute: Execute, tenant_id: str, reports: Sequence[CheckedReport], limits: DocumentLimits
) -> tuple[list[ReportOutcome], set[str]]:
    """Apply reports as if one after another; returns an outcome for each, in order, and the devices written.

    One guarded statement writes those that are accepted. Where reports are left, one more statement reads and locks
    their devices, the reports are decided on here, and what they leave behind is written by a last one. If a report is
    a patch or invalid, or a device reports twice, the first statement is left out.

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

    def attempt() -> bool | None:
        nonlocal left
        decided, to_write = fold(left.values(), _stored(execute, tenant_id, left.values()), tenant_id, limits)
        outcomes.update(zip(left, decided, strict=True))
        written.update(_write_decided(execute, tenant_id, to_write))
        # A device is not written only in AUTOCOMMIT mode, where it changed since it was read: its reports start anew,
        # and no other report depends on them.
        not_written = to_write.keys() - written
        left = {place: report for place, report in left.items() if report.device_id in not_written}
        return True if not left else None

    if left:
        until_written(attempt, lambda: devices_not_written([str(report.device_id) for report in left.values()]))
    return [outcomes[place] for place in range(len(reports))], written


def _each(device_ids: Iterable[str], encode: Callable[[str], str]) -> tuple[dict[str, str], _Errors]:
    """The documents to write as JSON text, and the errors of the devices that have none."""
    texts: dict[str, str] = {}
    errors: _Errors = {}
    for device_id in device_ids:
        try:
            texts[device_id] = encode(device_id)
        except IotModelsError as error:
            errors[device_id] = error.with_traceback(None)  # it would keep every frame, and so the whole batch
    return texts, errors


def _write_desired(
    execute: Execute, tenant_id: str, texts: Mapping[str, str], expected: Mapping[str, int], author: Author | None
) -> Sequence[_Row]:
    rows = execute(
        desired_statements.write_desired_many(recorded=author is not None),
        {
            **(author or {}),
            "tenant": tenant_id,
            "devices": list(texts),
            "documents": json_object(texts),
            "expected": json_object(
                {device_id: str(expected[device_id]) for device_id in texts if device_id in expected}
            ),
        },
    ).all()
    if rows and len(rows) < len(texts):  # all of them exist and were locked
        written = {row.device_id for row in rows}
        raise devices_not_written([device_id for device_id in texts if device_id not in written])
    return rows


def _refusals(execute: Execute, tenant_id: str, device_ids: Collection[str], expected: Mapping[str, int]) -> _Errors:
    """Why these devices cannot be written, as far as the database knows."""
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


def _stored(execute: Execute, tenant_id: str, reports: Collection[CheckedReport]) -> dict[str, Stored]:
    """What the reports need of their devices, whose rows are locked; devices that do not exist are left out."""
    devices = list({report.device_id for report in reports if report.device_id is not None})
    if not devices:
        return {}
    sections: list[statements.Section] = []
    if any(report.if_converged for report in reports):
        sections.append("desired_state")
    if any(report.patch is not None for report in reports):
        sections.append("reported_state")
    rows = execute(statements.locked_devices(*sections), {"tenant": tenant_id, "devices": devices})
    return {
        row.device_id: Stored(
            Versions(row.desired_version, row.reported_version),
            row.desired_state if "desired_state" in sections else None,
            row.reported_state if "reported_state" in sections else None,
        )
        for row in rows
    }


def _write_guarded(execute: Execute, tenant_id: str, reports: Sequence[CheckedReport]) -> dict[str, Versions]:
    """Write the reports whose acknowledged version is neither late nor unknown; returns the devices written.

    Nothing is sent where a report is a patch or invalid, or a device reports twice. Otherwise the statement locks all
    rows in order, so that what has to be read afterwards is locked already.
    """
    writable = {report.device_id: report for report in reports if report.document is not None}
    if len(writable) < len(reports) or None in writable or not reports:
        return {}
    binds: dict[str, object] = {
        "tenant": tenant_id,
        "devices": list(writable),
        "documents": [report.document for report in reports],
        "acked": [report.acked_version for report in reports],
    }
    if if_converged := any(report.if_converged for report in reports):
        binds["if_converged"] = [report.if_converged for report in reports]
    if refuses := _refusal_binds(reports):
        binds |= refuses
    rows = execute(statements.write_reported_many(if_converged=if_converged, refuses=bool(refuses)), binds)
    return {row.device_id: Versions(row.desired_version, row.reported_version) for row in rows}


def _write_decided(execute: Execute, tenant_id: str, accepted: Mapping[str, Accepted]) -> set[str]:
    """Write where the devices are still as they were seen; returns the devices written."""
    if not accepted:
        return set()
    binds: dict[str, object] = {
        "tenant": tenant_id,
        "devices": list(accepted),
        "documents": [write.document for write in accepted.values()],
        "acked": [write.reported_version for write in accepted.values()],
        "desired": [write.seen.versions.desired for write in accepted.values()],
        "reported": [write.seen.versions.reported for write in accepted.values()],
    }
    if unchanged := any(write.seen.reported is not None for write in accepted.values()):
        binds["seen"] = [write.seen.reported for write in accepted.values()]
    if refuses := _refusal_binds(accepted.values()):
        binds |= refuses
    statement = statements.write_reported_many(decided=True, refuses=bool(refuses), unchanged=unchanged)
    return set(execute(statement, binds).scalars())


def _refusal_binds(reports: Collection[CheckedReport] | Collection[Accepted]) -> dict[str, object]:
    """The arrays of the refusals; empty if no report of the batch refuses, so that the statement does without them."""
    if all(report.refused_version is None for report in reports):
        return {}
    return {
        "refused": [report.refused_version for report in reports],
        "refusals": [report.refusal for report in reports],
    }
