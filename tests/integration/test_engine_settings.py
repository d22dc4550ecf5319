"""What our engines set on a connection, and how a caller overrides each setting."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import JSON, Connection, Text, cast, literal, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, StatementError
from sqlalchemy.orm import Session

from iot_models import ShadowService
from iot_models.engine import create_engine
from tests.databases.async_engines import ASYNC_DRIVERS
from tests.databases.backends import cut
from tests.databases.devices import DEVICE, TENANT, add_device
from tests.databases.engines import Kind

if TYPE_CHECKING:
    from sqlalchemy import Engine

SETTINGS = ("application_name", "statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "work_mem")


@pytest.fixture(autouse=True)
def _nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGOPTIONS", "PGAPPNAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["sync", *ASYNC_DRIVERS])
def kind(request: pytest.FixtureRequest, engine: Engine) -> Kind:
    return Kind(request.param, engine.url)


@pytest.fixture(params=["sync", "psycopg"])
def libpq(request: pytest.FixtureRequest, engine: Engine) -> Kind:
    return Kind(request.param, engine.url)


def server_settings(kind: Kind, **settings: str) -> dict[str, Any]:
    """The `connect_args` that set these, as the driver takes them."""
    if kind.url.get_driver_name() == "asyncpg":
        return {"server_settings": settings}
    return {"options": " ".join(f"-c {name}={value}" for name, value in settings.items())}


def test_a_connection_has_a_name_and_the_three_timeouts(kind: Kind) -> None:
    shown = kind.settings(*SETTINGS)

    assert shown["application_name"] == "iot_models"
    assert shown["statement_timeout"] == "30s"
    assert shown["lock_timeout"] == "10s"
    assert shown["idle_in_transaction_session_timeout"] == "1min"


def test_the_name_and_the_timeouts_are_keyword_arguments(kind: Kind) -> None:
    shown = kind.settings(
        *SETTINGS,
        application_name="it's the fleet-api",
        statement_timeout=timedelta(milliseconds=1500),
        lock_timeout=timedelta(seconds=2),
        idle_in_transaction_session_timeout=timedelta(hours=1),
    )

    assert shown["application_name"] == "it's the fleet-api"
    assert shown["statement_timeout"] == "1500ms"
    assert shown["lock_timeout"] == "2s"
    assert shown["idle_in_transaction_session_timeout"] == "1h"


def test_a_timeout_is_rounded_up_to_a_millisecond_so_that_it_is_never_switched_off(kind: Kind) -> None:
    assert (
        kind.settings(*SETTINGS, statement_timeout=timedelta(microseconds=1_000_001))["statement_timeout"] == "1001ms"
    )


def test_none_leaves_a_timeout_to_the_server(own_engine: Engine, kind: Kind) -> None:
    database = own_engine.url.database
    with own_engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text(f"ALTER DATABASE {database} SET statement_timeout = '7s'"))
        connection.execute(text(f"ALTER DATABASE {database} SET lock_timeout = '6s'"))
        connection.execute(text(f"ALTER DATABASE {database} SET idle_in_transaction_session_timeout = '8s'"))
    kind.url = kind.url.set(database=database)

    shown = kind.settings(
        *SETTINGS, statement_timeout=None, lock_timeout=None, idle_in_transaction_session_timeout=None
    )

    assert (shown["statement_timeout"], shown["idle_in_transaction_session_timeout"]) == ("7s", "8s")
    assert shown["lock_timeout"] == "6s"
    # Zero switches a timeout off. None does not set it.
    off = kind.settings(*SETTINGS, statement_timeout=timedelta(0), lock_timeout=timedelta(0))
    assert (off["statement_timeout"], off["lock_timeout"]) == ("0", "0")


def test_connect_args_win_and_our_other_settings_stay(kind: Kind) -> None:
    given = server_settings(kind, work_mem="5MB", statement_timeout="5s")

    shown = kind.settings(*SETTINGS, connect_args=given)

    assert shown["work_mem"] == "5MB"
    assert shown["statement_timeout"] == "5s"
    assert shown["idle_in_transaction_session_timeout"] == "1min"
    assert shown["application_name"] == "iot_models"
    assert given == server_settings(kind, work_mem="5MB", statement_timeout="5s")  # the caller's dict has not changed


def test_the_url_wins_over_our_settings_and_connect_args_win_over_the_url(kind: Kind) -> None:
    url = kind.url.update_query_dict(
        {"application_name": "from-the-url", "options": "-c work_mem=5MB -c statement_timeout=5s --lock-timeout=4s"}
    )

    assert kind.settings(*SETTINGS, url=url) == {
        "application_name": "from-the-url",
        "statement_timeout": "5s",
        "lock_timeout": "4s",
        "idle_in_transaction_session_timeout": "1min",
        "work_mem": "5MB",
    }
    both = kind.settings(*SETTINGS, url=url, connect_args=server_settings(kind, statement_timeout="6s"))
    assert (both["statement_timeout"], both["work_mem"]) == ("6s", "5MB")


@pytest.mark.parametrize("timeout", [timedelta(seconds=30), None])
def test_the_environment_variables_of_libpq_win_over_our_settings(
    libpq: Kind, monkeypatch: pytest.MonkeyPatch, timeout: timedelta | None
) -> None:
    monkeypatch.setenv("PGOPTIONS", "-c work_mem=5MB -c statement_timeout=5s")
    monkeypatch.setenv("PGAPPNAME", "from-the-environment")

    shown = libpq.settings(*SETTINGS, statement_timeout=timeout, idle_in_transaction_session_timeout=timeout)

    assert (shown["work_mem"], shown["statement_timeout"]) == ("5MB", "5s")
    assert shown["application_name"] == "from-the-environment"

    # libpq's own rule: PGOPTIONS counts only if nothing else is given.
    assert libpq.settings(*SETTINGS, connect_args={"options": "-c statement_timeout=6s"})["work_mem"] != "5MB"


def test_a_statement_that_takes_longer_than_the_timeout_is_cancelled(kind: Kind) -> None:
    with pytest.raises(DBAPIError, match="statement timeout"):
        kind.ask(lambda c: c.execute(text("SELECT pg_sleep(5)")), statement_timeout=timedelta(milliseconds=20))


def test_a_statement_that_waits_too_long_for_a_row_is_cancelled(own_engine: Engine, kind: Kind) -> None:
    with Session(own_engine) as session, session.begin():
        add_device(session)
    kind.url = kind.url.set(database=own_engine.url.database)
    with own_engine.begin() as lock:
        lock.execute(text("SELECT FROM device_state FOR UPDATE"))
        with pytest.raises(DBAPIError, match="lock timeout"):
            kind.ask(
                lambda c: c.execute(text("UPDATE device_state SET status = status")),
                lock_timeout=timedelta(milliseconds=20),
            )


def test_a_connection_that_the_server_ended_is_replaced_without_an_error(kind: Kind, engine: Engine) -> None:
    pids: list[int] = []

    def ask_pid(connection: Connection) -> int:
        pids.append(connection.scalar(text("SELECT pg_backend_pid()")) or 0)
        return pids[-1]

    def end_it() -> None:
        with engine.connect() as other:  # waits up to a second until it has ended
            assert other.scalar(text("SELECT pg_terminate_backend(:pid, 1000)"), {"pid": pids[-1]})

    before, after = kind.ask_each(ask_pid, ask_pid, between=end_it)
    assert before != after

    with pytest.raises(DBAPIError):
        kind.ask_each(ask_pid, ask_pid, between=end_it, pool_pre_ping=False)


def test_json_is_written_compactly_in_utf_8(kind: Kind) -> None:
    written = select(cast(literal({"größe": [1, 2], "on": True}, JSON), Text))

    assert kind.ask(lambda c: c.scalar(written)) == '{"größe":[1,2],"on":true}'


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_json_does_not_have_is_refused_before_the_server_sees_it(kind: Kind, number: float) -> None:
    # asyncpg's values pass through SQLAlchemy, which wraps the ValueError; psycopg converts them itself.
    with pytest.raises((ValueError, StatementError), match="not JSON compliant"):
        kind.ask(lambda c: c.scalar(select(cast(literal({"a": number}, JSON), Text))))


def test_the_callers_serializer_wins(kind: Kind) -> None:
    written = select(cast(literal({"a": 1}, JSON), Text))

    assert kind.ask(lambda c: c.scalar(written), json_serializer=lambda _: '"mine"') == '"mine"'


def test_every_option_of_sqlalchemy_is_passed_on(kind: Kind) -> None:
    assert "Pool size: 3" in kind.ask(lambda c: c.engine.pool.status(), pool_size=3)


def test_in_autocommit_mode_each_write_is_committed_at_once(own_engine: Engine) -> None:
    with Session(own_engine) as session, session.begin():
        add_device(session)
    engine = create_engine(own_engine.url, isolation_level="AUTOCOMMIT")

    with Session(engine) as session:
        ShadowService(session, TENANT).replace_desired(DEVICE, {"a": 1})
        session.rollback()
    engine.dispose()

    with Session(own_engine) as session:
        assert ShadowService(session, TENANT).get(DEVICE).desired == {"a": 1}


def test_both_modes_share_one_pool_and_do_not_affect_each_other(own_engine: Engine) -> None:
    with Session(own_engine) as session, session.begin():
        add_device(session)
    engine = create_engine(own_engine.url, pool_size=1, max_overflow=0)
    at_once = engine.execution_options(isolation_level="AUTOCOMMIT")

    for n in range(2):
        with Session(at_once) as session:
            ShadowService(session, TENANT).patch_desired(DEVICE, {f"kept-{n}": n})
        with Session(engine) as session:
            ShadowService(session, TENANT).patch_desired(DEVICE, {f"lost-{n}": n})
    engine.dispose()

    with Session(own_engine) as session:
        assert ShadowService(session, TENANT).get(DEVICE).desired == {"kept-0": 0, "kept-1": 1}


def test_a_connection_that_is_lost_during_commit_says_what_can_be_repeated(own_engine: Engine) -> None:
    engine = create_engine(own_engine.url)
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
        cut(own_engine)(connection)
        with pytest.raises(OperationalError, match=r"If this was COMMIT, nobody knows .* same request_id"):
            connection.commit()
    engine.dispose()


def test_what_else_a_commit_fails_with_has_its_hint_or_none(own_engine: Engine) -> None:
    engine = create_engine(own_engine.url)
    with engine.connect() as connection:
        connection.execute(text("CREATE TEMPORARY TABLE t (n integer UNIQUE DEFERRABLE INITIALLY DEFERRED)"))
        connection.execute(text("INSERT INTO t VALUES (1), (1)"))
        with pytest.raises(IntegrityError) as raised:
            connection.commit()
    engine.dispose()
    assert "PostgreSQL cannot be reached" not in str(raised.value)
