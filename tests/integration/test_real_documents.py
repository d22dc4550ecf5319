"""The service, on both drivers, on documents in the shape of real kinds of devices: `tests/data/real_documents.py`.

Each case is a device. Nothing is committed.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from iot_models import AsyncShadowService, Report, ReportStatus, Shadow, ShadowService
from tests.data.real_documents import CASES, Case
from tests.databases.async_engines import async_engine, in_event_loop, url_for
from tests.databases.devices import TENANT, add_device
from tests.databases.engines import KINDS
from tests.reference.json_values import equal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from sqlalchemy import Engine

    Call: TypeAlias = Callable[..., Awaitable[Any]]

pytestmark = pytest.mark.repeats

ALL = {case.id for case in CASES}
each_service = pytest.mark.parametrize("kind", KINDS)


@asynccontextmanager
async def service_of(kind: str, engine: Engine) -> AsyncIterator[Call]:
    """Calls a method by its name: of `ShadowService`, or of `AsyncShadowService` on one of its drivers."""

    async def call(method: str, *arguments: object, **named: object) -> Any:
        result = getattr(service, method)(*arguments, **named)
        return await result if isawaitable(result) else result

    service: ShadowService | AsyncShadowService
    if kind == "sync":
        with Session(engine) as session:
            add_devices(session)
            service = ShadowService(session, TENANT)
            yield call
    else:
        async with async_engine(url_for(kind, engine.url)) as own, AsyncSession(own) as async_session:
            await async_session.run_sync(add_devices)
            service = AsyncShadowService(async_session, TENANT)
            yield call


def add_devices(session: Session) -> None:
    for case in CASES:
        add_device(session, case.id)


def assert_as_expected(shadow: Shadow, case: Case, *, is_pending: bool) -> None:
    assert equal(shadow.desired, case.desired), case.id
    assert equal(shadow.reported, case.reported), case.id
    assert equal(shadow.delta, case.delta), case.id
    assert equal(shadow.nested_delta, case.nested_delta), case.id
    assert shadow.is_converged == case.is_converged, case.id
    assert shadow.is_pending == is_pending, case.id
    assert shadow.is_drifted == (not is_pending and not case.is_converged), case.id


async def ids_of(call: Call, method: str) -> set[str]:
    return {shadow.device_id for shadow in await call(method, limit=len(CASES))}


@each_service
@in_event_loop
async def test_documents_are_read_as_they_were_written_and_differ_as_expected(kind: str, engine: Engine) -> None:
    async with service_of(kind, engine) as call:
        for case in CASES:
            await call("replace_desired", case.id, case.desired)
            await call("replace_reported", case.id, case.reported)
            assert_as_expected(await call("get", case.id), case, is_pending=True)
        assert (await ids_of(call, "pending"), await ids_of(call, "drifted")) == (ALL, set())


@each_service
@in_event_loop
async def test_of_acknowledged_devices_those_that_have_not_converged_drifted(kind: str, engine: Engine) -> None:
    async with service_of(kind, engine) as call:
        await call("replace_desired_many", {case.id: case.desired for case in CASES})
        outcomes = await call("replace_reported_many", [Report(case.id, case.reported, 1) for case in CASES])
        assert {outcome.status for outcome in outcomes} == {ReportStatus.ACCEPTED}

        stored = await call("get_many", [case.id for case in CASES])
        for case in CASES:
            assert_as_expected(stored[case.id], case, is_pending=False)
        not_converged = {case.id for case in CASES if not case.is_converged}
        assert (await ids_of(call, "pending"), await ids_of(call, "drifted")) == (set(), not_converged)


@each_service
@in_event_loop
async def test_the_patch_makes_desired_of_reported_in_both_sections(kind: str, engine: Engine) -> None:
    async with service_of(kind, engine) as call:
        for case in CASES:
            if case.merge_patch is not None:
                await call("replace_desired", case.id, case.reported)
                await call("replace_reported", case.id, case.reported)

                asked = await call("patch_desired", case.id, case.merge_patch, expected_version=1)
                assert_as_expected(asked, case, is_pending=True)

                done = await call("patch_reported", case.id, case.merge_patch, acked_version=2)
                assert equal(done.reported, case.desired), case.id
                assert (done.delta, done.is_converged, done.is_drifted) == ({}, True, False), case.id
