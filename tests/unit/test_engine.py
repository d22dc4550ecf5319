"""Where the database URL comes from, what it means, and which engine it gives. Nothing connects here."""

from __future__ import annotations

import re
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import make_url

from iot_models.engine import (
    create_async_engine,
    create_engine,
    database_url,
    normalize_url,
    shown,
)

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(autouse=True)
def _no_urls_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IOT_MODELS_DATABASE_URL", raising=False)
    monkeypatch.delenv("DATABASE_URL", raising=False)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_a_url_without_a_driver_means_psycopg_3(scheme: str) -> None:
    url = normalize_url(f"{scheme}://iot:s%40cret@db:5433/iotcloud?sslmode=require")

    assert url.drivername == "postgresql+psycopg"
    assert (url.username, url.password, url.host, url.port, url.database) == ("iot", "s@cret", "db", 5433, "iotcloud")
    assert url.query == {"sslmode": "require"}


def test_a_url_that_names_a_driver_keeps_it() -> None:
    assert normalize_url("postgresql+asyncpg://db/iot").drivername == "postgresql+asyncpg"


@pytest.mark.parametrize("url", ["mysql://db/iot", "sqlite:///iot.db"])
def test_another_database_is_refused_by_name(url: str) -> None:
    with pytest.raises(ValueError, match=f"works on PostgreSQL.*{url.split(':', maxsplit=1)[0]}"):
        normalize_url(url)


@pytest.mark.parametrize("url", ["iotcloud", "postgresql://iot:hunter2@db:port/iot", "://hunter2"])
def test_a_text_that_is_not_a_url_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ValueError, match="not a database URL: write it as postgresql://") as caught:
        normalize_url(url)
    assert "hunter2" not in str(caught.value)


def test_the_password_of_another_database_is_not_shown() -> None:
    with pytest.raises(ValueError, match="PostgreSQL") as caught:
        normalize_url("mysql://iot:hunter2@db/iot")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("postgresql://iot:hunter2@db:6432/iot?sslmode=require", "database iot at db:6432"),
        ("postgresql://db/iot?password=hunter2&sslpassword=hunter2&oauth_client_secret=hunter2", "database iot at db"),
        ("postgresql:///iot?host=/run/a,/run/b&port=1,2&scram_client_key=hunter2", "database iot at /run/a,/run/b:1,2"),
        ("postgresql://iot:hunter2@/?options=-c%20app.key=hunter2", "database (default) at (default host)"),
    ],
)
def test_of_a_url_its_place_is_shown_and_nothing_else(url: str, place: str) -> None:
    assert shown(make_url(url)) == place


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://iot:hunt@er2@db/iot",
        "postgresql:///host=db password=hunter2 dbname=iot",
        "postgresql:///postgresql://iot:hunter2@db/iot",
    ],
)
def test_a_password_that_a_url_would_take_for_its_host_or_database_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(ValueError, match=r"with @ in a user or password written as %40") as caught:
        normalize_url(url)
    assert "er2" not in str(caught.value)


@pytest.mark.parametrize("take", [normalize_url, create_engine, create_async_engine])
@pytest.mark.parametrize("driver", ["nosuch", "", "psycopg+x"])
def test_a_driver_that_sqlalchemy_does_not_know_is_refused_by_name(take: Callable[[str], object], driver: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^postgresql\+{re.escape(driver)}: .*write the URL as postgresql\+psycopg://"
    ):
        take(f"postgresql+{driver}://iot:s3cret@db/iot")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://iot\ud800@db/iot",
        "postgresql://iot:\0@db/iot",
        "postgresql://iot@d\0b/iot",
        "postgresql://iot@db/iot%00",
        "postgresql://iot@db/iot?application_name=a&application_name=%00",
        "postgresql://iot@db/iot?a\udfff=b",
    ],
    ids=ascii,
)
def test_a_url_that_no_server_can_read_is_refused_without_showing_it(url: str) -> None:
    for given in (url, make_url(url)):
        with pytest.raises(
            ValueError, match=r"^not a database URL, because it contains NUL or a lone surrogate: write"
        ) as caught:
            normalize_url(given)
        assert "iot@" not in str(caught.value)


def test_a_driver_that_is_not_installed_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("psycopg", "psycopg2"):
        monkeypatch.setitem(sys.modules, name, None)

    with pytest.raises(
        ImportError, match=r"^postgresql\+psycopg2: .*; write the URL as postgresql\+psycopg://.*, or install"
    ):
        create_engine("postgresql+psycopg2://db/iot")
    with pytest.raises(ImportError, match=r"^postgresql\+psycopg: .*; pip install 'iot-models\[binary\]'"):
        create_engine("postgresql://db/iot")


def test_an_async_engine_refuses_a_driver_without_an_async_mode_and_says_what_to_use() -> None:
    with pytest.raises(
        ValueError, match=r"^postgresql\+psycopg2 has no async mode: use postgresql\+psycopg, or postgresql"
    ):
        create_async_engine("postgresql+psycopg2://db/iot")


def test_of_two_sources_of_the_url_the_more_specific_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert database_url(fallback="postgres:///ini").database == "ini"

    monkeypatch.setenv("DATABASE_URL", "postgres:///general")
    assert database_url(fallback="postgres:///ini").database == "general"

    monkeypatch.setenv("IOT_MODELS_DATABASE_URL", "postgres:///ours")
    assert database_url(fallback="postgres:///ini").database == "ours"

    assert database_url("postgres:///explicit", fallback="postgres:///ini").database == "explicit"


def test_an_empty_source_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOT_MODELS_DATABASE_URL", "")
    assert database_url("", fallback="postgres:///ini").database == "ini"


def test_no_url_at_all_is_an_error_that_names_the_variable() -> None:
    with pytest.raises(ValueError, match="set IOT_MODELS_DATABASE_URL"):
        database_url(fallback="")


@pytest.mark.parametrize("create", [create_engine, create_async_engine])
def test_an_engine_takes_its_url_where_migrations_take_it(
    monkeypatch: pytest.MonkeyPatch, create: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match="set IOT_MODELS_DATABASE_URL"):
        create()

    monkeypatch.setenv("DATABASE_URL", "postgres://db/general")
    assert create().url.database == "general"
    assert create().url.drivername == "postgresql+psycopg"

    assert create("postgresql://db/explicit").url.database == "explicit"
    assert create(make_url("postgresql://db/object")).url.database == "object"


def test_an_async_engine_uses_the_async_mode_of_psycopg_or_the_driver_that_the_url_names() -> None:
    assert create_async_engine("postgresql://db/iot").dialect.driver == "psycopg"
    assert create_async_engine("postgresql+asyncpg://db/iot").dialect.driver == "asyncpg"
    assert create_async_engine("postgresql+asyncpg://db/iot").dialect.is_async


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg_async"])
def test_a_synchronous_engine_refuses_an_async_driver_and_says_what_to_use(driver: str) -> None:
    with pytest.raises(
        ValueError, match=rf"{driver} is an async driver: use create_async_engine, or postgresql\+psycopg"
    ):
        create_engine(f"postgresql+{driver}://db/iot")


@pytest.mark.parametrize(("package", "extra"), [("greenlet", "async"), ("asyncpg", "asyncpg")])
def test_a_missing_package_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(ImportError, match=rf"needs {package}: pip install 'iot-models\[{extra}\]'"):
        create_async_engine("postgresql+asyncpg://db/iot")


def test_psycopg_needs_no_asyncpg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asyncpg", None)

    assert create_async_engine("postgresql://db/iot").dialect.is_async


def test_the_engine_hides_the_password() -> None:
    for engine in (create_engine("postgresql://iot:hunter2@db/iot"), create_async_engine("postgres://iot:hunter2@db")):
        assert "hunter2" not in f"{engine!r} {engine.url}"


@pytest.mark.parametrize("create", [create_engine, create_async_engine])
@pytest.mark.parametrize("timeout", ["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"])
def test_behind_pgbouncer_no_timeout_can_be_passed(create: Callable[..., Any], timeout: str) -> None:
    for value in (timedelta(seconds=5), timedelta(0), timedelta(seconds=30)):
        with pytest.raises(ValueError, match=rf"^{timeout}: PgBouncer .* leave it out, and set it with ALTER ROLE"):
            create("postgresql://db/iot", pgbouncer=True, **{timeout: value})
    create("postgresql://db/iot", pgbouncer=True, **{timeout: None})
