"""Device shadows (device twins) on PostgreSQL: models, `ShadowService`, twin helpers, errors.

Migrations are Alembic's: `alembic upgrade head`.
"""

from iot_models._core import version_guard as _version_guard  # noqa: F401 - sets up the rule of desired_version
from iot_models._core.documents import DocumentLimits
from iot_models.aio import AsyncShadowService
from iot_models.errors import (
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
from iot_models.history import ChangePage, DesiredVersion
from iot_models.models import Base, DeviceState, ShadowHistory
from iot_models.reports import Report, ReportOutcome, ReportStatus
from iot_models.service import ShadowService
from iot_models.shadow import Shadow
from iot_models.twin import (
    STALE_THRESHOLD_MINUTES,
    Comparison,
    SyncStatus,
    compare,
    compute_delta,
    compute_nested_delta,
    create_merge_patch,
    merge_patch,
    sync_status,
)

__all__ = [  # noqa: RUF022 - the order of sorted()
    "AsyncShadowService",
    "Base",
    "BatchRejected",
    "ChangePage",
    "Comparison",
    "CursorExpired",
    "DesiredVersion",
    "DeviceNotFound",
    "DeviceState",
    "DocumentLimits",
    "DocumentTooLarge",
    "InvalidCursor",
    "InvalidDocument",
    "InvalidVersion",
    "IotModelsError",
    "LateReport",
    "Report",
    "ReportOutcome",
    "ReportStatus",
    "RequestReused",
    "STALE_THRESHOLD_MINUTES",
    "Shadow",
    "ShadowHistory",
    "ShadowService",
    "SyncStatus",
    "UnknownVersion",
    "UnreadableShadow",
    "VersionConflict",
    "VersionNotKept",
    "compare",
    "compute_delta",
    "compute_nested_delta",
    "create_merge_patch",
    "merge_patch",
    "sync_status",
]
