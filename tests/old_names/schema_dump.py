from tests.databases.schema_dump import *  # noqa: F403 - the name by which tests/migrations knows it
