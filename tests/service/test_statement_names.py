"""Statements say which method of the service they belong to, where they are asked to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from iot_models import AsyncShadowService, DeviceNotFound, Report, ShadowService
from iot_models.engine import name_statements
from tests.databases.async_engines import async_engine, in_event_loop, url_for
from tests.databases.devices import DEVICE, TENANT, add_device

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

CALLS: dict[str, Callable[[ShadowService], object]] = {
    "get": lambda service: service.get(DEVICE),
    "get_many": lambda service: service.get_many([DEVICE]),
    "replace_desired": lambda service: service.replace_desired(DEVICE, {}),
    "patch_desired": lambda service: service.patch_desired(DEVICE, {}),
    "replace_reported": lambda service: service.replace_reported(DEVICE, {}),
    "patch_reported": lambda service: service.patch_reported(DEVICE, {}),
    "replace_desired_many": lambda service: service.replace_desired_many({DEVICE: {}}),
    "patch_desired_many": lambda service: service.patch_desired_many([DEVICE], {}),
    "replace_reported_many": lambda service: service.replace_reported_many([Report(DEVICE, {}), Report("absent", {})]),
    "pending": lambda service: service.pending(),
    "iter_pending": lambda service: list(service.iter_pending()),
    "count_pending": lambda service: service.count_pending(),
    "drifted": lambda service: service.drifted(),
    "status_counts": lambda service: service.status_counts(),
}


@pytest.mark.parametrize("named", [True, False])
def test_each_statement_begins_with_the_name_of_its_method_if_asked_for(own_engine: Engine, named: bool) -> None:  # noqa: FBT001
    engine = create_engine(own_engine.url)
    if named:
        name_statements(engine)
    sent: list[tuple[str, Any]] = []

    def record(_c: object, _cursor: object, statement: str, _parameters: object, context: Any, _many: object) -> None:
        sent.append((statement, context.execution_options.get("iot_models_method")))

    event.listen(engine, "before_cursor_execute", record)
    with Session(engine) as session, session.begin():
        add_device(session)
        for method, call in CALLS.items():
            del sent[:]
            call(ShadowService(session, TENANT))
            assert sent
            assert {name for _, name in sent} == {method}
            assert {statement.startswith(f"/* iot_models.{method} */ ") for statement, _ in sent} == {named}
    engine.dispose()


@in_event_loop
async def test_an_async_engine_names_them_too(own_engine: Engine) -> None:
    async with async_engine(url_for("asyncpg", own_engine.url)) as engine, AsyncSession(engine) as session:
        name_statements(engine)
        with pytest.raises(DeviceNotFound):
            await AsyncShadowService(session, TENANT).get(DEVICE)
