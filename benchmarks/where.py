"""Which package uses the processor time of a report: with one session, and with 32 tasks, in AUTOCOMMIT mode.

    python benchmarks/where.py

It takes a sample every millisecond of processor time. The time of C code counts for the Python code that called it.
Waiting for the server takes no processor time and does not show.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fleet_data import DEVICES, DOCUMENT, TENANT, database, load
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from iot_models import AsyncShadowService, ShadowService
from iot_models.engine import create_async_engine, create_engine
from iot_models.testing import throwaway

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

REPORTS = 20_000
TASKS = 32
PACKAGES = ("iot_models", "sqlalchemy", "psycopg", "asyncpg", "asyncio", "json")


def main() -> None:
    with throwaway.postgres() as server, database(server.url, "iot_models_bench") as url:
        load(url, DEVICES)
        one_session(url)
        asyncio.run(many_tasks(url))


def one_session(url: str) -> None:
    with Session(create_engine(url, isolation_level="AUTOCOMMIT")) as session:
        service = ShadowService(session, TENANT)
        service.get(device(0))
        with sampled("one session, psycopg"):
            for n in range(REPORTS):
                service.replace_reported(device(n), DOCUMENT, acked_version=2)


async def many_tasks(url: str) -> None:
    address = make_url(url).set(drivername="postgresql+asyncpg")
    engine = create_async_engine(address, isolation_level="AUTOCOMMIT", pool_size=TASKS)

    async def work(number: int, reports: int) -> None:
        async with AsyncSession(engine) as session:
            service = AsyncShadowService(session, TENANT)
            for n in range(reports):
                await service.replace_reported(device(number + n * TASKS), DOCUMENT, acked_version=2)

    await asyncio.gather(*(work(number, 10) for number in range(TASKS)))
    with sampled(f"{TASKS} tasks with a session each, asyncpg"):
        await asyncio.gather(*(work(number, REPORTS // TASKS) for number in range(TASKS)))
    await engine.dispose()


def device(number: int) -> str:
    return f"device-{number % DEVICES:07}"


@contextmanager
def sampled(title: str) -> Iterator[None]:
    """Print after the block which packages were running."""
    shares: Counter[str] = Counter()

    def sample(_number: int, frame: FrameType | None) -> None:
        shares[package_of(frame.f_code.co_filename if frame else "")] += 1

    signal.signal(signal.SIGPROF, sample)
    signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    total = shares.total()
    print(f"{title}: {total} samples")
    for package, samples in shares.most_common():
        print(f"  {samples / total:4.0%}  {package}")


def package_of(file: str) -> str:
    parts = Path(file).parts
    return next((package for package in PACKAGES if package in parts or f"{package}.py" in parts), "the rest")


if __name__ == "__main__":
    main()
