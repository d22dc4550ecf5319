"""Whatever libpq's variables in the environment say: the server that is reached is the one that was started.

Another server stands by, where the variables point. It must see no connection.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sqlalchemy
from psycopg.pq import Conninfo
from sqlalchemy import NullPool, text

import iot_models.engine
from iot_models.testing import NoServerError, database, postgres_server, servers, throwaway
from iot_models.testing.throwaway import Server, postgres

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Each with a value that leads to the other server, asks for what the throwaway server has not, or makes no sense. "@"
# stands for the other server's port.
VARIABLES = {
    "PGAPPNAME": "elsewhere",
    "PGCHANNELBINDING": "require",
    "PGCLIENTENCODING": "SQL_ASCII",
    "PGCONNECT_TIMEOUT": "soon",
    "PGDATABASE": "elsewhere",
    "PGDATESTYLE": "German",
    "PGGEQO": "off",
    "PGGSSDELEGATION": "1",
    "PGGSSENCMODE": "require",
    "PGGSSLIB": "gssapi",
    "PGHOST": "127.0.0.1",
    "PGHOSTADDR": "127.0.0.1",
    "PGKRBSRVNAME": "elsewhere",
    "PGLOADBALANCEHOSTS": "perhaps",
    "PGMAXPROTOCOLVERSION": "2.0",
    "PGMINPROTOCOLVERSION": "9.9",
    "PGOPTIONS": "-c search_path=elsewhere",
    "PGPASSFILE": "/nonexistent",
    "PGPASSWORD": "elsewhere",
    "PGPORT": "@",
    "PGREQUIREAUTH": "scram-sha-256",
    "PGREQUIREPEER": "elsewhere",
    "PGREQUIRESSL": "1",
    "PGSERVICE": "elsewhere",
    "PGSERVICEFILE": "/nonexistent",
    "PGSSLCERT": "/nonexistent",
    "PGSSLCERTMODE": "require",
    "PGSSLCOMPRESSION": "1",
    "PGSSLCRL": "/nonexistent",
    "PGSSLCRLDIR": "/nonexistent",
    "PGSSLKEY": "/nonexistent",
    "PGSSLMAXPROTOCOLVERSION": "TLSv1.1",
    "PGSSLMINPROTOCOLVERSION": "never",
    "PGSSLMODE": "verify-full",
    "PGSSLNEGOTIATION": "direct",
    "PGSSLROOTCERT": "system",
    "PGSSLSNI": "1",
    "PGSYSCONFDIR": "/nonexistent",
    "PGTARGETSESSIONATTRS": "standby",
    "PGTZ": "Asia/Seoul",
    "PGUSER": "elsewhere",
}
# Those that most need an answer. What costs much is tried with these only.
HARDEST = ("PGCLIENTENCODING", "PGHOSTADDR", "PGREQUIREAUTH", "PGSERVICE", "PGSSLMODE", "PGTARGETSESSIONATTRS")
# What this libpq does not know, it ignores.
WITHOUT_THE_OPTION = VARIABLES.keys() - {o.envvar.decode() for o in Conninfo.get_defaults() if o.envvar} - {
    "PGDATESTYLE", "PGGEQO", "PGREQUIRESSL", "PGSERVICEFILE", "PGSYSCONFDIR", "PGTZ",
}  # fmt: skip
SERVICE = """
[elsewhere]
hostaddr=%
host=elsewhere
port=@
user=elsewhere
dbname=elsewhere
password=elsewhere
channel_binding=require
client_encoding=SQL_ASCII
connect_timeout=soon
gssencmode=require
replication=true
requirepeer=elsewhere
ssl_max_protocol_version=TLSv1.1
ssl_min_protocol_version=never
sslmode=verify-full
sslrootcert=/nonexistent
target_session_attrs=standby
"""


@pytest.fixture(scope="module")
def port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


class Elsewhere:
    """A server that stands by, on TCP, at the port that the throwaway server of this file has as well."""

    def __init__(self, server: Server) -> None:
        self._log = server.folder.parent / "log"

    def connections(self) -> int:
        """How many there were. The server writes it down when it accepts a connection, before it answers."""
        return self._log.read_text().count("connection received")


@pytest.fixture(scope="module")
def elsewhere(port: str) -> Iterator[Elsewhere]:
    settings = {"listen_addresses": "127.0.0.1", "port": port, "log_connections": "on"}
    with postgres(settings=settings) as server:
        yield Elsewhere(server)


@pytest.fixture(scope="module")
def started(port: str) -> Iterator[Server]:
    """The server that has to be reached."""
    with postgres(settings={"port": port}) as server:
        yield server


@pytest.fixture(autouse=True)
def _nothing_else_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "DOCKER_HOST", "IOT_MODELS_TEST_DATABASE_URL", "IOT_MODELS_TEST_IMAGE"):
        monkeypatch.delenv(name, raising=False)


def set_variable(name: str, port: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, VARIABLES[name].replace("@", port))
    if name == "PGSERVICE":
        (folder / "services").write_text(SERVICE.replace("@", port).replace("%", VARIABLES["PGHOSTADDR"]))
        monkeypatch.setenv("PGSERVICEFILE", str(folder / "services"))


def ask(url: str, question: str) -> object:
    """The answer that SQLAlchemy's own engine gets. Ours must get the same."""
    answers = []
    for create_engine in (sqlalchemy.create_engine, iot_models.engine.create_engine):
        with create_engine(url, poolclass=NullPool).connect() as connection:
            answers.append(connection.scalar(text(question)))
    assert answers[0] == answers[1]
    return answers[0]


def test_no_variable_of_libpq_is_forgotten_here() -> None:
    known = {option.envvar.decode() for option in Conninfo.get_defaults() if option.envvar}
    assert known <= VARIABLES.keys()


@pytest.mark.repeats
@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_of_libpq_leads_no_client_to_another_server(
    name: str, started: Server, elsewhere: Elsewhere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = elsewhere.connections()
    set_variable(name, started.port, tmp_path, monkeypatch)

    assert ask(started.url, "SHOW unix_socket_directories") == str(started.folder)
    assert ask(started.url, "SELECT current_user || current_database()") == "postgrespostgres"
    assert elsewhere.connections() == before

    if name in WITHOUT_THE_OPTION:
        return  # it is for the older libpq of psycopg, and psql has a newer one
    url = started.url.replace("+psycopg", "")
    shown = subprocess.run(
        [started.bin / "psql", "-XAt", "-d", url, "-c", "SHOW unix_socket_directories"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (shown.stdout.strip(), shown.stderr) == (str(started.folder), "")
    if name in HARDEST:
        subprocess.run([started.bin / "pg_dump", "-d", url], check=True, stdout=subprocess.DEVNULL)

    assert elsewhere.connections() == before


def test_without_psycopg_the_url_is_for_psql(started: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGREQUIREAUTH", "PGMINPROTOCOLVERSION"):
        monkeypatch.setenv(name, VARIABLES[name])
    monkeypatch.setitem(sys.modules, "psycopg.pq", None)  # as an import finds it that fails

    assert started.url.endswith("&min_protocol_version=3.0&require_auth=none")


@pytest.fixture
def started_by_postgres_server(started: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """`postgres_server` starts no other server: that takes a second for each test."""

    @contextmanager
    def postgres() -> Iterator[Server]:
        yield started

    monkeypatch.setattr(throwaway, "postgres", postgres)


@pytest.mark.repeats
@pytest.mark.usefixtures("started_by_postgres_server")
@pytest.mark.parametrize("name", HARDEST)
def test_databases_are_made_and_dropped_on_the_server_that_was_started(
    name: str, port: str, elsewhere: Elsewhere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = elsewhere.connections()
    set_variable(name, port, tmp_path, monkeypatch)

    with postgres_server() as server, database(server) as url, database(server, url) as copy:
        assert "throwaway" in server.description
        assert ask(url, "SHOW listen_addresses") == ask(copy, "SHOW listen_addresses") == ""
        assert str(ask(copy, "SELECT current_database()")).startswith("iot_models_test_")

    assert elsewhere.connections() == before


@pytest.mark.usefixtures("started_by_postgres_server")
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("PGSERVICE", "nosuch", 'definition of service "nosuch" not found'),
        ("PGOPTIONS", "-c nosuch=1", 'unrecognized configuration parameter "nosuch"'),
        ("PGDATESTYLE", "nosuch", 'invalid value for parameter "DateStyle": "nosuch"'),
        ("PGTZ", "nosuch", 'invalid value for parameter "TimeZone": "nosuch"'),
        ("PGGEQO", "nosuch", 'parameter "geqo" requires a Boolean value'),
    ],
)
def test_a_variable_with_which_no_client_can_connect_is_named_before_anything_is_made(
    name: str, value: str, said: str, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = elsewhere.connections()
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("PGPASSWORD", "hunter2")

    with pytest.raises(NoServerError) as caught, postgres_server():
        pass

    message = str(caught.value)
    named = ", ".join(sorted({name, "PGPASSWORD"}))
    assert f"with libpq's variables in the environment ({named}): " in message
    assert said in message
    assert "hunter2" not in message
    assert elsewhere.connections() == before


# A container's server listens on TCP and asks for a password.


@pytest.fixture(scope="module")
def container_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], str]]:
    """Gives the URL of a server as it is in a container: its host has the address 127.0.0.1, its password is "kept"."""
    tmp_path_factory.getbasetemp()
    with tempfile.TemporaryDirectory(dir="/tmp") as name, socket.create_server(("127.0.0.1", 0)) as free:
        Path(name).chmod(0o755)
        rules = Path(name) / "hba"
        rules.write_text("local all all trust\nhost all all all scram-sha-256\n")
        port = str(free.getsockname()[1])
        free.close()
        settings = {"listen_addresses": "127.0.0.1", "port": port, "hba_file": str(rules)}
        with postgres(settings=settings) as server:
            with sqlalchemy.create_engine(server.url, poolclass=NullPool).begin() as connection:
                connection.execute(text("ALTER ROLE postgres PASSWORD 'kept'"))

            def url() -> str:
                made = servers._container_url("localhost", port, "kept")  # noqa: SLF001 - there is no Docker here
                return made.render_as_string(hide_password=False)

            yield url


@pytest.mark.parametrize("name", HARDEST)
def test_a_container_is_reached_whatever_the_variables_say(
    name: str, container_url: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VARIABLES, "PGHOSTADDR", "127.0.0.2")
    monkeypatch.setitem(VARIABLES, "PGREQUIREAUTH", "none")
    set_variable(name, "1", tmp_path, monkeypatch)

    assert ask(container_url(), "SHOW listen_addresses") == "127.0.0.1"


def test_without_such_a_variable_the_url_of_a_container_is_an_ordinary_one(container_url: Callable[[], str]) -> None:
    url = sqlalchemy.make_url(container_url())
    assert (url.host, url.username, url.database, url.query) == ("localhost", "postgres", "postgres", {})
    assert url.port


# A server whose URL somebody else wrote: nothing can be added to it, so a variable that changes its meaning is refused.


@pytest.mark.parametrize("name", ["PGHOSTADDR", "PGSERVICE"])
def test_an_address_in_the_environment_does_not_replace_the_host_of_a_given_url(
    name: str, started: Server, port: str, elsewhere: Elsewhere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = elsewhere.connections()
    monkeypatch.setenv("IOT_MODELS_TEST_DATABASE_URL", started.url)
    with postgres_server() as server:
        set_variable(name, port, tmp_path, monkeypatch)
        told = r"PGHOSTADDR, or by the service in PGSERVICE \(127\.0\.0\.1\), .* hostaddr=.* to the URL"
        with pytest.raises(NoServerError, match=told), database(server):
            pass
        with pytest.raises(NoServerError, match=f"^IOT_MODELS_TEST_DATABASE_URL: .*{told}"), postgres_server():
            pass
    assert elsewhere.connections() == before


@pytest.mark.repeats
def test_a_given_url_without_a_host_leaves_the_server_to_the_environment(
    started: Server, port: str, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = elsewhere.connections()
    monkeypatch.setenv("IOT_MODELS_TEST_DATABASE_URL", f"postgresql://postgres@/postgres?port={port}")
    monkeypatch.setenv("PGHOST", str(started.folder))
    with postgres_server() as server, database(server) as url:
        assert ask(url, "SHOW unix_socket_directories") == str(started.folder)
    assert elsewhere.connections() == before

    monkeypatch.setenv("PGHOSTADDR", "127.0.0.1")  # asked for by the one who wrote neither host nor address
    with postgres_server() as server, database(server) as url:
        assert ask(url, "SHOW listen_addresses") == "127.0.0.1"


@pytest.mark.usefixtures("elsewhere")
def test_a_given_url_with_an_address_of_its_own_is_used_as_it_is(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOSTADDR", "192.0.2.1")
    with_address = f"postgresql://postgres@elsewhere.invalid:{port}/postgres?hostaddr=127.0.0.1"
    monkeypatch.setenv("IOT_MODELS_TEST_DATABASE_URL", with_address)
    with postgres_server() as server, database(server) as url:
        assert ask(url, "SHOW listen_addresses") == "127.0.0.1"
