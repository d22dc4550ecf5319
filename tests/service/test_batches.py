"""Writing the desired documents of many devices: all or nothing."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import func, inspect, select, text
from sqlalchemy.orm import Session

from iot_models import (
    BatchRejected,
    DeviceNotFound,
    DeviceState,
    DocumentLimits,
    DocumentTooLarge,
    InvalidDocument,
    InvalidVersion,
    Report,
    Shadow,
    ShadowService,
    VersionConflict,
)
from tests.databases.devices import TENANT, add_device
from tests.databases.statements import before_statement, counted_statements

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sqlalchemy import Connection, Engine

    WriteMany = Callable[[ShadowService, Iterable[str], dict[str, Any]], dict[str, Shadow]]

MODES = pytest.mark.parametrize("mode", ["READ COMMITTED", "AUTOCOMMIT"])


def replace(service: ShadowService, device_ids: Iterable[str], document: dict[str, Any]) -> dict[str, Shadow]:
    return service.replace_desired_many(dict.fromkeys(device_ids, document))


def patch(service: ShadowService, device_ids: Iterable[str], document: dict[str, Any]) -> dict[str, Shadow]:
    return service.patch_desired_many(device_ids, document)


@pytest.fixture(params=[replace, patch], ids=["replace", "patch"])
def write(request: pytest.FixtureRequest) -> WriteMany:
    method: WriteMany = request.param
    return method


@pytest.fixture
def service(session: Session) -> ShadowService:
    """Devices a to e at versions 0 to 4, and another tenant's a and z."""
    for n, device_id in enumerate("abcde"):
        add_device(session, device_id, desired_state={"n": n, "fan": {"speed": n}}, desired_version=n)
    add_device(session, "a", tenant_id="globex")
    add_device(session, "z", tenant_id="globex")
    return ShadowService(session, TENANT)


def rows(session: Session | Connection) -> list[Any]:
    """The whole table, by plain SQL."""
    return list(session.execute(text("SELECT * FROM device_state ORDER BY tenant_id, device_id")).all())


def add_fleet(session: Session, count: int) -> list[str]:
    session.execute(
        text("INSERT INTO device_state (tenant_id, site_id, device_id) SELECT 'acme', 's', 'd' || n FROM generate_series(1, :n) n"),
        {"n": count},
    )  # fmt: skip
    return [f"d{n}" for n in range(1, count + 1)]


def shuffled(device_ids: list[str], seed: int) -> list[str]:
    """In another order, with each seed another, and the same in every run."""
    return random.Random(seed).sample(device_ids, len(device_ids))  # noqa: S311 - no secret


# What a batch writes


def test_every_version_rises_by_one_and_the_shadows_come_in_the_order_asked(
    session: Session, service: ShadowService, write: WriteMany
) -> None:
    before = rows(session)

    shadows = write(service, ["d", "a", "c"], {"mode": "heat"})

    assert list(shadows) == ["d", "a", "c"]
    assert [shadow.desired_version for shadow in shadows.values()] == [4, 1, 3]
    assert shadows == {device_id: service.get(device_id) for device_id in shadows}
    assert {shadow.shadow_updated_at for shadow in shadows.values()} == {session.scalar(select(func.now()))}
    untouched = [n for n, (old, new) in enumerate(zip(before, rows(session), strict=True)) if old == new]
    assert [(before[n].tenant_id, before[n].device_id) for n in untouched] == [
        ("acme", "b"), ("acme", "e"), ("globex", "a"), ("globex", "z")
    ]  # fmt: skip


@pytest.mark.parametrize("forced", ["enable_nestloop", "enable_hashjoin", "enable_mergejoin"])
def test_the_order_is_the_callers_whatever_the_plan_is(
    session: Session, service: ShadowService, write: WriteMany, forced: str
) -> None:
    for join in {"enable_nestloop", "enable_hashjoin", "enable_mergejoin"} - {forced}:
        session.execute(text(f"SET LOCAL {join} = off"))

    assert list(write(service, ["d", "a", "e", "c"], {})) == ["d", "a", "e", "c"]


def test_each_device_gets_its_own_document(service: ShadowService) -> None:
    documents: dict[str, dict[str, Any]] = {
        "b": {"x": [1, None, "\\\"{},'%s"]},
        "a": {},
        "e": {"é": 10**30 + 1, "null": None},
    }

    shadows = service.replace_desired_many(documents)

    assert {device_id: shadow.desired for device_id, shadow in shadows.items()} == documents


def test_one_patch_is_merged_into_each_device_as_rfc_7396_says(service: ShadowService) -> None:
    shadows = service.patch_desired_many(["c", "b"], {"n": None, "fan": {"auto": True}})

    assert shadows["c"].desired == {"fan": {"speed": 2, "auto": True}}
    assert shadows["b"].desired == {"fan": {"speed": 1, "auto": True}}


def test_a_patch_reads_and_writes_no_device_of_another_tenant(session: Session) -> None:
    for tenant_id in ("aardvark", TENANT, "globex"):  # on either side, in whatever order the rows come
        add_device(session, "a", tenant_id=tenant_id, desired_state={"of": tenant_id})
    add_device(session, "theirs", tenant_id="globex")
    service = ShadowService(session, TENANT)
    before = {tenant_id: ShadowService(session, tenant_id).get("a") for tenant_id in ("aardvark", "globex")}

    assert service.patch_desired_many(["a"], {"n": 1})["a"].desired == {"of": TENANT, "n": 1}
    with pytest.raises(BatchRejected) as caught:
        service.patch_desired_many(["a", "theirs"], {"n": 2})

    assert list(caught.value.errors) == ["theirs"]
    assert {tenant_id: ShadowService(session, tenant_id).get("a") for tenant_id in before} == before


def test_a_patch_keeps_every_number_to_the_last_digit(session: Session) -> None:
    add_device(session)
    add_device(session, "other")
    stored = '{"lat": 52.12345678901234567890, "huge": 1e400, "tiny": 1e-330, "neat": 21.50, "text": "\\\\u00001.5"}'
    session.execute(text("UPDATE device_state SET desired_state = CAST(:d AS jsonb)"), {"d": stored})

    ShadowService(session, TENANT).patch_desired_many(["thermostat-1", "other"], {"b": 1})

    changed = text("SELECT count(*) FROM device_state WHERE desired_state - 'b' = CAST(:d AS jsonb) AND desired_state ? 'b'")  # fmt: skip
    assert session.scalar(changed, {"d": stored}) == 2


def test_a_device_that_is_named_twice_is_patched_once(service: ShadowService) -> None:
    shadows = service.patch_desired_many(iter(["b", "a", "b"]), {"x": 1})

    assert list(shadows) == ["b", "a"]
    assert shadows["b"].desired_version == 2


def test_an_empty_batch_is_no_statement(session: Session, service: ShadowService) -> None:
    with counted_statements(session.connection()) as seen:
        assert service.replace_desired_many({}) == {}
        assert service.replace_desired_many({}, expected_versions={}) == {}
        assert service.patch_desired_many([], {"a": 1}) == {}
    assert seen == []


@pytest.mark.repeats
@pytest.mark.parametrize("count", [1, 10, 1000])
def test_the_number_of_statements_does_not_grow_with_the_batch(
    session: Session, service: ShadowService, count: int
) -> None:
    fleet = add_fleet(session, count)

    with counted_statements(session.connection()) as replacing:
        replace(service, fleet, {"a": 1})
    with counted_statements(session.connection()) as patching:
        patch(service, fleet, {"b": 2})
    with counted_statements(session.connection()) as refused, pytest.raises(BatchRejected):
        replace(service, [*fleet, "nobody"], {"a": 1})
    with counted_statements(session.connection()) as missing, pytest.raises(BatchRejected):
        patch(service, [*fleet, "nobody"], {"a": 1})

    assert [len(seen) for seen in (replacing, patching, refused, missing)] == [1, 2, 2, 1]


@pytest.mark.large
def test_ten_thousand_devices_are_written_in_one_call(session: Session, service: ShadowService) -> None:
    fleet = add_fleet(session, 10_000)
    session.execute(text("ANALYZE device_state"))  # autovacuum may have seen it empty
    fleet = shuffled(fleet, 1)

    shadows = service.replace_desired_many({device_id: {"id": device_id} for device_id in fleet})

    assert list(shadows) == fleet
    count = text("SELECT count(*) FROM device_state WHERE desired_version = 1 AND desired_state ->> 'id' = device_id")
    assert session.scalar(count) == 10_000
    patched = service.patch_desired_many(fleet, {"n": 1})
    assert patched["d77"].desired == {"id": "d77", "n": 1}
    assert {shadow.desired_version for shadow in patched.values()} == {2}


@pytest.mark.large
def test_a_hundred_thousand_devices_that_do_not_exist_are_all_listed(service: ShadowService, write: WriteMany) -> None:
    with pytest.raises(BatchRejected) as caught:
        write(service, [f"n{n}" for n in range(100_000)], {})

    assert len(caught.value.errors) == 100_000


# All or nothing


@MODES
def test_every_device_that_stands_in_the_way_is_listed_and_nothing_is_written(own_engine: Engine, mode: str) -> None:
    with Session(own_engine) as session, session.begin():
        for n, device_id in enumerate("abcde"):
            add_device(session, device_id, desired_version=n)
        add_device(session, "theirs", tenant_id="globex")
    with own_engine.connect() as connection:
        before = rows(connection)

    with Session(own_engine.execution_options(isolation_level=mode)) as session:
        service = ShadowService(session, TENANT, limits=DocumentLimits(max_bytes=60))
        with pytest.raises(BatchRejected) as caught:
            service.replace_desired_many(
                {
                    "nobody": {},
                    "a": {"fine": 1},
                    "e": {"late": 1},
                    "b": {"x": float("nan")},
                    "theirs": {},
                    "c": {"x": "x" * 60},
                    "x\0": {},
                    "d": {"fine": 2},
                },
                expected_versions={"a": 0, "e": 3, "nobody": 0},
            )
        errors = caught.value.errors
        assert {device_id: type(error) for device_id, error in errors.items()} == {
            "nobody": DeviceNotFound,
            "e": VersionConflict,
            "b": InvalidDocument,
            "theirs": DeviceNotFound,
            "c": DocumentTooLarge,
            "x\0": DeviceNotFound,
        }
        assert list(errors) == ["nobody", "e", "b", "theirs", "c", "x\0"]
        conflict = errors["e"]
        assert isinstance(conflict, VersionConflict)
        assert (conflict.device_id, conflict.expected, conflict.actual) == ("e", 3, 4)
        assert rows(session.connection()) == before
        # the caller goes on
        assert service.replace_desired_many({"a": {}}, expected_versions={"a": 0})["a"].desired_version == 1


@MODES
def test_one_missing_overtaken_or_invalid_device_keeps_all_the_others_back(own_engine: Engine, mode: str) -> None:
    with Session(own_engine) as session, session.begin():
        fleet = add_fleet(session, 50)
    with own_engine.connect() as connection:
        before = rows(connection)

    with Session(own_engine.execution_options(isolation_level=mode)) as session:
        service = ShadowService(session, TENANT)
        for write in (replace, patch):
            with pytest.raises(BatchRejected) as caught:
                write(service, [*fleet, "nobody"], {"a": 1})
            assert list(caught.value.errors) == ["nobody"]
        with pytest.raises(BatchRejected) as caught:
            service.replace_desired_many({device_id: {} for device_id in fleet}, expected_versions={"d7": 5})
        assert list(caught.value.errors) == ["d7"]
        with pytest.raises(BatchRejected) as caught:
            service.replace_desired_many({device_id: {} for device_id in fleet} | {"d7": {"a": float("nan")}})
        assert list(caught.value.errors) == ["d7"]
        assert rows(session.connection()) == before


def test_a_patch_lists_the_missing_and_those_that_it_would_make_too_large(session: Session) -> None:
    add_device(session, "a", desired_state={"a": "x" * 50})
    add_device(session, "b", desired_state={"a": "x"})
    service = ShadowService(session, TENANT, limits=DocumentLimits(max_bytes=60))
    before = rows(session)

    with pytest.raises(BatchRejected) as caught:
        service.patch_desired_many(["a", "nobody", "b", "x\0"], {"b": "y" * 20})

    assert {device_id: type(error) for device_id, error in caught.value.errors.items()} == {
        "a": DocumentTooLarge, "nobody": DeviceNotFound, "x\0": DeviceNotFound
    }  # fmt: skip
    assert rows(session) == before
    assert service.patch_desired_many(["b"], {"b": "y" * 20})["b"].desired_version == 1


def test_a_batch_of_invalid_documents_alone_asks_the_database_nothing(session: Session, service: ShadowService) -> None:
    with counted_statements(session.connection()) as seen, pytest.raises(BatchRejected) as caught:
        service.replace_desired_many({"a": {"x": object()}, "b\0": {}})

    assert list(caught.value.errors) == ["a", "b\0"]
    assert seen == []


def test_the_errors_of_a_batch_do_not_keep_its_frames(service: ShadowService) -> None:
    with pytest.raises(BatchRejected) as caught:
        service.replace_desired_many({"a": {"x": object()}})

    assert caught.value.errors["a"].__traceback__ is None


def test_expected_versions_guard_those_that_they_name(service: ShadowService) -> None:
    shadows = service.replace_desired_many({"a": {}, "e": {}}, expected_versions={"e": 4})

    assert [shadow.desired_version for shadow in shadows.values()] == [1, 5]
    for expected in (3, 2**31, 2**63 - 1):
        with pytest.raises(BatchRejected):
            service.replace_desired_many({"a": {}, "e": {}}, expected_versions={"e": expected})
    assert service.get("a").desired_version == 1


# Arguments


@pytest.mark.parametrize("version", ["7", 7.0, True, None, -1, 2**63])
def test_an_expected_version_that_is_no_version_is_refused_by_name(
    session: Session, service: ShadowService, version: Any
) -> None:
    with (
        counted_statements(session.connection()) as seen,
        pytest.raises(InvalidVersion, match=r"expected_versions\['b'\] must be ") as caught,
    ):
        service.replace_desired_many({"a": {}, "b": {}}, expected_versions={"a": 0, "b": version})
    assert repr(version) in str(caught.value)
    assert seen == []


def test_expected_versions_of_devices_that_are_not_written_are_a_mistake(service: ShadowService) -> None:
    with pytest.raises(ValueError, match="devices that the batch does not: 'b', 'nobody'"):
        service.replace_desired_many({"a": {}}, expected_versions={"a": 0, "b": 1, "nobody": 0})
    with pytest.raises(ValueError, match="expected_versions"):
        service.replace_desired_many({}, expected_versions={"a": 0})


def test_what_is_no_batch_is_refused_by_name(service: ShadowService) -> None:
    with pytest.raises(TypeError, match="documents must map device ids to documents, got "):
        service.replace_desired_many([("a", {})])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="device_id must be a str, got 5"):
        service.replace_desired_many({"a": {}, 5: {}})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="got the one string 'abc': put it in a list"):
        service.patch_desired_many("abc", {})
    with pytest.raises(TypeError, match="device_id must be a str, got None"):
        service.patch_desired_many(["a", None], {})  # type: ignore[list-item]


@pytest.mark.parametrize("device_ids", [["a", "b"], []])
def test_a_patch_that_cannot_be_stored_is_one_error_and_sends_nothing(
    session: Session, service: ShadowService, device_ids: list[str]
) -> None:
    with counted_statements(session.connection()) as seen, pytest.raises(InvalidDocument) as caught:
        service.patch_desired_many(device_ids, {"fan": [{"speed": float("inf")}]})
    assert caught.value.path == "/fan/0/speed"
    assert seen == []


# In the caller's session


def test_loaded_objects_show_the_new_values_without_another_statement(
    session: Session, service: ShadowService, write: WriteMany
) -> None:
    device = session.get_one(DeviceState, (TENANT, "b"))
    other = session.get_one(DeviceState, ("globex", "a"))

    shadows = write(service, ["a", "b"], {"x": 1})

    with counted_statements(session.connection()) as seen:
        assert (device.desired_state, device.desired_version) == (shadows["b"].desired, 2)
        assert device.shadow_updated_at == shadows["b"].shadow_updated_at
        assert other.desired_version == 0
    assert seen == []
    assert device not in session.dirty


def test_changes_of_the_callers_that_are_not_flushed_are_kept(
    session: Session, service: ShadowService, write: WriteMany
) -> None:
    device = session.get_one(DeviceState, (TENANT, "b"))
    with session.no_autoflush:
        device.status = "ONLINE"
        device.reported_state = {"mine": 1}
        write(service, ["a", "b"], {"x": 1})
        assert (device.status, device.reported_state) == ("ONLINE", {"mine": 1})
        assert inspect(device).attrs.reported_state.history.has_changes()


# Others at the same time


def test_a_device_that_appears_between_the_write_and_the_diagnosis_lets_the_batch_through(own_engine: Engine) -> None:
    with Session(own_engine) as session, session.begin():
        add_device(session, "a")

    def arrive() -> None:
        with Session(own_engine) as other, other.begin():
            add_device(other, "b")

    with Session(own_engine) as session, session.begin():
        service = ShadowService(session, TENANT)
        before_statement(service, 2, arrive)
        shadows = replace(service, ["a", "b"], {"x": 1})

    assert [shadow.desired_version for shadow in shadows.values()] == [1, 1]


def test_in_autocommit_mode_a_patch_merges_again_with_what_somebody_wrote_in_between(own_engine: Engine) -> None:
    with Session(own_engine) as session, session.begin():
        fleet = add_fleet(session, 3)

    def overtake() -> None:
        with Session(own_engine) as other, other.begin():
            ShadowService(other, TENANT).replace_desired("d2", {"theirs": 1})

    with Session(own_engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        service = ShadowService(session, TENANT)
        before_statement(service, 2, overtake)
        shadows = service.patch_desired_many(fleet, {"ours": 1})

    assert [shadow.desired for shadow in shadows.values()] == [{"ours": 1}, {"theirs": 1, "ours": 1}, {"ours": 1}]
    assert [shadow.desired_version for shadow in shadows.values()] == [1, 2, 1]


WRITERS = 6


def at_once(work: Callable[[int], object]) -> list[Any]:
    start = threading.Barrier(WRITERS)

    def one(n: int) -> object:
        start.wait()
        return work(n)

    with ThreadPoolExecutor(WRITERS) as pool:
        return list(pool.map(one, range(WRITERS)))


@pytest.mark.repeats
@MODES
def test_batches_that_cross_wait_for_each_other_and_never_deadlock(own_engine: Engine, mode: str) -> None:
    rounds, size = 8, 60
    engine = own_engine.execution_options(isolation_level=mode)
    with Session(own_engine) as session, session.begin():
        fleet = add_fleet(session, 80)

    def work(n: int) -> None:
        for turn in range(rounds):
            batch = shuffled(fleet, n + turn * WRITERS)[:size]
            with Session(engine) as session, session.begin():
                service = ShadowService(session, TENANT)
                match n % 3:
                    case 0:
                        replace(service, batch, {"by": n})
                    case 1:
                        outcomes = service.replace_reported_many([Report(device_id, {"n": n}) for device_id in batch])
                        assert {str(outcome.status) for outcome in outcomes} == {"accepted"}
                    case _:
                        patch(service, batch, {f"turn-{turn}": n})

    at_once(work)  # a deadlock would be an OperationalError here

    with own_engine.connect() as connection:
        written = connection.scalar(text("SELECT sum(desired_version) FROM device_state"))
    assert written == WRITERS * 2 // 3 * rounds * size


@MODES
def test_of_many_batches_with_the_same_versions_exactly_one_wins_whole(own_engine: Engine, mode: str) -> None:
    engine = own_engine.execution_options(isolation_level=mode)
    with Session(own_engine) as session, session.begin():
        fleet = add_fleet(session, 40)

    def work(n: int) -> object:
        batch = shuffled(fleet, n)
        with Session(engine) as session, session.begin():
            try:
                return ShadowService(session, TENANT).replace_desired_many(
                    {device_id: {"by": n} for device_id in batch}, expected_versions=dict.fromkeys(batch, 0)
                )
            except BatchRejected as error:
                return error

    results = at_once(work)

    (winner,) = (result for result in results if isinstance(result, dict))
    losers = [result for result in results if isinstance(result, BatchRejected)]
    assert [len(loser.errors) for loser in losers] == [len(fleet)] * (WRITERS - 1)
    with Session(own_engine) as session:
        assert ShadowService(session, TENANT).get_many(winner) == winner


@pytest.mark.repeats
@MODES
def test_concurrent_patches_of_crossing_batches_all_take_effect(own_engine: Engine, mode: str) -> None:
    engine = own_engine.execution_options(isolation_level=mode)
    rounds = 5
    with Session(own_engine) as session, session.begin():
        fleet = add_fleet(session, 20)

    def work(n: int) -> None:
        for turn in range(rounds):
            batch = shuffled(fleet, n)
            with Session(engine) as session, session.begin():
                ShadowService(session, TENANT).patch_desired_many(batch, {f"writer-{n}": {f"turn-{turn}": turn}})

    at_once(work)

    expected = {f"writer-{n}": {f"turn-{turn}": turn for turn in range(rounds)} for n in range(WRITERS)}
    with Session(own_engine) as session:
        shadows = ShadowService(session, TENANT).get_many(fleet).values()
    assert all(shadow.desired == expected for shadow in shadows)
    assert {shadow.desired_version for shadow in shadows} == {WRITERS * rounds}


# A database that does not do as it is told


@pytest.mark.parametrize(("kept_back", "named"), [("true", "'a', 'b', 'c', 'd', 'e'"), ("OLD.device_id = 'b'", "'b'")])
def test_a_batch_that_the_database_suppresses_is_an_error_and_no_endless_loop(
    session: Session, service: ShadowService, write: WriteMany, kept_back: str, named: str
) -> None:
    session.execute(
        text(f"""CREATE FUNCTION pg_temp.skip() RETURNS trigger LANGUAGE plpgsql AS
                 'BEGIN IF {kept_back.replace("'", "''")} THEN RETURN NULL; END IF; RETURN NEW; END'""")
    )
    session.execute(
        text("CREATE TRIGGER skip BEFORE UPDATE ON device_state FOR EACH ROW EXECUTE FUNCTION pg_temp.skip()")
    )

    with pytest.raises(RuntimeError, match="look for a trigger or a row level security policy") as caught:
        write(service, list("abcde"), {"x": 1})
    assert str(caught.value).startswith(named + " of the batch")
