"""The demo and the README's example do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from typing import TYPE_CHECKING

import demo
import pytest
from rich.console import Console
from sqlalchemy import create_engine, text

from iot_models._migrations import runner
from tests.databases.alembic_runs import CHECKOUT

if TYPE_CHECKING:
    from pathlib import Path

    from iot_models.testing import PostgresServer

pytestmark = pytest.mark.repeats


def run_demo() -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("DATABASE_URL")}
    run = subprocess.run(
        [sys.executable, str(CHECKOUT / "examples/demo.py")],
        env=inherited,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.stderr == ""
    return run.stdout


def steps() -> tuple[str, str]:
    """Patterns of what Alembic says on the way from 075 to head, and back."""
    revisions = runner.revisions()
    revisions = revisions[revisions.index("075") :]
    pairs = list(pairwise(revisions))
    upgrades = [f"Running upgrade {one} -> {other}" for one, other in pairs]
    downgrades = [f"Running downgrade {other} -> {one}" for one, other in reversed(pairs)]
    return r".*\n(.*\n)*?.*".join(upgrades), r".*\n(.*\n)*?.*".join(downgrades)


def test_the_demo_shows_the_life_of_a_shadow_on_a_server_of_its_own() -> None:
    said = run_demo()

    assert re.search(r"^PostgreSQL \d+\.\d+, a throwaway server, started for this demo", said)
    assert "1,000 devices in 2 tenants" in said
    upgrades, downgrades = steps()
    for line in (
        rf"\$ alembic upgrade head\n(.*\n)*?.*Running upgrade  -> 075.*\n.*{upgrades}",
        r"device +thermostat-0000 is synced: version 1 is acknowledged and nothing differs",
        r"device +thermostat-0001 is pending: version 1 is not acknowledged",
        r"operator +thermostat-0002 is stale: .* it was never seen",
        r"device +plug-0000 has drifted: version 1 is acknowledged, but 'relay' differs",
        r"second +VersionConflict: device 'gateway-0000' is at desired_version 2, not at the expected 1",
        r"device +LateReport: device 'thermostat-0000' is at version 2 already, and this message is about version 1",
        r"3 of the tenant's devices are pending: gateway-0000, thermostat-0001, thermostat-0002",
        rf"\$ alembic downgrade 075\n(.*\n)*?.*{downgrades}",
        r"\n5 shadows are parked",
        r"\n5 of 5 shadows are what they were before",
        r"device +thermostat-0000 is synced: version 3 is acknowledged and nothing differs",
        r"\nversion 3 by night-job \(nobody is here at night\): \{.*\"target_c\": 5\}"
        r"\nversion 2 by operator: \{.*\"target_c\": 23\}"
        r"\nversion 1 by operator: \{.*\"target_c\": 21.5\}"
        r"\nanna +thermostat-0000 is pending: version 4 is not acknowledged .*'target_c' differs"
        r".*\ndevice +thermostat-0000 is synced: version 4 is acknowledged and nothing differs",
        r"device +thermostat-0001 is pending: version 2 is refused \(\"mode 'turbo' is not supported\"",
        r"\nRefused: thermostat-0001, version 2: mode 'turbo' is not supported\n",
        r"\nanna +thermostat-0001 is pending: version 3 is not acknowledged",
        r"\nA new version ends the refusal: 0 devices refuse",
        r"(\nanna +plug-0000 is pending: version 2 is not acknowledged .*){2}"
        r"\nanna +RequestReused: request 'request-1' of device 'plug-0000' wrote version 2",
    ):
        assert re.search(line, said), line


def test_on_a_given_server_the_demo_plays_in_a_database_of_its_own_and_drops_it(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("IOT_MODELS_TEST_DATABASE_URL", server.url)
    demo.main()

    (name,) = re.findall(r"^Database (iot_models_demo_\w+)", capsys.readouterr().out)
    engine = create_engine(server.url)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM pg_database WHERE datname = :name"), {"name": name}) == 0
    engine.dispose()


def test_the_demo_stops_when_a_migration_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="alembic upgrade head ended with"):
        demo._alembic(Console(), "postgresql://127.0.0.1:1/nothing", "upgrade", "head")  # noqa: SLF001
    assert "cannot reach" in capsys.readouterr().out


def test_the_readmes_twenty_lines_run_as_they_stand_and_print_what_it_says(tmp_path: Path) -> None:
    readme = (CHECKOUT / "README.md").read_text()
    (program,) = re.findall(r"## Twenty lines\n\n```python\n(.*?)```", readme, re.DOTALL)
    (printed,) = re.findall(r"conflict:\n\n```\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "twenty_lines.py").write_text(program)

    run = subprocess.run(
        [sys.executable, "twenty_lines.py"], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60
    )

    def timeless(text: str) -> str:
        return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "…", text)

    assert timeless(run.stdout) == timeless(printed)
