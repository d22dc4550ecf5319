"""All desired versions of a tenant, one page after the other, for whoever keeps a search index, a cache or an audit."""

from __future__ import annotations

import base64
import json
import logging
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from iot_models import ChangePage, CursorExpired, DeviceNotFound, InvalidCursor, IotModelsError, ShadowService
from iot_models._core import change_cursors
from tests.databases.devices import TENANT, add_device
from tests.databases.statements import counted_statements
from tests.generated.documents import values
from tests.generated.examples import with_a_database

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

    from iot_models import DesiredVersion

DEVICES = ["d1", "d2", "d3"]
NOW = timedelta(0)


@pytest.fixture
def fleet(own_engine: Engine) -> Engine:
    with Session(own_engine) as session, session.begin():
        for device_id in DEVICES:
            add_device(session, device_id)
            add_device(session, device_id, tenant_id="globex")
    return own_engine


def write(engine: Engine, *devices: str, tenant_id: str = TENANT) -> None:
    """A transaction that writes to these devices."""
    with Session(engine) as session, session.begin():
        for device_id in devices:
            ShadowService(session, tenant_id, actor="anna").patch_desired(device_id, {}, reason="why")


def settle(engine: Engine) -> None:
    """Wait until nothing is held back any more: tests beside this one have transactions of their own on the server."""
    with engine.connect() as connection:
        until = time.monotonic() + 60
        while not connection.scalar(text("""
            SELECT NOT EXISTS (SELECT FROM device_shadow_history
                                WHERE transaction_id < pg_snapshot_xmax(pg_current_snapshot())::text::bigint
                                  AND transaction_id >= pg_snapshot_xmin(pg_current_snapshot())::text::bigint)
        """)):  # fmt: skip
            connection.rollback()
            assert time.monotonic() < until
            time.sleep(0.01)


def page(engine: Engine, after: str | None = None, limit: int = 1000, *, settled: bool = True) -> ChangePage:
    if settled:
        settle(engine)
    with Session(engine) as session:
        return ShadowService(session, TENANT).changes(after=after, limit=limit)


def listed(engine: Engine, after: str | None = None, limit: int = 1000) -> tuple[list[DesiredVersion], str]:
    """All that is there, page by page."""
    found: list[DesiredVersion] = []
    while (one := page(engine, after, limit)).changes:
        assert len(one.changes) <= limit
        found += one.changes
        after = one.cursor
    return found, one.cursor


def told(changes: list[DesiredVersion]) -> list[tuple[str, int]]:
    return [(change.device_id, change.version) for change in changes]


def prune(engine: Engine, keep: int = 1, older_than: timedelta = NOW) -> int:
    with Session(engine) as session, session.begin():
        return ShadowService(session, TENANT).prune_history(older_than=older_than, keep=keep)


def sql(engine: Engine, statement: str) -> None:
    with engine.begin() as connection:
        connection.execute(text(statement))


# The order.


def test_a_tenant_without_a_version_has_no_changes_and_a_cursor_that_has_all_that_come(fleet: Engine) -> None:
    first = page(fleet)
    assert (first.changes, first.held_back_since) == ([], None)
    write(fleet, "d1")
    assert told(page(fleet, first.cursor).changes) == [("d1", 0), ("d1", 1)]


@pytest.mark.parametrize("limit", [1, 2, 3, 1000])
def test_each_version_comes_once_in_the_order_of_the_transactions_whatever_the_size_of_a_page(
    fleet: Engine, limit: int
) -> None:
    write(fleet, "d2")
    write(fleet, "d3", "d1", "d3")
    write(fleet, "d1", tenant_id="globex")
    write(fleet, "d2")

    found, cursor = listed(fleet, limit=limit)

    assert told(found) == [
        ("d2", 0), ("d2", 1),
        ("d1", 0), ("d1", 1), ("d3", 0), ("d3", 1), ("d3", 2),
        ("d2", 2),
    ]  # fmt: skip
    assert (found[1].tenant_id, found[1].actor, found[1].reason) == (TENANT, "anna", "why")
    assert found[1].written_at is not None
    write(fleet, "d1")
    assert told(listed(fleet, cursor, limit)[0]) == [("d1", 2)]


def test_the_removal_of_a_device_is_a_change_without_a_document(fleet: Engine) -> None:
    write(fleet, "d1")
    with Session(fleet) as session, session.begin():
        ShadowService(session, TENANT).remove("d1")
    assert [change.desired for change in listed(fleet)[0]] == [{}, {}, None]


def test_no_limit_is_too_large_and_with_none_the_cursor_stays(fleet: Engine) -> None:
    write(fleet, "d1")
    empty = page(fleet, limit=0)
    assert empty.changes == []
    both = page(fleet, empty.cursor, 2**63 - 1)
    assert told(both.changes) == [("d1", 0), ("d1", 1)]
    again = page(fleet, both.cursor, 0)
    assert (again.changes, again.cursor) == ([], both.cursor)
    assert page(fleet, page(fleet, limit=1).cursor, 2**63 - 1).changes == both.changes[1:]


def test_of_two_overlapping_transactions_the_one_that_wrote_first_comes_first(fleet: Engine) -> None:
    """Also where it began later, so that its time is later."""
    with Session(fleet) as early, Session(fleet) as late:
        early.execute(text("SELECT now()"))
        ShadowService(late, TENANT).patch_desired("d1", {})
        ShadowService(early, TENANT).patch_desired("d2", {})
        early.commit()
        late.commit()
    found = listed(fleet, limit=1)[0]
    assert told(found) == [("d1", 0), ("d1", 1), ("d2", 0), ("d2", 1)]
    assert found[1].written_at is not None
    assert found[3].written_at is not None
    assert found[1].written_at > found[3].written_at


def test_a_version_that_cannot_be_read_is_left_out_and_the_log_names_it(
    fleet: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    write(fleet, "d1", "d2")
    sql(fleet, "UPDATE device_shadow_history SET desired_state = '[]' WHERE device_id = 'd1' AND desired_version = 1")
    with caplog.at_level(logging.WARNING):
        found, cursor = listed(fleet, limit=3)
    assert told(found) == [("d1", 0), ("d2", 0), ("d2", 1)]
    assert "desired_state of version 1 is no JSON object" in caplog.text
    assert page(fleet, cursor).changes == []


def test_a_page_becomes_a_dict_for_an_http_api(fleet: Engine) -> None:
    write(fleet, "d1")
    one = page(fleet)
    assert json.loads(json.dumps(one.to_dict())) == {
        "changes": [change.to_dict() for change in one.changes],
        "cursor": one.cursor,
        "held_back_since": None,
    }
    since = datetime(2026, 1, 2, tzinfo=UTC)
    assert ChangePage([], "x", since).to_dict()["held_back_since"] == "2026-01-02T00:00:00+00:00"


# What is held back.


def test_what_an_open_transaction_might_precede_is_held_back_until_it_has_ended(fleet: Engine) -> None:
    with Session(fleet) as slow:
        ShadowService(slow, TENANT).patch_desired("d1", {})
        write(fleet, "d2")
        held = page(fleet, settled=False)
        assert held.changes == []
        assert held.held_back_since is not None
        slow.commit()
    found = listed(fleet, held.cursor)[0]
    assert told(found) == [("d1", 0), ("d1", 1), ("d2", 0), ("d2", 1)]
    assert held.held_back_since == found[3].written_at
    assert page(fleet).held_back_since is None


@pytest.mark.parametrize("statement", ["CREATE TEMP TABLE t ()", "SELECT pg_current_xact_id()"])
def test_any_transaction_that_has_written_holds_back_also_one_of_another_database(
    fleet: Engine, new_database: Callable[[], str], statement: str
) -> None:
    with create_engine(new_database(), poolclass=NullPool).connect() as other:
        other.execute(text(statement))
        write(fleet, "d2")
        held = page(fleet, settled=False)
        assert (held.changes, held.held_back_since is None) == ([], False)
        other.rollback()
    assert told(page(fleet, held.cursor).changes) == [("d2", 0), ("d2", 1)]


def test_what_the_own_transaction_has_written_is_no_change_before_it_is_committed(fleet: Engine) -> None:
    with Session(fleet) as session:
        shadows = ShadowService(session, TENANT)
        shadows.patch_desired("d1", {})
        with session.begin_nested():
            shadows.patch_desired("d2", {})
        first = shadows.changes()
        assert (first.changes, first.held_back_since) == ([], None)
        session.commit()
    assert told(page(fleet, first.cursor).changes) == [("d1", 0), ("d1", 1), ("d2", 0), ("d2", 1)]


def test_a_transaction_that_is_rolled_back_leaves_no_change(fleet: Engine) -> None:
    with Session(fleet) as session:
        ShadowService(session, TENANT).patch_desired("d1", {})
        session.rollback()
    assert page(fleet).changes == []


# Which cursors are none.


def text_of(*values: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(values).encode()).decode().rstrip("=")


def with_place(*place: object) -> str:
    return text_of(1, TENANT, "o", place, True, [])  # noqa: FBT003 - what a cursor holds


GOOD: list[Any] = [True, 1, "d", 1, None]
# For each part of a place what it cannot be.
BAD: list[list[Any]] = [
    [1, None],
    [-1, 2**63, 1.0, "1", True],
    [7, "\0", "\ud800"],
    [-1, 2**63, None, True, False],
    ["x", 1.5, True],
]
NO_CURSORS = [
    *("", "7", "ä", "\0", "\ud800", "AAAA", "x" * 100_000),
    base64.urlsafe_b64encode(b"[" * 10_000).decode(),
    base64.urlsafe_b64encode(b"[1" + b"1" * 9999 + b"]").decode(),
    *(text_of(*values) for values in ([], [1], [2, TENANT, "o", None, True, []], [1, 7, "o", None, True, []])),
    *(text_of(1, TENANT, "o", None, *values) for values in ([1, []], [True, ["x"]], [True, [True]], [True, None])),
    text_of(1, TENANT, "o", "place", True, []),  # noqa: FBT003 - what a cursor holds
    with_place(*GOOD[:4]),
    *(with_place(*GOOD[:n], bad, *GOOD[n + 1 :]) for n, bads in enumerate(BAD) for bad in bads),
]


@pytest.mark.parametrize("cursor", NO_CURSORS, ids=range(len(NO_CURSORS)))
def test_what_is_no_cursor_is_refused_before_anything_is_sent(session: Session, cursor: str) -> None:
    with (
        counted_statements(session.connection()) as statements,
        pytest.raises(InvalidCursor, match=r"no cursor of changes\(\): pass ChangePage.cursor as it is, or None"),
    ):
        ShadowService(session, TENANT).changes(after=cursor)
    assert statements == []


@with_a_database()
@given(st.data())
def test_a_cursor_in_which_anything_is_replaced_is_refused_has_expired_or_is_one(
    session: Session, data: st.DataObject
) -> None:
    place: list[Any] = [*GOOD]
    parts: list[Any] = [1, TENANT, "o", place, True, []]
    for _ in range(data.draw(st.integers(1, 3))):
        whole = data.draw(st.sampled_from([parts, place]))
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.booleans() | st.integers() | values)
    try:
        page_of = ShadowService(session, TENANT).changes(after=text_of(*parts))
    except (InvalidCursor, CursorExpired):
        pass
    else:
        assert page_of.changes == []


def test_a_cursor_that_is_none_of_ours_and_looks_like_one_has_expired(session: Session) -> None:
    with pytest.raises(CursorExpired):
        ShadowService(session, TENANT).changes(after=with_place(*GOOD))


def test_a_cursor_of_another_tenant_is_refused(session: Session) -> None:
    cursor = ShadowService(session, "globex").changes().cursor
    with pytest.raises(InvalidCursor, match="after is a cursor of another tenant"):
        ShadowService(session, TENANT).changes(after=cursor)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"after": 7}, TypeError),
        ({"after": b"x"}, TypeError),
        ({"limit": -1}, ValueError),
        ({"limit": True}, TypeError),
    ],
)
def test_what_is_no_text_or_number_is_refused(
    session: Session, arguments: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match="must be"):
        ShadowService(session, TENANT).changes(**arguments)


@given(st.text(), st.integers(0, 2**63 - 1), st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_a_cursor_comes_back_as_it_was(origin: str, number: int, device_id: str) -> None:
    origin = origin.encode("utf-8", "ignore").decode()
    place = change_cursors.Place(is_local=True, transaction_id=number, device_id=device_id, version=1, written_at=-7)
    for one in (place, None):
        cursor = change_cursors.Cursor(origin, one, is_whole=True, known=frozenset({-number, -7}))
        assert change_cursors.decode(cursor.encoded("tenant"), "tenant") == cursor


# What was pruned.


@pytest.fixture
def read(fleet: Engine) -> tuple[Engine, str, str]:
    """Versions 0 to 3 of d1, read to version 1, and to the end."""
    for _ in range(3):
        write(fleet, "d1")
    return fleet, page(fleet, limit=2).cursor, listed(fleet)[1]


def test_a_cursor_behind_which_versions_were_pruned_has_expired(read: tuple[Engine, str, str]) -> None:
    engine, early, late = read
    assert prune(engine) == 3
    with pytest.raises(
        CursorExpired, match=r"versions behind it were pruned.* List all again, from the start"
    ) as caught:
        page(engine, early)
    assert (caught.value.tenant_id, caught.value.http_status) == (TENANT, 410)
    # All that was pruned had been read.
    assert page(engine, late).changes == []
    write(engine, "d2")
    assert told(page(engine, late).changes) == [("d2", 0), ("d2", 1)]


def test_who_lists_again_has_all_that_is_kept_and_goes_on(read: tuple[Engine, str, str]) -> None:
    engine, *_ = read
    write(engine, "d2", "d3")
    prune(engine)
    found, cursor = listed(engine, limit=1)
    assert told(found) == [("d1", 3), ("d2", 1), ("d3", 1)]
    write(engine, "d1")
    assert told(listed(engine, cursor)[0]) == [("d1", 4)]


def test_a_cursor_stays_though_the_version_that_it_stands_at_is_pruned(read: tuple[Engine, str, str]) -> None:
    engine, early, late = read
    write(engine, "d1")
    newest = page(engine, late).cursor
    prune(engine, keep=0)
    for expired in (early, late):
        with pytest.raises(CursorExpired):
            page(engine, expired)
    again = page(engine, newest)
    assert again.changes == []
    write(engine, "d1")
    # The version that the row was at is recorded once more, because the history has lost it.
    assert told(page(engine, again.cursor).changes) == [("d1", 4), ("d1", 5)]


def test_a_cursor_in_the_midst_of_a_transaction_has_expired_where_its_versions_were_pruned(fleet: Engine) -> None:
    write(fleet, "d1", "d2")
    midst = page(fleet, limit=2).cursor
    end = page(fleet, midst).cursor
    prune(fleet, keep=0)
    with pytest.raises(CursorExpired):
        page(fleet, midst)
    assert page(fleet, end).changes == []


def test_versions_that_came_and_were_pruned_since_an_empty_page_expire_its_cursor(fleet: Engine) -> None:
    empty = page(fleet).cursor
    write(fleet, "d1")
    prune(fleet, keep=0)
    with pytest.raises(CursorExpired):
        page(fleet, empty)
    assert page(fleet).changes == []
    write(fleet, "d2")
    assert told(listed(fleet, page(fleet, limit=0).cursor)[0]) == [("d2", 0), ("d2", 1)]


def test_what_was_pruned_before_a_listing_began_does_not_expire_it_and_what_is_pruned_meanwhile_does(
    fleet: Engine,
) -> None:
    write(fleet, "d1")  # its versions stay
    for device_id in ("d2", "d2", "d3"):
        write(fleet, device_id)
    with Session(fleet) as session, session.begin():
        ShadowService(session, TENANT).remove("d3")
    prune(fleet)
    first = page(fleet, limit=1)
    assert told(first.changes) == [("d1", 1)]
    second = page(fleet, first.cursor, 1)
    assert told(second.changes) == [("d2", 2)]

    assert prune(fleet, keep=0) == 3
    for cursor in (first.cursor, second.cursor):
        with pytest.raises(CursorExpired):
            page(fleet, cursor)


def test_a_pruning_of_what_a_listing_has_passed_does_not_expire_it_whatever_was_pruned_before(fleet: Engine) -> None:
    for device_id in DEVICES:
        write(fleet, device_id)
        write(fleet, device_id)

    def prune_versions_of(device_id: str) -> None:
        sql(fleet, f"""UPDATE device_shadow_history SET written_at = now() - INTERVAL '2 days'
                        WHERE device_id = '{device_id}' AND desired_version = 1""")  # fmt: skip
        assert prune(fleet, older_than=timedelta(days=1)) == 2

    prune_versions_of("d3")
    passed = page(fleet, limit=3)
    assert told(passed.changes) == [("d1", 0), ("d1", 1), ("d1", 2)]
    prune_versions_of("d1")
    assert told(page(fleet, passed.cursor).changes) == [("d2", 0), ("d2", 1), ("d2", 2), ("d3", 2)]
    prune_versions_of("d2")
    with pytest.raises(CursorExpired):
        page(fleet, passed.cursor)


def test_a_pruning_that_is_open_while_a_listing_begins_expires_it_once_it_is_committed(
    read: tuple[Engine, str, str],
) -> None:
    engine, *_ = read
    with Session(engine) as pruning:
        ShadowService(pruning, TENANT).prune_history(older_than=NOW)
        first = page(engine, limit=1, settled=False)
        pruning.rollback()
        assert len(page(engine, first.cursor, settled=False).changes) == 3
        ShadowService(pruning, TENANT).prune_history(older_than=NOW)
        first = page(engine, limit=1, settled=False)
        pruning.commit()
    with pytest.raises(CursorExpired):
        page(engine, first.cursor)


def test_a_pruning_that_deletes_nothing_expires_no_cursor_and_leaves_nothing(read: tuple[Engine, str, str]) -> None:
    engine, early, _ = read
    assert prune(engine, older_than=timedelta(days=1)) == 0
    assert len(page(engine, early).changes) == 2
    assert marks(engine) == []


def marks(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.scalars(text("SELECT device_id FROM device_shadow_history WHERE desired_version < 0")))


def test_the_mark_of_a_pruning_is_no_version_and_takes_the_place_of_the_marks_before(fleet: Engine) -> None:
    for _ in range(3):
        write(fleet, "d1", "d2")
        prune(fleet)
        assert marks(fleet) == [""]
    with Session(fleet) as session:
        shadows = ShadowService(session, TENANT)
        with pytest.raises(DeviceNotFound):
            shadows.history("")
        assert shadows.prune_history(older_than=NOW, keep=0) == 2
        assert shadows.prune_history(older_than=NOW, keep=0) == 0
        session.commit()
    assert marks(fleet) == [""]


def test_of_two_prunings_at_once_each_leaves_its_mark(fleet: Engine) -> None:
    write(fleet, "d1", "d1")
    prune(fleet)
    write(fleet, "d1")
    early = listed(fleet)[1]
    write(fleet, "d2", "d2")
    sql(fleet, "UPDATE device_shadow_history SET written_at = now() - INTERVAL '2 days' WHERE device_id = 'd1'")
    with Session(fleet) as first, ThreadPoolExecutor(1) as pool:
        assert ShadowService(first, TENANT).prune_history(older_than=timedelta(days=1)) == 1
        second = pool.submit(prune, fleet)  # deletes the same version, and two more
        time.sleep(0.2)
        first.commit()
        assert second.result() == 2
    assert marks(fleet)
    with pytest.raises(CursorExpired):
        page(fleet, early)
    assert told(page(fleet).changes) == [("d1", 3), ("d2", 2)]


def test_the_prunings_of_another_tenant_expire_nothing(read: tuple[Engine, str, str]) -> None:
    engine, early, _ = read
    write(engine, "d1", tenant_id="globex")
    with Session(engine) as session, session.begin():
        assert ShadowService(session, "globex").prune_history(older_than=NOW) == 1
    assert len(page(engine, early).changes) == 2


# Another database, or another state of this one.


def test_a_cursor_of_another_database_has_expired(fleet: Engine, engine: Engine) -> None:
    with Session(engine) as session, pytest.raises(CursorExpired, match="the database was restored"):
        ShadowService(session, TENANT).changes(after=page(fleet).cursor)


@pytest.mark.parametrize(
    "lost",
    [
        "DELETE FROM device_shadow_history WHERE desired_version = 3",
        "DELETE FROM device_shadow_history",
        "UPDATE device_shadow_history SET written_at = written_at + INTERVAL '1 ms' WHERE desired_version = 3",
        "UPDATE device_shadow_history SET transaction_id = transaction_id - 1 WHERE desired_version = 3",
    ],
)
def test_a_cursor_whose_version_the_database_has_lost_has_expired(read: tuple[Engine, str, str], lost: str) -> None:
    """As after a restore of an older state, a failover, or a crash with synchronous_commit = off."""
    engine, _, late = read
    sql(engine, lost)
    with pytest.raises(CursorExpired):
        page(engine, late)
    write(engine, "d2")
    with pytest.raises(CursorExpired):
        page(engine, late)


FAR = 10**15


def far(engine: Engine, where: str, by: int = FAR) -> None:
    """Versions as a dump of another cluster brings them, whose transactions had larger numbers."""
    sql(engine, f"UPDATE device_shadow_history SET transaction_id = transaction_id + {by} WHERE {where}")


@pytest.mark.parametrize("limit", [1, 2, 1000])
def test_versions_of_a_dump_of_another_cluster_come_first_and_hide_no_others(fleet: Engine, limit: int) -> None:
    write(fleet, "d1")
    write(fleet, "d2")
    far(fleet, "true")
    write(fleet, "d1")

    found, cursor = listed(fleet, limit=limit)

    assert told(found) == [("d1", 0), ("d1", 1), ("d2", 0), ("d2", 1), ("d1", 2)]
    write(fleet, "d3")
    assert told(listed(fleet, cursor, limit)[0]) == [("d3", 0), ("d3", 1)]
    # When this cluster has reached them, they come once more at most, and none is lost.
    far(fleet, f"transaction_id > {FAR}", -FAR)
    assert {*told(found), *told(listed(fleet, cursor)[0])} >= {*told(listed(fleet)[0])} - {("d3", 0), ("d3", 1)}


def test_a_listing_goes_on_from_the_versions_of_another_cluster_to_those_of_this_one(fleet: Engine) -> None:
    write(fleet, "d1")
    far(fleet, "true")
    cursor = listed(fleet)[1]
    write(fleet, "d2")
    assert told(page(fleet, cursor).changes) == [("d2", 0), ("d2", 1)]
    with Session(fleet) as session, session.begin():
        shadows = ShadowService(session, TENANT)
        shadows.patch_desired("d3", {})
        assert told(shadows.changes().changes) == [("d1", 0), ("d1", 1), ("d2", 0), ("d2", 1)]


def test_pruning_versions_of_another_cluster_expires_no_cursor_that_has_passed_them(fleet: Engine) -> None:
    write(fleet, "d1", "d1")
    far(fleet, "true")
    foreign = page(fleet, limit=1).cursor
    write(fleet, "d2")
    early = page(fleet, limit=4).cursor
    write(fleet, "d2")
    late = listed(fleet)[1]
    sql(fleet, "UPDATE device_shadow_history SET written_at = now() - INTERVAL '2 days' WHERE device_id = 'd1'")

    assert prune(fleet, older_than=timedelta(days=1)) == 2
    with pytest.raises(CursorExpired):
        page(fleet, foreign)
    assert told(page(fleet, early).changes) == [("d2", 1), ("d2", 2)]
    assert prune(fleet) == 2
    assert len(marks(fleet)) == 2
    with pytest.raises(CursorExpired):
        page(fleet, early)
    assert page(fleet, late).changes == []


# The proof.

WRITERS, COMMITS = 6, 10  # of each writer
MANY = [f"m{number}" for number in range(12)]
LEVELS = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT"]


def test_readers_that_poll_while_transactions_are_open_for_random_times_see_each_version_exactly_once(
    fleet: Engine,
) -> None:
    with Session(fleet) as session, session.begin():
        ShadowService(session, TENANT).register_many(dict.fromkeys(MANY, "berlin"))
    done = threading.Event()
    seed = random.randrange(2**32)  # noqa: S311 - in the message

    def prune_all_the_while() -> None:
        while not done.wait(0.05):
            prune(fleet, older_than=timedelta(hours=1))

    with ThreadPoolExecutor(WRITERS + 5) as pool:
        readers = [pool.submit(_read_all_the_while, fleet, seed - number, done) for number in range(4)]
        pruner = pool.submit(prune_all_the_while)
        try:
            for writer in [pool.submit(_write_for_a_while, fleet, seed + number) for number in range(WRITERS)]:
                writer.result()
        finally:
            done.set()
        pruner.result()
        seen = [reader.result() for reader in readers]

    with fleet.connect() as connection:
        there = connection.execute(
            text("SELECT device_id, desired_version FROM device_shadow_history WHERE tenant_id = :t"), {"t": TENANT}
        ).all()
    assert len(there) > 50
    for changes in seen:
        assert Counter(told(changes)) == Counter((row.device_id, row.desired_version) for row in there), f"seed {seed}"


def _at_level(engine: Engine, seed: int) -> Engine:
    return engine.execution_options(isolation_level=LEVELS[seed % 4])


def _write_for_a_while(fleet: Engine, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - repeatable
    until, commits = time.monotonic() + 60, 0
    while commits < COMMITS and time.monotonic() < until:
        # A serialization failure or a deadlock; a device that was just removed.
        with suppress(DBAPIError, IotModelsError), Session(_at_level(fleet, seed)) as session:
            for _ in range(chance.randint(1, 3)):
                _write_something(ShadowService(session, TENANT), chance)
                time.sleep(chance.random() ** 4 / 10)
            if chance.random() < 0.9:
                session.commit()
                commits += 1


def _write_something(shadows: ShadowService, chance: random.Random) -> None:
    device_id = chance.choice(MANY)
    match chance.randrange(6):
        case 0:
            shadows.patch_desired_many(chance.sample(MANY, 3), {"n": chance.random()})
        case 1:
            shadows.remove(device_id)
            shadows.register(device_id, "berlin")
        case _:
            shadows.patch_desired(device_id, {"n": chance.random()})


def _read_all_the_while(fleet: Engine, seed: int, done: threading.Event) -> list[DesiredVersion]:
    """Until the writers are done, and then to the end."""
    chance = random.Random(seed)  # noqa: S311 - repeatable
    seen: list[DesiredVersion] = []
    cursor: str | None = None
    while True:
        is_last = done.is_set()
        with Session(_at_level(fleet, seed)) as session:
            one = ShadowService(session, TENANT).changes(after=cursor, limit=chance.choice([1, 2, 5, 100]))
        seen += one.changes
        cursor = one.cursor
        if is_last and not one.changes and one.held_back_since is None:
            return seen
        time.sleep(chance.random() / 100)
