"""Each hostile thing at each entry point of the service and the models, judged by `judge.world`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.orm import Session

from iot_models import ShadowService
from tests.databases.async_engines import async_engine, in_event_loop, url_for
from tests.fuzz.corpus.awaiting import AWAITING, awaits
from tests.fuzz.corpus.documents import AGES, DEVICE_IDS, DOCUMENTS, ODD_DEVICE_IDS, UNSTORABLE_TEXTS, VERSIONS, WORDS
from tests.fuzz.corpus.found import FOUND
from tests.fuzz.judge.entry_points import ENTRY_POINTS, Attempt
from tests.fuzz.judge.expected import (
    DESIRED_VERSION,
    DEVICE,
    DONE,
    DONE_VERSION,
    GONE,
    LONGEST,
    TENANT,
    TENANTS,
    devices_of,
)
from tests.fuzz.judge.pure import judge_helpers, judge_url
from tests.fuzz.judge.world import FindingError, NotApplicableError, World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Connection, Engine

pytestmark = pytest.mark.repeats


# Each of these meets the whole corpus: between them they go all ways on which documents, versions and ids are checked and
# bound. Every other entry point meets a third of it, each another third, and `make fuzz` tries everything everywhere.
WHOLE = {"replace_desired", "patch_reported", "replace_reported_many", "DeviceState.desired_state ="}
# And these meet every entry point that takes them.
EVERYWHERE = ("device, removed", "request done", "refuse", "age")


def attempts(point: str) -> Iterator[tuple[str, Callable[[], Attempt]]]:
    """What an entry point meets of the corpus, one hostile thing at a time."""
    place = [*ENTRY_POINTS].index(point)
    for number, (name, make) in enumerate(_corpus(point)):
        if (
            point in WHOLE
            or number % 3 == place % 3
            or name.startswith(EVERYWHERE)
            or {name, f"{point}: {name}"} & AWAITING.keys()
        ):
            yield name, make


def _corpus(point: str) -> Iterator[tuple[str, Callable[[], Attempt]]]:
    takes = ENTRY_POINTS[point].takes
    if "document" in takes:
        for name, make in DOCUMENTS.items():
            yield f"document, {name}", partial(_sending, "document", make)
    if "version" in takes:
        for name, make in VERSIONS.items():
            yield f"version, {name}", partial(_sending, "version", make)
    for part in sorted(takes & {*LONGEST, "site_id"}):
        for name, make in WORDS.items():
            yield f"{part}, {name}", partial(_sending, part, make, **_beside(point, part))
    yield from _more(takes)
    if ENTRY_POINTS[point].kind != "tenant":
        yield from _devices()
    for tenant in TENANTS:
        for device_id in (DEVICE, devices_of(tenant)[3]):
            yield f"tenant {tenant!a}, {device_id!a}", partial(Attempt, tenant, device_id)


def _devices() -> Iterator[tuple[str, Callable[[], Attempt]]]:
    yield "device, removed", partial(Attempt, TENANT, GONE)
    for name, device_id in DEVICE_IDS.items():
        yield f"device, {name}", partial(Attempt, TENANT, device_id)
    for name, make in ODD_DEVICE_IDS.items():
        yield f"device, {name}", partial(_sending, "device_id", make)


def _more(takes: frozenset[str]) -> Iterator[tuple[str, Callable[[], Attempt]]]:
    """What only few entry points take."""
    if "age" in takes:
        for name, make in AGES.items():
            yield f"age, {name}", partial(_sending, "age", make)
    if "request_id" in takes:
        for version in (None, *range(DONE_VERSION - 2, DESIRED_VERSION + 2)):
            yield f"request done, {version}", partial(Attempt, TENANT, DEVICE, version=version, request_id=DONE)
    if "refused_version" in takes:
        for name, make in VERSIONS.items():
            yield f"refused version, {name}", partial(_sending, "refused_version", make, refusal="no")
        yield "refused, without words", partial(Attempt, TENANT, DEVICE, refused_version=DESIRED_VERSION)
        yield "words, without a version", partial(Attempt, TENANT, DEVICE, refusal="no")
        for refused in range(DESIRED_VERSION - 1, DESIRED_VERSION + 2):
            for acked in (None, *range(DESIRED_VERSION - 1, DESIRED_VERSION + 2)):
                name = f"refuses {refused}, acknowledges {acked}"
                yield name, partial(Attempt, TENANT, DEVICE, version=acked, refused_version=refused, refusal="no")


def _beside(point: str, part: str) -> dict[str, Any]:
    """What a part needs: the words of a report are of a version. And a site is that of a device to be made."""
    if part == "site_id":
        return {"device_id": "new"}
    return {"refused_version": DESIRED_VERSION} if "refused_version" in ENTRY_POINTS[point].takes else {}


def _sending(part: str, make: Callable[[], object], **besides: Any) -> Attempt:
    parts: dict[str, Any] = {part: make()}
    return replace(Attempt(TENANT, DEVICE), **besides, **parts)


def findings(session: Session, point: str, wanted: Callable[[str], bool]) -> dict[str, str]:
    """What was found at an entry point, by the name of the piece of the corpus."""
    world = World(session)
    found: dict[str, str] = {}
    for name, make in attempts(point):
        if wanted(name):
            try:
                world.judge(point, make())
            except NotApplicableError:
                continue
            except FindingError as finding:
                found[name] = f"{name}: {finding}"
    return found


@pytest.mark.parametrize("point", ENTRY_POINTS)
def test_hostile_data_are_refused_or_stored_as_they_are(session: Session, point: str) -> None:
    found = findings(session, point, lambda name: not awaits(name, point))

    assert not found, "\n".join([f"{point}:", *found.values()])


# One entry point for each way in which values are bound.
@pytest.mark.parametrize(
    "point",
    [
        "get",
        "get_many",
        "pending",
        "history",
        "replace_desired",
        "replace_desired_many",
        "restore_desired",
        "refuse_desired",
        "register_many",
        "prune_history",
    ],
)
@in_event_loop
async def test_the_other_driver_tells_no_difference(engine: Engine, point: str) -> None:
    def run(connection: Connection) -> dict[str, str]:
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            return findings(session, point, lambda name: not awaits(name, point))

    async with async_engine(url_for("asyncpg", engine.url)) as other, other.connect() as connection:
        found = await connection.run_sync(run)
        await connection.rollback()

    assert not found, "\n".join([f"{point}:", *found.values()])


def test_what_awaits_a_repair_still_fails(session: Session) -> None:
    failing: set[str] = set()
    for point in ENTRY_POINTS:
        with session.begin_nested() as savepoint:
            awaiting = {name for name, _ in attempts(point) if {name, f"{point}: {name}"} & AWAITING.keys()}
            found = findings(session, point, awaiting.__contains__)
            failing |= found.keys() | {f"{point}: {name}" for name in found}
            savepoint.rollback()

    assert {name for name in AWAITING if "url" not in name and "helpers" not in name} <= failing


def test_what_was_found_once_stays_mended(session: Session) -> None:
    world = World(session)
    for point, make in FOUND:
        if point == "url":
            judge_url(make())
        elif point == "helpers":
            judge_helpers(make)
        else:
            world.judge(point, make())


@pytest.mark.parametrize("tenant_id", [*UNSTORABLE_TEXTS.values(), ""], ids=ascii)
def test_a_tenant_that_no_row_can_carry_is_refused_at_once(session: Session, tenant_id: str) -> None:
    with pytest.raises(ValueError, match="tenant_id must be text that PostgreSQL can store and not empty"):
        ShadowService(session, tenant_id)


# Those that are no text.
ODD = {
    name: make for name, make in ODD_DEVICE_IDS.items() if not isinstance(make(), str) and not awaits(f"device, {name}")
}


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_a_tenant_that_is_no_text_is_refused_at_once(session: Session, make: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match="tenant_id must be a str"):
        ShadowService(session, make())  # type: ignore[arg-type]
