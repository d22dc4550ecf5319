"""Every twin helper, and the reference model beside it, against PostgreSQL's own answer on generated documents.

Documents travel as JSON text and the two answers are compared on the server, as ``jsonb``: read back into Python they
would be compared by the very rules that are under test.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection, NullPool, create_engine

from iot_models._core.equality import json_equal
from iot_models.twin import compare, compute_delta, compute_nested_delta, merge_patch, sync_status
from tests.generated.documents import document_pairs, value_pairs
from tests.generated.examples import with_a_database
from tests.reference import json_values, shadows
from tests.reference.sql import FUNCTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from iot_models.testing import PostgresServer

on_generated_documents = with_a_database(share=0.75)


@pytest.fixture
def postgresql(server: PostgresServer) -> Iterator[Connection]:
    """A connection that knows the functions of the reference model; each statement is a transaction of its own.

    So a document that PostgreSQL refuses fails the example that it is in, and none after it.
    """
    engine = create_engine(server.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(FUNCTIONS)
        yield connection


def require_agreement(
    postgresql: Connection, function: str, pair: tuple[Any, Any], product: object, reference: object
) -> None:
    """PostgreSQL makes of two JSON values what the product made of them, and what the reference model did."""
    product_agrees, reference_agrees, theirs = postgresql.exec_driver_sql(
        "SELECT theirs = %(product)s::jsonb, theirs = %(reference)s::jsonb, theirs::text"
        f" FROM pg_temp.{function}(%(one)s::jsonb, %(other)s::jsonb) AS theirs",
        {
            "one": json.dumps(pair[0]),
            "other": json.dumps(pair[1]),
            "product": json.dumps(product),
            "reference": json.dumps(reference),
        },
    ).one()
    assert product_agrees, f"Product: {json.dumps(product)}\nPostgreSQL: {theirs}"
    assert reference_agrees, f"Reference model: {json.dumps(reference)}\nPostgreSQL: {theirs}"


@on_generated_documents
@given(pair=value_pairs)
def test_values_are_equal_where_postgresql_says_so(postgresql: Connection, pair: tuple[Any, Any]) -> None:
    require_agreement(postgresql, "equal", pair, json_equal(*pair), json_values.equal(*pair))


@on_generated_documents
@given(pair=document_pairs)
def test_the_delta_is_postgresqls(postgresql: Connection, pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    require_agreement(postgresql, "delta", pair, compute_delta(*pair), shadows.delta(*pair))


@on_generated_documents
@given(pair=document_pairs)
def test_the_nested_delta_is_postgresqls(postgresql: Connection, pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    require_agreement(postgresql, "nested_delta", pair, compute_nested_delta(*pair), shadows.nested_delta(*pair))


@on_generated_documents
@given(pair=document_pairs)
def test_the_comparison_is_postgresqls(postgresql: Connection, pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    require_agreement(postgresql, "comparison", pair, asdict(compare(*pair)), shadows.comparison(*pair))


@on_generated_documents
@given(pair=document_pairs)
def test_the_merge_patch_is_postgresqls(postgresql: Connection, pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    require_agreement(postgresql, "merge_patch", pair, merge_patch(*pair), json_values.merge_patch(*pair))


@st.composite
def sightings(draw: Callable[[st.SearchStrategy[Any]], Any]) -> dict[str, Any]:
    """Draw the arguments of sync_status, often with an age within a few microseconds of the threshold."""
    times = st.datetimes(
        min_value=datetime(2000, 1, 1),  # noqa: DTZ001  # Hypothesis adds the zone
        max_value=datetime(2100, 1, 1),  # noqa: DTZ001
        timezones=st.sampled_from((UTC, timezone(timedelta(hours=5, minutes=30)), timezone(timedelta(hours=-9)))),
    )
    now = draw(times)
    stale_after = draw(st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=400)))
    near = st.integers(-2, 2).map(lambda microseconds: now - stale_after + timedelta(microseconds=microseconds))
    return {
        "desired_version": draw(st.integers(0, 2)),
        "reported_version": draw(st.integers(0, 2)),
        "last_seen": draw(st.none() | times | near),
        "now": now,
        "stale_after": stale_after,
    }


@on_generated_documents
@given(sighting=sightings())
def test_the_sync_status_is_postgresqls(postgresql: Connection, sighting: dict[str, Any]) -> None:
    theirs = postgresql.exec_driver_sql(
        "SELECT pg_temp.sync_status(%(desired_version)s::int, %(reported_version)s::int, %(last_seen)s, %(now)s,"
        " %(stale_after)s)",
        sighting,
    ).scalar_one()
    assert sync_status(**sighting) == shadows.sync_status(**sighting) == theirs
