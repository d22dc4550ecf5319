"""Pairs of documents in the shape of real kinds of devices and services, each with what follows from it.

`documents/<kind>.json` is a list of cases. All of them are made up for these tests. What a case expects was written by
hand; `tests/unit/test_real_documents.py` compares it with the reference model.

| member | meaning |
|---|---|
| `name` | what is the matter with this pair; no two cases have the same |
| `desired`, `reported` | the two documents |
| `delta` | by keys of the top level |
| `nested_delta` | by AWS's rule; the device has converged where it is `{}` |
| `merge_patch` | the smallest RFC 7396 patch that makes `desired` of `reported`; `null` where none exists |
| `no_patch_at` | only where none exists: the JSON Pointer to the null in `desired` that no patch can write |

A name is ASCII without a slash, because it is a device's id in HTTP headers and paths, too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final


@dataclass(frozen=True)
class Case:
    """One pair, and what is expected of it."""

    kind: str
    name: str
    desired: dict[str, Any]
    reported: dict[str, Any]
    delta: dict[str, Any]
    nested_delta: dict[str, Any]
    merge_patch: dict[str, Any] | None
    no_patch_at: str | None = None

    @property
    def id(self) -> str:
        """Names the case in test ids and messages, and a device of the tests."""
        return f"{self.kind}: {self.name}"

    @property
    def is_converged(self) -> bool:
        return self.nested_delta == {}


_FILES: Final = sorted((Path(__file__).parent / "documents").glob("*.json"))
CASES: Final = [Case(kind=file.stem, **case) for file in _FILES for case in json.loads(file.read_text("utf-8"))]
