"""What would stop an upgrade or a downgrade: asked of the database before anything is changed, and all of it at once.

`alembic/env.py` asks before the first revision runs, and `check` asks too. The revisions ask again for what concerns
each of them, because a table can change in between.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from alembic.util import CommandError
from sqlalchemy import event, text

from iot_models._core.shown_names import escaped, escaped_in_sql
from iot_models._migrations import expectations
from iot_models._migrations.comparison import HISTORY, KEY, TABLE
from iot_models._migrations.dependents import (
    COPIES,
    PARKED,
    PARKED_HISTORY,
    PARKED_REFUSALS,
    TRIGGER,
    columns_of_its_row_type,
    dependents,
)
from iot_models._migrations.faulty_rows import faulty_rows
from iot_models._migrations.history import added
from iot_models._migrations.places import coordinator, distribution, misplaced, partitions
from iot_models._migrations.strangers import REFUSAL, TRUSTED, VERSION_TABLE, strangers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from alembic.script import Script
    from sqlalchemy import Connection

# How long a look at the catalog counts, and what libpq says of a transaction in which nothing can be asked.
_FRESH_SECONDS: Final = 0.02
_IN_ERROR: Final = 3

# Somebody can make thousands.
_MOST_NAMED: Final = 20

# The revisions that add the shadows, and their history.
SHADOWS: Final = "076"
_HISTORY: Final = "078"
_REFUSALS: Final = "079"


class Obstacle(NamedTuple):
    """A reason why a migration cannot run.

    Attributes:
        fact: What stands in the way.
        details: Each object that it concerns.
        remedy: What to do, a sentence without its full stop.
    """

    fact: str
    details: Sequence[str]
    remedy: str

    def __str__(self) -> str:
        return "; ".join(
            [f"{self.fact}: {self.details[0]}" if self.details else self.fact, *self.details[1:], self.remedy]
        )


class Plan(NamedTuple):
    """A migration that is about to run.

    Attributes:
        scripts: The revisions that are applied or reverted.
        upgrade: Whether they are applied.
        discard: Whether a downgrade discards the shadows, their history and the refusals.
        drop: Whether a downgrade to base may drop a table with rows.
    """

    scripts: Sequence[Script]
    upgrade: bool
    discard: bool = False
    drop: bool = False

    @property
    def has_shadows(self) -> bool:
        """Whether it adds or drops the columns of the shadows."""
        return any(script.revision == SHADOWS for script in self.scripts)

    @property
    def has_history(self) -> bool:
        """Whether it makes or takes away the table of the history."""
        return any(script.revision == _HISTORY for script in self.scripts)

    @property
    def has_refusals(self) -> bool:
        """Whether it adds or drops the columns of the refusals."""
        return any(script.revision == _REFUSALS for script in self.scripts)

    @property
    def has_table(self) -> bool:
        """Whether it creates, adopts or drops `device_state`."""
        return any(script.down_revision is None for script in self.scripts)


def refuse(found: Sequence[Obstacle]) -> None:
    """Refuse to migrate if anything was found.

    Raises:
        CommandError: If there is an obstacle. The message has all of them.
    """
    if found:
        raise CommandError("\n".join(map(_paragraph, found)))


def _paragraph(obstacle: Obstacle) -> str:
    fact, remedy = escaped(obstacle.fact), _capital(escaped(obstacle.remedy))
    if not obstacle.details:
        return f"{fact}; nothing was changed. {remedy}."
    lines = "".join(f"\n  - {escaped(detail)}" for detail in obstacle.details)
    return f"{fact}; nothing was changed:{lines}\n{remedy}."


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def refuse_strangers(connection: Connection, *besides: str) -> None:
    """Refuse to work in a database where code of a stranger's would run as this role. To be called first.

    Args:
        connection: Its search path is set.
        besides: Names of tables that are used besides ours.

    Raises:
        CommandError: With every object that stands in the way.
    """
    if found := strangers(connection, *besides):
        refuse(
            [
                Obstacle(
                    REFUSAL,
                    [
                        *found[:_MOST_NAMED],
                        *([f"and {len(found) - _MOST_NAMED:,} more"] if found[_MOST_NAMED:] else []),
                    ],
                    "drop them, or migrate as their owner if you trust it (in the URL: ?options=-c role=...), and let "
                    "nobody else create objects in the schemas of the search path (REVOKE CREATE ON SCHEMA public FROM "
                    "PUBLIC)",
                )
            ]
        )


@contextmanager
def looking_again(connection: Connection) -> Iterator[None]:
    """Ask again what `refuse_strangers` asks, before each statement for which the last look is too old.

    Anybody can let a migration wait, for another deployer, for a lock or for the end of a transaction, and make
    something in the meantime. It is asked no more often, because some of it is asked while writers wait. What somebody
    makes within these milliseconds is not called either: no statement of a migration has an operator or a function for
    which there is a better match than the catalog's.

    Raises:
        CommandError: From the statement, as `refuse_strangers`.
    """
    last = time.monotonic()
    looking = False

    def before(_connection: Connection, _cursor: object, _statement: str, *_rest: object) -> None:
        nonlocal last, looking
        driver: Any = connection.connection.driver_connection
        failed = getattr(getattr(driver, "info", None), "transaction_status", None) == _IN_ERROR
        if looking or failed or time.monotonic() - last < _FRESH_SECONDS:
            return
        looking = True
        try:
            refuse_strangers(connection)
        finally:
            looking = False
            last = time.monotonic()

    event.listen(connection, "before_cursor_execute", before)
    try:
        yield
    finally:
        event.remove(connection, "before_cursor_execute", before)


def refuse_another_version_table(connection: Connection) -> None:
    """Refuse to work where something else has the name of the table in which Alembic keeps the revision.

    Raises:
        CommandError: If there is such an object.
    """
    taken_by = connection.scalar(
        text("""
            SELECT pg_catalog.pg_describe_object(CAST('pg_class' AS regclass), c.oid, 0) FROM pg_class c
             WHERE c.oid = to_regclass(CAST(:table AS text))::oid AND NOT (
                     CAST(c.relkind AS text) = 'r' AND EXISTS (
                       SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = 'version_num'))
                OR to_regclass(CAST(:table AS text)) IS NULL AND c.relname = CAST(:key AS text)
                     AND c.relnamespace = (SELECT n.oid FROM pg_namespace n WHERE n.nspname = current_schema())
            UNION ALL
            SELECT pg_catalog.pg_describe_object(CAST('pg_type' AS regclass), t.oid, 0)
              FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
             WHERE to_regclass(CAST(:table AS text)) IS NULL AND n.nspname = current_schema()
               AND t.typname = CAST(:table AS text)
             LIMIT 1
        """),
        {"table": VERSION_TABLE, "key": f"{VERSION_TABLE}_pkc"},
    )
    if taken_by:
        fact = f"{taken_by} has the name of the table in which Alembic keeps the revision, or of its key"
        refuse([Obstacle(fact, (), "rename or drop it")])


def obstacles(connection: Connection, plan: Plan) -> list[Obstacle]:
    """All that would stop a migration, as far as the database can tell before. Nothing is changed, no row is locked."""
    if not plan.scripts:
        return []
    return [*_obstacles(connection, plan)]


def _obstacles(connection: Connection, plan: Plan) -> Iterator[Obstacle]:
    yield from _settings(connection, plan)
    yield from _placement(connection)
    exists, parked = (_exists(connection, table) for table in (TABLE, PARKED))
    creates = not exists and plan.upgrade and plan.has_table
    yield from _taken_names(connection, plan, creates=creates, parked=parked)
    yield from _differences(connection, plan, exists=exists, parked=parked)
    if not exists:
        return
    yield from _rights(connection, plan, parked=parked)
    hidden = [*_hidden_rows(connection, plan, parked=parked)]
    yield from hidden
    if plan.upgrade:
        if _puts_back(connection, plan, parked=parked):
            yield from _may_make_triggers(connection)
        yield from _in_the_way_of_columns(connection, plan, parked=parked)
    else:
        yield from _dependents(connection, plan)
        if plan.has_shadows and not plan.discard:
            yield from _children(connection)
        if plan.has_table and not plan.drop and not hidden:
            yield from _rows(connection, parked=parked)


def warnings(connection: Connection, plan: Plan) -> list[str]:
    """What a migration leaves as it is, although somebody has to know of it."""
    return faulty_rows(connection) if plan.upgrade and plan.has_table else []


def interrupted_downgrade(connection: Connection) -> str | None:
    """What to do about a downgrade below 076 that has begun and has not finished; None if there is none.

    While it runs, and if it was interrupted, a trigger copies every write of a shadow to the parked table; where Citus
    has distributed `device_state`, the comment of that table says so. Until it has finished, every shadow is in its
    columns, too. Without the columns it is nobody's downgrade: the parked table may hold the only copies.
    """
    found = connection.scalar(
        text("""
            SELECT pg_catalog.format('trigger %s on %s', t.tgname, t.tgrelid::regclass)
              FROM pg_trigger t
              JOIN pg_proc p ON p.oid = t.tgfoid AND p.proname = t.tgname
              JOIN pg_attribute a ON a.attrelid = t.tgrelid AND a.attname = 'desired_state'
             WHERE t.tgrelid = to_regclass(CAST(:table AS text))::oid AND t.tgname = CAST(:trigger AS text)
            UNION ALL
            SELECT pg_catalog.format('table %s', to_regclass(CAST(:parked AS text)))
              FROM pg_attribute a
             WHERE a.attrelid = to_regclass(CAST(:table AS text))::oid AND a.attname = 'desired_state'
               AND pg_catalog.obj_description(to_regclass(CAST(:parked AS text))::oid, 'pg_class')
                     = CAST(:copies AS text)
             LIMIT 1
        """),
        {"table": TABLE, "trigger": TRIGGER, "parked": PARKED, "copies": COPIES},
    )
    if not found:
        return None
    return (
        f"a downgrade to 075 is at work or was interrupted ({found}): to finish it, run it again; to stay where the "
        "database is, run upgrade head, which takes the trigger and the copies away"
    )


def _exists(connection: Connection, table: str) -> bool:
    return bool(connection.scalar(text("SELECT to_regclass(CAST(:table AS text)) IS NOT NULL"), {"table": table}))


def _settings(connection: Connection, plan: Plan) -> Iterator[Obstacle]:
    row = connection.execute(
        text("""
            SELECT current_setting('server_encoding') AS encoding, pg_is_in_recovery() AS standby,
                   current_setting('transaction_read_only') = 'on' AS read_only
        """)
    ).one()
    if row.standby:
        yield Obstacle("this server is a standby, which only reads", (), "migrate on the primary")
    elif row.read_only:
        yield Obstacle(
            "this connection only reads (default_transaction_read_only is on)",
            (),
            "switch it off for the role that migrates (ALTER ROLE ... SET default_transaction_read_only = off), or in "
            "the URL (?options=-c default_transaction_read_only=off)",
        )
    if plan.upgrade and row.encoding == "SQL_ASCII":
        yield Obstacle(
            "the encoding of this database is SQL_ASCII, in which PostgreSQL cannot store a document with other "
            "characters than ASCII",
            (),
            "use a database with ENCODING 'UTF8': CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0, then copy "
            "the data with pg_dump",
        )


def _placement(connection: Connection) -> Iterator[Obstacle]:
    """Tables that are on other machines than a migration can work with."""
    if at := on_a_worker(connection):
        yield Obstacle(f"this server is a worker of a Citus cluster, whose coordinator is {at}", (), "migrate there")
    elif found := misplaced_tables(connection):
        yield Obstacle("Citus has our tables where the rows of a tenant are not together", found, "do that")


def on_a_worker(connection: Connection) -> str | None:
    """Where the coordinator is, if this is a worker that has no `device_state` of its own."""
    at = coordinator(connection)
    return at if at and (not _exists(connection, TABLE) or distribution(connection, TABLE)) else None


def misplaced_tables(connection: Connection) -> list[str]:
    """`places.misplaced`, of all our tables that exist."""
    others = (HISTORY, PARKED, PARKED_HISTORY, PARKED_REFUSALS)
    return misplaced(connection, TABLE, [table for table in others if _exists(connection, table)])


def _taken_names(connection: Connection, plan: Plan, *, creates: bool, parked: bool) -> Iterator[Obstacle]:
    """What has the names of tables and indexes that this migration makes: not those of tables, see `_differences`."""
    parks = not plan.upgrade and not plan.discard
    makes = [
        *[TABLE] * creates,
        *[PARKED] * (parks and plan.has_shadows and not parked),
        *[PARKED_HISTORY] * (parks and plan.has_history),
        *[PARKED_REFUSALS] * (parks and plan.has_refusals and not _exists(connection, PARKED_REFUSALS)),
        *[HISTORY] * (plan.upgrade and plan.has_history and not _exists(connection, HISTORY)),
    ]
    types = connection.scalars(
        text("""
            SELECT pg_catalog.pg_describe_object(CAST('pg_type' AS regclass), t.oid, 0)
              FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
             WHERE n.nspname = current_schema() AND t.typname = ANY (CAST(:names AS text[]))
             ORDER BY 1
        """),
        {"names": makes},
    ).all()
    indexes = {name: definition for script in plan.scripts for name, definition in added(script, "indexes").items()}
    found = [
        *(f"a table's name is taken by {kind}" for kind in types),
        *(expectations.index_differences(connection, TABLE, indexes) if creates else ()),
        *(_names_of_the_historys_indexes(connection, plan) if plan.upgrade else ()),
    ]
    if found:
        yield Obstacle("other objects have names that this migration gives to its own", found, "rename or drop them")


def _names_of_the_historys_indexes(connection: Connection, plan: Plan) -> Iterator[str]:
    """What has the names of the history's indexes, if it is no index of the history, parked or not."""
    for script in plan.scripts:
        for name, definition in added(script, "indexes", HISTORY).items():
            tables = [table for table in (HISTORY, PARKED_HISTORY) if _exists(connection, table)] or [HISTORY]
            differences = [[*expectations.index_differences(connection, table, {name: definition})] for table in tables]
            if all(differences):
                yield from differences[0]


def _differences(connection: Connection, plan: Plan, *, exists: bool, parked: bool) -> Iterator[Obstacle]:
    tables: dict[str, dict[str, Any]] = {}
    if plan.upgrade and (exists or not plan.has_table):  # otherwise it is created
        expected: dict[str, Any] = {"required": {}, "optional": {}, "primary_key": [], "indexes": {}}
        for script in plan.scripts:
            adopted = script.down_revision is None
            expected["required" if adopted else "optional"] |= added(script, "columns")
            expected["indexes"] |= added(script, "indexes")
            if adopted:
                expected["primary_key"] = [*KEY]
        tables[TABLE] = expected
    elif not plan.upgrade and not exists:
        tables[TABLE] = {}
    if plan.has_shadows and parked and not plan.discard:
        module = next(script.module for script in plan.scripts if script.revision == SHADOWS)
        tables[PARKED] = {"required": module.PARKED_COLUMNS, "primary_key": [*module.KEY]}
    tables |= {table: made for table, made in _made(plan).items() if _exists(connection, table)}
    for table, arguments in tables.items():
        found = [*expectations.differences(connection, table, **arguments)]
        if found:
            yield Obstacle(expectations.UNEXPECTED.format(table=table), found, expectations.REMEDY)


def _made(plan: Plan) -> dict[str, dict[str, Any]]:
    """The tables that these revisions make or take back, and what they have to be like where they exist."""
    return {table: made for script in plan.scripts for table, made in getattr(script.module, "MAKES", {}).items()}


def _rights(connection: Connection, plan: Plan, *, parked: bool) -> Iterator[Obstacle]:
    used = [
        *[PARKED] * (parked and (plan.has_shadows or plan.has_table)),
        *_made(plan),
    ]
    exist = [TABLE, *(table for table in used if _exists(connection, table))]
    tables = [name for table in exist for name in (table, *partitions(connection, table))]
    missing = connection.scalars(
        text("""
            SELECT pg_catalog.format('it does not own %s, whose owner is %I', c.oid::regclass,
                                     pg_get_userbyid(c.relowner))
              FROM pg_class c WHERE c.oid = ANY (CAST(CAST(CAST(:tables AS text[]) AS regclass[]) AS oid[]))
               AND NOT pg_catalog.pg_has_role(c.relowner, 'USAGE')
            UNION ALL
            SELECT pg_catalog.format('it may not CREATE in schema %I', n.nspname)
              FROM pg_namespace n
             WHERE n.oid IN (
                     SELECT c.relnamespace FROM pg_class c
                      WHERE c.oid = ANY (CAST(CAST(CAST(:tables AS text[]) AS regclass[]) AS oid[]))) AND :creates
               AND NOT pg_catalog.has_schema_privilege(n.oid, 'CREATE')
        """),
        {"tables": tables, "creates": plan.upgrade or not plan.discard},
    ).all()
    if missing:
        role = connection.scalar(text("SELECT CAST(current_user AS text)"))
        yield Obstacle(
            f"role {role} may not migrate this database", missing, "migrate as a role that owns these tables"
        )


def _hidden_rows(connection: Connection, plan: Plan, *, parked: bool) -> Iterator[Obstacle]:
    """Tables whose rows this migration reads, and of which row level security hides some from this role."""
    parks = not plan.discard and (plan.has_shadows or plan.has_refusals)
    puts_back = _puts_back(connection, plan, parked=parked)
    reads = puts_back if plan.upgrade else parks or (plan.has_table and not plan.drop)
    tables = ([TABLE, PARKED] if parked else [TABLE]) if reads else []
    if plan.has_history and not plan.upgrade and not plan.discard:
        tables.append(HISTORY)
    hidden = [table for table in tables if row_security_hides(connection, table)]
    if hidden:
        yield Obstacle(
            "a row-level security policy can hide rows from this role, and their shadows would be lost",
            hidden,
            "migrate as a role with BYPASSRLS, or take FORCE away while the owner migrates (ALTER TABLE "
            f"{hidden[0]} NO FORCE ROW LEVEL SECURITY, afterwards FORCE ROW LEVEL SECURITY)",
        )


def _puts_back(connection: Connection, plan: Plan, *, parked: bool) -> bool:
    """Whether an upgrade writes what is parked to rows of `device_state`."""
    return (parked and plan.has_shadows) or (plan.has_refusals and _exists(connection, PARKED_REFUSALS))


# Of the table and of those that inherit from it, whose rows are put back with its own.
_MAY_MAKE_TRIGGERS: Final = f"""
    WITH RECURSIVE family (oid) AS (
      SELECT to_regclass('{TABLE}')::oid
      UNION
      SELECT i.inhrelid FROM family JOIN pg_inherits i ON i.inhparent = family.oid)
    SELECT pg_catalog.concat('REVOKE TRIGGER ON ', c.oid::regclass, ' FROM ',
                             coalesce(quote_ident(CAST(r.rolname AS text)), 'PUBLIC')) AS found
      FROM family JOIN pg_class c ON c.oid = family.oid
     CROSS JOIN aclexplode(c.relacl) a LEFT JOIN pg_roles r ON r.oid = a.grantee
     WHERE a.grantee <> c.relowner AND a.privilege_type = 'TRIGGER' AND NOT coalesce({TRUSTED}, false)
     ORDER BY 1
"""  # noqa: S608 - our own text
_OTHERS_MAKE_TRIGGERS: Final = (
    f"others may make triggers on {TABLE}, which would run as this role while parked shadows are put back"
)


def _may_make_triggers(connection: Connection) -> Iterator[Obstacle]:
    """Who can let code run as this role, by a trigger that is made between two pages of rows."""
    if rights := connection.scalars(text(_MAY_MAKE_TRIGGERS)).all():
        yield Obstacle(_OTHERS_MAKE_TRIGGERS, rights, "take that right away")


def makers_of_triggers_in_sql(parked: str) -> str:
    """SQL that asks the same, if there is such a parked table, where no connection can be asked."""
    return f"""DO $$
DECLARE
  rights pg_catalog.text := (
    SELECT pg_catalog.string_agg({escaped_in_sql("asked.found")}, pg_catalog.chr(10))
      FROM ({_MAY_MAKE_TRIGGERS}) AS asked
     WHERE to_regclass('{parked}') IS NOT NULL);
BEGIN
  IF rights IS NOT NULL THEN
    RAISE EXCEPTION USING MESSAGE = '{_OTHERS_MAKE_TRIGGERS}', DETAIL = rights;
  END IF;
END $$"""  # noqa: S608 - our own text


def row_security_hides(connection: Connection, table: str) -> bool:
    """Whether policies decide which rows of a table this role sees. No if there is no such table."""
    return bool(
        connection.scalar(
            text("SELECT pg_catalog.row_security_active(to_regclass(CAST(:table AS text))::oid)"),
            {"table": table},
        )
    )


_CHILDREN: Final = text("""
    SELECT pg_catalog.format('ALTER TABLE %s NO INHERIT %s', inhrelid::regclass, inhparent::regclass) FROM pg_inherits
     WHERE inhparent = to_regclass(CAST(:table AS text))::oid
       AND NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = inhrelid AND c.relispartition) ORDER BY 1
""")


def _children(connection: Connection) -> Iterator[Obstacle]:
    """Tables whose rows PostgreSQL shows in `device_state`, and whose shadows its foreign key does not let us park."""
    if children := connection.scalars(_CHILDREN, {"table": TABLE}).all():
        fact = f"tables inherit from {TABLE}, and the shadows of their rows cannot be parked"
        yield Obstacle(fact, children, "take each of them out of the inheritance; its rows keep their columns")


def _rows(connection: Connection, *, parked: bool) -> Iterator[Obstacle]:
    for table in [TABLE, PARKED] if parked else [TABLE]:
        count: int = connection.scalar(text(f"SELECT count(*) FROM {table}")) or 0  # noqa: S608 - our names
        if count:
            yield Obstacle(
                f"{table} holds {count:,} rows, and going below 075 would drop them",
                (),
                "stay at 075, or throw them away with -x device_state=drop",
            )


_RULES: Final = text("""
    SELECT pg_catalog.format('DROP RULE %I ON %s', r.rulename, r.ev_class::regclass) FROM pg_rewrite r
     WHERE r.ev_class = to_regclass(CAST(:table AS text))::oid AND CAST(r.ev_type AS text) = '2' ORDER BY 1
""")


def _in_the_way_of_columns(connection: Connection, plan: Plan, *, parked: bool) -> Iterator[Obstacle]:
    """What keeps an upgrade from adding columns, or from dropping the parked table when all of it is put back."""
    if plan.has_shadows and (
        columns := [
            column
            for table in (TABLE, *partitions(connection, TABLE))
            for column in columns_of_its_row_type(connection, table)
        ]
    ):
        fact = f"columns have the row type of {TABLE}, and PostgreSQL adds no column to it while they do"
        yield Obstacle(fact, columns, "drop each of them, or give it another type")
    if plan.has_shadows and parked:
        rules = connection.scalars(_RULES, {"table": TABLE}).all()
        if rules:
            fact = f"rules on UPDATE of {TABLE} keep parked shadows from being put back"
            yield Obstacle(fact, rules, "drop them, and make them again afterwards")
        found = dependents(connection, PARKED, columns=[], indexes=[], whole=True)
        yield from _to_be_dropped(f"{PARKED}, which this upgrade drops", found)


def _to_be_dropped(what: str, found: Mapping[str, str | None]) -> Iterator[Obstacle]:
    if found:
        yield Obstacle(
            f"objects depend on {what}",
            [f"{name} ({statement or 'drop it'})" for name, statement in found.items()],
            "drop each of them, with what depends on it, or change it so that it does not need them; make it again "
            "after the next upgrade",
        )


def _dependents(connection: Connection, plan: Plan) -> Iterator[Obstacle]:
    """Objects of a team's that depend on what a downgrade drops."""
    columns = [name for script in plan.scripts if script.down_revision for name in added(script, "columns")]
    indexes = [name for script in plan.scripts for name in added(script, "indexes")]
    found: dict[str, str | None] = {}
    for table in (TABLE, *partitions(connection, TABLE)):
        found |= dependents(connection, table, columns=columns, indexes=indexes, whole=plan.has_table)
    what = "the table" if plan.has_table else "columns"
    yield from _to_be_dropped(f"{what} of {TABLE} that this downgrade drops", found)
    if plan.has_history:
        found = dependents(connection, HISTORY, columns=[], indexes=[], whole=True)
        yield from _to_be_dropped(f"{HISTORY}, which this downgrade takes away", found)
