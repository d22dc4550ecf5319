from tests.databases.tenants import *  # noqa: F403 - the name by which tests/migrations knows it
