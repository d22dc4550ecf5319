"""Plots of a run as SVG, for light and dark pages. The same figures give the same bytes."""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import matplotlib as mpl
from look import FAINT_INK, INK, OURS, PAPER, SLATE, STYLE, as_svg, colour_of, is_ours
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from rounds import Figure

DASHES: Final = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))  # for contenders of the same colour
MARKERS: Final = "osD^"

WIDTH: Final = 8.6  # inches: 826 pixels, the width in which GitHub shows a picture
WIDE: Final = 1_000  # a logarithmic axis with a larger ratio of its ends has ticks at powers of ten only
LABEL_GAP: Final = 0.105  # share of the panel's height, for two lines of text


@dataclass(frozen=True, slots=True)
class Bar:
    """One contender's figure in the plot's unit: the median, the lowest and the highest round."""

    low: float
    median: float
    high: float


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot: which figures it shows, and how. `place` returns the panel of a figure and its place on the x axis."""

    section: str
    work: str | tuple[str, ...]  # the beginning of the figure's `work`
    title: str
    x_label: str
    unit: str
    place: Callable[[Figure], tuple[str, str]]
    amount: Callable[[float, str], float]  # from a round's value and its place on the x axis to the plot's unit
    is_log: bool = True
    is_bars: bool = False


def _number(text: str) -> str:
    return text.split(maxsplit=1)[0]


PLOTS: Final = {
    "one_device": Plot(
        "one device", "replace desired",
        "One client replaces desired documents, one after the other", "", "µs a write",
        lambda figure: (figure.setting, ""), lambda value, _: value * 1e6, is_log=False, is_bars=True,
    ),
    "buffer": Plot(
        "buffer", "reports",
        "Reports from 256 tasks on one event loop: ReportBuffer, and a call for each", "", "reports a second",
        lambda figure: (figure.setting, ""), lambda value, _: value, is_log=False, is_bars=True,
    ),
    "batches": Plot(
        "batches", "reports",
        "Reports in one call: what a device costs, by the size of the batch", "reports in the call", "µs a device",
        lambda figure: (figure.work, figure.setting), lambda value, x: value * 1e6 / float(x.replace(",", "")),
    ),
    "tasks": Plot(
        "tasks", "report",
        "Reports from many tasks on one event loop", "tasks", "reports a second",
        lambda figure: (figure.work, _number(figure.setting)), lambda value, _: value, is_log=False,
    ),
    "fleet": Plot(
        "fleet", "page of pending",
        "A page of 100 pending devices, by the size of the fleet", "devices in the fleet", "ms a page",
        lambda figure: (figure.work, _number(figure.setting)), lambda value, _: value * 1e3,
    ),
    "pages": Plot(
        "fleet", ("page of refused", "page of changes"),
        "A page of 100 refused devices, and of 100 changes, by the size of the fleet",
        "devices in the fleet", "ms a page",
        lambda figure: (figure.work, _number(figure.setting)), lambda value, _: value * 1e3,
    ),
    "documents": Plot(
        "documents", "compute_delta",
        "The delta of two documents, computed in Python", "document: of 10 settings, of 50, of 32 KB", "µs a delta",
        lambda figure: (figure.setting.partition(", ")[2], figure.setting.partition(", ")[0]),
        lambda value, _: value * 1e6,
    ),
}  # fmt: skip

# By panel, by contender, by place on the x axis.
Panels = dict[str, dict[str, dict[str, Bar]]]


def draw(figures: list[Figure], folder: Path) -> list[Path]:
    """Draw each plot that there are figures for. Return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn: list[Path] = []
    for name, plot in PLOTS.items():
        chosen = [figure for figure in figures if figure.section == plot.section and figure.work.startswith(plot.work)]
        if not chosen:
            continue
        panels: Panels = defaultdict(lambda: defaultdict(dict))
        for figure in chosen:
            panel, x = plot.place(figure)
            low, high = figure.spread
            panels[panel][figure.contender][x] = Bar(*(plot.amount(value, x) for value in (low, figure.median, high)))
        rounds = max(len(figure.rounds) for figure in chosen)
        with mpl.rc_context(STYLE):
            canvas = _bars(plot, panels) if plot.is_bars else _lines(plot, panels)
            _head(canvas, plot, rounds)
            drawn.append(folder / f"{name}.svg")
            drawn[-1].write_text(as_svg(canvas, plot.title, _in_words(plot, panels)), encoding="utf-8")
    return drawn


def _canvas(
    height: float, panels: Sequence[str], *, left: float, between: float, right: float
) -> tuple[Canvas, list[Axes]]:
    """Return a canvas with panels side by side. The margins are in inches."""
    canvas = Canvas(figsize=(WIDTH, height), facecolor=PAPER)
    width = (WIDTH - left - right - between * (len(panels) - 1)) / len(panels)
    found = []
    for n, title in enumerate(panels):
        begin = left + n * (width + between)
        axes = canvas.add_axes((begin / WIDTH, 0.55 / height, width / WIDTH, (height - 1.55) / height))
        axes.set_title(title, loc="left", fontsize=9.5, color=INK, pad=8)
        found.append(axes)
    return canvas, found


def _head(canvas: Canvas, plot: Plot, rounds: int) -> None:
    height = canvas.get_figheight()
    better = "more is better" if "second" in plot.unit else "less is better"
    scale = ", logarithmic" if plot.is_log else ""
    canvas.text(0.14 / WIDTH, 1 - 0.32 / height, plot.title, fontsize=13, weight="bold", color=INK)
    note = f"{plot.unit}{scale}; {better}. Median of {rounds} rounds, thin lines from the fastest to the slowest."
    canvas.text(0.14 / WIDTH, 1 - 0.56 / height, note, fontsize=8.5, color=FAINT_INK)


def _bars(plot: Plot, panels: Panels) -> Canvas:
    contenders = sorted(
        {contender for found in panels.values() for contender in found},
        key=lambda contender: [
            found[contender][""].median for found in reversed(panels.values()) if contender in found
        ],
        reverse=True,  # the first is drawn at the bottom
    )
    canvas, all_axes = _canvas(1.75 + 0.25 * len(contenders), list(panels), left=3.25, between=0.3, right=0.2)
    for axes, found in zip(all_axes, panels.values(), strict=True):
        for row, contender in enumerate(contenders):
            if contender not in found:
                continue
            bar = found[contender][""]
            axes.barh(row, bar.median, height=0.66, color=OURS if is_ours(contender) else SLATE, linewidth=0)
            axes.plot([bar.low, bar.high], [row, row], color=INK, linewidth=0.8, solid_capstyle="butt")
            axes.annotate(
                f"{bar.median:,.0f}", (max(bar.high, bar.median), row), (4, 0), textcoords="offset points",
                va="center", color=INK,
            )  # fmt: skip
        axes.set_xlim(0, max(bar[""].high for bar in found.values()) * 1.25)  # with room for the number
        axes.set_xlabel(plot.unit)
        axes.xaxis.set_major_formatter(FuncFormatter(_plain))
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x")
        axes.set_ylim(-0.6, len(contenders) - 0.4)
        axes.set_yticks([])
    all_axes[0].set_yticks(range(len(contenders)), contenders)
    for label in all_axes[0].get_yticklabels():
        label.set_color(OURS if is_ours(label.get_text()) else INK)
    return canvas


def _lines(plot: Plot, panels: Panels) -> Canvas:
    # The names of the lines stand beside each panel, unless there is one line only: it is ours.
    is_alone = all(len(found) == 1 for found in panels.values())
    canvas, all_axes = _canvas(
        4.4, list(panels), left=0.6, between=0.6 if is_alone else 1.95, right=0.2 if is_alone else 1.5
    )
    every = [bar for found in panels.values() for along in found.values() for bar in along.values()]
    low, high = min(bar.low for bar in every), max(bar.high for bar in every)
    for axes, found in zip(all_axes, panels.values(), strict=True):
        ticks = _along(found)
        axes.set_xticks(list(ticks.values()), [_short(x) for x in ticks])
        axes.margins(x=0.04)
        axes.set_xlabel(plot.x_label)
        if plot.is_log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < WIDE else (1,)))
            axes.set_ylim(low / 1.3, high * 1.3)  # the same scale for all panels, so that they can be compared
        else:
            axes.set_ylim(0, 1.05 * max(bar.high for along in found.values() for bar in along.values()))
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="y")
        styles: dict[str, int] = defaultdict(int)  # the number of lines drawn so far, by colour
        for contender, along in sorted(found.items(), key=lambda item: is_ours(item[0])):  # ours on top
            colour, ours = colour_of(contender), is_ours(contender)
            style = styles[colour] % len(DASHES)
            styles[colour] += 1
            xs, bars = [ticks[x] for x in along], along.values()
            axes.vlines(xs, [bar.low for bar in bars], [bar.high for bar in bars], colour, linewidth=0.8)
            axes.plot(
                xs, [bar.median for bar in bars], color=colour, linestyle=DASHES[style], marker=MARKERS[style],
                linewidth=2.2 if ours else 1.3, markersize=5 if ours else 4, markeredgewidth=0, clip_on=False,
            )  # fmt: skip
        if is_alone:
            continue
        _label(
            axes, [(ticks[x], bar.median, name) for name, along in found.items() for x, bar in list(along.items())[-1:]]
        )
    return canvas


def _label(axes: Axes, ends: list[tuple[float, float, str]]) -> None:
    """Write the names of the lines to the right of the panel, near the ends of the lines and without overlap."""
    to_fraction = (axes.transData + axes.transAxes.inverted()).transform
    ends = sorted(ends, key=lambda end: end[1])
    beside = 1 + 0.27 / (axes.get_position().width * WIDTH)
    heights = _apart([float(to_fraction(end[:2])[1]) for end in ends])
    for (x, y, contender), height in zip(ends, heights, strict=True):
        axes.annotate(
            textwrap.fill(contender, 18), (x, y), (beside, height), textcoords="axes fraction", va="center",
            color=colour_of(contender), linespacing=1.05, weight="bold" if is_ours(contender) else "normal",
            arrowprops={
                "arrowstyle": "-", "color": colour_of(contender), "linewidth": 0.5, "shrinkA": 2, "shrinkB": 4,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )  # fmt: skip


def _apart(heights: list[float]) -> list[float]:
    """Return the heights, which must be ascending, moved apart until each has room for a name."""
    placed = heights.copy()
    for _ in range(200):
        for n in range(len(placed) - 1):
            push = max(0.0, LABEL_GAP - (placed[n + 1] - placed[n])) / 2
            placed[n] -= push
            placed[n + 1] += push
        placed[0], placed[-1] = max(placed[0], 0.0), min(placed[-1], 1.0)
    return placed


def _along(found: dict[str, dict[str, Bar]]) -> dict[str, float]:
    """Return the position of each place on the x axis: logarithms of numbers, or the order of words."""
    names = list(dict.fromkeys(x for along in found.values() for x in along))
    numbers = [name.replace(",", "") for name in names]
    if all(number.isdigit() for number in numbers):
        return {name: math.log(int(number)) for name, number in zip(names, numbers, strict=True)}
    return {name: float(n) for n, name in enumerate(names)}


def _plain(value: float, _: object = None) -> str:
    return f"{value:,.9g}"


def _short(number: str) -> str:
    return number.replace(",000,000", "M").replace("0,000", "0k")


def _in_words(plot: Plot, panels: Panels) -> str:
    """Return the medians as text, for readers who cannot see the picture."""
    sentences = []
    for panel, found in panels.items():
        for contender, along in found.items():
            values = ", ".join(f"{x}: {_three_digits(bar.median)}".removeprefix(": ") for x, bar in along.items())
            sentences.append(f"{panel}, {contender}: {values}.")
    return f"{plot.unit}. {' '.join(sentences)}"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
