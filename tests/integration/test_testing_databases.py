"""Databases for tests: nothing happens to a database that `testing.database` did not make itself."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import NullPool, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

from iot_models.testing import PostgresServer, database

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def theirs(server: PostgresServer) -> Iterator[str]:
    """A database that somebody else made, with a table in it."""
    name = f"theirs_{secrets.token_hex(8)}"
    admin = create_engine(server.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    url = make_url(server.url).set(database=name)
    with create_engine(url, poolclass=NullPool).begin() as connection:
        connection.execute(text("CREATE TABLE kept (id integer)"))
    yield url.render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


def test_a_copy_of_somebody_elses_database_does_not_end_its_sessions(server: PostgresServer, theirs: str) -> None:
    with create_engine(theirs, poolclass=NullPool).connect() as session:
        pid = session.scalar(text("SELECT pg_backend_pid()"))
        with pytest.raises(DBAPIError, match="is being accessed by other users") as caught, database(server, theirs):
            pass
        assert "ends the sessions of its own databases only: close those of this one yourself" in str(caught.value)
        assert session.scalar(text("SELECT pg_backend_pid()")) == pid


def test_somebody_elses_database_can_be_copied_while_nobody_is_connected(server: PostgresServer, theirs: str) -> None:
    with database(server, theirs) as copy, create_engine(copy, poolclass=NullPool).connect() as connection:
        assert connection.scalar(text("SELECT to_regclass('kept')")) == "kept"


def test_a_template_that_does_not_exist_is_postgresqls_error(server: PostgresServer, theirs: str) -> None:
    nowhere = make_url(theirs).set(database="nowhere").render_as_string(hide_password=False)
    with pytest.raises(DBAPIError, match='template database "nowhere" does not exist'), database(server, nowhere):
        pass
