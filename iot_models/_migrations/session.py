"""The settings of the session in which a migration runs, whatever the database or the role sets by default."""

from __future__ import annotations

from typing import Final

# An option of the command comes besides: lock_timeout.
SETTINGS: Final = {
    # Defaults of a database or a role are meant for requests, and not for building an index.
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "transaction_timeout": "0",  # PostgreSQL 17 and newer
    # The pages that are moved skip locked rows, and see what other writers have committed since.
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    # If a policy hides rows from this role, fail instead of parking or restoring only the visible ones.
    "row_security": "off",
    # The catalog is asked while a lock is held, and PostgreSQL would compile that for seconds if the catalog is large.
    "jit": "off",
    # Definitions are compared as PostgreSQL writes them.
    "quote_all_identifiers": "off",
    # The ids of a page come back as parameters of the next one.
    "client_encoding": "UTF8",
}
# How soon PostgreSQL asks autovacuum to leave a table that this session wants to lock: after deadlock_timeout.
_DEADLOCK_TIMEOUT_MS: Final = 20


def set_all(lock_timeout: str) -> str:
    """A query that sets everything, to the end of the session. It has no parameters, and its result says nothing.

    A setting that this version of PostgreSQL does not have is left out. So is `deadlock_timeout`, which makes
    autovacuum leave at once, if the role may not set it.
    """
    values = ", ".join(f"('{name}', '{value}')" for name, value in {"lock_timeout": lock_timeout, **SETTINGS}.items())
    return (
        "SELECT pg_catalog.count(pg_catalog.set_config(wanted.name, wanted.value, false)) "  # noqa: S608 - our names and values
        f"FROM (VALUES {values}, ('deadlock_timeout', '{_DEADLOCK_TIMEOUT_MS}ms')) AS wanted (name, value) "
        "JOIN pg_settings s ON s.name = wanted.name "
        "WHERE CASE WHEN s.name <> 'deadlock_timeout' THEN TRUE "
        f"ELSE has_parameter_privilege(s.name, 'SET') AND CAST(s.setting AS integer) > {_DEADLOCK_TIMEOUT_MS} END"
    )
