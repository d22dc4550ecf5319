"""One migrated database for many tests, one after another: emptied in between, and made anew where that is not enough.

Making a database takes a hundred times as long as emptying one. What a test leaves behind besides rows (a trigger, a
policy, statistics of the planner) shows in the catalogs: then the next test gets a new copy.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Self

from sqlalchemy import Connection, NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError

from iot_models.testing import PostgresServer, database

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

# Rows of the catalogs about what is not PostgreSQL's own, without the columns that writing to a table changes.
_CATALOGS = text("""
    SELECT sum(hash) FROM (
        SELECT hashtextextended(CAST((oid, relname, relnamespace, relkind, reloptions, relacl, relowner, relhasrules,
                                 relhastriggers, relrowsecurity, relforcerowsecurity) AS text), 0)
          FROM pg_class WHERE oid >= 16384
        UNION ALL SELECT hashtextextended(CAST(a AS text), 1) FROM pg_attribute a WHERE attrelid >= 16384
        UNION ALL SELECT hashtextextended(CAST(a AS text), 2) FROM pg_attrdef a
        UNION ALL SELECT hashtextextended(CAST(c AS text), 3) FROM pg_constraint c WHERE oid >= 16384
        UNION ALL SELECT hashtextextended(CAST((indexrelid, indisvalid) AS text), 4)
          FROM pg_index WHERE indexrelid >= 16384
        UNION ALL SELECT hashtextextended(CAST(t AS text), 5) FROM pg_trigger t
        UNION ALL SELECT hashtextextended(CAST(p AS text), 6) FROM pg_policy p
        UNION ALL SELECT hashtextextended(CAST(p AS text), 7) FROM pg_proc p WHERE oid >= 16384
        UNION ALL SELECT hashtextextended(CAST(t AS text), 8) FROM pg_type t WHERE oid >= 16384
        UNION ALL SELECT hashtextextended(CAST(n AS text), 9) FROM pg_namespace n WHERE nspname NOT LIKE 'pg_%temp%'
        UNION ALL SELECT hashtextextended(CAST(d AS text), 10) FROM pg_default_acl d
        UNION ALL SELECT hashtextextended(CAST(e AS text), 11) FROM pg_extension e
        UNION ALL SELECT hashtextextended(CAST(d AS text), 12) FROM pg_database d WHERE datname = current_database()
        UNION ALL SELECT hashtextextended(CAST(s AS text), 13) FROM pg_db_role_setting s
          WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())
        UNION ALL SELECT hashtextextended(CAST((starelid, staattnum) AS text), 14)
          FROM pg_statistic WHERE starelid >= 16384
        UNION ALL SELECT hashtextextended(version_num, 15) FROM alembic_version_iot_models
    ) AS entry (hash)
""")
_TABLES = text("""
    SELECT string_agg(format('%I.%I', schemaname, tablename), ', ') FROM pg_tables
     WHERE schemaname NOT IN ('pg_catalog', 'information_schema') AND tablename NOT LIKE 'alembic_version%'
""")
_END_CONNECTIONS = text("""
    SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
     WHERE datname = current_database() AND pid <> pg_backend_pid()
""")


class ReusedDatabase:
    """A copy of a migrated database, given to one test after another.

    Example:
        >>> with ReusedDatabase(server, migrated_url) as reused, reused.clean() as url:
        ...     engine = create_engine(url)
    """

    def __init__(self, server: PostgresServer, template: str) -> None:
        self._server = server
        self._template = template
        self._stack = ExitStack()
        self._url: str | None = None
        self._catalogs: object = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    @contextmanager
    def clean(self) -> Iterator[str]:
        """The URL of the database, as it was when it was migrated."""
        if self._url is None:
            self._url = self._stack.enter_context(database(self._server, self._template))
            with self._connection(self._url) as connection:
                self._catalogs = connection.scalar(_CATALOGS)
        try:
            yield self._url
        finally:
            if not self._emptied(self._url):
                self._url = None
                self._stack.close()

    def _emptied(self, url: str) -> bool:
        """Empty the database; whether it then is as it was."""
        try:
            with self._connection(url) as connection:
                connection.execute(_END_CONNECTIONS)
                connection.execute(text("SET lock_timeout = '1s'"))
                connection.execute(text(f"TRUNCATE {connection.scalar(_TABLES)}"))
                connection.execute(text("SELECT pg_stat_reset()"))
                return bool(connection.scalar(_CATALOGS) == self._catalogs)
        except DBAPIError:
            return False

    @contextmanager
    def _connection(self, url: str) -> Iterator[Connection]:
        engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            yield connection
