"""Private: how migrations run. Alembic operations, options and targets, the runner, the command line, and `check`."""
