"""The examples of docs/devices.md, each with a device that behaves as such devices do.

Every device converges, has never drifted by what it reports besides, and is not pending for ever.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from iot_models import ReportStatus, Shadow, ShadowService, merge_patch
from tests.databases.alembic_runs import CHECKOUT
from tests.databases.devices import DEVICE, TENANT, add_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sqlalchemy.orm import Session

pytestmark = pytest.mark.repeats

PAGE = (CHECKOUT / "docs" / "devices.md").read_text()
EXAMPLES = {code[2 : code.index(":")]: code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)}

# What an operator wants, one after another.
WISHES: list[dict[str, Any]] = [
    {"telemetryConfig": {"sendFrequency": "5m"}, "target_c": 21.5},
    {"telemetryConfig": {"sendFrequency": "1m"}, "hours": [6, 22]},
    {"hours": [6, 22, 23], "target_c": 19},
    {"target_c": 19},  # a no-op has a version, too
]


def example(name: str) -> dict[str, Any]:
    functions: dict[str, Any] = {}
    exec(compile(EXAMPLES[name], "devices.md", "exec"), functions)  # noqa: S102 - our own documentation
    return functions


def test_every_example_is_tried() -> None:
    assert [*EXAMPLES] == ["AWS", "Azure", "Ditto", "ThingsBoard", "plain MQTT"]


@pytest.fixture
def shadows(session: Session) -> ShadowService:
    add_device(session)
    return ShadowService(session, TENANT)


def wishes(
    shadows: ShadowService, patch: Callable[[dict[str, Any]], dict[str, Any]] = lambda wish: wish
) -> Iterator[Shadow]:
    """Each wish is written, then the device has its turn; afterwards it has to be done."""
    for wish in WISHES:
        yield shadows.patch_desired(DEVICE, patch(wish))
        shadow = shadows.get(DEVICE)
        assert (shadow.is_pending, shadow.is_drifted, shadow.nested_delta) == (False, False, {}), shadow.explain()
    assert (shadows.count_pending(), shadows.drifted()) == (0, [])


def test_a_thermostat_of_aws_s_kind_that_echoes_its_delta_converges(shadows: ShadowService) -> None:
    aws = example("AWS")
    published: list[dict[str, Any]] = []

    def publishes(reported: Mapping[str, Any], **more: Any) -> Any:
        accepted, delta = aws["on_update"](
            shadows, DEVICE, {"state": {"reported": reported, **more}, "clientToken": "t-7"}
        )
        assert accepted["clientToken"] == "t-7"
        assert not shadows.get(DEVICE).is_drifted
        published.append(accepted)
        return delta

    for wish in wishes(shadows):
        # It was offline, reports something else first, and is sent what is left to do.
        delta = publishes({"battery": 81, "telemetryConfig": {"status": "success"}}) or aws["delta"](wish)
        if delta:
            assert delta["version"] == wish.desired_version
            assert (
                publishes(delta["state"], desired=None) is None
            )  # the echo, and "I am done" as AWS's own sample says it
    assert shadows.get(DEVICE).desired["hours"] == [6, 22, 23]  # "desired": null took nothing away
    assert shadows.get(DEVICE).reported["battery"] == 81
    aws["on_update"](shadows, DEVICE, {"state": {"reported": None}})  # clears it
    assert shadows.get(DEVICE).reported == {}


@pytest.mark.parametrize("acknowledges", ["$version", "av"])
def test_a_module_twin_of_azure_s_kind_converges(shadows: ShadowService, acknowledges: str) -> None:
    azure = example("Azure")

    for wish in wishes(shadows):
        twin = azure["twin"](wish)
        version = twin["desired"].pop("$version")
        if acknowledges == "$version":
            azure["on_reported"](shadows, DEVICE, {"telemetryConfig": {"status": "success"}, "uptime": 7})
            assert shadows.get(DEVICE).is_pending == (wish.nested_delta != {})
            azure["on_reported"](shadows, DEVICE, twin["desired"] | {"$version": version})
        else:  # property by property: only the last one makes it done
            for key, value in twin["desired"].items():
                azure["on_reported"](shadows, DEVICE, {key: {"value": value, "ac": 200, "av": version, "ad": "ok"}})
                shadow = shadows.get(DEVICE)
                assert shadow.is_pending == (shadow.nested_delta != {})
        assert shadows.get(DEVICE).reported_version == version


def test_what_azure_s_device_has_not_done_yet_is_not_acknowledged(shadows: ShadowService) -> None:
    on_reported = example("Azure")["on_reported"]
    shadows.replace_desired(DEVICE, {"thermostat": {"target": 21}})

    for code in (202, 400, 500):
        component = {"__t": "c", "target": {"value": 21, "ac": code, "av": 1, "ad": ""}}
        assert on_reported(shadows, DEVICE, {"thermostat": component}).reported_version == 0
    component = {"__t": "c", "target": {"value": 21, "ac": 200, "av": 1}}
    assert on_reported(shadows, DEVICE, {"thermostat": component}).reported_version == 1
    assert shadows.get(DEVICE).reported == {"thermostat": {"target": 21}}


def test_a_thing_whose_features_are_merged_converges(shadows: ShadowService) -> None:
    ditto = example("Ditto")

    for wish in wishes(shadows, lambda wish: {"features": {"lamp": {"properties": wish}}}):
        for feature, desired in ditto["wished"](wish).items():
            lamp = {"properties": desired["desiredProperties"] | {"measured_w": 8.5}}
            ditto["on_merge"](shadows, DEVICE, {"path": f"/features/{feature}", "value": lamp})
            assert not shadows.get(DEVICE).is_drifted
        ditto["on_merge"](shadows, DEVICE, {"path": "/", "value": {"attributes": {"location": "hall"}}})
        ditto["on_merge"](shadows, DEVICE, {"path": "/features/a~1b", "value": {"properties": {"on": True}}})
    assert shadows.get(DEVICE).reported["features"]["a/b"] == {"properties": {"on": True}}


def test_a_gateway_with_fifty_children_that_patches_has_them_all_converge(session: Session) -> None:
    thingsboard = example("ThingsBoard")
    children = [f"child-{number:02}" for number in range(50)]
    for child in children:
        add_device(session, child)
    shadows = ShadowService(session, TENANT)

    for wish in WISHES:
        shadows.patch_desired_many(children, wish)
        assert thingsboard["on_gateway_attributes"](shadows, {child: {"rssi": -70} for child in children}) == []
        waiting = list(shadows.iter_pending(batch_size=20))
        done = {shadow.device_id: shadow.nested_delta | {"firmware": {"version": "4.2"}} for shadow in waiting}
        assert thingsboard["on_gateway_attributes"](shadows, done) == []
        assert (shadows.count_pending(), shadows.drifted()) == (0, [])
    (outcome,) = thingsboard["on_gateway_attributes"](shadows, {"child-99": {}, "child-01": {}})
    assert (outcome.device_id, outcome.status) == ("child-99", ReportStatus.UNKNOWN_DEVICE)


def test_a_device_of_thingsboard_s_kind_that_applies_its_shared_attributes_converges(shadows: ShadowService) -> None:
    on_attributes = example("ThingsBoard")["on_attributes"]

    for wish in wishes(shadows):
        on_attributes(shadows, DEVICE, {"network": {"ip": "10.0.0.7", "rssi": -60}, "old": None})
        on_attributes(shadows, DEVICE, wish.delta)
    assert shadows.get(DEVICE).reported["network"] == {"ip": "10.0.0.7", "rssi": -60}


def test_a_device_of_plain_mqtt_that_sends_its_whole_state_every_minute_converges(shadows: ShadowService) -> None:
    mqtt = example("plain MQTT")
    state: dict[str, Any] = {"target_c": 18, "telemetryConfig": {"sendFrequency": "5m", "status": "success"}}

    for wish in wishes(shadows):
        topic = mqtt["retained"](wish)
        for minute in range(4):
            assert not mqtt["on_state"](shadows, DEVICE, state | {"uptime": minute}).is_drifted
            if minute == 2:  # it is slow
                state = merge_patch(state, topic)
    assert shadows.get(DEVICE).reported["telemetryConfig"] == {"sendFrequency": "1m", "status": "success"}
