"""The examples of docs/your-application.md: a team's models beside ours, on whichever Base it has."""

from __future__ import annotations

import re
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Engine, NullPool, create_engine, inspect, select
from sqlalchemy.orm import Session, joinedload, selectinload

from iot_models import ShadowService, migrate
from iot_models.models import DeviceState
from iot_models.testing import add_sample_fleet
from tests.databases.alembic_runs import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.repeats

PAGE = (CHECKOUT / "docs" / "your-application.md").read_text()
EXAMPLES = {code.partition("\n")[0][2:]: code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)}
BASES = ["DeclarativeBase", "MappedAsDataclass", "SQLModel", "Flask-SQLAlchemy"]


def test_every_example_is_tried() -> None:
    assert [*EXAMPLES] == [*BASES, "a class that extends DeviceState"]


@pytest.fixture
def database(new_database: Callable[..., str]) -> Engine:
    url = new_database()
    migrate.upgrade(url)
    return create_engine(url, poolclass=NullPool)


@pytest.mark.parametrize("base", BASES)
def test_a_team_s_class_refers_to_a_device(database: Engine, base: str) -> None:
    module = ModuleType("their_models")
    sys.modules["their_models"] = module  # SQLAlchemy looks annotations up there
    exec(compile(EXAMPLES[base], "their_models", "exec"), vars(module))  # noqa: S102 - our own documentation
    machine: Any = module.Machine
    machine.metadata.create_all(database)

    with Session(database) as session:
        fleet = add_sample_fleet(session)
        device = session.get_one(DeviceState, (fleet.tenant_id, fleet.pending))
        session.add(machine(id=1, device=device))
        session.commit()

        found: Any = None
        pending = select(machine).join(machine.device).where(DeviceState.is_pending)
        for load in (joinedload(machine.device), selectinload(machine.device)):
            session.expunge_all()
            (found,) = session.scalars(pending.options(load))
            assert (found.tenant_id, found.device.delta) == (fleet.tenant_id, {"target_c": 23.5})
        shadow = ShadowService(session, fleet.tenant_id).patch_desired(fleet.pending, {"a": 1})
        assert found.device.desired_state == shadow.desired
        session.commit()
    inspect(machine).registry.dispose()


def test_the_session_of_flask_sqlalchemy_serves_both(database: Engine) -> None:
    from flask import Flask  # noqa: PLC0415 - only here

    module = ModuleType("their_models")
    sys.modules["their_models"] = module
    exec(compile(EXAMPLES["Flask-SQLAlchemy"], "their_models", "exec"), vars(module))  # noqa: S102 - as above
    app = Flask("fleet")
    app.config["SQLALCHEMY_DATABASE_URI"] = database.url.set(drivername="postgresql+psycopg")
    module.db.init_app(app)
    with app.app_context():
        module.db.create_all()
        module.db.session.add(DeviceState(tenant_id="acme", site_id="berlin", device_id="t-1"))
        module.db.session.add(module.Machine(id=1, tenant_id="acme", device_id="t-1"))
        shadows = ShadowService(module.db.session, "acme")
        assert shadows.patch_desired("t-1", {"a": 1}).desired_version == 1
        module.db.session.commit()
        assert module.db.session.scalar(select(module.Machine)).device.is_pending
        module.db.session.remove()
        module.db.engine.dispose()
    inspect(module.Machine).registry.dispose()
