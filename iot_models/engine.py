"""Database URLs: where they come from and what they mean."""

from __future__ import annotations

import os

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

URL_VARIABLES = ("IOT_MODELS_DATABASE_URL", "DATABASE_URL")


def normalize_url(url: str | URL) -> URL:
    """The URL with psycopg 3 as its driver where it names none (`postgres://`, `postgresql://`).

    A URL that names a driver keeps it.

    Example:
        >>> str(normalize_url("postgres://iot@db/iotcloud"))
        'postgresql+psycopg://iot@db/iotcloud'

    Raises:
        ValueError: If it is no URL, or of another database than PostgreSQL. The message hides the password.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:  # ValueError: a port that is no number
        # Not the URL itself: what cannot be parsed cannot be masked, and it may hold a password.
        raise ValueError("not a database URL: write it as postgresql://user:password@host:5432/database") from error
    if parsed.drivername in {"postgres", "postgresql"}:
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() != "postgresql":
        raise ValueError(f"iot_models works on PostgreSQL; {parsed.render_as_string()} names {parsed.drivername!r}")
    return parsed


def database_url(explicit: str | None = None, *, fallback: str | None = None) -> URL:
    """The URL to use: `explicit`, else `IOT_MODELS_DATABASE_URL`, else `DATABASE_URL`, else `fallback`.

    Empty values count as absent.

    Raises:
        ValueError: If there is none (the message lists the ways to give one), or it is not a PostgreSQL URL.
    """
    candidates = (explicit, *(os.environ.get(name) for name in URL_VARIABLES), fallback)
    for candidate in candidates:
        if candidate:
            return normalize_url(candidate)
    raise ValueError(
        "no database URL: set IOT_MODELS_DATABASE_URL (or DATABASE_URL) to postgresql://user:password@host:5432/database"
    )
