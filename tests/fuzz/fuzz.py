"""Search for what the corpus does not hold: Hypothesis puts its pieces together anew, the same judge looks on.

    python -m tests.fuzz.fuzz --minutes 10 [--seed N]

Exit code 0: nothing found. 1: something found, and printed as lines for `FOUND` in `corpus/found.py`. 130: interrupted.
"""

# ruff: noqa: T201, S307 - a program that prints, and evaluates what it made up
from __future__ import annotations

import argparse
import contextlib
import re
import secrets
import sys
import time
import typing
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from sqlalchemy import NullPool, text
from sqlalchemy.orm import Session

from iot_models.engine import create_engine
from iot_models.testing import database, postgres_server
from tests.databases.alembic_runs import upgrade
from tests.fuzz.corpus import documents as corpus
from tests.fuzz.corpus import found as corpus_found
from tests.fuzz.corpus.awaiting import awaits
from tests.fuzz.corpus.documents import (
    AGES,
    DEVICE_IDS,
    DOCUMENTS,
    ODD_DEVICE_IDS,
    TEXTS,
    UNSTORABLE_TEXTS,
    VERSIONS,
    WORDS,
)
from tests.fuzz.corpus.wire import JSON_TEXTS, URLS
from tests.fuzz.judge.entry_points import ENTRY_POINTS
from tests.fuzz.judge.expected import DONE, GONE, KNOWN_DEVICES, LONGEST, TENANTS
from tests.fuzz.judge.pure import judge_helpers, judge_url
from tests.fuzz.judge.world import FindingError, NotApplicableError, World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hypothesis.strategies import SearchStrategy
    from sqlalchemy import Engine

PROGRESS_SECONDS = 2.0
ATTEMPTS_A_ROUND = 500
INTERRUPTED = 130
SHORT = 1_000  # bytes of a JSON text that something is inserted into
KNOWN_NAMES = [name for name, device_id in DEVICE_IDS.items() if device_id in KNOWN_DEVICES]
# Names that a finding may use: they are those of corpus/found.py.
NAMES = vars(corpus_found)

# Everything below is made as source text: what is found can be pasted, and made anew as often as it is needed.


def pieces(table: str, names: Iterable[str], call: str = "") -> SearchStrategy[str]:
    return st.sampled_from([f"{table}[{name!r}]{call}" for name in names])


def sources(values: SearchStrategy[Any]) -> SearchStrategy[str]:
    return values.map(ascii)


def mostly(usual: SearchStrategy[str], unusual: SearchStrategy[str]) -> SearchStrategy[str]:
    """Of many parts few are to be bad, or nothing is ever stored."""
    return st.integers(0, 7).flatmap(lambda number: unusual if number == 7 else usual)


def texts() -> SearchStrategy[str]:
    known = pieces("TEXTS", TEXTS) | pieces("LOOK_ALIKES", corpus.LOOK_ALIKES)
    # All that any of the known ones holds, shuffled.
    letters = sorted(set("".join([*TEXTS.values(), *corpus.LOOK_ALIKES.values()])))
    made = sources(st.text(letters, max_size=12))
    both = st.tuples(known, made).map(" + ".join)
    long = sources(st.integers(1, 40_000)).map("'x' * {}".format)
    return mostly(known | made | both, pieces("UNSTORABLE_TEXTS", UNSTORABLE_TEXTS) | long)


def values() -> SearchStrategy[str]:
    odd = [name for name in corpus.TYPES if not awaits(f"document, type: {name}")]
    usual = texts() | sources(
        st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**70), 2**70) | st.booleans() | st.none()
    )
    unusual = (
        pieces("TYPES", odd, "()") | pieces("NUMBERS", corpus.NUMBERS) | st.integers(4_290, 4_310).map("10**{}".format)
    )
    leaves = mostly(usual, unusual)
    return st.recursive(leaves, lambda inner: objects(inner) | arrays(inner), max_leaves=12)


def objects(inner: SearchStrategy[str]) -> SearchStrategy[str]:
    keys = texts() | st.sampled_from(["'fan'", "'of'", "'speed'", "'a'"])
    members = st.tuples(keys, inner).map(": ".join)
    return st.lists(members, max_size=4).map(lambda made: "{" + ", ".join(made) + "}")


def arrays(inner: SearchStrategy[str]) -> SearchStrategy[str]:
    return st.lists(inner, max_size=3).map(lambda made: "[" + ", ".join(made) + "]")


def documents(point: str) -> SearchStrategy[str]:
    kind = "helpers" if point == "helpers" else "document"
    made = objects(values())
    known = pieces(
        "DOCUMENTS", [name for name in DOCUMENTS if not awaits(f"{kind}, {name}", point) and "deep" not in name], "()"
    )
    nested = st.tuples(st.integers(7, 13), made).map(lambda parts: f"wrapped({parts[0]}, {parts[1]})")
    both = st.tuples(made, made).map(lambda parts: f"{{**{parts[0]}, 'fan': {parts[1]}}}")
    read = st.tuples(
        pieces("JSON_TEXTS", [name for name, body in JSON_TEXTS.items() if len(body) < SHORT]),
        st.integers(0, 60),
        sources(st.binary(max_size=3)),
    ).map(lambda parts: f"reading({', '.join(map(str, parts))})")
    return made | known | nested | both | read


def devices(point: str) -> SearchStrategy[str]:
    odd = [name for name in ODD_DEVICE_IDS if not awaits(f"device, {name}", point)]
    plain = [name for name in DEVICE_IDS if not awaits(f"device, {name}", point)]
    few = sources(st.sampled_from([*KNOWN_DEVICES[:5], GONE]))
    return mostly(
        few | pieces("DEVICE_IDS", KNOWN_NAMES),
        texts() | pieces("DEVICE_IDS", plain) | pieces("ODD_DEVICE_IDS", odd, "()"),
    )


def versions() -> SearchStrategy[str]:
    known = pieces("VERSIONS", [name for name in VERSIONS if not awaits(f"version, {name}")], "()")
    few = st.just("None") | st.just("7") | sources(st.integers(3, 7))
    return mostly(few, sources(st.integers(-1, 10)) | sources(st.integers(2**31 - 2, 2**63 + 1)) | known)


def words(part: str, point: str) -> SearchStrategy[str]:
    known = pieces("WORDS", [name for name in WORDS if not awaits(f"{part}, {name}", point)], "()")
    long = sources(st.integers(250, 1_010)).map("'x' * {}".format)
    usual = st.just("None") if part != "site_id" else st.just("'berlin'")
    return mostly(usual | sources(st.sampled_from([DONE, "a word"])), texts() | known | long)


def ages(point: str) -> SearchStrategy[str]:
    known = pieces("AGES", [name for name in AGES if not awaits(f"age, {name}", point)], "()")
    return mostly(st.just("timedelta()"), known | sources(st.integers(-10, 10)).map("timedelta({})".format))


def sent(point: str) -> SearchStrategy[str]:
    if point == "helpers":
        return documents(point)
    if point == "url":
        known = pieces(
            "URLS", [name for name, url in URLS.items() if isinstance(url, str) and not awaits(f"url, {name}")]
        )
        inserted = sources(st.text("postgresql+psycopg:/@[]%?&=#0 \\\x00", max_size=4))
        return st.tuples(known, st.integers(0, 40), inserted).map(
            lambda parts: f"{parts[0]}[:{parts[1]}] + {parts[2]} + {parts[0]}[{parts[1]}:]"
        )
    takes = ENTRY_POINTS[point].takes
    known_only = ENTRY_POINTS[point].kind == "orm"
    possible: dict[str, Callable[[str], SearchStrategy[str]]] = {
        "document": documents,
        "version": lambda _: versions(),
        "refused_version": lambda _: versions(),
        "age": ages,
        **{part: partial(words, part) for part in (*LONGEST, "site_id")},
    }
    parts = {
        "tenant_id": sources(st.sampled_from(TENANTS)),
        "device_id": sources(st.sampled_from(KNOWN_DEVICES[:5])) if known_only else devices(point),
        **{part: make(point) for part, make in possible.items() if part in takes},
    }
    return st.tuples(*parts.values()).map(
        lambda made: f"Attempt({', '.join(map('='.join, zip(parts, made, strict=True)))})"
    )


def attempts() -> SearchStrategy[tuple[str, str]]:
    """An entry point's name, and the source of what is passed to it."""
    by_point = {point: st.tuples(st.just(point), sent(point)) for point in [*ENTRY_POINTS, "helpers", "url"]}
    return st.sampled_from(list(by_point)).flatmap(by_point.__getitem__)


class TimeIsOver(BaseException):
    """Ends a round at once, also one that makes an example smaller: Hypothesis lets it pass."""


@dataclass(slots=True)
class Search:
    """What was tried and found so far."""

    until: float
    world: World | None = None
    began: float = field(default_factory=time.monotonic)
    reported_at: float = 0.0
    fates: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)
    findings: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    last: tuple[str, str, str] | None = None

    def attempt(self, point: str, source: str) -> None:
        now = time.monotonic()
        if now >= self.until:
            raise TimeIsOver
        if now - self.reported_at >= PROGRESS_SECONDS:
            self.reported_at = now
            self.report()
        try:
            fate = self._judge(point, source)
        except FindingError as finding:
            if _signature(point, finding) in self.findings:
                return
            self.last = (point, source, str(finding))
            raise
        self.fates[fate] += 1
        self.points[point] += 1

    def _judge(self, point: str, source: str) -> str:
        try:
            made = eval(source, NAMES)
            if point == "url":
                return judge_url(made)
            if point == "helpers":
                return judge_helpers(lambda: eval(source, NAMES))
            return typing.cast("World", self.world).judge(point, made)
        except (NotApplicableError, corpus_found.UnmakeableError):
            return "not applicable"

    def report(self) -> None:
        spent = time.monotonic() - self.began
        fates = ", ".join(f"{count:,} {fate}" for fate, count in sorted(self.fates.items()))
        print(f"{spent:4.0f} s of {self.until - self.began:.0f}: {fates}; {len(self.findings)} findings", flush=True)

    def keep(self) -> None:
        """Take the smallest example that Hypothesis came to for a finding."""
        if self.last:
            point, source, what = self.last
            self.findings[_signature(point, what)] = self.last
            print(f"FOUND at {point}: {what}\n    ({point!r}, lambda: {source}),", flush=True)
            self.last = None


def _signature(point: str, finding: object) -> str:
    return point + re.sub(r"[\d'\"].*", "", str(finding))[:60]


def search(found: Search, engine: Engine, number: int) -> None:
    """Round after round, each with a seed and a world of its own, until the time is over."""
    options = settings(
        max_examples=ATTEMPTS_A_ROUND,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    while time.monotonic() < found.until:

        @seed(number)
        @options
        @given(attempts())
        def one_round(made: tuple[str, str]) -> None:
            found.attempt(*made)

        with engine.connect() as connection:
            # What earlier rounds wrote and undid is still in the way of reading.
            connection.execute(text("TRUNCATE device_state, device_shadow_history"))
            connection.commit()
            found.world = World(Session(connection, join_transaction_mode="create_savepoint"))
            with contextlib.suppress(FindingError, TimeIsOver), contextlib.redirect_stderr(None):
                one_round()
        found.keep()
        number += 1


def main() -> int:
    """Search as long as asked for, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**9))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    interrupted = False
    # A database of its own, on the server that the tests would run on.
    with postgres_server() as server, database(server) as url:
        print(server.description, flush=True)
        upgrade(url)
        found = Search(until=time.monotonic() + 60 * options.minutes)
        try:
            search(found, create_engine(url, poolclass=NullPool), options.seed)
        except KeyboardInterrupt:
            interrupted = True
        found.report()
    for point, count in sorted(found.points.items()):
        print(f"{count:10,} {point}")
    for point, source, what in found.findings.values():
        print(f"\n{point}: {what}\n    ({point!r}, lambda: {source}),")
    return 1 if found.findings else INTERRUPTED if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
