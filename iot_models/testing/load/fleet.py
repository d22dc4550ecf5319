"""The devices of the load generator: made before it runs, and deleted afterwards with their history."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from sqlalchemy import (
    ARRAY,
    Integer,
    String,
    Text,
    any_,
    cast,
    delete,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    text,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from iot_models import tenancy
from iot_models._core.database_errors import explained
from iot_models.models import HISTORY, TABLE
from iot_models.testing.load.plan import device_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncEngine

    from iot_models.testing.load.output import Progress
    from iot_models.testing.load.plan import Plan

_T = TypeVar("_T")

_PAGE: Final = 2000
# Seconds. A server that restarts is away for some time, and what was made there has to go.
_RETRIES: Final = (1, 2, 4, 8)


class _Page(NamedTuple):
    """Devices of one tenant that are, or may be, in the database."""

    tenant_id: str
    devices: range


class FleetError(Exception):
    """The devices cannot be made."""


class Fleet:
    """The devices of a plan, in tenants of their own."""

    def __init__(self, engine: AsyncEngine, plan: Plan) -> None:
        self._engine = engine
        self._plan = plan
        self._made: list[_Page] = []

    @property
    def left(self) -> int:
        """How many devices are, or may be, in the database."""
        return sum(len(page.devices) for page in self._made)

    @property
    def statements(self) -> str:
        """What deletes all of it by hand."""
        tenant_ids = ", ".join(f"'{tenant_id}'" for tenant_id in self._plan.tenant_ids)
        return " ".join(f"DELETE FROM {table} WHERE tenant_id IN ({tenant_ids});" for table in (TABLE, HISTORY))  # noqa: S608 - our own names

    async def fill(self, progress: Progress) -> None:
        """Make the devices, each with a document that it has acknowledged.

        Raises:
            FleetError: If a tenant has rows already; nothing is made.
            sqlalchemy.exc.DBAPIError: What the database says. What was made by then is for `empty`.
        """
        for tenant_id in self._plan.tenant_ids:
            if await self._of(tenant_id, _has_rows):
                raise FleetError(f"tenant {tenant_id!r} has rows already, which are not ours to delete: run it again")
        progress.begin("making devices", self._plan.devices)
        for number, tenant_id in enumerate(self._plan.tenant_ids):
            devices = range(number, self._plan.devices, self._plan.tenants)
            for start in range(0, len(devices), _PAGE):
                page = _Page(tenant_id, devices[start : start + _PAGE])
                self._made.append(page)  # before: where the connection is lost, nobody knows
                await self._of(tenant_id, self._make, page)
                progress.at(self.left)
        await self._of(self._plan.tenant_ids[0], _analyze)

    async def empty(self, progress: Progress) -> None:
        """Delete the devices that were made, and their history. Where it fails, it can be called again.

        Raises:
            sqlalchemy.exc.DBAPIError: What the database says, also after some time. `left` is what is left.
            OSError: The same, where no server answers.
        """
        if not self._made:
            return
        all_of_them = self.left
        progress.begin("deleting them", all_of_them)
        while self._made:
            await self._patiently(self._made[-1])
            self._made.pop()
            progress.at(all_of_them - self.left)
        await self._of(self._plan.tenant_ids[0], _analyze)

    async def _patiently(self, page: _Page) -> None:
        for pause in _RETRIES:
            try:
                await self._of(page.tenant_id, _delete, page)
            except (DBAPIError, OSError):
                await asyncio.sleep(pause)
            else:
                return
        await self._of(page.tenant_id, _delete, page)

    async def _of(self, tenant_id: str, do: Callable[..., _T], *arguments: Any) -> _T:
        """Do something in a transaction for one tenant."""

        def work(connection: Any) -> _T:
            with Session(connection) as session, explained():
                if self._plan.bind_tenant:
                    tenancy.bind_tenant(session, tenant_id)
                done = do(session, *(arguments or (tenant_id,)))
                session.commit()
                return done

        with explained():
            async with self._engine.connect() as connection:
                return await connection.run_sync(work)

    def _make(self, session: Session, page: _Page) -> None:
        series = func.generate_series(page.devices[0], page.devices[-1], page.devices.step, type_=Integer)
        n = series.column_valued("n")
        document = literal(self._plan.document, TABLE.c.desired_state.type)
        values = {
            "tenant_id": literal(page.tenant_id),
            "site_id": literal("site-").concat(cast(n % 100, String)),
            "device_id": literal(device_id(0)[:-1]).concat(cast(n, String)),
            "status": literal("ONLINE"),
            "desired_state": document,
            "reported_state": document,
            "desired_version": literal(1),
            "reported_version": literal(1),
            **dict.fromkeys(("last_heartbeat_at", "last_seen_at", "shadow_updated_at"), func.now()),
        }
        session.execute(insert(TABLE).from_select([*values], select(*values.values())))


def _has_rows(session: Session, tenant_id: str) -> bool:
    there = (exists(select(1).where(table.c.tenant_id == tenant_id)) for table in (TABLE, HISTORY))
    return bool(session.scalar(select(or_(*there))))


def _analyze(session: Session, _: str) -> None:
    """Tell the planner of what has come or gone, as autovacuum does some time later.

    Statistics in which a tenant is missing make PostgreSQL plan its batches as if it had a single device, and a batch
    takes seconds. A role that may not do this gets a warning.
    """
    session.execute(text(f"ANALYZE {TABLE}"))


def _delete(session: Session, page: _Page) -> None:
    """The devices first: a desired write that is still under way then finds no row, and adds nothing to the history."""
    devices = literal([device_id(device) for device in page.devices], ARRAY(Text))
    for table in (TABLE, HISTORY):
        session.execute(delete(table).where(table.c.tenant_id == page.tenant_id, table.c.device_id == any_(devices)))
