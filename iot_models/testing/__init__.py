"""Servers and databases for tests, and a small fleet: for pytest (our plugin uses this), `unittest` and scripts.

The throwaway server is in `iot_models.testing.throwaway`. The servers need the extra `testing`; containers also need
the extra `containers`.

Example:
    >>> with postgres_server() as server, database(server) as url:
    ...     migrate.upgrade(url)
"""

from iot_models.testing.sample_fleet import SampleFleet, add_sample_fleet
from iot_models.testing.servers import (
    DEFAULT_IMAGE,
    IMAGE_VARIABLE,
    URL_VARIABLE,
    NoServerError,
    PostgresServer,
    database,
    postgres_server,
)

__all__ = [
    "DEFAULT_IMAGE",
    "IMAGE_VARIABLE",
    "URL_VARIABLE",
    "NoServerError",
    "PostgresServer",
    "SampleFleet",
    "add_sample_fleet",
    "database",
    "postgres_server",
]
