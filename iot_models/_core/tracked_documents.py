"""Documents of mapped objects that notice every change inside them, at any depth.

Nothing is lost without a word. A change inside a document that its object shows marks the attribute as modified; one
inside a document that the object no longer shows (expired by a commit or rollback, refreshed, the object gone) raises.
What is put into a document is copied, as the database will do; what was taken out of it is the caller's alone.

SQLAlchemy's own `Mutable` sees the top level only, and is silent where this raises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

from sqlalchemy import event, inspect
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import attributes

from iot_models._core.documents import DocumentLimits, check_document
from iot_models._core.equality import json_equal
from iot_models.errors import InvalidDocument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Self, SupportsIndex

    from sqlalchemy.orm import InstanceState, InstrumentedAttribute

    Owner: TypeAlias = tuple[InstanceState[Any], str]

# What the database can hold at all (an array or object of jsonb less than 2**28 bytes): how much of it is wanted is the
# service's question.
STORABLE: Final = DocumentLimits(max_bytes=2**28, max_depth=200)

_PICKLED: Final = "iot_models._core.documents"


class _Tracked:
    """A container inside a document, or the document itself. It stays where it was made, or leaves for good."""

    __slots__ = ()  # no dict of its own for each container: loading stays cheap

    parent: _Tracked | None

    def _take(self, value: object) -> Any:
        """What to hold for a value: containers become tracked copies; those that are from here remain who they are."""
        if not isinstance(value, (dict, list)) or (isinstance(value, _Tracked) and value.parent is self):
            return value
        try:
            return _Object(value, self) if isinstance(value, dict) else _Array(value, self)
        except RecursionError:
            raise InvalidDocument("", "nested too deep to be copied: flatten it") from None

    def changed(self) -> None:
        # Without parent, or not among its values any more: taken out or replaced. Changes to it are nobody else's.
        if self.parent is not None and any(value is self for value in self.parent.held()):
            self.parent.changed()

    def held(self) -> Iterable[object]:
        raise NotImplementedError

    def __reduce__(self) -> tuple[Any, ...]:
        plain = _plain(self)
        return type(plain), (plain,)


class _Object(_Tracked, dict[str, Any]):
    __slots__ = ("parent",)

    parent: _Tracked | None

    def __init__(self, values: dict[str, Any], parent: _Tracked | None) -> None:
        self.parent = parent
        super().__init__(values)
        for key, value in values.items():
            if isinstance(value, (dict, list)):
                super().__setitem__(key, self._take(value))

    def held(self) -> Iterable[object]:
        return self.values()

    def __setitem__(self, key: str, value: object) -> None:
        super().__setitem__(key, self._take(value))
        self.changed()

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self.changed()

    def __ior__(self, other: Any) -> Self:  # type: ignore[override,misc]
        self.update(other)
        return self

    def clear(self) -> None:
        super().clear()
        self.changed()

    def pop(self, key: str, *default: object) -> Any:
        if key not in self:
            return super().pop(key, *default)
        value = self[key]
        del self[key]
        return value

    def popitem(self) -> tuple[str, Any]:
        item = super().popitem()
        self.changed()
        return item

    def setdefault(self, key: str, default: object = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *values: Any, **more: object) -> None:
        # All of it first: an iterable that raises half-way leaves the document as it was.
        taken = {key: self._take(value) for key, value in dict(*values, **more).items()}
        super().update(taken)
        self.changed()


class _Array(_Tracked, list[Any]):
    __slots__ = ("parent",)

    parent: _Tracked | None

    def __init__(self, values: list[Any], parent: _Tracked) -> None:
        self.parent = parent
        super().__init__(values)
        for index, value in enumerate(values):
            if isinstance(value, (dict, list)):
                super().__setitem__(index, self._take(value))

    def held(self) -> Iterable[object]:
        return self

    def __setitem__(self, index: SupportsIndex | slice, value: Any) -> None:
        if isinstance(index, slice):
            super().__setitem__(index, [self._take(item) for item in value])
        else:
            super().__setitem__(index, self._take(value))
        self.changed()

    def __delitem__(self, index: SupportsIndex | slice) -> None:
        super().__delitem__(index)
        self.changed()

    def __iadd__(self, values: Iterable[Any]) -> Self:  # type: ignore[misc]
        self.extend(values)
        return self

    def __imul__(self, times: SupportsIndex) -> Self:
        self[:] = list(self) * times
        return self

    def append(self, value: object) -> None:
        self[len(self) :] = [value]

    def clear(self) -> None:
        del self[:]

    def extend(self, values: Iterable[Any]) -> None:
        self[len(self) :] = values

    def insert(self, index: SupportsIndex, value: object) -> None:
        self[index:index] = [value]

    def pop(self, index: SupportsIndex = -1) -> Any:
        value = super().pop(index)
        self.changed()
        return value

    def remove(self, value: object) -> None:
        super().remove(value)
        self.changed()

    def reverse(self) -> None:
        self[:] = self[::-1]

    def sort(self, **how: Any) -> None:
        # Into another list first: a comparison that raises leaves this one as it was.
        self[:] = sorted(self, **how)


class Document(_Object):
    """A document that belongs to an attribute of a mapped object, or (a copy of one) to nobody."""

    __slots__ = ("owner",)

    owner: Owner | None

    def __init__(self, values: dict[str, Any], owner: Owner | None = None) -> None:
        self.owner = owner
        super().__init__(values, None)

    def __reduce__(self) -> tuple[Any, ...]:
        # Not a plain dict: a pickled object gives its documents their owner again when it is read.
        return Document, (_plain(self),)

    def changed(self) -> None:
        """Mark the attribute as modified.

        Raises:
            InvalidRequestError: If the object is gone, or shows another document.
        """
        if self.owner is None:
            return
        state, name = self.owner
        mapped_object = state.obj()
        if mapped_object is None:
            raise InvalidRequestError(
                f"the {state.class_.__name__} of this {name} is gone, and a change of it would be lost: "
                "keep the object in a variable while its document is changed"
            )
        if state.dict.get(name) is not self:
            raise InvalidRequestError(
                f"this {name} is not the one that its {state.class_.__name__} shows any more (it was expired, rolled "
                "back or refreshed), and a change of it would be lost: read the attribute again and change that"
            )
        attributes.flag_modified(mapped_object, name)


def track(attribute: InstrumentedAttribute[dict[str, Any]]) -> None:
    """Make the documents of a mapped attribute tracked ones, however they get there.

    Every assignment is a change, of an equal document too; but a document of another object that equals this one is
    none, so that `Session.merge` writes what differs. Rows whose document is no JSON object stay readable.

    Assigning what PostgreSQL cannot hold as a JSON object raises `InvalidDocument`.
    """
    listeners = _Listeners(attribute.key)
    of_class: dict[str, Callable[..., None]] = {
        "load": listeners.loaded,
        # merge(load=False) hands over the other object's document. It has no public event; Mutable takes this one too.
        "_sa_event_merge_wo_load": listeners.loaded,
        "refresh": listeners.loaded,
        "refresh_flush": listeners.loaded,
        "pickle": listeners.pickled,
        "unpickle": listeners.unpickled,
    }
    for name, listener in of_class.items():
        event.listen(attribute.class_, name, listener, raw=True, propagate=True)
    event.listen(attribute, "set", listeners.assigned, raw=True, retval=True, propagate=True)


class _Listeners:
    """What has to happen to one attribute of a mapped class."""

    def __init__(self, name: str) -> None:
        self._name = name

    def loaded(self, state: InstanceState[Any], *_: object) -> None:
        document = state.dict.get(self._name)
        owner = (state, self._name)
        # A refresh of other columns comes here too: the document that was there before stays the one to change.
        if isinstance(document, dict) and not (isinstance(document, Document) and document.owner == owner):
            state.dict[self._name] = Document(document, owner)

    def assigned(self, state: InstanceState[Any], value: Any, old: object, _initiator: object) -> Any:
        if value is not None and value is not old:
            check_document(value, STORABLE)
            if isinstance(value, Document) and value.owner and isinstance(old, dict) and json_equal(value, old):
                return old
            value = Document(value, (state, self._name))
        if isinstance(old, Document) and old is not value:
            old.owner = None
        if self._name in state.dict:
            # Flagged, because SQLAlchemy would compare with what was there before by Python's ==, for which true is 1.
            attributes.flag_modified(state.obj(), self._name)
        return value

    def pickled(self, state: InstanceState[Any], pickle: dict[str, Any]) -> None:
        pickle.setdefault(_PICKLED, {})[self._name] = state.dict.get(self._name)

    def unpickled(self, state: InstanceState[Any], pickle: dict[str, Any]) -> None:
        document = pickle[_PICKLED][self._name]
        if isinstance(document, Document):
            document.owner = (state, self._name)


def check_changes(mapped_object: object, *names: str) -> None:
    """Refuse what was put into documents since they were read or assigned and PostgreSQL cannot hold.

    Raises:
        InvalidDocument: With a note that names the attribute and the object's identity.
    """
    state = inspect(mapped_object)
    for name in names:
        attribute = state.attrs[name]
        if attribute.history.has_changes() and attribute.value is not None:
            try:
                check_document(attribute.value, STORABLE)
            except InvalidDocument as error:
                error.add_note(f"It is the {name} of {mapped_object!r}, changed after it was read or assigned.")
                raise


def set_committed_value(mapped_object: object, name: str, value: object) -> None:
    """Show a value that the database holds, as SQLAlchemy's function of that name does; a document comes tracked."""
    if isinstance(value, dict):
        value = Document(value, (inspect(mapped_object), name))
    attributes.set_committed_value(mapped_object, name, value)


def _plain(value: object) -> Any:
    """The value with plain containers, none of them shared."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value
