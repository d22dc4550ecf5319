"""A URL for libpq, as hosts of databases give it, makes an engine with asyncpg; what asyncpg cannot do is an error."""

from __future__ import annotations

import asyncio
import inspect
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import asyncpg  # type: ignore[import-untyped]
import pytest
from psycopg.pq import Conninfo
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError

from iot_models._core.asyncpg_options import connect_arguments
from iot_models.engine import create_async_engine
from tests.databases.async_engines import async_engine, in_event_loop

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from iot_models.testing import PostgresServer

URL = "postgresql+asyncpg://fleet:hunter2@db.example:6543/iot"
SQLALCHEMYS = {"host", "port"}  # in a URL


def sent_to_asyncpg(query: str, url: str = URL, **connect_args: Any) -> dict[str, Any]:
    """The arguments with which SQLAlchemy calls `asyncpg.connect` for this engine."""
    seen: dict[str, Any] = {}

    async def connect(**arguments: Any) -> None:
        seen.update(arguments)
        raise ConnectionRefusedError

    async def run() -> None:
        engine = create_async_engine(f"{url}?{query}", connect_args=connect_args | {"async_creator_fn": connect})
        with pytest.raises(ConnectionRefusedError):
            await engine.connect()

    asyncio.run(run())
    inspect.signature(asyncpg.connect).bind(**seen)
    return seen


def test_the_url_that_a_host_gives_is_understood() -> None:
    sent = sent_to_asyncpg("sslmode=require")

    assert sent.pop("server_settings")["application_name"] == "iot_models"
    assert sent == {
        "dsn": "postgresql://?sslmode=require",
        "host": "db.example",
        "port": 6543,
        "user": "fleet",
        "password": "hunter2",
        "database": "iot",
    }


@pytest.mark.parametrize(
    ("query", "argument", "value"),
    [
        ("sslmode=verify-full&sslrootcert=/a%20b/ca.pem", "dsn", "postgresql://?sslmode=verify-full&sslrootcert=%2Fa+b%2Fca.pem"),
        ("sslcert=c&sslkey=k&sslpassword=p", "dsn", "postgresql://?sslcert=c&sslkey=k&sslpassword=p"),
        ("sslcrl=c&ssl_min_protocol_version=TLSv1.3", "dsn", "postgresql://?sslcrl=c&ssl_min_protocol_version=TLSv1.3"),
        ("sslmode=verify-full&sslrootcert=system", "ssl", True),
        ("sslrootcert=system", "ssl", True),
        ("ssl=require", "ssl", "require"),  # asyncpg's own word
        ("sslnegotiation=direct", "direct_tls", True),
        ("connect_timeout=5", "timeout", 5),
        ("connect_timeout=0", "timeout", None),
        ("connect_timeout=-1", "timeout", None),
        ("timeout=2.5", "timeout", 2.5),
        ("command_timeout=3", "command_timeout", 3.0),
        ("statement_cache_size=0", "statement_cache_size", 0),
        ("passfile=/home/fleet/.pgpass", "passfile", "/home/fleet/.pgpass"),
        ("target_session_attrs=read-write", "target_session_attrs", "read-write"),
        ("target_session_attrs=any&target_session_attrs=primary", "target_session_attrs", "primary"),
        ("krbsrvname=pg", "krbsrvname", "pg"),
        ("gsslib=gssapi", "gsslib", "gssapi"),
        ("service=iot", "service", "iot"),
    ],
)  # fmt: skip
def test_an_option_becomes_the_argument_that_means_the_same(query: str, argument: str, value: object) -> None:
    if argument not in inspect.signature(asyncpg.connect).parameters:
        pytest.skip(f"asyncpg {asyncpg.__version__} has no {argument}")
    assert sent_to_asyncpg(query)[argument] == value


def test_a_service_is_looked_up_by_asyncpg_which_does_so_only_with_a_dsn() -> None:
    if "service" not in inspect.signature(asyncpg.connect).parameters:
        pytest.skip(f"asyncpg {asyncpg.__version__} knows no services")
    assert sent_to_asyncpg("service=iot")["dsn"] == "postgresql://"
    assert sent_to_asyncpg("service=iot&sslmode=require")["dsn"] == "postgresql://?sslmode=require"


def test_who_and_what_may_stand_in_the_options() -> None:
    sent = sent_to_asyncpg("user=fleet&password=hunter2&dbname=iot&host=db.example", "postgresql+asyncpg://")
    assert {name: sent[name] for name in ("user", "password", "database", "host")} == {
        "user": "fleet",
        "password": "hunter2",
        "database": "iot",
        "host": "db.example",
    }


def test_hosts_with_empty_addresses_are_hosts() -> None:
    sent = sent_to_asyncpg("host=a,b&port=1,2&hostaddr=,", "postgresql+asyncpg://fleet@/iot")
    assert (sent["host"], sent["port"]) == (["a", "b"], [1, 2])


def test_settings_of_the_server_come_from_the_url_then_from_connect_args() -> None:
    query = (
        "application_name=fleet&fallback_application_name=app&options=-c%20work_mem%3D5MB%20--statement-timeout%3D5s"
    )
    settings = sent_to_asyncpg(query, server_settings={"work_mem": "6MB"})["server_settings"]

    assert settings["application_name"] == "fleet"
    assert (settings["work_mem"], settings["statement_timeout"], settings["lock_timeout"]) == ("6MB", "5s", "10000")
    assert sent_to_asyncpg("fallback_application_name=app")["server_settings"]["application_name"] == "app"


@pytest.mark.parametrize(
    "query",
    [
        "channel_binding=prefer&gssencmode=disable&sslnegotiation=postgres&sslcompression=0&sslsni=1",
        "client_encoding=utf8&keepalives=1&load_balance_hosts=disable&replication=false&sslcertmode=allow",
        "min_protocol_version=3.0&max_protocol_version=latest&gssdelegation=0",
    ],
)
def test_an_option_that_asks_for_what_asyncpg_does_anyway_is_accepted(query: str) -> None:
    assert sent_to_asyncpg(query).keys() == {"host", "port", "user", "password", "database", "server_settings"}


@pytest.mark.parametrize(
    "option",
    [
        "channel_binding=require",
        "gssencmode=require",
        "hostaddr=192.0.2.1",
        "keepalives_idle=30",
        "load_balance_hosts=random",
        "min_protocol_version=3.2",
        "replication=database",
        "require_auth=scram-sha-256",
        "requirepeer=postgres",
        "sslcertmode=require",
        "sslnegotiation=hunter2",
        "tcp_user_timeout=1000",
        "nosuch=hunter2",
        # What asyncpg.connect takes, and no URL can hold.
        "loop=1",
        "connection_class=1",
        "dsn=postgresql://elsewhere",
    ],
)
def test_an_option_that_asyncpg_cannot_do_is_refused_by_name(option: str) -> None:
    name = option.partition("=")[0]
    with pytest.raises(
        ValueError, match=rf"asyncpg cannot do .* with {name}: leave it out, or use postgresql\+psycopg"
    ) as caught:
        create_async_engine(f"{URL}?sslmode=require&{option}")
    assert "hunter2" not in str(caught.value)


def test_all_that_are_refused_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"with channel_binding, keepalives_idle: leave"):
        create_async_engine(f"{URL}?keepalives_idle=30&channel_binding=require&sslmode=require")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("connect_timeout=soon", "connect_timeout in the URL must be a number"),
        ("connect_timeout=2.5", "connect_timeout in the URL must be a number"),
        ("statement_cache_size=none", "statement_cache_size in the URL must be a number"),
        ("sslrootcert=system&sslmode=require", r"sslrootcert=system goes with sslmode=verify-full"),
        ("sslrootcert=system&sslcert=c", r"pass an SSLContext as `ssl` in connect_args"),
    ],
)
def test_a_value_that_makes_no_sense_is_an_error_that_says_so(query: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_async_engine(f"{URL}?{query}")


def test_an_older_asyncpg_knows_fewer_options() -> None:
    of_0_29 = {"dsn", "host", "port", "user", "password", "passfile", "database", "timeout", "ssl", "server_settings"}
    with pytest.raises(ValueError, match="with krbsrvname, service"):
        connect_arguments(make_url(f"{URL}?service=a&krbsrvname=b&passfile=c"), of_0_29)


@pytest.mark.parametrize("option", sorted({one.keyword.decode() for one in Conninfo.get_defaults()} - SQLALCHEMYS))
def test_every_option_of_libpq_is_either_understood_or_refused_by_name(option: str) -> None:
    """Also those of a future libpq."""
    for value in ("1", "prefer"):
        try:
            sent_to_asyncpg(f"{option}={value}")
        except ValueError as error:
            assert option in str(error)  # noqa: PT017 - or there is no error


# With a server.


@in_event_loop
async def test_the_server_has_the_settings_of_the_url(server: PostgresServer) -> None:
    url = make_url(server.url).set(drivername="postgresql+asyncpg")
    query = {
        "options": "-c work_mem=5MB",
        "application_name": "fleet",
        "connect_timeout": "10",
        "target_session_attrs": "read-write",
        "sslmode": "prefer",
    }
    async with async_engine(url.update_query_dict(query)) as engine, engine.connect() as connection:
        shown = [await connection.scalar(text(f"SHOW {name}")) for name in ("work_mem", "application_name")]
    assert shown == ["5MB", "fleet"]


@contextmanager
def server_without_tls() -> Iterator[tuple[int, list[bytes]]]:
    """A port, and what clients say first there. Asked for TLS, it says no, as PostgreSQL does."""
    said: list[bytes] = []

    def answer() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                said.append(client.recv(8))
                client.sendall(b"N")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield listener.getsockname()[1], said
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(
    ("sslmode", "message"), [("require", "rejected SSL upgrade"), ("disable", "connection was closed|unexpected")]
)
@in_event_loop
async def test_sslmode_decides_whether_tls_is_asked_for_and_insisted_on(sslmode: str, message: str) -> None:
    asks_for_tls = b"\x00\x00\x00\x08\x04\xd2\x16\x2f"
    with server_without_tls() as (port, said):
        url = f"postgresql+asyncpg://fleet@127.0.0.1:{port}/iot?sslmode={sslmode}&connect_timeout=10"
        async with async_engine(make_url(url)) as engine:
            with pytest.raises((OSError, DBAPIError, asyncpg.PostgresError), match=message):
                await engine.connect()
    assert (said[0] == asks_for_tls) is (sslmode == "require")
    assert len(said) == 1


@in_event_loop
async def test_the_file_of_certificates_is_read(tmp_path: Path) -> None:
    missing = tmp_path / "ca.pem"
    with server_without_tls() as (port, said):
        url = f"postgresql+asyncpg://fleet@127.0.0.1:{port}/iot?sslmode=verify-full&sslrootcert={missing}"
        async with async_engine(make_url(url)) as engine:
            with pytest.raises((OSError, asyncpg.InterfaceError), match=r"No such file|does not exist"):
                await engine.connect()
    assert not said
