"""What importing the package loads: each in an interpreter of its own, which has loaded nothing yet."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.repeats


def test_importing_the_package_loads_neither_alembic_nor_a_driver() -> None:
    program = "import sys, iot_models; print(sorted({'alembic', 'psycopg', 'rich'} & set(sys.modules)))"

    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout

    assert loaded.strip() == "[]"


def test_importing_the_package_needs_no_greenlet() -> None:
    program = (
        "import sys; sys.modules['greenlet'] = None\n"
        "import iot_models; iot_models.AsyncShadowService; print('sqlalchemy.ext.asyncio' in sys.modules)\n"
    )

    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "False"
