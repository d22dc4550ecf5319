"""The methods of `ShadowService`: which write, and how.

A test asks the service for its public methods and fails for one that is not here, or that is here and missing in one of
the places that have to try every write: see `tests/service/test_every_method_is_tried.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Section = Literal["desired", "reported", "life", "history"]


@dataclass(frozen=True)
class Write:
    """How a method writes.

    Attributes:
        section: The document that it writes; or `life` or `history`, where it is none.
        merges: Whether it takes a merge patch, and not the whole document.
        devices: `one`; of several `all` or none; or `each` by itself, with an outcome of its own.
    """

    section: Section
    merges: bool = False
    devices: Literal["one", "all", "each"] = "one"


WRITES: Final = {
    "replace_desired": Write("desired"),
    "patch_desired": Write("desired", merges=True),
    "restore_desired": Write("desired"),
    "replace_reported": Write("reported"),
    "patch_reported": Write("reported", merges=True),
    "refuse_desired": Write("reported"),
    "register": Write("life"),
    "register_many": Write("life", devices="all"),
    "remove": Write("life"),
    "prune_history": Write("history", devices="all"),
    "replace_desired_many": Write("desired", devices="all"),
    "patch_desired_many": Write("desired", merges=True, devices="all"),
    "replace_reported_many": Write("reported", devices="each"),
    "patch_reported_many": Write("reported", merges=True, devices="each"),
}
READS: Final = {
    "get",
    "get_many",
    "pending",
    "iter_pending",
    "count_pending",
    "drifted",
    "refused",
    "count_refused",
    "history",
    "desired_at",
    "changes",
    "status_counts",
}
