"""The history: what each revision makes, and what its downgrade takes away."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

import pytest
from alembic import command
from alembic_runs import CHECKOUT, config, downgrade, upgrade
from raw_sql import RAW_075, RAW_076, run_sql, seed_sql
from schema_dump import dump
from sqlalchemy import create_engine, text

from iot_models.models import Base

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

REVISIONS = sorted((CHECKOUT / "alembic" / "versions").glob("*.py"))


@pytest.fixture
def raw_075(new_database: Callable[[], str]) -> str:
    url = new_database()
    run_sql(url, RAW_075)
    return url


def test_revision_075_makes_the_deployment_that_raw_sql_made(new_database: Callable[[], str], raw_075: str) -> None:
    url = new_database()
    upgrade(url, "075")

    assert "CREATE TABLE public.device_state" in dump(url)
    assert dump(url) == dump(raw_075)


def test_revision_076_makes_the_schema_that_the_seeds_raw_sql_makes(
    new_database: Callable[[], str], raw_075: str
) -> None:
    verified = run_sql(raw_075, seed_sql())
    url = new_database()
    upgrade(url, "076")

    assert len(verified) == 5
    assert "idx_device_state_shadow_pending" in dump(url)
    assert dump(url) == dump(raw_075)


def test_empty_raw_and_made_by_the_models_end_at_head_in_one_schema(new_database: Callable[[], str]) -> None:
    empty, raw, made = new_database(), new_database(), new_database()
    upgrade(empty)
    run_sql(raw, RAW_076)
    upgrade(raw)
    engine = create_engine(made)
    Base.metadata.create_all(engine)
    engine.dispose()

    assert "idx_device_state_shadow_pending_device" in dump(empty)
    assert dump(empty) == dump(raw) == dump(made)


def test_each_downgrade_leaves_exactly_what_was_there_before(new_database: Callable[[], str]) -> None:
    url = new_database()
    dumps = {"base": dump(url)}
    for revision in ("075", "076", "077"):
        upgrade(url, revision)
        dumps[revision] = dump(url)

    for revision in ("076", "075"):
        downgrade(url, revision)
        assert dump(url) == dumps[revision]
    upgrade(url, "077")
    downgrade(url, "075")
    assert dump(url) == dumps["075"]
    upgrade(url, "076")
    assert dump(url) == dumps["076"]
    downgrade(url, "base")
    assert dump(url) == dumps["base"]
    upgrade(url, "head")
    assert dump(url) == dumps["077"]


def test_an_upgrade_keeps_every_row_and_gives_it_an_empty_shadow(new_database: Callable[[], str]) -> None:
    url = new_database()
    upgrade(url, "075")
    run_sql(
        url,
        "INSERT INTO device_state (tenant_id, site_id, device_id, state) VALUES ('acme', 's', 'd', '{\"t\": 21.50}')",
    )

    upgrade(url, "076")

    (row,) = run_sql(
        url,
        "SELECT state, desired_state, reported_state, desired_version, reported_version, shadow_updated_at FROM device_state",
    )
    assert row == ({"t": 21.5}, {}, {}, 0, 0, None)  # fmt: skip


def test_alembic_sees_no_difference_between_the_models_and_the_migrated_schema(migrated_url: str) -> None:
    command.check(config(migrated_url))


@pytest.mark.parametrize("revision", REVISIONS, ids=lambda path: path.name)
def test_a_revision_imports_nothing_from_the_package(revision: Path) -> None:
    imported = {
        name
        for node in ast.walk(ast.parse(revision.read_text()))
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip

    assert not [name for name in imported if name.split(".")[0] == "iot_models"]


def test_the_alembic_folder_is_no_package_because_that_would_hide_the_library() -> None:
    assert not (CHECKOUT / "alembic" / "__init__.py").exists()


def test_the_first_line_of_the_history_is_075_and_its_head_is_077(migrated_url: str) -> None:
    engine = create_engine(migrated_url)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "077"
    engine.dispose()
    assert [path.name for path in REVISIONS] == ["075_baseline.py", "076_device_shadow.py", "077_pending_by_device.py"]
