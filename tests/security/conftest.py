"""A database with an attacker, who may log in and owns nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import make_url

from tests.migrations.raw_sql import as_role, run_sql
from tests.security.hostile import WITNESS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def database(new_database: Callable[..., str]) -> str:
    """A database in whose schema `public` everybody may create objects, as in those that PostgreSQL 14 made."""
    url = new_database()
    run_sql(url, "GRANT ALL ON SCHEMA public TO PUBLIC;" + WITNESS)
    return url


@pytest.fixture
def attacker(database: str, server_role: str) -> Iterator[str]:
    """The database as somebody logs in who owns nothing and was granted nothing."""
    yield as_role(database, server_role)
    run_sql(database, f"DROP OWNED BY {server_role} CASCADE")


@pytest.fixture
def owners(database: str, server_role: str) -> Iterator[str]:
    """The URL of the plain owner of the database and of its schema `public`, in which nobody else may create."""
    name = make_url(database).database
    run_sql(database, f"ALTER SCHEMA public OWNER TO {server_role}; ALTER DATABASE {name} OWNER TO {server_role};"
                      "REVOKE ALL ON SCHEMA public FROM PUBLIC")  # fmt: skip
    yield as_role(database, server_role)
    run_sql(database, f"ALTER SCHEMA public OWNER TO postgres; ALTER DATABASE {name} OWNER TO postgres;"
                      f"DROP OWNED BY {server_role} CASCADE")  # fmt: skip
