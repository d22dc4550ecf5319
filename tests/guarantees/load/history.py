"""The database's own account of its shadows: every change of one, in order, kept by a trigger in the same transaction.

A second witness beside the writers' records. Changes of one device are made, and numbered, while its row is locked:
so their numbers are their order.

This is the log of changes. Our own history, the table `device_shadow_history` that the product writes, is read here,
too: the checker compares it with the log.
"""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from sqlalchemy import insert, text

from iot_models import DeviceState
from tests.reference.versions import refusal_after

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sqlalchemy import Connection, Engine, Row

Key: TypeAlias = tuple[str, str]  # tenant_id, device_id
# As a refusal: the table is rolled back to a revision before refusals, which are parked.
PARKED: Final = "(parked)"


class State(NamedTuple):
    """A device at one moment.

    Attributes:
        desired_version: Of a device that is not there: the version of its removal.
        reported_version: The same.
        desired: Its document.
        reported: Its document.
        refusal: Why it refuses `desired_version`; None if it does not, or acknowledged it in the end.
        is_there: Whether there is a row.
    """

    desired_version: int
    reported_version: int
    desired: dict[str, Any]
    reported: dict[str, Any]
    refusal: str | None = None
    is_there: bool = True


class Change(NamedTuple):
    """A device and how it stood after one statement; if that deleted the row, how it stood before.

    `site` is the `site_id` that a row was inserted with, and None for a change of another kind.
    """

    key: Key
    state: State
    site: str | None = None


class Kept(NamedTuple):
    """A row of our own history; the document is None for a removal."""

    document: dict[str, Any] | None
    request: str | None = None
    reason: str | None = None


class Fleet(NamedTuple):
    """How every device stands, also those that were removed, and the rows of our own history by version."""

    states: Mapping[Key, State]
    kept: Mapping[Key, Mapping[int, Kept]]


# jsonb, so that the trigger works while the table is rolled back; at revision 075 it keeps nothing of an UPDATE.
_TRIGGER: Final = """
CREATE TABLE shadow_changes (
    id bigint GENERATED ALWAYS AS IDENTITY, transaction text, operation text, knows_refusals boolean,
    tenant_id text, device_id text, site_id text,
    desired_version int, reported_version int, desired_state jsonb, reported_state jsonb,
    refused_version int, refusal text);
CREATE FUNCTION keep_shadow_changes() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    before jsonb := to_jsonb(OLD);
    after jsonb := to_jsonb(NEW);
BEGIN
    IF TG_OP <> 'UPDATE' OR
        (before->'desired_version', before->'reported_version', before->'desired_state', before->'reported_state',
         before->'refused_version', before->'refusal')
        IS DISTINCT FROM
        (after->'desired_version', after->'reported_version', after->'desired_state', after->'reported_state',
         after->'refused_version', after->'refusal')
    THEN
        INSERT INTO shadow_changes (transaction, operation, knows_refusals, tenant_id, device_id, site_id,
            desired_version, reported_version, desired_state, reported_state, refused_version, refusal)
        SELECT pg_current_xact_id(), TG_OP, coalesce(after, before) ? 'refused_version', tenant_id, device_id, site_id,
            desired_version, reported_version, desired_state, reported_state, refused_version, refusal
        FROM jsonb_populate_record(NULL::shadow_changes, coalesce(after, before));
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER keep_shadow_changes AFTER INSERT OR UPDATE OR DELETE ON device_state
    FOR EACH ROW EXECUTE FUNCTION keep_shadow_changes();
"""
_SHADOW: Final = "desired_version, reported_version, desired_state, reported_state, refused_version, refusal"


def keep_history(engine: Engine, devices: Iterable[Key]) -> None:
    """Put these devices into a migrated database and have every change of a shadow kept from now on.

    The time of their shadows is known: a version of which nobody knows the time is old enough to be pruned.
    """
    now = datetime.now(UTC)
    rows = [
        {"tenant_id": tenant, "site_id": "berlin", "device_id": device, "shadow_updated_at": now}
        for tenant, device in devices
    ]
    with engine.begin() as connection:
        connection.execute(insert(DeviceState), rows)
        connection.exec_driver_sql(_TRIGGER)


def read_history(connection: Connection) -> list[Change]:
    """Every change that was committed, in the order of each device."""
    columns = f"tenant_id, device_id, {_SHADOW}, operation, knows_refusals, site_id, transaction"
    changes: list[Change] = []
    inserted: dict[tuple[Key, str], int] = {}  # by device and transaction: the place of the INSERT of the row
    for row in connection.execute(text(f"SELECT {columns} FROM shadow_changes ORDER BY id")):
        key, state = _key(row), _state(row)
        if row.operation == "DELETE":
            state = state._replace(is_there=False)
        elif not row.knows_refusals:
            state = state._replace(refusal=PARKED)
        place = inserted.get((key, row.transaction))
        if row.operation == "INSERT":
            inserted[key, row.transaction] = len(changes)
        elif place is not None and _went_on(changes[place].state, state):
            # Registered at an older version, and moved to that of a removal in the same transaction: nobody saw it.
            changes[place] = changes[place]._replace(state=state)
            continue
        changes.append(Change(key, state, row.site_id if row.operation == "INSERT" else None))
    return changes


def _went_on(one: State, other: State) -> bool:
    """Whether only its versions differ, and nothing is pending: a restore of the empty document leaves it pending."""
    is_same = one == other._replace(desired_version=one.desired_version, reported_version=one.reported_version)
    return is_same and other.desired_version == other.reported_version


def read_fleet(connection: Connection) -> Fleet:
    """How every device stands, and our own history."""
    kept: dict[Key, dict[int, Kept]] = defaultdict(dict)
    states: dict[Key, State] = {}
    columns = "tenant_id, device_id, desired_version, desired_state, request_id, reason"
    rows = connection.execute(
        text(f"SELECT {columns} FROM device_shadow_history WHERE desired_version >= 0 ORDER BY desired_version")
    )
    for tenant, device, version, document, request, reason in rows:
        kept[tenant, device][version] = Kept(document, request, reason)
        if document is None:
            states[tenant, device] = gone_at(version)  # unless there is a row
    devices = connection.execute(text(f"SELECT tenant_id, device_id, {_SHADOW} FROM device_state"))
    return Fleet(states | {_key(row): _state(row) for row in devices}, kept)


def gone_at(version: int) -> State:
    """A device that was removed at this version, or never was there (0)."""
    return State(version, version, {}, {}, None, is_there=False)


def forget_history(connection: Connection) -> None:
    """Begin the log of changes anew: what was checked needs no second look."""
    connection.execute(text("TRUNCATE shadow_changes"))


def _key(row: Row[*tuple[Any, ...]]) -> Key:
    return row.tenant_id, row.device_id


def _state(row: Row[*tuple[Any, ...]]) -> State:
    versions = row.desired_version, row.reported_version
    refusal = refusal_after(row.refusal, row.refused_version, *versions)
    return State(*versions, row.desired_state, row.reported_state, refusal)
