"""The schema of a database as text that compares line for line."""

from __future__ import annotations

import subprocess

from sqlalchemy import make_url

from tests.databases.client_tools import client_tool

# \restrict and \unrestrict carry a random word; the comments name objects again, and the versions of server and tool.
NOISE = ("--", "\\restrict", "\\unrestrict")


def dump(url: str) -> str:
    """What `pg_dump --schema-only` says of the database at `url`, but for `alembic_version_iot_models`."""
    libpq_url = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    output = subprocess.run(
        [
            client_tool("pg_dump"),
            "--schema-only",
            "--no-owner",
            "--no-privileges",
            "--exclude-table=alembic_version_iot_models",
            f"--dbname={libpq_url}",
        ],
        check=True,
        stdout=subprocess.PIPE,  # what goes wrong is said on standard error, which pytest shows
        text=True,
    ).stdout
    return "".join(line for line in output.splitlines(keepends=True) if line.strip() and not line.startswith(NOISE))
