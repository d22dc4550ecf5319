"""What a run of the load generator is asked for, and the names and documents that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datetime import timedelta

    from sqlalchemy import URL

_GOLDEN = 0.618


@dataclass(frozen=True)
class Plan:
    """A run of the load generator.

    Attributes:
        url: The database, with an asynchronous driver.
        name: Of the tenants, and of our connections in `pg_stat_activity`.
        devices: How many, in all tenants together.
        tenants: How many tenants share them.
        rate: Reports a second.
        seconds: For how long.
        desired_rate: Desired writes a second.
        keys: How many keys a document has.
        connections: Size of the connection pool.
        max_batch: `ReportBuffer`'s.
        max_delay: `ReportBuffer`'s.
        bind_tenant: Whether to bind each transaction to its tenant, for row level security.
    """

    url: URL
    name: str
    devices: int
    tenants: int
    rate: float
    seconds: float
    desired_rate: float
    keys: int
    connections: int
    max_batch: int
    max_delay: timedelta
    bind_tenant: bool

    @cached_property
    def tenant_ids(self) -> list[str]:
        """The tenants: device n belongs to the n-th, and so on in turns."""
        return [self.name] if self.tenants == 1 else [f"{self.name}-{n}" for n in range(self.tenants)]

    @cached_property
    def document(self) -> dict[str, Any]:
        """What every device is asked to be and reports at first; `n` says which write it was."""
        values = (21.5, "automatic", True, 1013)
        return {"n": 0} | {f"key_{n:03}": values[n % len(values)] for n in range(1, self.keys)}

    @cached_property
    def _stride(self) -> int:
        stride = int(self.devices * _GOLDEN)
        while gcd(stride, self.devices) != 1:
            stride += 1
        return stride

    def device(self, n: int) -> int:
        """The number of the device that is the n-th to be written: all in turns, and neighbours far apart."""
        return n * self._stride % self.devices

    def tenant_of(self, device: int) -> str:
        """The tenant of a device, by its number."""
        return self.tenant_ids[device % self.tenants]


def device_id(device: int) -> str:
    """The id of a device, by its number; `fleet` writes the same in SQL."""
    return f"device-{device}"
