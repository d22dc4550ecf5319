"""What the load generator concludes from its measurements, and how a run is planned."""

from __future__ import annotations

import re
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import make_url

from iot_models.testing.load.meters import Latencies, Percentiles
from iot_models.testing.load.observation import difference
from iot_models.testing.load.output import print_measured
from iot_models.testing.load.plan import Plan
from iot_models.testing.load.verdict import Measured, bottleneck, verdict

# One tenant, half of the rate, and nothing that stands out.
_OVERLOADED = Measured(
    rate=1000, seconds=10, due=10_000, done=5000, done_in_time=5000, unsent=5000, unanswered=0, refused={}, errors={},
    latency=Percentiles(1.0, 2.0, 3.0, 4.0), desired_due=0, desired_done=0, desired_errors={}, desired_latency=None,
    batches=50, max_batch=100, max_delay=0.02, tenants=1, connections=5, pool_used=0.2, pool_full=0.0, cpu=0.4, busy=0.5,
    looks=50, waits={"Client": 10, "CPU": 20}, blockers={}, wal=None, updates=None, hot_updates=None,
)  # fmt: skip


def measured(**values: Any) -> Measured:
    return Measured(**{**vars(_OVERLOADED), **values})


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"errors": {"53100": 5001}}, "writes fail. 5,001 of 10,001 reports ended in 53100."),
        ({"refused": {"unknown_device": 6000}}, "writes fail. 6,000 of 11,000 reports ended in unknown_device."),
        ({"waits": {"Lock:tuple": 30, "CPU": 2}, "blockers": {"backup": 30}}, "rows or tables that are locked"),
        ({"busy": 0.95, "cpu": 0.93}, "this process."),
        ({"busy": 0.95, "cpu": 0.5}, "the processors of this machine."),
        ({"pool_full": 0.95, "connections": 1, "tenants": 4}, "the connection pool."),
        ({"pool_full": 0.95, "connections": 1, "desired_due": 9}, "the connection pool."),
        ({"waits": {"CPU": 200}, "tenants": 8}, "the server's processors."),
        ({"waits": {"IO:WalSync": 40, "CPU": 9}}, "the server's disk, to which each commit writes its WAL."),
        ({"waits": {"LWLock:WALWrite": 40}}, "the server's disk, to which each commit writes its WAL."),
        ({"waits": {"IO:DataFileRead": 40}}, "the server's disk."),
        ({"waits": {"IPC:SyncRep": 40}}, "other processes that the server waits for"),
        ({"waits": {"LWLock:BufferContent": 40}}, "locks inside of the server"),
        ({"waits": {"Timeout:PgSleep": 40}}, "a pause that a trigger or a setting of the server makes."),
        ({"waits": {"Extension:Extension": 40}}, "what the server calls Extension."),
        ({}, "the order of a tenant's reports: its batches are written one after another, and this process and the server"),
        ({"waits": {}, "busy": 0.1}, "the order of a tenant's reports: its batches are written one after another, and most"),
    ],
)  # fmt: skip
def test_the_bottleneck_is_what_the_measurements_show(values: dict[str, Any], named: str) -> None:
    assert bottleneck(measured(**values)).startswith(named)
    assert verdict(measured(**values)).startswith("Only 500 of 1,000 reports/s were reached. Bottleneck: ")


def test_it_names_who_holds_the_locks_and_that_nobody_is_known_where_they_have_gone() -> None:
    waits = {"Lock:transactionid": 20}
    assert "held by 'backup', 'psql'." in bottleneck(measured(waits=waits, blockers={"psql": 3, "backup": 9}))
    assert "held by a session that has gone." in bottleneck(measured(waits=waits))


def test_a_pool_that_is_full_is_no_bottleneck_where_no_tenant_waits_for_a_connection() -> None:
    assert "connection pool" not in bottleneck(measured(pool_full=1.0, connections=1, tenants=1))


def test_small_batches_that_are_full_are_worth_making_larger() -> None:
    assert "--max-batch" in bottleneck(measured())
    assert "--max-batch" not in bottleneck(measured(batches=200))  # half full
    assert "--max-batch" not in bottleneck(measured(batches=5, max_batch=1000))


def test_the_rate_is_reached_where_no_more_is_missing_than_what_is_under_way_at_any_time() -> None:
    assert measured(done_in_time=9_560).is_reached  # 2 %, and a quarter of a second
    assert not measured(done_in_time=9_540).is_reached
    assert measured(done_in_time=9_790, latency=None).is_reached
    assert not measured(done_in_time=0, done=0, latency=None).is_reached


def test_a_rate_that_is_reached_is_said_to_leave_room_or_not() -> None:
    assert verdict(measured(done_in_time=10_000, batches=200)).startswith(
        "The rate was reached: 1,000 reports/s. There is room"
    )
    assert "There is not much room for more" in verdict(measured(done_in_time=10_000))


@given(st.lists(st.floats(1e-5, 1e3), min_size=1))
def test_a_percentile_is_exact_to_one_in_a_hundred(values: list[float]) -> None:
    latencies = Latencies()
    for value in values:
        latencies.add(value)

    percentiles = latencies.percentiles()

    assert percentiles is not None
    assert percentiles.max == max(values)
    for percent, found in ((50, percentiles.p50), (95, percentiles.p95), (99, percentiles.p99)):
        exact = sorted(values)[-(-len(values) * percent // 100) - 1]
        assert exact <= found * 1.000001
        assert found <= exact * 1.011


def test_what_was_not_measured_is_said_to_be_so(capsys: pytest.CaptureFixture[str]) -> None:
    print_measured(measured(waits={}, latency=None))

    out = capsys.readouterr().out
    assert "never seen at work (in 50 looks)" in out
    assert re.search(r"^latency +none$", out, re.MULTILINE)
    assert re.search(r"^HOT updates +not counted$", out, re.MULTILINE)


def test_of_nothing_there_are_no_percentiles() -> None:
    assert Latencies().percentiles() is None


@given(st.integers(1, 3000), st.integers(1, 5))
def test_all_devices_are_written_in_turns_each_in_its_tenant(devices: int, tenants: int) -> None:
    plan = Plan(
        make_url("postgresql://"), "load-0", devices, tenants, 1, 1, 0, 3, 1, 1, timedelta(0), bind_tenant=False
    )

    numbers = [plan.device(n) for n in range(2 * devices)]

    assert set(Counter(numbers).values()) == {2}
    assert set(numbers[:devices]) == set(range(devices))
    assert len({plan.tenant_of(number) for number in numbers}) == min(tenants, devices)
    assert set(plan.document) == {"n", "key_001", "key_002"}


def test_what_the_role_may_not_ask_has_no_difference() -> None:
    assert (difference(7, 4), difference(None, 4), difference(7, None)) == (3, None, None)
