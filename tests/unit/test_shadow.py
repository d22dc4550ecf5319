"""A shadow as a value: what it computes from what was read."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from iot_models import Shadow, SyncStatus

NOW = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)


def shadow(**changes: Any) -> Shadow:
    values: dict[str, Any] = {
        "tenant_id": "acme",
        "device_id": "thermostat-1",
        "desired": {"target_c": 21.5, "mode": "eco", "schedule": {"mon": [6, 22]}},
        "reported": {"target_c": 21.5, "mode": "eco", "schedule": {"mon": [6, 22]}},
        "desired_version": 7,
        "reported_version": 7,
        "shadow_updated_at": NOW - timedelta(hours=1),
        "last_seen_at": NOW - timedelta(minutes=1),
    }
    return Shadow(**values | changes)


def test_a_shadow_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        shadow().desired_version = 8  # type: ignore[misc]


def test_a_device_that_confirmed_everything_is_in_sync() -> None:
    settled = shadow()

    assert settled.delta == {}
    assert settled.nested_delta == {}
    assert settled.is_converged
    assert not settled.is_pending
    assert not settled.is_drifted
    assert settled.sync_status(NOW) is SyncStatus.SYNCED


def test_a_device_that_has_not_acknowledged_is_pending_and_not_drifted() -> None:
    waiting = shadow(desired_version=8, desired={"target_c": 19, "schedule": {"mon": [6, 22], "tue": [7, 9]}})

    assert waiting.is_pending
    assert not waiting.is_drifted
    assert waiting.delta == {"target_c": 19, "schedule": {"mon": [6, 22], "tue": [7, 9]}}
    assert waiting.nested_delta == {"target_c": 19, "schedule": {"tue": [7, 9]}}
    assert waiting.sync_status(NOW) is SyncStatus.PENDING


def test_a_device_that_acknowledged_and_runs_something_else_is_drifted() -> None:
    drifted = shadow(reported={"target_c": 25})

    assert drifted.is_drifted
    assert not drifted.is_converged
    assert drifted.sync_status(NOW) is SyncStatus.SYNCED


def test_a_pending_device_may_already_be_in_sync() -> None:
    assert shadow(desired_version=8).is_converged


def test_the_etag_is_the_desired_version_in_quotes() -> None:
    assert shadow().etag == '"7"'


def test_staleness_follows_the_threshold_that_the_shadow_was_read_with() -> None:
    assert shadow(stale_after=timedelta(seconds=59)).sync_status(NOW) is SyncStatus.STALE
    assert shadow(stale_after=timedelta(seconds=61)).sync_status(NOW) is SyncStatus.SYNCED


def test_the_threshold_is_no_part_of_equality() -> None:
    assert shadow(stale_after=timedelta(1)) == shadow(stale_after=timedelta(2))


def test_sync_status_takes_the_clock_when_no_time_is_given() -> None:
    assert shadow(last_seen_at=datetime.now(UTC)).sync_status() is SyncStatus.SYNCED
    assert shadow(last_seen_at=datetime.now(UTC) - timedelta(hours=1)).sync_status() is SyncStatus.STALE


def test_a_naive_time_is_refused() -> None:
    naive = NOW.replace(tzinfo=None)

    with pytest.raises(ValueError, match="naive"):
        shadow().sync_status(naive)
    with pytest.raises(ValueError, match="naive"):
        shadow().explain(naive)


def test_to_dict_is_what_an_http_api_returns() -> None:
    east = timezone(timedelta(hours=2))
    read = shadow(
        desired={"mode": "heat"}, last_seen_at=datetime.now(UTC), shadow_updated_at=datetime(2026, 11, 1, 14, tzinfo=east)
    )  # fmt: skip

    assert json.loads(json.dumps(read.to_dict())) == {
        "device_id": "thermostat-1",
        "desired": {"mode": "heat"},
        "reported": {"target_c": 21.5, "mode": "eco", "schedule": {"mon": [6, 22]}},
        "delta": {"mode": "heat"},
        "is_converged": False,
        "desired_version": 7,
        "reported_version": 7,
        "sync_status": "synced",
        "refusal": None,
        "shadow_updated_at": "2026-11-01T12:00:00+00:00",
    }
    assert shadow(shadow_updated_at=None).to_dict()["shadow_updated_at"] is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "thermostat-1 is synced: version 7 is acknowledged and nothing differs, last seen at 2026-11-01 11:59:00 UTC."),
        (
            {"desired_version": 8, "desired": {"mode": "heat", "target_c": 21.5}},
            "thermostat-1 is pending: version 8 is not acknowledged (the device is at 7), and 'mode' differs, "
            "last seen at 2026-11-01 11:59:00 UTC.",
        ),
        (
            {"desired_version": 8},
            "thermostat-1 is pending: version 8 is not acknowledged (the device is at 7) and nothing differs, "
            "last seen at 2026-11-01 11:59:00 UTC.",
        ),
        (
            {"reported": {}},
            "thermostat-1 has drifted: version 7 is acknowledged, but 'target_c', 'mode', 'schedule' differ, "
            "last seen at 2026-11-01 11:59:00 UTC.",
        ),
        (
            {"desired": {f"k{n}": n for n in range(7)}, "reported": {}, "last_seen_at": NOW - timedelta(hours=2)},
            "thermostat-1 is stale: version 7 is acknowledged, but 'k0', 'k1', 'k2', 'k3', 'k4' and 2 more differ, "
            "silent since 2026-11-01 10:00:00 UTC.",
        ),
        (
            {"last_seen_at": None, "desired_version": 1, "reported_version": 0, "reported": {}, "desired": {"a": 1}},
            "thermostat-1 is stale: version 1 is not acknowledged (the device is at 0), and 'a' differs, it was never seen.",
        ),
        (
            {"reported_version": 9},
            "thermostat-1 is pending: the device acknowledged version 9, which is ahead of the desired version 7 "
            "and nothing differs, last seen at 2026-11-01 11:59:00 UTC.",
        ),
    ],
)  # fmt: skip
def test_explain_says_in_one_sentence_how_the_device_stands(changes: dict[str, Any], sentence: str) -> None:
    assert shadow(**changes).explain(NOW) == sentence


def test_equal_shadows_have_equal_hashes() -> None:
    assert hash(shadow(desired={"a": [1]})) == hash(shadow(desired={"a": [1.0]}))
    assert len({shadow(desired_version=8), shadow(desired_version=8), shadow(desired_version=9)}) == 2
