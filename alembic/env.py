"""How Alembic reaches the database: the URL's sources, and one transaction for each revision."""

from __future__ import annotations

from logging.config import fileConfig

from alembic import context
from alembic.util import CommandError
from sqlalchemy import NullPool, create_engine
from sqlalchemy.exc import OperationalError

from iot_models.engine import database_url
from iot_models.models import Base

config = context.config
if config.config_file_name is not None:
    fileConfig(config.config_file_name, disable_existing_loggers=False)


def _run(**how: object) -> None:
    # A transaction for each revision: an interrupted upgrade keeps the revisions that were finished.
    context.configure(target_metadata=Base.metadata, transaction_per_migration=True, **how)  # type: ignore[arg-type]
    with context.begin_transaction():
        context.run_migrations()


def _run_online() -> None:
    try:
        url = database_url(
            context.get_x_argument(as_dictionary=True).get("url"), fallback=config.get_main_option("sqlalchemy.url")
        )
    except ValueError as error:
        raise CommandError(f"{error}, or pass -x url=...") from error
    engine = create_engine(url, poolclass=NullPool, connect_args={"application_name": "iot_models alembic"})
    try:
        connection = engine.connect()
    except OperationalError as error:
        raise CommandError(
            f"cannot reach {url.render_as_string()}: {str(error.orig).strip()}\n"
            "Start the server, or correct the URL (-x url=..., IOT_MODELS_DATABASE_URL, DATABASE_URL)."
        ) from error
    with connection:
        _run(connection=connection)


if context.is_offline_mode():
    # The SQL is for PostgreSQL whatever the URL: printing it needs none.
    _run(dialect_name="postgresql", literal_binds=True)
else:
    _run_online()
