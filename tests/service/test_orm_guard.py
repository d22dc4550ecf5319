"""Objects of the ORM against `desired_version`: what raises it, what loses a race, and that no change is lost."""

from __future__ import annotations

import gc
import pickle
import threading
from copy import deepcopy
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import func, inspect, select, text, update
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.orm import Session, load_only, make_transient_to_detached
from sqlalchemy.orm.attributes import flag_modified
from sqlalchemy.orm.exc import StaleDataError

from iot_models import DeviceState, InvalidDocument, ShadowService
from iot_models._core.tracked_documents import set_committed_value
from tests.databases.devices import DEVICE, TENANT, add_device
from tests.databases.statements import counted_statements

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

# An array and an object at several depths, for changes of every kind.
DESIRED: dict[str, Any] = {
    "mode": "eco",
    "fan": {"speed": 2, "curve": {"low": 1, "high": 9}},
    "zones": [{"at": 1, "days": [3, 1, 2]}, "hall"],
}
HEARTBEAT = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def device(session: Session) -> DeviceState:
    add_device(session, desired_state=DESIRED, reported_state=DESIRED, desired_version=7, reported_version=7)
    return load(session)


@pytest.fixture
def committed(own_engine: Engine) -> Engine:
    """A database with the device committed at version 7."""
    with Session(own_engine) as session, session.begin():
        add_device(session, desired_state=DESIRED, desired_version=7, reported_version=7)
    return own_engine


def load(session: Session) -> DeviceState:
    return session.get_one(DeviceState, (TENANT, DEVICE))


def stored(session: Session, *names: str) -> Any:
    """What the row says, past all objects."""
    columns = [DeviceState.__table__.c[name] for name in names or ("desired_state", "desired_version")]
    return tuple(session.execute(select(*columns).where(DeviceState.device_id == DEVICE)).one())


# A write of desired.


def test_setting_desired_raises_its_version_and_sets_its_time_in_one_statement(
    session: Session, device: DeviceState
) -> None:
    device.desired_state = {"mode": "heat"}
    with counted_statements(session.connection()) as statements:
        session.flush()
        assert device.desired_state == {"mode": "heat"}
        assert device.desired_version == 8
        shown_at = device.shadow_updated_at
    assert len(statements) == 1
    assert stored(session) == ({"mode": "heat"}, 8)
    assert shown_at == session.scalar(select(func.now()))
    assert stored(session, "shadow_updated_at", "reported_version") == (shown_at, 7)


@pytest.mark.parametrize(
    "assign",
    [
        lambda device: setattr(device, "desired_state", deepcopy(DESIRED)),
        lambda device: setattr(device, "desired_state", device.desired_state),
        lambda device: setattr(device, "desired_state", deepcopy(device.desired_state)),
        lambda device: setattr(device, "desired_state", device.reported_state | {}),
        lambda device: device.desired_state.update({}),
        lambda device: flag_modified(device, "desired_state"),
    ],
)
def test_writing_what_is_there_already_is_a_write_too(
    session: Session, device: DeviceState, assign: Callable[[DeviceState], None]
) -> None:
    assign(device)
    session.flush()

    assert stored(session) == (DESIRED, 8)


@pytest.mark.parametrize("name", ["state", "desired_state", "reported_state"])
def test_true_and_1_are_two_values(session: Session, device: DeviceState, name: str) -> None:
    setattr(device, name, {"on": True})
    session.flush()
    setattr(device, name, {"on": 1})
    session.flush()

    assert stored(session, name)[0]["on"] is not True


def test_each_flush_is_one_write(session: Session, device: DeviceState) -> None:
    device.desired_state = {"a": 1}
    device.desired_state["b"] = 2
    session.flush()
    device.desired_state["c"] = 3
    session.flush()
    session.flush()

    assert stored(session) == ({"a": 1, "b": 2, "c": 3}, 9)
    assert device not in session.dirty


def test_the_servers_clock_stands_above_the_callers(session: Session, device: DeviceState) -> None:
    device.shadow_updated_at = HEARTBEAT
    device.desired_state = {}
    session.flush()

    assert device.shadow_updated_at == session.scalar(select(func.now()))


def test_a_new_device_comes_with_the_version_that_it_is_given(session: Session) -> None:
    device = DeviceState(tenant_id=TENANT, site_id="berlin", device_id=DEVICE, desired_state={"a": {}})
    device.desired_version = 7
    session.add(device)
    device.desired_state["a"]["b"] = 1
    session.flush()
    assert stored(session) == ({"a": {"b": 1}}, 7)

    device.desired_state["a"]["b"] = 2
    session.flush()
    assert stored(session) == ({"a": {"b": 2}}, 8)


def test_a_device_that_was_renamed_in_the_same_flush_is_found(session: Session, device: DeviceState) -> None:
    device.device_id = "renamed"
    device.desired_state["mode"] = "heat"
    session.flush()

    assert session.execute(select(DeviceState.device_id, DeviceState.desired_version)).all() == [("renamed", 8)]


# A race.


def test_of_two_sessions_that_loaded_one_version_one_commits_and_the_other_gets_stale_data(committed: Engine) -> None:
    with Session(committed) as first, Session(committed) as second:
        ours, theirs = load(first), load(second)
        ours.desired_state = {"writer": "first"}
        theirs.desired_state["writer"] = "second"

        first.commit()
        with pytest.raises(StaleDataError, match="desired_version 7"):
            second.commit()
        second.rollback()

        assert stored(second) == ({"writer": "first"}, 8)
        assert (theirs.desired_state, theirs.desired_version) == ({"writer": "first"}, 8)
        theirs.desired_state["writer"] = "second"
        second.commit()
        assert stored(first) == ({"writer": "second"}, 9)


def test_a_flush_that_waited_for_another_transaction_is_stale_when_that_commits(committed: Engine) -> None:
    failures: list[StaleDataError] = []
    blocked = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )

    def flush() -> None:
        try:
            second.flush()
        except StaleDataError as error:
            failures.append(error)

    with Session(committed) as first, Session(committed) as second, committed.connect() as watch:
        ours, theirs = load(first), load(second)
        ours.desired_state = {"writer": "first"}
        theirs.desired_state = {"writer": "second"}
        first.flush()
        waiting = threading.Thread(target=flush)
        waiting.start()
        while not watch.scalar(blocked):
            watch.rollback()
        first.commit()
        waiting.join()

    assert len(failures) == 1


def test_a_heartbeat_raises_no_version_and_loses_no_race(committed: Engine) -> None:
    with Session(committed) as device_side, Session(committed) as operator:
        device, theirs = load(device_side), load(operator)
        theirs.desired_state["mode"] = "heat"
        operator.commit()

        device.status, device.last_seen_at, device.reported_version = "ONLINE", HEARTBEAT, 6
        device.reported_state = {"fan": {"speed": 1}}
        device.reported_state["fan"]["speed"] = 2
        device.state["signal"] = -60
        device_side.commit()

        assert stored(operator) == (DESIRED | {"mode": "heat"}, 8)
        assert stored(operator, "status", "last_seen_at") == ("ONLINE", HEARTBEAT)
        assert stored(operator, "reported_state", "state") == ({"fan": {"speed": 2}}, {"signal": -60})


def test_an_operator_loses_no_race_against_a_heartbeat(committed: Engine) -> None:
    with Session(committed) as device_side, Session(committed) as operator:
        device = load(operator)
        load(device_side).last_seen_at = HEARTBEAT
        device_side.commit()

        device.desired_state["mode"] = "heat"
        operator.commit()

        assert stored(operator, "last_seen_at", "desired_version") == (HEARTBEAT, 8)


@pytest.mark.parametrize("isolation_level", ["READ COMMITTED", "AUTOCOMMIT"])
def test_a_flush_that_loses_writes_nothing_of_that_device(committed: Engine, isolation_level: Any) -> None:
    engine = committed.execution_options(isolation_level=isolation_level)
    with Session(engine) as first, Session(engine) as second:
        ours, theirs = load(first), load(second)
        theirs.status = "ONLINE"
        theirs.desired_state = {"writer": "second"}
        ours.desired_state = {"writer": "first"}
        first.commit()

        with pytest.raises(StaleDataError):
            second.commit()

    with Session(committed) as session:
        assert stored(session, "desired_state", "desired_version", "status") == ({"writer": "first"}, 8, "OFFLINE")


def test_a_device_that_was_deleted_meanwhile_is_stale(committed: Engine) -> None:
    with Session(committed) as first, Session(committed) as second:
        device = load(second)
        device.desired_state = {}
        first.delete(load(first))
        first.commit()

        with pytest.raises(StaleDataError):
            second.flush()


def test_heartbeats_stay_one_batch_next_to_desired_writes(session: Session) -> None:
    for number in range(9):
        add_device(session, f"device-{number}", desired_version=number)
    devices = session.scalars(select(DeviceState).order_by(DeviceState.device_id)).all()
    for device in devices:
        device.last_seen_at = HEARTBEAT
    devices[3].desired_state = devices[5].desired_state = {"mode": "heat"}

    with counted_statements(session.connection()) as statements:
        session.flush()

    assert len(statements) == 3
    rows = session.execute(select(DeviceState.desired_version, DeviceState.last_seen_at).order_by("device_id")).all()
    assert [row.desired_version for row in rows] == [0, 1, 2, 4, 4, 6, 6, 7, 8]
    assert {row.last_seen_at for row in rows} == {HEARTBEAT}


# Rollbacks.


def test_after_a_rollback_the_object_shows_and_is_guarded_by_what_the_row_says(
    session: Session, device: DeviceState
) -> None:
    for _ in range(2):
        savepoint = session.begin_nested()
        device.desired_state["mode"] = "heat"
        session.flush()
        savepoint.rollback()
        assert (device.desired_state, device.desired_version, device.shadow_updated_at) == (DESIRED, 7, None)

    device.desired_state["mode"] = "cool"
    session.flush()
    assert stored(session) == (DESIRED | {"mode": "cool"}, 8)


def test_a_flush_that_fails_after_the_guarded_write_leaves_nothing_behind(
    session: Session, device: DeviceState
) -> None:
    savepoint = session.begin_nested()
    device.desired_state["mode"] = "heat"
    device.status = None  # type: ignore[assignment]
    with pytest.raises(IntegrityError, match="status"):
        session.flush()
    savepoint.rollback()

    assert (device.desired_state, device.desired_version, device.status) == (DESIRED, 7, "OFFLINE")
    device.desired_state["mode"] = "heat"
    session.flush()
    assert stored(session) == (DESIRED | {"mode": "heat"}, 8)


# What is not loaded.


def test_on_an_expired_object_the_write_is_guarded_by_the_version_at_the_assignment(committed: Engine) -> None:
    with Session(committed) as first, Session(committed) as second:
        device = load(first)
        first.commit()
        device.desired_state = {"writer": "first"}
        load(second).desired_state = {"writer": "second"}
        second.commit()

        with pytest.raises(StaleDataError):
            first.commit()


def test_a_write_without_the_version_that_was_read_is_refused(session: Session, device: DeviceState) -> None:
    session.expunge(device)
    query = select(DeviceState).options(load_only(DeviceState.desired_state, DeviceState.status))
    lacking = session.scalars(query).one()
    lacking.status = "ONLINE"
    session.flush()
    lacking.desired_state["mode"] = "heat"

    with pytest.raises(InvalidRequestError, match="without the desired_version"):
        session.flush()


def test_documents_that_are_not_loaded_are_not_touched(session: Session, device: DeviceState) -> None:
    session.expunge(device)
    lacking = session.scalars(select(DeviceState).options(load_only(DeviceState.status))).one()
    lacking.status = "ONLINE"
    with counted_statements(session.connection()) as statements:
        session.flush()
    assert len(statements) == 1

    assert lacking.desired_version == 7
    lacking.desired_state["mode"] = "heat"
    session.flush()
    assert stored(session) == (DESIRED | {"mode": "heat"}, 8)


# The version itself.


@pytest.mark.parametrize("version", [8, 6, DeviceState.desired_version + 1])
@pytest.mark.parametrize("desired", [None, {"mode": "heat"}])
def test_a_version_set_by_hand_is_refused(
    session: Session, device: DeviceState, version: Any, desired: dict[str, Any] | None
) -> None:
    savepoint = session.begin_nested()
    device.desired_version = version
    if desired is not None:
        device.desired_state = desired

    with pytest.raises(StaleDataError, match="set by hand"):
        session.flush()
    savepoint.rollback()

    assert stored(session) == (DESIRED, 7)


def test_a_version_set_to_what_it_is_is_no_change(session: Session, device: DeviceState) -> None:
    session.expire(device)
    device.desired_version = 7
    device.status = "ONLINE"
    session.flush()

    assert stored(session, "desired_version", "status") == (7, "ONLINE")


def test_deleting_and_adding_a_device_in_one_flush_is_refused(session: Session, device: DeviceState) -> None:
    savepoint = session.begin_nested()
    session.delete(device)
    session.add(DeviceState(tenant_id=TENANT, site_id="paris", device_id=DEVICE))
    with pytest.raises(InvalidRequestError, match="flush after deleting it"):
        session.flush()
    savepoint.rollback()
    assert stored(session, "site_id", "desired_version") == ("berlin", 7)

    session.delete(device)
    session.flush()
    session.add(DeviceState(tenant_id=TENANT, site_id="paris", device_id=DEVICE))
    session.flush()
    assert stored(session, "site_id", "desired_version") == ("paris", 8)  # where its removal has left it


# Merging.


@pytest.mark.parametrize("expired", [False, True])
def test_merging_a_heartbeat_raises_no_version(session: Session, device: DeviceState, expired: bool) -> None:  # noqa: FBT001 - a parameter of the test
    detached = pickle.loads(pickle.dumps(device))
    detached.last_seen_at = HEARTBEAT
    if expired:
        session.expire(device)

    assert session.merge(detached) is device
    session.flush()

    assert stored(session, "desired_state", "desired_version", "last_seen_at") == (DESIRED, 7, HEARTBEAT)


def test_merging_another_document_is_a_write(session: Session, device: DeviceState) -> None:
    detached = pickle.loads(pickle.dumps(device))
    detached.desired_state["fan"]["speed"] = 3
    session.merge(detached)
    session.flush()
    assert stored(session) == (DESIRED | {"fan": DESIRED["fan"] | {"speed": 3}}, 8)

    session.merge(DeviceState(tenant_id=TENANT, site_id="berlin", device_id=DEVICE, desired_state={"mode": "off"}))
    session.flush()
    assert stored(session) == ({"mode": "off"}, 9)
    assert device.desired_version == 9


def test_merging_1_over_true_is_a_write(session: Session, device: DeviceState) -> None:
    device.desired_state = {"on": True}
    session.flush()
    session.merge(DeviceState(tenant_id=TENANT, site_id="berlin", device_id=DEVICE, desired_state={"on": 1}))
    session.flush()

    assert stored(session, "desired_version") == (9,)
    assert stored(session)[0]["on"] is not True


def test_merging_an_object_of_an_older_version_is_stale(session: Session, device: DeviceState) -> None:
    detached = pickle.loads(pickle.dumps(device))
    device.desired_state = {"mode": "heat"}
    session.flush()
    detached.last_seen_at = HEARTBEAT
    savepoint = session.begin_nested()
    session.merge(detached)

    with pytest.raises(StaleDataError, match="another version"):
        session.flush()
    savepoint.rollback()
    assert stored(session) == ({"mode": "heat"}, 8)


def test_a_detached_object_that_is_added_again_is_guarded_by_its_version(committed: Engine) -> None:
    with Session(committed) as session:
        detached = pickle.loads(pickle.dumps(load(session)))
    detached.desired_state["mode"] = "heat"
    with Session(committed) as session:
        load(session).desired_state = {}
        session.commit()

    with Session(committed) as session:
        session.add(detached)
        with pytest.raises(StaleDataError):
            session.flush()


@pytest.mark.parametrize("known", [False, True])
def test_a_cached_object_merged_without_loading_has_documents_of_its_own(
    session: Session,
    device: DeviceState,
    known: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    cached = pickle.loads(pickle.dumps(device))
    if not known:
        session.expunge(device)
    merged = session.merge(cached, load=False)
    merged.desired_state["fan"]["speed"] = 3
    session.flush()

    assert stored(session) == (DESIRED | {"fan": DESIRED["fan"] | {"speed": 3}}, 8)
    assert cached.desired_state == DESIRED


# Changes inside a document.

CHANGES: list[Callable[[Any], object]] = [
    # objects
    lambda desired: desired.__setitem__("new", None),
    lambda desired: desired["fan"].__setitem__("speed", 3),
    lambda desired: desired["fan"]["curve"].__setitem__("low", 2),
    lambda desired: desired["zones"][0].__setitem__("at", 2),
    lambda desired: desired.__delitem__("mode"),
    lambda desired: desired["fan"].__delitem__("curve"),
    lambda desired: desired.__ior__({"mode": "heat", "new": {}}),
    lambda desired: desired["fan"].__ior__([("speed", 3)]),
    lambda desired: desired["fan"].update({"speed": 3}, mode=["a"]),
    lambda desired: desired["fan"].update(speed=3),
    lambda desired: desired["fan"]["curve"].clear(),
    lambda desired: desired.pop("mode"),
    lambda desired: desired["fan"].pop("curve", None),
    lambda desired: desired["fan"]["curve"].popitem(),
    lambda desired: desired.setdefault("new", {}).__setitem__("a", 1),
    lambda desired: desired["fan"].setdefault("new", []).append({"a": 1}),
    lambda desired: desired["fan"].setdefault("curve").update(high=3),
    # arrays
    lambda desired: desired["zones"].__setitem__(1, "attic"),
    lambda desired: desired["zones"].__setitem__(slice(0, 0), [{"at": 0}]),
    lambda desired: desired["zones"][0]["days"].__delitem__(0),
    lambda desired: desired["zones"].__delitem__(slice(None)),
    lambda desired: desired["zones"].__iadd__(["attic"]),
    lambda desired: desired["zones"][0]["days"].__imul__(2),
    lambda desired: desired["zones"].append({"at": 2}),
    lambda desired: desired["zones"][0]["days"].clear(),
    lambda desired: desired["zones"].extend(iter(["attic", {"at": 2}])),
    lambda desired: desired["zones"].insert(0, [1]),
    lambda desired: desired["zones"].insert(-1, "attic"),
    lambda desired: desired["zones"].pop(),
    lambda desired: desired["zones"].pop(0),
    lambda desired: desired["zones"].remove("hall"),
    lambda desired: desired["zones"].reverse(),
    lambda desired: desired["zones"][0]["days"].sort(),
    lambda desired: desired["zones"][0]["days"].sort(key=lambda day: -day, reverse=True),
    lambda desired: desired.__setitem__("moved", desired.pop("fan")),
]


@pytest.mark.parametrize("name", ["state", "desired_state", "reported_state"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_inside_a_document_is_written(session: Session, change: Callable[[Any], object], name: str) -> None:
    columns: dict[str, Any] = {name: DESIRED, "desired_version": 7}
    add_device(session, **columns)
    device = load(session)
    expected = deepcopy(DESIRED)
    change(expected)

    change(getattr(device, name))
    session.flush()

    assert stored(session, name) == (expected,)
    assert expected != DESIRED
    assert stored(session, "desired_version") == (8 if name == "desired_state" else 7,)


@pytest.mark.parametrize(
    "how", ["INSERT", "refresh", "populate_existing", "bulk UPDATE", "unpickled", "set_committed_value"]
)
def test_a_change_inside_is_written_however_the_document_came(session: Session, how: str) -> None:
    device = DeviceState(tenant_id=TENANT, site_id="berlin", device_id=DEVICE)
    session.add(device)
    session.flush()  # the documents come with RETURNING
    if how == "refresh":
        session.refresh(device)
    elif how == "populate_existing":
        session.scalars(select(DeviceState).execution_options(populate_existing=True)).one()
    elif how == "bulk UPDATE":
        session.execute(update(DeviceState).values(desired_state={"a": {}}, reported_state={"a": {}}))
        assert device.desired_state == {"a": {}}
    elif how == "unpickled":
        session.expunge(device)
        device = pickle.loads(pickle.dumps(device))
        session.add(device)
    elif how == "set_committed_value":
        set_committed_value(device, "desired_state", {})
        set_committed_value(device, "reported_state", {})

    device.desired_state.setdefault("a", {})["b"] = 1
    device.reported_state.setdefault("a", {})["b"] = 1
    session.flush()

    assert stored(session, "desired_state", "reported_state", "desired_version") == (
        {"a": {"b": 1}},
        {"a": {"b": 1}},
        1,
    )


@pytest.mark.parametrize(
    "put",
    [
        lambda desired: desired.__setitem__("new", [{}]),
        lambda desired: desired.update(new=[{}]),
        lambda desired: desired.__ior__({"new": [{}]}),
        lambda desired: desired.setdefault("new", [{}]),
        lambda desired: desired["zones"].__setitem__(0, [{}]),
        lambda desired: desired["zones"].__setitem__(slice(0, 1), [[{}]]),
        lambda desired: desired["zones"].insert(0, [{}]),
        lambda desired: [desired["zones"].clear(), desired["zones"].append([{}])],
        lambda desired: [desired["zones"].clear(), desired["zones"].extend([[{}]])],
    ],
)
def test_a_change_inside_what_was_put_into_a_document_is_written(
    session: Session, device: DeviceState, put: Callable[[Any], object]
) -> None:
    put(device.desired_state)
    session.flush()
    new = device.desired_state.get("new", device.desired_state["zones"][0])

    new[0]["a"] = 1
    session.flush()

    desired, version = stored(session)
    assert desired.get("new", desired["zones"][0]) == [{"a": 1}]
    assert version == 9


def test_a_document_stays_the_one_to_change_while_other_columns_are_read(session: Session) -> None:
    device = DeviceState(tenant_id=TENANT, site_id="berlin", device_id=DEVICE, desired_state={"fan": {}})
    fan = device.desired_state["fan"]
    session.add(device)
    session.flush()
    session.refresh(device, ["status"])
    session.expire(device, ["status"])
    assert device.status == "OFFLINE"

    fan["speed"] = 1
    session.flush()

    assert stored(session) == ({"fan": {"speed": 1}}, 1)


def test_a_deep_copy_of_a_device_is_a_device_of_its_own(session: Session, device: DeviceState) -> None:
    copied: DeviceState = deepcopy(device)
    copied.desired_state["fan"]["speed"] = 9
    session.flush()
    assert stored(session) == (DESIRED, 7)

    session.expunge(device)
    session.add(copied)
    session.flush()
    assert stored(session) == (DESIRED | {"fan": DESIRED["fan"] | {"speed": 9}}, 8)


def test_what_was_taken_out_of_a_document_is_the_callers(session: Session, device: DeviceState) -> None:
    fan, curve = device.desired_state["fan"], device.desired_state["fan"]["curve"]
    zone = device.desired_state["zones"].pop(0)
    device.desired_state["fan"] = {}
    was = device.reported_state
    device.reported_state = {}
    session.flush()

    fan["speed"] = curve["low"] = zone["at"] = was["mode"] = 9

    assert device not in session.dirty
    assert device.desired_state == {"mode": "eco", "fan": {}, "zones": ["hall"]}


@pytest.mark.parametrize("supersede", ["expire", "commit", "rollback", "refresh", "load again", "set_committed_value"])
@pytest.mark.parametrize("depth", [0, 2])
def test_a_change_of_a_document_that_its_device_does_not_show_any_more_is_refused(
    session: Session, device: DeviceState, supersede: str, depth: int
) -> None:
    desired = device.desired_state
    curve = desired["fan"]["curve"] if depth else desired
    if supersede in {"commit", "rollback"}:
        session.begin_nested()
        device.status = "ONLINE"
    supersedes: dict[str, Callable[[], object]] = {
        "expire": partial(session.expire, device),
        "commit": session.commit,
        "rollback": session.rollback,
        "refresh": partial(session.refresh, device),
        "load again": lambda: session.scalars(select(DeviceState).execution_options(populate_existing=True)).one(),
        "set_committed_value": partial(set_committed_value, device, "desired_state", {}),
    }
    supersedes[supersede]()

    with pytest.raises(InvalidRequestError, match="read the attribute again"):
        curve["low"] = 2


def test_a_change_of_a_document_whose_device_is_gone_is_refused(session: Session, device: DeviceState) -> None:
    session.expunge(device)
    del device
    gc.collect()

    with pytest.raises(InvalidRequestError, match="keep the object in a variable"):
        load(session).desired_state["mode"] = "heat"


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (float("nan"), "/fan/speed"),
        ("no\0body", "/fan/speed"),
        (("a", "tuple"), "/fan/speed"),
        ({"a": [{1: 2}]}, "/fan/speed/a/0/1"),
    ],
)
@pytest.mark.parametrize("new", [False, True])
def test_what_is_no_json_is_refused_by_the_flush_when_it_was_put_inside(
    session: Session,
    device: DeviceState,
    value: object,
    path: str,
    new: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    savepoint = session.begin_nested()
    if new:
        device = DeviceState(tenant_id=TENANT, site_id="berlin", device_id="new", desired_state=DESIRED)
        session.add(device)
    device.desired_state["fan"]["speed"] = value

    with pytest.raises(InvalidDocument) as caught:
        session.flush()
    savepoint.rollback()

    assert caught.value.path == path
    assert caught.value.__notes__ == [f"It is the desired_state of {device!r}, changed after it was read or assigned."]
    assert stored(session) == (DESIRED, 7)


def test_a_row_whose_document_is_no_object_stays_readable_and_can_be_mended(session: Session) -> None:
    for number, document in enumerate(("[]", '"{}"', "1", "null")):
        add_device(session, f"device-{number}", state=text(f"'{document}'::jsonb"))

    devices = session.scalars(select(DeviceState).order_by(DeviceState.device_id)).all()
    assert [device.state for device in devices] == [[], "{}", 1, None]
    assert [device.state for device in pickle.loads(pickle.dumps(devices))] == [[], "{}", 1, None]

    for device in devices:
        device.state = {}
    session.flush()
    assert session.scalars(select(DeviceState.state).distinct()).all() == [{}]


# Beside the service.


def test_after_a_service_write_the_object_is_guarded_by_the_new_version(session: Session, device: DeviceState) -> None:
    service = ShadowService(session, TENANT)
    service.replace_desired(DEVICE, {"fan": {"speed": 1}})

    device.desired_state["fan"]["speed"] = 2
    assert service.get(DEVICE).desired_version == 9
    device.desired_state = {"fan": {"speed": 3}}
    shadow = service.patch_desired(DEVICE, {"mode": "eco"}, expected_version=10)

    assert (shadow.desired, shadow.desired_version) == ({"fan": {"speed": 3}, "mode": "eco"}, 11)
    assert (device.desired_state, device.desired_version) == (shadow.desired, 11)
    assert stored(session) == (shadow.desired, 11)


def test_an_object_loaded_before_the_service_of_another_session_wrote_is_stale(committed: Engine) -> None:
    with Session(committed) as first, Session(committed) as second:
        device = load(first)
        ShadowService(second, TENANT).patch_desired(DEVICE, {"mode": "heat"})
        second.commit()
        device.desired_state["mode"] = "cool"

        with pytest.raises(StaleDataError):
            first.commit()


def test_a_device_made_known_without_loading_is_guarded_all_the_same(session: Session, device: DeviceState) -> None:
    session.expunge(device)
    known = DeviceState(tenant_id=TENANT, device_id=DEVICE)
    make_transient_to_detached(known)
    session.add(known)

    known.desired_state = {"mode": "heat"}
    session.flush()

    assert stored(session) == ({"mode": "heat"}, 8)
    assert not inspect(known).modified
