from tests.databases.async_engines import *  # noqa: F403 - the name by which tests/migrations knows it
