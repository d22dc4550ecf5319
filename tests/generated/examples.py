"""How many examples a property looks at: `make test` many, `make quick` few (the profiles are in conftest.py)."""

from __future__ import annotations

from hypothesis import HealthCheck, settings


def with_a_database(share: float = 1) -> settings:
    """Settings of a property that asks a server: a share of the examples that a property of pure functions looks at.

    The fixture that it asks with is made once, and each example leaves it as it was.
    """
    examples = settings().max_examples
    return settings(
        max_examples=round(examples * share),
        suppress_health_check=[*settings().suppress_health_check, HealthCheck.function_scoped_fixture],
    )
