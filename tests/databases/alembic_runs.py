"""Alembic as its users run it: the command in a process of its own, and (faster) in this one."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

from alembic import command
from alembic.config import Config

CHECKOUT = Path(__file__).resolve().parents[2]


def run_alembic(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`alembic ...` in the checkout, with these variables and none of the caller's URLs."""
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("DATABASE_URL")}
    return subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=CHECKOUT,
        env=inherited | environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


def config(url: str) -> Config:
    """Without the ini file, whose logging settings would take pytest's handlers away."""
    made = Config(cmd_opts=Namespace(x=[f"url={url}"]))
    made.set_main_option("script_location", str(CHECKOUT / "alembic").replace("%", "%%"))
    return made


def upgrade(url: str, revision: str = "head") -> None:
    command.upgrade(config(url), revision)


def downgrade(url: str, revision: str) -> None:
    command.downgrade(config(url), revision)
