"""Alembic operations for a table that is in use: `op.iot_models_lock_table`, and where its companions are.

`environment` imports this module, which registers them; a revision imports nothing from the package. Each also works
offline (`--sql`), where the database cannot be asked.
"""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, cast

from alembic.operations import MigrateOperation, Operations
from alembic.util import CommandError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from iot_models._core.database_errors import LOCK_NOT_AVAILABLE, sqlstate
from iot_models._core.shown_names import escaped
from iot_models._migrations.comparison import HISTORY, TABLE
from iot_models._migrations.dependents import PARKED, TRIGGER
from iot_models._migrations.obstacles import interrupted_downgrade, makers_of_triggers_in_sql, refuse_strangers
from iot_models._migrations.places import LOCK_TIMEOUT_EVERYWHERE, distributed_beside, distribution
from iot_models._migrations.strangers import ALONE, TRUSTED, VERSION_TABLE, refusal_in_sql

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from alembic.runtime.migration import MigrationContext
    from sqlalchemy import Connection

log = logging.getLogger("alembic.iot_models")

TRIES: Final = 5
_FIRST_PAUSE: Final = 0.5  # seconds, doubled after each try: the writers that queued behind us run first
# What Citus says if a lock is not had on another machine, among other things.
_ON_A_WORKER: Final = "failure on connection marked as essential"
_MOST_NAMED: Final = 3
_MOST_OF_A_STATEMENT: Final = 200


@Operations.register_operation("iot_models_lock_table")
class LockTable(MigrateOperation):
    """Lock a table for the rest of the transaction, or give up without a change."""

    def __init__(self, table: str, mode: str, where_exists: str | None = None) -> None:
        self.table = table
        self.mode = mode
        self.where_exists = where_exists

    @classmethod
    def iot_models_lock_table(
        cls, operations: Operations, table: str, mode: str, *, where_exists: str | None = None
    ) -> None:
        """Lock `table` in `mode`: up to five tries of `lock_timeout` each, with a pause that grows.

        While a try waits for the lock, writers queue behind it. Hence several short waits instead of a long one.
        `where_exists` names another table, without which nothing is locked.

        Raises:
            CommandError: If no try got the lock. The message names the transactions that hold it and says what to do.
                Or as `refuse_strangers`, which is asked again when the lock is there.
        """
        operations.invoke(cls(table, mode, where_exists))


@Operations.implementation_for(LockTable)
def _lock_table(operations: Operations, lock: LockTable) -> None:
    statement = f"LOCK TABLE {lock.table} IN {lock.mode} MODE"
    if lock.where_exists:
        statement = f"DO $$ BEGIN IF to_regclass('{lock.where_exists}') IS NOT NULL THEN {statement}; END IF; END $$"
    if operations.get_context().as_sql:
        operations.execute(LOCK_TIMEOUT_EVERYWHERE)
        operations.execute(statement)
        return
    connection = operations.get_bind()
    connection.execute(text(LOCK_TIMEOUT_EVERYWHERE))

    def attempt() -> None:
        with connection.begin_nested():
            connection.execute(text(statement))

    patiently(connection, lock.table, attempt)
    refuse_strangers(connection)  # a trigger, say, for whose transaction the lock has waited


def patiently(connection: Connection, table: str, attempt: Callable[[], object]) -> None:
    """Do what needs a lock on a table: up to five tries of `lock_timeout` each, with a pause that grows.

    Raises:
        CommandError: If no try got the lock. The message names the transactions that hold it and says what to do.
    """
    began = time.monotonic()
    pause = _FIRST_PAUSE
    holders = ""
    for number in range(1, TRIES + 1):
        try:
            attempt()
        except DBAPIError as error:  # asyncpg's is no OperationalError
            elsewhere = _ON_A_WORKER in str(error.orig)
            if sqlstate(error) != LOCK_NOT_AVAILABLE and not elsewhere:
                raise
            failed = str(error.orig).strip()
        else:
            return
        waited = time.monotonic() - began
        holders = _lock_holders(connection, table)
        if elsewhere:
            holders = f"a transaction on a worker (the view citus_lock_waits names it; {failed}); here: {holders}"
        log.warning("%s is in use (%s): try %d of %d, %.1f s so far", table, holders, number, TRIES, waited)
        if number < TRIES:
            time.sleep(pause)
            pause *= 2
    timeout = connection.scalar(text("SHOW lock_timeout"))
    raise CommandError(
        f"no lock on {table} after {TRIES} tries of {timeout} in {time.monotonic() - began:.1f} s; this step "
        f"changed nothing. It is held by: {holders}. End that transaction, or run the same command again at a quieter "
        "moment, or with a longer -x lock_timeout=10s (writers may then have to wait that long)."
    )


@Operations.register_operation("iot_models_is_distributed")
class IsDistributed(MigrateOperation):
    """Whether Citus has distributed a table. Offline nothing is known, and the answer is no."""

    def __init__(self, table: str) -> None:
        self.table = table

    @classmethod
    def iot_models_is_distributed(cls, operations: Operations, table: str) -> bool:
        """Whether rows of a table are on other machines; offline False."""
        found: bool = operations.invoke(cls(table))
        return found


@Operations.implementation_for(IsDistributed)
def _is_distributed(operations: Operations, operation: IsDistributed) -> bool:
    if operations.get_context().as_sql:
        return False
    return distribution(operations.get_bind(), operation.table) is not None


@Operations.register_operation("iot_models_distribute")
class Distribute(MigrateOperation):
    """Distribute a table as another one is."""

    def __init__(self, table: str, beside: str) -> None:
        self.table = table
        self.beside = beside

    @classmethod
    def iot_models_distribute(cls, operations: Operations, table: str, *, beside: str) -> None:
        """Distribute `table` as `beside` is, if that is distributed: each tenant is then on the same machine in both.

        Nothing happens if it is not, or if `table` is distributed already.
        """
        operations.invoke(cls(table, beside))


@Operations.implementation_for(Distribute)
def _distribute(operations: Operations, operation: Distribute) -> None:
    operations.execute(distributed_beside(operation.table, operation.beside))


@Operations.register_operation("iot_models_look_again")
class LookAgain(MigrateOperation):
    """Ask once more whether code of a stranger's would run."""

    @classmethod
    def iot_models_look_again(cls, operations: Operations) -> None:
        """Refuse what a statement of this revision has bound to an object of a stranger's; its transaction is undone.

        Raises:
            CommandError: As `refuse_strangers`. Printed SQL raises an exception of PostgreSQL's.
        """
        operations.invoke(cls())


@Operations.implementation_for(LookAgain)
def _look_again(operations: Operations, _again: LookAgain) -> None:
    if operations.get_context().as_sql:
        operations.execute(refusal_in_sql())
    else:
        refuse_strangers(operations.get_bind())


@Operations.register_operation("iot_models_nobody_makes_triggers")
class NobodyMakesTriggers(MigrateOperation):
    """Ask in printed SQL what is otherwise asked before the first change."""

    def __init__(self, parked: str) -> None:
        self.parked = parked

    @classmethod
    def iot_models_nobody_makes_triggers(cls, operations: Operations, parked: str) -> None:
        """Let printed SQL put nothing back from `parked` while others may make triggers on `device_state`."""
        operations.invoke(cls(parked))


@Operations.implementation_for(NobodyMakesTriggers)
def _nobody_makes_triggers(operations: Operations, asked: NobodyMakesTriggers) -> None:
    operations.execute(makers_of_triggers_in_sql(asked.parked))


def ensure_version_table(connection: Connection) -> None:
    """Make the table in which Alembic keeps the revision, as Alembic would. The caller commits."""
    connection.execute(
        text(f"""
            DO $$ BEGIN
              IF to_regclass('{VERSION_TABLE}') IS NULL THEN
                CREATE TABLE {VERSION_TABLE} (
                  version_num VARCHAR(32) NOT NULL, CONSTRAINT {VERSION_TABLE}_pkc PRIMARY KEY (version_num));
              END IF;
            END $$
        """)
    )


_OWNED: Final = text("""
    SELECT named.table FROM pg_catalog.unnest(CAST(:tables AS text[])) AS named ("table")
      JOIN pg_class c ON c.oid = CAST(to_regclass(named.table) AS oid)
     WHERE pg_catalog.pg_has_role(c.relowner, 'USAGE') AND current_setting('transaction_read_only') = 'off'
""")


def keep_for_the_owner(migration: MigrationContext) -> None:
    """Take from others every right on the tables that are ours alone, but that to read the revision.

    A trigger that somebody makes there runs as whoever migrates. The lock waits for one that is not committed yet, and
    the look for strangers that follows names it. Rights can come from default privileges, from a GRANT on all tables,
    or with a table that was taken over. The caller commits.

    Raises:
        CommandError: As `op.iot_models_lock_table`.
    """
    connection = cast("Connection", migration.connection)  # None offline only
    for table in connection.scalars(_OWNED, {"tables": [*ALONE]}).all():
        Operations(migration).invoke(LockTable(table, "SHARE ROW EXCLUSIVE"))
        connection.execute(text(_revoke(table)))


def rights_taken_in_sql() -> Iterator[str]:
    """SQL that does the same where no connection can be asked. The look for strangers has to follow."""
    yield from map(_revoke, ALONE)


def _revoke(table: str) -> str:
    return f"""DO $$
DECLARE granted record;
BEGIN
  IF EXISTS (SELECT FROM pg_class c WHERE c.oid = CAST(to_regclass('{table}') AS oid)
                AND pg_catalog.pg_has_role(c.relowner, 'USAGE')) THEN
    LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE;
    FOR granted IN
      SELECT CASE WHEN a.grantee = CAST(0 AS oid) THEN 'PUBLIC'
             ELSE quote_ident(CAST(pg_get_userbyid(a.grantee) AS text)) END AS role,
             pg_catalog.bool_or(a.privilege_type = 'SELECT') AS reads
        FROM pg_class c CROSS JOIN LATERAL (
               SELECT grantee, privilege_type FROM aclexplode(c.relacl)
               UNION ALL
               SELECT e.grantee, e.privilege_type
                 FROM pg_attribute t CROSS JOIN aclexplode(t.attacl) e WHERE t.attrelid = c.oid) a
       WHERE c.oid = CAST(to_regclass('{table}') AS oid) AND a.grantee <> c.relowner
         AND NOT EXISTS (SELECT FROM pg_roles r WHERE r.oid = a.grantee AND ({TRUSTED}))
       GROUP BY a.grantee
    LOOP
      EXECUTE 'REVOKE ALL PRIVILEGES ON {table} FROM ' || granted.role || ' CASCADE';
      IF granted.reads AND '{table}' = '{VERSION_TABLE}' THEN
        EXECUTE 'GRANT SELECT ON {table} TO ' || granted.role;
      END IF;
    END LOOP;
  END IF;
END $$"""  # noqa: S608 - our names


def undo_interrupted_downgrade(migration: MigrationContext) -> None:
    """Take away what a downgrade below 076 that did not finish has left: its trigger, the function, the copies.

    Until such a downgrade has finished, every shadow is in its columns, too: the parked table holds copies. The caller
    commits.

    Raises:
        CommandError: As `op.iot_models_lock_table`; then nothing is taken away.
    """
    connection = migration.connection
    if connection is None or not interrupted_downgrade(connection):
        return
    Operations(migration).invoke(LockTable(TABLE, "ACCESS EXCLUSIVE"))
    connection.execute(text(f"DROP FUNCTION IF EXISTS {TRIGGER}() CASCADE"))  # with the triggers that call it
    connection.execute(text(f"DROP TABLE IF EXISTS {PARKED}"))
    log.warning("a downgrade to 075 was interrupted: its trigger and its copies of the shadows are taken away")


def _lock_holders(connection: Connection, table: str) -> str:
    rows = connection.execute(
        text("""
            SELECT DISTINCT
                   CASE WHEN p.gid IS NULL THEN pg_catalog.concat(
                     'pid ', a.pid, ' (', coalesce(nullif(a.application_name, ''),
                     CAST(a.usename AS text), a.backend_type), ', ', coalesce(a.state, 'at work'))
                   ELSE pg_catalog.concat('the prepared transaction ', pg_catalog.quote_literal(p.gid),
                     ' (which stays until ROLLBACK PREPARED ', pg_catalog.quote_literal(p.gid),
                     ' or COMMIT PREPARED ', pg_catalog.quote_literal(p.gid)) END AS holder,
                   round(extract(epoch FROM clock_timestamp() - coalesce(a.xact_start, p.prepared))) AS seconds
              FROM pg_locks l LEFT JOIN pg_stat_activity a USING (pid)
              -- A prepared transaction has no process. Its other lock, on its own id, says which one it is.
              LEFT JOIN pg_locks own ON l.pid IS NULL AND own.pid IS NULL AND own.locktype = 'transactionid'
                    AND own.virtualtransaction = l.virtualtransaction
              LEFT JOIN pg_prepared_xacts p ON p.transaction = own.transactionid
             WHERE l.relation IN (
                     SELECT to_regclass(CAST(:table AS text))::oid
                     UNION ALL
                     SELECT CAST(relid AS oid)
                       FROM pg_catalog.pg_partition_tree(to_regclass(CAST(:table AS text))) AS partition)
               AND l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
               AND (a.pid IS NOT NULL OR p.gid IS NOT NULL)
               AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
             ORDER BY seconds DESC NULLS LAST LIMIT 3
        """),
        {"table": table},
    )
    return "; ".join(f"{escaped(row.holder)}, for {row.seconds} s)" for row in rows) or "no transaction any more"


# Whoever makes an object has a lock on it that only it sees, and one on its own transaction's id.
_OPEN: Final = text("""
    SELECT DISTINCT ON (l.virtualtransaction)
           CASE WHEN p.gid IS NULL THEN pg_catalog.concat('pid ', a.pid, ', role ', a.usename, ', application ',
                                                          coalesce(nullif(a.application_name, ''), '?'))
           ELSE pg_catalog.concat('the prepared transaction ', pg_catalog.quote_literal(p.gid),
                                  ', which stays until ROLLBACK PREPARED') END AS holder,
           CASE WHEN l.relation IS NULL THEN 2 WHEN l.relation = ANY (CAST(CAST(:tables AS bigint[]) AS oid[])) THEN 1
           ELSE 0 END AS rank
      FROM pg_locks l LEFT JOIN pg_stat_activity a USING (pid)
      -- A prepared transaction has no process. Its other lock, on its own id, says which one it is.
      LEFT JOIN pg_locks own ON l.pid IS NULL AND own.pid IS NULL AND own.locktype = 'transactionid'
            AND own.virtualtransaction = l.virtualtransaction
      LEFT JOIN pg_prepared_xacts p ON p.transaction = own.transactionid
     WHERE l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
       AND coalesce(a.datname, p.database) = current_database()
       AND (l.locktype = 'transactionid'
            OR l.locktype = 'relation' AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
               AND (l.relation = ANY (CAST(CAST(:tables AS bigint[]) AS oid[]))
                    OR NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = l.relation)))
     ORDER BY l.virtualtransaction, rank
""")


@contextmanager
def naming_who_was_waited_for(connection: Connection) -> Iterator[None]:
    """Say which transactions are open, where a statement has not had a lock for which `iot_models_lock_table` asks.

    Whoever makes an object under a name of ours, and does not commit, makes us wait without having locked anything of
    ours.

    Raises:
        CommandError: In the place of PostgreSQL's error.
    """
    try:
        yield
    except DBAPIError as error:
        if sqlstate(error) != LOCK_NOT_AVAILABLE:
            raise
        connection.rollback()
        tables = text("""
            SELECT ARRAY(SELECT CAST(CAST(to_regclass(name) AS oid) AS bigint)
                           FROM pg_catalog.unnest(CAST(:names AS text[])) AS name WHERE to_regclass(name) IS NOT NULL)
        """)
        ours = connection.scalar(tables, {"names": [TABLE, HISTORY, *ALONE]})
        rows = sorted(connection.execute(_OPEN, {"tables": ours}), key=lambda row: row.rank)
        timeout = connection.scalar(text("SHOW lock_timeout"))
        connection.rollback()
        waiting = " ".join((error.statement or "").split())[:_MOST_OF_A_STATEMENT]
        raise CommandError(
            f"another transaction stood in the way of this statement for {timeout}: {waiting}\n"
            "This step changed nothing. Perhaps it makes an object with the same name. Open are: "
            f"{escaped('; '.join(row.holder for row in rows[:_MOST_NAMED])) or 'none any more'}. End that transaction, "
            "or run the same command again."
        ) from error
