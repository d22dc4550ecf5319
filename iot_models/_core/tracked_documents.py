"""Documents of mapped objects that notice every change inside them, at any depth.

    device = session.get_one(DeviceState, ("acme", "thermostat-1"))
    device.desired_state["fan"]["speed"] = 3    # marks desired_state as modified: the flush writes it

No change is lost without an error. A change inside a document that its object still shows marks the attribute as
modified. A change inside a document that its object does not show any more raises: the object was expired by a commit
or rollback, it was refreshed, or it was garbage-collected.

A value that is put into a document is copied, as a value in a database row is. A dict or list that was taken out of a
document, or replaced in it, belongs to the caller: changes to it do not reach the document.

How it works: the dicts and lists of a document are instances of subclasses of dict and list. Each knows the container
that it is in (`parent`), and the outermost one, a `Document`, knows its object and attribute (`owner`). A change calls
`changed()`, which goes up to the `Document` and marks the attribute.

`heapq` changes a list without its methods, because it is written in C. So each list knows its items as they were when
it was made (`seen`), and the session compares before it flushes and before it commits. Only sessions that have loaded
documents with lists pay for that.

SQLAlchemy's own `sqlalchemy.ext.mutable` notices changes at the top level only, and does not raise where this does.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast
from weakref import WeakSet

from sqlalchemy import event, inspect
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import attributes

from iot_models._core.documents import DocumentLimits, check_document
from iot_models._core.equality import json_equal
from iot_models.errors import InvalidDocument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Self, SupportsIndex

    from sqlalchemy.orm import InstanceState, InstrumentedAttribute, Session

    Owner: TypeAlias = tuple[InstanceState[Any], str]

# What the database can hold: an array or an object of jsonb takes less than 2**28 bytes. The lower limits that an
# application wants are checked by the service.
STORABLE: Final = DocumentLimits(max_bytes=2**28, max_depth=200)

# The key of our documents in the pickled state of an object.
_PICKLED: Final = "iot_models._core.documents"
# In `Session.info`: the objects whose documents have lists.
_WATCHED: Final = "iot_models.objects_with_lists"


class _Tracked:
    """A dict or list of a document. It is in the place where it was made, or in no document at all."""

    __slots__ = ()  # no __dict__ for each container: this keeps loading fast

    parent: _Tracked | None

    def _take(self, value: object) -> Any:
        """Return what to store for a value: a tracked copy of a dict or list, unless it is a member already."""
        if not isinstance(value, (dict, list)) or (isinstance(value, _Tracked) and value.parent is self):
            return value
        try:
            return _Object(value, self) if isinstance(value, dict) else _Array(value, self)
        except RecursionError:
            raise InvalidDocument("", "nested too deep to be copied: flatten it") from None

    def changed(self) -> None:
        # Without a parent, or where the parent does not hold it any more, it is in no document: nothing to report.
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
        # Read all values before the first is stored: if the iterable raises, the document stays as it was.
        taken = {key: self._take(value) for key, value in dict(*values, **more).items()}
        super().update(taken)
        self.changed()


class _Array(_Tracked, list[Any]):
    __slots__ = ("parent", "seen")

    parent: _Tracked | None
    seen: tuple[object, ...]

    def __init__(self, values: list[Any], parent: _Tracked) -> None:
        self.parent = parent
        super().__init__(values)
        for index, value in enumerate(values):
            if isinstance(value, (dict, list)):
                super().__setitem__(index, self._take(value))
        self.seen = tuple(self)
        root: _Tracked = self
        while root.parent is not None:
            root = root.parent
        cast("Document", root).has_arrays = True  # nothing else is without a parent

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
        # Sort a copy: if a comparison raises, this list stays as it was.
        self[:] = sorted(self, **how)


class Document(_Object):
    """The outermost dict of a document. A copy has no owner: changes to it are changes to nothing else."""

    __slots__ = ("has_arrays", "owner")

    owner: Owner | None
    has_arrays: bool

    def __init__(self, values: dict[str, Any], owner: Owner | None = None) -> None:
        self.owner = owner
        self.has_arrays = False
        super().__init__(values, None)

    def __reduce__(self) -> tuple[Any, ...]:
        # Not a plain dict, so that unpickling an object can find its documents and give them their owner again.
        return Document, (_plain(self),)

    def changed(self) -> None:
        """Mark the attribute as modified.

        Raises:
            InvalidRequestError: If the object was garbage-collected, or does not show this document any more.
        """
        if self.owner is None:
            return
        state, name = self.owner
        mapped_object = state.obj()
        if mapped_object is None:
            raise InvalidRequestError(
                f"the {state.class_.__name__} of this {name} was garbage-collected, and the change would be lost: "
                "keep the object in a variable while you change its document"
            )
        if state.dict.get(name) is not self:
            raise InvalidRequestError(
                f"this {name} is not the one that its {state.class_.__name__} shows any more (it was expired, rolled "
                "back or refreshed), and the change would be lost: read the attribute again and change its value"
            )
        attributes.flag_modified(mapped_object, name)


def track(attribute: InstrumentedAttribute[dict[str, Any]]) -> None:
    """Track the documents of a mapped attribute: loaded, refreshed, assigned, merged and unpickled ones.

    Each assignment is a change, also if the new document is equal to the old one. There is one exception: an equal
    document that belongs to another object is not a change, so that `Session.merge` writes only what differs. A row
    whose value is not a JSON object can still be read; the value is not tracked.

    From then on, assigning a value that PostgreSQL cannot store as a JSON object raises `InvalidDocument`.
    """
    listeners = _Listeners(attribute.key)
    of_class: dict[str, Callable[..., None]] = {
        "load": listeners.loaded,
        # merge(load=False) hands over the other object's document. There is no public event for it; SQLAlchemy's
        # Mutable uses this one, too.
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
    """The event listeners of one attribute of a mapped class."""

    def __init__(self, name: str) -> None:
        self._name = name

    def loaded(self, state: InstanceState[Any], *_: object) -> None:
        document = state.dict.get(self._name)
        owner = (state, self._name)
        # A refresh of other columns calls this, too. Then the document is ours already, and it stays.
        if isinstance(document, dict) and not (isinstance(document, Document) and document.owner == owner):
            state.dict[self._name] = Document(document, owner)
            _watch(state, state.dict[self._name])

    def assigned(self, state: InstanceState[Any], value: Any, old: object, _initiator: object) -> Any:
        if value is not None and value is not old:
            check_document(value, STORABLE)
            if isinstance(value, Document) and value.owner and isinstance(old, dict) and json_equal(value, old):
                return old
            value = Document(value, (state, self._name))
        if isinstance(old, Document) and old is not value:
            old.owner = None
        if self._name in state.dict:
            # Without the flag, SQLAlchemy would compare the old value by Python's ==, for which true is equal to 1.
            attributes.flag_modified(state.obj(), self._name)
        return value

    def pickled(self, state: InstanceState[Any], pickle: dict[str, Any]) -> None:
        pickle.setdefault(_PICKLED, {})[self._name] = state.dict.get(self._name)

    def unpickled(self, state: InstanceState[Any], pickle: dict[str, Any]) -> None:
        document = pickle[_PICKLED][self._name]
        if isinstance(document, Document):
            document.owner = (state, self._name)


def check_changes(mapped_object: object, *names: str) -> None:
    """Refuse changed documents that PostgreSQL cannot store.

    A change inside a document is not checked when it is made, so this is called before the flush.

    Args:
        mapped_object: The object that is about to be flushed.
        names: The attributes that hold documents.

    Raises:
        InvalidDocument: If it cannot be stored. A note names the attribute and the object.
    """
    state = inspect(mapped_object)
    for name in names:
        attribute = state.attrs[name]
        if attribute.history.has_changes() and attribute.value is not None:
            _settle(attribute.value)
            _watch(state, attribute.value)
            try:
                check_document(attribute.value, STORABLE)
            except InvalidDocument as error:
                error.add_note(f"It is the {name} of {mapped_object!r}, changed after it was read or assigned.")
                raise


def set_committed_value(mapped_object: object, name: str, value: object) -> None:
    """Set a value that is already in the database, without marking it as modified. A document becomes tracked.

    It works for each attribute, as SQLAlchemy's function of the same name does, which does not track documents.
    """
    if isinstance(value, dict):
        state = inspect(mapped_object)
        value = Document(value, (state, name))
        _watch(state, value)
    attributes.set_committed_value(mapped_object, name, value)


def notice(state: InstanceState[Any]) -> None:
    """Mark the documents of an object as modified whose lists were changed without their methods."""
    for name, value in list(state.dict.items()):
        if isinstance(value, Document) and name not in state.committed_state and _differs(value):
            value.changed()


def _watch(state: InstanceState[Any], document: object) -> None:
    """Have the session look for changes that lists cannot report, if the document has lists."""
    session = state.session
    if session is None or not isinstance(document, Document) or not document.has_arrays:
        return
    if _WATCHED not in session.info:
        session.info[_WATCHED] = WeakSet()
        event.listen(session, "before_flush", _notice_all)
        event.listen(session, "before_commit", _notice_all)
    session.info[_WATCHED].add(state)


def _notice_all(session: Session, *_: object) -> None:
    for state in list(session.info[_WATCHED]):
        if state.session is session:
            notice(state)


def _differs(container: object) -> bool:
    """Return whether a list in the document has other items than when it was made, or last settled."""
    if isinstance(container, _Array) and not (
        len(container) == len(container.seen) and all(map(operator.is_, container, container.seen))
    ):
        return True
    return isinstance(container, _Tracked) and any(map(_differs, container.held()))


def _settle(container: object) -> None:
    """Take the items of all lists in a document for seen: they are about to be written."""
    if isinstance(container, _Array):
        container.seen = tuple(container)
    if isinstance(container, _Tracked):
        for value in container.held():
            _settle(value)


def _plain(value: object) -> Any:
    """Return a copy of the value with plain dicts and lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value
