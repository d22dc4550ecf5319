"""The history: what each revision adds, what its downgrade removes, and what every revision has to contain."""

from __future__ import annotations

import ast
import shutil
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import create_engine

from iot_models import migrate
from iot_models._migrations import history
from iot_models.models import Base
from tests.databases import partitioned
from tests.databases.alembic_runs import CHECKOUT, config, downgrade, upgrade
from tests.databases.schema_dump import dump
from tests.migrations.raw_sql import ADD_SHADOW, RAW_075, RAW_076, revision_of, run_sql, tables_of
from tests.migrations.revisions import FILES, HEAD, REVISIONS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.repeats


@pytest.fixture
def raw_075(make_empty: Callable[[], str]) -> str:
    """The table before shadows, made by raw SQL, without devices."""
    url = make_empty()
    run_sql(url, RAW_075)
    return url


# The schemas.


@partitioned.needs_one_piece("the schema is that of a plain one")
def test_revision_075_makes_the_deployment_that_raw_sql_made(empty: str, raw_075: str) -> None:
    upgrade(empty, "075")

    assert "CREATE TABLE public.device_state" in dump(empty)
    assert dump(empty) == dump(raw_075)


@partitioned.needs_one_piece("the schema is that of a plain one")
def test_revision_076_makes_the_schema_that_raw_sql_makes(empty: str, raw_075: str) -> None:
    verified = run_sql(raw_075, ADD_SHADOW)
    upgrade(empty, "076")

    assert len(verified) == 5
    assert "idx_device_state_shadow_pending" in dump(empty)
    assert dump(empty) == dump(raw_075)


@partitioned.needs_one_piece("the schema is that of a plain one")
def test_empty_raw_and_made_by_the_models_end_at_head_in_one_schema(make_empty: Callable[[], str]) -> None:
    empty, raw, made = make_empty(), make_empty(), make_empty()
    upgrade(empty)
    run_sql(raw, RAW_076)
    upgrade(raw)
    engine = create_engine(made)
    Base.metadata.create_all(engine)
    engine.dispose()

    assert "idx_device_state_shadow_pending_device" in dump(empty)
    assert dump(empty) == dump(raw) == dump(made)


def test_alembic_sees_no_difference_between_the_models_and_the_migrated_schema(migrated_url: str) -> None:
    command.check(config(migrated_url))


def test_an_upgrade_keeps_every_row_and_gives_it_an_empty_shadow(raw_075: str) -> None:
    upgrade(raw_075, "075")
    run_sql(
        raw_075,
        "INSERT INTO device_state (tenant_id, site_id, device_id, state) VALUES ('acme', 's', 'd', '{\"t\": 21.50}')",
    )

    upgrade(raw_075, "076")

    (row,) = run_sql(
        raw_075,
        "SELECT state, desired_state, reported_state, desired_version, reported_version, shadow_updated_at FROM device_state",
    )
    assert row == ({"t": 21.5}, {}, {}, 0, 0, None)


def test_each_downgrade_leaves_exactly_what_was_there_before(empty: str) -> None:
    dumps = {"base": dump(empty)}
    for revision in REVISIONS:
        upgrade(empty, revision)
        dumps[revision] = dump(empty)

    # One revision at a time, down to the first one.
    for after, before in pairwise(REVISIONS[::-1]):
        downgrade(empty, before)
        assert dump(empty) == dumps[before], f"{after} -> {before}"
    # Several at once, and up again.
    upgrade(empty, HEAD)
    downgrade(empty, "075")
    assert dump(empty) == dumps["075"]
    upgrade(empty, "076")
    assert dump(empty) == dumps["076"]
    downgrade(empty, "base")
    assert dump(empty) == dumps["base"]
    upgrade(empty, "head")
    assert dump(empty) == dumps[HEAD]


# ADDS.

COLUMNS = """
    SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, pg_get_expr(d.adbin, d.adrelid)
      FROM pg_attribute a LEFT JOIN pg_attrdef d ON (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
     WHERE a.attrelid = to_regclass('{table}') AND a.attnum > 0 AND NOT a.attisdropped
"""
INDEXES = """
    SELECT c.relname, regexp_replace(pg_get_indexdef(c.oid), '^.* USING ', '')
      FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
     WHERE i.indrelid = to_regclass('{table}') AND NOT i.indisprimary
"""


def columns_and_indexes(url: str) -> dict[tuple[str, str, str], object]:
    """The definitions by table, kind and name, as a revision declares them."""
    return {
        **{
            (table, "columns", name): tuple(definition)
            for table in tables_of(url) - {"alembic_version_iot_models"}
            for name, *definition in run_sql(url, COLUMNS.format(table=table))
        },
        **{
            (table, "indexes", name): definition
            for table in tables_of(url) - {"alembic_version_iot_models"}
            for name, definition in run_sql(url, INDEXES.format(table=table))
        },
    }


def test_each_revision_declares_the_columns_and_indexes_that_it_adds(empty: str) -> None:
    """An upgrade compares with the database what the revisions declare, and nothing else."""
    scripts = ScriptDirectory.from_config(config(empty))
    before: dict[tuple[str, str, str], object] = {}
    for revision in REVISIONS:
        upgrade(empty, revision)
        now = columns_and_indexes(empty)

        declared = {
            (table, kind, name): definition
            for table, kinds in getattr(scripts.get_revision(revision).module, "ADDS", {}).items()
            for kind, names in kinds.items()
            for name, definition in names.items()
        }
        assert declared == {item: now[item] for item in now.keys() - before.keys()}, revision
        before = now


LATER = """
from alembic import op

revision = "{revision}"
down_revision = "{head}"

ADDS = {{
    "device_state": {{
        "columns": {{"to_come": ("text", False, None)}},
        "indexes": {{"idx_device_state_to_come": "btree (tenant_id, to_come)"}},
    }}
}}


def upgrade():
    op.iot_models_expect_table("device_state", added_since=revision)
    op.iot_models_lock_table("device_state", "ACCESS EXCLUSIVE")
    op.execute("ALTER TABLE device_state ADD COLUMN IF NOT EXISTS to_come TEXT")
    with op.get_context().autocommit_block():
        for name, definition in ADDS["device_state"]["indexes"].items():
            op.iot_models_ensure_index("device_state", name, definition)


def downgrade():
    op.iot_models_lock_table("device_state", "ACCESS EXCLUSIVE")
    op.execute("ALTER TABLE device_state DROP COLUMN IF EXISTS to_come")
"""


@pytest.fixture
def one_revision_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A copy of the history with one more revision, as an example of a future one."""
    folder = tmp_path / "alembic"
    shutil.copytree(CHECKOUT / "alembic", folder)
    revision = f"{int(HEAD) + 1:03}"
    (folder / "versions" / f"{revision}_coming.py").write_text(LATER.format(revision=revision, head=HEAD))
    monkeypatch.setattr(history, "FOLDER", folder)
    return revision


@pytest.fixture
def at_075(make_empty: Callable[[], str]) -> str:
    """A database that was migrated before the new revision existed."""
    url = make_empty()
    upgrade(url, "075")
    return url


def test_what_would_stop_a_new_revision_is_refused_by_the_first_one_that_runs(
    raw_fleet: str, at_075: str, one_revision_more: str
) -> None:
    strange = """
        ALTER TABLE device_state ADD to_come varchar(9);
        CREATE INDEX idx_device_state_to_come ON device_state (to_come);
    """
    for url in (raw_fleet, at_075):
        run_sql(url, strange)
        before = dump(url), tables_of(url)

        with pytest.raises(CommandError) as caught:
            migrate.upgrade(url)
        assert "column to_come is character varying(9): expected text\n" in str(caught.value)
        assert "index idx_device_state_to_come is btree (to_come): expected btree (tenant_id, to_come)\n" in str(
            caught.value
        )
        assert (dump(url), tables_of(url)) == before

        run_sql(url, "DROP INDEX idx_device_state_to_come; ALTER TABLE device_state ALTER to_come TYPE text")
        migrate.upgrade(url)
        assert revision_of(url) == one_revision_more


# The folder.


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_a_revision_makes_sure_of_its_promises_before_it_does_anything(file: Path) -> None:
    first = {
        node.name: ast.unparse(node.body[0])
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name in {"upgrade", "downgrade"}
    }
    assert first == {"upgrade": "begin()", "downgrade": "begin()"}


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_a_revision_imports_nothing_from_the_package(file: Path) -> None:
    imported = {
        name
        for node in ast.walk(ast.parse(file.read_text()))
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip

    assert not [name for name in imported if name.split(".")[0] == "iot_models"]


def test_the_alembic_folder_is_no_package_because_that_would_hide_the_library() -> None:
    assert not (CHECKOUT / "alembic" / "__init__.py").exists()


def test_the_revisions_form_one_line_in_the_order_of_their_file_names(migrated_url: str) -> None:
    scripts = [*ScriptDirectory.from_config(config(migrated_url)).walk_revisions()][::-1]

    assert [script.revision for script in scripts] == REVISIONS
    assert [script.down_revision for script in scripts] == [None, *REVISIONS[:-1]]
    assert revision_of(migrated_url) == HEAD


def test_no_revision_that_teams_may_have_run_was_removed() -> None:
    assert [path.name for path in FILES][:3] == ["075_baseline.py", "076_device_shadow.py", "077_pending_by_device.py"]
