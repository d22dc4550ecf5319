"""docs/history.md: its SQL answers what it says, and takes a version back as the service does."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sqlalchemy import text
from sqlalchemy.orm import Session

from iot_models import Report, ShadowService
from tests.databases.alembic_runs import CHECKOUT

if TYPE_CHECKING:
    from sqlalchemy import Engine

SQL, WHO_HOLDS_BACK = re.findall(r"```sql\n(.*?)```", (CHECKOUT / "docs/history.md").read_text(), re.DOTALL)
WHO, HOW, ELSE, REQUEST, BACK = re.findall(r"^-- \d\. .*?\n(.*?;)\n", SQL, re.DOTALL | re.MULTILINE)


def test_the_questions_of_an_operator_are_answered_by_sql_alone_and_the_version_is_taken_back(
    own_engine: Engine,
) -> None:
    with Session(own_engine) as session, session.begin():
        anna = ShadowService(session, "acme", actor="anna")
        anna.register("t-1", "berlin")
        anna.patch_desired("t-1", {"target_c": 21.5}, reason="commissioning")
        ShadowService(session, "acme", actor="night-job").patch_desired(
            "t-1", {"target_c": 4}, reason="frost protection, ticket 711", request_id="job/t-1"
        )
        anna.replace_reported_many(
            [Report("t-1", {"target_c": 21.5}, acked_version=1, refused_version=2, refusal="no")]
        )

    with own_engine.begin() as connection:
        history = [(row.desired_version, row.actor, row.reason) for row in connection.execute(text(WHO))]
        stands = connection.execute(text(HOW)).one()
        others = [(row.device_id, row.desired_version) for row in connection.execute(text(ELSE))]
        assert connection.execute(text(REQUEST)).scalar_one() == "job/t-1"
        assert connection.execute(text(BACK)).rowcount == 1
        assert connection.execute(text(BACK)).rowcount == 0  # the version is overtaken

    assert history == [(2, "night-job", "frost protection, ticket 711"), (1, "anna", "commissioning"), (0, None, None)]
    assert (stands.desired_version, stands.reported_version, stands.refusal) == (2, 1, "no")
    assert others == [("t-1", 2)]
    with Session(own_engine) as session:
        shadows = ShadowService(session, "acme")
        assert shadows.get("t-1").desired == {"target_c": 21.5}
        (newest, *_) = shadows.history("t-1")
        assert (newest.version, newest.reason) == (3, "wrong device in ticket 711")
        assert shadows.patch_desired("t-1", {"on": True}).desired_version == 4


def test_who_holds_the_changes_back_is_found_by_sql(own_engine: Engine) -> None:
    open_ones, prepared = WHO_HOLDS_BACK.split(";")[:2]
    with own_engine.connect() as writer, own_engine.connect() as connection:
        writer.execute(text("SELECT pg_current_xact_id()"))
        assert connection.execute(text(open_ones.replace("LIMIT 3", ""))).rowcount >= 1
        connection.execute(text(prepared))
