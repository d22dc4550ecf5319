"""Hostile documents, identifiers and versions, each under the name that a failing test shows.

Documents are made anew for each use: some change when they are looked at. What a fuzzing run finds goes to the end of
the table that it belongs to, in the words that the run prints.
"""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import types
import uuid
from collections import ChainMap, OrderedDict, defaultdict, namedtuple
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from tests.fuzz.corpus import hostile_types as hostile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEEP: Final = 20_000

# What has ever ended a string, a comment, a placeholder, a template or a line where it should not have.
TEXTS: Final = {
    "empty": "",
    "space": " ",
    "single quote": "'",
    "double quote": '"',
    "backslash": "\\",
    "backslash quote": "\\'",
    "end and drop": "'; DROP TABLE device_state; --",
    "or true": "' OR '1'='1",
    "comment": "/* */ --",
    "dollar quote": "$$ $1 $a$",
    "percent": "%",
    "percent s": "%s %d %%",
    "percent name": "%(tenant)s",
    "bind name": ":tenant :name",
    "cast": "a::text",
    "question marks": "? ?| ?& @> #>>",
    "braces": "{} {0} {0.__class__} ${jndi}",
    "array literal": '{a,"b",NULL}',
    "NULL": "NULL",
    "null": "null",
    "true": "true",
    "number": "1",
    "1e400": "1e400",
    "__proto__": "__proto__",
    "constructor": "constructor",
    "prototype": "constructor.prototype",
    "pointer": "/a~1b~0c/-",
    "path": "../../etc/passwd",
    "new lines": "a\r\nb\u2028c\x85d",
    "control": "\x01\x08\x1b[2J\x7f",
    "byte order mark": "\ufeffa",
    "right to left": "\u202egnp.exe\u202c",
    "zero width": "a\u200bb\u200d\u2060",
    "no character": "\uffff\ufffe\U0010ffff",
    "replacement": "\ufffd",
    "emoji": "👩‍👩‍👧 🏴‍☠️",
    "combining": "a" + "\u0301" * 200,
    "escaped NUL": "\\u0000",
    "escaped surrogate": "\\ud800",
    "folded": "\u0131\u0130iI \u00df\u1e9e \u017f",
    "long": "x" * 2_000,
}
# PostgreSQL's text holds neither; Python's str holds both.
UNSTORABLE_TEXTS: Final = {
    "NUL": "\0",
    "NUL inside": "thermostat-1\0",
    "high surrogate": "\ud800",
    "low surrogate": "a\udc80b",
    "surrogate pair": "\ud83d\ude00",
}
# To the eye, to case folding, to normalisation or to trimming they are one name.
LOOK_ALIKES: Final = {
    "plain": "acm\u00e9",
    "decomposed": "acme\u0301",
    "cyrillic": "\u0430cm\u00e9",
    "upper case": "ACM\u00c9",
    "full width": "\uff41cm\u00e9",
    "trailing space": "acm\u00e9 ",
    "leading space": " acm\u00e9",
    "no-break space": "acm\u00e9\u00a0",
    "zero width": "acm\u00e9\u200b",
    "byte order mark": "\ufeffacm\u00e9",
    "soft hyphen": "ac\u00adm\u00e9",
    "pattern": "acm_",
    "wildcard": "acm%",
    "quoted": "'acm\u00e9'",
    "or true": "acm\u00e9' OR '1'='1",
}

# No index row is that long: no row carries such an id.
TOO_LONG_FOR_AN_INDEX: Final = "".join(chr(0x4E00 + (7919 * i) % 20_000) for i in range(4_000))

DEVICE_IDS: Final[dict[str, str]] = (
    {f"text: {name}": text for name, text in TEXTS.items()}
    | {f"look-alike: {name}": text for name, text in LOOK_ALIKES.items()}
    | {f"unstorable: {name}": text for name, text in UNSTORABLE_TEXTS.items()}
    | {"too long for an index": TOO_LONG_FOR_AN_INDEX, "1 MB": "x" * 2**20}
)
ODD_DEVICE_IDS: Final[dict[str, Callable[[], object]]] = {
    "None": lambda: None,
    "bytes": lambda: b"thermostat-1",
    "int": lambda: 1,
    "huge int": lambda: 10**5_000,
    "true": lambda: True,
    "tuple": lambda: ("a",),
    "list": lambda: ["a"],
    "dict": dict,
    "deep list": lambda: nested_lists(DEEP),
    "deep dict": lambda: nested_objects(DEEP),
    "uuid": lambda: uuid.UUID(int=1),
    "enumeration": lambda: Mode.ECO,
    "lying": lambda: hostile.LyingStr("text"),
    "equal to all": lambda: hostile.EqualToAll("text"),
    "equal to none": lambda: hostile.EqualToNone("text"),
    "unshown": lambda: hostile.UnshownStr("text"),
    "unhashable": lambda: hostile.UnhashableStr("text"),
}


class Mode(enum.StrEnum):
    """An enumeration of text: JSON has it."""

    ECO = "eco"


class Level(enum.IntEnum):
    """An enumeration of numbers: JSON has it."""

    HIGH = 3


_Point = namedtuple("_Point", "x y")  # noqa: PYI024 - an old one, as callers have


def nested_objects(levels: int) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for _ in range(levels - 1):
        document = {"a": document}
    return document


def nested_lists(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


def nested_both(levels: int) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for _ in range(levels // 2):
        document = {"a": [document]}
    return document


def _itself() -> dict[str, Any]:
    document: dict[str, Any] = {}
    document["a"] = [document]
    return document


def _twice() -> dict[str, Any]:
    shared: dict[str, Any] = {"a": [1]}
    return {"a": shared, "b": [shared, shared]}


def _billion_laughs() -> dict[str, Any]:
    """Small in memory, 10,000 values when it is written out."""
    value: list[Any] = ["lol"]
    for _ in range(4):
        value = [value] * 10
    return {"a": value}


NUMBERS: Final[dict[str, object]] = {
    "-0": -0.0,
    "smallest": 5e-324,
    "largest": 1.7976931348623157e308,
    "1e22": 1e22,
    "1e23": 1e23,
    "0.1": 0.1,
    "2**53+1": 2**53 + 1,
    "2**63": 2**63,
    "10**400": 10**400,
    "-10**4299": -(10**4_299),
    "10**4300": 10**4_300,
    "-10**5000": -(10**5_000),
    "NaN": float("nan"),
    "infinity": float("inf"),
    "-infinity": float("-inf"),
}
TYPES: Final[dict[str, Callable[[], object]]] = {
    "tuple": lambda: (1, 2),
    "named tuple": lambda: _Point(1, 2),
    "set": lambda: {1},
    "bytes": lambda: b"x",
    "bytearray": lambda: bytearray(b"x"),
    "decimal": lambda: decimal.Decimal("1.5"),
    "complex": lambda: 1j,
    "datetime": lambda: dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
    "uuid": lambda: uuid.UUID(int=1),
    "function": lambda: len,
    "class": lambda: dict,
    "generator": lambda: (number for number in (1, 2)),
    "ellipsis": lambda: ...,
    "proxy": lambda: types.MappingProxyType({"a": 1}),
    "no dict": lambda: hostile.NoDict(a=1),
    "text enumeration": lambda: Mode.ECO,
    "number enumeration": lambda: Level.HIGH,
    "lying text": lambda: hostile.LyingStr("honest"),
    "unshown text": lambda: hostile.UnshownStr("text"),
    "lying number": lambda: hostile.LyingInt(3),
    "lying huge number": lambda: hostile.LyingInt(10**5_000),
    "lying float": lambda: hostile.LyingFloat(1.5),
    "lying NaN": lambda: hostile.LyingFloat("nan"),
    "two-faced": lambda: hostile.TwoFaced(a=1),
    "growing": lambda: hostile.Growing(a=1, b=2),
    "secretive NaN": lambda: hostile.Secretive(a=float("nan")),
    "secretive NUL": lambda: hostile.Secretive(a="\0"),
    "secretive list": lambda: hostile.SecretiveList(["\0", "\ud800", float("nan"), object()]),
    "grudging": lambda: hostile.Grudging(a=1),
}
_KEYS: Final[dict[str, Callable[[], object]]] = {
    "None": lambda: None,
    "int": lambda: 1,
    "huge int": lambda: 10**5_000,
    "true": lambda: True,
    "float": lambda: 1.5,
    "NaN": lambda: float("nan"),
    "bytes": lambda: b"a",
    "tuple": lambda: ("a", "b"),
    "deep tuple": lambda: _nested_tuples(DEEP),
    "unstorable in a tuple": lambda: ("\ud800",),
    "object": object,
    "text enumeration": lambda: Mode.ECO,
    "lying": lambda: hostile.LyingStr("honest"),
    "unshown": lambda: hostile.UnshownStr("text"),
    "unshown unstorable": lambda: hostile.UnshownStr("\0"),
    "1 MB": lambda: "k" * 2**20,
    "32 KB": lambda: "k" * 32_762,
}
_ROOTS: Final[dict[str, Callable[[], object]]] = {
    "None": lambda: None,
    "list": lambda: [{"a": 1}],
    "text": lambda: '{"a": 1}',
    "bytes": lambda: b"{}",
    "number": lambda: 1,
    "pairs": lambda: [("a", 1)],
    "chain map": lambda: ChainMap({"a": 1}),
    "proxy": lambda: types.MappingProxyType({"a": 1}),
    "no dict": lambda: hostile.NoDict(a=1),
    "ordered": lambda: OrderedDict(b=1, a=2),
    "default dict": lambda: defaultdict(dict, a={"b": 1}),
    "two-faced": lambda: hostile.TwoFaced(a=1),
    "growing": lambda: hostile.Growing(a=1, b=2),
    "secretive": lambda: hostile.Secretive(a=float("nan")),
    "grudging": lambda: hostile.Grudging(a=1),
    "deep list": lambda: nested_lists(DEEP),
    "deep objects": lambda: nested_objects(DEEP),
    "deep objects and lists": lambda: nested_both(DEEP),
    "itself": _itself,
    "twice": _twice,
    "billion laughs": _billion_laughs,
    "ten levels": lambda: nested_objects(10),
    "eleven levels": lambda: nested_objects(11),
    "many keys": lambda: {str(number): number for number in range(2_600)},
    "too many keys": lambda: {str(number): number for number in range(10_000)},
    "32 KB of text": lambda: {"a": "x" * (32_768 - 8)},
    "a byte more": lambda: {"a": "x" * (32_768 - 7)},
    "1 MB of text": lambda: {"a": "x" * 2**20},
    "1 MB of quotes": lambda: {"a": '"' * 2**20},
    "true and 1": lambda: {"a": [True, 1, 1.0, "1"], "b": [False, 0, -0.0, None]},
    "normalised twins": lambda: {"\u00e9": 1, "e\u0301": 2, "E\u0301": 3},
    "hash twins": lambda: {hostile.EqualToNone("a"): 1, hostile.EqualToNone("a "): 2},
    "sentinel removed": lambda: {"of": None, "fan": None},
    "sentinel replaced": lambda: {"fan": [{"speed": None}]},
    "nulls inside": lambda: {"fan": {"speed": None, "gone": None}, "new": {"a": None, "b": [None]}},
}


def _nested_tuples(levels: int) -> tuple[Any, ...]:
    value: tuple[Any, ...] = ()
    for _ in range(levels - 1):
        value = (value,)
    return value


def _around(text: str) -> dict[str, Any]:
    return {"a": text, "list": [text], text: {text: text}}


def _holding(make: Callable[[], object]) -> dict[str, Any]:
    return {"a": make()}


def _holding_inside(make: Callable[[], object]) -> dict[str, Any]:
    return {"fan": {"list": [0, make()]}}


def _keyed(make: Callable[[], object]) -> dict[str, Any]:
    return {"fan": {make(): 1}}


def _documents() -> Iterator[tuple[str, Callable[[], object]]]:
    for name, text in (TEXTS | LOOK_ALIKES | UNSTORABLE_TEXTS).items():
        yield f"text: {name}", partial(_around, text)
    for name, number in NUMBERS.items():
        yield f"number: {name}", partial(dict, a=number, list=[[number]])
    for name, make in TYPES.items():
        yield f"type: {name}", partial(_holding, make)
        yield f"type in a list: {name}", partial(_holding_inside, make)
    for name, make in _KEYS.items():
        yield f"key: {name}", partial(_keyed, make)
    for name, make in _ROOTS.items():
        yield f"root: {name}", make


DOCUMENTS: Final = dict(_documents())

# What is no version at all, then what is one that no device is at. 0 and 7 are a device's own, see `judge.expected`.
VERSIONS: Final[dict[str, Callable[[], object]]] = {
    "true": lambda: True,
    "text": lambda: "7",
    "float": lambda: 7.0,
    "NaN": lambda: float("nan"),
    "decimal": lambda: decimal.Decimal(7),
    "list": lambda: [7],
    "deep list": lambda: nested_lists(DEEP),
    "negative": lambda: -1,
    "huge": lambda: 10**5_000,
    "huge negative": lambda: -(10**5_000),
    "2**63": lambda: 2**63,
    "2**63-1": lambda: 2**63 - 1,
    "2**31": lambda: 2**31,
    "2**31-1": lambda: 2**31 - 1,
    "lying": lambda: hostile.LyingInt(10**30),
    "lying huge": lambda: hostile.LyingInt(10**5_000),
    "enumeration": lambda: Level.HIGH,
}

# What is given as an actor, a reason, a request id, a refusal or a site. The lengths: 255 of an id and 1,000 of words.
WORDS: Final[dict[str, Callable[[], object]]] = {
    **{f"text: {name}": partial(str, text) for name, text in (TEXTS | UNSTORABLE_TEXTS).items()},
    "blank": lambda: " \t\n\u2003",
    "255": lambda: "x" * 255,
    "256": lambda: "x" * 256,
    "255 of four bytes": lambda: "\U0001f600" * 255,
    "1,000": lambda: "x" * 1_000,
    "1,000 of four bytes": lambda: "\U0001f600" * 1_000,
    "1,001": lambda: "x" * 1_001,
    **ODD_DEVICE_IDS,
    "lying, with a NUL": lambda: hostile.LyingStr("a\0b"),
    "lying, and too long": lambda: hostile.LyingStr("x" * 1_001),
}

# How old a version has to be to be forgotten.
AGES: Final[dict[str, Callable[[], object]]] = {
    "None": lambda: None,
    "number": lambda: 1,
    "text": lambda: "1 day",
    "time": lambda: dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
    "negative": lambda: dt.timedelta(microseconds=-1),
    "smallest": lambda: dt.timedelta.min,
    "largest": lambda: dt.timedelta.max,
    "before all calendars": lambda: dt.timedelta(days=7_000 * 366),
    "a millennium": lambda: dt.timedelta(days=366_000),
}
