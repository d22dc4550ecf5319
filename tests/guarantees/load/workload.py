"""What a writer does next: random operations on few devices, by somebody who half remembers how they stand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tests.guarantees.load.record import KINDS, MARK, Document, Entry, Operation

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from tests.guarantees.load.history import Key

TENANTS: Final = ("acme", "globex")
DEVICES: Final = ("boiler", "fan", "lamp", "valve")  # in both tenants: their names are all that they share
MISSING: Final = "missing"

_ONE_DEVICE: Final = (
    ("patch_desired", 18),
    ("replace_desired", 14),
    ("replace_reported", 14),
    ("patch_reported", 10),
    ("orm_replace", 4),
    ("orm_change", 4),
    ("heartbeat", 6),
    ("get", 8),
)
_SEVERAL: Final = (("replace_desired_many", 7), ("patch_desired_many", 7), ("replace_reported_many", 8))
KINDS_AND_WEIGHTS: Final = dict(_ONE_DEVICE + _SEVERAL)


class Workload:
    """Draws operations for one writer; `seen` is what it remembers: both versions, by device."""

    def __init__(self, random: Random, writer: str) -> None:
        self._random = random
        self._writer = writer
        self.seen: dict[Key, tuple[int, int]] = {}

    def operations(self, unit: str, count: int) -> tuple[Operation, ...]:
        """Some operations for a unit of this name."""
        kinds = self._random.choices(list(KINDS_AND_WEIGHTS), list(KINDS_AND_WEIGHTS.values()), k=count)
        return tuple(self._operation(kind, f"{unit}.{place}") for place, kind in enumerate(kinds))

    def _operation(self, kind: str, name: str) -> Operation:
        tenant = self._random.choice(TENANTS)
        if kind == "replace_reported_many":  # a device may report twice
            devices = [self._device() for _ in range(self._random.randint(2, 6))]
        elif kind in dict(_SEVERAL):
            devices = self._random.sample(DEVICES, self._random.randint(2, len(DEVICES)))
            devices += [MISSING] * self._rarely(20)
        else:
            devices = [self._device()]
        make, guard = self._habits(kind)
        # One patch for all in patch_desired_many; in the others each device has a document of its own.
        shared = make(name) if kind == "patch_desired_many" else None
        entries = tuple(
            Entry(device, shared or make(f"{name}/{place}"), guard((tenant, device)))
            for place, device in enumerate(devices)
        )
        return Operation(kind, tenant, entries)

    def _habits(self, kind: str) -> tuple[Callable[[str], Document], Callable[[Key], int | None]]:
        """How this kind makes documents and chooses versions."""
        write = KINDS[kind]
        make = self._patch if write is not None and write.merges else self._document
        if write is not None and write.section == "reported":
            return make, self._acked
        if kind in {"replace_desired", "patch_desired", "replace_desired_many"}:
            return make, self._expected
        return make, lambda _: None

    def _document(self, token: str) -> Document:
        document: Document = {MARK: token, self._writer: token, "mode": self._random.choice(["eco", "auto"])}
        document["limits"] = {"low": self._random.randint(0, 20), "high": self._random.randint(21, 40)}
        if self._rarely(60):
            document["note"] = "\0"  # PostgreSQL cannot store it
        return document

    def _patch(self, token: str) -> Document:
        patch: Document = {MARK: token, self._writer: token}
        if self._rarely(4):
            patch["limits"] = {"low": None, self._writer: token}
        if self._rarely(6):
            patch["mode"] = None
        return patch

    def _expected(self, key: Key) -> int | None:
        desired, _ = self.seen.get(key, (0, 0))
        return self._random.choice([None, None, desired, desired, desired, desired + 1, max(desired - 1, 0)])

    def _acked(self, key: Key) -> int | None:
        desired, reported = self.seen.get(key, (0, 0))
        known = [None, desired, desired, self._random.randint(min(desired, reported), max(desired, reported))]
        return self._random.choice([*known, max(reported - 1, 0), desired + self._random.randint(1, 9)])

    def _device(self) -> str:
        return MISSING if self._rarely(80) else self._random.choice(DEVICES)

    def _rarely(self, times: int) -> bool:
        return self._random.randrange(times) == 0
