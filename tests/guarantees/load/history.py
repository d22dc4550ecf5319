"""The database's own account of its shadows: every change of one, in order, kept by a trigger in the same transaction.

A second witness beside the writers' records. Changes of one device are made, and numbered, while its row is locked:
so their numbers are their order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from sqlalchemy import insert, text

from iot_models import DeviceState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import Connection, Engine, Row

Key: TypeAlias = tuple[str, str]  # tenant_id, device_id


class State(NamedTuple):
    """A device's shadow at one moment."""

    desired_version: int
    reported_version: int
    desired: dict[str, Any]
    reported: dict[str, Any]


class Change(NamedTuple):
    """A device and how it stood after one UPDATE."""

    key: Key
    state: State


# to_jsonb, so that the trigger works, and keeps nothing, while the table is rolled back to revision 075.
_TRIGGER: Final = """
CREATE TABLE shadow_history (
    id bigint GENERATED ALWAYS AS IDENTITY, tenant_id text, device_id text,
    desired_version int, reported_version int, desired_state jsonb, reported_state jsonb);
CREATE FUNCTION keep_shadow_history() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    before jsonb := to_jsonb(OLD);
    after jsonb := to_jsonb(NEW);
BEGIN
    IF (before->'desired_version', before->'reported_version', before->'desired_state', before->'reported_state')
        IS DISTINCT FROM
       (after->'desired_version', after->'reported_version', after->'desired_state', after->'reported_state')
    THEN
        INSERT INTO shadow_history
            (tenant_id, device_id, desired_version, reported_version, desired_state, reported_state)
        VALUES (after->>'tenant_id', after->>'device_id', (after->>'desired_version')::int,
            (after->>'reported_version')::int, after->'desired_state', after->'reported_state');
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER keep_shadow_history AFTER UPDATE ON device_state
    FOR EACH ROW EXECUTE FUNCTION keep_shadow_history();
"""
_COLUMNS: Final = "tenant_id, device_id, desired_version, reported_version, desired_state, reported_state"


def keep_history(engine: Engine, devices: Iterable[Key]) -> None:
    """Put these devices into a migrated database and have every change of a shadow kept from now on."""
    rows = [{"tenant_id": tenant, "site_id": "berlin", "device_id": device} for tenant, device in devices]
    with engine.begin() as connection:
        connection.execute(insert(DeviceState), rows)
        connection.exec_driver_sql(_TRIGGER)


def read_history(connection: Connection) -> list[Change]:
    """Every change that was committed, in the order of each device."""
    return [_change(row) for row in connection.execute(text(f"SELECT {_COLUMNS} FROM shadow_history ORDER BY id"))]


def read_rows(connection: Connection) -> dict[Key, State]:
    """How every device stands."""
    return dict(_change(row) for row in connection.execute(text(f"SELECT {_COLUMNS} FROM device_state")))


def forget_history(connection: Connection) -> None:
    """Begin anew: what was checked needs no second look."""
    connection.execute(text("TRUNCATE shadow_history"))


def _change(row: Row[*tuple[Any, ...]]) -> Change:
    tenant, device, *state = row
    return Change((tenant, device), State(*state))
