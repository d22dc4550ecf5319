"""What `check` finds: the revision of a database, its differences from the models, and what a downgrade left in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sqlalchemy import text

from iot_models._migrations import runner
from iot_models._migrations.comparison import TABLE, differences
from iot_models._migrations.options import LOCK_TIMEOUT

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from iot_models._migrations.options import Options
    from iot_models._migrations.targets import Target

# For messages that tell the user what to run.
COMMAND: Final = "python -m iot_models.migrate"
# The revision that adds the shadows, and the table and the trigger that its downgrade creates.
_SHADOWS: Final = "076"
_PARKED: Final = "device_state_shadow_076"
_TRIGGER: Final = "device_state_shadow_076_park"


@dataclass(frozen=True, slots=True)
class Findings:
    """The outcome of a check.

    Attributes:
        problems: Why the database is not at head or does not equal the models, a sentence each.
        verdict: The sentence to print if there is no problem.
        note: Something else to know about the database, which is not a problem; None if there is nothing.
    """

    problems: list[str]
    verdict: str
    note: str | None


def examine(target: Target, options: Options) -> Findings:
    """Check a database. Nothing is changed, and another deployer is not waited for.

    Raises:
        CommandError: As for `runner.ask`, or as for `comparison.differences`.
        sqlalchemy.exc.DBAPIError: As for `runner.ask`.
    """
    known = runner.revisions()
    head = known[-1]

    def answer(revision: str | None, connection: Connection) -> Findings:
        database = f"database {connection.scalar(text('SELECT current_database()'))}"
        return Findings(
            problems=[
                *([] if revision == head else [f"{database} {_elsewhere(revision, known)}"]),
                *(f"{database}: {found}" for found in _interrupted_downgrade(connection)),
                # At any other revision than head the schema has to differ.
                *(differences(connection) if revision == head else []),
            ],
            verdict=f"{database} stands at head ({head}) and equals the models",
            note=_parked_shadows(connection, below=revision in {None, *known[: known.index(_SHADOWS)]}),
        )

    return runner.ask(target, options, answer)


def _elsewhere(revision: str | None, known: list[str]) -> str:
    if revision is None:
        return f"was never migrated by Alembic, head is {known[-1]}: run {COMMAND} upgrade head"
    if revision in known:
        return f"stands at {revision}, head is {known[-1]}: run {COMMAND} upgrade head"
    return (
        f"stands at {revision}, which is unknown here, where head is {known[-1]}: "
        "a newer iot_models migrated it, or the Alembic of another application"
    )


def _interrupted_downgrade(connection: Connection) -> list[str]:
    """What to do about a downgrade below 076 that has begun and has not finished; empty if there is none.

    While it runs, and if it was interrupted, a trigger copies every write of a shadow to the parked table.
    """
    found = connection.scalar(
        text("SELECT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = to_regclass(:table) AND tgname = :trigger)"),
        {"table": TABLE, "trigger": _TRIGGER},
    )
    if not found:
        return []
    copies = f"{_PARKED} p USING {TABLE} d WHERE (p.tenant_id, p.device_id) = (d.tenant_id, d.device_id)"
    stay = f"SET lock_timeout = '{LOCK_TIMEOUT}'; DROP FUNCTION {_TRIGGER}() CASCADE; DELETE FROM {copies};"  # noqa: S608 - our names
    at_work = f"a downgrade to 075 is at work or was interrupted (trigger {_TRIGGER} on {TABLE})"
    return [f"{at_work}: to finish it, run it again; to stay at 076, run one by one: {stay}"]


def _parked_shadows(connection: Connection, *, below: bool) -> str | None:
    """How many shadows are parked, and why; None if there is no parked table, or no right to read it."""
    readable = connection.scalar(text("SELECT has_table_privilege(to_regclass(:table), 'SELECT')"), {"table": _PARKED})
    if not readable:
        return None
    count = connection.scalar(text(f"SELECT count(*) FROM {_PARKED}"))  # noqa: S608 - our name
    stays = "the next upgrade puts them back" if below else "their devices are gone or have a newer shadow"
    return f"shadows parked in {_PARKED}: {count:,}; {stays}"
