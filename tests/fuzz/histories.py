"""Search for a history of objects and service writes that loses an acknowledged write: other ones each time.

    python -m tests.fuzz.histories --minutes 10 [--seed N]

Exit code 0: none was found. 1: the shortest one that was found is printed. 130: interrupted.
"""

# ruff: noqa: T201 - a program that prints
from __future__ import annotations

import argparse
import secrets
import sys
import time

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from sqlalchemy import create_engine

from iot_models.testing import database, postgres_server
from tests.databases.alembic_runs import upgrade
from tests.guarantees.orm_histories import Histories

HISTORIES_A_ROUND = 25
INTERRUPTED = 130


def main() -> int:
    """Search as long as asked for, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**9))
    options = parser.parse_args()
    print(f"histories of objects, seed {options.seed}", flush=True)
    with postgres_server() as server, database(server) as url:
        print(server.description, flush=True)
        upgrade(url)
        # A session that waits for the other one waits for ever: both are in this thread.
        impatient = create_engine(url, connect_args={"options": "-c lock_timeout=5ms"})

        class OnThisDatabase(Histories):
            engine = impatient

        began = time.monotonic()
        rounds = 0
        try:
            while time.monotonic() - began < 60 * options.minutes:
                found = seed(options.seed + rounds)(OnThisDatabase)
                run_state_machine_as_test(
                    found,
                    settings=settings(
                        max_examples=HISTORIES_A_ROUND,
                        stateful_step_count=40,
                        database=None,
                        deadline=None,
                        phases=[Phase.generate, Phase.shrink],
                        suppress_health_check=[HealthCheck.too_slow],
                    ),
                )
                rounds += 1
                print(f"{time.monotonic() - began:5.0f} s: {rounds * HISTORIES_A_ROUND:,} histories", flush=True)
        except KeyboardInterrupt:
            return INTERRUPTED
        except AssertionError as error:
            print(f"\nseed {options.seed + rounds}: {error}\n", *getattr(error, "__notes__", ()), sep="\n")
            return 1
        finally:
            impatient.dispose()
    return 0


if __name__ == "__main__":
    sys.exit(main())
