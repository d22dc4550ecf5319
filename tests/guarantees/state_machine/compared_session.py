"""A session of the service beside the model: how the state machine asks both, and changes both."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize
from sqlalchemy import text
from sqlalchemy.orm import Session

from iot_models import DeviceState, DocumentLimits, ShadowService
from tests.guarantees.state_machine.comparison import described, outcome
from tests.reference.documents import Limits
from tests.reference.fleet import Fleet
from tests.reference.shadows import Between, Device
from tests.reference.versions import IF_CONVERGED

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime
    from typing import TypeAlias

    from sqlalchemy import Engine
    from sqlalchemy.orm import SessionTransaction

    # Which of the device's versions the one acknowledged is next to, and how far; None: no version.
    Acknowledgement: TypeAlias = tuple[str, int] | str | None

PARKED = {"parked": r"device\_s%\_0%"}  # what a downgrade leaves behind
# So small that documents often pass them.
MAX_BYTES, MAX_DEPTH = 200, 4


class BothSides(RuleBasedStateMachine):
    """One caller's session, and what the model says of the same; each subclass has the engine of a database."""

    engine: Engine

    def __init__(self) -> None:
        super().__init__()
        self.model = {tenant: Fleet(tenant, Limits(MAX_BYTES, MAX_DEPTH)) for tenant in ("acme", "globex")}
        self.savepoints: list[tuple[SessionTransaction, Any]] = []
        self.objects: list[DeviceState] = []  # the session holds them by weak references
        with self.engine.begin() as connection:
            connection.execute(text("DELETE FROM device_state"))
            connection.execute(text("DELETE FROM device_shadow_history"))
            for (table,) in connection.execute(
                text("SELECT tablename FROM pg_tables WHERE tablename LIKE :parked"), PARKED
            ):
                connection.execute(text(f"DROP TABLE {table}"))

    @initialize(autocommit=st.booleans(), expire_on_commit=st.booleans())
    def open_a_session(self, autocommit: bool, expire_on_commit: bool) -> None:  # noqa: FBT001 - drawn
        self.autocommit = autocommit
        engine = self.engine.execution_options(isolation_level="AUTOCOMMIT") if autocommit else self.engine
        self.session = Session(engine, expire_on_commit=expire_on_commit)
        self.committed = self.snapshot()
        for tenant, device_id, versions in (("acme", "a1", (3, 2)), ("acme", "a2", (2, 2)), ("globex", "a1", (0, 0))):
            self.insert(tenant, device_id, Device({"a": [1, 2]}, {"a": [2, 1]}, *versions))

    def teardown(self) -> None:
        if hasattr(self, "session"):
            self.session.close()

    def service(self, tenant: str) -> ShadowService:
        return ShadowService(self.session, tenant, limits=DocumentLimits(MAX_BYTES, MAX_DEPTH))

    def compare_read(self, tenant: str, method: str, *arguments: Any) -> None:
        actual = outcome(lambda: getattr(self.service(tenant), method)(*arguments))
        expected = outcome(lambda: getattr(self.model[tenant], method)(*arguments))
        if method == "history" and isinstance(actual, list):
            actual = {version.version: version for version in actual}
        _require_agreement(method, actual, expected)

    def compare(self, tenant: str, method: str, *arguments: Any, **more: Any) -> None:
        first = self.now()
        actual = outcome(lambda: getattr(self.service(tenant), method)(*arguments, **more))
        at = Between(first, self.now())
        expected = outcome(lambda: getattr(self.model[tenant], method)(at, *arguments, **more))
        _require_agreement(method, actual, expected)

    def now(self) -> datetime:
        """The server's: in a transaction the one of all its writes, else that of this statement."""
        return self.session.connection().execute(text("SELECT now()")).scalar_one()  # type: ignore[no-any-return]

    def near(self, tenant: str, device_id: str, offset: int | None, column: str = "desired_version") -> int | None:
        device = self.model[tenant].devices.get(device_id, Device({}, {}))
        return None if offset is None else max(0, getattr(device, column) + offset)

    def acknowledging(self, tenant: str, device_id: str, acked: Acknowledgement) -> Any:
        """The arguments by which a report acknowledges."""
        if acked is None or isinstance(acked, str):
            return {"ack_if_converged": acked == IF_CONVERGED}
        return {"acked_version": self.near(tenant, device_id, acked[1], acked[0])}

    def refusing(self, tenant: str, device_id: str, offset: int | None) -> Any:
        """The arguments by which a report refuses the version that is so far from the newest."""
        if offset is None:
            return {}
        return {"refused_version": self.near(tenant, device_id, offset), "refusal": f"not {offset}"}

    def load(self, tenant: str, device_id: str) -> DeviceState | None:
        device = self.session.get(DeviceState, (tenant, device_id))
        assert (device is not None) == (device_id in self.model[tenant].devices)
        if device is not None:
            self.objects.append(device)
        return device

    def insert(self, tenant: str, device_id: str, device: Device) -> None:
        row = DeviceState(
            tenant_id=tenant,
            site_id="berlin",
            device_id=device_id,
            desired_state=device.desired,
            reported_state=device.reported,
            desired_version=device.desired_version,
            reported_version=device.reported_version,
        )
        self.session.add(row)
        self.session.flush()
        self.objects.append(row)
        self.model[tenant].add(device_id, device)

    @contextmanager
    def desired_written(self, tenant: str, device_id: str, document: Any) -> Iterator[None]:
        first = self.now()
        yield
        self.model[tenant].write_desired(Between(first, self.now()), device_id, document)

    def snapshot(self) -> Any:
        return {
            tenant: (dict(fleet.devices), dict(fleet.parked), dict(fleet.versions))
            for tenant, fleet in self.model.items()
        }

    def restore(self, snapshot: Any) -> None:
        for tenant, (rows, parked, versions) in snapshot.items():
            fleet = self.model[tenant]
            fleet.devices, fleet.parked, fleet.versions = dict(rows), dict(parked), dict(versions)


def _require_agreement(method: str, actual: object, expected: object) -> None:
    assert described(actual) == described(expected), f"{method}: {actual!r} and not, as the model says, {expected!r}"
