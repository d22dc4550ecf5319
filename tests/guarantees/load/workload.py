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
    ("restore_desired", 6),
    ("refuse_desired", 8),
    ("remove", 3),
    ("register", 4),
    ("prune_history", 2),
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
    ("register_many", 3),
)
REGISTERS: Final = {"register", "register_many"}
_REQUESTS: Final = {"replace_desired", "patch_desired", "restore_desired"}  # those that take a request_id
_BATCHES_OF_REPORTS: Final = {"replace_reported_many", "patch_reported_many"}
KINDS_AND_WEIGHTS: Final = dict(_ONE_DEVICE + _SEVERAL)


class Workload:
    """Draws operations for one writer; what it remembers by device: `seen`, both versions; `wanted`, the desired document."""

    def __init__(self, random: Random, writer: str) -> None:
        self._random = random
        self._writer = writer
        self.seen: dict[Key, tuple[int, int]] = {}
        self.wanted: dict[Key, Document] = {}

    def operations(self, unit: str, count: int, *, registering: int) -> tuple[Operation, ...]:
        """Some operations for a unit of this name. `registering`: how many times as often as else it registers."""
        weights = [weight * (registering if kind in REGISTERS else 1) for kind, weight in KINDS_AND_WEIGHTS.items()]
        kinds = self._random.choices([*KINDS_AND_WEIGHTS], weights, k=count)
        return tuple(self._operation(kind, f"{unit}.{place}") for place, kind in enumerate(kinds))

    def _operation(self, kind: str, name: str) -> Operation:
        tenant, devices = self._random.choice(TENANTS), self._devices(kind)
        if kind == "patch_desired_many":  # one patch for all; in the others each device has a document of its own
            patch = self._patch("desired", name)
            return Operation(kind, tenant, tuple(Entry(device, patch) for device in devices))
        entries = [self._entry(kind, (tenant, device), f"{name}/{place}") for place, device in enumerate(devices)]
        if kind in _REQUESTS and not self._rarely(3):
            entries = [entry._replace(request=entry.token) for entry in entries]
        if kind in _BATCHES_OF_REPORTS:
            once = [device for device in devices if devices.count(device) == 1]
            entries = [
                self._refusing((tenant, entry.device), entry) if entry.device in once and self._rarely(5) else entry
                for entry in entries
            ]
        return Operation(kind, tenant, tuple(entries))

    def _devices(self, kind: str) -> list[str]:
        if kind == "replace_reported_many":  # a device may report twice
            return [self._device() for _ in range(self._random.randint(2, 6))]
        if kind in dict(_SEVERAL):
            devices = self._random.sample(DEVICES, self._random.randint(2, len(DEVICES)))
            return devices + [MISSING] * (kind != "register_many" and self._rarely(20))
        return [self._random.choice(DEVICES) if kind == "register" else self._device()]

    def _entry(self, kind: str, key: Key, token: str) -> Entry:
        write, named = KINDS[kind], {MARKS["desired"]: token}
        match kind:
            case "refuse_desired":
                return Entry(key[1], {MARKS["reported"]: token}, version=self._refused(key))
            case "restore_desired":
                return Entry(key[1], named, self._expected(key), version=self._earlier(key))
            case "remove":
                return Entry(key[1], named, self._expected(key) if self._rarely(2) else None)
            case "register" | "register_many" | "prune_history":
                return Entry(key[1], named)
        if write is not None and write.section == "reported":
            return self._report(key, token, merges=write.merges)
        make = self._patch if write is not None and write.merges else self._document
        # In a batch few are guarded: each has to stand at its expected version.
        is_guarded = kind in {"replace_desired", "patch_desired"} or (
            kind == "replace_desired_many" and self._rarely(3)
        )
        return Entry(key[1], make("desired", token), self._expected(key) if is_guarded else None)

    def _refusing(self, key: Key, entry: Entry) -> Entry:
        """A report that refuses a version, too: then it acknowledges an older one, or none."""
        version = self._refused(key)
        is_older = isinstance(entry.guard, int) and entry.guard < version
        return entry._replace(version=version, guard=entry.guard if is_older else None)

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

    def _refused(self, key: Key) -> int:
        desired, reported = self.seen.get(key, (0, 0))
        return self._random.choice([*[desired] * 4, max(desired - 1, 0), reported, desired + 1])

    def _earlier(self, key: Key) -> int:
        desired, _ = self.seen.get(key, (0, 0))
        return self._random.choice([max(desired - 1, 0), self._random.randint(0, desired), desired, desired + 1])

    def _device(self) -> str:
        return MISSING if self._rarely(80) else self._random.choice(DEVICES)

    def _rarely(self, times: int) -> bool:
        return self._random.randrange(times) == 0
