"""Both asynchronous drivers, and a database with three devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy.orm import Session

from tests.databases.async_engines import url_for
from tests.databases.devices import add_device

if TYPE_CHECKING:
    from sqlalchemy import URL, Engine


@pytest.fixture
def url(driver: str, fleet: Engine) -> URL:
    """The URL of the database with the three devices, for that driver."""
    return url_for(driver, fleet.url)


@pytest.fixture
def fleet(own_engine: Engine) -> Engine:
    """acme's devices a, b and c, each at version 0, committed."""
    with Session(own_engine) as session, session.begin():
        for device_id in "abc":
            add_device(session, device_id)
    return own_engine
