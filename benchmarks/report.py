"""The results of a run, as Markdown for the repository and as tables on the terminal."""

from __future__ import annotations

import os
import platform
from collections import defaultdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rounds import Figure
    from targets import Target

LIBRARIES = ("sqlalchemy", "psycopg", "asyncpg", "deepdiff", "jsonpatch", "json-merge-patch")


def to_terminal(figures: list[Figure], targets: list[Target]) -> None:
    console = Console(width=None if os.isatty(1) else 140)
    for title, columns, rows in _tables(figures, targets):
        table = Table(*columns, title=title, title_justify="left", title_style="bold")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def markdown(figures: list[Figure], targets: list[Target], server: str, rounds: int) -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    lines = [
        "# Results of `make bench`",
        "",
        (
            f"Written by the run of {datetime.now(UTC):%Y-%m-%d}: PostgreSQL {server}, "
            f"{platform.python_implementation()} {platform.python_version()}, {libraries}; {os.cpu_count()} cores, "
            f"which server and client share. Medians of {rounds} rounds, with the fastest and the slowest in brackets; "
            "the contenders took turns in each round. Microseconds depend on this machine; only ratios within one run "
            "are claimed. How to read them: [docs/performance.md](../docs/performance.md)."
        ),
    ]
    for title, columns, rows in _tables(figures, targets):
        lines += [
            "",
            f"## {title}",
            "",
            "| " + " | ".join(columns) + " |",
            "|" + "|".join("---" for _ in columns) + "|",
        ]
        lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _tables(figures: list[Figure], targets: list[Target]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    if targets:
        yield (
            "Targets",
            ["promise", "setting", "wanted", "this run", ""],
            [
                [
                    target.promise,
                    target.setting,
                    f"{'at most' if target.at_most else 'at least'} {target.wanted:g}",
                    f"{target.value:.2f}" if target.value < 10 else f"{target.value:.0f}",
                    "met" if target.is_met else "**missed**",
                ]
                for target in targets
            ],
        )
    sections: dict[str, dict[tuple[str, str], dict[str, Figure]]] = defaultdict(lambda: defaultdict(dict))
    settings: dict[str, dict[str, None]] = defaultdict(dict)
    for figure in figures:
        sections[figure.section][figure.work, figure.contender][figure.setting] = figure
        settings[figure.section][figure.setting] = None
    for section, rows in sections.items():
        columns = list(settings[section])
        yield (
            section[0].upper() + section[1:],
            ["work", "contender", *columns],
            [
                [work, contender, *(_cell(found[setting]) if setting in found else "" for setting in columns)]
                for (work, contender), found in rows.items()
            ],
        )


def _cell(figure: Figure) -> str:
    low, high = figure.spread
    middle = _amount(figure.median, figure.unit)
    return middle if low == high else f"{middle} ({_amount(low, figure.unit)}, {_amount(high, figure.unit)})"


def _amount(value: float, unit: str) -> str:
    if unit == "s":
        for factor, name in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
            if value * factor >= 1 or name == "µs":
                return f"{_three_digits(value * factor)} {name}"
    if unit == "bytes":
        return f"{value / 2**20:,.1f} MiB" if value >= 2**20 else f"{value:,.0f} B"
    if unit == "share":
        return f"{value:.0%}"
    return f"{value:,.0f}/s"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
