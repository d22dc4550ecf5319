"""Every error keeps its values, pickles, maps to HTTP and says what to do next."""

from __future__ import annotations

import copy
import pickle

import pytest

import iot_models
from iot_models import (
    BatchRejected,
    CursorExpired,
    DeviceNotFound,
    DocumentTooLarge,
    InvalidCursor,
    InvalidDocument,
    InvalidVersion,
    IotModelsError,
    LateReport,
    RequestReused,
    UnknownVersion,
    UnreadableShadow,
    VersionConflict,
    VersionNotKept,
)

ERRORS: dict[type[IotModelsError], tuple[IotModelsError, int, dict[str, object], str]] = {
    DeviceNotFound: (DeviceNotFound("acme", "d1"), 404, {"tenant_id": "acme", "device_id": "d1"}, "register it first"),
    VersionConflict: (VersionConflict("d1", 7, 8), 409, {"device_id": "d1", "expected": 7, "actual": 8}, "read the shadow again"),
    LateReport: (LateReport("d1", 3, 5), 409, {"device_id": "d1", "acked": 3, "current": 5}, "drop it"),
    UnknownVersion: (UnknownVersion("d1", 9, 5), 400, {"device_id": "d1", "acked": 9, "desired": 5}, "fetch its shadow again"),
    UnreadableShadow: (UnreadableShadow("acme", "d1", "is null"), 500, {"tenant_id": "acme", "device_id": "d1", "reason": "is null"}, "replace that document"),
    VersionNotKept: (VersionNotKept("d1", 9, 2, 7), 404, {"device_id": "d1", "version": 9, "oldest": 2, "newest": 7}, "versions from 2 to 7"),
    RequestReused: (RequestReused("d1", "r-1", 7), 409, {"device_id": "d1", "request_id": "r-1", "version": 7}, "an id of its own"),
    CursorExpired: (CursorExpired("acme"), 410, {"tenant_id": "acme"}, "from the start (after=None)"),
    InvalidCursor: (InvalidCursor("is none"), 400, {"reason": "is none"}, "pass ChangePage.cursor as it is"),
    InvalidVersion: (InvalidVersion("acked_version", -1), 400, {"name": "acked_version", "value": -1}, "an integer from 0"),
    InvalidDocument: (InvalidDocument("/a", "nope"), 400, {"path": "/a", "reason": "nope"}, "nope"),
    DocumentTooLarge: (DocumentTooLarge("", "too much"), 413, {"path": "", "reason": "too much"}, "at its root"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_keeps_its_values_and_maps_to_http_and_says_what_to_do(kind: type[IotModelsError]) -> None:
    error, http_status, values, way_out = ERRORS[kind]

    assert error.http_status == http_status
    assert {name: getattr(error, name) for name in values} == values
    assert way_out in str(error)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_survives_pickling_and_copying(kind: type[IotModelsError]) -> None:
    error, _, values, _ = ERRORS[kind]

    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is kind
        assert str(twin) == str(error)
        assert {name: getattr(twin, name) for name in values} == values


def test_every_exported_error_is_covered_here_and_stands_under_the_one_base() -> None:
    exported = {
        value
        for value in vars(iot_models).values()
        if isinstance(value, type) and issubclass(value, Exception) and value is not IotModelsError
    }

    assert exported == {*ERRORS, BatchRejected}
    assert all(issubclass(kind, IotModelsError) for kind in exported)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (DeviceNotFound, LookupError),
        (VersionNotKept, LookupError),
        (UnknownVersion, ValueError),
        (InvalidVersion, ValueError),
        (InvalidDocument, ValueError),
        (DocumentTooLarge, InvalidDocument),
    ],
)
def test_errors_that_python_has_a_word_for_are_that_too(kind: type, builtin: type) -> None:
    assert issubclass(kind, builtin)


def test_a_rejected_batch_lists_each_device_and_survives_pickling() -> None:
    errors = {f"d{n}": VersionConflict(f"d{n}", n, n + 1) for n in range(7)}
    rejected = BatchRejected(errors)

    restored = pickle.loads(pickle.dumps(rejected))

    assert rejected.http_status == 409
    assert {device: error.args for device, error in restored.errors.items()} == {d: e.args for d, e in errors.items()}
    assert "7 of the batch" in str(rejected)
    assert "'d4'" in str(rejected)
    assert "'d5'" not in str(rejected)
    assert "and 2 more" in str(rejected)


def test_a_rejected_batch_of_one_counts_no_more() -> None:
    assert "more" not in str(BatchRejected({"d1": DeviceNotFound("acme", "d1")}))


def test_a_rejected_batch_does_not_change_with_the_mapping_it_was_made_from() -> None:
    errors: dict[str, IotModelsError] = {"d1": DeviceNotFound("acme", "d1")}
    rejected = BatchRejected(errors)

    errors.clear()

    assert list(rejected.errors) == ["d1"]
