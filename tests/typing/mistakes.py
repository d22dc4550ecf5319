"""Mistakes that a user's type checker has to catch: each ignore is used, or the check fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iot_models import Shadow, ShadowService, compute_delta

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


def mistakes(session: Session, shadow: Shadow) -> None:
    service = ShadowService(session, "acme")
    service.replace_desired("d", [1])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    service.replace_desired("d", {}, 7)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    service.get(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    shadow.desired_version = 8  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    compute_delta("a", {})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
