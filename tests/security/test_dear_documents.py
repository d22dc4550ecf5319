"""A document within its limits costs about what an ordinary one of its size costs: sizes and counts; `make bench` times."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

from iot_models import DocumentLimits, DocumentTooLarge, ShadowService
from tests.databases.devices import DEVICE, TENANT, add_device

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.orm import Session

pytestmark = pytest.mark.repeats

LIMITS = DocumentLimits()
# Of so many values: what costs us, or PostgreSQL, most for its bytes.
DEAR: dict[str, Callable[[int], Any]] = {
    "the shortest numbers": lambda n: [0] * n,
    "the shortest keys": lambda n: {f"{number:x}": 0 for number in range(n)},
    "empty arrays": lambda n: [[]] * n,
    "empty objects": lambda n: [{}] * n,
    "arrays in arrays": lambda n: [[[[[[[[[]]]]]]]]] * n,
    "objects in objects": lambda n: [{"": {"": {"": {"": {"": {"": {}}}}}}}] * n,
    "numbers with 324 places": lambda n: [5e-324] * n,
    "numbers with 309 digits": lambda n: [1e308] * n,
    "floats": lambda n: [0.1] * n,
    "what JSON escapes": lambda n: "\x01" * n,
    "four bytes a letter": lambda n: "😀" * n,
}


@pytest.mark.parametrize("kind", DEAR)
def test_the_largest_document_that_is_accepted_is_as_large_as_it_was_measured(session: Session, kind: str) -> None:
    add_device(session)
    service = ShadowService(session, TENANT)
    least, most = 1, 40_000  # by halves: `least` is accepted, `most` is not
    while most - least > 1:
        middle = (least + most) // 2
        try:
            service.replace_desired(DEVICE, {"a": DEAR[kind](middle)})
            least = middle
        except DocumentTooLarge:
            most = middle
    document = {"a": DEAR[kind](least)}
    service.replace_desired(DEVICE, document)

    (stored,) = session.scalars(text("SELECT octet_length(desired_state::text) FROM device_state")).all()
    assert stored <= 1.51 * LIMITS.max_bytes  # PostgreSQL writes a space after each comma and colon
    assert counted(document, dict, list) <= LIMITS.max_bytes / 16
    assert counted(document, object) <= LIMITS.max_bytes / 2


def counted(value: object, *kinds: type) -> int:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, kinds) + sum(counted(member, *kinds) for member in inside)
