"""What a writer does next: random operations on few devices, by somebody who half remembers how they stand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tests.guarantees.load.record import KINDS, MARKS, Document, Entry, Operation
from tests.reference.versions import IF_CONVERGED

if TYPE_CHECKING:
    from random import Random

    from tests.guarantees.load.history import Key
    from tests.reference.methods import Section
    from tests.reference.versions import Acknowledges

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
_SEVERAL: Final = (
    ("replace_desired_many", 7),
    ("patch_desired_many", 7),
    ("replace_reported_many", 8),
    ("patch_reported_many", 6),
)
KINDS_AND_WEIGHTS: Final = dict(_ONE_DEVICE + _SEVERAL)


class Workload:
    """Draws operations for one writer; what it remembers by device: `seen`, both versions; `wanted`, the desired document."""

    def __init__(self, random: Random, writer: str) -> None:
        self._random = random
        self._writer = writer
        self.seen: dict[Key, tuple[int, int]] = {}
        self.wanted: dict[Key, Document] = {}

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
        write = KINDS[kind]
        # One patch for all in patch_desired_many; in the others each device has a document of its own.
        shared = self._patch("desired", name) if kind == "patch_desired_many" else None
        entries = []
        for place, device in enumerate(devices):
            key, token = (tenant, device), f"{name}/{place}"
            if write is not None and write.section == "reported":
                entries.append(self._report(key, token, merges=write.merges))
            else:
                make = self._patch if write is not None and write.merges else self._document
                guarded = kind in {"replace_desired", "patch_desired", "replace_desired_many"}
                entries.append(
                    Entry(device, shared or make("desired", token), self._expected(key) if guarded else None)
                )
        return Operation(kind, tenant, tuple(entries))

    def _report(self, key: Key, token: str, *, merges: bool) -> Entry:
        """A report of something, or of all that was asked for as far as this writer knows, and more."""
        acknowledges: Acknowledges = self._acked(key)
        if self._rarely(2):
            document = self._patch("reported", token) if merges else self._document("reported", token)
        else:
            document = self.wanted.get(key, {}) | {MARKS["reported"]: token}
            if isinstance(document.get("limits"), dict):
                document["limits"] = document["limits"] | {"reported": True}
            acknowledges = self._random.choice([acknowledges, IF_CONVERGED, IF_CONVERGED])
        return Entry(key[1], document, acknowledges)

    def _document(self, section: Section, token: str) -> Document:
        document: Document = {MARKS[section]: token, self._writer: token, "mode": self._random.choice(["eco", "auto"])}
        document["limits"] = {"low": self._random.randint(0, 3), "hours": self._random.sample([6, 22], 2)}
        if self._rarely(60):
            document["note"] = "\0"  # PostgreSQL cannot store it
        return document

    def _patch(self, section: Section, token: str) -> Document:
        patch: Document = {MARKS[section]: token, self._writer: token}
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
