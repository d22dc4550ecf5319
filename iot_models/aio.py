"""`AsyncShadowService`: the methods of `ShadowService`, awaited. It has no logic of its own.

SQLAlchemy's `AsyncSession.run_sync` runs the synchronous method in a greenlet of the same task. While the driver waits
for PostgreSQL, the event loop runs other tasks. No thread is used.
"""

from __future__ import annotations

from functools import wraps
from itertools import islice
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from iot_models._core import validation
from iot_models._core.documents import DocumentLimits
from iot_models.service import ShadowService
from iot_models.shadow import STALE_AFTER

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
    from datetime import timedelta

    # Not at run time: it needs greenlet, and `import iot_models` must work without it.
    from sqlalchemy.ext.asyncio import AsyncSession

    from iot_models.shadow import Shadow

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _awaited(
    method: Callable[Concatenate[ShadowService, _P], _T],
) -> Callable[Concatenate[AsyncShadowService, _P], Coroutine[Any, Any, _T]]:
    """Return the method as a coroutine function of `AsyncShadowService`, with the same signature and docstring."""

    @wraps(method)
    async def call(self: AsyncShadowService, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await self._session.run_sync(lambda _: method(self._service, *args, **kwargs))

    call.__module__ = __name__
    call.__qualname__ = f"AsyncShadowService.{method.__name__}"
    return call


class AsyncShadowService:
    """`ShadowService` for asyncio: the same methods with the same contract, awaited, in the caller's `AsyncSession`.

    Use a session in one task at a time, as SQLAlchemy requires. After a cancelled call, roll the transaction back; the
    `async with` of the session does it. Make the session with `expire_on_commit=False`, so that its objects can be read
    after a commit.

    Args:
        session: The caller's session, in a transaction or in AUTOCOMMIT mode.
        tenant_id: The tenant. Devices of other tenants are neither read nor written.
        actor: Who writes, for the history. None: `session.info["iot_models.actor"]`, where the application keeps it.
        limits: How large and how deep a document may be.
        stale_after: How long a device may be silent before its shadow's `sync_status` is `stale`.
        bind_tenant: Whether to bind each transaction to the tenant first, for row level security: see
            `iot_models.tenancy`.
        history: Whether desired writes leave a row in the history.
        notify: Whether desired writes wake those who wait in `bus.watch_pending`.

    Raises:
        TypeError: If `tenant_id` or `actor` is not a string.
        ValueError: If `tenant_id` or `actor` is empty, or text that PostgreSQL cannot store.

    Example:
        >>> async with AsyncSession(engine, expire_on_commit=False) as session, session.begin():
        ...     shadow = await AsyncShadowService(session, "acme").patch_desired("thermostat-1", {"target_c": 21.5})
        ...     shadow.delta
        {'target_c': 21.5}
    """

    def __init__(  # noqa: PLR0913 - keywords
        self,
        session: AsyncSession,
        tenant_id: str,
        *,
        actor: str | None = None,
        limits: DocumentLimits = DocumentLimits(),  # noqa: B008 - frozen
        stale_after: timedelta = STALE_AFTER,
        bind_tenant: bool = False,
        history: bool = True,
        notify: bool = False,
    ) -> None:
        validation.require_session(session, "AsyncSession")
        self._session = session
        self._service = ShadowService(
            session.sync_session,
            tenant_id,
            actor=actor,
            limits=limits,
            stale_after=stale_after,
            bind_tenant=bind_tenant,
            history=history,
            notify=notify,
        )

    @property
    def tenant_id(self) -> str:
        """The tenant. Devices of other tenants are neither read nor written."""
        return self._service.tenant_id

    get = _awaited(ShadowService.get)
    get_many = _awaited(ShadowService.get_many)
    replace_desired = _awaited(ShadowService.replace_desired)
    patch_desired = _awaited(ShadowService.patch_desired)
    restore_desired = _awaited(ShadowService.restore_desired)
    replace_reported = _awaited(ShadowService.replace_reported)
    patch_reported = _awaited(ShadowService.patch_reported)
    refuse_desired = _awaited(ShadowService.refuse_desired)
    register = _awaited(ShadowService.register)
    register_many = _awaited(ShadowService.register_many)
    remove = _awaited(ShadowService.remove)
    replace_desired_many = _awaited(ShadowService.replace_desired_many)
    patch_desired_many = _awaited(ShadowService.patch_desired_many)
    replace_reported_many = _awaited(ShadowService.replace_reported_many)
    patch_reported_many = _awaited(ShadowService.patch_reported_many)
    pending = _awaited(ShadowService.pending)
    count_pending = _awaited(ShadowService.count_pending)
    drifted = _awaited(ShadowService.drifted)
    refused = _awaited(ShadowService.refused)
    count_refused = _awaited(ShadowService.count_refused)
    history = _awaited(ShadowService.history)
    desired_at = _awaited(ShadowService.desired_at)
    changes = _awaited(ShadowService.changes)
    prune_history = _awaited(ShadowService.prune_history)
    status_counts = _awaited(ShadowService.status_counts)

    def iter_pending(self, *, batch_size: int = 1000) -> AsyncGenerator[Shadow, None]:  # noqa: D102 - set below
        return self._in_turns(self._service.iter_pending(batch_size=batch_size), batch_size)

    iter_pending.__doc__ = ShadowService.iter_pending.__doc__

    async def _in_turns(self, shadows: Iterator[Shadow], size: int) -> AsyncGenerator[Shadow, None]:
        """Yield the shadows, and enter the greenlet once for as many of them as one statement reads."""
        while turn := await self._session.run_sync(lambda _: list(islice(shadows, size))):
            for shadow in turn:
                yield shadow
