"""Objects that pass `isinstance` and lie: what a serializer, a test double or an attacker's plugin may hand over.

They are here because the fast paths of Python and its C extensions read what an object holds, others what it says.
"""

from __future__ import annotations

from collections import UserDict
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator


class SabotageError(Exception):
    """What the hostile objects themselves raise: it may pass, whoever made the object knows it."""


class LyingStr(str):
    """Text whose ways to be shown are another text."""

    __slots__ = ()

    def __str__(self) -> str:
        return "'; DROP TABLE device_state; --"

    __repr__ = __str__

    def __format__(self, _spec: str) -> str:
        return str(self)


class EqualToAll(str):
    """Text that equals everything and shares one hash."""

    __slots__ = ()

    def __eq__(self, _other: object) -> bool:
        return True

    def __ne__(self, _other: object) -> bool:
        return False

    def __hash__(self) -> int:
        return 1


class EqualToNone(EqualToAll):
    """Text that equals nothing, itself included: a dict holds it twice."""

    __slots__ = ()

    def __eq__(self, _other: object) -> bool:
        return False

    __hash__ = EqualToAll.__hash__


class UnshownStr(str):
    """Text that raises when a message wants to show it."""

    __slots__ = ()

    def __repr__(self) -> NoReturn:
        raise SabotageError

    __str__ = __repr__


class UnhashableStr(str):
    """Text that no dict takes."""

    __slots__ = ()

    def __hash__(self) -> NoReturn:
        raise SabotageError


class LyingInt(int):
    """A number that is below and above everything, and shows itself as SQL."""

    def __lt__(self, _other: object) -> bool:
        return True

    __gt__ = __le__ = __ge__ = __lt__

    def __repr__(self) -> str:
        return "0); DROP TABLE device_state; --"

    __str__ = __repr__


class LyingFloat(float):
    """A number that shows itself as SQL."""

    def __repr__(self) -> str:
        return "0); DROP TABLE device_state; --"

    __str__ = __repr__


class TwoFaced(dict[str, Any]):
    """Looked at once, it is harmless; looked at again, it holds what PostgreSQL refuses."""

    looked = 0

    def items(self) -> Any:
        self.looked += 1
        return {"a": 1}.items() if self.looked == 1 else {"a\0": float("nan")}.items()


class Growing(dict[str, Any]):
    """Changes while it is looked at."""

    def items(self) -> Any:
        for item in super().items():
            self[f"grown {len(self)}"] = 1
            yield item


class Secretive(dict[str, Any]):
    """Holds what PostgreSQL refuses and says that it is empty."""

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def items(self) -> Any:
        return {}.items()


class SecretiveList(list[Any]):
    """Holds what PostgreSQL refuses; whoever iterates sees one harmless thing."""

    def __iter__(self) -> Iterator[Any]:
        return iter((1,))


class Grudging(dict[str, Any]):
    """Raises from every question it is asked."""

    def items(self) -> NoReturn:
        raise SabotageError

    __iter__ = __contains__ = __getitem__ = get = keys = values = items  # type: ignore[assignment]


class NoDict(UserDict[str, Any]):
    """A mapping, but no dict."""
