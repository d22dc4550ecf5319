"""Whom isolation is about: the application's role, and the owner who limits it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.databases.tenants import rolled_back

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Engine


@pytest.fixture
def app(server_role: str) -> str:
    """The application's role."""
    return server_role


@pytest.fixture
def owner(engine: Engine, app: str) -> Iterator[Connection]:
    """The owner, in a transaction that is rolled back."""
    with rolled_back(engine, app) as connection:
        yield connection
