"""The two command lines, run in this process: ten times as fast as in a process of its own."""

from __future__ import annotations

import io
import logging
import os
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

from alembic.config import CommandLine, Config

from iot_models._migrations import command_line
from tests.databases.alembic_runs import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Outcome(NamedTuple):
    """What a command leaves: its exit code, and what it printed."""

    code: int
    out: str
    err: str


def alembic(*arguments: str, **environment: str) -> Outcome:
    """`alembic ...` in the checkout, with these variables and none of the caller's URLs.

    An error that the command would end in as a traceback is raised.
    """

    def run(out: io.StringIO) -> int:
        line = CommandLine(prog="alembic")
        options = line.parser.parse_args(arguments)
        ini = str(CHECKOUT / "alembic.ini")
        line.run_cmd(Config(ini, stdout=out, output_buffer=out, cmd_opts=options), options)
        return 0

    return _outcome(run, environment)


def migrate(*arguments: str, **environment: str) -> Outcome:
    """`python -m iot_models.migrate ...`, with these variables and none of the caller's URLs."""
    return _outcome(lambda _: command_line.main(arguments), environment)


def _outcome(run: Callable[[io.StringIO], int], environment: dict[str, str]) -> Outcome:
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("DATABASE_URL")}
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, inherited | environment, clear=True),
        mock.patch.object(sys, "path", [*sys.path]),
        _logging_as_before(),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            code = run(out)
        except SystemExit as end:
            code = int(end.code or 0)
    assert "Traceback" not in err.getvalue()
    return Outcome(code, out.getvalue(), err.getvalue())


@contextmanager
def _logging_as_before() -> Iterator[None]:
    """A command sets up the logging of its process; here pytest's handlers have to come back."""
    root, ours = logging.getLogger(), logging.getLogger("alembic")
    before = [(logger, logger.level, [*logger.handlers]) for logger in (root, ours)]
    root.handlers.clear()
    try:
        yield
    finally:
        for logger, level, handlers in before:
            logger.setLevel(level)
            logger.handlers[:] = handlers
