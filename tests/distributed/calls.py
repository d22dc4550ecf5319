"""What is called on a plain and on a distributed table: every method of the service, and the ORM."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import text

from iot_models import DeviceState, Report, ShadowService

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy.orm import Session

    Call = Callable[[ShadowService, Session], Any]

FLEET: Final = [f"d{n:02}" for n in range(20)]
OLD: Final = timedelta(days=1)


def _documents(value: object) -> dict[str, dict[str, object]]:
    return {device_id: {"v": value, "list": [1, {"é": None}]} for device_id in FLEET}


def _reports(**options: Any) -> list[Report]:
    return [Report(device_id, {"v": device_id}, **options) for device_id in FLEET]


def _changed_in_place(_service: ShadowService, session: Session) -> object:
    device = session.get_one(DeviceState, (_service.tenant_id, "d03"))
    device.desired_state["in_place"] = True
    session.flush()
    return device.desired_version


def _added(service: ShadowService, session: Session) -> object:
    device = DeviceState(tenant_id=service.tenant_id, site_id="s", device_id="orm", desired_state={"a": 1})
    session.add(device)
    session.flush()
    return device.desired_version


def _deleted(service: ShadowService, session: Session) -> object:
    session.delete(session.get_one(DeviceState, (service.tenant_id, "d04")))
    session.flush()
    # What was pruned before is not the same where several versions are equally old.
    return [(version.version, version.desired) for version in service.history("d04", limit=1)]


def _read_in_sql(service: ShadowService, session: Session) -> object:
    rows = session.query(DeviceState.device_id, DeviceState.is_drifted, DeviceState.is_pending, DeviceState.delta)
    return sorted(map(tuple, rows.filter_by(tenant_id=service.tenant_id)))


def _savepoint(service: ShadowService, session: Session) -> object:
    with session.begin_nested() as savepoint:
        service.replace_desired("a", {"gone": True})
        savepoint.rollback()
    return service.get("a").desired


# In this order: each call finds what those before it left. Some are refused.
CALLS: Final[Mapping[str, Call]] = {
    "register": lambda service, _: service.register("a", "s"),
    "register again": lambda service, _: service.register("a", "s"),
    "register_many": lambda service, _: service.register_many(dict.fromkeys(FLEET, "s")),
    "replace_desired": lambda service, _: service.replace_desired(
        "a", {"m": 1, "n": {"deep": [1, 2]}}, reason="because"
    ),
    "replace_desired, guarded": lambda service, _: service.replace_desired("a", {"m": 2}, expected_version=1),
    "replace_desired, conflict": lambda service, _: service.replace_desired("a", {"m": 3}, expected_version=1),
    "replace_desired, unknown": lambda service, _: service.replace_desired("nobody", {}),
    "replace_desired, once": lambda service, _: service.replace_desired("a", {"m": 4}, request_id="r"),
    "replace_desired, repeated": lambda service, _: service.replace_desired("a", {"m": 4}, request_id="r"),
    "replace_desired, reused": lambda service, _: service.replace_desired("a", {"m": 5}, request_id="r"),
    "patch_desired": lambda service, _: service.patch_desired("a", {"p": {"q": 1}, "m": None}),
    "patch_desired, once": lambda service, _: service.patch_desired("a", {"p": {"r": 1}}, request_id="p"),
    "patch_desired, repeated": lambda service, _: service.patch_desired("a", {"p": {"r": 1}}, request_id="p"),
    "restore_desired": lambda service, _: service.restore_desired("a", 1, request_id="back"),
    "restore_desired, repeated": lambda service, _: service.restore_desired("a", 1, request_id="back"),
    "restore_desired, not kept": lambda service, _: service.restore_desired("a", 99),
    "replace_desired_many": lambda service, _: service.replace_desired_many(_documents(1)),
    "replace_desired_many, again": lambda service, _: service.replace_desired_many(
        _documents(2), expected_versions={"d01": 1}, reason="all of them"
    ),
    "replace_desired_many, rejected": lambda service, _: service.replace_desired_many(
        _documents(3) | {"nobody": {}}, expected_versions={"d02": 1}
    ),
    "patch_desired_many": lambda service, _: service.patch_desired_many(FLEET, {"w": 1}),
    "replace_reported": lambda service, _: service.replace_reported("a", {"m": 1}, acked_version=1),
    "replace_reported, late": lambda service, _: service.replace_reported("a", {"m": 1}, acked_version=0),
    "replace_reported, unknown version": lambda service, _: service.replace_reported("a", {"m": 1}, acked_version=99),
    "replace_reported, converged": lambda service, _: service.replace_reported(
        "a", {"m": 1, "n": {"deep": [1, 2], "more": 1}}, ack_if_converged=True
    ),
    "patch_reported": lambda service, _: service.patch_reported("a", {"more": {"x": 1}}),
    "patch_reported, converged": lambda service, _: service.patch_reported("a", {"m": 1}, ack_if_converged=True),
    "replace_reported_many": lambda service, _: service.replace_reported_many(_reports(acked_version=1)),
    "replace_reported_many, mixed": lambda service, _: service.replace_reported_many(
        [
            *_reports(acked_version=2),
            Report("d01", {}, 0),
            Report("nobody", {}),
            Report("d02", {}, 99),
            Report("d02", {"l": 1}),
        ]
    ),
    "replace_reported_many, converged": lambda service, _: service.replace_reported_many(
        _reports(ack_if_converged=True)
    ),
    "replace_reported_many, refused": lambda service, _: service.replace_reported_many(
        [Report("d05", {}, refused_version=3, refusal="too hot"), Report("d06", {}, refused_version=1, refusal="late")]
    ),
    "patch_reported_many": lambda service, _: service.patch_reported_many(_reports(acked_version=2)),
    "refuse_desired": lambda service, _: service.refuse_desired("d07", 3, "no"),
    "refuse_desired, late": lambda service, _: service.refuse_desired("d07", 1, "no"),
    "get": lambda service, _: service.get("a"),
    "get_many": lambda service, _: service.get_many(["d01", "a", "nobody"]),
    "pending": lambda service, _: service.pending(limit=5),
    "pending, a later page": lambda service, _: service.pending(limit=5, after="d04"),
    "iter_pending": lambda service, _: list(service.iter_pending(batch_size=3)),
    "count_pending": lambda service, _: service.count_pending(),
    "drifted": lambda service, _: service.drifted(),
    "refused": lambda service, _: service.refused(),
    "count_refused": lambda service, _: service.count_refused(),
    "status_counts": lambda service, _: service.status_counts(),
    "history": lambda service, _: service.history("a"),
    "history, a later page": lambda service, _: service.history("a", limit=2, before=4),
    "desired_at": lambda service, _: service.desired_at("a", 1),
    "desired_at, not kept": lambda service, _: service.desired_at("a", 99),
    "changes": lambda service, _: service.changes(limit=7).changes,
    "prune_history": lambda service, _: service.prune_history(older_than=OLD),
    "prune_history, all but the newest": lambda service, _: service.prune_history(older_than=timedelta(), limit=5),
    "prune_history, keep 0": lambda service, _: service.prune_history(older_than=timedelta(), keep=0, limit=3),
    "remove, conflict": lambda service, _: service.remove("a", expected_version=0),
    "remove": lambda service, _: service.remove("a", reason="scrapped"),
    "register, a second life": lambda service, _: service.register("a", "s"),
    "replace_desired, without history": lambda service, session: ShadowService(
        session, service.tenant_id, history=False
    ).replace_desired("a", {"x": 1}),
    "replace_desired_many, without history": lambda service, session: ShadowService(
        session, service.tenant_id, history=False
    ).replace_desired_many(_documents(4)),
    "replace_desired, notify": lambda service, session: ShadowService(
        session, service.tenant_id, notify=True
    ).replace_desired("a", {"x": 2}),
    "ORM: changed in place": _changed_in_place,
    "ORM: added": _added,
    "ORM: deleted": _deleted,
    "ORM: what SQL computes": _read_in_sql,
    "locked by hand": lambda service, session: session.execute(
        text("SELECT device_id FROM device_state WHERE tenant_id = :t AND device_id = 'a' FOR UPDATE"),
        {"t": service.tenant_id},
    ).scalar(),
}
# Only in a transaction.
TRANSACTIONAL: Final[Mapping[str, Call]] = {"savepoint": _savepoint}
