"""Every statement of the package keeps the rules of a table that is distributed by `tenant_id`."""

from __future__ import annotations

import inspect
import itertools
from typing import TYPE_CHECKING, Any, get_args

import pytest
from sqlalchemy.dialects.postgresql import asyncpg

from iot_models._core import desired_statements, history_statements, notifications, statements
from tests.reference import cluster_rules
from tests.reference.cluster_rules import broken

if TYPE_CHECKING:
    from collections.abc import Iterator

SECTIONS = get_args(statements.Section)
VALUES: dict[str, tuple[Any, ...]] = {"bool": (False, True), "int": (0, 1), "Section": SECTIONS}
# They name no tenant: the notification is of the coordinator, and a watcher of all tenants asks for one after the other.
OF_NO_TENANT = {"pending_tenant": [cluster_rules.TENANT]}


def all_statements() -> Iterator[Any]:
    """Each function that makes a statement, called in each way in which its arguments can be combined."""
    for module in (statements, desired_statements, history_statements):
        for name, function in vars(module).items():
            if not hasattr(function, "__wrapped__") or function.__module__ != module.__name__:
                continue
            parameters = inspect.signature(function).parameters
            if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters.values()):
                calls = [function(*SECTIONS[:count]) for count in range(len(SECTIONS) + 1)]
            else:
                choices = itertools.product(*(VALUES[parameter.annotation] for parameter in parameters.values()))
                calls = [function(**dict(zip(parameters, chosen, strict=True))) for chosen in choices]
            for number, statement in enumerate(calls):
                yield pytest.param(name, statement, id=f"{name}-{number}")
    yield pytest.param("notify", notifications.notify("acme"), id="notify")


@pytest.mark.parametrize(("name", "statement"), list(all_statements()))
def test_a_statement_runs_on_a_distributed_table(name: str, statement: Any) -> None:
    sql = str(statement.compile(dialect=asyncpg.dialect()))  # type: ignore[no-untyped-call]

    assert broken(sql) == OF_NO_TENANT.get(name, [])


@pytest.mark.parametrize(
    ("sql", "rule"),
    [
        ("SELECT FROM device_state WHERE tenant_id = $1; SELECT 1", cluster_rules.ONE_STATEMENT),
        ("SELECT FROM device_state WHERE device_id = $1", cluster_rules.TENANT),
        ("SELECT FROM device_state d WHERE d.tenant_id = $1 OR d.device_id = $2", cluster_rules.TENANT),
        ("SELECT FROM device_state d WHERE tenant_id <> $1", cluster_rules.TENANT),
        (
            "SELECT FROM device_state d JOIN device_shadow_history h ON h.tenant_id = d.tenant_id"
            " WHERE d.tenant_id = $1",
            cluster_rules.TENANT,
        ),
        (
            "SELECT FROM device_state d WHERE d.tenant_id = $1 AND EXISTS (SELECT FROM device_shadow_history h)",
            cluster_rules.TENANT,
        ),
        ("DELETE FROM device_state", cluster_rules.TENANT),
        ("INSERT INTO device_state (device_id) VALUES ($1)", cluster_rules.TENANT_INSERTED),
        ("INSERT INTO device_state (tenant_id) SELECT 'acme'", cluster_rules.TENANT_INSERTED),
        ("UPDATE device_state SET tenant_id = $2 WHERE tenant_id = $1", cluster_rules.TENANT_MOVED),
        ("UPDATE device_state SET last_seen_at = clock_timestamp() WHERE tenant_id = $1", cluster_rules.VOLATILE_IN_SET),
        ("UPDATE device_state SET site_id = gen_random_uuid() WHERE tenant_id = $1", cluster_rules.VOLATILE_IN_SET),
        ("UPDATE device_state SET last_seen_at = coalesce($2, now()) WHERE tenant_id = $1", cluster_rules.NOW_IN_CASE),
        (
            "UPDATE device_state SET last_seen_at = CASE WHEN $2 THEN now() END WHERE tenant_id = $1",
            cluster_rules.NOW_IN_CASE,
        ),
        (
            "INSERT INTO device_state (tenant_id) VALUES ($1) ON CONFLICT (tenant_id, device_id)"
            " DO UPDATE SET last_seen_at = now()",
            cluster_rules.CALL_IN_CONFLICT,
        ),
        (
            "WITH w AS (DELETE FROM device_state WHERE tenant_id = $1 AND device_id IN (SELECT unnest($2::text[])))"
            " SELECT 1",
            cluster_rules.SET_BESIDE_WRITE,
        ),
        (
            "WITH w AS (DELETE FROM device_state WHERE tenant_id = $1)"
            " SELECT FROM jsonb_to_recordset($2) AS r(a text)",
            cluster_rules.SET_BESIDE_WRITE,
        ),
        (
            "WITH sent AS (SELECT $2::jsonb), w AS (DELETE FROM device_state WHERE tenant_id = $1) SELECT FROM sent",
            cluster_rules.CONSTANT_CTE,
        ),
        (
            "UPDATE device_state SET site_id = $2 WHERE tenant_id = $1 RETURNING extract(epoch FROM last_seen_at)",
            cluster_rules.STABLE_IN_RETURNING,
        ),
        ("DELETE FROM device_state WHERE tenant_id = $1 RETURNING now()", cluster_rules.STABLE_IN_RETURNING),
        (
            "MERGE INTO device_state d USING device_state s ON d.tenant_id = $1"
            " WHEN NOT MATCHED THEN INSERT (tenant_id) VALUES ($1)",
            cluster_rules.NO_MERGE,
        ),
    ],
)  # fmt: skip
def test_a_statement_that_breaks_a_rule_is_found_with_the_rules_words(sql: str, rule: str) -> None:
    assert broken(sql) == [rule]
