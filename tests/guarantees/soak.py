"""A long load with faults, on a durable PostgreSQL of its own; proves every few minutes that nothing was lost.

    python -m tests.guarantees.soak --minutes 30

Writers run all the time, at READ COMMITTED, REPEATABLE READ and SERIALIZABLE in turn, while the server is shut down and
killed under them, connections are cut, statements cancelled, rows held locked, timeouts fire, pools are full, and
writers die. A request whose answer was lost is made again until it is answered. Every other phase ends with a rollback
to revision 075 under that load; then the writers end, as in a deployment, and the database is migrated again. Exit code
1 on any violation: the records and the history then stay in the folder that is named.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final

from sqlalchemy import NullPool, create_engine

from iot_models import migrate
from tests.databases.durable_server import DurableServer, durable_postgres
from tests.guarantees.load.faults import Faults
from tests.guarantees.load.history import Fleet, keep_history, read_fleet
from tests.guarantees.load.many_writers import Findings, Load
from tests.guarantees.load.workload import DEVICES, TENANTS
from tests.guarantees.load.writer import Plan

if TYPE_CHECKING:
    from collections.abc import Sequence

_LEVELS: Final = ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")
_PROGRESS_SECONDS: Final = 5.0


@dataclass
class Tally:
    """What the run has come to so far."""

    began: float = field(default_factory=time.monotonic)
    units: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    by_level: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    versions: int = 0
    requests: int = 0
    repeats: int = 0
    checks: int = 0
    violations: list[str] = field(default_factory=list)

    def add(self, findings: Findings, level: str, before: Fleet) -> None:
        self.units.update(unit.outcome for unit in findings.units)
        self.errors.update(findings.errors)
        self.by_level[level] += len(findings.units)
        self.calls += sum(len(unit.operations) for unit in findings.units)
        self.versions += sum(
            state.desired_version - before.states[key].desired_version for key, state in findings.after.states.items()
        )
        requests = findings.requests()
        self.requests += len(requests)
        self.repeats += requests.total() - len(requests)
        self.checks += 1
        self.violations += findings.violations

    def seconds(self) -> float:
        return time.monotonic() - self.began


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code: 0 if nothing was lost, 1 if something was, 130 for Ctrl-C with nothing lost so far."""
    parser = argparse.ArgumentParser(description="A long load with faults that proves that nothing was lost.")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=None, help="of all random choices; printed, and random by default")
    parser.add_argument("--processes", type=int, default=4, help="writers at once")
    parser.add_argument("--phase", type=float, default=60, metavar="SECONDS", help="from one check to the next")
    given = parser.parse_args(arguments)
    seed = given.seed if given.seed is not None else time.time_ns() % 1_000_000
    folder = Path(tempfile.mkdtemp(prefix="iot_models_soak_"))
    tally, interrupted = Tally(), False
    with durable_postgres() as server:
        faults = Faults(server, Random(seed))  # noqa: S311 - to be repeated
        _say(f"{given.minutes:g} minutes, {given.processes} writers, seed {seed}; records in {folder}")
        try:
            _run(server, faults, tally, folder, given, seed)
        except KeyboardInterrupt:
            interrupted = True
        if tally.violations:
            (folder / "server.log").write_text(server.log())
    _say(_summary(tally, faults, f"--minutes {given.minutes:g} --seed {seed} --processes {given.processes}"))
    if tally.violations:
        _say(f"The records, the history and the server's log are in {folder}")
        return 1
    shutil.rmtree(folder)
    return 130 if interrupted else 0


def _run(
    server: DurableServer, faults: Faults, tally: Tally, folder: Path, given: argparse.Namespace, seed: int
) -> None:
    """Phase after phase until the time is up or something is lost; each ends with a check."""
    engine = create_engine(server.url, poolclass=NullPool)
    migrate.upgrade(engine)
    keep_history(engine, [(tenant, device) for tenant in TENANTS for device in DEVICES])
    deadline = tally.began + given.minutes * 60
    for number, level in enumerate(cycle(_LEVELS)):
        left = deadline - time.monotonic()
        if left <= 0 or tally.violations:
            return
        with engine.connect() as connection:
            before = read_fleet(connection)
        plan = Plan(server.url, f"p{number}", str(folder), level, seed + 1000 * number, hostile=True)
        load = Load(plan, given.processes)
        interrupted = False
        try:
            with load.writers():
                _phase(load, faults, tally, level, min(left, given.phase))
                if number % 2:
                    faults.roll_back()
        except KeyboardInterrupt:
            interrupted = True  # what was written so far is checked all the same
        migrate.upgrade(engine)
        findings = load.findings(before)
        tally.add(findings, level, before)
        if findings.violations:
            _keep_evidence(folder, before, findings)
        if interrupted:
            raise KeyboardInterrupt


def _phase(load: Load, faults: Faults, tally: Tally, level: str, seconds: float) -> None:
    """Faults at random intervals; a line of progress now and then."""
    end = time.monotonic() + seconds
    next_line = time.monotonic() + _PROGRESS_SECONDS
    pause = Random(seconds)  # noqa: S311 - the lengths of pauses
    while (now := time.monotonic()) < end and not load.broken:
        if now >= next_line:
            _say(_progress(load.count() + tally.units, faults, tally, level))
            next_line = now + _PROGRESS_SECONDS
        time.sleep(max(0.0, min(pause.uniform(0.3, 2.5), end - now)))
        faults.inject(load)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _progress(units: Counter[str], faults: Faults, tally: Tally, level: str) -> str:
    counts = "  ".join(f"{units[name]:,} {name}" for name in ("acknowledged", "refused", "unknown"))
    return (
        f"{tally.seconds() / 60:5.1f} min  {level:<15}  {counts}  "
        f"{faults.injected.total()} faults  {tally.checks} checks  {len(tally.violations)} violations"
    )


def _keep_evidence(folder: Path, before: Fleet, findings: Findings) -> None:
    evidence = {
        "violations": findings.violations,
        "before": [[*key, *state] for key, state in before.states.items()],
        "after": [[*key, *state] for key, state in findings.after.states.items()],
        "history": [[*change.key, *change.state, change.site] for change in findings.history],
        "kept": [[*key, version, *row] for key, rows in findings.after.kept.items() for version, row in rows.items()],
    }
    (folder / "evidence.json").write_text(json.dumps(evidence, indent=1))


def _summary(tally: Tally, faults: Faults, arguments: str) -> str:
    def listed(counts: Counter[str]) -> str:
        return ", ".join(f"{name} {count:,}" for name, count in counts.most_common()) or "none"

    return "\n".join(
        [
            "",
            f"    python -m tests.guarantees.soak {arguments}",
            "",
            "| | |",
            "|---|---|",
            f"| time | {tally.seconds() / 60:.1f} minutes, {tally.checks} checks |",
            f"| units of work | {tally.units.total():,} of {tally.calls:,} calls: {listed(tally.units)} |",
            f"| by isolation level | {listed(tally.by_level)} |",
            f"| desired versions | {tally.versions:,}{'' if tally.violations else ', without a gap'} |",
            f"| requests | {tally.requests:,}, repeated {tally.repeats:,} times{'' if tally.violations else ', each done once'} |",
            f"| faults injected | {faults.injected.total():,}: {listed(faults.injected)} |",
            f"| what writers met | {listed(tally.errors)} |",
            f"| **violations** | **{len(tally.violations)}** |",
            *[f"* {violation}" for violation in tally.violations[:20]],
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
