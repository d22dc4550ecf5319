"""How the command prints: tables, JSON, sentences. Nothing that a stranger wrote reaches a terminal as it is."""

from __future__ import annotations

import json
import shutil
from datetime import UTC
from typing import TYPE_CHECKING, Any, Final, TextIO, TypeAlias

from iot_models._core.shown_names import escaped

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

# The cells of a row; or a remark that stands in a line of its own.
Row: TypeAlias = "Sequence[str] | str"

_GAP: Final = "  "
_CUT: Final = "..."
_LONGEST_CELL: Final = 40  # of a column that may be cut and is not the last, on a terminal
_COLOURS: Final = {
    ("change", "added"): "green",
    ("change", "changed"): "yellow",
    ("change", "removed"): "red",
    ("status", "pending"): "yellow",
    ("status", "stale"): "red",
    ("status", "synced"): "green",
}


def compact(value: Any) -> str:
    """A JSON value in one line, as a person reads it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def moment(at: datetime | None, absent: str = "never") -> str:
    """A time in UTC, to the second."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}" if at else absent


def say(stream: TextIO, sentence: str) -> None:
    """Print one line."""
    _write(stream, f"{escaped(sentence)}\n")


def print_json(stream: TextIO, value: Any) -> None:
    """Print a JSON document. It is ASCII, also where it holds characters that steer a terminal."""
    _write(stream, json.dumps(value, indent=2).replace("\x7f", "\\u007f") + "\n")


def print_table(
    stream: TextIO, headers: Sequence[str], rows: Iterable[Row], *, wide: int = 0, cut: bool = False
) -> None:
    """Print rows in aligned columns: by rich, where it is installed and this is a terminal.

    Args:
        stream: Where to.
        headers: The names of the columns.
        rows: The rows.
        wide: How many columns hold documents and words, which may be long; they are the last ones.
        cut: Whether a terminal shows only as much of these as has room in one line. What is piped is never cut.
    """
    names, safe = [*map(escaped, headers)], [*map(_escaped_row, rows)]
    narrow = len(names) - wide
    on_terminal = stream.isatty()
    if on_terminal and cut:
        safe = [row if isinstance(row, str) else _short(row, narrow) for row in safe]
    text = _drawn(stream, names, safe, narrow, cut=cut) if on_terminal else None
    if text is None:
        lines = _aligned(names, safe)
        if on_terminal and cut:
            lines = [_cut(line, shutil.get_terminal_size().columns) for line in lines]
        text = "".join(f"{line}\n" for line in lines)
    _write(stream, text)


def _escaped_row(row: Row) -> list[str] | str:
    return escaped(row) if isinstance(row, str) else [*map(escaped, row)]


def _short(row: list[str], narrow: int) -> list[str]:
    """The row with room for its last cell: those before it that may be cut are short."""
    return [*row[:narrow], *(_cut(cell, _LONGEST_CELL) for cell in row[narrow:-1]), row[-1]]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - len(_CUT), 0)] + _CUT


def _aligned(names: list[str], rows: Sequence[list[str] | str]) -> list[str]:
    cells = [names, *(row for row in rows if not isinstance(row, str))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: list[str] | str) -> str:
        if isinstance(row, str):
            return row
        return _GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()

    return [*map(line, [names, *rows])]


def _drawn(stream: TextIO, names: list[str], rows: Sequence[list[str] | str], narrow: int, *, cut: bool) -> str | None:
    """The table as rich draws it for this terminal; None without rich."""
    try:
        from rich.console import Console  # noqa: PLC0415 - it may be missing
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415
    except ImportError:
        return None
    console = Console(file=stream, markup=False, highlight=False, emoji=False)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, len(_GAP), 0, 0))
    for place, name in enumerate(names):
        # Where there is no room, rich first takes it from the columns that may be wrapped: never from a device's id.
        table.add_column(Text(name), no_wrap=place < narrow)
    for row in rows:
        if isinstance(row, str):  # in the last column, where there is most room
            cells = [Text()] * (len(names) - 1) + [Text(row, style="dim", no_wrap=False, overflow="fold")]
        else:
            cells = [
                Text(cell, style=_COLOURS.get((name, cell), ""), no_wrap=True, overflow="ellipsis")
                if cut and place >= narrow
                else Text(cell, style=_COLOURS.get((name, cell), ""), no_wrap=False, overflow="fold")
                for place, (name, cell) in enumerate(zip(names, row, strict=True))
            ]
        table.add_row(*cells)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def _write(stream: TextIO, text: str) -> None:
    """Write text; a character that the stream's encoding does not have is written as its escape."""
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
