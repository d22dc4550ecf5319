"""Whatever two sessions do to the same devices through objects, no acknowledged write is lost.

`IOT_MODELS_TEST_EXAMPLES=1000` tries that many histories, and takes minutes to find the shortest that fails.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from sqlalchemy import create_engine

from tests.guarantees.orm_histories import Histories

if TYPE_CHECKING:
    from sqlalchemy import Engine

pytestmark = pytest.mark.repeats

EXAMPLES = os.environ.get("IOT_MODELS_TEST_EXAMPLES")


def test_no_history_of_objects_and_service_writes_loses_an_acknowledged_write(own_engine: Engine) -> None:
    # A session that waits for the other one waits for ever: both are in this thread.
    impatient = create_engine(own_engine.url, connect_args={"options": "-c lock_timeout=5ms"})

    class OnThisDatabase(Histories):
        engine = impatient

    run_state_machine_as_test(
        OnThisDatabase,
        settings=settings(
            max_examples=int(EXAMPLES or 60),
            stateful_step_count=25,
            derandomize=EXAMPLES is None,
            phases=list(Phase) if EXAMPLES else [Phase.generate],
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
    impatient.dispose()
