"""Mistakes that a user's type checker has to catch: each ignore is used, or the check fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iot_models import AsyncShadowService, Shadow, ShadowService, compute_delta
from iot_models.engine import create_engine

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session


def mistakes(session: Session, shadow: Shadow) -> None:
    service = ShadowService(session, "acme")
    service.replace_desired("d", [1])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    service.replace_desired("d", {}, 7)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    service.get(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    shadow.desired_version = 8  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    compute_delta("a", {})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def asynchronous_mistakes(session: AsyncSession, synchronous: Session) -> None:
    AsyncShadowService(synchronous, "acme")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    ShadowService(session, "acme")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    service = AsyncShadowService(session, "acme")
    service.get("d")  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    await service.get(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await service.get("d", "e")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await service.patch_desired("d", [1])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await service.replace_desired("d", {}, 7)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await service.replace_desired("d", {}, version=7)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    service.tenant_id = "other"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    for _ in service.iter_pending():  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        pass
    create_engine(statement_timeout=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
