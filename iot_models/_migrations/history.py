"""The revisions of this package, in whichever Alembic environment they run: ours, or a team's that lists our folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from iot_models._migrations.comparison import TABLE

if TYPE_CHECKING:
    from alembic.script import Script, ScriptDirectory

# In a wheel the scripts are inside the package, in a checkout beside it.
_INSTALLED: Final = Path(__file__).parents[1] / "alembic"
FOLDER: Final = _INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parents[1] / "alembic"


def ours(script: Script) -> bool:
    """Whether a revision is of this package, and not of a team that runs ours beside its own."""
    return Path(script.path).resolve().parent == (FOLDER / "versions").resolve()


def revisions(directory: ScriptDirectory) -> list[Script]:
    """Our revisions, the oldest first."""
    return [script for script in directory.walk_revisions() if ours(script)][::-1]


def added(script: Script, kind: str, table: str = TABLE) -> dict[str, Any]:
    """The `columns` or the `indexes` that a revision declares to add to a table, by their names."""
    found: dict[str, Any] = getattr(script.module, "ADDS", {}).get(table, {}).get(kind, {})
    return found
