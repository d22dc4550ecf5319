"""The Alembic project of a team that uses this package: an env.py as `alembic init` writes it, and revisions."""

from __future__ import annotations

import os
from argparse import Namespace
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alembic import command
from alembic.config import Config

from tests.databases.alembic_runs import CHECKOUT

if TYPE_CHECKING:
    from pathlib import Path

ENV = """
from alembic import context
from sqlalchemy import MetaData, create_engine, pool
from iot_models import migrate

config = context.config
metadata = config.attributes.get("metadata", MetaData())
options = config.attributes.get("options", {{}})

def run(connection):
    context.configure(connection=connection, target_metadata=metadata, **options)
    with context.begin_transaction():
        context.run_migrations()

def online():
    engine = create_engine(config.attributes["url"], poolclass=pool.NullPool, **config.attributes.get("engine", {{}}))
    with engine.connect() as connection:
{online}

if context.is_offline_mode():
    context.configure(dialect_name="postgresql", literal_binds=True, **options)
    with context.begin_transaction():
        context.run_migrations()
else:
    online()
"""
PLAIN = "        run(connection)"
GUARDED = "        with migrate.guarded(connection):\n            run(connection)"

REVISION = '''"""A table of the team's."""
from alembic import op
revision = {revision!r}
down_revision = {down_revision!r}
depends_on = {depends_on!r}

def upgrade():
    op.execute("CREATE TABLE team_{revision} (id int PRIMARY KEY)")
    op.execute("INSERT INTO team_{revision} VALUES (1)")

def downgrade():
    op.execute("DROP TABLE team_{revision}")
'''


@dataclass
class Team:
    """A project in a folder, and the database that it migrates.

    Attributes:
        folder: Its env.py is `ENV`; `versions` is beside it.
        url: The database.
        beside_ours: Whether our folder is one of its `version_locations`.
        attributes: What env.py takes from `config.attributes`: `metadata`, `options` of configure(), `engine`.
    """

    folder: Path
    url: str
    beside_ours: bool
    attributes: dict[str, object]

    def alembic(self, name: str, *arguments: str, x: tuple[str, ...] = (), **options: object) -> None:
        """Run a function of `alembic.command`."""
        config = Config(cmd_opts=Namespace(x=[*x]), attributes={"url": self.url, **self.attributes})
        config.set_main_option("script_location", str(self.folder))
        config.set_main_option("path_separator", "os")
        config.set_main_option("version_path_separator", "os")  # its name before Alembic 1.16
        locations = [self.folder / "versions", *([CHECKOUT / "alembic" / "versions"] if self.beside_ours else [])]
        config.set_main_option("version_locations", os.pathsep.join(map(str, locations)))
        getattr(command, name)(config, *arguments, **options)


def team(
    folder: Path, url: str, *, online: str = PLAIN, beside_ours: bool = False, revisions: tuple[str, ...] = ("a001",)
) -> Team:
    """Write a project. Its first revision depends on our 075 if it runs our revisions."""
    (folder / "versions").mkdir(parents=True)
    (folder / "env.py").write_text(ENV.format(online=online))
    (folder / "script.py.mako").write_text((CHECKOUT / "alembic" / "script.py.mako").read_text())
    before = None
    for revision in revisions:
        (folder / "versions" / f"{revision}_team.py").write_text(
            REVISION.format(
                revision=revision, down_revision=before, depends_on="075" if beside_ours and before is None else None
            )
        )
        before = revision
    options: dict[str, object] = {"transaction_per_migration": True} if beside_ours else {}
    return Team(folder, url, beside_ours, {"options": options})
