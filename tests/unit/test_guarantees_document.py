"""docs/guarantees.md names tests; a name that no test has would be a promise that nothing holds."""

from __future__ import annotations

import re
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def test_every_test_that_a_guarantee_names_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (CHECKOUT / "docs/guarantees.md").read_text()))
    there = {
        name
        for path in (CHECKOUT / "tests").rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE)
    }

    assert len(named) > 40
    assert named - there == set()
