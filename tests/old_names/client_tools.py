from tests.databases.client_tools import *  # noqa: F403 - the name by which tests/migrations knows it
