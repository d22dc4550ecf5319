"""The models and the migrated schema are one, and the hybrids say in SQL what they say in Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import column, create_engine, delete, false, func, insert, select, text, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import aliased

from iot_models import Base, DeviceState
from iot_models._core.conditions import converged
from iot_models._core.equality import json_equal
from iot_models.twin import compute_delta
from tests.databases.devices import DEVICE, TENANT, add_device
from tests.databases.partitioned import names_of_the_whole
from tests.databases.schema_dump import dump
from tests.generated.documents import document_pairs
from tests.generated.examples import with_a_database
from tests.reference.shadows import nested_delta

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.orm import Session


def test_create_all_gives_the_schema_that_the_migrations_give(
    new_database: Callable[[], str], plain_migrated_url: str
) -> None:
    url = new_database()
    engine = create_engine(url)
    Base.metadata.create_all(engine)
    engine.dispose()

    assert dump(url) == dump(plain_migrated_url)


def test_a_device_needs_no_more_than_its_ids_and_site(session: Session) -> None:
    device = DeviceState(tenant_id=TENANT, site_id="berlin", device_id=DEVICE)
    session.add(device)
    session.flush()

    assert (device.status, device.state, device.last_seen_at) == ("OFFLINE", {}, None)
    assert (device.desired_state, device.desired_version, device.reported_version) == ({}, 0, 0)
    assert device.last_state_change_at.tzinfo is not None


def test_none_as_a_document_is_never_stored_as_json_null(session: Session) -> None:
    device = DeviceState(tenant_id=TENANT, site_id="berlin", device_id=DEVICE, desired_state=None)
    session.add(device)
    session.flush()
    assert device.desired_state == {}  # absent in an INSERT: the default

    device.reported_state = None  # type: ignore[assignment]
    with pytest.raises(IntegrityError, match="reported_state"):
        session.flush()


def test_a_device_shows_its_ids(session: Session) -> None:
    device = DeviceState(tenant_id=TENANT, site_id="berlin", device_id=DEVICE)
    session.add(device)

    assert repr(device) == "DeviceState(tenant_id='acme', device_id='thermostat-1')"


# Many devices an example: what takes time is the way to the server and back.
_fleets = st.lists(st.tuples(document_pairs, st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=25)


@with_a_database(share=0.4)
@given(fleet=_fleets)
def test_the_hybrids_are_the_same_in_python_and_in_sql(
    session: Session, fleet: list[tuple[tuple[dict[str, Any], dict[str, Any]], int, int]]
) -> None:
    savepoint = session.begin_nested()
    names = ("desired_state", "reported_state", "desired_version", "reported_version")
    session.execute(
        insert(DeviceState),
        [
            {"tenant_id": TENANT, "site_id": "berlin", "device_id": str(number)}
            | dict(zip(names, (*documents, *versions), strict=True))
            for number, (documents, *versions) in enumerate(fleet)
        ],
    )
    hybrids = (DeviceState.is_pending, DeviceState.is_converged, DeviceState.is_drifted, DeviceState.delta)
    rows = session.execute(select(DeviceState, *hybrids)).all()
    drifted = set(session.scalars(select(DeviceState.device_id).where(DeviceState.is_drifted)))

    assert len(rows) == len(fleet)
    for device, is_pending, is_converged, is_drifted, delta in rows:
        (desired, reported), desired_version, reported_version = fleet[int(device.device_id)]
        assert json_equal(delta, compute_delta(desired, reported))
        assert json_equal(device.delta, delta)
        assert device.is_pending is is_pending is (desired_version > reported_version)
        assert device.is_converged is is_converged is (nested_delta(desired, reported) == {})
        assert device.is_drifted is is_drifted is (desired_version == reported_version and not is_converged)
        assert (device.device_id in drifted) is is_drifted
    savepoint.rollback()


def test_the_hybrids_stand_wherever_a_column_may(session: Session) -> None:
    lights: dict[str, Any] = {"lights": None}
    add_device(session, "drifted", desired_state=lights, reported_state={"mode": "eco"}, reported_version=0)
    add_device(session, "in-sync", desired_state=lights, reported_state=lights | {"mode": "eco"}, reported_version=0)
    add_device(session, "pending", desired_state=lights, desired_version=1)
    other = aliased(DeviceState)

    assert session.scalars(select(DeviceState.delta).order_by(DeviceState.device_id)).all() == [lights, {}, lights]
    assert session.scalars(select(other.device_id).where(other.delta == {})).all() == ["in-sync"]
    assert session.scalars(select(DeviceState.device_id).filter_by(is_pending=True)).all() == ["pending"]
    assert session.scalars(select(other.device_id).where(other.is_converged)).all() == ["in-sync"]
    absent = select(func.count(other.is_converged)).select_from(DeviceState).outerjoin(other, false())
    assert session.scalar(absent) == 0
    assert session.scalar(select(func.count()).where(DeviceState.is_drifted)) == 1
    assert session.execute(
        select(DeviceState.device_id, other.device_id)
        .join(other, DeviceState.delta == other.delta)
        .where(DeviceState.is_drifted, other.is_pending)
    ).all() == [("drifted", "pending")]
    ordered = select(DeviceState.device_id).order_by(DeviceState.is_drifted.desc(), DeviceState.is_pending.desc())
    assert session.scalars(ordered).all() == ["drifted", "pending", "in-sync"]
    deep = select(func.count()).select_from(func.generate_series(1, 1).alias()).where(DeviceState.delta != {})
    assert session.scalars(select(DeviceState.device_id).where(deep.scalar_subquery() == 0)).all() == ["in-sync"]
    session.execute(update(DeviceState).where(DeviceState.is_drifted).values(status="STALE"))
    session.execute(delete(DeviceState).where(DeviceState.is_pending | (DeviceState.delta == {})))
    assert session.execute(select(DeviceState.device_id, DeviceState.status)).all() == [("drifted", "STALE")]


def test_the_rule_of_converged_may_stand_in_a_function_that_an_index_uses(session: Session) -> None:
    desired, reported = (column(name, JSONB) for name in ("desired", "reported"))
    rule = converged(desired, reported).compile(dialect=postgresql.dialect())  # type: ignore[no-untyped-call]
    session.execute(
        text(f"""
            CREATE FUNCTION pg_temp.is_converged(desired jsonb, reported jsonb) RETURNS boolean
              IMMUTABLE LANGUAGE sql AS $$ SELECT {rule} $$;
            CREATE TEMPORARY TABLE pairs (desired jsonb, reported jsonb);
            INSERT INTO pairs VALUES
              ('{{"a": {{"b": [1, 2]}}}}', '{{"a": {{"b": [1, 2.0], "more": 1}}}}'),
              ('{{"a": {{"b": [1, 2]}}}}', '{{"a": {{"b": [2, 1], "more": 1}}}}');
            CREATE INDEX lacking ON pairs ((1)) WHERE NOT pg_temp.is_converged(desired, reported);
            SET LOCAL enable_seqscan = off;
        """)
    )

    lacking = text("SELECT reported ->> 'a' FROM pairs WHERE NOT pg_temp.is_converged(desired, reported)")
    assert session.scalars(lacking).all() == ['{"b": [2, 1], "more": 1}']
    plan = session.scalars(text(f"EXPLAIN {lacking}")).all()
    assert any("lacking" in line for line in plan)


def test_pending_devices_are_found_by_the_partial_index(session: Session) -> None:
    session.execute(text("SET LOCAL enable_seqscan = off"))
    pending = select(DeviceState.device_id).where(DeviceState.tenant_id == TENANT, DeviceState.is_pending)
    compiled = pending.compile(session.connection(), compile_kwargs={"literal_binds": True})

    plan = "\n".join(session.scalars(text(f"EXPLAIN {compiled}")))

    assert "idx_device_state_shadow_pending" in names_of_the_whole(session.connection(), plan)
