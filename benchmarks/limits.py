"""What the dearest documents within the limits cost, compared with an ordinary one of the same size."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

from fleet_data import TENANT
from rounds import Figure, Progress, interleaved, timed
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from twins import large

from iot_models import DocumentLimits, DocumentTooLarge, Report, ShadowService, twin
from iot_models._core.documents import encode_document

if TYPE_CHECKING:
    from collections.abc import Callable

SECTION = "limits"
ORDINARY = "ordinary"
WORKS = ("check", "merge", "delta", "nested delta", "replace", "patch", "converge", "read a page of 100", "refuse")
SECONDS = 0.05
DEVICES = [f"{number:03}" for number in range(100)]
# Of so many values.
DEAR: dict[str, Callable[[int], dict[str, Any]]] = {
    "shortest numbers": lambda n: {"a": [0] * n},
    "shortest keys": lambda n: {f"{number:x}": 0 for number in range(n)},
    "floats": lambda n: {"a": [0.1] * n},
    "floats with an exponent": lambda n: {"a": [1e-05] * n},
    "whole numbers in one document, floats in the other": lambda n: {"a": [1.0] * n},
    "the same as members, in nine levels": lambda n: _nested(9, {f"{number:x}": 1.0 for number in range(n)}),
    "empty arrays": lambda n: {"a": [[]] * n},
    "pairs": lambda n: {"a": [[1, 2] for _ in range(n)]},
    "arrays in arrays": lambda n: {"a": [[[[[[[[[]]]]]]]] for _ in range(n)]},
    "objects in objects": lambda n: {f"{number:x}": {"": {"": {"": {"": {"": {"": {}}}}}}} for number in range(n)},
    "numbers with 324 places": lambda n: {"a": [5e-324] * n},
    "what JSON escapes": lambda n: {"a": "\x01" * n},
    "two long arrays, one of them in reverse": lambda n: {"a": {"b": [*range(n)], "c": [*range(n, 0, -1)]}},
    "objects beside an array": lambda n: {"": []} | {f"{number:x}": {} for number in range(n)},
}
# Of these, reported has each float as a whole number.
WHOLE = ("whole numbers in one document, floats in the other", "the same as members, in nine levels")


def _nested(levels: int, document: dict[str, Any]) -> dict[str, Any]:
    return document if levels == 1 else {"a": _nested(levels - 1, document)}


def _more(value: Any) -> Any:
    """What a device reports that has all of it, and more in each object."""
    return {"more": 1} | {key: _more(item) for key, item in value.items()} if isinstance(value, dict) else value


def measure(url: str, rounds: int, progress: Progress) -> list[Figure]:
    """Measure each kind of work, with each document in desired and in reported of 100 devices of its own."""
    documents = {ORDINARY: large()} | {kind: _largest(of) for kind, of in DEAR.items()}
    refused = {ORDINARY: {f"{key} again": value for key, value in large().items()} | large()} | {
        kind: of(40_000) for kind, of in DEAR.items()
    }
    engine = create_engine(url)
    figures: list[Figure] = []
    with Session(engine) as session, session.begin():
        for kind in documents:
            session.execute(
                text(
                    "INSERT INTO device_state (tenant_id, site_id, device_id)"
                    " SELECT :kind, 's', unnest(CAST(:devices AS text[]))"
                ),
                {"kind": f"{TENANT} {kind}", "devices": DEVICES},
            )
    with Session(engine, autoflush=False) as session:
        works = {kind: _works(session, kind, documents[kind], refused[kind]) for kind in documents}
        session.commit()
        for work in WORKS:
            turns = {kind: timed(works[kind][work], SECONDS) for kind in documents}
            for kind, measured in interleaved(turns, rounds, progress, work).items():
                figures.append(Figure(SECTION, kind, "ours", work, "s", measured))
            session.rollback()
    engine.dispose()
    return figures


def _largest(of: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """Return the largest document of its kind that is accepted."""
    least, most = 1, 40_000
    while most - least > 1:
        middle = (least + most) // 2
        try:
            encode_document(of(middle), DocumentLimits())
            least = middle
        except DocumentTooLarge:
            most = middle
    return of(least)


def _works(
    session: Session, kind: str, document: dict[str, Any], refused: dict[str, Any]
) -> dict[str, Callable[[], object]]:
    service = ShadowService(session, f"{TENANT} {kind}")
    # A copy, as it comes from the database.
    reported = json.loads(json.dumps(document), parse_float=(lambda text: int(float(text))) if kind in WHOLE else None)
    service.replace_desired_many(dict.fromkeys(DEVICES, document))
    service.replace_reported_many([Report(device, reported) for device in DEVICES])

    wide = ShadowService(session, f"{TENANT} {kind}", limits=DocumentLimits(max_bytes=2**18))

    def converge() -> None:
        assert not wide.replace_reported(DEVICES[0], _more(reported), ack_if_converged=True).is_pending

    def page() -> None:
        for shadow in service.pending(limit=100):
            assert shadow.delta == {}

    def refuse() -> None:
        try:
            service.replace_desired(DEVICES[0], refused)
        except DocumentTooLarge:
            return
        raise AssertionError(kind)

    return {
        "check": partial(encode_document, document, DocumentLimits()),
        "merge": partial(twin.merge_patch, document, {"one more": 1}),
        "delta": partial(twin.compute_delta, document, reported),
        "nested delta": partial(twin.compute_nested_delta, document, reported),
        "replace": partial(service.replace_desired, DEVICES[0], document),
        "patch": partial(service.patch_desired, DEVICES[0], {"absent": None}),
        "converge": converge,
        "read a page of 100": page,
        "refuse": refuse,
    }
