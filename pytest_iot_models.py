"""pytest fixtures for applications that use iot_models: migrated databases, a session that is undone, a small fleet.

pytest imports this module at every start. So the module is outside the package, whose import also imports SQLAlchemy,
and each fixture imports what it needs when a test asks for it. No server starts before that.

There are no assertions here for pytest to rewrite, so the module may be imported before pytest does it:
PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from typing import TYPE_CHECKING
from urllib.parse import quote, quote_plus, unquote, unquote_plus

import pytest

if TYPE_CHECKING:
    from collections.abc import Collection, Generator, Iterator

    from sqlalchemy import Engine
    from sqlalchemy.orm import Session

    from iot_models.testing import PostgresServer
    from iot_models.testing.sample_fleet import SampleFleet

_USED = pytest.StashKey[str]()
_HIDDEN = pytest.StashKey[set[str]]()


_PASSWORD = re.compile(r"://[^:/]*:([^@]+)@|[?&](?:ssl)?password=([^&]+)")
# Where pytest may have cut a text: at an abbreviation, and at both ends of a line of a diff, which may have colours.
_CUT = re.compile(r"(\.\.\.)|@")
_DIFF = re.compile(r"^\s*(?:E\s+)?(?:\x1b\[[\d;]*m)*[-+] (.*?)(?:\x1b\[[\d;]*m)*$")
# At both ends of any other line, too: what may stand there before and after a piece of a longer text.
_BEFORE = re.compile(r"(?:\x1b\[[\d;]*m|[\s|>E+?b'\"()\[\]{},-])*")
_AFTER_REVERSED = re.compile(r"(?:m[\d;]*\[\x1b|[\s'\"()\[\]{},])*")
_SHORTEST_PIECE = 4


def _passwords() -> set[str]:
    """Those in IOT_MODELS_TEST_DATABASE_URL, in each form in which a report may show them.

    As they are written there, as they are, as SQLAlchemy writes them, and as a `repr` of these. A plus sign is a space
    in the query of a URL, and a plus sign before its host: both readings count.
    """
    found = ["".join(groups) for groups in _PASSWORD.findall(os.environ.get("IOT_MODELS_TEST_DATABASE_URL", ""))]
    plain = [read(password) for password in found for read in (unquote, unquote_plus)]
    encoded = [quote(password, safe=safe) for password in plain for safe in ("", " +", "/")]
    forms = {*found, *plain, *encoded, *map(quote_plus, plain)}
    forms |= {repr((mark + form).encode(errors="surrogateescape"))[3:-1] for form in forms for mark in "'\""}
    # With either quotation mark around it; and once more, as the repr of a repr in an assertion.
    for _ in range(2):
        forms |= {repr(mark + form)[2:-1] for form in forms for mark in "'\""}
    return forms


def pytest_configure(config: pytest.Config) -> None:
    """Remember the passwords: a test may change the variable, or the whole environment."""
    config.stash[_HIDDEN] = _passwords()
    config.pluginmanager.register(_Logged(config), "iot_models_reports")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Hide the passwords of IOT_MODELS_TEST_DATABASE_URL in the report of a test, and in what the test printed."""
    report = yield
    _hide(report, item.config)
    return report


class _Logged:
    """Hides them once more in what is logged: subtests add to their reports, and then log them themselves."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        _hide(report, self._config)


def _without_pieces(said: str, passwords: Collection[str]) -> str:
    """The text without what a cut has left of a password: at the cut, or before the `@` of a URL."""
    pieces = {
        password[start : start + _SHORTEST_PIECE]
        for password in passwords
        for start in range(len(password) - _SHORTEST_PIECE + 1)
    }
    # Most texts have none, and some are long.
    if not any(piece in said for piece in pieces):
        return said
    return "\n".join(
        _line_without_pieces(line, passwords, pieces) if any(piece in line for piece in pieces) else line
        for line in said.split("\n")
    )


def _line_without_pieces(line: str, passwords: Collection[str], pieces: Collection[str]) -> str:
    def until(end: int) -> tuple[int, int]:
        size = 0
        while size < end and any(line[end - size - 1 : end] in password for password in passwords):
            size += 1
        return end - size, end

    def since(start: int) -> tuple[int, int]:
        end = start
        while end < len(line) and any(line[start : end + 1] in password for password in passwords):
            end += 1
        return start, end

    found: list[tuple[int, int]] = []
    for cut in _CUT.finditer(line):
        found += [until(cut.start()), since(cut.end())] if cut[1] else [until(cut.start())]
    if (of_diff := _DIFF.search(line)) is not None:
        found += [since(of_diff.start(1)), until(of_diff.end(1))]
    found += _at_the_ends(line, passwords, pieces)
    shown, at = "", 0
    for start, end in sorted(found):
        if end - start >= _SHORTEST_PIECE:
            shown += f"{line[at:start]}***" if start >= at else ""
            at = max(at, end)
    return shown + line[at:]


def _at_the_ends(line: str, passwords: Collection[str], pieces: Collection[str]) -> Iterator[tuple[int, int]]:
    """Ends of a password where the line begins, beginnings where it ends, and a line that is all of one piece."""
    before, after = (len(run[0]) if run else 0 for run in (_BEFORE.match(line), _AFTER_REVERSED.match(line[::-1])))
    starts = [start for start in range(before + 1) if line[start : start + _SHORTEST_PIECE] in pieces]
    ends = [
        end for end in range(len(line) - after, len(line) + 1) if line[max(0, end - _SHORTEST_PIECE) : end] in pieces
    ]
    for password in passwords:
        sizes = range(_SHORTEST_PIECE, len(password))
        yield from ((start, start + n) for start in starts for n in sizes if line.startswith(password[-n:], start))
        yield from ((end - n, end) for end in ends for n in sizes if line.endswith(password[:n], 0, end))
    yield from (
        (start, end) for start in starts for end in ends if any(line[start:end] in password for password in passwords)
    )


def _hide(report: pytest.TestReport, config: pytest.Config) -> None:
    known = config.stash[_HIDDEN]
    known.update(_passwords())  # a test may have set another one
    passwords = sorted(known, key=len, reverse=True)
    if not passwords:
        return

    def hidden(said: str) -> str:
        for password in passwords:
            said = said.replace(password, "***")
        return _without_pieces(said, passwords)

    report.sections = [(name, hidden(content)) for name, content in report.sections]
    if isinstance(report.longrepr, tuple):  # of a skip: the file, the line and the reason
        path, line, reason = report.longrepr
        report.longrepr = (path, line, hidden(reason))
    elif report.longrepr is not None and (shown := hidden(said := str(report.longrepr))) != said:
        report.longrepr = shown
    report.user_properties = [
        (hidden(name), value if (shown := hidden(said := str(value))) == said else shown)
        for name, value in report.user_properties
    ]
    if hasattr(report, "wasxfail"):
        report.wasxfail = hidden(report.wasxfail)
    # The message and the parameters of a subtest, which stand in its heading.
    if (of_subtest := getattr(report, "context", None)) is not None:
        parameters = {name: hidden(v if isinstance(v, str) else repr(v)) for name, v in of_subtest.kwargs.items()}
        object.__setattr__(of_subtest, "kwargs", parameters)  # frozen
        if of_subtest.msg is not None:
            object.__setattr__(of_subtest, "msg", hidden(str(of_subtest.msg)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print which server the run used, if it used one."""
    if _USED in config.stash:
        terminalreporter.write_line(f"shadow_server: {config.stash[_USED]}")


@pytest.fixture(scope="session")
def shadow_server(pytestconfig: pytest.Config) -> Iterator[PostgresServer]:
    """The PostgreSQL of this run: at IOT_MODELS_TEST_DATABASE_URL, else a container, else the throwaway server."""
    from iot_models.testing import NoServerError, postgres_server  # noqa: PLC0415

    with ExitStack() as stack:
        try:
            server = stack.enter_context(postgres_server())
        except NoServerError as error:
            raise pytest.fail.Exception(str(error), pytrace=False) from None  # the message says enough
        pytestconfig.stash[_USED] = server.description
        yield server


@pytest.fixture(scope="session")
def shadow_template(shadow_server: PostgresServer) -> Iterator[str]:
    """URL of a database at the newest revision. All others are copies of it. Override it to add tables of your own."""
    from iot_models import migrate, testing  # noqa: PLC0415

    with testing.database(shadow_server) as url:
        migrate.upgrade(url)
        yield url


@pytest.fixture
def shadow_database(shadow_server: PostgresServer, shadow_template: str) -> Iterator[str]:
    """URL of a database for this test alone, for code that commits or makes its own engine, and for async code."""
    from iot_models import testing  # noqa: PLC0415

    with testing.database(shadow_server, shadow_template) as url:
        yield url


@pytest.fixture(scope="session")
def shadow_engine(shadow_server: PostgresServer, shadow_template: str) -> Iterator[Engine]:
    """An engine on the database that the tests of this run share. Leave the database as it was."""
    from iot_models import testing  # noqa: PLC0415
    from iot_models.engine import create_engine  # noqa: PLC0415

    with testing.database(shadow_server, shadow_template) as url:
        # No timeout: at the prompt of a debugger, the transaction is idle.
        engine = create_engine(url, idle_in_transaction_session_timeout=None)
        yield engine
        engine.dispose()


@pytest.fixture
def shadow_session(shadow_engine: Engine) -> Iterator[Session]:
    """A session whose commits and rollbacks end savepoints only. All its changes are undone after the test."""
    from sqlalchemy.orm import Session  # noqa: PLC0415

    with shadow_engine.connect() as connection, connection.begin() as transaction:
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            yield session
        transaction.rollback()


@pytest.fixture
def shadow_fleet(shadow_session: Session) -> SampleFleet:
    """Twelve devices in `shadow_session`: one in each of six states, and six of another tenant. Returns their ids."""
    from iot_models.testing.sample_fleet import add_sample_fleet  # noqa: PLC0415

    fleet = add_sample_fleet(shadow_session)
    shadow_session.commit()  # ends a savepoint, so that a rollback in the test does not undo the fleet
    return fleet
