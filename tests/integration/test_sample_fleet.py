"""The sample fleet: what its names promise is what the service finds."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import func, select

from iot_models import DeviceState, ShadowService, SyncStatus
from iot_models.testing.sample_fleet import SampleFleet, add_sample_fleet

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


@pytest.fixture
def fleet(session: Session) -> SampleFleet:
    return add_sample_fleet(session)


@pytest.fixture
def shadows(session: Session, fleet: SampleFleet) -> ShadowService:
    return ShadowService(session, fleet.tenant_id)


def test_each_device_is_in_the_state_of_its_name(shadows: ShadowService, fleet: SampleFleet) -> None:
    found = shadows.get_many([fleet.synced, fleet.pending, fleet.drifted, fleet.refused, fleet.stale, fleet.new])
    state = {name: (shadow.sync_status(), shadow.is_pending, shadow.is_drifted) for name, shadow in found.items()}

    assert state == {
        "synced": (SyncStatus.SYNCED, False, False),
        "pending": (SyncStatus.PENDING, True, False),
        "drifted": (SyncStatus.SYNCED, False, True),
        "refused": (SyncStatus.PENDING, True, False),
        "stale": (SyncStatus.STALE, False, False),
        "new": (SyncStatus.STALE, False, False),
    }
    assert found[fleet.pending].delta == {"target_c": 23.5}
    assert found[fleet.drifted].delta == {"mode": "auto"}
    assert (found[fleet.pending].desired_version, found[fleet.pending].reported_version) == (4, 3)
    refused = found[fleet.refused]
    assert (refused.desired_version, refused.reported_version, refused.delta) == (4, 3, {"mode": "turbo"})
    assert {name: shadow.refusal for name, shadow in found.items() if shadow.is_refused} == {
        "refused": "mode 'turbo' is not supported"
    }
    silent_since = found[fleet.stale].last_seen_at
    assert silent_since is not None
    assert 3500 < (datetime.now(UTC) - silent_since).total_seconds() < 3700
    assert (found[fleet.new].desired_version, found[fleet.new].desired, found[fleet.new].last_seen_at) == (0, {}, None)


def test_every_question_about_the_fleet_has_an_answer_that_differs_from_the_other_tenants(
    session: Session, shadows: ShadowService, fleet: SampleFleet
) -> None:
    other = ShadowService(session, fleet.other_tenant_id)

    assert (shadows.count_pending(), other.count_pending()) == (2, 6)
    assert [shadow.device_id for shadow in shadows.drifted()] == [fleet.drifted]
    assert other.drifted() == []
    assert [shadow.device_id for shadow in shadows.refused()] == [fleet.refused]
    assert (shadows.count_refused(), other.count_refused()) == (1, 0)
    assert shadows.status_counts() == {SyncStatus.SYNCED: 2, SyncStatus.PENDING: 2, SyncStatus.STALE: 2}
    assert other.status_counts()[SyncStatus.PENDING] == 6
    for device_id in (fleet.synced, fleet.pending, fleet.drifted, fleet.refused, fleet.stale, fleet.new):
        assert shadows.get(device_id).desired != other.get(device_id).desired


def test_nothing_is_committed(session: Session) -> None:
    add_sample_fleet(session)
    session.rollback()
    assert session.scalar(select(func.count()).select_from(DeviceState)) == 0
