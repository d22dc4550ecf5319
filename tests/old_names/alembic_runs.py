from tests.databases.alembic_runs import *  # noqa: F403 - the name by which tests/migrations knows it
