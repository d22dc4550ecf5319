"""Lint with squawk the SQL that each revision prints, up and down: `make lint-sql`."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from iot_models import migrate
from iot_models._migrations import runner

CHECKOUT = Path(__file__).resolve().parents[1]
SQUAWK = Path(sys.executable).with_name("squawk")


def main() -> int:
    steps = list(pairwise(["base", *runner.revisions()]))
    with TemporaryDirectory() as folder:
        files = []
        for start, end in steps + [(end, start) for start, end in steps]:
            files.append(Path(folder, f"{start}_to_{end}.sql"))
            files[-1].write_text(migrate.sql(f"{start}:{end}"))
        return subprocess.run([SQUAWK, "--config", CHECKOUT / ".squawk.toml", *files], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
