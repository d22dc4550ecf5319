"""Tenants kept apart by PostgreSQL itself, for teams that want it: row level security on the tables of this package.

It is off until a team calls `enable`, once for each role that its application logs in as. No migration switches it on
or off. From then on that role reads and writes the rows of one tenant: the tenant to which the transaction is bound, by
`bind_tenant` or by a `ShadowService` made with `bind_tenant=True`. In a transaction that is not bound to a tenant there
are no rows. The owner of the table, which is the role that migrates it, sees all rows.

It protects from a forgotten condition in the ORM, in a report or in raw SQL. It does not protect from code that binds
another tenant: code that can run any SQL as that role can do that, too.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast
from weakref import ref

from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from iot_models._core import loaded_objects, validation
from iot_models._core.database_errors import LOCK_NOT_AVAILABLE, sqlstate
from iot_models._core.shown_names import escaped
from iot_models._core.ways_around import creators, table_names, ways_around
from iot_models.models import DeviceState

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from sqlalchemy import Connection
    from sqlalchemy.engine import Transaction
    from sqlalchemy.orm import Session, SessionTransaction, scoped_session

log = logging.getLogger(__name__)

POLICY: Final = "iot_models_tenant"
SETTING: Final = "app.tenant_id"

_TABLE: Final = DeviceState.__tablename__
# Written as PostgreSQL writes it back, because the two are compared. Never '': a setting that was set in a transaction
# is '' after it, for as long as the connection lives.
_RULE: Final = f"((tenant_id = current_setting('{SETTING}'::text, true)) AND (tenant_id <> ''::text))"
_BOUND: Final = "iot_models.tenancy.bound"

_POLICY_NOW: Final = text("""
    SELECT ARRAY(SELECT CAST(rolname AS text) FROM pg_roles WHERE oid = ANY (p.polroles)) AS roles,
           c.relrowsecurity AND p.polpermissive AND p.polcmd = '*'
             AND pg_get_expr(p.polqual, c.oid) = CAST(:rule AS text)
             AND pg_get_expr(p.polwithcheck, c.oid) = CAST(:rule AS text) AS in_force
      FROM pg_class c JOIN pg_policy p ON p.polrelid = c.oid
     WHERE c.oid = CAST(to_regclass(CAST(:table AS text)) AS oid) AND CAST(p.polname AS text) = CAST(:policy AS text)
""")

# Who owns the table, if nobody trusts that role. The search path of a superuser may lead into a schema of a stranger's,
# as "$user" does: then this would protect a table of its own, and leave ours open.
_STRANGER: Final = text("""
    SELECT quote_ident(CAST(r.rolname AS text)) FROM pg_class c JOIN pg_roles r ON r.oid = c.relowner
     WHERE c.oid = CAST(to_regclass(CAST(:table AS text)) AS oid) AND NOT r.rolsuper
       AND NOT EXISTS (SELECT FROM pg_database WHERE datname = current_database() AND datdba = r.oid)
       AND EXISTS (SELECT FROM pg_roles WHERE rolname = CURRENT_USER AND rolsuper)
""")

# Policies apply to the members of the roles that they name.
_IS_ONE_OF: Final = text("""
    SELECT EXISTS (SELECT FROM pg_roles me JOIN pg_roles r ON r.oid = me.oid OR pg_has_role(me.oid, r.oid, 'USAGE')
                    WHERE CAST(me.rolname AS text) = CAST(:role AS text)
                      AND CAST(r.rolname AS text) = ANY (CAST(:roles AS text[])))
""")

_SHUT_OUT: Final = text("""
    SELECT DISTINCT coalesce(quote_ident(CAST(r.rolname AS text)), 'PUBLIC')
      FROM pg_class c CROSS JOIN aclexplode(c.relacl) a LEFT JOIN pg_roles r ON r.oid = a.grantee
     WHERE c.oid = CAST(to_regclass(CAST(:table AS text)) AS oid) AND c.relrowsecurity
       AND a.privilege_type IN ('SELECT', 'INSERT', 'UPDATE', 'DELETE')
       AND NOT coalesce(r.rolsuper OR r.rolbypassrls OR pg_has_role(r.oid, c.relowner, 'USAGE'), false)
       AND NOT EXISTS (
         SELECT FROM pg_policy p CROSS JOIN pg_catalog.unnest(p.polroles) AS granted
          WHERE p.polrelid = c.oid AND (granted = CAST(0 AS oid) OR pg_has_role(r.oid, granted, 'USAGE')))
     ORDER BY 1
""")


def enable(connection: Connection, role: str) -> None:
    """From the end of this transaction on, `role` reads and writes the rows of the tenant to which it is bound.

    Call it as the table's owner, once for each role that the application logs in as. A second call changes nothing.
    All these roles share one policy, `iot_models_tenant`.

    Row level security applies to the table as a whole: a role that does not own the table, has no BYPASSRLS and is
    named by no policy sees no rows any more. A warning in the log names these roles. Call `enable` for them too. For a
    role that has to see all tenants, create a policy first:
    `CREATE POLICY reports ON device_state TO reports USING (true)`. Another warning names who may create objects in a
    schema of the search path: the table's owner could call their functions by mistake.

    It takes an ACCESS EXCLUSIVE lock until the transaction ends, so end it at once. If no `lock_timeout` is set, it is
    4 s for the rest of the transaction. `deadlock_timeout`, after which autovacuum leaves the table, is 20 ms for the
    rest of the transaction if the role may set it (`GRANT SET ON PARAMETER deadlock_timeout`).

    Raises:
        LookupError: If there is no such role.
        ValueError: If the role would not be limited to one tenant, with all the reasons (docs/tenancy.md has a list):
            it is a superuser or a member of one, owns the table, reaches the files of the server, may use TRUNCATE, and
            so on. Also if a superuser calls it and the table belongs neither to a superuser nor to the owner of the
            database: it may be a stranger's, which the search path finds before yours. Nothing is changed.
        RuntimeError: If the connection is in AUTOCOMMIT mode; or if the transaction is REPEATABLE READ or SERIALIZABLE,
            where it would not see what others commit while it waits for the lock.
        TypeError: If `role` is not a string.

    Example:
        >>> with create_engine("postgresql://owner@db/iot").begin() as connection:
        ...     tenancy.enable(connection, "app")
    """
    _require_transaction(connection)
    _require_role(connection, role)
    _refuse_ways_around(connection, role)
    _refuse_a_strangers_table(connection)
    tables = table_names(connection)
    if all(now.in_force and role in now.roles for now in _policies_now(connection)):
        return
    _lock(connection)
    _refuse_ways_around(connection, role)  # what others committed while this waited for the lock
    for table, now in zip(tables, _policies_now(connection), strict=True):
        _write_policy(connection, table, {*now.roles, role})
        _run(connection, f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    _warn(connection)


def check(connection: Connection, role: str) -> list[str]:
    """Why `role` is not limited to the tenant that it is bound to, a sentence each; empty if it is.

    It asks what `enable` asks, and whether what `enable` did is still so: rights are granted and policies are changed
    later. Any role may call it; nothing is changed or locked. `python -m iot_models.migrate check --tenancy app` calls
    it, too.

    Raises:
        LookupError: If there is no such role.
        RuntimeError: If the connection is in AUTOCOMMIT mode.
        TypeError: If `role` is not a string.

    Example:
        >>> with create_engine("postgresql://owner@db/iot").begin() as connection:
        ...     assert tenancy.check(connection, "app") == []
    """
    _require_transaction(connection)
    _require_role(connection, role)
    limited = all(
        now.in_force and connection.scalar(_IS_ONE_OF, {"role": role, "roles": list(now.roles)})
        for now in _policies_now(connection)
    )
    enable_it = f"the policy {POLICY} does not limit it: call tenancy.enable(connection, {role!a})"
    return [*([] if limited else [enable_it]), *_ways_around(connection, role)]


def disable(connection: Connection, role: str) -> None:
    """Undo `enable` for this role. If it was not enabled, nothing is changed.

    When the table has no policy any more, row level security is switched off, and what a role sees depends on its
    privileges alone again. While it stays on for other roles, `role` sees no rows; a warning in the log says so.

    It takes the same lock as `enable`. With an `AsyncConnection`, call either by
    `await connection.run_sync(tenancy.disable, "app")`.

    Raises:
        LookupError: If there is no such role.
        RuntimeError: If the connection is in AUTOCOMMIT mode, or the transaction REPEATABLE READ or SERIALIZABLE.
        TypeError: If `role` is not a string.
    """
    _require_transaction(connection)
    _require_role(connection, role)
    if not any(role in now.roles for now in _policies_now(connection)):
        return
    _lock(connection)
    for table, now in zip(table_names(connection), _policies_now(connection), strict=True):
        _write_policy(connection, table, {*now.roles} - {role})
        left = text("SELECT count(*) FROM pg_policy WHERE polrelid = CAST(to_regclass(CAST(:table AS text)) AS oid)")
        if connection.scalar(left, _binds(table)) == 0:
            _run(connection, f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
    _warn(connection)


def bind_tenant(session: Session | scoped_session[Any], tenant_id: str) -> None:
    """Bind the session's transaction to a tenant until it ends. The next transaction is not bound.

    This is one `SET LOCAL`. It also reaches the workers of a Citus cluster if `citus.propagate_set_commands` is
    `local`. Binding the same tenant again runs no statement, unless the savepoint in which it was bound has ended. A
    `ShadowService` with `bind_tenant=True` calls this itself, in each transaction.

    With an `AsyncSession`: `await session.run_sync(bind_tenant, "acme")`.

    Args:
        session: A session, or a `scoped_session`: its session of the current scope.
        tenant_id: The tenant.

    Raises:
        RuntimeError: If the transaction was bound to another tenant before, even if that was rolled back to a savepoint
            since. Only if the session that bound it has left the transaction, another session may bind another tenant.
            Also if the session is in AUTOCOMMIT mode, in which no statement would see the tenant.
        TypeError: If `tenant_id` is not a string.
        ValueError: If `tenant_id` is empty or cannot be stored as text.

    Example:
        >>> with Session(engine) as session, session.begin():
        ...     tenancy.bind_tenant(session, "acme")
        ...     session.scalars(select(DeviceState)).all()  # acme's
    """
    validation.require_tenant(tenant_id)
    session = loaded_objects.session_of(session)
    connection = session.connection(bind_arguments={"mapper": DeviceState.__mapper__})
    bound: _Bound | None = connection.info.get(_BOUND)
    if bound is not None and bound.is_open():
        if bound.tenant_id != tenant_id:
            raise RuntimeError(
                f"this transaction is bound to tenant {bound.tenant_id!a} and works for no other: commit it, or roll "
                f"it back, before binding {tenant_id!a}"
            )
        if bound.is_set():
            return
    _require_transaction(connection)
    # SET takes no parameters. E'' means the same whatever standard_conforming_strings says.
    literal = tenant_id.replace("\\", r"\\").replace("'", "''")
    _run(connection, f"SET LOCAL {SETTING} = E'{literal}'")
    transaction = cast("SessionTransaction", session.get_transaction())
    innermost = cast("Transaction", connection.get_nested_transaction() or connection.get_transaction())
    connection.info[_BOUND] = _Bound(tenant_id, ref(transaction), ref(innermost))


class _Bound(NamedTuple):
    """The tenant to which a connection was bound, the session's transaction that did it, and the savepoint, if any."""

    tenant_id: str
    # Weak references: the pool keeps this object as long as the connection, and a transaction that it kept alive would
    # keep the connection from returning to the pool.
    transaction: ref[SessionTransaction]
    innermost: ref[Transaction]

    def is_open(self) -> bool:
        transaction = self.transaction()
        return transaction is not None and transaction.is_active

    def is_set(self) -> bool:
        """Whether the tenant is certainly set: the setting is gone if its savepoint was rolled back."""
        innermost = self.innermost()
        return innermost is not None and innermost.is_active


class _Policy(NamedTuple):
    roles: Collection[str]
    in_force: bool


def _policies_now(connection: Connection) -> list[_Policy]:
    """Our policy on each of our tables."""
    # The rule is compared as PostgreSQL writes it.
    connection.execute(text("SELECT set_config('quote_all_identifiers', 'off', true)"))
    rows = [connection.execute(_POLICY_NOW, _binds(table)).one_or_none() for table in table_names(connection)]
    return [_Policy((), in_force=False) if row is None else _Policy(row.roles, row.in_force) for row in rows]


def _ways_around(connection: Connection, role: str) -> Sequence[str]:
    return ways_around(connection, role, policy=POLICY, setting=SETTING)


def _refuse_ways_around(connection: Connection, role: str) -> None:
    if ways := _ways_around(connection, role):
        raise ValueError(
            f"isolation would not hold for role {role!a}: {'; '.join(ways)}. Take that away, or let the application "
            f"log in as a role of its own (CREATE ROLE, then GRANT SELECT, INSERT, UPDATE, DELETE ON {_TABLE})"
        )


def _refuse_a_strangers_table(connection: Connection) -> None:
    for table in table_names(connection):
        if (owner := connection.scalar(_STRANGER, {"table": table})) is not None:
            owner = escaped(owner)
            raise ValueError(
                f"{table}, as the search path finds it, belongs to role {owner}, which may be a stranger: if the table "
                f"is yours, call this as its owner (SET ROLE {owner}); else SET search_path"
            )


def _binds(table: str) -> dict[str, str]:
    return {"table": table, "policy": POLICY, "rule": _RULE}


def _write_policy(connection: Connection, table: str, roles: Collection[str]) -> None:
    _run(connection, f"DROP POLICY IF EXISTS {POLICY} ON {table}")
    if roles:
        names = ", ".join('"' + role.replace('"', '""') + '"' for role in sorted(roles))
        _run(connection, f"CREATE POLICY {POLICY} ON {table} FOR ALL TO {names} USING ({_RULE}) WITH CHECK ({_RULE})")


def _require_transaction(connection: Connection) -> None:
    if connection.connection.autocommit:  # the driver's attribute: asking for the isolation level would be a statement
        raise RuntimeError(
            "this connection is in AUTOCOMMIT mode, where each statement is a transaction of its own: tenants are "
            "isolated by transaction, so use an engine without isolation_level='AUTOCOMMIT'"
        )


def _require_role(connection: Connection, role: str) -> None:
    validation.require_text("role", role)
    # CAST: the type name would cut it to 63 bytes, and so to the name of another role.
    found = text("SELECT EXISTS (SELECT FROM pg_roles WHERE CAST(rolname AS text) = CAST(:role AS text))")
    if not connection.scalar(found, {"role": role}):
        raise LookupError(f"there is no role {role!a} on this server: check the name, or CREATE ROLE first")


def _lock(connection: Connection) -> None:
    if (level := connection.scalar(text("SELECT current_setting('transaction_isolation')"))) != "read committed":
        raise RuntimeError(
            f"this transaction is {str(level).upper()} and would not see what others commit while it waits for the "
            "table's lock: use READ COMMITTED"
        )
    connection.execute(
        text("SELECT set_config('lock_timeout', '4s', true) WHERE current_setting('lock_timeout') = '0'")
    )
    # PostgreSQL asks autovacuum to leave the table after deadlock_timeout; until then writers queue behind this lock.
    connection.execute(
        text("""
            SELECT set_config('deadlock_timeout', '20ms', true) FROM pg_settings
             WHERE name = 'deadlock_timeout' AND CAST(setting AS integer) > 20
               AND has_parameter_privilege('deadlock_timeout', 'SET')
        """)
    )
    try:
        _run(connection, f"LOCK TABLE {', '.join(table_names(connection))} IN ACCESS EXCLUSIVE MODE")
    except OperationalError as error:
        if sqlstate(error) == LOCK_NOT_AVAILABLE:
            error.add_detail(
                f"Other transactions use {_TABLE} or its history: nothing was changed. End them (pg_stat_activity), or "
                "try again at a quieter moment."
            )
        raise


def _warn(connection: Connection) -> None:
    for table in table_names(connection):
        if not (roles := connection.scalars(_SHUT_OUT, _binds(table)).all()):
            continue
        log.warning(
            "row level security on %s now hides every row from %s: enable isolation for them too, or, if they are to "
            "see all tenants, CREATE POLICY ... ON %s TO ... USING (true)",
            table,
            escaped(", ".join(roles)),
            table,
        )

    for line in creators(connection):
        log.warning("%s", line)


def _run(connection: Connection, statement: str) -> None:
    """Run a statement unchanged: the quoted parts may contain a colon or a percent sign."""
    connection.exec_driver_sql(statement, execution_options={"no_parameters": True})
