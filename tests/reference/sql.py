"""The rules of `json_values` and `shadows` once more, over jsonb: PostgreSQL computes, and its `=` says what is equal.

The functions are made in `pg_temp`, and so last as long as the connection. PL/pgSQL, because a function in SQL may not
call itself before it exists.
"""

from __future__ import annotations

from typing import Final

FUNCTIONS: Final = """
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

CREATE FUNCTION pg_temp.sync_status(
  desired_version int, reported_version int, last_seen timestamptz, now timestamptz, stale_after interval
) RETURNS text LANGUAGE plpgsql AS $$ BEGIN
  RETURN CASE
    WHEN last_seen IS NULL OR now - last_seen > stale_after THEN 'stale'
    WHEN desired_version = reported_version THEN 'synced'
    ELSE 'pending'
  END;
END $$;
"""
