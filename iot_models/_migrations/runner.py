"""Run the migrations that this package contains, by Alembic with a configuration in memory and no ini file."""

from __future__ import annotations

import threading
from argparse import Namespace
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from alembic import command, context, op
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from iot_models._migrations import history as ours
from iot_models._migrations.targets import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from alembic.runtime.migration import MigrationContext
    from alembic.script import Script
    from sqlalchemy import Connection, Engine

    from iot_models._migrations.options import Options
    from iot_models._migrations.targets import Target

_T = TypeVar("_T")

# Alembic's `context` and `op` are global to the process: two threads would migrate each other's database.
_ONE_AT_A_TIME: Final = threading.Lock()
_OPTION: Final = "--url"  # gives our command line the URL


def run(move: Callable[..., None], target: Target, revision: str, options: Options) -> None:
    """Run `alembic.command.upgrade` or `downgrade` on a database.

    Raises:
        CommandError: If the URL or engine cannot be used, the server cannot be reached, or a migration is refused.
        sqlalchemy.exc.DBAPIError: If PostgreSQL refuses a statement.
    """
    with _config(options, target=resolve(target, option=_OPTION)) as config:
        move(config, revision)


def offline(move: Callable[..., None], revision: str, options: Options) -> str:
    """The SQL that `run` would run. It needs no database.

    Raises:
        CommandError: If there is no such revision, or an option is wrong.
    """
    output = StringIO()
    with _config(options, output=output) as config:
        move(config, revision, sql=True)
    return output.getvalue()


def ask(target: Target, options: Options, question: Callable[[str | None, Connection], _T]) -> _T:
    """The answer to a question about a database: a function of its revision (None before the first) and a connection.

    Nothing is changed, and another deployer is not waited for. What the question does not commit is rolled back.

    Raises:
        CommandError: As for `run`.
        sqlalchemy.exc.DBAPIError: As for `run`.
    """
    answers: list[_T] = []

    def answer(revisions: tuple[str, ...], context: MigrationContext) -> list[object]:
        connection = cast("Connection", context.connection)  # None offline only
        answers.append(question(", ".join(revisions) or None, connection))
        return []  # run no revision

    with _config(options, target=resolve(target, option=_OPTION)) as config:
        scripts = ScriptDirectory.from_config(config)
        with EnvironmentContext(config, scripts, fn=answer, dont_mutate=True):
            scripts.run_env()
    return answers[0]


def sql(revision_range: str, options: Options) -> str:
    """The SQL from one revision to another, up or down. It needs no database.

    Raises:
        CommandError: If it is not a range of revisions, or an option is wrong.
    """
    first, _, last = revision_range.partition(":")
    if not (first and last):
        raise CommandError(f"{revision_range!r} is no range of revisions: write FROM:TO, as in 075:076 or 076:075")
    order = ["base", *revisions()]
    start, end = (order.index(_resolve(name)) for name in (first, last))
    return offline(command.upgrade if start <= end else command.downgrade, revision_range, options)


def revisions() -> list[str]:
    """All revisions, the oldest first."""
    return [script.revision for script in scripts()]


def scripts() -> list[Script]:
    """The files of all revisions, the oldest first."""
    return [*_directory().walk_revisions()][::-1]


def history() -> str:
    """A line for each revision, the newest first, as `alembic history` prints them."""
    lines = (
        script.cmd_format(verbose=False, include_branches=True, include_doc=True, include_parents=True)
        for script in _directory().walk_revisions()
    )
    return "".join(f"{line}\n" for line in lines)


def _resolve(name: str) -> str:
    """The revision that a name means: its own id, the beginning of it, or `head`. `base` stays `base`.

    Raises:
        CommandError: If there is none.
    """
    script: Script | None = _directory().get_revision(name)  # Alembic's annotation leaves None out
    return "base" if script is None else script.revision


def _directory() -> ScriptDirectory:
    with _config({}) as config:
        return ScriptDirectory.from_config(config)


@contextmanager
def _config(
    options: Options, *, target: Engine | Connection | None = None, output: StringIO | None = None
) -> Iterator[Config]:
    config = Config(
        output_buffer=output,
        cmd_opts=Namespace(x=[f"{name}={value}" for name, value in options.items() if value is not None]),
        attributes={"target": target},
    )
    config.set_main_option("script_location", str(ours.FOLDER).replace("%", "%%"))
    # Within a team's env.py, `context` and `op` are the proxies of its own run, which ours would leave empty.
    outer: list[Any] = [proxy for module in (context, op) if (proxy := vars(module).get("_proxy"))]
    with _ONE_AT_A_TIME:
        try:
            yield config
        finally:
            for proxy in outer:
                proxy._install_proxy()  # noqa: SLF001 - what Alembic does when it begins a run
