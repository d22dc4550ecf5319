"""What attackers make: a function that tells who ran it; operators and functions that match better than the catalog's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.migrations.raw_sql import run_sql

if TYPE_CHECKING:
    from collections.abc import Sequence

# Where code of an attacker's says as whom it ran.
WITNESS = "CREATE TABLE public.called (by name); GRANT ALL ON public.called TO PUBLIC;"
TELL = "INSERT INTO public.called VALUES (current_user)"


def calls(database: str) -> list[tuple[Any, ...]]:
    """As whom code of an attacker's ran."""
    return run_sql(database, "SELECT * FROM public.called")


def hostile(types: Sequence[str], operators: Sequence[str], functions: Sequence[str]) -> str:
    """SQL that makes them in the schema `public`. Each raises an error that says what was called over which types.

    Made is every operator of these names over two of these types that the catalog does not have itself, and every
    function of these names that takes one of them, alone or beside a text, if the catalog has one of that name.

    They cost next to nothing, so that PostgreSQL calls them before any other condition that would leave out the row.
    """
    return f"""
    DO $$
    DECLARE
      types CONSTANT text[] := string_to_array('{" ".join(types)}', ' ');
      names CONSTANT text[] := string_to_array('{" ".join(operators)}', ' ');
      functions CONSTANT text[] := ARRAY(
        SELECT DISTINCT CAST(proname AS text) FROM pg_proc
         WHERE pronamespace = 11 AND proname = ANY (string_to_array('{" ".join(functions)}', ' ')));
      a text; b text; n text;
    BEGIN
      CREATE SCHEMA attack;
      FOREACH a IN ARRAY types LOOP
        FOREACH b IN ARRAY types LOOP
          EXECUTE format($f$CREATE FUNCTION attack.called(%1$s, %2$s) RETURNS bool LANGUAGE plpgsql COST 0.0000001 AS
            'BEGIN RAISE EXCEPTION ''called over %1$s and %2$s''; END'$f$, a, b);
          FOREACH n IN ARRAY names LOOP
            IF to_regoperator(format('pg_catalog.%s(%s,%s)', n, a, b)) IS NULL THEN
              EXECUTE format('CREATE OPERATOR public.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = attack.called)', n, a, b);
            END IF;
          END LOOP;
          CONTINUE WHEN 'text' NOT IN (a, b);
          FOREACH n IN ARRAY functions LOOP
            IF to_regprocedure(format('pg_catalog.%I(%s,%s)', n, a, b)) IS NULL THEN
              EXECUTE format($f$CREATE FUNCTION public.%3$I(%1$s, %2$s) RETURNS text LANGUAGE plpgsql COST 0.0000001 AS
                'BEGIN RAISE EXCEPTION ''called %3$s over %1$s and %2$s''; END'$f$, a, b, n);
            END IF;
          END LOOP;
        END LOOP;
        FOREACH n IN ARRAY functions LOOP
          IF to_regprocedure(format('pg_catalog.%I(%s)', n, a)) IS NULL THEN
            EXECUTE format($f$CREATE FUNCTION public.%2$I(%1$s) RETURNS text LANGUAGE plpgsql COST 0.0000001 AS
              'BEGIN RAISE EXCEPTION ''called %2$s over %1$s''; END'$f$, a, n);
          END IF;
        END LOOP;
      END LOOP;
    END $$
    """
