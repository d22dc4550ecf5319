"""No password and no document of a device stands in an error, a log, a `repr` or what a command or a test run prints."""

from __future__ import annotations

import asyncio
import json
import time
import traceback
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from sqlalchemy import URL, NullPool, make_url, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from iot_models import ShadowService, cli, migrate
from iot_models._core.shown_names import looks_like_a_secret
from iot_models._migrations.command_line import main
from iot_models.engine import create_async_engine, create_engine, shown
from pytest_iot_models import _without_pieces
from tests.databases.alembic_runs import CHECKOUT, run_alembic
from tests.databases.devices import DEVICE, TENANT, add_device
from tests.databases.engines import KINDS, Kind

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import Engine

SECRET = "hunter2"  # noqa: S105 - not a real one
NOWHERE = f"postgresql://iot:{SECRET}@127.0.0.1:9/iot"
WITH_SECRETS = [
    NOWHERE,
    f"postgresql://iot@127.0.0.1:9/iot?password={SECRET}",
    f"postgresql://iot@127.0.0.1:9/iot?sslpassword={SECRET}",
    f"postgresql://iot:a@127.0.0.1:9/iot?password=b&password={SECRET}",
    f"postgresql:///iot?host=iot:{SECRET}@127.0.0.1&port=9",
    f"postgresql://127.0.0.1/iot?host=127.0.0.1,iot:{SECRET}@127.0.0.2&port=9,9",
    f"postgresql:///iot?host=127.0.0.1&port={SECRET}",
    f"postgresql://iot@127.0.0.1:9/iot?oauth_client_secret={SECRET}",
    f"postgresql://iot@127.0.0.1:9/iot?scram_client_key={SECRET}",
    f"postgresql://iot@127.0.0.1:9/iot?options=-c%20app.key={SECRET}",
    f"postgresql://iot:hunt@{SECRET}@127.0.0.1:9/iot",
    f"postgresql:///host=127.0.0.1 port=9 password={SECRET}",
    f"postgresql:///postgresql://iot:{SECRET}@127.0.0.1:9/iot",
    f"postgresql://iot:{SECRET}@127.0.0.1:nine/iot",
    f"postgresql://corp/iot:{SECRET}@127.0.0.1:9/iot",
    f"postgresql://127.0.0.1:9/iot#{SECRET}",
    f"postgresql://127.0.0.1:9/iot;password:{SECRET}",
    f"postgresql://127.0.0.1:9/iot&password:{SECRET}",
    f"mysql://iot:{SECRET}@db/iot",
    f"postgresql+nosuch://iot:{SECRET}@db/iot",
    f"postgresql+asyncpg://iot:{SECRET}@127.0.0.1:9/iot",
    f"postgres//iot:{SECRET}@db/iot",
    f"postgresql://iot:{SECRET}\0@db/iot",
]


def said_by(call: Callable[[], object]) -> str:
    """The error of a call, with its traceback and all errors behind it."""
    with pytest.raises(Exception) as caught:
        call()
    return "".join(traceback.format_exception(caught.value)) + repr(caught.value)


def read(url: str | URL) -> None:
    with Session(create_engine(url)) as session:
        ShadowService(session, TENANT).get(DEVICE)


def read_async(url: str | URL) -> None:
    async def ask() -> None:
        async with create_async_engine(url).connect() as connection:
            await connection.execute(text("SELECT 1"))

    asyncio.run(ask())


@pytest.mark.repeats
@pytest.mark.parametrize("url", WITH_SECRETS)
@pytest.mark.parametrize("call", [read, read_async, migrate.upgrade, migrate.check])
def test_the_error_about_a_url_does_not_show_its_password(call: Callable[[str], object], url: str) -> None:
    assert SECRET not in said_by(lambda: call(url))


@pytest.mark.repeats
@pytest.mark.parametrize("url", WITH_SECRETS)
@pytest.mark.parametrize(
    "arguments",
    [
        ["upgrade", "--url", "{}"],
        ["check", "--url={}"],
        ["current", "-x", "url={}"],
        ["upgrade", "-x", "{}"],
        ["upgrade", "--lock-timeout", "{}"],
        ["downgrade", "075", "--shadow", "{}"],
        ["upgrade", "{}"],
        ["upgrade", "head", "{}"],
        ["sql", "{}"],
        ["{}"],
        ["check", "--nosuch={}"],
        ["upgrade", "--sql={}"],
        ["check", "--help={}"],
        ["downgrade", "075", "--s={}"],
        ["check", "--tenancy", "{}"],
        ["check", "--u", "{}"],
        ["{0} (choose from {0})"],
    ],
)
def test_the_command_does_not_show_the_password_wherever_the_url_was_put(
    arguments: list[str], url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOT_MODELS_DATABASE_URL", NOWHERE)
    code: Any
    try:
        code = main([argument.format(url) for argument in arguments])
    except SystemExit as exit_:
        code = exit_.code
    printed = capsys.readouterr()

    assert code in {1, 2}
    assert printed.err
    assert SECRET not in printed.out + printed.err


def test_the_help_shows_no_url_of_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOT_MODELS_DATABASE_URL", NOWHERE)
    for arguments in (["--help"], ["upgrade", "--help"], ["check", "--help"]):
        with pytest.raises(SystemExit):
            main(arguments)
    assert SECRET not in capsys.readouterr().out


@pytest.mark.parametrize(
    "given", [["upgrade", "--sql={}"], ["check", "--help={}"], ["downgrade", "--s={}"], ["check", "--tenancy", "{}"]]
)
def test_the_command_line_never_repeats_what_it_was_given(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([argument.format(NOWHERE) for argument in given])
    printed = capsys.readouterr()
    assert "error: " in printed.err
    assert SECRET not in printed.out + printed.err


def test_an_unknown_command_is_told_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([f"{NOWHERE} (choose from {NOWHERE})"])
    said = capsys.readouterr().err
    assert "invalid choice (choose from" in said
    assert "upgrade" in said
    assert SECRET not in said


@pytest.mark.parametrize(
    "given",
    [
        NOWHERE,
        f" {NOWHERE}",
        f"jdbc:{NOWHERE}",
        NOWHERE.replace("postgresql", "POSTGRESQL"),
        f"postgres//iot:{SECRET}@db/iot",
        f"mqtt://iot:{SECRET}@db",
        f"host=127.0.0.1 password = {SECRET}",
        f"PGPASSWORD={SECRET}",
    ],
)
@pytest.mark.parametrize(
    "arguments",
    [
        ["show", "{}"],
        ["history", "{}"],
        ["register", "d", "{}", "--yes"],
        ["remove", "{}", "--yes"],
        ["show", "d", "--tenant", "{}"],
        ["--tenant", "{}", "show", "d"],
        ["pending", "--after", "{}"],
        ["patch", "d", "{{}}", "--yes", "--reason", "{}"],
        ["patch", "d", "{{}}", "--yes", "--request-id", "{}"],
        ["patch", "d", "{{}}", "--yes", "--actor", "{}"],
        ["patch", "d", "{}", "--yes"],
        ["history", "d", "--before", "{}"],
        ["{}"],
        ["show", "d", "{}"],
    ],
)
def test_a_url_or_a_password_in_the_place_of_another_argument_is_not_repeated(
    arguments: list[str], given: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOT_MODELS_TENANT", "acme")
    monkeypatch.setenv("IOT_MODELS_DATABASE_URL", NOWHERE)
    with pytest.raises(SystemExit, match="2"):
        cli.main([argument.format(given) for argument in arguments])
    printed = capsys.readouterr()
    assert "error: " in printed.err
    assert SECRET not in printed.out + printed.err


def test_a_url_in_the_variable_of_the_tenant_is_not_repeated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOT_MODELS_TENANT", NOWHERE)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["show", "d"])
    printed = capsys.readouterr()
    assert "the tenant looks like the URL of a database, or a password: pass a URL as --url" in printed.err
    assert SECRET not in printed.out + printed.err


@pytest.mark.parametrize("given", ["see https://tickets.example/17", "urn:dev:1", "pass", "a@b", "host=a", "passwords"])
def test_other_words_are_no_secrets(given: str) -> None:
    assert not looks_like_a_secret(given)


@pytest.mark.parametrize("option", ["password", "sslpassword", "scram_client_key"])
def test_the_repr_of_an_engine_shows_no_secret_of_its_url(option: str) -> None:
    url = f"postgresql://iot@127.0.0.1:9/iot?{option}={SECRET}"
    engine = create_engine(url)
    assert SECRET not in repr(engine) + repr(create_async_engine(url)) + repr(engine.pool)
    arguments, options = engine.dialect.create_connect_args(engine.url)
    assert not arguments
    assert (options["password"] if option == "password" else SECRET) == SECRET


@pytest.mark.parametrize(
    ("place", "shown_as"),
    [
        ("?host=iot:hunter2@h", "(no plain host)"),
        ("?host=iot:hunter2", "(no plain host)"),
        ("?host=a:1,b&port=x", "a:1,b"),
        ("?host=@abstract&port=5", "@abstract:5"),
        ("?host=::1", "::1"),
        ("?host=/run/a b", "/run/a b"),
    ],
)
def test_a_host_or_port_that_is_none_is_not_shown(place: str, shown_as: str) -> None:
    assert shown(make_url(f"postgresql:///iot{place}")) == f"database iot at {shown_as}"


@pytest.mark.parametrize("query", [f"host=iot:{SECRET}@h", f"port={SECRET}", f"host=a,{SECRET}@b"])
def test_an_option_host_or_port_that_is_none_is_refused_without_being_shown(query: str) -> None:
    with pytest.raises(ValueError, match="because of its option host or port") as caught:
        create_engine(f"postgresql:///iot?{query}")
    assert SECRET not in str(caught.value)


DOCUMENT = {"wifi_password": SECRET}


SERVICE: Any = ShadowService(Session(), TENANT)  # Any: the arguments are wrong


@pytest.mark.parametrize(
    "call",
    [
        lambda url: type(SERVICE)(url, TENANT),
        lambda url: type(SERVICE)(create_engine(url + "?password=" + SECRET), TENANT),
        lambda _: SERVICE.get(DOCUMENT),
        lambda _: SERVICE.replace_desired(DEVICE, {}, expected_version=DOCUMENT),
        lambda _: SERVICE.replace_desired_many(str(DOCUMENT)),
        lambda _: SERVICE.replace_desired_many([DOCUMENT]),
        lambda _: SERVICE.replace_reported_many([DOCUMENT]),
        lambda _: SERVICE.get_many([DOCUMENT]),
    ],
)
def test_a_wrong_argument_is_shown_by_its_type(call: Callable[[str], object]) -> None:
    said = said_by(lambda: call(NOWHERE))
    assert "got <" in said or "got '<" in said
    assert SECRET not in said


@pytest.mark.repeats
def test_a_url_in_an_ini_file_whose_percent_sign_is_not_doubled_is_not_shown(tmp_path: Path) -> None:
    ini = tmp_path / "alembic.ini"
    settings = (CHECKOUT / "alembic.ini").read_text().replace("%(here)s", str(CHECKOUT))
    url = f"sqlalchemy.url = postgresql://iot:p%40{SECRET}@127.0.0.1:9/iot"
    ini.write_text(settings.replace("sqlalchemy.url =", url, 1))
    run = run_alembic("-c", str(ini), "current")
    assert "cannot reach database iot at 127.0.0.1:9" in run.stderr
    assert SECRET not in run.stdout + run.stderr


@pytest.mark.repeats
@pytest.mark.parametrize("driver", KINDS)
@pytest.mark.parametrize(
    "write",
    [
        lambda shadows: shadows.replace_desired(DEVICE, DOCUMENT),
        lambda shadows: shadows.patch_desired_many([DEVICE], DOCUMENT),
    ],
)
def test_an_error_of_the_database_shows_no_document(
    own_engine: Engine, driver: str, write: Callable[[ShadowService], object]
) -> None:
    with Session(own_engine) as session, session.begin():
        add_device(session)
        session.execute(text("ALTER TABLE device_state ADD CHECK (NOT desired_state ? 'wifi_password')"))

    kind = Kind(driver, own_engine.url)
    said = said_by(lambda: kind.ask(lambda connection: write(ShadowService(Session(connection), TENANT))))

    assert "violates check constraint" in said
    assert SECRET not in said


def all_that_is_in(error: BaseException | None) -> str:
    """What the error and those behind it say, also to code that reads their attributes: but SQLAlchemy's `params`."""
    said = ""
    while error is not None:
        said += f"{error}\n{error!r}\n{[value for name, value in vars(error).items() if name != 'params']}\n"
        error = error.__cause__
    return said


@pytest.mark.parametrize("driver", KINDS)
def test_no_attribute_of_an_error_of_the_database_has_the_document(own_engine: Engine, driver: str) -> None:
    with Session(own_engine) as session, session.begin():
        add_device(session)
        session.execute(text("ALTER TABLE device_state ADD CHECK (NOT desired_state ? 'wifi_password')"))

    kind = Kind(driver, own_engine.url)
    with pytest.raises(IntegrityError, match="violates check constraint") as caught:
        kind.ask(lambda connection: ShadowService(Session(connection), TENANT).replace_desired(DEVICE, DOCUMENT))

    assert SECRET not in all_that_is_in(caught.value.orig)


@pytest.mark.parametrize("driver", KINDS)
def test_an_error_while_rows_are_streamed_shows_no_document(own_engine: Engine, driver: str) -> None:
    engine = create_engine(own_engine.url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text(
            "CREATE FUNCTION refuse(doc text) RETURNS int LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE check_violation USING MESSAGE = 'refused', DETAIL = 'Failing row ' || doc; END $$"
        ))  # fmt: skip
    streamed = text("SELECT CASE WHEN n < 1000 THEN n ELSE refuse(:doc) END FROM generate_series(1, 1000) AS n")

    with pytest.raises(Exception, match="refused") as caught:
        Kind(driver, own_engine.url).ask(
            lambda connection: (
                connection.execution_options(stream_results=True, max_row_buffer=10)
                .execute(streamed, {"doc": json.dumps(DOCUMENT)})
                .all()
            )
        )

    assert SECRET not in all_that_is_in(caught.value) + "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("driver", KINDS)
@pytest.mark.parametrize("many", [False, True])
def test_a_parameter_that_the_driver_cannot_send_is_not_shown(own_engine: Engine, driver: str, *, many: bool) -> None:
    parameters: Any = {"n": DOCUMENT, "t": SECRET}
    with pytest.raises(DBAPIError) as caught:
        Kind(driver, own_engine.url).ask(
            lambda connection: connection.execute(
                text("UPDATE device_state SET desired_version = :n WHERE device_id = :t"),
                [parameters, parameters] if many else parameters,
            )
        )

    assert SECRET not in all_that_is_in(caught.value) + "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("driver", KINDS)
def test_an_error_without_a_message_shows_no_document(own_engine: Engine, driver: str) -> None:
    with Session(own_engine) as session, session.begin():
        add_device(session)
        session.execute(text(
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE check_violation USING MESSAGE = '',"
            " DETAIL = 'Failing row ' || CAST(NEW.desired_state AS text); END $$;"
            "CREATE TRIGGER t BEFORE UPDATE ON device_state FOR EACH ROW EXECUTE FUNCTION f()"
        ))  # fmt: skip
    own_engine.dispose()

    kind = Kind(driver, own_engine.url)
    with pytest.raises(IntegrityError) as caught:
        kind.ask(lambda connection: ShadowService(Session(connection), TENANT).replace_desired(DEVICE, DOCUMENT))

    assert SECRET not in all_that_is_in(caught.value) + "".join(traceback.format_exception(caught.value))


QUOTING = {
    "the parameters of the statement": (
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET log_parameter_max_length_on_error = -1',"
        " current_database()); END $$;"
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'refused' USING HINT = 'ask the team'; END $$"
    ),
    "a statement that a trigger has made": (
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN EXECUTE format('SELECT refused(%L)', NEW.desired_state); END $$"
    ),
    "a statement with a fault in it": (
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN EXECUTE format('SELECT %L refused, ?', NEW.desired_state); END $$"
    ),
}


@pytest.mark.repeats
@pytest.mark.parametrize("driver", KINDS)
@pytest.mark.parametrize("quotes", QUOTING)
def test_what_an_error_says_of_where_it_was_raised_shows_no_document(
    own_engine: Engine, driver: str, quotes: str
) -> None:
    with Session(own_engine) as session, session.begin():
        add_device(session)
        session.execute(text(QUOTING[quotes]))
        session.execute(text("CREATE TRIGGER t BEFORE UPDATE ON device_state FOR EACH ROW EXECUTE FUNCTION f()"))
    own_engine.dispose()

    kind = Kind(driver, own_engine.url)
    with pytest.raises(DBAPIError) as caught:
        kind.ask(lambda connection: ShadowService(Session(connection), TENANT).replace_desired(DEVICE, DOCUMENT))

    original: Any = caught.value.orig
    said = "".join(traceback.format_exception(caught.value))
    if driver == "asyncpg":
        read = original.__cause__.as_dict()
        hint = read.get("hint")
    else:
        read = [original.__reduce__(), original.diag.context, original.diag.internal_query]
        hint = original.diag.message_hint
        assert not hint or f"HINT:  {hint}" in said
    assert SECRET not in said + repr(read)
    assert original.sqlstate in {"P0001", "42883", "42601"}
    assert "UPDATE device_state" in said
    assert hint == "ask the team" or quotes != "the parameters of the statement"


@pytest.mark.repeats
def test_an_error_of_a_migration_shows_no_document(shadow_database: str, capsys: pytest.CaptureFixture[str]) -> None:
    engine = create_engine(shadow_database, poolclass=NullPool)
    with Session(engine) as session, session.begin():
        add_device(session, desired_state=DOCUMENT, desired_version=1)
    migrate.downgrade(shadow_database, "075")
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE device_state ADD CHECK (device_id = 'another') NOT VALID"))
    code = main(["upgrade", "--url", str(shadow_database)])
    said = capsys.readouterr().err
    assert code == 1
    assert "PostgreSQL says: new row for relation" in said
    assert SECRET not in said


def test_the_error_of_a_view_that_does_not_take_a_row_shows_no_document(own_engine: Engine) -> None:
    engine = create_engine(own_engine.url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(
            text("CREATE VIEW ours AS SELECT * FROM device_state WHERE tenant_id = 'acme' WITH CHECK OPTION")
        )
        insert = text(
            "INSERT INTO ours (tenant_id, site_id, device_id, desired_state) VALUES ('x', 's', 'd', CAST(:d AS jsonb))"
        )
        said = said_by(lambda: connection.execute(insert, {"d": json.dumps(DOCUMENT)}))

    assert "violates check option" in said
    assert SECRET not in said


def test_what_else_a_constraints_error_says_stays(own_engine: Engine) -> None:
    engine = create_engine(own_engine.url, poolclass=NullPool)
    with Session(engine) as session:
        add_device(session)
        with (
            pytest.raises(IntegrityError, match=r"Key \(tenant_id, device_id\)=.* already exists"),
            session.begin_nested(),
        ):
            session.execute(text("INSERT INTO device_state SELECT * FROM device_state"))
        with pytest.raises(DBAPIError, match="null value in column") as null:
            session.execute(text("UPDATE device_state SET status = NULL"))

    assert "UPDATE device_state SET status = NULL" in str(null.value)
    assert "Failing row" not in str(null.value) + str(null.value.orig)


FAILS = f"""
import pytest
from iot_models.engine import create_engine

@pytest.fixture(scope="session")
def shadow_server():
    from iot_models.testing import PostgresServer
    return PostgresServer("{NOWHERE}", "made up")

def test_a_server(shadow_server):
    assert not shadow_server

def test_a_url(url):
    assert 1 == 2

@pytest.fixture
def url(shadow_server):
    return shadow_server.url
"""


@pytest.mark.repeats
@pytest.mark.parametrize("options", [(), ("--showlocals",), ("--tb=long", "-vv"), ("--setup-show",)])
def test_the_report_of_a_test_that_fails_does_not_show_the_password(
    pytester: pytest.Pytester, options: tuple[str, ...]
) -> None:
    pytester.makepyfile(FAILS)
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", *options)

    result.assert_outcomes(failed=2)
    text_of_run = result.stdout.str()
    assert "database iot at 127.0.0.1:9" in text_of_run or options == ("--setup-show",)
    assert "hunter2@" not in text_of_run.replace(NOWHERE, "", text_of_run.count(f'PostgresServer("{NOWHERE}"'))


def test_an_assertion_that_compares_the_url_does_not_show_the_password(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOT_MODELS_TEST_DATABASE_URL", NOWHERE.replace(SECRET, f"p%40{SECRET}"))
    pytester.makepyfile("""
        import os
        from urllib.parse import unquote

        def test_a_url():
            assert os.environ["IOT_MODELS_TEST_DATABASE_URL"] == "x"

        def test_a_connection():
            raise ValueError(unquote(os.environ["IOT_MODELS_TEST_DATABASE_URL"]))

        def test_nothing():
            assert 1 == 2
    """)
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")

    result.assert_outcomes(failed=3)
    said = result.stdout.str()
    assert "iot:***@127.0.0.1:9" in said
    assert SECRET not in said
    assert "assert 1 == 2" in said


def test_a_test_that_changes_the_variable_does_not_show_the_password(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOT_MODELS_TEST_DATABASE_URL", NOWHERE)
    pytester.makepyfile("""
        import os
        from unittest import mock

        URL = os.environ["IOT_MODELS_TEST_DATABASE_URL"]

        def test_taken_away(monkeypatch):
            monkeypatch.delenv("IOT_MODELS_TEST_DATABASE_URL")
            assert URL == "x"

        def test_another(monkeypatch):
            monkeypatch.setenv("IOT_MODELS_TEST_DATABASE_URL", "postgresql://a:correct-horse@c/d")
            print("connecting to", URL, os.environ["IOT_MODELS_TEST_DATABASE_URL"])
            assert 0

        def test_nothing_left():
            with mock.patch.dict(os.environ, clear=True):
                assert URL + " postgresql://a:correct-horse@c/d" == "x"
    """)
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:randomly")

    result.assert_outcomes(failed=3)
    said = result.stdout.str()
    assert "iot:***@127.0.0.1:9" in said
    assert "a:***@c/d" in said
    assert SECRET not in said
    assert "correct-horse" not in said.split("Captured stdout", maxsplit=1)[1]


def test_the_reason_of_a_test_that_is_left_out_does_not_show_the_password(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOT_MODELS_TEST_DATABASE_URL", NOWHERE)
    pytester.makepyfile("""
        import os, pytest

        def test_skipped():
            pytest.skip("no server at " + os.environ["IOT_MODELS_TEST_DATABASE_URL"])

        def test_expected_to_fail():
            pytest.xfail("no server at " + os.environ["IOT_MODELS_TEST_DATABASE_URL"])
    """)
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-ra")

    result.assert_outcomes(skipped=1, xfailed=1)
    said = result.stdout.str()
    assert said.count("no server at postgresql://iot:***@127.0.0.1:9") == 2
    assert SECRET not in said


@pytest.mark.repeats
@pytest.mark.parametrize(
    "url",
    [
        "postgresql://iot:p%20%40hunter2@127.0.0.1:9/iot",
        "postgresql://iot:a/hunter2@127.0.0.1:9/iot",
        "postgresql://iot:x1y@127.0.0.1:9/iot?password=hunter2&sslpassword=hunter2x",
    ],
)
def test_what_a_test_prints_or_writes_otherwise_does_not_show_the_password(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("IOT_MODELS_TEST_DATABASE_URL", url)
    pytester.makepyfile("""
        import logging, os
        from urllib.parse import quote
        from sqlalchemy import make_url

        URL = make_url(os.environ["IOT_MODELS_TEST_DATABASE_URL"])

        def test_print():
            print(URL.render_as_string(hide_password=False))
            assert 0

        def test_log():
            logging.warning("options %s", URL.translate_connect_args() | dict(URL.query))
            assert 0

        def test_value():
            assert quote(URL.password) == dict(URL.query)
    """)
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(failed=3)
    assert SECRET not in result.stdout.str()


LONG = "Kq7vXw2mZr9tLp4sYb8nDf3gQw5eRt6y"
PIECES = [LONG[start : start + 4] for start in range(len(LONG) - 3)]


@pytest.mark.repeats
@pytest.mark.parametrize("color", ["no", "yes"])
def test_what_is_left_of_a_password_where_pytest_cuts_a_text_is_not_shown(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, color: str
) -> None:
    monkeypatch.setenv("IOT_MODELS_TEST_DATABASE_URL", f"postgresql+psycopg://iot_tester:{LONG}@127.0.0.1:9/iot")
    pytester.makepyfile("""
        import os
        import pytest
        from sqlalchemy import make_url

        URL = os.environ["IOT_MODELS_TEST_DATABASE_URL"]
        OPTIONS = make_url(URL).translate_connect_args()

        @pytest.mark.parametrize("other", ["db.example", "127.0.0.2", "127.0.0.1:9/other", "Kq7vXw2m:9"])
        def test_the_same_beginning(other):
            assert URL == URL.replace("127.0.0.1", other)

        def test_the_same_end():
            assert URL == "x" * 34 + URL[34:]

        @pytest.mark.parametrize("before", range(0, 110, 4))
        def test_a_long_text(before):
            assert URL in ["a" * before + URL + "b" * 150, OPTIONS]

        @pytest.mark.parametrize("before", range(0, 36, 4))
        def test_a_dict(before):
            assert {"a" * before: 1, **OPTIONS} == 1

        @pytest.mark.parametrize("before", range(0, 640, 16))
        def test_many_characters(before):
            assert "a" * before + URL == "b"

        def test_passwords():
            assert "a" * 60 + OPTIONS["password"] == "a" * 60 + OPTIONS["password"][:20]
    """)
    said = pytester.runpytest_inprocess("-p", "no:cacheprovider", f"--color={color}", "--no-header").stdout.str()

    assert "Skipping" in said
    assert [piece for piece in PIECES if piece in said.replace("Kq7vXw2m:9", "")] == []


@pytest.mark.repeats
@pytest.mark.parametrize(
    "options", [(), ("-vv",), ("-v", "--tb=native"), ("--tb=native",), ("--tb=line",), ("-l", "-vv")]
)
def test_no_line_of_a_report_begins_or_ends_with_a_piece_of_the_password(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    monkeypatch.setenv("IOT_MODELS_TEST_DATABASE_URL", f"postgresql+psycopg://iot_tester:{LONG}@127.0.0.1:9/iot")
    pytester.makepyfile("""
        import os
        import pytest

        URL = os.environ["IOT_MODELS_TEST_DATABASE_URL"]
        PASSWORD = URL[32:-16]

        @pytest.mark.parametrize("between", range(8))
        def test_lines_that_are_the_same(between):
            before, after = "." * between + PASSWORD + "x" * 60, "x" * 60 + PASSWORD + "." * between
            assert after + "\\none\\n" + before == after + "\\ntwo\\n" + before

        @pytest.mark.parametrize("before", range(60, 100, 3))
        def test_a_text_that_is_there(before):
            assert "zz" not in "zz" + "a" * 60 + URL + "y" * before + "zz" + URL

        @pytest.mark.parametrize("before", range(0, 80, 3))
        def test_wrapped_bytes(before):
            assert {"a": b"." * before + URL.encode(), "b": 1} == {"a": b"." * before + URL.encode(), "b": 2}

        @pytest.mark.parametrize("before", range(0, 110, 4))
        def test_a_long_text(before):
            assert "a" * before + URL + "b" * 150 == "a" * before + URL[:-9]

        def test_the_same_beginning():
            assert URL == URL.replace("127.0.0.1", "127.0.0.2") + "z"
    """)
    said = pytester.runpytest_inprocess("-p", "no:cacheprovider", "--no-header", *options).stdout.str()

    assert "***" in said
    assert [line for line in said.splitlines() if any(piece in line for piece in PIECES)] == []


def test_a_plus_sign_in_the_query_of_a_url_is_a_space_too(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOT_MODELS_TEST_DATABASE_URL", "postgresql://iot@127.0.0.1:9/iot?password=hunter+two")
    pytester.makepyfile("""
        import os
        from sqlalchemy import make_url

        def test_prints():
            url = make_url(os.environ["IOT_MODELS_TEST_DATABASE_URL"])
            print(url, url.query, url.query["password"].replace(" ", "+"), url.query["password"].encode())
            assert 0
    """)
    said = pytester.runpytest_inprocess("-p", "no:cacheprovider").stdout.str()
    assert said.count("***") >= 4
    assert "hunter" not in said


def test_a_long_report_is_looked_through_in_no_time() -> None:
    line = "E       " + "postgresql://iot_tester@127.0.0.1:9/iot " * 3
    began = time.process_time()
    assert _without_pieces("\n".join([line] * 20_000), [LONG, LONG[::-1]]).count("\n") == 19_999
    assert _without_pieces("\n".join([f"    {LONG[4:-4]}"] * 1_000), [LONG, LONG[::-1]]) == "\n".join(
        ["    ***"] * 1_000
    )
    spaces = " " * 100_000
    assert _without_pieces(f"{spaces}{LONG[9:]}{spaces}.{LONG[4:9]}", [LONG]) == f"{spaces}***{spaces}.{LONG[4:9]}"
    assert time.process_time() - began < 5


def test_pieces_of_a_password_are_hidden_where_something_is_cut_and_nowhere_else() -> None:
    passwords = ["postgres-Qx7"]
    for said, expected in (
        ("postgres, post, and res-Qx7", "postgres, post, and res-Qx7"),
        ("...res-Qx7@db", "...***@db"),
        ("'iot:postgres-...'", "'iot:***...'"),
        ("'iot:postgres-...res-Qx7'", "'iot:***...***'"),
        ("E    - gres-Q@x", "E    - ***@x"),
        ("+ iot:postg", "+ iot:***"),
        ("+ gres-", "+ ***"),
        ("...gres-@...", "...***@..."),
        ("..." + "pos@" + "Qx7...", "...pos@Qx7..."),
        ("E           res-Qx7 and res-Qx7 again", "E           *** and res-Qx7 again"),
        ("  gres-Qx7@db\n\x1b[0m  iot:postgr\x1b[39m", "  ***@db\n\x1b[0m  iot:***\x1b[39m"),
        ("E         b'stgr'\n(b'es-Qx7')", "E         b'***'\n(b'***')"),
        ("  | 'iot:postgr'", "  | 'iot:***'"),
        ("    gres = postgresql", "    gres = postgresql"),
    ):
        assert _without_pieces(said, passwords) == expected


def test_a_property_that_a_test_records_does_not_show_the_password(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOT_MODELS_TEST_DATABASE_URL", NOWHERE)
    pytester.makepyfile("""
        import os

        def test_records(record_property):
            record_property("url", os.environ["IOT_MODELS_TEST_DATABASE_URL"])
            record_property(os.environ["IOT_MODELS_TEST_DATABASE_URL"], 1)
            record_property("options", {"password": "hunter2"})
            record_property("number", 17)
    """)
    result = pytester.runpytest_inprocess(
        "-p", "no:cacheprovider", "--junit-xml=report.xml", "-o", "junit_family=xunit1"
    )

    result.assert_outcomes(passed=1)
    recorded = (pytester.path / "report.xml").read_text()
    assert 'name="number" value="17"' in recorded
    assert recorded.count("iot:***@127.0.0.1:9") == 2
    assert SECRET not in recorded


def test_a_subtest_does_not_show_the_password(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOT_MODELS_TEST_DATABASE_URL", NOWHERE)
    pytester.makepyfile("""
        import logging, os, sys, unittest

        URL = os.environ["IOT_MODELS_TEST_DATABASE_URL"]

        def test_prints(subtests):
            with subtests.test(msg="prints"):
                print("url", URL)
                sys.stderr.write(URL)
                logging.warning("log %s", URL)
                assert 0

        def test_is_called_so(subtests):
            with subtests.test(msg=f"to {URL}", url=URL):
                assert 0

        class Test(unittest.TestCase):
            def test_has_a_parameter(self):
                with self.subTest(url=URL):
                    print(URL)
                    self.assertEqual(1, 2)
    """)
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-rA")

    said = result.stdout.str() + result.stderr.str()
    assert result.ret == 1
    assert "iot:***@127.0.0.1:9" in said
    assert SECRET not in said


@pytest.mark.parametrize("password", ["hun\\ter\"2'x", "hun\\ter2", 'hun"ter2', "hun'ter2"])
def test_a_repr_of_a_password_that_needs_escapes_does_not_show_it(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, password: str
) -> None:
    monkeypatch.setenv("IOT_MODELS_TEST_DATABASE_URL", f"postgresql://iot:{quote(password, safe='')}@127.0.0.1:9/iot")
    pytester.makepyfile("""
        import os
        from sqlalchemy import make_url

        URL = make_url(os.environ["IOT_MODELS_TEST_DATABASE_URL"])

        def test_compares():
            assert {"password": URL.password} == {}

        def test_prints():
            print({"password": URL.password}, [repr({"password": URL.password})])
            assert 0
    """)
    said = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-vv").stdout.str()
    assert said.count("***") >= 3
    assert "ter" not in said.replace("pytester", "").replace("terminal", "").split("FAILURES")[1].split("short test")[0]


@pytest.mark.repeats
def test_a_url_of_a_fixture_is_a_text_like_any_other(shadow_database: str) -> None:
    assert isinstance(shadow_database, str)
    assert make_url(shadow_database).database in repr(shadow_database)  # type: ignore[operator]
    assert f"{shadow_database}" == str(shadow_database) == "".join(shadow_database)
    assert "://" not in repr(shadow_database)
