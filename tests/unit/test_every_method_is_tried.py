"""A method of `ShadowService` is known wherever all methods are tried, compared or listed.

A new one fails here until it is. The message says in which files it is missing, and what each of them needs.
"""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, TypeAlias

import pytest

from iot_models import AsyncShadowService, ShadowService
from tests.databases.alembic_runs import CHECKOUT
from tests.fuzz.judge.entry_points import ENTRY_POINTS
from tests.guarantees import every_write, test_isolation_levels
from tests.guarantees.load import workload
from tests.guarantees.test_state_machine import ServiceAndModel
from tests.reference.fleet import Fleet
from tests.reference.methods import READS, WRITES

if TYPE_CHECKING:
    from collections.abc import Callable

README = (CHECKOUT / "README.md").read_text()


def methods() -> list[str]:
    return [
        name for name, value in vars(ShadowService).items() if inspect.isfunction(value) and not name.startswith("_")
    ]


def in_readme(name: str) -> bool:
    return re.search(rf"`{name}`|\b{name}\(", README) is not None


# A file, what has to be done there, and whether it is done.
Place: TypeAlias = tuple[str, str, "Callable[[str], bool]"]
OF_EVERY_METHOD: list[Place] = [
    (
        "tests/reference/methods.py",
        "say in WRITES how it writes, or name it in READS",
        lambda name: name in WRITES.keys() | READS,
    ),
    ("tests/reference/fleet.py", "say in Fleet what it does", lambda name: hasattr(Fleet, name)),
    ("iot_models/aio.py", "add it to AsyncShadowService", lambda name: hasattr(AsyncShadowService, name)),
    ("README.md", "name it beside the other methods", in_readme),
]
OF_EVERY_WRITE: list[Place] = [
    (
        "tests/guarantees/test_state_machine.py",
        "a rule of this name that calls the service and the model",
        lambda name: hasattr(ServiceAndModel, name),
    ),
    (
        "tests/guarantees/every_write.py",
        "a Write in WRITES, so that each fault meets it",
        lambda name: name in {write.method for write in every_write.WRITES},
    ),
    (
        "tests/guarantees/test_isolation_levels.py",
        "a call in WRITES",
        lambda name: name in test_isolation_levels.WRITES,
    ),
    (
        "tests/guarantees/load/workload.py",
        "how often writers call it (and in calls.py how)",
        lambda name: name in workload.KINDS_AND_WEIGHTS,
    ),
    (
        "tests/fuzz/judge/entry_points.py",
        "an entry point, so that hostile input meets it",
        lambda name: name in ENTRY_POINTS,
    ),
]


def missing(name: str) -> list[str]:
    """What has to be done for a method of this name."""
    places = OF_EVERY_METHOD if name in READS else OF_EVERY_METHOD + OF_EVERY_WRITE
    return [f"{file}: {needed}" for file, needed, is_done in places if not is_done(name)]


def report(name: str) -> str:
    return "\n".join([f"ShadowService.{name} is not known everywhere. What it needs:", *missing(name)])


@pytest.mark.parametrize("name", methods())
def test_each_method_is_known_everywhere(name: str) -> None:
    assert not missing(name), report(name)


def test_nothing_is_listed_that_the_service_does_not_have() -> None:
    assert WRITES.keys() | READS == set(methods())
    assert not WRITES.keys() & READS


def test_a_new_method_is_reported_with_every_file_that_has_to_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget_desired(self: ShadowService, device_id: str) -> None:
        """A write that nobody knows."""

    monkeypatch.setattr(ShadowService, "forget_desired", forget_desired, raising=False)

    (new,) = set(methods()) - WRITES.keys() - READS
    files = [line.partition(":")[0] for line in missing(new)]

    assert files == [
        "tests/reference/methods.py",
        "tests/reference/fleet.py",
        "iot_models/aio.py",
        "README.md",
        "tests/guarantees/test_state_machine.py",
        "tests/guarantees/every_write.py",
        "tests/guarantees/test_isolation_levels.py",
        "tests/guarantees/load/workload.py",
        "tests/fuzz/judge/entry_points.py",
    ]
    assert all((CHECKOUT / file).exists() for file in files)
