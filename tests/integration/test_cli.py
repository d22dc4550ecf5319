"""The operator's command `iot-models`: what it shows, what it writes, and when it refuses."""

from __future__ import annotations

import getpass
import io
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import pytest
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from iot_models import DeviceState, ShadowService, twin
from iot_models.cli import main
from tests.databases.alembic_runs import CHECKOUT
from tests.databases.devices import DEVICE, TENANT, add_device
from tests.databases.tenants import application
from tests.integration.command_lines import run_here

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Engine

SECRET = "hunter2"  # noqa: S105 - not a real one
NOWHERE = f"postgresql://iot:{SECRET}@127.0.0.1:1/nowhere"
# A bell, an escape sequence that sets a window's title, and a character that turns the writing direction.
HOSTILE = "t\x07\x1b]0;owned\x07\u202e"


class Run(NamedTuple):
    code: int
    out: str
    err: str


class Terminal(io.StringIO):
    """A stream that is a terminal; to read from, or to write to."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IOT_MODELS_DATABASE_URL", "DATABASE_URL", "IOT_MODELS_TENANT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOGNAME", "olga")
    monkeypatch.setattr("sys.stdin", io.StringIO())


@pytest.fixture
def iot_models(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Runs a command line in this process."""

    return lambda *arguments: Run(*run_here(main, arguments, capsys))


@pytest.fixture
def url(own_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> str:
    """The database; the environment names it, and the tenant."""
    url = own_engine.url.render_as_string(hide_password=False)
    monkeypatch.setenv("IOT_MODELS_DATABASE_URL", url)
    monkeypatch.setenv("IOT_MODELS_TENANT", TENANT)
    return url


@pytest.fixture
def shadows(own_engine: Engine, url: str) -> Iterator[ShadowService]:  # noqa: ARG001 - the commands find it, too
    """The service on the same database, in AUTOCOMMIT mode."""
    with Session(own_engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        yield ShadowService(session, TENANT, actor="nightly")


@pytest.fixture
def on_terminal(iot_models: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """The same, with a terminal of 80 columns as stdout."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")

    def run(*arguments: str) -> Run:
        terminal = Terminal()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdout", terminal)
            code, _, err = iot_models(*arguments)
        return Run(code, terminal.getvalue(), err)

    return run


def answer(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(said))


def without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)


def table(printed: str) -> list[list[str]]:
    return [re.split(r" {2,}", line) for line in printed.splitlines()]


def plain(printed: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", printed)


def test_a_device_runs_the_wrong_thing_at_three_in_the_morning(
    iot_models: Callable[..., Run], shadows: ShadowService
) -> None:
    shadows.register("t-1", "berlin")
    shadows.replace_desired("t-1", {"mode": "eco", "fan": {"speed": 2}}, reason="as sold")
    shadows.replace_desired("t-1", {"mode": "boost", "fan": {"speed": 9}, "debug": True}, reason="release 7")
    shadows.replace_reported("t-1", {"mode": "eco", "fan": {"speed": 2}}, acked_version=2)

    shown = iot_models("show", "t-1")
    assert shown.out.startswith("t-1 has drifted: version 2 is acknowledged, but 'fan', 'mode', 'debug' differ")
    assert ["desired", '{"fan":{"speed":9},"mode":"boost","debug":true}'] in table(shown.out)

    history = iot_models("history", "t-1")
    assert [row[:1] + row[2:4] for row in table(history.out)] == [
        ["version", "actor", "reason"],
        ["2", "nightly", "release 7"],
        ["1", "nightly", "as sold"],
        ["0", "-", "-"],
    ]

    assert table(iot_models("diff", "t-1", "1", "2").out) == [
        ["change", "at", "from", "to"],
        ["added", "/debug", "true"],
        ["changed", "/fan/speed", "2", "9"],
        ["changed", "/mode", '"eco"', '"boost"'],
    ]

    restored = iot_models("restore", "t-1", "1", "--yes", "--reason", "7 overheats")
    assert restored.code == 0
    assert "restore version 1:" in restored.err
    assert ["removed", "/debug", "true"] in table(restored.err)
    assert restored.out.startswith("t-1 is pending: version 3 is not acknowledged (the device is at 2) and nothing")

    assert iot_models("show", "t-1").out.splitlines()[0] == restored.out.strip()
    newest = shadows.history("t-1", limit=1)[0]
    assert (newest.actor, newest.reason, newest.desired) == (
        "olga",
        "7 overheats",
        {"mode": "eco", "fan": {"speed": 2}},
    )
    assert iot_models("diff", "t-1", "1", "3").out == "versions 1 and 3 of 't-1' are equal\n"


def test_show_names_the_times_in_utc_and_why_a_device_refuses(
    iot_models: Callable[..., Run], shadows: ShadowService, own_engine: Engine
) -> None:
    shadows.register(DEVICE, "berlin")
    assert ["desired version", "0, written: never"] in table(iot_models("show", DEVICE).out)
    shadows.replace_desired(DEVICE, {"mode": "boost"})
    shadows.refuse_desired(DEVICE, 1, "too hot")
    with own_engine.begin() as connection:
        connection.execute(text("UPDATE device_state SET last_seen_at = '2026-11-01 13:00+01'"))
        connection.execute(text("UPDATE device_state SET refused_at = '2026-11-01 12:30:05.9+00'"))

    fields = table(iot_models("show", DEVICE).out)

    assert ["reported version", "0, last seen: 2026-11-01 12:00:00Z"] in fields
    assert ["refused", "2026-11-01 12:30:05Z: too hot"] in fields


def test_the_pages_show_the_devices_in_question(iot_models: Callable[..., Run], shadows: ShadowService) -> None:
    for device_id in ("hot", "slow", "wrong"):
        shadows.register(device_id, "berlin")
        shadows.replace_desired(device_id, {"fan": {"speed": 2, "on": True}})
        shadows.replace_reported(device_id, {"fan": {"speed": 9, "on": True}}, acked_version=1)
    shadows.patch_desired("slow", {"mode": "eco"})
    shadows.patch_desired("hot", {"mode": "boost"})
    shadows.refuse_desired("hot", 2, "too hot")

    pending, drifted, refused = (iot_models(name) for name in ("pending", "drifted", "refused"))

    assert {pending.code, drifted.code, refused.code} == {0}
    assert table(pending.out)[0] == ["device", "status", "desired", "reported", "last seen", "differs"]
    assert [row[:4] for row in table(pending.out)[1:]] == [["hot", "pending", "2", "1"], ["slow", "pending", "2", "1"]]
    assert table(pending.out)[2][-1] == '{"fan":{"speed":2},"mode":"eco"}'
    assert [row[:4] + row[5:] for row in table(drifted.out)[1:]] == [
        ["wrong", "synced", "1", "1", '{"fan":{"speed":2}}']
    ]
    assert [row[:3] + row[4:] for row in table(refused.out)[1:]] == [["hot", "2", "1", "too hot"]]


def test_a_page_that_is_full_names_the_option_for_the_next_one(
    iot_models: Callable[..., Run], shadows: ShadowService
) -> None:
    for device_id in ("a 1", "b", "c"):
        shadows.register(device_id, "berlin")
        shadows.replace_desired(device_id, {"on": True})

    first = iot_models("pending", "--limit", "1")
    rest = iot_models("pending", "--limit", "2", "--after", "a 1")

    assert [row[0] for row in table(first.out)[1:]] == ["a 1"]
    assert first.err == "there are more: --after 'a 1'\n"
    assert [row[0] for row in table(rest.out)[1:]] == ["b", "c"]
    assert rest.err == ""
    assert iot_models("pending", "--after", "c").out == "no device of tenant 'acme' is pending behind 'c'\n"
    assert iot_models("refused").out == "no device of tenant 'acme' is refused\n"


def test_json_is_one_document_made_of_what_the_service_returned(
    iot_models: Callable[..., Run], shadows: ShadowService
) -> None:
    shadows.register(DEVICE, "berlin")
    shadows.replace_desired(DEVICE, {"fan": {"speed": 1}, "a/b": 1, "same": 0, "was": {"x": 1}})
    shadows.replace_desired(DEVICE, {"fan": {"speed": 2, "on": True}, "same": 0, "new": {"y": {}}, "was": []})

    def asked(*arguments: str) -> Any:
        run = iot_models("--json", *arguments)
        assert (run.code, run.err) == (0, "")
        return json.loads(run.out)

    shadow = shadows.get(DEVICE)
    assert asked("show", DEVICE) == shadow.to_dict()
    assert asked("pending", "--limit", "5") == [shadow.to_dict()]
    assert asked("drifted") == []
    assert asked("counts") == {"status": {"synced": 0, "pending": 0, "stale": 1}, "pending": 1, "refused": 0}
    assert asked("history", DEVICE, "--limit", "2") == [one.to_dict() for one in shadows.history(DEVICE, limit=2)]
    assert asked("diff", DEVICE, "1", "2") == {
        "device_id": DEVICE,
        "from": 1,
        "to": 2,
        "added": {"/fan/on": True, "/new/y": {}},
        "removed": {"/a~1b": 1},
        "changed": {"/fan/speed": {"old": 1, "new": 2}, "/was": {"old": {"x": 1}, "new": []}},
        "unchanged_count": 1,
    }


def test_counts_are_a_table_and_a_sentence(iot_models: Callable[..., Run], shadows: ShadowService) -> None:
    shadows.register(DEVICE, "berlin")
    shadows.replace_desired(DEVICE, {"on": True})

    printed = iot_models("counts").out.splitlines()

    assert table("\n".join(printed[:4])) == [["status", "devices"], ["synced", "0"], ["pending", "0"], ["stale", "1"]]
    assert printed[4] == "yet to acknowledge the newest version: 1; of these refuse it: 0"


def test_the_history_says_which_versions_are_not_recorded(
    iot_models: Callable[..., Run], shadows: ShadowService, own_engine: Engine
) -> None:
    shadows.register(DEVICE, "berlin")
    for number in range(1, 9):
        shadows.replace_desired(DEVICE, {"n": number})
    shadows.remove(DEVICE, reason="scrapped")
    with own_engine.begin() as connection:
        connection.execute(text("DELETE FROM device_shadow_history WHERE desired_version IN (3, 5, 6, 7)"))

    lines = iot_models("history", DEVICE).out.splitlines()

    assert [line.split()[0] if line[0].isdigit() else line for line in lines[1:8]] == [
        "9", "8", "versions 5 to 7 are not recorded", "4", "version 3 is not recorded", "2", "1",
    ]  # fmt: skip
    assert lines[1].endswith("scrapped  (removed)")
    page = iot_models("history", DEVICE, "--limit", "2")
    assert page.out.splitlines()[-1] == "versions 5 to 7 are not recorded"  # that is known from the next page
    assert page.err == "there are more: --before 8\n"
    assert iot_models("history", DEVICE, "--before", "3").out.splitlines()[1].startswith("2 ")
    assert iot_models("history", DEVICE, "--before", "0").out == "no version of 'thermostat-1' before 0 is recorded\n"


def test_a_removed_device_differs_from_its_last_document_by_all_of_it(
    iot_models: Callable[..., Run], shadows: ShadowService
) -> None:
    shadows.register(DEVICE, "berlin")
    shadows.replace_desired(DEVICE, {"mode": "eco"})
    shadows.remove(DEVICE)

    assert table(iot_models("diff", DEVICE, "1", "2").out)[1:] == [["removed", "/mode", '"eco"']]
    assert table(iot_models("diff", DEVICE, "2", "1").out)[1:] == [["added", "/mode", '"eco"']]

    shadows.register(DEVICE, "berlin")
    run = iot_models("restore", DEVICE, "2", "--yes")
    assert (run.code, run.out) == (1, "")
    assert run.err == "error: version 2 removed 'thermostat-1' and has no document: restore another one\n"


def test_a_patch_shows_what_it_would_change_and_asks(
    iot_models: Callable[..., Run], shadows: ShadowService, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadows.register(DEVICE, "berlin")
    shadows.replace_desired(DEVICE, {"mode": "eco", "fan": {"speed": 2}})

    answer(monkeypatch, "\n")
    declined = iot_models("patch", DEVICE, '{"fan": {"speed": null}}')
    assert (declined.code, declined.out) == (1, "")
    assert declined.err.splitlines()[1] == "patch:"
    assert table(declined.err)[2:5] == [
        ["change", "at", "from", "to"],
        ["removed", "/fan/speed", "2"],
        ["Write this? [y/N] declined: nothing is written"],
    ]
    assert shadows.get(DEVICE).desired_version == 1

    answer(monkeypatch, "Y\n")
    written = iot_models("patch", DEVICE, '{"mode": "boost"}', "--request-id", "r-1", "--actor", "cron")
    assert written.code == 0
    assert "version 2 is not acknowledged" in written.out
    newest = shadows.history(DEVICE, limit=1)[0]
    assert (newest.desired, newest.actor, newest.request_id) == ({"mode": "boost", "fan": {"speed": 2}}, "cron", "r-1")

    repeated = iot_models("--json", "patch", DEVICE, '{"mode": "boost"}', "--request-id", "r-1", "--yes")
    assert "nothing in the desired document differs" in repeated.err
    assert "nothing is written: request 'r-1' was done before" in repeated.err
    assert json.loads(repeated.out)["desired_version"] == 2


def test_a_device_whose_row_is_no_shadow_is_restored_or_removed(
    iot_models: Callable[..., Run], shadows: ShadowService, own_engine: Engine
) -> None:
    shadows.register(DEVICE, "berlin")
    shadows.replace_desired(DEVICE, {"mode": "eco"})
    with own_engine.begin() as connection:
        connection.execute(text("UPDATE device_state SET desired_state = 'null', desired_version = 2"))

    restored = iot_models("restore", DEVICE, "1", "--yes")
    assert restored.code == 0, restored.err
    assert "desired_state is no JSON object but null" in restored.err
    assert shadows.get(DEVICE).desired == {"mode": "eco"}
    with own_engine.begin() as connection:
        connection.execute(text("UPDATE device_state SET reported_state = '[]'"))
    assert iot_models("remove", DEVICE, "--yes").code == 0
    assert iot_models("history", DEVICE, "--before", "0").out == f"no version of '{DEVICE}' before 0 is recorded\n"


def test_an_output_that_cannot_be_written_is_an_error_of_one_line(shadows: ShadowService, own_engine: Engine) -> None:
    shadows.register(DEVICE, "berlin")
    url = own_engine.url.render_as_string(hide_password=False)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "iot_models", "--url", url, "--tenant", shadows.tenant_id, "show", DEVICE],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60,
        )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "No space left" in done.stderr


def test_what_was_confirmed_is_written_on_top_of_what_was_shown_only(
    iot_models: Callable[..., Run], shadows: ShadowService, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadows.register(DEVICE, "berlin")
    shadows.replace_desired(DEVICE, {"mode": "eco"})

    class Colleague(Terminal):
        """Who is asked takes so long that another write comes first."""

        def readline(self, *_: object) -> str:  # type: ignore[override]
            shadows.patch_desired(DEVICE, {"mode": "boost"})
            return "y\n"

    for command in (("patch", DEVICE, "{}"), ("restore", DEVICE, "1"), ("remove", DEVICE)):
        version = shadows.get(DEVICE).desired_version
        monkeypatch.setattr("sys.stdin", Colleague())
        run = iot_models(*command)
        assert run.code == 1, run
        assert run.err.splitlines()[-1].endswith(
            f"error: device 'thermostat-1' is at desired_version {version + 1}, not at the expected {version}: read the "
            "shadow again, decide by its current content, and write with its current version"
        )
    run = iot_models("patch", DEVICE, "{}", "--yes", "--expected-version", "1")
    assert "is at desired_version 4, not at the expected 1" in run.err


def test_a_device_is_registered_and_removed_and_its_history_stays(
    iot_models: Callable[..., Run],
    url: str,  # noqa: ARG001 - the environment names it
    own_engine: Engine,
) -> None:
    made = iot_models("register", "t-9", "berlin", "--yes")
    again = iot_models("register", "t-9", "paris", "--yes", "--json")
    assert made.err == "'t-9' is not there: make it at site 'berlin'.\n"
    assert made.out.startswith("t-9 is stale: version 0 is acknowledged")
    assert again.err.endswith("It is there already, and stays as it is.\n")
    assert json.loads(again.out)["device_id"] == "t-9"
    with Session(own_engine) as session:
        assert [row.site_id for row in session.query(DeviceState)] == ["berlin"]

    removed = iot_models("remove", "t-9", "--yes", "--reason", "scrapped")
    assert removed.out == "'t-9' is removed: version 1 has no document.\n"
    assert iot_models("show", "t-9").code == 1
    assert "scrapped" in iot_models("history", "t-9").out

    iot_models("register", "t-9", "berlin", "--yes")
    last = json.loads(iot_models("remove", "t-9", "--yes", "--json").out)
    assert (last["version"], last["desired"], last["actor"]) == (2, None, "olga")


@pytest.mark.parametrize(
    "command", [("patch", "d", "{}"), ("restore", "d", "1"), ("register", "d", "s"), ("remove", "d")]
)
def test_a_write_without_a_terminal_to_ask_on_is_wrong_usage(
    iot_models: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setenv("IOT_MODELS_DATABASE_URL", NOWHERE)
    expected = f"{command[0]} asks before it writes, and there is no terminal to ask on: pass --yes\n"

    run = iot_models(*command, "--tenant", TENANT)
    assert (run.code, run.out) == (2, "")
    assert run.err.endswith(expected)
    monkeypatch.setattr("sys.stdin", None)  # closed
    assert iot_models(*command, "--tenant", TENANT).err.endswith(expected)


def test_who_has_no_name_writes_as_a_number(
    iot_models: Callable[..., Run], shadows: ShadowService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_name() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    shadows.register(DEVICE, "berlin")
    monkeypatch.setattr(getpass, "getuser", no_name)
    monkeypatch.setattr(os, "getuid", lambda: 4711)

    iot_models("patch", DEVICE, '{"on": true}', "--yes")

    assert shadows.history(DEVICE, limit=1)[0].actor == "uid 4711"


def test_what_a_stranger_wrote_does_not_drive_a_terminal(
    on_terminal: Callable[..., Run], shadows: ShadowService
) -> None:
    shadows.register(HOSTILE, "berlin")
    shadows.replace_desired(HOSTILE, {HOSTILE: HOSTILE + "\x7f"}, reason=HOSTILE)
    shadows.refuse_desired(HOSTILE, 1, HOSTILE)

    for arguments in (
        ("show", HOSTILE), ("pending",), ("refused",), ("history", HOSTILE), ("diff", HOSTILE, "0", "1"),
        ("pending", "--limit", "1"), ("show", HOSTILE + "!"), ("show", HOSTILE, "--json"),
        ("patch", HOSTILE, "{}", "--yes"), ("register", HOSTILE, HOSTILE, "--yes"), ("remove", HOSTILE, "--yes"),
    ):  # fmt: skip
        run = on_terminal(*arguments)
        printed = plain(run.out) + run.err
        assert printed.strip()
        assert all(character.isprintable() or character == "\n" for character in printed), arguments


def test_a_terminal_without_rich_shows_lines_that_are_cut_to_its_width(
    on_terminal: Callable[..., Run], shadows: ShadowService, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_rich(monkeypatch)
    shadows.register(DEVICE, "berlin")
    shadows.replace_desired(DEVICE, {"words": "x" * 500}, reason="r" * 100)

    lines = on_terminal("history", DEVICE).out.splitlines()
    shown = on_terminal("show", DEVICE).out

    assert max(map(len, lines)) == 80
    assert f"{'r' * 32}" in lines[1]
    assert lines[1].endswith("...")
    assert "x" * 500 in shown  # not cut: nobody could see the rest


def test_a_terminal_with_rich_shows_a_table_that_cuts_documents_and_no_id(
    on_terminal: Callable[..., Run], shadows: ShadowService, own_engine: Engine
) -> None:
    device = "a-device-with-a-rather-long-name"
    shadows.register(device, "berlin")
    for number in range(1, 6):
        shadows.replace_desired(device, {"words": "x" * 500, "n": number}, reason="[red]r" * 20)
    with own_engine.begin() as connection:
        connection.execute(text("DELETE FROM device_shadow_history WHERE desired_version IN (2, 3)"))

    pending = on_terminal("pending").out
    assert "\x1b[1m" in pending  # bold
    assert max(map(len, plain(pending).splitlines())) <= 80
    assert device in pending
    assert "…" in pending

    words = " ".join(plain(on_terminal("history", device).out).split())
    assert "[red]" in words  # no markup
    assert "versions 2 to 3 are not recorded" in words

    changes = plain(on_terminal("diff", device, "4", "5").out)
    assert ["changed", "/n", "4", "5"] in [line.split() for line in changes.splitlines()]


def test_what_is_piped_is_never_cut(iot_models: Callable[..., Run], shadows: ShadowService) -> None:
    shadows.register(DEVICE, "berlin")
    shadows.replace_desired(DEVICE, {"words": "x" * 5000}, reason="r" * 1000)

    assert "r" * 1000 in iot_models("history", DEVICE).out
    assert "x" * 5000 in iot_models("pending").out


def test_a_character_that_the_encoding_of_the_output_lacks_is_escaped(
    iot_models: Callable[..., Run], shadows: ShadowService, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadows.register("größe", "berlin")
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", ascii_only)

    assert iot_models("show", "größe").code == 0

    ascii_only.seek(0)
    assert ascii_only.read().startswith("gr\\xf6\\xdfe is stale")


def test_the_options_of_all_commands_may_stand_before_the_command_or_behind_it(
    iot_models: Callable[..., Run], shadows: ShadowService, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadows.register(DEVICE, "berlin")
    monkeypatch.setenv("IOT_MODELS_DATABASE_URL", NOWHERE)
    monkeypatch.setenv("IOT_MODELS_TENANT", "globex")

    before = iot_models("--url", url, "--tenant", TENANT, "--json", "show", DEVICE)
    behind = iot_models("show", DEVICE, "--url", url, "--tenant", TENANT, "--json")

    assert before == behind
    assert json.loads(before.out)["device_id"] == DEVICE


def test_the_tenant_is_missing(iot_models: Callable[..., Run], url: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.setenv("IOT_MODELS_TENANT", "")  # counts as absent

    run = iot_models("counts")

    assert (run.code, run.out) == (2, "")
    assert run.err.endswith("iot-models: error: the tenant is missing: pass --tenant, or set IOT_MODELS_TENANT\n")


def test_a_role_under_row_level_security_needs_its_transactions_bound(
    iot_models: Callable[..., Run], own_engine: Engine, server_role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOT_MODELS_TENANT", TENANT)
    with application(own_engine, server_role) as app:
        monkeypatch.setenv("DATABASE_URL", app.url.render_as_string(hide_password=False))

        assert iot_models("show", DEVICE).code == 1
        assert iot_models("show", DEVICE, "--bind-tenant").code == 0
        assert iot_models("patch", DEVICE, '{"on": true}', "--bind-tenant", "--yes").code == 0
        removed = iot_models("--bind-tenant", "remove", DEVICE, "--yes")
        assert removed.out == "'thermostat-1' is removed: version 3 has no document.\n"


def test_what_the_service_refuses_is_one_line_and_exit_code_1(
    iot_models: Callable[..., Run],
    url: str,  # noqa: ARG001 - the environment names it
) -> None:
    for arguments, said in (
        (("show", "nobody"), "tenant 'acme' has no device 'nobody'"),
        (("history", "nobody"), "tenant 'acme' has no device 'nobody'"),
        (("diff", "nobody", "1", "2"), "no document of version 1 of device 'nobody' is kept, none is kept"),
        (("restore", "nobody", "9" * 30, "--yes"), "tenant 'acme' has no device 'nobody'"),
        (("history", "d", "--before", "9" * 30), "before must be an integer from 0 to 2**63 - 1"),
        (("register", "d", "", "--yes"), "site_id"),
        (("remove", "d", "--yes", "--actor", ""), "actor must be text that PostgreSQL can store"),
    ):
        run = iot_models(*arguments)
        assert (run.code, run.out) == (1, ""), arguments
        assert run.err.splitlines()[-1].startswith(f"error: {said}"), run.err
        assert "Traceback" not in run.err


def test_a_document_that_is_nested_too_deep_is_refused(
    iot_models: Callable[..., Run], shadows: ShadowService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_deep(*_: object) -> NoReturn:
        raise RecursionError

    shadows.register(DEVICE, "berlin")
    patch = '{"a":' * 50 + "1" + "}" * 50

    run = iot_models("patch", DEVICE, patch, "--yes")
    assert (run.code, run.out) == (1, "")
    assert run.err.splitlines()[-1].startswith("error: invalid document at '/a/a/a")

    # From Python 3.12 on, json.loads reads what is deeper than functions can call themselves.
    monkeypatch.setattr(twin, "merge_patch", too_deep)
    run = iot_models("patch", DEVICE, patch, "--yes")
    assert (run.code, run.err) == (1, "error: a document is nested too deep to be compared: make it flatter\n")
    assert shadows.get(DEVICE).desired_version == 0


def test_no_error_about_a_database_shows_its_password(
    iot_models: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOT_MODELS_TENANT", TENANT)
    for url, said in (
        (NOWHERE, "error: database nowhere at 127.0.0.1:1: PostgreSQL cannot be reached: start it"),
        (f"postgresql+asyncpg://iot:{SECRET}@db/iot", "error: postgresql+asyncpg is an async driver"),
        (f"postgres//iot:{SECRET}@db/iot", "error: not a database URL"),
        (f"mysql://iot:{SECRET}@db/iot", "error: iot_models works on PostgreSQL"),
        (f"postgresql://iot:{SECRET}@db/iot?plugin=nosuch", "error: "),
        (f"postgresql+psycopg2cffi://iot:{SECRET}@db/iot", "error: postgresql+psycopg2cffi: "),
        ("", "error: no database URL: set IOT_MODELS_DATABASE_URL (or DATABASE_URL)"),
    ):
        run = iot_models("counts", "--url", url)
        assert (run.code, run.out) == (1, "")
        assert run.err.startswith(said), run.err
        assert run.err.count("\n") == 1
        assert SECRET not in run.err
    assert iot_models("counts").err.endswith(", or pass one (--url)\n")


def test_a_connection_that_is_lost_at_the_commit_leaves_open_whether_it_was_written(
    iot_models: Callable[..., Run], shadows: ShadowService, own_engine: Engine
) -> None:
    shadows.register(DEVICE, "berlin")

    def lose(session: Session) -> None:
        pid = session.scalar(text("SELECT pg_backend_pid()"))
        with own_engine.connect() as connection:
            connection.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})

    event.listen(Session, "before_commit", lose)
    try:
        run = iot_models("counts")
    finally:
        event.remove(Session, "before_commit", lose)

    assert run.code == 1
    assert "If this was COMMIT, nobody knows whether it is committed" in run.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((f"postgresql://iot:{SECRET}@db/iot",), "argument COMMAND: invalid choice: iot-models --help says"),
        (("show", "d", "--ulr", NOWHERE), "unrecognized arguments: iot-models --help says"),
        (("show", "d", f"--json={SECRET}"), "argument --json: ignored explicit argument: iot-models show --help says"),
        (("--url", NOWHERE, "migrate", "check"), "the options of migrate stand behind it"),
        (("pending", "--limit", SECRET), "argument --limit: a whole number from 1 on is expected"),
        (("pending", "--limit", "0"), "argument --limit: a whole number from 1 on is expected"),
        (("diff", "d", "1", "-1"), "argument V2: a whole number from 0 on is expected"),
        (("diff", "d", "1", "9" * 5000), "argument V2: a whole number from 0 on is expected"),
        (("patch", "d", f"{{{SECRET}"), "argument JSON: not JSON: Expecting property name"),
        (("patch", "d", "[" * 100_000), "argument JSON: not JSON: maximum recursion depth"),
        (("patch", "d", '{"a": NaN}'), "argument JSON: not JSON: NaN is no JSON value"),
        (("patch", "d", '"hunter2"'), "argument JSON: a JSON object is expected, such as"),
        (("show",), "the following arguments are required: DEVICE"),
    ],
    ids=str,
)
def test_wrong_usage_is_exit_code_2_and_does_not_repeat_what_may_be_a_secret(
    iot_models: Callable[..., Run], arguments: tuple[str, ...], said: str
) -> None:
    run = iot_models(*arguments)

    assert (run.code, run.out) == (2, "")
    assert said in run.err
    assert SECRET not in run.err


def test_without_arguments_the_help_is_printed_and_the_exit_code_is_2(iot_models: Callable[..., Run]) -> None:
    run = iot_models()
    assert (run.code, run.out) == (2, "")
    assert run.err == iot_models("--help").out


@pytest.mark.parametrize(
    "command",
    ["show", "pending", "drifted", "refused", "counts", "history", "diff", "restore", "patch", "register", "remove"],
)
def test_the_help_of_each_command_has_an_example(iot_models: Callable[..., Run], command: str) -> None:
    run = iot_models(command, "--help")
    assert run.code == 0
    assert f"example:\n  iot-models {command}" in run.out


def test_what_stands_behind_migrate_goes_to_the_migrations(iot_models: Callable[..., Run], url: str) -> None:
    assert re.fullmatch(r"\d+ \(head\)\n", iot_models("migrate", "current", "--url", url).out)
    assert iot_models("migrate", "--help").out.startswith("usage: python -m iot_models.migrate")


def test_ctrl_c_at_the_question_writes_nothing_and_ends_quietly(
    iot_models: Callable[..., Run], shadows: ShadowService, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Terminal):
        def readline(self, *_: object) -> str:  # type: ignore[override]
            raise KeyboardInterrupt

    shadows.register(DEVICE, "berlin")
    monkeypatch.setattr("sys.stdin", Interrupted())

    run = iot_models("remove", DEVICE)

    assert (run.code, run.out) == (130, "")
    assert run.err.endswith("Write this? [y/N] \n")
    assert shadows.get(DEVICE).device_id == DEVICE


def test_a_pipe_that_nobody_reads_any_more_ends_the_command_quietly(shadows: ShadowService) -> None:
    shadows.register(DEVICE, "berlin")
    for number in range(5):  # more than the buffers of a pipe and of Python hold
        shadows.replace_desired(DEVICE, {"words": "x" * 30_000, "n": number})
    reading, writing = os.pipe()
    os.close(reading)

    with os.fdopen(writing, "w") as pipe:
        run = subprocess.run(
            [sys.executable, "-m", "iot_models", "history", DEVICE],
            cwd=CHECKOUT,
            check=False,
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
        )

    assert (run.returncode, run.stderr) == (128 + signal.SIGPIPE, "")


def test_python_m_runs_the_command_and_loads_alembic_for_migrate_only(
    shadows: ShadowService,
    own_engine: Engine,  # noqa: ARG001 - the environment names it
) -> None:
    shadows.register(DEVICE, "berlin")
    program = (
        "import sys, runpy; sys.argv[1:] = ['show', 'thermostat-1']\n"
        "try: runpy.run_module('iot_models', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, sorted({'alembic', 'rich'} & set(sys.modules)))"
    )

    run = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, check=True, capture_output=True, text=True)

    assert run.stdout.startswith("thermostat-1 is stale")
    assert run.stdout.endswith("\n0 []\n")


def test_the_script_is_the_same_command() -> None:
    scripts = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["iot-models"].partition(":")
    assert getattr(import_module(module), function) is main


def test_the_devices_of_another_tenant_do_not_exist(
    iot_models: Callable[..., Run], own_engine: Engine, url: str
) -> None:
    with Session(own_engine) as session, session.begin():
        add_device(session, tenant_id="globex", desired_version=1)

    assert url
    assert iot_models("show", DEVICE).code == 1
    assert iot_models("pending").out == "no device of tenant 'acme' is pending\n"
    assert iot_models("pending", "--tenant", "globex").out.count(DEVICE) == 1
