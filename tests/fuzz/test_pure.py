"""Hostile documents and URLs where no database is asked, judged by `judge.pure`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from iot_models import migrate
from tests.fuzz.corpus.awaiting import AWAITING, awaits
from tests.fuzz.corpus.documents import DOCUMENTS
from tests.fuzz.corpus.wire import SECRET, URLS
from tests.fuzz.judge.pure import judge_helpers, judge_url
from tests.fuzz.judge.world import FindingError

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.repeats


@pytest.fixture(autouse=True)
def _no_urls_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IOT_MODELS_DATABASE_URL", raising=False)
    monkeypatch.delenv("DATABASE_URL", raising=False)


def _findings(names: list[str], judge: Callable[[str], object]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            judge(name)
        except FindingError as finding:
            found[name] = f"{name}: {finding}"
    return found


def _judge(entry: str) -> str:
    kind, _, name = entry.partition(", ")
    return judge_url(URLS[name]) if kind == "url" else judge_helpers(DOCUMENTS[name])


ENTRIES = [*(f"url, {name}" for name in URLS), *(f"helpers, {name}" for name in DOCUMENTS)]


def test_hostile_documents_and_urls_are_understood_or_refused() -> None:
    found = _findings([name for name in ENTRIES if not awaits(name)], _judge)

    assert not found, "\n".join(found.values())


def test_what_awaits_a_repair_still_fails() -> None:
    names = [name for name in ENTRIES if name in AWAITING]

    assert list(_findings(names, _judge)) == names


@pytest.mark.parametrize(
    "name", [name for name, url in URLS.items() if isinstance(url, str) and not awaits(f"url, {name}")]
)
def test_the_migrate_command_ends_with_an_error_of_one_kind(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = migrate.main(["current", "-x", f"url={URLS[name]}"])

    said = capsys.readouterr()
    assert code == 1
    assert said.err.startswith("error: ")
    assert SECRET not in said.err + said.out
