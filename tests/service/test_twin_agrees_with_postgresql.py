"""Every twin helper against PostgreSQL's own answer, on generated documents.

Documents travel as JSON text and the two answers are compared on the server, as ``jsonb``: read back into Python they
would be compared by the very rules that are under test.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iot_models._core.equality import json_equal
from iot_models.twin import compare, compute_delta, compute_nested_delta, merge_patch, sync_status
from tests.generated.documents import document_pairs, value_pairs

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection

    Check: TypeAlias = Callable[[str, tuple[Any, Any], object], None]

# The fixture only makes functions, which no example changes; and how long an answer takes is not the point.
on_generated_documents = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# What the helpers answer, said once more in terms of sets of keys. PL/pgSQL, because a function in SQL may not call
# itself before it exists.
SQL_TWIN = """
CREATE FUNCTION pg_temp.equal(one jsonb, other jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$ BEGIN
  RETURN to_jsonb(one = other);
END $$;

CREATE FUNCTION pg_temp.delta(desired jsonb, reported jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$ BEGIN
  RETURN (
    SELECT coalesce(jsonb_object_agg(key, value), '{}')
    FROM jsonb_each(desired)
    WHERE reported -> key IS DISTINCT FROM value
  );
END $$;

CREATE FUNCTION pg_temp.comparison(desired jsonb, reported jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$ BEGIN
  RETURN (
    SELECT jsonb_build_object(
      'added', coalesce(jsonb_object_agg(key, new.value) FILTER (WHERE old.value IS NULL), '{}'),
      'removed', coalesce(jsonb_object_agg(key, old.value) FILTER (WHERE new.value IS NULL), '{}'),
      'changed', coalesce(
        jsonb_object_agg(key, jsonb_build_array(old.value, new.value)) FILTER (WHERE old.value <> new.value), '{}'
      ),
      'unchanged_count', count(*) FILTER (WHERE old.value = new.value)
    )
    FROM jsonb_each(reported) AS old FULL JOIN jsonb_each(desired) AS new USING (key)
  );
END $$;

CREATE FUNCTION pg_temp.nested_delta(desired jsonb, reported jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$ BEGIN
  RETURN (
    SELECT coalesce(jsonb_object_agg(key, missing) FILTER (WHERE missing IS NOT NULL), '{}')
    FROM (
      SELECT
        key,
        CASE
          WHEN jsonb_typeof(wanted.value) = 'object' AND jsonb_typeof(actual.value) = 'object'
            THEN nullif(pg_temp.nested_delta(wanted.value, actual.value), '{}')
          WHEN wanted.value IS DISTINCT FROM actual.value
            THEN wanted.value
        END AS missing
      FROM jsonb_each(desired) AS wanted LEFT JOIN jsonb_each(reported) AS actual USING (key)
    ) AS parts
  );
END $$;

CREATE FUNCTION pg_temp.merge_patch(target jsonb, patch jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$ BEGIN
  IF jsonb_typeof(patch) <> 'object' THEN
    RETURN patch;
  END IF;
  RETURN (
    SELECT coalesce(
      jsonb_object_agg(
        key, CASE WHEN new.value IS NULL THEN old.value ELSE pg_temp.merge_patch(old.value, new.value) END
      ),
      '{}'
    )
    FROM jsonb_each(CASE WHEN jsonb_typeof(target) = 'object' THEN target ELSE '{}' END) AS old
    FULL JOIN jsonb_each(patch) AS new USING (key)
    WHERE new.value IS DISTINCT FROM 'null'
  );
END $$;
"""


@pytest.fixture
def postgresql_says(connection: Connection) -> Check:
    """Assert that a function of SQL_TWIN makes of two JSON values what Python made of them."""
    connection.exec_driver_sql(SQL_TWIN)

    def check(function: str, pair: tuple[Any, Any], answer: object) -> None:
        # A savepoint, so that a document that PostgreSQL refuses is the one that is reported, and not all after it.
        with connection.begin_nested():
            agreed, theirs = connection.exec_driver_sql(
                "SELECT theirs = %(answer)s::jsonb, theirs::text"
                f" FROM pg_temp.{function}(%(one)s::jsonb, %(other)s::jsonb) AS theirs",
                {"one": json.dumps(pair[0]), "other": json.dumps(pair[1]), "answer": json.dumps(answer)},
            ).one()
        assert agreed, f"Python: {json.dumps(answer)}\nPostgreSQL: {theirs}"

    return check


@on_generated_documents
@given(pair=value_pairs)
def test_values_are_equal_where_postgresql_says_so(postgresql_says: Check, pair: tuple[Any, Any]) -> None:
    postgresql_says("equal", pair, json_equal(*pair))


@on_generated_documents
@given(pair=document_pairs)
def test_the_delta_is_postgresqls(postgresql_says: Check, pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    postgresql_says("delta", pair, compute_delta(*pair))


@on_generated_documents
@given(pair=document_pairs)
def test_the_nested_delta_is_postgresqls(postgresql_says: Check, pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    postgresql_says("nested_delta", pair, compute_nested_delta(*pair))


@on_generated_documents
@given(pair=document_pairs)
def test_the_comparison_is_postgresqls(postgresql_says: Check, pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    postgresql_says("comparison", pair, asdict(compare(*pair)))


@on_generated_documents
@given(pair=document_pairs)
def test_the_merge_patch_is_postgresqls(postgresql_says: Check, pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    postgresql_says("merge_patch", pair, merge_patch(*pair))


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
def test_the_sync_status_is_postgresqls(connection: Connection, sighting: dict[str, Any]) -> None:
    theirs = connection.exec_driver_sql(
        """
        SELECT CASE
          WHEN %(last_seen)s::timestamptz IS NULL
            OR %(now)s::timestamptz - %(last_seen)s::timestamptz > %(stale_after)s::interval THEN 'stale'
          WHEN %(desired_version)s::int = %(reported_version)s::int THEN 'synced'
          ELSE 'pending'
        END
        """,
        sighting,
    ).scalar_one()
    assert sync_status(**sighting) == theirs
