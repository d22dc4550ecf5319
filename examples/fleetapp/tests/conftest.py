"""The databases of iot_models' fixtures, with the application's own tables in them."""

from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config


@pytest.fixture(scope="session")
def shadow_template(shadow_template: str) -> str:
    config = Config(Path(__file__).parents[1] / "alembic.ini", attributes={"url": shadow_template})
    command.upgrade(config, "head")
    return shadow_template
