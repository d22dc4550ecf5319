"""A class of a team's own that extends `DeviceState` has all that `DeviceState` has.

The test is a program of its own: a mapped class cannot be taken back, and others would meet its column.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from textwrap import dedent
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

if TYPE_CHECKING:
    from sqlalchemy import Engine

pytestmark = pytest.mark.repeats

HEAD = """
import json, sys
from sqlalchemy import create_engine, select, text
from sqlalchemy.orm import Mapped, Session
from sqlalchemy.orm.exc import StaleDataError
from iot_models import DeviceState, ShadowService

class Machine(DeviceState):
    firmware: Mapped[str | None]

from iot_models import migrate  # compares with our columns, whatever is defined by now

engine = create_engine(sys.argv[1])
KEY = ("acme", "thermostat-1")

def refused(commit):
    try:
        commit()
    except StaleDataError:
        return True
    return False

for what, program in json.loads(sys.argv[2]).items():
    with Session(engine) as session, session.begin():
        session.execute(text("DELETE FROM device_state"))
        session.execute(text(sys.argv[3]))
    with Session(engine) as session:
        exec(compile(program, what, "exec"))
    print(what)
"""

DEVICE = """
    INSERT INTO device_state (tenant_id, site_id, device_id, desired_state, desired_version)
    VALUES ('acme', 'berlin', 'thermostat-1', '{"a": 1}', 7)
"""

# What such a class does, the last one after which the column is gone.
PROGRAMS = {
    "shows what the service writes, also beside a DeviceState of the same row": """
    machine, device = session.get_one(Machine, KEY), session.get_one(DeviceState, KEY)
    ShadowService(session, "acme").patch_desired("thermostat-1", {"b": 2})
    for one in (machine, device):
        assert (one.desired_state, one.desired_version) == ({"a": 1, "b": 2}, 8)
""",
    "is written by the flush, which the other object of the row shows": """
    machine, device = session.get_one(Machine, KEY), session.get_one(DeviceState, KEY)
    machine.desired_state["b"] = 2
    session.flush()
    device.desired_state["c"] = 3
    machine.firmware = "1.2"
    session.commit()
    assert machine.desired_state == device.desired_state == {"a": 1, "b": 2, "c": 3}
    assert (machine.desired_version, machine.firmware) == (9, "1.2")
""",
    "is guarded by the version that its document was read at": """
    machine = session.get_one(Machine, KEY)
    machine.desired_state["mine"] = 1
    with Session(engine) as other, other.begin():
        other.get_one(Machine, KEY).desired_state = {"theirs": 1}
    assert refused(session.commit)
    session.rollback()
    assert session.get_one(Machine, KEY).desired_state == {"theirs": 1}
""",
    "is taken back with a savepoint": """
    machine = session.get_one(Machine, KEY)
    savepoint = session.begin_nested()
    ShadowService(session, "acme").patch_desired("thermostat-1", {"b": 2})
    savepoint.rollback()
    assert (machine.desired_state, machine.desired_version) == ({"a": 1}, 7)
""",
    "answers what is asked in SQL": """
    assert session.scalars(select(Machine.device_id).where(Machine.is_pending)).all() == ["thermostat-1"]
    assert session.scalar(select(Machine.delta)) == {"a": 1}
""",
    "adds nothing that `migrate.check` asks for": """
    session.execute(text("ALTER TABLE device_state DROP firmware"))
    session.commit()
    assert migrate.check(engine) == []
""",
}


def test_a_class_that_extends_device_state(own_engine: Engine) -> None:
    with own_engine.begin() as connection:
        connection.execute(text("ALTER TABLE device_state ADD firmware text"))
    programs = json.dumps({what: dedent(program) for what, program in PROGRAMS.items()})

    run = subprocess.run(
        [sys.executable, "-c", HEAD, own_engine.url.render_as_string(hide_password=False), programs, DEVICE],
        env=os.environ | {"PYTHONWARNINGS": "error"},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert run.stdout.splitlines() == [*PROGRAMS], run.stderr
