"""The style of the plots: colours for light and dark pages, fonts, and the SVG file itself."""

from __future__ import annotations

import io
import re
from html import escape
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

# The colours on a light page; DARK has the colours that replace them on a dark page. Our colour is strong, the others
# are muted. They differ in hue and in lightness, for readers who are colour-blind.
PAPER: Final = "#ffffff"
INK: Final = "#1f2329"
FAINT_INK: Final = "#59636f"
GRID: Final = "#dfe3e8"
OURS: Final = "#0b57d0"
SLATE, TEAL, OCHRE, PLUM = "#6b7682", "#2f7d73", "#946c12", "#96588a"
DARK: Final = {
    PAPER: "#0d1117", INK: "#e6edf3", FAINT_INK: "#9aa4af", GRID: "#2b323b",
    OURS: "#6cb0ff", SLATE: "#8d97a3", TEAL: "#5fa99e", OCHRE: "#b8934a", PLUM: "#b785ad",
}  # fmt: skip
OTHERS: Final = {  # by the beginning of the contender's name
    "asyncpg": TEAL, "ORM": OCHRE, "SQLAlchemy": PLUM, "deepdiff": OCHRE, "jsonpatch": PLUM,
}  # fmt: skip

# DejaVu Sans comes with matplotlib, which computes the positions of texts with it. It is wide, so the fonts of the page
# need no more room.
MEASURED_FONT: Final = "DejaVu Sans"
SHOWN_FONT: Final = "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"
STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "iot_models",  # otherwise the ids, and so the file, are different in each run
    "font.family": [MEASURED_FONT],
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.facecolor": PAPER,
    "axes.labelcolor": FAINT_INK,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT_INK,
    "ytick.color": FAINT_INK,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top")},
    **{f"{axis}tick.{kind}.size": 0 for axis in "xy" for kind in ("major", "minor")},
}


def is_ours(contender: str) -> bool:
    return contender.startswith("ours")


def colour_of(contender: str) -> str:
    if is_ours(contender):
        return OURS
    return next((colour for name, colour in OTHERS.items() if contender.startswith(name)), SLATE)


def as_svg(canvas: Canvas, title: str, in_words: str) -> str:
    """Return the SVG file: without dates and versions, with texts for screen readers and colours for a dark page."""
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = re.sub(r"\s*<!--.*?-->|<!DOCTYPE.*?>\n", "", buffer.getvalue(), flags=re.DOTALL)
    svg = svg.replace(f"'{MEASURED_FONT}'", SHOWN_FONT)
    # A renderer without media queries uses the light colours, which are in the style of each element.
    rules = "\n".join(
        f'   [style*="{what}: {light}"] {{ {what}: {dark} !important }}'
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
    )
    style = f"<style>\n  @media (prefers-color-scheme: dark) {{\n{rules}\n  }}\n </style>"
    texts = f"<title>{escape(title)}</title>\n <desc>{escape(in_words)}</desc>"
    opening = re.search("<svg [^>]*", svg)
    assert opening
    return f'{svg[: opening.end()]} role="img">\n {texts}\n {style}{svg[opening.end() + 1 :]}'
