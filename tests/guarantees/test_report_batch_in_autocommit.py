"""The one call that can fail with some of its work done: a batch of reports, where each statement is a transaction.

It is no all-or-nothing batch. Reports whose device changed under it are judged and written anew; an error of the
database in that second round takes nothing of the first one back. Sending the batch again is the way out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fleet import TENANT, add_device
from sqlalchemy import NullPool, create_engine, event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from iot_models import Report, ReportStatus, ShadowService

if TYPE_CHECKING:
    from sqlalchemy import Engine

REPORTS = [Report("t-1", {"on": True}, 0), Report("t-2", {"on": True}, 0)]


def reported(engine: Engine) -> list[object]:
    with Session(engine) as session:
        return [shadow.reported for shadow in ShadowService(session, TENANT).get_many(["t-1", "t-2"]).values()]


def test_a_database_error_in_the_second_round_leaves_the_first_one_written_and_the_batch_can_be_sent_again(
    own_engine: Engine,
) -> None:
    with Session(own_engine) as session, session.begin():
        for device in ("t-1", "t-2"):
            add_device(session, device)
    impatient = create_engine(
        own_engine.url,
        poolclass=NullPool,
        isolation_level="AUTOCOMMIT",
        connect_args={"options": "-c lock_timeout=50ms"},
    )
    holder = own_engine.connect()
    statements: list[str] = []

    @event.listens_for(impatient, "before_cursor_execute")
    def interfere(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        statements.append(statement)
        if len(statements) == 2:  # read and judged, not yet written: the second report has to be judged anew
            with Session(own_engine) as theirs, theirs.begin():
                ShadowService(theirs, TENANT).replace_desired("t-2", {"on": True})
        if len(statements) == 3:
            holder.execute(text("SELECT FROM device_state WHERE device_id = 't-2' FOR UPDATE"))

    with Session(impatient) as session, pytest.raises(OperationalError, match="lock timeout"):
        ShadowService(session, TENANT).replace_reported_many(REPORTS)
    holder.close()
    assert len(statements) == 3
    assert reported(own_engine) == [{"on": True}, {}]

    with Session(impatient) as session:
        outcomes = ShadowService(session, TENANT).replace_reported_many(REPORTS)
    assert [outcome.status for outcome in outcomes] == [ReportStatus.ACCEPTED] * 2
    assert reported(own_engine) == [{"on": True}, {"on": True}]
