"""What a walk of the state machine chooses from."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.generated.documents import documents_of, keys
from tests.reference.versions import IF_CONVERGED

tenants = st.sampled_from(("acme", "globex"))
# Few, so that a walk meets them again; in one order under every collation.
devices = st.sampled_from(("a1", "a2", "b1"))
some_devices = st.lists(devices, max_size=5)
# Numbers that jsonb gives back as they were spelled: what a document weighs once it is stored is then known here too.
_leaves = st.sampled_from((None, True, False, 0, 1, 1.0, -2.5, 2**53 + 1, "", "1", "on", "\u00e9" * 20))
documents = st.dictionaries(keys, _leaves | st.lists(_leaves, max_size=2), max_size=3) | documents_of(_leaves)
no_json = st.sampled_from(([], {1: 2}, {"a": float("nan")}, {"a": [{"\0": 1}]}, {"a": "\ud800"}, {"a": {1, 2}}))
refused_documents: st.SearchStrategy[Any] = no_json | st.sampled_from((None, {"a": [[[[1]]]]}))
# Six of seven are JSON; some of these are too large.
any_documents: st.SearchStrategy[Any] = st.integers(0, 6).flatmap(lambda n: documents if n else refused_documents)
# Versions by what they are next to, so that right, late and early ones are all frequent.
offsets = st.integers(-1, 1)
# In the plural: for writes in a row, each in its own way.
expectations = st.permutations((None, -1, 0, 1))
_acknowledgements = (
    *(None, ("desired_version", 0), ("desired_version", 1)),
    *(("reported_version", 0), ("reported_version", -1)),
    IF_CONVERGED,
)
acknowledgement = st.sampled_from(_acknowledgements)
acknowledgements = st.permutations(_acknowledgements)
AS_ASKED = object()
# A refused version by what it is next to; mostly none. With an acknowledgement only of an older version.
_refusals = st.sampled_from((None, None, None, -1, 0, 0, 1))
reports = st.lists(
    st.tuples(devices, any_documents | st.just(AS_ASKED), acknowledgement, st.none())
    | st.tuples(devices, any_documents, st.none(), _refusals),
    max_size=6,
)
requests = st.sampled_from((None, None, "r1", "r2"))
reporting = st.sampled_from(("replace_reported", "patch_reported", "replace_reported_many", "patch_reported_many"))
rarely = st.integers(0, 3).map(lambda number: number == 3)

# How a device may say what it was asked to be.
spellings = st.permutations(("as asked", "with more", "with less", "in reverse", "1 as true"))


def spelled(value: Any, spelling: str) -> Any:
    """The same, or nearly: what a hasty comparison takes for the same."""
    if isinstance(value, dict):
        more = {"more": 1} if spelling == "with more" else {}
        least = min(value, default=None) if spelling == "with less" else None
        return {key: spelled(item, spelling) for key, item in value.items() if key != least} | more
    if isinstance(value, list):
        items = [spelled(item, spelling) for item in value]
        return items[::-1] if spelling == "in reverse" else items
    return True if spelling == "1 as true" and value == 1 else value
