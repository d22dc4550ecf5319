"""Hypothesis strategies for JSON documents that PostgreSQL stores, made so that two of them often meet.

PostgreSQL's ``jsonb`` holds neither NUL nor surrogates, and JSON has no NaN and no infinity; none is generated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable

# Few, so that two documents share some. "é" in its two spellings: the same letter, two keys.
_KEYS = ("a", "b", "c", "", "\u00e9", "e\u0301", "😀 /~0.$")

# What JSON escapes, what is no character, what takes one to four bytes. Hypothesis' own alphabet, all of Unicode, takes
# seconds to build and finds nothing more.
_LETTERS = 'a"\\/\b\n\x01\x7f\u00e9\u0301\u2028\ufeff\uffff😀\U0010ffff'

# Neighbours that are equal to Python or to PostgreSQL, and not always to both.
_NUMBERS: tuple[int | float, ...] = (
    *(0, 0.0, -0.0, 1, 1.0, -1, 2, 0.1, 0.5),
    *(2**53, 2.0**53, 2**53 + 1),
    *(10**22, 1e22),
    *(10**23, 1e23, 99_999_999_999_999_991_611_392),  # the last is what Python takes 1e23 for
    *(1e308, int(1e308), 10**308, 5e-324, -2.5e-7),
)

keys = st.sampled_from(_KEYS)
numbers: st.SearchStrategy[int | float] = (
    st.sampled_from(_NUMBERS) | st.integers(-(10**40), 10**40) | st.floats(allow_nan=False, allow_infinity=False)
)
texts = st.sampled_from(("", "a", "on", "1", "null")) | st.text(_LETTERS, max_size=4)
scalars_without_null: st.SearchStrategy[Any] = st.booleans() | numbers | texts
scalars: st.SearchStrategy[Any] = st.none() | scalars_without_null


def values_of(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: st.dictionaries(keys, inner, max_size=3) | st.lists(inner, max_size=3),
        max_leaves=8,
    )


def documents_of(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(keys, values_of(leaves), max_size=5)


values = values_of(scalars)
documents = documents_of(scalars)


_rarely = st.integers(0, 11).map(lambda number: number == 7)


@st.composite
def look_alikes(draw: Callable[[st.SearchStrategy[Any]], Any], value: object) -> Any:
    """Draw a value much like the one given: keys in another order, 1 as 1.0 or true, now and then a difference."""
    if draw(_rarely):
        return draw(values)
    if isinstance(value, dict):
        order = draw(st.permutations(list(value)))
        return {draw(keys) if draw(_rarely) else key: draw(look_alikes(value[key])) for key in order}
    if isinstance(value, list):
        return [draw(look_alikes(item)) for item in value]
    if isinstance(value, int | float):
        spellings: list[int | float] = [value, float(value), int(value), -value]
        if value in {0, 1}:
            spellings.append(bool(value))
        return draw(st.sampled_from(spellings))
    return value


@st.composite
def enlarged(draw: Callable[[st.SearchStrategy[Any]], Any], value: object, *, in_array: bool = False) -> Any:
    """Draw a value with all that the one given has, and more in its objects; now and then a difference in an array."""
    if isinstance(value, dict):
        more = {} if in_array and not draw(_rarely) else draw(st.dictionaries(keys, scalars, max_size=1))
        return more | {key: draw(enlarged(item, in_array=in_array)) for key, item in value.items()}
    if isinstance(value, list):
        items = [draw(enlarged(item, in_array=True)) for item in value]
        return draw(st.permutations(items)) if draw(_rarely) else items
    return value


def look_alike_documents(document: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({key: look_alikes(value) for key, value in document.items()})


def _with_look_alike(strategy: st.SearchStrategy[Any], alike: Callable[[Any], Any]) -> st.SearchStrategy[Any]:
    return strategy.flatmap(lambda one: st.tuples(st.just(one), alike(one)))


value_pairs: st.SearchStrategy[tuple[Any, Any]] = st.tuples(values, values) | _with_look_alike(values, look_alikes)
document_pairs: st.SearchStrategy[tuple[dict[str, Any], dict[str, Any]]] = (
    st.tuples(documents, documents)
    | _with_look_alike(documents, look_alike_documents)
    | _with_look_alike(documents, enlarged)
)
