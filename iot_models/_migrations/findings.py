"""What `check` finds: the revision of a database, its differences from the models, and what a downgrade left in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from iot_models import tenancy
from iot_models._core.database_errors import LOCK_NOT_AVAILABLE, sqlstate
from iot_models._core.shown_names import escaped
from iot_models._core.ways_around import creators
from iot_models._migrations import runner
from iot_models._migrations.comparison import COLUMNS, TABLE, differences
from iot_models._migrations.dependents import PARKED, PARKED_HISTORY, PARKED_REFUSALS
from iot_models._migrations.expectations import unfit
from iot_models._migrations.faulty_rows import faulty_rows
from iot_models._migrations.obstacles import (
    SHADOWS,
    Plan,
    interrupted_downgrade,
    misplaced_tables,
    obstacles,
    on_a_worker,
    row_security_hides,
)
from iot_models._migrations.version_table import unknown

if TYPE_CHECKING:
    from collections.abc import Iterable

    from alembic.script import Script
    from sqlalchemy import Connection

    from iot_models._migrations.options import Options
    from iot_models._migrations.targets import Target

# For messages that tell the user what to run.
COMMAND: Final = "python -m iot_models.migrate"


@dataclass(frozen=True, slots=True)
class Findings:
    """The outcome of a check.

    Attributes:
        problems: Why the database is not at head or does not equal the models, a sentence each.
        verdict: The sentence to print if there is no problem.
        notes: What else to know about the database and is no problem, a sentence each.
    """

    problems: list[str]
    verdict: str
    notes: list[str]


def examine(target: Target, options: Options, *, roles: Iterable[str] = ()) -> Findings:
    """Check a database. Nothing is changed, and another deployer is not waited for.

    Args:
        target: The database.
        options: As for `runner.run`.
        roles: Those that have to be limited to one tenant each, by `tenancy.enable`.

    Raises:
        CommandError: As for `runner.ask`, or as for `comparison.differences`.
        sqlalchemy.exc.DBAPIError: As for `runner.ask`.
    """
    scripts = runner.scripts()
    known = [script.revision for script in scripts]
    head = known[-1]

    def answer(revision: str | None, connection: Connection) -> Findings:
        database = f"database {connection.scalar(text('SELECT current_database()'))}"
        if at := on_a_worker(connection):
            there = f"{database} is on a worker of a Citus cluster, and its revision on the coordinator: check {at}"
            return Findings([escaped(there)], "", [])
        at_head = revision == head
        interrupted = interrupted_downgrade(connection)
        problems = [
            *([] if at_head else [f"{database} {_elsewhere(revision, known)}"]),
            *([f"{database}: {interrupted}"] if interrupted else []),
            # At any other revision than head the schema has to differ.
            *(_differences(connection) if at_head else _stops_upgrade(connection, revision, scripts)),
            *faulty_rows(connection),
            *(line for role in roles for line in _tenancy(connection, role)),
        ]
        notes = [
            *_parked(connection, revision, known),
            *_stops_downgrade(connection, revision, scripts),
            *_encoding(connection),
            *_slow_locks(connection),
            *creators(connection),
        ]
        verdict = f"{database} stands at head ({head}) and equals the models"
        return Findings([*map(escaped, problems)], escaped(verdict), [*map(escaped, notes)])

    return runner.ask(target, options, answer)


def _tenancy(connection: Connection, role: str) -> list[str]:
    try:
        ways = tenancy.check(connection, role)
    except LookupError as error:
        return [str(error)]
    return [f"role {role!a} is not limited to one tenant: {'; '.join(ways)}"] if ways else []


def _differences(connection: Connection) -> list[str]:
    return [*differences(connection), *unfit(connection, TABLE, COLUMNS), *misplaced_tables(connection)]


def _stops_upgrade(connection: Connection, revision: str | None, scripts: list[Script]) -> list[str]:
    """What an upgrade to head would be refused for."""
    known = [None, *(script.revision for script in scripts)]
    if revision not in known:
        return []
    return _found(connection, Plan(scripts[known.index(revision) :], upgrade=True))


def _stops_downgrade(connection: Connection, revision: str | None, scripts: list[Script]) -> list[str]:
    """What the rollback below the shadows would be refused for, if this is the role that would do it."""
    known = [script.revision for script in scripts]
    first = known.index(SHADOWS)
    if revision not in known[first:] or not _owns(connection):
        return []
    found = _found(connection, Plan(scripts[first : known.index(revision) + 1][::-1], upgrade=False))
    return [f"a downgrade below {SHADOWS} would be refused: {obstacle}" for obstacle in found]


def _found(connection: Connection, plan: Plan) -> list[str]:
    try:
        with connection.begin_nested() as savepoint:
            # PostgreSQL locks the table to print a default, and so waits behind an ALTER TABLE that waits itself.
            connection.execute(text("SET LOCAL lock_timeout = '1s'"))
            found = [str(obstacle) for obstacle in obstacles(connection, plan)]
            savepoint.rollback()
    except DBAPIError as error:
        if sqlstate(error) != LOCK_NOT_AVAILABLE:
            raise
        return []  # a deployer is at work, and asks itself
    return found


def _owns(connection: Connection) -> bool:
    owns = text(
        "SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = to_regclass(CAST(:table AS text))::oid"
    )
    return bool(connection.scalar(owns, {"table": TABLE}))


def _elsewhere(revision: str | None, known: list[str]) -> str:
    if revision is None:
        return f"was never migrated by Alembic, head is {known[-1]}: run {COMMAND} upgrade head"
    if revision in known:
        return f"stands at {revision}, head is {known[-1]}: run {COMMAND} upgrade head"
    return unknown(revision, known[-1])


# What is parked in which table, by the downgrade from which revision, and why some may stay after it.
_PARKED: Final = (
    ("shadows", PARKED, SHADOWS, "their devices have a newer shadow"),
    ("versions", PARKED_HISTORY, "078", "another history was made meanwhile"),
    ("refusals", PARKED_REFUSALS, "079", "their devices have a newer version"),
)


def _parked(connection: Connection, revision: str | None, known: list[str]) -> list[str]:
    """How much is parked, and why: a sentence for each table that this role may read."""
    notes = []
    for what, table, parked_from, why_it_stays in _PARKED:
        below = revision in {None, *known[: known.index(parked_from)]}
        notes += _parked_in(connection, what, table, "the next upgrade puts them back" if below else why_it_stays)
    return notes


def _parked_in(connection: Connection, what: str, table: str, why: str) -> list[str]:
    readable = connection.scalar(
        text(
            "SELECT has_table_privilege(oid, 'SELECT') FROM pg_class "
            "WHERE oid = to_regclass(CAST(:table AS text))::oid AND CAST(relkind AS text) IN ('r', 'p')"
        ),
        {"table": table},
    )
    if not readable:
        return []
    if row_security_hides(connection, table):
        return [f"there are {what} parked in {table}; row level security hides from this role how many"]
    count = connection.scalar(text(f"SELECT count(*) FROM {table}"))  # noqa: S608 - our name
    return [f"{what} parked in {table}: {count:,}; {why}"]


def _encoding(connection: Connection) -> list[str]:
    encoding = connection.scalar(text("SELECT current_setting('server_encoding')"))
    if encoding == "UTF8":
        return []
    note = (
        f"the encoding of this database is {encoding}: PostgreSQL refuses documents and ids with characters that it "
        "does not have. A database with ENCODING 'UTF8' has all of them"
    )
    return [note]


def _slow_locks(connection: Connection) -> list[str]:
    """What one GRANT would gain, if this is the role that migrates."""
    slow = connection.execute(
        text("""
            SELECT quote_ident(CAST(current_user AS text)) AS role, current_setting('deadlock_timeout') AS timeout
             WHERE NOT pg_catalog.has_parameter_privilege('deadlock_timeout', 'SET')
        """)
    ).one_or_none()
    if slow is None or not _owns(connection):
        return []
    note = (
        f"while autovacuum works on {TABLE}, one try for a lock holds writers up for {slow.timeout}, because "
        f"{slow.role} may not set deadlock_timeout. A superuser's GRANT SET ON PARAMETER deadlock_timeout TO "
        f"{slow.role} makes that 20ms"
    )
    return [note]
