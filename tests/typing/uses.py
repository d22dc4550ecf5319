"""What a user's type checker sees; checked by pyright and mypy, never run."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypedDict, assert_type

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from iot_models import (
    AsyncShadowService,
    BatchRejected,
    ChangePage,
    Comparison,
    DesiredVersion,
    DeviceState,
    DocumentLimits,
    InvalidDocument,
    IotModelsError,
    Report,
    ReportOutcome,
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
from iot_models.engine import create_async_engine, create_engine

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.ext.asyncio import AsyncSession
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
    assert_type(shadows.iter_pending(batch_size=10), Iterator[Shadow])
    recorded = ShadowService(session, "acme", actor="anna", history=True)
    assert_type(recorded.history("d", limit=10, before=7), list[DesiredVersion])
    assert_type(recorded.desired_at("d", 7).desired, dict[str, Any] | None)
    assert_type(recorded.restore_desired("d", 7, reason="why", request_id="r"), Shadow)
    assert_type(recorded.changes(after=None, limit=10), ChangePage)
    assert_type(recorded.changes().changes, list[DesiredVersion])
    assert_type(recorded.prune_history(older_than=timedelta(days=90), keep=5), int)
    assert_type(recorded.refuse_desired("d", 7, "no").refusal, str | None)
    assert_type(recorded.register_many({"d": "s"}), dict[str, Shadow])


async def async_service(session: AsyncSession, document: Thermostat, reports: list[Report]) -> None:
    shadows = AsyncShadowService(session, "acme", limits=DocumentLimits(max_depth=3), stale_after=timedelta(hours=1))
    assert_type(shadows.tenant_id, str)
    assert_type(await shadows.get("d"), Shadow)
    assert_type(await shadows.get_many(device_ids=["d"]), dict[str, Shadow])
    assert_type(await shadows.replace_desired("d", document, expected_version=1), Shadow)
    assert_type(await shadows.patch_desired("d", patch={"a": None}), Shadow)
    assert_type(await shadows.replace_reported("d", {"a": [1]}, acked_version=1), Shadow)
    assert_type(await shadows.patch_reported("d", {"a": {"b": 1.5}}), Shadow)
    assert_type(await shadows.replace_desired_many({"d": document}, expected_versions={"d": 1}), dict[str, Shadow])
    assert_type(await shadows.patch_desired_many(["d"], {"a": 1}), dict[str, Shadow])
    assert_type(await shadows.replace_reported_many(reports), list[ReportOutcome])
    assert_type(await shadows.pending(limit=10, after="d"), list[Shadow])
    assert_type(await shadows.drifted(limit=10, after="d"), list[Shadow])
    assert_type(await shadows.count_pending(), int)
    assert_type(await shadows.status_counts(now=None), dict[SyncStatus, int])
    assert_type(await shadows.history("d"), list[DesiredVersion])
    assert_type(await shadows.changes(), ChangePage)
    assert_type(await shadows.register("d", "s"), Shadow)
    assert_type(await shadows.count_refused(), int)
    assert_type(shadows.iter_pending(batch_size=10), AsyncGenerator[Shadow, None])
    async for one in shadows.iter_pending():
        assert_type(one, Shadow)


def engines() -> None:
    assert_type(create_engine(), Engine)
    assert_type(create_engine("postgresql://db", statement_timeout=None, isolation_level="AUTOCOMMIT"), Engine)
    assert_type(create_async_engine(application_name="fleet-api", pool_size=5), AsyncEngine)


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
