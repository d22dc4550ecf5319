"""Whatever is done in whatever order: the service answers, and the table holds, what the reference model says.

Every run takes the same steps, and shows the first sequence that fails as it is. `IOT_MODELS_TEST_EXAMPLES=1000` tries
that many other sequences, and takes up to five minutes to find the shortest that fails.
"""

from __future__ import annotations

import json
import os
import typing
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import inspect, text
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError

from iot_models import DeviceState, InvalidDocument, Report, ShadowService
from tests.databases.alembic_runs import downgrade, upgrade
from tests.guarantees.state_machine.compared_session import BothSides
from tests.guarantees.state_machine.comparison import (
    columns,
    described,
    shown_columns,
    stored_rows,
    stored_versions,
)
from tests.guarantees.state_machine.steps import (
    AS_ASKED,
    acknowledgements,
    any_documents,
    devices,
    documents,
    expectations,
    no_json,
    offsets,
    rarely,
    reporting,
    reports,
    requests,
    some_devices,
    spelled,
    spellings,
    tenants,
)
from tests.reference.shadows import Between, Device

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine

    from tests.guarantees.state_machine.compared_session import Acknowledgement

pytestmark = pytest.mark.repeats

EXAMPLES = os.environ.get("IOT_MODELS_TEST_EXAMPLES")
PARTS = 4  # which run in parallel
SETTINGS = settings(
    max_examples=max(1, int(EXAMPLES or 60) // PARTS),
    stateful_step_count=30,
    phases=list(Phase) if EXAMPLES else [Phase.generate],
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

HOUR = timedelta(hours=1)


class ServiceAndModel(BothSides):
    """One session of one caller, beside the model; now and then somebody else's, between transactions."""

    # The service, reading

    @rule(tenant=tenants, device_ids=some_devices)
    def read(self, tenant: str, device_ids: list[str]) -> None:
        self.compare_read(tenant, "get_many", device_ids)
        for device_id in device_ids:
            self.compare_read(tenant, "get", device_id)
            self.compare_read(tenant, "history", device_id)
            for version in (0, 1, 3, 4):
                self.compare_read(tenant, "desired_at", device_id, version)

    @rule(tenant=tenants, size=st.integers(1, 3), later=st.sampled_from((timedelta(0), HOUR)))
    def ask_about_the_fleet(self, tenant: str, size: int, later: timedelta) -> None:
        service, model = self.service(tenant), self.model[tenant]
        for page_of, expected in (
            (service.pending, model.pending()),
            (service.drifted, model.drifted()),
            (service.refused, model.refused()),
        ):
            walked = page = page_of(limit=size)
            while page:
                page = page_of(limit=size, after=page[-1].device_id)
                walked = walked + page
            assert described(walked) == described(list(expected.values()))
        assert described(list(service.iter_pending(batch_size=size))) == described(list(model.pending().values()))
        assert service.count_pending() == len(model.pending())
        assert service.count_refused() == model.count_refused()
        now = datetime.now(UTC) + later
        assert service.status_counts(now=now) == model.status_counts(now)

    # The service, writing

    @rule(tenant=tenants, device_id=devices, document=any_documents, expectations=expectations, request=requests)
    def replace_desired(
        self, tenant: str, device_id: str, document: Any, expectations: list[int | None], request: str | None
    ) -> None:
        for offset in expectations:
            how: Any = {
                "expected_version": self.near(tenant, device_id, offset),
                "request_id": request,
                "reason": "new",
            }
            self.compare(tenant, "replace_desired", device_id, document, **how)

    @rule(tenant=tenants, device_id=devices, patch=any_documents, expectations=expectations, request=requests)
    def patch_desired(
        self, tenant: str, device_id: str, patch: Any, expectations: list[int | None], request: str | None
    ) -> None:
        for offset in expectations:
            how: Any = {"expected_version": self.near(tenant, device_id, offset), "request_id": request}
            self.compare(tenant, "patch_desired", device_id, patch, **how)

    @rule(tenant=tenants, device_id=devices, back=st.integers(-1, 3), expectations=expectations, request=requests)
    def restore_desired(
        self, tenant: str, device_id: str, back: int, expectations: list[int | None], request: str | None
    ) -> None:
        version = self.near(tenant, device_id, -back) or 0
        for offset in expectations:
            how: Any = {"expected_version": self.near(tenant, device_id, offset), "request_id": request}
            self.compare(tenant, "restore_desired", device_id, version, **how)

    @rule(tenant=tenants, device_id=devices, offset=offsets)
    def refuse_desired(self, tenant: str, device_id: str, offset: int) -> None:
        version = self.near(tenant, device_id, offset) or 0
        self.compare(tenant, "refuse_desired", device_id, version, f"not {version}")

    @rule(tenant=tenants, device_id=devices)
    def register(self, tenant: str, device_id: str) -> None:
        self.compare(tenant, "register", device_id, "berlin")

    @rule(tenant=tenants, device_ids=some_devices)
    def register_many(self, tenant: str, device_ids: list[str]) -> None:
        self.compare(tenant, "register_many", dict.fromkeys(device_ids, "berlin"))

    @rule(tenant=tenants, device_id=devices, expectations=expectations)
    def remove(self, tenant: str, device_id: str, expectations: list[int | None]) -> None:
        for offset in expectations[:2]:
            version = self.near(tenant, device_id, offset)
            self.compare(tenant, "remove", device_id, expected_version=version, reason="scrapped")

    @rule(happens=rarely, tenant=tenants, keep=st.integers(0, 2))
    def prune_history(self, happens: bool, tenant: str, keep: int) -> None:  # noqa: FBT001 - drawn
        if happens:
            self.commit()  # what this transaction wrote is not old
            deleted = self.service(tenant).prune_history(older_than=timedelta(0), keep=keep)
            assert deleted == self.model[tenant].prune_history(Between(self.now(), self.now()), keep)

    @rule(tenant=tenants, device_id=devices, document=any_documents, acknowledgements=acknowledgements)
    def replace_reported(
        self, tenant: str, device_id: str, document: Any, acknowledgements: list[Acknowledgement]
    ) -> None:
        for acked in acknowledgements:
            how = self.acknowledging(tenant, device_id, acked)
            self.compare(tenant, "replace_reported", device_id, document, **how)

    @rule(tenant=tenants, device_id=devices, patch=any_documents, acknowledgements=acknowledgements)
    def patch_reported(self, tenant: str, device_id: str, patch: Any, acknowledgements: list[Acknowledgement]) -> None:
        for acked in acknowledgements:
            how = self.acknowledging(tenant, device_id, acked)
            self.compare(tenant, "patch_reported", device_id, patch, **how)

    @rule(tenant=tenants, device_id=devices, spellings=spellings, by_version=st.booleans(), by=reporting)
    def report_what_was_asked(
        self,
        tenant: str,
        device_id: str,
        spellings: list[str],
        by_version: bool,  # noqa: FBT001 - drawn
        by: str,
    ) -> None:
        device = self.model[tenant].devices.get(device_id)
        if device is not None:
            how: Any = {"acked_version": device.desired_version} if by_version else {"ack_if_converged": True}
            for spelling in spellings:
                reported = spelled(device.desired, spelling)
                if by.endswith("_many"):
                    self.compare(tenant, by, [Report(device_id, reported, **how)])
                else:
                    self.compare(tenant, by, device_id, reported, **how)

    @rule(
        tenant=tenants,
        batch=st.dictionaries(devices, any_documents, max_size=4),
        expected=st.dictionaries(devices, offsets, max_size=2),
    )
    def replace_desired_many(self, tenant: str, batch: dict[str, Any], expected: dict[str, int]) -> None:
        versions = {
            device_id: self.near(tenant, device_id, n) for device_id, n in expected.items() if device_id in batch
        }
        self.compare(tenant, "replace_desired_many", batch, expected_versions=versions)

    @rule(tenant=tenants, device_ids=some_devices, patch=any_documents)
    def patch_desired_many(self, tenant: str, device_ids: list[str], patch: Any) -> None:
        self.compare(tenant, "patch_desired_many", device_ids, patch)

    @rule(tenant=tenants, reports=reports)
    def replace_reported_many(self, tenant: str, reports: list[tuple[str, Any, Acknowledgement, int | None]]) -> None:
        self.compare(tenant, "replace_reported_many", self._batch(tenant, reports))

    @rule(tenant=tenants, reports=reports)
    def patch_reported_many(self, tenant: str, reports: list[tuple[str, Any, Acknowledgement, int | None]]) -> None:
        self.compare(tenant, "patch_reported_many", self._batch(tenant, reports))

    def _batch(self, tenant: str, reports: list[tuple[str, Any, Acknowledgement, int | None]]) -> list[Report]:
        """Where the document is `AS_ASKED`, the one that was asked for when the batch began."""
        return [
            Report(
                device_id,
                self.model[tenant].devices.get(device_id, Device({}, {})).desired if reported is AS_ASKED else reported,
                **self.acknowledging(tenant, device_id, acked),
                **self.refusing(tenant, device_id, refused),
            )
            for device_id, reported, acked, refused in reports
        ]

    # Objects

    @rule(tenant=tenants, device_id=devices, refused=no_json, document=documents, by_autoflush=st.booleans())
    def assign_desired(self, tenant: str, device_id: str, refused: Any, document: Any, by_autoflush: bool) -> None:  # noqa: FBT001 - drawn
        device = self.load(tenant, device_id)
        if device is not None:
            with pytest.raises(InvalidDocument):
                device.desired_state = refused
            self.every_row_and_every_loaded_object_is_the_models()
            with self.desired_written(tenant, device_id, document):
                device.desired_state = document
                if by_autoflush:
                    self.service(tenant).get(device_id)
                else:
                    self.session.flush()

    @rule(tenant=tenants, device_id=devices, place=st.integers(0, 9), value=documents)
    def change_inside_desired(self, tenant: str, device_id: str, place: int, value: Any) -> None:
        device = self.load(tenant, device_id)
        if device is not None:
            changed = json.loads(json.dumps(self.model[tenant].get(device_id).desired))
            paths = list(_containers(changed))
            path = paths[place % len(paths)]
            with self.desired_written(tenant, device_id, changed):
                for document in (changed, device.desired_state):
                    container = _at(document, path)
                    if isinstance(container, dict):
                        container["b"] = value
                    else:
                        container.append(value)
                self.session.flush()

    @rule(tenant=tenants, device_id=devices, silent=st.sampled_from((timedelta(0), HOUR)), reported=documents)
    def write_other_columns(self, tenant: str, device_id: str, silent: timedelta, reported: Any) -> None:
        device = self.load(tenant, device_id)
        if device is not None:
            seen = datetime.now(UTC) - silent
            device.status, device.last_seen_at, device.reported_state = "ONLINE", seen, reported
            self.session.flush()
            self.model[tenant].change(device_id, status="ONLINE", last_seen_at=seen, reported=reported)

    @rule(
        tenant=tenants,
        device_id=devices,
        desired=documents,
        reported=documents,
        # The last: after a restore that left desired behind.
        versions=st.sampled_from(((0, 0), (2, 2), (3, 1), (1, 3))),
    )
    def insert_or_delete(
        self, tenant: str, device_id: str, desired: Any, reported: Any, versions: tuple[int, int]
    ) -> None:
        device = self.load(tenant, device_id)
        if device is None:
            self.insert(tenant, device_id, Device(desired, reported, *versions))
        else:
            first = self.now()
            self.session.delete(device)
            self.session.flush()
            self.model[tenant].remove(Between(first, self.now()), device_id)

    @rule()
    def expire_everything(self) -> None:
        self.session.expire_all()

    # Transactions

    @rule()
    def commit(self) -> None:
        self.session.commit()
        self.savepoints.clear()
        self.committed = self.snapshot()

    @rule()
    def roll_back(self) -> None:
        self.session.rollback()
        self.savepoints.clear()
        if not self.autocommit:
            self.restore(self.committed)

    @precondition(lambda self: not self.autocommit and len(self.savepoints) < 3)
    @rule()
    def set_a_savepoint(self) -> None:
        self.savepoints.append((self.session.begin_nested(), self.snapshot()))

    @precondition(lambda self: self.savepoints)
    @rule()
    def release_a_savepoint(self) -> None:
        savepoint, _ = self.savepoints.pop()
        savepoint.commit()

    @precondition(lambda self: self.savepoints)
    @rule()
    def roll_back_to_a_savepoint(self) -> None:
        savepoint, snapshot = self.savepoints.pop()
        savepoint.rollback()
        self.restore(snapshot)

    @precondition(lambda self: not self.autocommit)
    @rule(tenant=tenants, device_id=devices, patch=documents, reported=documents)
    def write_in_vain(self, tenant: str, device_id: str, patch: Any, reported: Any) -> None:
        """What most savepoints are for."""
        self.load(tenant, device_id)
        self.set_a_savepoint()
        self.compare(tenant, "patch_desired_many", [device_id], patch)
        self.compare(tenant, "replace_reported_many", [Report(device_id, reported)])
        self.every_row_and_every_loaded_object_is_the_models()
        self.roll_back_to_a_savepoint()

    @rule(tenant=tenants, device_id=devices, theirs=documents, ours=documents)
    def lose_a_race(self, tenant: str, device_id: str, theirs: Any, ours: Any) -> None:
        """What we loaded is overtaken by another session's write."""
        self.commit()
        device = self.load(tenant, device_id)
        if device is not None:
            assert device.desired_version == self.model[tenant].get(device_id).desired_version
            with Session(self.engine) as other, other.begin():
                at = other.scalar(text("SELECT now()"))
                ShadowService(other, tenant).replace_desired(device_id, theirs)
            self.model[tenant].write_desired(Between(at, at), device_id, theirs)
            self.committed = self.snapshot()
            device.desired_state = ours
            with pytest.raises(StaleDataError):
                self.session.flush()
            self.session.rollback()

    @rule(
        happens=rarely,
        gone=st.sets(st.tuples(tenants, devices), max_size=2),
        new=st.sets(st.tuples(tenants, devices), max_size=2),
    )
    def roll_the_migration_back_and_upgrade_again(
        self,
        happens: bool,  # noqa: FBT001 - drawn
        gone: set[tuple[str, str]],
        new: set[tuple[str, str]],
    ) -> None:
        """In between the old release goes on: devices leave, come, and come back."""
        if not happens:
            return
        self.commit()
        self.session.close()
        url = self.engine.url.render_as_string(hide_password=False)
        try:
            downgrade(url, "075")
            with self.engine.begin() as connection:
                for tenant, device_id in gone:
                    key = {"tenant": tenant, "device": device_id}
                    connection.execute(
                        text("DELETE FROM device_state WHERE (tenant_id, device_id) = (:tenant, :device)"), key
                    )
                for tenant, device_id in new:
                    key = {"tenant": tenant, "device": device_id}
                    connection.execute(
                        text("INSERT INTO device_state VALUES (:tenant, 'berlin', :device) ON CONFLICT DO NOTHING"), key
                    )
        finally:
            upgrade(url)
        for fleet in self.model.values():
            fleet.downgrade()
        for tenant, device_id in gone:
            self.model[tenant].devices.pop(device_id, None)
            self.model[tenant].parked.pop(device_id, None)  # a shadow goes with its device
        for tenant, device_id in new:
            self.model[tenant].devices.setdefault(device_id, Device({}, {}))
        for fleet in self.model.values():
            fleet.upgrade()
        self.committed = self.snapshot()

    # What holds after every step

    @invariant()
    def every_row_and_every_loaded_object_is_the_models(self) -> None:
        expected = {
            (tenant, device_id): columns(device)
            for tenant, fleet in self.model.items()
            for device_id, device in fleet.devices.items()
        }
        assert stored_rows(self.session.connection()) == expected
        assert stored_versions(self.session.connection()) == {
            (tenant, device_id, number): described(version)
            for tenant, fleet in self.model.items()
            for device_id, versions in fleet.versions.items()
            for number, version in versions.items()
        }
        for device in self.session.identity_map.values():
            assert isinstance(device, DeviceState)
            key = typing.cast("tuple[str, str]", inspect(device).identity)
            # An expired object shows nothing, and may have no row: a rollback in AUTOCOMMIT mode brings a deleted one back.
            shown = shown_columns(device)
            assert shown == {name: expected[key][name] for name in shown}


@pytest.mark.parametrize("part", range(PARTS))
def test_the_service_and_a_plain_model_agree_after_every_step(own_engine: Engine, part: int) -> None:
    class OnThisDatabase(ServiceAndModel):
        engine = own_engine

    machine = OnThisDatabase if EXAMPLES else seed(part)(OnThisDatabase)
    run_state_machine_as_test(machine, settings=SETTINGS)


def _containers(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The way to each object and array of a document, in an order that its keys' order has no part in."""
    if isinstance(value, dict | list):
        yield path
        for key in sorted(value) if isinstance(value, dict) else range(len(value)):
            yield from _containers(value[key], (*path, key))


def _at(document: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        document = document[key]
    return document
