"""A device's whole life: it is registered, removed, and registered again; no message of an earlier life fits."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Connection, Engine, select, text
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import ObjectDeletedError, StaleDataError

from iot_models import (
    DeviceNotFound,
    DeviceState,
    LateReport,
    ShadowService,
    UnknownVersion,
    VersionConflict,
    VersionNotKept,
)
from tests.databases.devices import DEVICE, TENANT, add_device
from tests.databases.statements import at_statement, counted_statements

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def service(session: Session) -> ShadowService:
    return ShadowService(session, TENANT, actor="anna")


@pytest.fixture
def lived(service: ShadowService) -> ShadowService:
    """A device whose life ended at version 3."""
    service.register(DEVICE, "berlin")
    service.replace_desired(DEVICE, {"n": 1})
    service.replace_desired(DEVICE, {"n": 2})
    service.replace_reported(DEVICE, {"n": 2}, acked_version=2)
    service.remove(DEVICE, reason="scrapped")
    return service


def test_a_registered_device_is_new_and_where_it_is_there_it_is_returned(service: ShadowService) -> None:
    made = service.register(DEVICE, "berlin")
    assert (made.desired, made.reported, made.desired_version, made.is_pending, made.last_seen_at) == (
        {},
        {},
        0,
        False,
        None,
    )
    service.replace_desired(DEVICE, {"n": 1})
    assert service.register(DEVICE, "paris") == service.get(DEVICE)
    assert service.get(DEVICE).desired == {"n": 1}


def test_ten_thousand_are_registered_by_as_many_statements_as_one(session: Session, service: ShadowService) -> None:
    service.register("00007", "berlin")
    sites = {f"{n:05}": "berlin" for n in range(10_000)}
    with counted_statements(session.connection()) as one:
        service.register("x", "berlin")
    with counted_statements(session.connection()) as many:
        made = service.register_many(sites)

    assert len(many) == len(one) == 2
    assert list(made) == list(sites)
    assert session.scalar(text("SELECT count(*) FROM device_state WHERE site_id = 'berlin'")) == 10_001
    assert service.register_many({}) == {}


@pytest.mark.parametrize(
    ("sites", "error"),
    [({"": "s"}, ValueError), ({"a": ""}, ValueError), ({"a\0": "s"}, ValueError), ({"a": "\ud800"}, ValueError),
     ({"x" * 1001: "s"}, ValueError), ({"a": "🌡" * 251}, ValueError),
     ({7: "s"}, TypeError), ({"a": None}, TypeError), (["a"], TypeError), ("a", TypeError)],
)  # fmt: skip
def test_ids_that_no_row_can_have_are_refused_and_nothing_is_written(
    session: Session, service: ShadowService, sites: Any, error: type[Exception]
) -> None:
    with counted_statements(session.connection()) as statements, pytest.raises(error):
        service.register_many({"good": "s"} | sites if isinstance(sites, dict) else sites)
    assert statements == []


def test_a_removed_device_is_in_no_page_and_its_history_ends_without_a_document(
    session: Session, lived: ShadowService
) -> None:
    with pytest.raises(DeviceNotFound):
        lived.get(DEVICE)
    assert (lived.get_many([DEVICE]), lived.pending(), lived.drifted(), lived.refused()) == ({}, [], [], [])
    assert sum(lived.status_counts().values()) == 0
    (end, before, *_) = lived.history(DEVICE)
    assert (end.version, end.desired, end.actor, end.reason) == (3, None, "anna", "scrapped")
    assert (before.version, before.desired) == (2, {"n": 2})
    assert lived.desired_at(DEVICE, 3) == end
    assert session.scalar(text("SELECT desired_state IS NULL FROM device_shadow_history WHERE desired_version = 3"))


def test_a_removal_is_one_statement_and_records_what_was_there_before(session: Session, service: ShadowService) -> None:
    add_device(session, desired_state={"n": 7}, desired_version=7)
    with counted_statements(session.connection()) as statements:
        service.remove(DEVICE, expected_version=7)
    assert len(statements) == 1
    assert [(v.version, v.desired) for v in service.history(DEVICE)] == [(8, None), (7, {"n": 7})]


def test_a_removal_that_is_overtaken_or_of_nobody_is_refused(service: ShadowService) -> None:
    service.register(DEVICE, "berlin")
    service.replace_desired(DEVICE, {"n": 1})
    with pytest.raises(VersionConflict):
        service.remove(DEVICE, expected_version=0)
    with pytest.raises(DeviceNotFound):
        service.remove("nobody")
    assert service.get(DEVICE).desired == {"n": 1}


def test_an_object_of_a_removed_device_says_so(session: Session, service: ShadowService) -> None:
    service.register(DEVICE, "berlin")
    device = session.get_one(DeviceState, (TENANT, DEVICE))
    with session.begin_nested() as savepoint:
        service.remove(DEVICE)
        with pytest.raises(ObjectDeletedError):
            _ = device.desired_state
        savepoint.rollback()
    assert device.desired_version == 0
    service.remove(DEVICE)
    device.status = "ONLINE"
    with pytest.raises((StaleDataError, ObjectDeletedError)):
        session.flush()


# Again.


def add_an_object(_service: ShadowService, session: Session) -> None:
    session.add(DeviceState(tenant_id=TENANT, site_id="paris", device_id=DEVICE))
    session.flush()


AGAIN: dict[str, Callable[[ShadowService, Session], object]] = {
    "register": lambda service, _: service.register(DEVICE, "paris"),
    "register_many": lambda service, _: service.register_many({DEVICE: "paris"}),
    "the ORM": add_an_object,
}
again = pytest.mark.parametrize("way", AGAIN)


@again
def test_registered_again_it_goes_on_at_the_version_of_its_removal_and_nothing_is_pending(
    session: Session, lived: ShadowService, way: str
) -> None:
    with counted_statements(session.connection()) as statements:
        AGAIN[way](lived, session)

    # In AUTOCOMMIT mode nobody sees it at another version in between.
    assert len(statements) == (3 if way == "the ORM" else 2)
    shadow = lived.get(DEVICE)
    assert (shadow.desired, shadow.desired_version, shadow.reported_version, shadow.reported) == ({}, 3, 3, {})
    assert (shadow.is_pending, shadow.is_drifted) == (False, False)
    device = session.get_one(DeviceState, (TENANT, DEVICE))
    assert (device.desired_version, device.reported_version) == (3, 3)
    assert lived.replace_desired(DEVICE, {"n": 4}).desired_version == 4
    assert [(v.version, v.desired) for v in lived.history(DEVICE)][:3] == [(4, {"n": 4}), (3, None), (2, {"n": 2})]


@again
def test_no_message_of_the_earlier_life_fits(session: Session, lived: ShadowService, way: str) -> None:
    AGAIN[way](lived, session)
    for acked in (0, 1, 2):
        with pytest.raises(LateReport):
            lived.replace_reported(DEVICE, {}, acked_version=acked)
        with pytest.raises(LateReport):
            lived.refuse_desired(DEVICE, acked, "no")
        with pytest.raises(VersionConflict):
            lived.replace_desired(DEVICE, {}, expected_version=acked)
    with pytest.raises(UnknownVersion):
        lived.replace_reported(DEVICE, {}, acked_version=4)


def test_no_object_of_the_earlier_life_is_written(own_engine: Engine) -> None:
    with Session(own_engine) as old, Session(own_engine) as new:
        service = ShadowService(new, TENANT)
        service.register(DEVICE, "berlin")
        service.replace_desired(DEVICE, {"n": 1})
        new.commit()
        device = old.get_one(DeviceState, (TENANT, DEVICE))
        document = device.desired_state
        service.remove(DEVICE)
        service.register(DEVICE, "berlin")
        new.commit()
        document["n"] = 2
        with pytest.raises(StaleDataError):
            old.commit()
        assert service.get(DEVICE).desired == {}


def test_deleted_objects_end_their_lives_in_one_statement_for_all_of_a_flush(
    session: Session, service: ShadowService
) -> None:
    session.info["iot_models.actor"] = "ops"
    service.register_many({f"d{n}": "berlin" for n in range(50)})
    ShadowService(session, "globex").register("d1", "berlin")
    devices = session.scalars(select(DeviceState)).all()
    for device in devices:
        session.delete(device)
    with counted_statements(session.connection()) as statements:
        session.flush()

    assert sum("device_shadow_history" in statement for statement in statements) == 2  # a tenant each
    assert session.scalar(text("SELECT count(*) FROM device_state")) == 0
    assert [(v.version, v.desired, v.actor) for v in service.history("d7")] == [(1, None, "ops"), (0, {}, None)]
    assert ShadowService(session, "globex").register("d1", "berlin").desired_version == 1


def test_a_deletion_that_is_rolled_back_is_recorded_when_it_is_done_again(
    session: Session, service: ShadowService
) -> None:
    service.register(DEVICE, "berlin")
    device = session.get_one(DeviceState, (TENANT, DEVICE))
    with session.begin_nested() as savepoint:
        session.delete(device)
        session.flush()
        savepoint.rollback()
    assert [v.version for v in service.history(DEVICE)] == [0]
    session.delete(device)
    session.flush()
    assert [v.version for v in service.history(DEVICE)] == [1, 0]


def test_an_object_that_comes_with_a_document_asks_for_it_under_a_new_version(
    session: Session, lived: ShadowService
) -> None:
    device = DeviceState(tenant_id=TENANT, site_id="s", device_id=DEVICE, desired_state={"n": 9})
    session.add(device)
    session.flush()
    assert (device.desired_version, device.reported_version, device.is_pending) == (4, 3, True)
    device.desired_state["n"] = 10
    session.flush()
    assert [(v.version, v.desired) for v in lived.history(DEVICE)][:3] == [(5, {"n": 10}), (4, {"n": 9}), (3, None)]


def test_an_object_that_comes_with_a_version_above_its_history_keeps_it(session: Session, lived: ShadowService) -> None:
    session.add(DeviceState(tenant_id=TENANT, site_id="s", device_id=DEVICE, desired_version=9, reported_version=8))
    session.flush()
    assert (lived.get(DEVICE).desired_version, lived.get(DEVICE).reported_version) == (9, 8)


def test_a_row_that_sql_by_hand_took_away_and_made_again_goes_on_above_its_history(
    session: Session, service: ShadowService
) -> None:
    service.register(DEVICE, "berlin")
    for n in range(3):
        service.replace_desired(DEVICE, {"n": n})
    session.execute(text("DELETE FROM device_state"))
    add_device(session)

    assert service.patch_desired(DEVICE, {"new": 1}).desired_version == 4
    assert [v.version for v in service.history(DEVICE)] == [4, 3, 2, 1, 0]
    session.execute(text("UPDATE device_state SET desired_version = 1"))
    assert service.replace_desired_many({DEVICE: {}})[DEVICE].desired_version == 5
    session.execute(text("DELETE FROM device_state"))
    # Nobody recorded the removal of version 5.
    assert service.register(DEVICE, "berlin").desired_version == 6


def test_no_report_of_an_earlier_life_fits_a_row_that_sql_by_hand_made_again(
    session: Session, service: ShadowService
) -> None:
    service.register(DEVICE, "berlin")
    for n in range(3):
        service.replace_desired(DEVICE, {"n": n})
    session.execute(text("DELETE FROM device_state"))
    add_device(session)
    assert service.replace_desired(DEVICE, {"new": 1}).desired_version == 4
    with pytest.raises(LateReport):
        service.replace_reported(DEVICE, {}, acked_version=2)
    assert service.replace_reported(DEVICE, {}, acked_version=4).is_pending is False


def test_a_device_that_was_renamed_leaves_a_life_behind_that_no_message_fits(
    session: Session, service: ShadowService
) -> None:
    service.register(DEVICE, "berlin")
    service.replace_desired(DEVICE, {"n": 1})
    session.get_one(DeviceState, (TENANT, DEVICE)).device_id = "renamed"
    session.flush()
    assert service.register(DEVICE, "berlin").desired_version == 2
    with pytest.raises(LateReport):
        service.replace_reported(DEVICE, {}, acked_version=1)


def test_an_object_that_comes_with_the_version_of_its_removal_asks_under_the_next_one(
    session: Session, lived: ShadowService
) -> None:
    session.add(DeviceState(tenant_id=TENANT, site_id="s", device_id=DEVICE, desired_version=3, desired_state={"n": 9}))
    session.flush()
    assert (lived.get(DEVICE).desired_version, lived.get(DEVICE).reported_version) == (4, 3)


def test_an_object_of_an_earlier_life_deletes_no_device_of_a_later_one(own_engine: Engine) -> None:
    lived_until(own_engine, 2)
    with Session(own_engine) as old, Session(own_engine) as new:
        device = old.get_one(DeviceState, (TENANT, DEVICE))
        service = ShadowService(new, TENANT)
        service.remove(DEVICE)
        service.register(DEVICE, "berlin")
        service.replace_desired(DEVICE, {"new": 1})
        old.delete(device)
        with ThreadPoolExecutor(1) as pool:
            deleted = pool.submit(old.flush)
            time.sleep(0.2)
            new.commit()
            with pytest.raises(StaleDataError, match=f"{DEVICE}.* made again: it is another device now"):
                deleted.result()
        old.rollback()
        assert service.get(DEVICE).desired == {"new": 1}
        old.delete(old.get_one(DeviceState, (TENANT, DEVICE)))
        old.commit()
        assert [(v.version, v.desired) for v in service.history(DEVICE)][:2] == [(5, None), (4, {"new": 1})]


@pytest.mark.filterwarnings("ignore:DELETE statement on table:sqlalchemy.exc.SAWarning")
def test_an_object_whose_row_is_gone_is_deleted_as_ever(own_engine: Engine) -> None:
    lived_until(own_engine, 1)
    with Session(own_engine) as first, Session(own_engine) as second:
        devices = [session.get_one(DeviceState, (TENANT, DEVICE)) for session in (first, second)]
        for session, device in zip((first, second), devices, strict=True):
            session.delete(device)
            session.commit()
        assert [v.version for v in ShadowService(first, TENANT).history(DEVICE)] == [2, 1, 0]


def test_a_device_that_lived_and_was_removed_while_the_insert_waited_for_another_goes_on(own_engine: Engine) -> None:
    with Session(own_engine) as other, Session(own_engine) as ours, Session(own_engine) as meanwhile:
        ShadowService(other, TENANT).register("m1", "s")
        with ThreadPoolExecutor(1) as pool:
            registered = pool.submit(ShadowService(ours, TENANT).register_many, {"m1": "s", "m2": "s"})
            time.sleep(0.3)
            service = ShadowService(meanwhile, TENANT)
            service.register("m2", "s")
            service.replace_desired("m2", {"n": 1})
            service.remove("m2")
            meanwhile.commit()
            other.commit()
            assert registered.result()["m2"].desired_version == 2


def test_the_version_of_a_removal_is_no_document_to_restore(lived: ShadowService) -> None:
    lived.register(DEVICE, "berlin")
    lived.replace_desired(DEVICE, {"n": 4})
    with pytest.raises(VersionNotKept):
        lived.restore_desired(DEVICE, 3)
    assert lived.get(DEVICE).desired_version == 4


def test_once_its_removal_is_forgotten_a_device_starts_anew(session: Session, lived: ShadowService) -> None:
    session.execute(text("UPDATE device_shadow_history SET written_at = now() - INTERVAL '2 days'"))
    assert lived.prune_history(older_than=timedelta(0)) == 3
    assert [v.version for v in lived.history(DEVICE)] == [3]
    assert lived.prune_history(older_than=timedelta(0), keep=0) == 1
    assert lived.register(DEVICE, "berlin").desired_version == 0


LEVELS = ["READ COMMITTED", "AUTOCOMMIT", "REPEATABLE READ", "SERIALIZABLE"]


@pytest.mark.parametrize("level", LEVELS)
def test_while_another_transaction_removes_a_device_it_is_there_and_registering_it_waits_for_nothing(
    own_engine: Engine, level: str
) -> None:
    lived_until(own_engine, 2)
    with Session(own_engine) as removing, Session(own_engine.execution_options(isolation_level=level)) as registering:
        service = ShadowService(registering, TENANT)
        ShadowService(removing, TENANT).remove(DEVICE)
        registering.execute(text("SET lock_timeout = '2s'"))
        assert service.register(DEVICE, "berlin").desired_version == 2
        removing.commit()
        registering.commit()
        assert service.register(DEVICE, "berlin").desired_version == 3


@pytest.mark.parametrize("way", ["register", "the ORM"])
@pytest.mark.parametrize("level", LEVELS[2:])
def test_what_was_removed_since_the_snapshot_is_not_made_at_a_version_of_its_earlier_life(
    own_engine: Engine, level: str, way: str
) -> None:
    lived_until(own_engine, 2)
    with Session(own_engine) as removing, Session(own_engine.execution_options(isolation_level=level)) as registering:
        service = ShadowService(registering, TENANT)
        service.get(DEVICE)
        ShadowService(removing, TENANT).remove(DEVICE)
        removing.commit()
        if way == "register":  # as the snapshot has it: it was there
            assert service.register(DEVICE, "berlin").desired_version == 2
        else:
            with pytest.raises(StaleDataError, match=f"{DEVICE}.* was removed by another .* run all of it again"):
                AGAIN[way](service, registering)
        registering.rollback()
        AGAIN[way](service, registering)
        assert service.get(DEVICE).desired_version == 3


def test_an_object_that_is_added_while_another_transaction_removes_its_device_goes_on_all_the_same(
    own_engine: Engine,
) -> None:
    lived_until(own_engine, 2)
    with Session(own_engine) as removing, Session(own_engine) as adding, ThreadPoolExecutor(1) as pool:
        ShadowService(removing, TENANT).remove(DEVICE)
        added = pool.submit(AGAIN["the ORM"], ShadowService(adding, TENANT), adding)
        waiting = text(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        with own_engine.connect() as observer:
            while not observer.scalar(waiting):
                observer.rollback()
                assert not added.done()
        removing.commit()
        added.result()
        assert ShadowService(adding, TENANT).get(DEVICE).desired_version == 3


def test_a_device_that_is_removed_between_the_statements_of_its_registration_is_made_again(own_engine: Engine) -> None:
    lived_until(own_engine, 2)

    def remove(_connection: Connection) -> None:
        with Session(own_engine) as other, other.begin():
            ShadowService(other, TENANT).remove(DEVICE)

    with Session(own_engine) as session, at_statement(own_engine, 1, remove):
        assert ShadowService(session, TENANT).register(DEVICE, "berlin").desired_version == 3


@again
@pytest.mark.parametrize("version", [0, 3])
def test_what_is_asked_for_between_the_statements_of_a_registration_stays_as_it_was_asked_for(
    own_engine: Engine, way: str, version: int
) -> None:
    if version:
        lived_until(own_engine, version - 1)
        with Session(own_engine) as other, other.begin():
            ShadowService(other, TENANT).remove(DEVICE)

    def ask(_connection: Connection) -> None:
        with Session(own_engine) as other, other.begin():
            ShadowService(other, TENANT).replace_desired(DEVICE, {"n": 9})

    with Session(own_engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        with at_statement(own_engine, 1, ask) as begun:  # the row is inserted, and all can see it
            AGAIN[way](ShadowService(session, TENANT), session)
        assert begun[0].startswith("INSERT")
        shadow = ShadowService(session, TENANT).get(DEVICE)
    assert (shadow.desired, shadow.desired_version, shadow.reported_version) == ({"n": 9}, version + 1, version)


def test_changes_that_are_not_flushed_are_not_lost_silently_with_their_device(session: Session) -> None:
    service = ShadowService(session, TENANT)
    service.register(DEVICE, "berlin")
    device = session.get_one(DeviceState, (TENANT, DEVICE))
    session.autoflush = False
    device.desired_state["n"] = 1
    service.remove(DEVICE)
    with pytest.raises(StaleDataError):
        session.flush()


def lived_until(engine: Engine, version: int) -> None:
    with Session(engine) as session, session.begin():
        service = ShadowService(session, TENANT)
        service.register(DEVICE, "berlin")
        for n in range(version):
            service.replace_desired(DEVICE, {"n": n})
