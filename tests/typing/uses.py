"""What a user's type checker sees; checked by pyright and mypy, never run."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypedDict, assert_type

from iot_models import (
    BatchRejected,
    Comparison,
    DeviceState,
    DocumentLimits,
    InvalidDocument,
    IotModelsError,
    Shadow,
    ShadowService,
    SyncStatus,
    VersionConflict,
    compare,
    compute_delta,
    compute_nested_delta,
    merge_patch,
    sync_status,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.orm import Session


class Thermostat(TypedDict):
    """Users' own document types are documents."""

    target_c: float


def service(session: Session, document: Thermostat) -> None:
    shadows = ShadowService(session, "acme", limits=DocumentLimits(max_bytes=1024), stale_after=timedelta(hours=1))
    assert_type(shadows.get("d"), Shadow)
    assert_type(shadows.get_many(["d"]), dict[str, Shadow])
    assert_type(shadows.replace_desired("d", document, expected_version=1), Shadow)
    assert_type(shadows.patch_desired("d", {"a": None}), Shadow)
    assert_type(shadows.replace_reported("d", {"a": [1]}, acked_version=1), Shadow)
    assert_type(shadows.patch_reported("d", {"a": {"b": 1.5}}), Shadow)
    assert_type(shadows.pending(limit=10, after="d"), list[Shadow])
    assert_type(shadows.count_pending(), int)


def shadow(one: Shadow) -> None:
    assert_type(one.delta, dict[str, Any])
    assert_type(one.sync_status(), SyncStatus)
    assert_type(one.etag, str)
    assert_type(one.explain(), str)
    assert_type(one.last_seen_at, datetime | None)


def helpers(document: dict[str, int]) -> None:
    assert_type(compute_delta(document, {}), dict[str, Any])
    assert_type(compute_nested_delta(document, {}), dict[str, Any])
    assert_type(merge_patch(document, {"a": None}), dict[str, Any])
    assert_type(compare(document, {}), Comparison)
    assert_type(sync_status(1, 1, None), SyncStatus)


def model(device: DeviceState) -> None:
    assert_type(device.desired_state, dict[str, Any])
    assert_type(device.shadow_updated_at, datetime | None)


def errors(conflict: VersionConflict, invalid: InvalidDocument, rejected: BatchRejected, error: IotModelsError) -> None:
    assert_type(conflict.actual, int)
    assert_type(invalid.path, str)
    assert_type(error.http_status, int)
    each: Mapping[str, IotModelsError] = rejected.errors
    assert_type(each["d"], IotModelsError)
