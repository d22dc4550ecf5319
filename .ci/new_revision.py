"""Add a revision with a column in a copy of the checkout, and run the tests there: what fails is what a revision costs.

    python .ci/new_revision.py              all tests
    python .ci/new_revision.py FILE ...     these

Only tests that are about the history itself may fail (in tests/migrations); any other failure is an error: the tests
name no head and list no revisions.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from breaks import copy_checkout, python

REVISION = '''"""A column for trying what a revision costs."""

import sqlalchemy as sa
from alembic import op

revision = "999"
down_revision = {head!r}
branch_labels = None
depends_on = None


def begin() -> None:
    op.iot_models_begin("")


def upgrade() -> None:
    begin()
    op.add_column("device_state", sa.Column("note", sa.Text()))


def downgrade() -> None:
    begin()
    op.drop_column("device_state", "note")
'''
COLUMN = "    note: Mapped[str | None]\n\n    __table_args__ = ("
ABOUT_THE_HISTORY = "tests/migrations/"
SECONDS = 1800


def add_revision(copy: Path) -> None:
    head = python(
        copy, "-c", "from iot_models._migrations import runner; print(runner.revisions()[-1])", seconds=60
    ).stdout.strip()
    (copy / "alembic/versions/999_note.py").write_text(REVISION.format(head=head))
    models = [path for path in (copy / "iot_models").rglob("*.py") if "    __table_args__ = (" in path.read_text()]
    (path,) = models
    path.write_text(path.read_text().replace("\n    __table_args__ = (", COLUMN, 1))


def main() -> int:
    tests = sys.argv[1:] or ["tests"]
    with tempfile.TemporaryDirectory(prefix="iot_models_revision_") as folder:
        copy = Path(folder).resolve()
        copy_checkout(copy)
        add_revision(copy)
        done = python(
            copy, "-m", "pytest", "-q", "--numprocesses=logical", "--maxprocesses=4", "--dist=worksteal",
            "-p", "no:cacheprovider", *tests,
            seconds=SECONDS,
        )  # fmt: skip
        lint = python(copy, ".ci/lint_sql.py", seconds=60)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    needless = [test for test in failed if not test.startswith(ABOUT_THE_HISTORY)]
    for error in re.findall(r"^E   .*", done.stdout, re.MULTILINE) if needless else ():
        print(error)
    for test in failed:
        print(f"{'FAILS NEEDLESSLY' if test in needless else 'about the history'}: {test}")
    print(done.stdout.rstrip().rpartition("\n")[2])
    if done.returncode not in {0, 1} or (done.returncode and not failed):
        print(done.stdout[-4000:], done.stderr[-2000:])
        return 1
    if lint.returncode:
        print(lint.stdout, lint.stderr)
    return 1 if needless or lint.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
