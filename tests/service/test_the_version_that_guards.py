"""The version that guards an object's write is the one that its document was read at, whatever happened meanwhile."""

from __future__ import annotations

import heapq
import pickle
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, defer, load_only
from sqlalchemy.orm.exc import StaleDataError

from iot_models import AsyncShadowService, DeviceState, Report, ShadowService
from tests.databases.async_engines import async_engine, in_event_loop, url_for
from tests.databases.devices import DEVICE, TENANT, add_device

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

# Every write of the service, by name.
WRITES: dict[str, Callable[[Any], Any]] = {
    "replace_desired": lambda service: service.replace_desired(DEVICE, {"service": 1}),
    "patch_desired": lambda service: service.patch_desired(DEVICE, {"service": 1}),
    "replace_desired_many": lambda service: service.replace_desired_many({DEVICE: {"service": 1}}),
    "patch_desired_many": lambda service: service.patch_desired_many([DEVICE], {"service": 1}),
    "replace_reported": lambda service: service.replace_reported(DEVICE, {"is": 1}),
    "patch_reported": lambda service: service.patch_reported(DEVICE, {"is": 1}),
    "replace_reported_many": lambda service: service.replace_reported_many([Report(DEVICE, {"is": 1})]),
}
REPORTS = [name for name in WRITES if "reported" in name]


def assign(device: DeviceState) -> None:
    device.desired_state = {"mine": 1}


def change_inside(device: DeviceState) -> None:
    device.desired_state["mine"] = 1


CHANGES = (assign, change_inside)


@pytest.fixture
def committed(own_engine: Engine) -> Engine:
    """A database with the device committed at version 7."""
    with Session(own_engine) as session, session.begin():
        add_device(session, desired_state={"queue": [5, 1, 4]}, desired_version=7, reported_version=7)
    return own_engine


def load(session: Session) -> DeviceState:
    return session.get_one(DeviceState, (TENANT, DEVICE))


def another_session_writes(engine: Engine) -> None:
    with Session(engine) as session, session.begin():
        ShadowService(session, TENANT).patch_desired(DEVICE, {"theirs": 1})


def stored(engine: Engine) -> tuple[dict[str, Any], int]:
    with Session(engine) as session:
        shadow = ShadowService(session, TENANT).get(DEVICE)
        return shadow.desired, shadow.desired_version


@pytest.mark.repeats
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_of_the_service_does_not_take_an_objects_change_past_another_sessions_write(
    committed: Engine, change: Callable[[DeviceState], None], write: str
) -> None:
    with Session(committed, autoflush=False) as session:
        change(load_kept := load(session))
        another_session_writes(committed)
        WRITES[write](ShadowService(session, TENANT))
        with pytest.raises(StaleDataError, match="on top of desired_version 7"):
            session.commit()
        assert load_kept is not None
    assert stored(committed) == ({"queue": [5, 1, 4], "theirs": 1}, 8)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("write", [name for name in WRITES if name not in REPORTS])
def test_a_desired_write_of_the_service_in_the_same_session_is_not_overwritten_by_an_older_change(
    committed: Engine, change: Callable[[DeviceState], None], write: str
) -> None:
    with Session(committed) as session, session.no_autoflush:
        device = load(session)
        change(device)
        WRITES[write](ShadowService(session, TENANT))
        assert device.desired_version == 8  # what the row is at; the change is kept, and what guards it too
        with pytest.raises(StaleDataError):
            session.flush()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("write", REPORTS)
def test_a_report_through_the_service_leaves_a_change_that_is_not_flushed_valid(
    committed: Engine, change: Callable[[DeviceState], None], write: str
) -> None:
    with Session(committed, autoflush=False) as session:
        device = load(session)
        change(device)
        WRITES[write](ShadowService(session, TENANT))
        session.commit()
    desired, version = stored(committed)
    assert (desired["mine"], version) == (1, 8)


@pytest.mark.parametrize("write", WRITES)
@in_event_loop
async def test_the_async_service_does_not_take_an_objects_change_past_another_sessions_write(
    committed: Engine, write: str
) -> None:
    url = url_for("psycopg", committed.url)
    async with async_engine(url) as engine, AsyncSession(engine, autoflush=False) as session:
        device = await session.get_one(DeviceState, (TENANT, DEVICE))
        device.desired_state["mine"] = 1
        another_session_writes(committed)
        await WRITES[write](AsyncShadowService(session, TENANT))
        with pytest.raises(StaleDataError):
            await session.commit()
    assert stored(committed) == ({"queue": [5, 1, 4], "theirs": 1}, 8)


def load_the_version_lazily(session: Session, engine: Engine) -> DeviceState:
    device = session.scalars(select(DeviceState).options(load_only(DeviceState.desired_state))).one()
    another_session_writes(engine)
    assert device.desired_version == 8
    return device


def load_the_deferred_version(session: Session, engine: Engine) -> DeviceState:
    device = session.scalars(select(DeviceState).options(defer(DeviceState.desired_version))).one()
    another_session_writes(engine)
    assert device.desired_version == 8
    return device


def fill_in_the_version_by_another_query(session: Session, engine: Engine) -> DeviceState:
    device = session.scalars(select(DeviceState).options(load_only(DeviceState.desired_state))).one()
    another_session_writes(engine)
    session.scalars(select(DeviceState)).all()
    return device


def refresh_the_version(session: Session, engine: Engine) -> DeviceState:
    device = load(session)
    another_session_writes(engine)
    session.refresh(device, ["desired_version"])
    return device


def expire_the_version(session: Session, engine: Engine) -> DeviceState:
    device = load(session)
    another_session_writes(engine)
    session.expire(device, ["desired_version"])
    assert device.desired_version == 8
    return device


def populate_the_version_only(session: Session, engine: Engine) -> DeviceState:
    device = load(session)
    another_session_writes(engine)
    query = select(DeviceState).options(load_only(DeviceState.desired_version))
    session.scalars(query.execution_options(populate_existing=True)).one()
    return device


def populate_with_the_version_deferred(session: Session, engine: Engine) -> DeviceState:
    device = load(session)
    another_session_writes(engine)
    query = select(DeviceState).options(defer(DeviceState.desired_state))
    session.scalars(query.execution_options(populate_existing=True)).one()
    return device


NEWER_VERSIONS = (
    load_the_version_lazily,
    load_the_deferred_version,
    fill_in_the_version_by_another_query,
    refresh_the_version,
    expire_the_version,
    populate_the_version_only,
    populate_with_the_version_deferred,
)


@pytest.mark.repeats
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("read", NEWER_VERSIONS)
def test_a_version_that_was_read_later_than_the_document_guards_nothing(
    committed: Engine, read: Callable[[Session, Engine], DeviceState], change: Callable[[DeviceState], None]
) -> None:
    with Session(committed) as session:
        device = read(session, committed)
        if "theirs" in device.desired_state:  # the document was read again, too: there is nothing to lose
            return
        change(device)
        with pytest.raises((StaleDataError, InvalidRequestError)):
            session.commit()
    assert stored(committed) == ({"queue": [5, 1, 4], "theirs": 1}, 8)


def test_a_version_that_was_read_earlier_than_the_document_guards_it(committed: Engine) -> None:
    with Session(committed) as session:
        device = session.scalars(select(DeviceState).options(load_only(DeviceState.desired_version))).one()
        device.desired_state["mine"] = 1
        session.commit()
        assert stored(committed)[1] == 8
        session.expunge_all()
        device = session.scalars(select(DeviceState).options(load_only(DeviceState.desired_version))).one()
        another_session_writes(committed)
        device.desired_state["mine"] = 2
        with pytest.raises(StaleDataError):
            session.commit()


@pytest.mark.parametrize("reload", [True, False])
def test_what_merge_copies_is_guarded_by_the_version_that_it_was_read_at(committed: Engine, reload: bool) -> None:  # noqa: FBT001
    with Session(committed) as session:
        partly = session.scalars(select(DeviceState).options(load_only(DeviceState.desired_state))).one()
        session.expunge(partly)
        whole = load(session)
    another_session_writes(committed)
    for device in (partly, whole):
        restored: DeviceState = pickle.loads(pickle.dumps(device))
        with Session(committed) as session:
            merged = session.merge(restored, load=reload)
            merged.desired_state["mine"] = 1
            with pytest.raises((StaleDataError, InvalidRequestError)):
                session.commit()
    assert stored(committed) == ({"queue": [5, 1, 4], "theirs": 1}, 8)


def test_an_inserted_object_is_guarded_by_the_version_that_it_was_inserted_with(committed: Engine) -> None:
    with Session(committed, expire_on_commit=False) as session:
        device = DeviceState(tenant_id=TENANT, site_id="berlin", device_id="new")
        session.add(device)
        session.commit()
        with Session(committed) as other, other.begin():
            ShadowService(other, TENANT).patch_desired("new", {"theirs": 1})
        device.desired_state["mine"] = 1
        with pytest.raises(StaleDataError, match="on top of desired_version 0"):
            session.commit()


# heapq is written in C and changes a list without calling its methods.
HEAPS: dict[str, Callable[[list[Any]], Any]] = {
    "heappush": lambda queue: heapq.heappush(queue, 3),
    "heappop": heapq.heappop,
    "heapify": heapq.heapify,
    "heapreplace": lambda queue: heapq.heapreplace(queue, 9),
    "list.append": lambda queue: list.append(queue, 7),
}


@pytest.mark.parametrize("heap", HEAPS)
def test_a_list_that_is_changed_without_its_methods_is_written_by_the_commit(committed: Engine, heap: str) -> None:
    with Session(committed) as session:
        device = load(session)
        HEAPS[heap](device.desired_state["queue"])
        expected = list(device.desired_state["queue"])
        session.commit()
        assert stored(committed) == ({"queue": expected}, 8)
        session.commit()
        assert stored(committed)[1] == 8


@pytest.mark.parametrize("write", REPORTS)
def test_a_list_that_is_changed_without_its_methods_outlives_a_write_of_the_service(
    committed: Engine, write: str
) -> None:
    with Session(committed) as session:
        device = load(session)
        heapq.heapify(device.desired_state["queue"])
        WRITES[write](ShadowService(session, TENANT))
        session.commit()
    assert stored(committed) == ({"queue": [1, 5, 4]}, 8)


def test_a_list_that_was_flushed_by_the_orm_is_watched_further_and_written_once(committed: Engine) -> None:
    with Session(committed) as session:
        device = load(session)
        device.reported_state = {"queue": [3, 2]}
        session.flush()
        heapq.heapify(device.reported_state["queue"])
        session.commit()
        assert device.reported_state == {"queue": [2, 3]}
        assert (device.desired_version, session.is_modified(device)) == (7, False)


def test_an_object_that_left_the_session_takes_its_changes_with_it(committed: Engine) -> None:
    with Session(committed) as session:
        device = load(session)
        session.expunge(device)
        heapq.heapify(device.desired_state["queue"])
        load(session).status = "ONLINE"
        session.commit()
    assert stored(committed) == ({"queue": [5, 1, 4]}, 7)
