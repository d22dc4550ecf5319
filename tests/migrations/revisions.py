"""The history as the folder shows it: no test has to know which revision is the newest one."""

from __future__ import annotations

from tests.databases.alembic_runs import CHECKOUT

FILES = sorted((CHECKOUT / "alembic" / "versions").glob("*.py"))
REVISIONS = [path.name.split("_", maxsplit=1)[0] for path in FILES]
HEAD = REVISIONS[-1]
# What Alembic logs of the newest revision.
TO_HEAD = f"{REVISIONS[-2]} -> {HEAD}"
