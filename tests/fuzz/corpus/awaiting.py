"""ENTRIES OF THE CORPUS THAT AWAIT A REPAIR OF THE PRODUCT, and what is wrong with them now.

The tests leave them out, and assert that each still fails: what is mended has to leave this list. The fuzzer leaves
them out too, so that it finds something new. An empty list is the wanted state.
"""

from __future__ import annotations

from typing import Final

# Names as the tests show them; `entry point: name` where it is the defect of one entry point.
AWAITING: Final[dict[str, str]] = {}
# The same, where the process itself would die: nothing tries them until they are taken out here.
CRASHING: Final[dict[str, str]] = {}


def awaits(name: str, point: str = "") -> bool:
    return name in AWAITING or name in CRASHING or f"{point}: {name}" in AWAITING
