"""`ReportBuffer`: many callers, few transactions, and each caller has the outcome of its own report."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from iot_models import Report, ReportOutcome, ReportStatus, ShadowService, tenancy
from iot_models.bus import ReportBuffer
from tests.databases.async_engines import async_engine, in_event_loop
from tests.databases.backends import await_lock_waits, cut
from tests.databases.devices import TENANT, add_device
from tests.databases.statements import at_statement, counted_statements

if TYPE_CHECKING:
    from sqlalchemy import URL, Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

SOON = timedelta(milliseconds=5)
NEVER = timedelta(hours=1)


def accepted(device_id: str, version: int = 0) -> ReportOutcome:
    return ReportOutcome(device_id, ReportStatus.ACCEPTED, 0, version)


def reported(fleet: Engine, device_id: str, tenant_id: str = TENANT) -> dict[str, Any]:
    with Session(fleet) as session:
        return ShadowService(session, tenant_id).get(device_id).reported


@in_event_loop
async def test_reports_that_come_together_are_one_transaction_and_each_caller_has_its_outcome(
    url: URL, fleet: Engine
) -> None:
    async with async_engine(url) as engine:
        commits = count_commits(engine)
        async with ReportBuffer(engine, max_batch=4, max_delay=NEVER) as buffer:
            with counted_statements(engine.sync_engine) as statements:
                outcomes = await asyncio.gather(
                    buffer.report(TENANT, Report("a", {"t": 1})),
                    buffer.report(TENANT, Report("b", {"t": 2}, acked_version=9)),
                    buffer.report(TENANT, Report("nobody", {"t": 3})),
                    buffer.report(TENANT, Report("c", {"t": float("nan")})),
                )

    assert list(outcomes) == [
        accepted("a"),
        ReportOutcome("b", ReportStatus.UNKNOWN_VERSION, 0, 0),
        ReportOutcome("nobody", ReportStatus.UNKNOWN_DEVICE, None, None),
        ReportOutcome("c", ReportStatus.INVALID, 0, 0),
    ]
    assert len(commits) == 1
    assert len(statements) <= 2
    assert [reported(fleet, name) for name in "abc"] == [{"t": 1}, {}, {}]


@in_event_loop
async def test_a_report_waits_no_longer_than_max_delay_for_others(url: URL) -> None:
    async with async_engine(url) as engine, ReportBuffer(engine, max_delay=SOON) as buffer:
        async with asyncio.timeout(10):
            assert await buffer.report(TENANT, Report("a", {"t": 1})) == accepted("a")


@in_event_loop
async def test_the_reports_of_one_device_are_written_in_the_order_in_which_they_came(url: URL, fleet: Engine) -> None:
    async with async_engine(url) as engine, ReportBuffer(engine, max_batch=7, max_delay=SOON) as buffer:
        await asyncio.gather(*(buffer.report(TENANT, Report("a", {"n": n})) for n in range(100)))

    assert reported(fleet, "a") == {"n": 99}


@in_event_loop
async def test_each_tenant_has_batches_of_its_own_and_they_do_not_wait_for_each_other(url: URL, fleet: Engine) -> None:
    with Session(fleet) as session, session.begin():
        add_device(session, "a", tenant_id="other")
    async with async_engine(url) as engine, ReportBuffer(engine, max_delay=SOON) as buffer, asyncio.timeout(30):
        with fleet.begin() as holder:
            holder.execute(text("SELECT FROM device_state WHERE tenant_id = 'acme' FOR UPDATE"))
            held = asyncio.create_task(buffer.report(TENANT, Report("a", {"t": 1})))
            assert await buffer.report("other", Report("a", {"t": 2})) == accepted("a")
            assert not held.done()
        assert await held == accepted("a")

    assert (reported(fleet, "a"), reported(fleet, "a", "other")) == ({"t": 1}, {"t": 2})


@in_event_loop
async def test_the_next_batch_gathers_while_one_is_written(url: URL, fleet: Engine) -> None:
    async with async_engine(url) as engine:
        commits = count_commits(engine)
        async with ReportBuffer(engine, max_delay=SOON) as buffer, asyncio.timeout(30):
            with fleet.begin() as holder:
                holder.execute(text("SELECT FROM device_state FOR UPDATE"))
                first = asyncio.create_task(buffer.report(TENANT, Report("a", {"n": 0})))
                await asyncio.to_thread(await_lock_waits, fleet, 1)
                rest = [asyncio.create_task(buffer.report(TENANT, Report("b", {"n": n}))) for n in range(50)]
                await asyncio.sleep(SOON.total_seconds() * 4)
                assert not any(task.done() for task in [first, *rest])
            await asyncio.gather(first, *rest)

    assert len(commits) == 2
    assert reported(fleet, "b") == {"n": 49}


@in_event_loop
async def test_where_max_waiting_reports_wait_the_next_caller_waits_for_room_and_nothing_is_dropped(
    url: URL, fleet: Engine
) -> None:
    async with (
        async_engine(url) as engine,
        ReportBuffer(engine, max_waiting=2, max_delay=SOON) as buffer,
        asyncio.timeout(30),
    ):
        with fleet.begin() as holder:
            holder.execute(text("SELECT FROM device_state FOR UPDATE"))
            tasks = [asyncio.create_task(buffer.report(TENANT, Report("a", {"n": n}))) for n in range(6)]
            await asyncio.to_thread(await_lock_waits, fleet, 1)
            assert waiting_in(buffer) <= 2
        assert await asyncio.gather(*tasks) == [accepted("a")] * 6

    assert reported(fleet, "a") == {"n": 5}


@in_event_loop
async def test_a_lost_connection_reaches_the_callers_of_that_batch_and_no_others(url: URL, fleet: Engine) -> None:
    async with async_engine(url) as engine, ReportBuffer(engine, max_batch=2, max_delay=SOON) as buffer:
        with at_statement(engine.sync_engine, 0, cut(fleet)):
            lost = await asyncio.gather(
                buffer.report(TENANT, Report("a", {"t": 1})),
                buffer.report(TENANT, Report("b", {"t": 2})),
                return_exceptions=True,
            )
        assert all(isinstance(error, DBAPIError) and error.connection_invalidated for error in lost)
        assert reported(fleet, "a") == {}

        again = [buffer.report(TENANT, Report("a", {"t": 1})), buffer.report(TENANT, Report("b", {"t": 2}))]
        assert await asyncio.gather(*again) == [accepted("a"), accepted("b")]

    assert reported(fleet, "a") == {"t": 1}


@in_event_loop
async def test_a_report_that_a_constraint_of_the_team_refuses_fails_alone(url: URL, fleet: Engine) -> None:
    with fleet.begin() as connection:
        connection.execute(text("ALTER TABLE device_state ADD CHECK (reported_state <> '{\"t\": 18}')"))
    async with async_engine(url) as engine, ReportBuffer(engine, max_batch=20, max_delay=SOON) as buffer:
        reports = [Report("abc"[n % 3], {"t": n}) for n in range(20)]
        outcomes = await asyncio.gather(*(buffer.report(TENANT, report) for report in reports), return_exceptions=True)

    assert [n for n, outcome in enumerate(outcomes) if isinstance(outcome, IntegrityError)] == [18]
    assert sum(isinstance(outcome, ReportOutcome) for outcome in outcomes) == 19
    assert [reported(fleet, name) for name in "abc"] == [{"t": 15}, {"t": 19}, {"t": 17}]


@in_event_loop
async def test_a_caller_that_is_cancelled_takes_its_report_back_and_nobody_with_it(url: URL, fleet: Engine) -> None:
    async with async_engine(url) as engine, ReportBuffer(engine, max_batch=3, max_delay=NEVER) as buffer:
        tasks = [asyncio.create_task(buffer.report(TENANT, Report(name, {"t": 1}))) for name in "ab"]
        await asyncio.sleep(0)
        tasks[0].cancel()
        async with asyncio.timeout(30):
            outcomes = await asyncio.gather(buffer.report(TENANT, Report("c", {"t": 1})), tasks[1])
        assert list(outcomes) == [accepted("c"), accepted("b")]
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]

    assert [reported(fleet, name) for name in "abc"] == [{}, {"t": 1}, {"t": 1}]


@in_event_loop
async def test_a_caller_that_is_cancelled_while_its_batch_is_written_takes_nobody_with_it(
    url: URL, fleet: Engine
) -> None:
    async with async_engine(url) as engine, ReportBuffer(engine, max_delay=SOON) as buffer, asyncio.timeout(30):
        with fleet.begin() as holder:
            holder.execute(text("SELECT FROM device_state FOR UPDATE"))
            tasks = [asyncio.create_task(buffer.report(TENANT, Report(name, {"t": 1}))) for name in "ab"]
            await asyncio.to_thread(await_lock_waits, fleet, 1)
            tasks[0].cancel()
        assert await tasks[1] == accepted("b")
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]

    assert reported(fleet, "a") == {"t": 1}


@in_event_loop
async def test_a_caller_that_is_cancelled_while_its_batch_fails_hears_nothing_of_it(url: URL, fleet: Engine) -> None:
    soon = timedelta(milliseconds=500)
    async with async_engine(url, lock_timeout=soon) as engine, ReportBuffer(engine, max_delay=SOON) as buffer:
        with fleet.begin() as holder:
            holder.execute(text("SELECT FROM device_state FOR UPDATE"))
            tasks = [asyncio.create_task(buffer.report(TENANT, Report(name, {"t": 1}))) for name in "ab"]
            await asyncio.to_thread(await_lock_waits, fleet, 1)
            tasks[0].cancel()
            with pytest.raises(DBAPIError, match="lock timeout"):
                await tasks[1]
        assert tasks[0].cancelled()


@in_event_loop
async def test_leaving_the_block_writes_what_is_waiting(url: URL, fleet: Engine) -> None:
    async with async_engine(url) as engine:
        async with ReportBuffer(engine, max_delay=NEVER) as buffer:
            tasks = [asyncio.create_task(buffer.report(TENANT, Report(name, {"t": 1}))) for name in "abc"]
            await asyncio.sleep(0)
        assert [task.result() for task in tasks] == [accepted(name) for name in "abc"]

    assert [reported(fleet, name) for name in "abc"] == [{"t": 1}] * 3


@in_event_loop
async def test_what_is_not_written_in_time_after_the_block_fails_and_can_be_repeated(url: URL, fleet: Engine) -> None:
    async with async_engine(url) as engine:
        with fleet.begin() as holder:
            holder.execute(text("SELECT FROM device_state FOR UPDATE"))
            async with ReportBuffer(engine, max_delay=SOON, drain_timeout=SOON) as buffer:
                task = asyncio.create_task(buffer.report(TENANT, Report("a", {"t": 1})))
                await asyncio.to_thread(await_lock_waits, fleet, 1)
            with pytest.raises(TimeoutError, match="not written in time: report again"):
                await task
        with pytest.raises(RuntimeError, match="the buffer is closed"):
            await buffer.report(TENANT, Report("a", {"t": 1}))
    assert reported(fleet, "a") == {}


@in_event_loop
async def test_an_engine_in_autocommit_mode_writes_a_batch_in_one_transaction_too(url: URL, fleet: Engine) -> None:
    async with async_engine(url, isolation_level="AUTOCOMMIT") as engine:
        commits = count_commits(engine)
        async with ReportBuffer(engine, max_batch=2, max_delay=NEVER) as buffer:
            await asyncio.gather(*(buffer.report(TENANT, Report("a", {"n": n})) for n in range(2)))

    assert len(commits) == 1
    assert reported(fleet, "a") == {"n": 1}


@in_event_loop
async def test_under_row_level_security_each_batch_is_bound_to_its_tenant(
    url: URL, fleet: Engine, server_role: str
) -> None:
    with fleet.begin() as connection:
        connection.execute(text(f"GRANT SELECT, UPDATE ON device_state TO {server_role}"))
        tenancy.enable(connection, server_role)
    limited = url.set(username=server_role, password=server_role)
    async with async_engine(limited) as engine, ReportBuffer(engine, max_delay=SOON, bind_tenant=True) as buffer:
        assert await buffer.report(TENANT, Report("a", {"t": 1})) == accepted("a")


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"max_batch": 0}, ValueError, "max_batch must be 1 or more"),
        ({"max_batch": "many"}, TypeError, "max_batch must be an int"),
        ({"max_waiting": 0}, ValueError, "max_waiting must be 1 or more"),
        ({"max_delay": 0.02}, TypeError, "max_delay must be a timedelta, got 0.02"),
        ({"max_delay": -SOON}, ValueError, "max_delay must be 0 or more"),
        ({"drain_timeout": None}, TypeError, "drain_timeout must be a timedelta"),
    ],
)
def test_numbers_and_times_that_mean_nothing_are_refused(
    wrong: dict[str, Any], error: type[Exception], words: str, engine: Engine
) -> None:
    async def make() -> None:
        async with async_engine(engine.url) as async_:
            ReportBuffer(async_, **wrong)

    with pytest.raises(error, match=words):
        asyncio.run(make())


def test_an_engine_that_cannot_be_awaited_is_refused_with_what_to_pass(engine: Engine) -> None:
    not_async: Any = engine
    with pytest.raises(
        TypeError, match=r"engine must be an AsyncEngine, got <Engine>: .*create_async_engine makes one"
    ):
        ReportBuffer(not_async)


@in_event_loop
async def test_a_call_with_wrong_arguments_fails_alone_and_at_once(url: URL) -> None:
    no_report: Any = {"device_id": "a"}
    async with async_engine(url) as engine, ReportBuffer(engine, max_delay=NEVER) as buffer:
        with pytest.raises(TypeError, match="report must be a Report, got <dict>"):
            await buffer.report(TENANT, no_report)
        with pytest.raises(ValueError, match="tenant_id must be text"):
            await buffer.report("", Report("a", {}))


def count_commits(engine: AsyncEngine) -> list[object]:
    commits: list[object] = []
    event.listen(engine.sync_engine, "commit", commits.append)
    return commits


def waiting_in(buffer: ReportBuffer) -> int:
    return sum(len(queue.waiting) for queue in buffer._queues.values())  # noqa: SLF001 - memory is bounded by it
