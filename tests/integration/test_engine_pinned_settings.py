"""What our engines read and write does not depend on the settings of the server, of the role and of the environment."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import NullPool, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from iot_models import ShadowService, migrate
from iot_models._core.database_errors import explained
from iot_models.engine import create_async_engine
from iot_models.engine import create_engine as create_our_engine
from iot_models.testing import database
from tests.databases.devices import DEVICE, TENANT, add_device
from tests.databases.engines import KINDS, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import URL, Connection

    from iot_models.testing import PostgresServer

PINNED = {"DateStyle": "ISO, DMY", "TimeZone": "UTC", "client_encoding": "UTF8"}
FIRST_DAY = datetime(1, 1, 1, tzinfo=UTC)
LAST_DAY = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)


@pytest.fixture(scope="module")
def strange(server: PostgresServer, migrated_url: str) -> Iterator[URL]:
    """A database with one device, whose settings no client of ours could work with."""
    with database(server, migrated_url) as made:
        url = make_url(made)
        with create_engine(url, poolclass=NullPool).begin() as connection:
            add_device(Session(connection))
            for setting in ("DateStyle = 'German'", "TimeZone = 'America/New_York'", "client_encoding = 'latin1'"):
                connection.execute(text(f"ALTER DATABASE {url.database} SET {setting}"))
        yield url


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, strange: URL) -> Kind:
    return Kind(request.param, strange)


def times(connection: Connection) -> list[Any]:
    return list(
        connection.execute(text("SELECT '0001-01-01+00'::timestamptz, '9999-12-31 23:59:59+00'::timestamptz")).one()
    )


def written_and_read(connection: Connection) -> object:
    shadows = ShadowService(Session(connection), TENANT)
    shadows.replace_desired(DEVICE, {"größe": "☃ 😀"})
    shadows.replace_reported(DEVICE, {"größe": "☃ 😀"})
    shadow = shadows.get(DEVICE)
    assert shadow.shadow_updated_at
    assert shadow.last_seen_at
    return shadow.desired


def test_every_connection_has_the_settings_that_our_statements_depend_on(kind: Kind) -> None:
    assert kind.settings(*PINNED) == PINNED
    assert kind.ask(times) == [FIRST_DAY, LAST_DAY]
    assert kind.ask(written_and_read) == {"größe": "☃ 😀"}


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PGDATESTYLE", "German"),
        ("PGTZ", "America/New_York"),
        ("PGCLIENTENCODING", "latin1"),
        ("PGCLIENTENCODING", "SQL_ASCII"),
        ("PGOPTIONS", "-c DateStyle=German -c TimeZone=Asia/Seoul"),
    ],
)
def test_no_variable_of_libpq_changes_them(
    kind: Kind, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)

    assert kind.settings(*PINNED) == PINNED
    assert kind.ask(times) == [FIRST_DAY, LAST_DAY]


def test_a_rollback_leaves_them_and_the_transaction_mode_stays_as_it_was(kind: Kind) -> None:
    def after_a_rollback(connection: Connection) -> object:
        connection.execute(text("SELECT 1"))
        connection.rollback()
        return connection.scalar(text("SHOW DateStyle")), connection.scalar(text("SHOW transaction_isolation"))

    assert kind.ask(after_a_rollback) == ("ISO, DMY", "read committed")
    assert kind.ask(after_a_rollback, isolation_level="SERIALIZABLE") == ("ISO, DMY", "serializable")
    assert kind.ask(after_a_rollback, isolation_level="AUTOCOMMIT") == ("ISO, DMY", "read committed")
    for mode, autocommit in (("AUTOCOMMIT", True), ("READ COMMITTED", False)):
        assert kind.ask(lambda c: c.connection.autocommit, isolation_level=mode) is autocommit


def options_of(kind: Kind, name: str, value: str) -> list[dict[str, Any]]:
    """The ways in which a caller sets this: in the URL, and in `connect_args`."""
    escaped = value.replace(" ", "\\ ")
    in_url = {"url": kind.url.update_query_dict({"options": f"-c {name}={escaped}"})}
    if kind.url.get_driver_name() == "asyncpg":
        return [in_url, {"connect_args": {"server_settings": {name: value}}}]
    return [in_url, {"connect_args": {"options": f"-c {name}={escaped}"}}]


def test_the_caller_may_choose_another_time_zone(kind: Kind) -> None:
    for options in options_of(kind, "timezone", "Asia/Seoul"):
        assert kind.settings("TimeZone", "DateStyle", **options) == {"TimeZone": "Asia/Seoul", "DateStyle": "ISO, DMY"}


@pytest.mark.repeats
@pytest.mark.parametrize("style", ["ISO", "iso, dmy", "ISO,YMD", "DMY", "european"])
def test_the_caller_may_choose_the_order_of_a_date(kind: Kind, style: str) -> None:
    for options in options_of(kind, "DateStyle", style):
        assert kind.settings("DateStyle", **options)["DateStyle"].startswith("ISO, ")
        assert kind.ask(times, **options) == [FIRST_DAY, LAST_DAY]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DateStyle", "German"),
        ("datestyle", "SQL, DMY"),
        ("DATESTYLE", "Postgres"),
        ("client_encoding", "latin1"),
        ("client_encoding", "SQL_ASCII"),
        ("client_encoding", "auto"),
    ],
)
def test_what_our_statements_could_not_read_is_refused_by_name(kind: Kind, name: str, value: str) -> None:
    for options in options_of(kind, name, value):
        with pytest.raises(ValueError, match=rf"(?i)^{name} must be (ISO|UTF8), because .* leave it out") as caught:
            kind.settings(**options)
        assert value not in str(caught.value)


@pytest.mark.parametrize("create", [create_our_engine, create_async_engine])
def test_another_encoding_is_refused_wherever_the_caller_sets_it(create: Callable[..., object]) -> None:
    url = "postgresql://db/iot"
    for options in (
        {"url": f"{url}?client_encoding=latin1"},
        {"url": url, "connect_args": {"client_encoding": "latin1"}},
        {"url": url, "client_encoding": "latin1"},
    ):
        with pytest.raises(ValueError, match=r"^client_encoding must be UTF8"):
            create(**options)
    with pytest.raises(ValueError, match="asyncpg cannot do what the URL asks for with client_encoding"):
        create_async_engine("postgresql+asyncpg://db/iot?client_encoding=latin1")


@pytest.mark.parametrize("encoding", ["utf8", "UTF8", "utf-8", "UTF-8", "Unicode"])
def test_the_other_names_of_utf_8_are_accepted(strange: URL, encoding: str) -> None:
    url = strange.update_query_dict({"client_encoding": encoding})
    for name in ("sync", "psycopg"):
        assert Kind(name, strange).settings(*PINNED, url=url) == PINNED


# The encoding of the database itself.


def database_in(encoding: str, server: PostgresServer, new_database: Callable[..., str]) -> URL:
    """An empty database in another encoding; `new_database` makes them in the server's."""
    url = make_url(new_database())
    admin = create_engine(server.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {url.database}"))
        connection.execute(
            text(
                f"CREATE DATABASE {url.database} TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C' LOCALE_PROVIDER libc"
            )
        )
    return url


@pytest.mark.parametrize("name", KINDS)
def test_a_database_in_sql_ascii_is_refused_with_the_way_out(
    name: str, server: PostgresServer, new_database: Callable[..., str]
) -> None:
    kind = Kind(name, database_in("SQL_ASCII", server, new_database))

    with pytest.raises(ValueError, match=r"encoding SQL_ASCII, .* make a database with ENCODING 'UTF8'"):
        kind.settings("DateStyle")

    admin = create_engine(server.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:  # the connection was closed: soon the server has seen that, too
        open_ones = text("SELECT count(*) FROM pg_stat_activity WHERE datname = :name")
        until = time.monotonic() + 10
        while connection.scalar(open_ones, {"name": kind.url.database}):
            assert time.monotonic() < until


@pytest.mark.repeats
@pytest.mark.parametrize("name", KINDS)
def test_in_a_latin_1_database_what_fits_is_stored_and_what_does_not_is_an_error_that_says_so(
    name: str, server: PostgresServer, new_database: Callable[..., str]
) -> None:
    url = database_in("LATIN1", server, new_database)
    migrate.upgrade(url)
    with create_engine(url, poolclass=NullPool).begin() as connection:
        add_device(Session(connection))
    kind = Kind(name, url)

    def fits(connection: Connection) -> object:
        ShadowService(Session(connection), TENANT).replace_desired(DEVICE, {"größe": "é"})
        return ShadowService(Session(connection), TENANT).get(DEVICE).desired

    def does_not_fit(connection: Connection) -> None:
        ShadowService(Session(connection), TENANT).replace_desired(DEVICE, {"mood": "😀"})

    assert kind.ask(fits) == {"größe": "é"}
    with pytest.raises(
        DBAPIError,
        match="The encoding of the database, or the session's client_encoding, does not have a character of it",
    ):
        kind.ask(does_not_fit)


# An engine of the caller's own, which sets nothing.


def test_with_another_engine_the_service_reads_times_whatever_its_date_style(strange: URL) -> None:
    engine = create_engine(strange, poolclass=NullPool, connect_args={"client_encoding": "utf8"})
    with engine.connect() as connection:
        assert str(connection.scalar(text("SHOW DateStyle"))).startswith("German")
        assert written_and_read(connection) == {"größe": "☃ 😀"}


def test_with_another_engine_the_error_says_what_is_wrong_with_its_encoding(strange: URL) -> None:
    engine = create_engine(strange, poolclass=NullPool, connect_args={"client_encoding": "latin1"})
    with Session(engine) as session, pytest.raises(UnicodeEncodeError) as caught, explained():
        session.scalar(text("SELECT :document"), {"document": "😀"})
    assert any("client_encoding" in note and "create_engine" in note for note in caught.value.__notes__)
