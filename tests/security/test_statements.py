"""No statement of ours calls a function or an operator of a stranger's, however well it matches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import NullPool, make_url, select, text
from sqlalchemy.orm import Session

from iot_models import DeviceState, Report, ShadowService, tenancy
from iot_models.engine import create_engine
from iot_models.testing import database
from tests.databases.devices import TENANT, add_device
from tests.databases.engines import KINDS, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from iot_models.testing import PostgresServer

pytestmark = pytest.mark.repeats


# Every operator of the catalog's names over these types that the catalog does not have itself, and every function of
# the catalog's names that takes one or two of them. Each raises an error that says what it is.
HOSTILE = text("""
    DO $$
    DECLARE
      types CONSTANT text[] := '{text, varchar, name, jsonb, int4, int8, timestamptz, interval, oid, regclass, text[]}';
      names CONSTANT text[] := '{=, <>, <, >, <=, >=, ||, ->, ->>, @>, +, -, *, /}';
      functions CONSTANT text[] := '{now, coalesce, greatest, least, unnest, cardinality, count, current_setting, extract,
        jsonb_each, jsonb_typeof, jsonb_object_agg, set_config, bool_and, bool_or, quote_ident, format, concat}';
      a text; b text; n text;
    BEGIN
      CREATE SCHEMA attack;
      FOREACH a IN ARRAY types LOOP
        FOREACH b IN ARRAY types LOOP
          EXECUTE format($f$CREATE FUNCTION attack.called(%1$s, %2$s) RETURNS bool LANGUAGE plpgsql AS
            'BEGIN RAISE EXCEPTION ''called over %1$s and %2$s''; END'$f$, a, b);
          FOREACH n IN ARRAY names LOOP
            IF to_regoperator(format('pg_catalog.%s(%s,%s)', n, a, b)) IS NULL THEN
              EXECUTE format('CREATE OPERATOR public.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = attack.called)', n, a, b);
            END IF;
          END LOOP;
          FOREACH n IN ARRAY functions LOOP
            IF to_regprocedure(format('pg_catalog.%I(%s,%s)', n, a, b)) IS NULL THEN
              EXECUTE format($f$CREATE FUNCTION public.%3$I(%1$s, %2$s) RETURNS text LANGUAGE plpgsql AS
                'BEGIN RAISE EXCEPTION ''called %3$s over %1$s and %2$s''; END'$f$, a, b, n);
            END IF;
          END LOOP;
        END LOOP;
        FOREACH n IN ARRAY functions LOOP
          IF to_regprocedure(format('pg_catalog.%I(%s)', n, a)) IS NULL THEN
            EXECUTE format($f$CREATE FUNCTION public.%2$I(%1$s) RETURNS text LANGUAGE plpgsql AS
              'BEGIN RAISE EXCEPTION ''called %2$s over %1$s''; END'$f$, a, n);
          END IF;
        END LOOP;
      END LOOP;
    END $$
""")


@pytest.fixture(scope="module")
def attacked(server: PostgresServer, migrated_url: str) -> Iterator[str]:
    with database(server, migrated_url) as url:
        engine = create_engine(url, poolclass=NullPool)
        with Session(engine) as session, session.begin():
            for device in "abc":
                add_device(session, device)
        with engine.begin() as connection:
            connection.execute(HOSTILE)
        yield url


def test_the_attack_would_be_noticed(attacked: str) -> None:
    with create_engine(attacked, poolclass=NullPool).connect() as connection:
        with pytest.raises(Exception, match="called over text and varchar"):
            connection.execute(text("SELECT CAST('a' AS text) = CAST('a' AS varchar)"))
        connection.rollback()
        with pytest.raises(Exception, match="called quote_ident over name"):
            connection.execute(text("SELECT quote_ident(CAST('a' AS name))"))


def _flush(session: Session) -> None:
    device = session.get_one(DeviceState, (TENANT, "a"))
    device.desired_state["changed"] = {"at": 1}
    session.flush()


def _hybrids(session: Session) -> None:
    session.execute(select(DeviceState.delta, DeviceState.is_drifted, DeviceState.is_pending)).all()


def _service(call: Callable[[ShadowService], object]) -> Callable[[Session], object]:
    return lambda session: call(ShadowService(session, TENANT))


CALLS: dict[str, Callable[[Session], object]] = {
    "get": _service(lambda s: s.get("a")),
    "get_many": _service(lambda s: s.get_many(["abc"])),
    "replace_desired": _service(
        lambda s: s.replace_desired("a", {"x": 1}, expected_version=s.get("a").desired_version)
    ),
    "patch_desired": _service(lambda s: s.patch_desired("a", {"x": 1})),
    "replace_reported": _service(lambda s: s.replace_reported("a", {"x": 1}, acked_version=s.get("a").desired_version)),
    "patch_reported": _service(lambda s: s.patch_reported("a", {"x": 2})),
    "pending": _service(lambda s: (s.pending(), s.pending(after="a"), [*s.iter_pending(batch_size=1)])),
    "counts": _service(lambda s: (s.count_pending(), s.status_counts())),
    "drifted": _service(lambda s: (s.drifted(), s.drifted(after="a"))),
    "replace_desired_many": _service(
        lambda s: s.replace_desired_many({"a": {}, "b": {}}, expected_versions={"a": s.get("a").desired_version})
    ),
    "patch_desired_many": _service(lambda s: s.patch_desired_many(["a", "b"], {"y": 1})),
    "replace_reported_many": _service(
        lambda s: (
            s.replace_reported_many([Report("a", {}, s.get("a").desired_version), Report("b", {})]),
            s.replace_reported_many([Report("a", {}), Report("a", {"z": 1}), Report("x", {})]),
        )
    ),
    "a flush": _flush,
    "the hybrids": _hybrids,
    "binding a tenant": lambda session: tenancy.bind_tenant(session, TENANT),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("driver", KINDS)
def test_no_call_of_the_service_calls_a_strangers_code(attacked: str, driver: str, call: str) -> None:
    Kind(driver, make_url(attacked)).ask(lambda connection: CALLS[call](Session(connection)))


def test_tenancy_calls_no_strangers_code(attacked: str, server_role: str) -> None:
    with create_engine(attacked, poolclass=NullPool).connect() as connection:
        tenancy.enable(connection, server_role)
        tenancy.enable(connection, server_role)
        assert tenancy.check(connection, server_role) == []
        tenancy.disable(connection, server_role)
        connection.rollback()
