"""How a batch of reports travels through the package: function calls, modules, and changes between modules.

    python benchmarks/walk.py

It makes a batch of two valid reports on the throwaway server, and counts the second call, so that caches are warm. The
figures are for those who read the code; they say nothing about speed.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import create_engine
from sqlalchemy.orm import Session

import iot_models
from iot_models import Base, DeviceState, Report, ShadowService
from iot_models.testing import throwaway

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

PACKAGE = Path(iot_models.__file__).parent


def walked(call: Callable[[], object]) -> list[str]:
    """Return the module of each of our functions, in the order of the calls."""
    modules: list[str] = []

    def record(frame: FrameType, happened: str, _argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        # Not comprehensions and generator expressions: a reader does not see them as functions.
        if happened == "call" and path.is_relative_to(PACKAGE) and not frame.f_code.co_name.startswith("<"):
            modules.append(str(path.relative_to(PACKAGE).with_suffix("")))

    sys.setprofile(record)
    try:
        call()
    finally:
        sys.setprofile(None)
    return modules


def main() -> None:
    with throwaway.postgres() as server:
        engine = create_engine(server.url)
        Base.metadata.create_all(engine)
        with Session(engine) as session, session.begin():
            session.add_all(DeviceState(tenant_id="acme", site_id="berlin", device_id=name) for name in ("a", "b"))
            session.flush()
            session.expunge_all()
            shadows = ShadowService(session, "acme")
            reports = [Report("a", {"target_c": 21, "fan": {"speed": 2}}, 0), Report("b", {"target_c": 22})]
            shadows.replace_reported_many(reports)
            modules = walked(lambda: shadows.replace_reported_many(reports))
        engine.dispose()
    turns = sum(one != other for one, other in pairwise(modules))
    print(f"{len(modules)} calls in {len(set(modules))} modules, {turns} changes between modules:")
    for place, module in enumerate(modules):
        if place == 0 or modules[place - 1] != module:
            print(f"  {module}")


if __name__ == "__main__":
    main()
