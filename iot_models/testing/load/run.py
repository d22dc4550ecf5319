"""How a run of the load generator goes: what it makes it deletes, however it ends."""

from __future__ import annotations

import asyncio
import secrets
import signal
import sys
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Final, cast

from sqlalchemy.exc import SQLAlchemyError

from iot_models import migrate
from iot_models.cli.tables import say
from iot_models.engine import create_async_engine, database_url, shown
from iot_models.testing.load.fleet import Fleet, FleetError
from iot_models.testing.load.meters import LoopClock
from iot_models.testing.load.observation import Observer
from iot_models.testing.load.output import Progress, print_measured, print_measured_as_json
from iot_models.testing.load.plan import Plan
from iot_models.testing.load.traffic import Traffic
from iot_models.testing.load.verdict import Measured
from iot_models.testing.throwaway import ThrowawayPostgresError, postgres

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from sqlalchemy.ext.asyncio import AsyncEngine

_NAME: Final = "load-"
_SIGNALS: Final = ("SIGINT", "SIGTERM", "SIGHUP")
_BY_SIGNAL: Final = 128  # and the signal's number: the exit code of a shell


def run(given: argparse.Namespace) -> int:
    """Run a parsed command line and return its exit code; errors are one line on stderr."""
    where = ""
    try:
        with _database(given) as url:
            plan = _plan(given, url)
            where = "" if given.throwaway else f"{shown(plan.url)}: "
            return _run(given, plan)
    except SQLAlchemyError as error:
        hints: list[str] = getattr(error, "detail", [])
        said = " ".join([*hints, str(getattr(error, "orig", None) or error)])
        say(sys.stderr, f"error: {where}{' '.join(said.split())}")
    except (FleetError, ThrowawayPostgresError, ValueError, ImportError, OSError) as error:
        way_out = "" if where or given.url else ", or pass one (--url)"
        notes = " ".join(getattr(error, "__notes__", []))
        say(sys.stderr, f"error: {where}{notes and f'{notes} '}{error}{way_out}")
    return 1


@contextmanager
def _database(given: argparse.Namespace) -> Iterator[str | None]:
    if not given.throwaway:
        yield given.url
        return
    with postgres() as server:
        migrate.upgrade(server.url)
        yield server.url


def _plan(given: argparse.Namespace, url: str | None) -> Plan:
    target = database_url(url)
    if given.driver:
        target = target.set(drivername=f"postgresql+{given.driver}")
    return Plan(
        url=target,
        name=f"{_NAME}{secrets.token_hex(4)}",
        devices=given.devices,
        tenants=given.tenants,
        rate=given.rate,
        seconds=given.seconds,
        desired_rate=given.desired_rate,
        keys=given.keys,
        connections=given.connections,
        max_batch=given.max_batch,
        max_delay=timedelta(milliseconds=given.max_delay_ms),
        bind_tenant=given.bind_tenant,
    )


def _run(given: argparse.Namespace, plan: Plan) -> int:
    clock = LoopClock()
    caught: list[int] = []
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(clock)) as runner:
        measured = runner.run(_in_event_loop(plan, clock, caught))
    # Windows has no such handlers: there the signal is Ctrl-C.
    return _BY_SIGNAL + [*caught, signal.SIGINT][0] if measured is None else _tell(given, measured)


def _tell(given: argparse.Namespace, measured: Measured) -> int:
    (print_measured_as_json if given.json else print_measured)(measured)
    return 0 if measured.is_reached else 1


async def _in_event_loop(plan: Plan, clock: LoopClock, caught: list[int]) -> Measured | None:
    """Make the devices, put the load on them, delete them; None if a signal came, which is added to `caught`."""
    _cancel_on_signals(caught)
    load = f"iot_models {plan.name}"
    writing = create_async_engine(plan.url, application_name=load, pool_size=plan.connections, max_overflow=0)
    beside = create_async_engine(plan.url, application_name=f"{load} beside", pool_size=1, max_overflow=0)
    fleet, progress = Fleet(beside, plan), Progress()
    try:
        try:
            return await _measure(plan, clock, fleet, progress, (writing, beside))
        finally:
            await writing.dispose()
            await _empty(fleet, progress)
            progress.end()
    except asyncio.CancelledError:
        say(sys.stderr, "interrupted")
        return None
    finally:
        await beside.dispose()


def _cancel_on_signals(caught: list[int]) -> None:
    """Let a signal cancel this task: what it has made is then deleted. The second signal ends that, too."""
    loop, task = asyncio.get_running_loop(), cast("asyncio.Task[object]", asyncio.current_task())

    def cancel(number: int) -> None:
        caught.append(number)
        task.cancel()

    with suppress(NotImplementedError, RuntimeError):  # Windows; a thread that is not the main one
        for name in _SIGNALS:
            loop.add_signal_handler(getattr(signal, name), cancel, getattr(signal, name))


async def _measure(
    plan: Plan, clock: LoopClock, fleet: Fleet, progress: Progress, engines: tuple[AsyncEngine, AsyncEngine]
) -> Measured:
    writing, beside = engines
    await fleet.fill(progress)
    observer = Observer(beside, f"iot_models {plan.name}")
    traffic = Traffic(writing, plan, clock, observer)
    before = await observer.updates()
    await traffic.run(progress)
    await writing.dispose()
    after = await observer.updates()
    return _measured(plan, traffic, observer, before, after)


async def _empty(fleet: Fleet, progress: Progress) -> None:
    try:
        await fleet.empty(progress)
    finally:
        progress.end()
        if fleet.left:
            say(sys.stderr, f"{fleet.left:,} devices are left in the database. Delete them: {fleet.statements}")


def _measured(
    plan: Plan,
    traffic: Traffic,
    observer: Observer,
    before: tuple[int, int] | None,
    after: tuple[int, int] | None,
) -> Measured:
    reports, desired, waits = traffic.reports, traffic.desired, observer.waits
    updates = None if before is None or after is None else (after[0] - before[0], after[1] - before[1])
    return Measured(
        rate=plan.rate,
        seconds=traffic.seconds,
        due=reports.due,
        done=reports.done,
        done_in_time=reports.done_in_time,
        unsent=reports.unsent,
        unanswered=reports.unanswered,
        refused=dict(reports.refused),
        errors=dict(reports.errors),
        latency=reports.latencies.percentiles(),
        desired_due=desired.due,
        desired_done=desired.done,
        desired_errors=dict(desired.errors),
        desired_latency=desired.latencies.percentiles(),
        batches=traffic.batches,
        max_batch=plan.max_batch,
        max_delay=plan.max_delay.total_seconds(),
        tenants=plan.tenants,
        connections=plan.connections,
        pool_used=traffic.pool.used / (plan.connections * traffic.seconds),
        pool_full=traffic.pool.full / traffic.seconds,
        cpu=traffic.cpu / traffic.seconds,
        busy=traffic.busy / traffic.seconds,
        looks=waits.looks,
        waits=dict(waits.seen),
        blockers=dict(waits.blockers),
        wal=traffic.wal,
        updates=updates and updates[0],
        hot_updates=updates and updates[1],
    )
