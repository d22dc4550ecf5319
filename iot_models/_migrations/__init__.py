"""Private: Alembic operations, the runner, and the comparison of a database with the models."""
