"""A PostgreSQL to test on, databases on it, and a small fleet: for pytest (by our plugin), `unittest` and scripts.

The servers need the extra `testing`, containers also the extra `containers`.
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
