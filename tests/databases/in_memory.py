"""Where the servers of a test run put their files: in memory, where the system has room for them.

PostgreSQL makes a database of three hundred files. On a disk that took nine times the processor time, fsync or not, and
as long as to migrate one.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - Linux has it, and Docker gives a container 64 MB of it
_ROOM: Final = 3 * 2**30  # the files of a whole run, and what their servers write ahead


@contextmanager
def temporary_files_in_memory() -> Iterator[None]:
    """Make a folder in memory the temporary one of this process and of those that it starts; pytest's own stays."""
    if not _has_room():
        yield
        return
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="tests-", dir=_MEMORY, ignore_cleanup_errors=True) as folder,
    ):
        Path(folder).chmod(0o711)  # the account that runs the servers passes through
        patch.setenv("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", None)  # where Python keeps the answer
        yield


def short_folder() -> str:
    """A temporary folder whose name is short enough for the sockets in it, in memory if that is where this run writes."""
    folder = tempfile.gettempdir()
    return folder if Path(folder).is_relative_to(_MEMORY) else "/tmp"  # noqa: S108 - pytest's own are too long


def _has_room() -> bool:
    if not os.access(_MEMORY, os.W_OK | os.X_OK):
        return False
    found = os.statvfs(_MEMORY)
    return found.f_bavail * found.f_frsize >= _ROOM and not found.f_flag & os.ST_NOEXEC
