from tests.databases.alembic_runs import *  # noqa: F403 - a program of tests/migrations looks for it in this folder
