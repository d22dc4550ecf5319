"""The data that the measurements share: the documents of a thermostat, and fleets of rows."""

from __future__ import annotations

import itertools
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeAlias

import psycopg
from rounds import timed
from sqlalchemy import Engine, make_url

from iot_models import migrate
from iot_models.engine import create_engine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    # By contender: the prefix of its devices, and for each kind of work a function that runs one turn of it.
    Works: TypeAlias = dict[str, tuple[str, dict[str, Callable[[], float]]]]

TENANT = "acme"
DEVICES = 500  # per contender: writing the same row again and again would measure the row's dead versions

DOCUMENT: dict[str, Any] = {
    "mode": "heat",
    "target_c": 21.5,
    "fan": {"speed": 2, "on": True},
    "schedule": [6, 9, 17, 22],
    "firmware": "2.8.0",
    "interval_s": 60,
    "locked": False,
    "display": {"brightness": 7, "night": None},
}
PATCH: dict[str, Any] = {"target_c": 19.0, "fan": {"speed": 3}}

# The columns that the service returns for a device. The hand-written statements return the same ones.
COLUMNS = (
    "tenant_id, device_id, desired_state, reported_state, desired_version, reported_version, shadow_updated_at, "
    "last_seen_at"
)

ROWS = """
    INSERT INTO device_state (tenant_id, site_id, device_id, status, last_heartbeat_at, last_seen_at, state,
                              desired_state, reported_state, desired_version, reported_version, shadow_updated_at,
                              refused_version, refusal, refused_at)
    SELECT %(tenant)s, 'site-' || i %% 500, %(prefix)s || lpad(i::text, 7, '0'), 'ONLINE', now(), now(),
           jsonb_build_object('temperature_c', 20 + i %% 10, 'humidity', i %% 100, 'rssi', -40 - i %% 60),
           %(document)s::jsonb, %(document)s::jsonb, 2, CASE WHEN i %% 100 = 0 THEN 1 ELSE 2 END, now(),
           CASE WHEN i %% 500 = 0 THEN 2 END, CASE WHEN i %% 500 = 0 THEN 'not now' END,
           CASE WHEN i %% 500 = 0 THEN now() END
      FROM generate_series(0, %(devices)s - 1) AS i
"""


def plain(url: str) -> str:
    """Return the URL in the form that psycopg, asyncpg and pgbench accept."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


@contextmanager
def database(server_url: str, name: str, **settings: str) -> Iterator[str]:
    """Create a migrated database with these settings on the server, and drop it afterwards."""
    with psycopg.connect(plain(server_url), autocommit=True) as server:
        server.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        server.execute(f"CREATE DATABASE {name}")
        for setting, value in settings.items():
            server.execute(f"ALTER DATABASE {name} SET {setting} = '{value}'")
        try:
            url = make_url(server_url).set(database=name).render_as_string(hide_password=False)
            migrate.upgrade(url)
            yield url
        finally:
            server.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def load(url: str, devices: int, *, tenant: str = TENANT, prefix: str = "device-") -> None:
    """Insert devices from `<prefix>0000000` on, one in a hundred pending, a fifth of them refused.

    Then vacuum, analyze and checkpoint.
    """
    with psycopg.connect(plain(url), autocommit=True) as connection:
        connection.execute(
            ROWS,
            {"tenant": tenant, "prefix": prefix, "devices": devices, "document": psycopg.types.json.Jsonb(DOCUMENT)},
        )
        connection.execute("VACUUM ANALYZE device_state")
        with suppress(psycopg.errors.InsufficientPrivilege):  # possible on a given server
            connection.execute("CHECKPOINT")  # otherwise the rows are written to the disk during a measurement


class Devices:
    """The devices of one contender in an endless cycle, and the current version of each."""

    def __init__(self, prefix: str) -> None:
        self._turn = itertools.cycle([f"{prefix}-{n:07}" for n in range(DEVICES)])
        self.versions = dict.fromkeys((f"{prefix}-{n:07}" for n in range(DEVICES)), 2)

    def next(self) -> str:
        return next(self._turn)


def engine_of(stack: ExitStack, url: str, *, autocommit: bool = False) -> Engine:
    engine = create_engine(url, **({"isolation_level": "AUTOCOMMIT"} if autocommit else {}))
    stack.callback(engine.dispose)
    return engine


def each_timed(*works: Callable[[], None]) -> dict[str, Callable[[], float]]:
    names = ("get", "replace desired", "patch desired", "report")
    return {name: timed(once) for name, once in zip(names, works, strict=True)}
