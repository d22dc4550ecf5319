"""A request is done once: repeated, it writes nothing and is answered with the shadow as it stands."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from iot_models import DeviceNotFound, RequestReused, ShadowService, VersionConflict, VersionNotKept
from tests.databases.devices import DEVICE, TENANT, add_device
from tests.databases.statements import counted_statements

if TYPE_CHECKING:
    from collections.abc import Callable

    from iot_models import Shadow

    Write = Callable[..., Shadow]

# A method, what it is asked to write to {"old": 1} at version 7, and other content.
CALLS: dict[str, tuple[Any, Any]] = {
    "replace_desired": ({"n": 1.5}, {"n": 2}),
    "patch_desired": ({"n": {"m": [1, 2]}, "old": None}, {"n": {"m": [1]}}),
    "restore_desired": (6, 7),
}


@pytest.fixture
def service(session: Session) -> ShadowService:
    add_device(session, desired_state={"before": 1}, desired_version=6)
    service = ShadowService(session, TENANT, actor="anna")
    service.replace_desired(DEVICE, {"old": 1})
    return service


def versions(service: ShadowService) -> list[int]:
    return [version.version for version in service.history(DEVICE)]


@pytest.mark.parametrize("method", CALLS)
def test_a_repeat_writes_nothing_and_returns_the_shadow_as_it_stands(service: ShadowService, method: str) -> None:
    content, _ = CALLS[method]
    first = getattr(service, method)(DEVICE, content, request_id="r-1")
    assert getattr(service, method)(DEVICE, content, request_id="r-1", reason="again") == first
    service.patch_desired(DEVICE, {"later": True})

    repeated = getattr(service, method)(DEVICE, content, request_id="r-1")

    assert repeated == service.get(DEVICE)
    assert (repeated.desired_version, versions(service)) == (9, [9, 8, 7, 6])
    assert service.desired_at(DEVICE, 8).request_id == "r-1"


@pytest.mark.parametrize("method", CALLS)
def test_a_repeat_is_no_conflict_though_its_version_is_overtaken(service: ShadowService, method: str) -> None:
    content, _ = CALLS[method]
    getattr(service, method)(DEVICE, content, expected_version=7, request_id="r-1")
    assert getattr(service, method)(DEVICE, content, expected_version=7, request_id="r-1").desired_version == 8
    with pytest.raises(VersionConflict):
        getattr(service, method)(DEVICE, content, expected_version=7, request_id="r-2")


@pytest.mark.parametrize("method", CALLS)
def test_the_same_id_with_other_content_is_refused_and_nothing_is_written(service: ShadowService, method: str) -> None:
    content, other = CALLS[method]
    getattr(service, method)(DEVICE, content, request_id="r-1")
    before = service.get(DEVICE)

    with pytest.raises(RequestReused) as caught:
        getattr(service, method)(DEVICE, other, request_id="r-1")

    assert (caught.value.device_id, caught.value.request_id, caught.value.version) == (DEVICE, "r-1", 8)
    assert service.get(DEVICE) == before


def test_an_id_belongs_to_one_device_of_one_tenant(session: Session, service: ShadowService) -> None:
    add_device(session, "other")
    add_device(session, tenant_id="globex")
    service.replace_desired(DEVICE, {"n": 1}, request_id="r-1")
    assert service.replace_desired("other", {"n": 2}, request_id="r-1").desired == {"n": 2}
    assert ShadowService(session, "globex").replace_desired(DEVICE, {"n": 3}, request_id="r-1").desired == {"n": 3}


def test_the_document_is_compared_as_json_and_not_as_text(service: ShadowService) -> None:
    service.replace_desired(DEVICE, {"a": 1, "b": 2.0}, request_id="r-1")
    assert service.replace_desired(DEVICE, {"b": 2, "a": 1.0}, request_id="r-1").desired_version == 8
    with pytest.raises(RequestReused):
        service.replace_desired(DEVICE, {"a": True, "b": 2}, request_id="r-1")


def test_a_patch_is_compared_by_what_it_makes_of_the_version_before(service: ShadowService) -> None:
    service.patch_desired(DEVICE, {"n": 1}, request_id="r-1")
    with pytest.raises(RequestReused):
        service.patch_desired(DEVICE, {"n": 1, "old": 2}, request_id="r-1")
    with pytest.raises(RequestReused):  # it would change nothing now
        service.patch_desired(DEVICE, {}, request_id="r-1")


def test_a_patch_is_compared_by_what_it_changes_if_the_version_before_is_not_kept(
    session: Session, service: ShadowService
) -> None:
    service.patch_desired(DEVICE, {"n": 1}, request_id="r-1")
    session.execute(text("UPDATE device_shadow_history SET desired_state = 'null' WHERE desired_version = 7"))
    assert service.patch_desired(DEVICE, {"n": 1}, request_id="r-1").desired_version == 8
    session.execute(text("DELETE FROM device_shadow_history WHERE desired_version = 7"))
    assert service.patch_desired(DEVICE, {"n": 1}, request_id="r-1").desired_version == 8
    with pytest.raises(RequestReused):
        service.patch_desired(DEVICE, {"n": 2}, request_id="r-1")


def test_a_restore_is_repeated_though_the_version_that_it_restored_was_pruned(
    session: Session, service: ShadowService
) -> None:
    service.restore_desired(DEVICE, 6, request_id="r-1")
    session.execute(text("DELETE FROM device_shadow_history WHERE desired_version = 6"))
    assert service.restore_desired(DEVICE, 6, request_id="r-1").desired_version == 8
    with pytest.raises(RequestReused):
        service.restore_desired(DEVICE, 99, request_id="r-1")
    with pytest.raises(VersionNotKept):
        service.restore_desired(DEVICE, 99, request_id="r-2")


def test_a_restore_of_what_a_device_was_registered_with_is_repeated(service: ShadowService) -> None:
    service.remove(DEVICE)
    version = service.register(DEVICE, "berlin").desired_version
    service.restore_desired(DEVICE, version, request_id="r-1")
    assert service.restore_desired(DEVICE, version, request_id="r-1").desired_version == version + 1


def test_a_request_can_be_done_again_once_its_version_is_pruned(session: Session, service: ShadowService) -> None:
    service.replace_desired(DEVICE, {"n": 1}, request_id="r-1")
    service.replace_desired(DEVICE, {"n": 2})
    session.execute(text("UPDATE device_shadow_history SET written_at = now() - INTERVAL '2 days'"))
    assert service.prune_history(older_than=timedelta(days=1)) == 3
    assert service.replace_desired(DEVICE, {"n": 1}, request_id="r-1").desired_version == 10


def test_a_first_request_costs_no_more_statements_but_that_a_patch_looks_for_it(
    session: Session, service: ShadowService
) -> None:
    calls: list[tuple[int, Callable[[], Shadow]]] = [
        (1, lambda: service.replace_desired(DEVICE, {"n": 1}, request_id="r-1")),
        (3, lambda: service.patch_desired(DEVICE, {"n": 2}, request_id="r-2")),
        (1, lambda: service.restore_desired(DEVICE, 7, request_id="r-3")),
    ]
    for expected, call in calls:
        with counted_statements(session.connection()) as statements:
            call()
        assert len(statements) == expected


def test_a_repeat_for_a_device_that_is_gone_says_that_it_is_gone(service: ShadowService) -> None:
    service.replace_desired(DEVICE, {"n": 1}, request_id="r-1")
    service.remove(DEVICE)
    for method in ("replace_desired", "patch_desired"):
        with pytest.raises(DeviceNotFound):
            getattr(service, method)(DEVICE, {"n": 1}, request_id="r-1")


def test_a_request_of_an_earlier_life_is_done_and_writes_nothing_in_this_one(service: ShadowService) -> None:
    service.replace_desired(DEVICE, {"n": 1}, request_id="r-1")
    service.remove(DEVICE)
    service.register(DEVICE, "berlin")
    assert service.replace_desired(DEVICE, {"n": 1}, request_id="r-1").desired == {}


@pytest.mark.parametrize("level", ["READ COMMITTED", "AUTOCOMMIT"])
@pytest.mark.parametrize("method", ["replace_desired", "patch_desired"])
def test_of_many_repeats_at_the_same_moment_one_writes(own_engine: Engine, level: str, method: str) -> None:
    engine = own_engine.execution_options(isolation_level=level)
    with Session(own_engine) as session, session.begin():
        add_device(session)

    def ask(_: int) -> int:
        with Session(engine) as session:
            version = getattr(ShadowService(session, TENANT), method)(
                DEVICE, {"n": 1}, request_id="r-1"
            ).desired_version
            session.commit()
            return int(version)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(32))) == {1}
    with Session(own_engine) as session:
        assert versions(ShadowService(session, TENANT)) == [1, 0]
