"""The one call that can fail with some of its work done: a batch of reports, where each statement is a transaction.

It is no all-or-nothing batch. Its first statement writes what can be written; an error of the database in one that comes
after it takes nothing back. Sending the batch again is the way out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import NullPool, create_engine, event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from iot_models import Report, ReportStatus, ShadowService
from tests.databases.devices import TENANT, add_device

if TYPE_CHECKING:
    from sqlalchemy import Engine

pytestmark = pytest.mark.repeats

REPORTS = [Report("t-1", {"on": True}, 0), Report("t-2", {"on": True}, 0)]
# Read and judged before they are written, since a device reports twice.
TWICE = [*REPORTS, Report("t-1", {"on": True}, 0)]


def reported(engine: Engine) -> list[object]:
    with Session(engine) as session:
        return [shadow.reported for shadow in ShadowService(session, TENANT).get_many(["t-1", "t-2"]).values()]


@pytest.fixture
def impatient(own_engine: Engine) -> Engine:
    """Devices t-1 and t-2, and an engine in AUTOCOMMIT mode whose statements wait for no lock."""
    with Session(own_engine) as session, session.begin():
        for device in ("t-1", "t-2"):
            add_device(session, device)
    return create_engine(
        own_engine.url,
        poolclass=NullPool,
        isolation_level="AUTOCOMMIT",
        connect_args={"options": "-c lock_timeout=50ms"},
    )


def test_a_database_error_in_the_second_round_leaves_the_first_one_written_and_the_batch_can_be_sent_again(
    own_engine: Engine, impatient: Engine
) -> None:
    statements: list[str] = []
    with own_engine.connect() as holder:

        @event.listens_for(impatient, "before_cursor_execute")
        def interfere(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
            statements.append(statement)
            if len(statements) == 2:  # read and judged, not yet written: the second device has to be judged anew
                with Session(own_engine) as theirs, theirs.begin():
                    ShadowService(theirs, TENANT).replace_desired("t-2", {"on": True})
            if len(statements) == 3:
                holder.execute(text("SELECT FROM device_state WHERE device_id = 't-2' FOR UPDATE"))

        with Session(impatient) as session, pytest.raises(OperationalError, match="lock timeout"):
            ShadowService(session, TENANT).replace_reported_many(TWICE)
    assert len(statements) == 3
    assert reported(own_engine) == [{"on": True}, {}]

    with Session(impatient) as session:
        outcomes = ShadowService(session, TENANT).replace_reported_many(TWICE)
    assert [outcome.status for outcome in outcomes] == [ReportStatus.ACCEPTED] * 3
    assert reported(own_engine) == [{"on": True}, {"on": True}]


def test_a_database_error_while_it_asks_why_some_were_refused_leaves_the_others_written(
    own_engine: Engine, impatient: Engine
) -> None:
    statements: list[str] = []
    refused = Report("t-2", {"on": True}, 1)  # a version that was never asked
    with own_engine.connect() as holder:

        @event.listens_for(impatient, "before_cursor_execute")
        def interfere(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
            statements.append(statement)
            if len(statements) == 2:
                holder.execute(text("SELECT FROM device_state WHERE device_id = 't-2' FOR UPDATE"))

        with Session(impatient) as session, pytest.raises(OperationalError, match="lock timeout"):
            ShadowService(session, TENANT).replace_reported_many([REPORTS[0], refused])
    assert reported(own_engine) == [{"on": True}, {}]

    with Session(impatient) as session:
        outcomes = ShadowService(session, TENANT).replace_reported_many([REPORTS[0], refused])
    assert [outcome.status for outcome in outcomes] == [ReportStatus.ACCEPTED, ReportStatus.UNKNOWN_VERSION]


def test_a_batch_that_is_accepted_is_one_statement_and_so_written_whole_or_not_at_all(
    own_engine: Engine, impatient: Engine
) -> None:
    with own_engine.connect() as holder:
        holder.execute(text("SELECT FROM device_state WHERE device_id = 't-2' FOR UPDATE"))
        with Session(impatient) as session, pytest.raises(OperationalError, match="lock timeout"):
            ShadowService(session, TENANT).replace_reported_many(REPORTS)
    assert reported(own_engine) == [{}, {}]
