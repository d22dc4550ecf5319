"""`alembic upgrade head` on a database that raw SQL made: one result, every row kept, no stamping by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from alembic.util import CommandError
from sqlalchemy import make_url

from tests.databases import partitioned
from tests.databases.alembic_runs import downgrade, run_alembic, upgrade
from tests.databases.schema_dump import dump
from tests.migrations.commands import alembic
from tests.migrations.raw_sql import (
    ADD_SHADOW,
    FLEET,
    RAW_075,
    RAW_076,
    SHADOWS,
    revision_of,
    rows_of,
    run_sql,
    tables_of,
)
from tests.migrations.revisions import TO_HEAD

if TYPE_CHECKING:
    from collections.abc import Callable

STARTS = {
    "075": RAW_075 + FLEET,
    "076": RAW_076 + ";" + FLEET + SHADOWS,
    "076 without its index and comments": RAW_075
    + "ALTER TABLE device_state ADD desired_state JSONB NOT NULL DEFAULT '{}', ADD reported_version INT NOT NULL DEFAULT 0;"
    + FLEET,
    "075 without an index": RAW_075 + "DROP INDEX idx_device_state_site;" + FLEET,
}


@pytest.fixture
def url(empty: str) -> str:
    """A database that each test fills by raw SQL."""
    return empty


@pytest.fixture(scope="module")
def head_dump(plain_migrated_url: str) -> str:
    """The schema in which every upgrade ends."""
    return dump(plain_migrated_url)


@pytest.mark.repeats
@pytest.mark.parametrize("start", STARTS)
@partitioned.needs_one_piece("the schema is that of a plain one")
def test_from_every_start_the_upgrade_ends_in_one_schema_and_keeps_every_row(
    url: str, head_dump: str, start: str
) -> None:
    run_sql(url, STARTS[start])
    columns = ", ".join(name for (name,) in run_sql(url, "SELECT attname FROM pg_attribute WHERE attrelid = 'device_state'::regclass AND attnum > 0 ORDER BY attnum"))  # fmt: skip
    before = rows_of(url, columns=columns)

    upgrade(url)

    after = dump(url)
    assert len(before) == 10
    assert rows_of(url, columns=columns) == before
    # Only the order of the columns may differ: a team may have added some of them before.
    assert sorted(after.replace(",\n", "\n").splitlines()) == sorted(head_dump.replace(",\n", "\n").splitlines())
    if start in {"075", "076"}:
        assert after == head_dump


@pytest.mark.repeats
def test_the_command_adopts_a_raw_deployment_and_changes_nothing_the_second_time(raw_fleet: str) -> None:
    first = run_alembic("upgrade", "head", DATABASE_URL=raw_fleet)
    second = alembic("upgrade", "head", DATABASE_URL=raw_fleet)

    assert first.returncode == 0, first.stderr
    assert TO_HEAD in first.stderr
    assert second.code == 0
    assert "Running" not in second.err


@pytest.mark.repeats
def test_what_a_team_added_to_the_table_is_not_changed(make_empty: Callable[[], str]) -> None:
    own = """
        ALTER TABLE device_state ADD own_column text DEFAULT 'v1', ADD CONSTRAINT known CHECK (status <> 'BROKEN');
        CREATE INDEX own_index ON device_state (last_seen_at);
        CREATE FUNCTION own_function() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
        CREATE TRIGGER own_trigger BEFORE UPDATE ON device_state FOR EACH ROW EXECUTE FUNCTION own_function();
        ALTER TABLE device_state ENABLE ROW LEVEL SECURITY;
        CREATE POLICY own_policy ON device_state USING (tenant_id = current_setting('app.tenant', true));
        COMMENT ON TABLE device_state IS 'ours';
    """
    url, plain = make_empty(), make_empty()
    run_sql(url, RAW_075 + own + FLEET)
    run_sql(plain, RAW_075 + own + FLEET + ADD_SHADOW)
    expected = dump(plain)

    upgrade(url, "076")
    assert dump(url) == expected

    upgrade(url)
    downgrade(url, "076")
    assert dump(url) == expected


# How a table made by raw SQL may differ, and what the refusal says.
DIFFERENCES = {
    "ALTER TABLE device_state DROP state": "column state is missing: expected jsonb NOT NULL DEFAULT '{}'::jsonb",
    "ALTER TABLE device_state ALTER site_id TYPE varchar(40)": "column site_id is character varying(40) NOT NULL: expected text NOT NULL",
    "ALTER TABLE device_state ALTER last_seen_at TYPE timestamp": "column last_seen_at is timestamp without time zone: expected timestamp with time zone",
    "ALTER TABLE device_state ALTER site_id DROP NOT NULL": "column site_id is text: expected text NOT NULL",
    "ALTER TABLE device_state ALTER last_seen_at SET NOT NULL": "column last_seen_at is timestamp with time zone NOT NULL: expected timestamp with time zone",
    "ALTER TABLE device_state ALTER status SET DEFAULT 'NEW'": "column status is text NOT NULL DEFAULT 'NEW'::text: expected text NOT NULL DEFAULT 'OFFLINE'::text",
    "ALTER TABLE device_state ADD desired_state json": "column desired_state is json: expected jsonb NOT NULL DEFAULT '{}'::jsonb",
    "ALTER TABLE device_state ADD desired_version bigint NOT NULL DEFAULT 0": "column desired_version is bigint NOT NULL DEFAULT 0: expected integer NOT NULL DEFAULT 0",
    "ALTER TABLE device_state DROP CONSTRAINT device_state_pkey, ADD PRIMARY KEY (device_id)": "the primary key is (device_id): expected (tenant_id, device_id)",
    "ALTER TABLE device_state DROP CONSTRAINT device_state_pkey": "the primary key is (): expected (tenant_id, device_id)",
    "DROP INDEX idx_device_state_site; CREATE INDEX idx_device_state_site ON device_state (site_id)": "index idx_device_state_site is btree (site_id): expected btree (tenant_id, site_id)",
    "CREATE INDEX idx_device_state_shadow_pending ON device_state (tenant_id)": "index idx_device_state_shadow_pending is btree (tenant_id): expected btree (tenant_id) WHERE (desired_version > reported_version)",
    "CREATE INDEX idx_device_state_shadow_pending_device ON device_state (tenant_id, device_id)": "index idx_device_state_shadow_pending_device is btree (tenant_id, device_id): expected btree (tenant_id, device_id) WHERE (desired_version > reported_version)",
    "CREATE TABLE other (a text); CREATE INDEX idx_device_state_shadow_pending ON other (a)": "the name of index idx_device_state_shadow_pending is taken by another table's",
    "ALTER TABLE device_state RENAME TO real; CREATE VIEW device_state AS SELECT * FROM real": "it is no table (pg_class.relkind is 'v', expected 'r', or 'p' for a partitioned one)",
}


@pytest.mark.repeats
@pytest.mark.parametrize("change", DIFFERENCES)
@partitioned.needs_one_piece("PostgreSQL does not do this to it")
def test_a_table_that_is_not_the_expected_one_is_refused_before_any_change(url: str, change: str) -> None:
    run_sql(url, RAW_075, change)
    before, tables = dump(url), tables_of(url)

    with pytest.raises(CommandError) as caught:
        upgrade(url)

    assert f"\n  - {DIFFERENCES[change]}\n" in str(caught.value)
    assert "nothing was changed" in str(caught.value)
    assert dump(url) == before
    assert tables_of(url) == tables  # no alembic_version_iot_models either


def test_every_difference_is_listed_at_once(url: str) -> None:
    run_sql(
        url,
        RAW_075,
        "ALTER TABLE device_state DROP state, ALTER site_id TYPE varchar, ALTER status DROP DEFAULT, ADD reported_state text",
    )

    run = alembic("upgrade", "head", DATABASE_URL=url)

    assert run.code != 0
    said = run.out + run.err
    for column in (
        "state is missing",
        "site_id is character varying",
        "status is text NOT NULL",
        "reported_state is text",
    ):
        assert f"  - column {column}" in said


@pytest.mark.repeats
@partitioned.needs_one_piece("the schema is that of a plain one")
def test_once_the_differences_are_corrected_the_same_command_succeeds(url: str, head_dump: str) -> None:
    run_sql(url, RAW_075, "ALTER TABLE device_state ALTER status DROP DEFAULT")
    with pytest.raises(CommandError):
        upgrade(url)

    run_sql(url, "ALTER TABLE device_state ALTER status SET DEFAULT 'OFFLINE'")
    upgrade(url)

    assert dump(url) == head_dump


def test_a_migrated_database_with_another_column_of_a_later_revision_is_refused_too(url: str) -> None:
    upgrade(url, "075")
    run_sql(url, "ALTER TABLE device_state ADD desired_state text")
    before = dump(url)

    with pytest.raises(CommandError, match="column desired_state is text: expected jsonb"):
        upgrade(url)
    assert dump(url) == before
    assert revision_of(url) == "075"


def test_a_migrated_database_with_another_index_of_a_later_revision_is_refused_until_it_is_renamed(
    url: str,
) -> None:
    upgrade(url, "076")
    run_sql(url, "CREATE INDEX idx_device_state_shadow_pending_device ON device_state (device_id)")
    before = dump(url)

    with pytest.raises(
        CommandError, match=r"index idx_device_state_shadow_pending_device is btree \(device_id\): expected btree"
    ):
        upgrade(url)
    assert dump(url) == before
    assert revision_of(url) == "076"

    run_sql(url, "ALTER INDEX idx_device_state_shadow_pending_device RENAME TO of_ours")
    before = dump(url)
    upgrade(url)
    assert "INDEX of_ours ON public.device_state" in dump(url)
    downgrade(url, "076")
    assert dump(url) == before


@pytest.mark.repeats
@pytest.mark.parametrize("set_at", ["076", "077"])
def test_upgrade_and_downgrade_keep_a_fillfactor_that_a_team_set(url: str, set_at: str) -> None:
    upgrade(url, set_at)
    run_sql(url, "ALTER TABLE device_state SET (fillfactor = 95, autovacuum_vacuum_scale_factor = 0.01)")

    upgrade(url)
    assert "fillfactor='95', autovacuum_vacuum_scale_factor='0.01'" in dump(url)
    downgrade(url, "076")
    assert "fillfactor='95', autovacuum_vacuum_scale_factor='0.01'" in dump(url)


def test_upgrade_and_downgrade_keep_other_storage_settings_of_a_team(url: str) -> None:
    upgrade(url, "076")
    run_sql(url, "ALTER TABLE device_state SET (autovacuum_vacuum_scale_factor = 0.01)")
    before = dump(url)

    upgrade(url)
    assert "autovacuum_vacuum_scale_factor='0.01', fillfactor='75'" in dump(url)
    downgrade(url, "076")
    assert dump(url) == before


@partitioned.needs_one_piece("the schema is that of a plain one")
def test_the_table_may_live_in_a_schema_of_the_search_path(url: str) -> None:
    run_sql(url, "CREATE SCHEMA app; SET search_path = app;" + RAW_075 + FLEET)
    run_sql(url, f"ALTER DATABASE {make_url(url).database} SET search_path = app, public")

    upgrade(url)

    assert "CREATE INDEX idx_device_state_shadow_pending ON app.device_state" in dump(url)
