"""What each command does: one or a few calls of `ShadowService`, and what they return, printed."""

from __future__ import annotations

import getpass
import os
import shlex
import sys
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeGuard

from sqlalchemy import NullPool
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from iot_models import twin
from iot_models._core.json_pointer import pointer
from iot_models.cli.tables import compact, moment, print_json, print_table, say
from iot_models.engine import create_engine, shown
from iot_models.errors import DeviceNotFound, IotModelsError, UnreadableShadow
from iot_models.service import ShadowService

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Generator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from sqlalchemy import Engine

    from iot_models._core.json_pointer import Place
    from iot_models.cli.tables import Row
    from iot_models.history import DesiredVersion
    from iot_models.shadow import Shadow

    # A service in a transaction of its own, which is committed at the end of the block.
    Shadows: TypeAlias = "Callable[[], AbstractContextManager[ShadowService]]"


class _Declined(Exception):
    """The user does not want it."""


def run(given: argparse.Namespace) -> int:
    """Run a parsed command line and return its exit code: 0, or 1 with one line on stderr."""
    where = ""
    try:
        # No connection waits while the user thinks about an answer: each transaction makes its own.
        engine = create_engine(given.url, application_name="iot-models", poolclass=NullPool)
        where = f"{shown(engine.url)}: "
        _COMMANDS[given.command](given, lambda: _service(given, engine))
    except _Declined:
        say(sys.stderr, "declined: nothing is written")
    except SQLAlchemyError as error:
        say(sys.stderr, f"error: {where}{_said_by_the_database(error)}")
    except RecursionError:
        say(sys.stderr, "error: a document is nested too deep to be compared: make it flatter")
    except (IotModelsError, ValueError, ImportError) as error:
        way_out = "" if where or given.url else ", or pass one (--url)"
        say(sys.stderr, f"error: {error}{way_out}")
    else:
        return 0
    return 1


@contextmanager
def _service(given: argparse.Namespace, engine: Engine) -> Generator[ShadowService]:
    actor = _actor(given) if given.writes else None
    with Session(engine) as session, session.begin():
        yield ShadowService(session, given.tenant, actor=actor, bind_tenant=given.bind_tenant)


def _actor(given: argparse.Namespace) -> str:
    if given.actor is not None:
        return str(given.actor)
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container whose user has no name
        return f"uid {os.getuid()}"


def _said_by_the_database(error: SQLAlchemyError) -> str:
    hints: list[str] = getattr(error, "detail", [])
    return " ".join(" ".join([*hints, str(getattr(error, "orig", None) or error)]).split())


# Each of these takes the parsed command line, and what opens a transaction.


def _show(given: argparse.Namespace, shadows: Shadows) -> None:
    with shadows() as service:
        shadow = service.get(given.device)
    if given.json:
        print_json(sys.stdout, shadow.to_dict())
        return
    fields = {
        "desired version": f"{shadow.desired_version}, written: {moment(shadow.shadow_updated_at)}",
        "reported version": f"{shadow.reported_version}, last seen: {moment(shadow.last_seen_at)}",
        "desired": compact(shadow.desired),
        "reported": compact(shadow.reported),
        "differs": compact(shadow.nested_delta),
    }
    if shadow.refusal is not None:
        fields["refused"] = f"{moment(shadow.refused_at, 'at no known time')}: {shadow.refusal}"
    say(sys.stdout, shadow.explain())
    print_table(sys.stdout, ("device", shadow.device_id), list(fields.items()), wide=1)


_STANDS: Final = ("device", "status", "desired", "reported", "last seen", "differs")
_REFUSES: Final = ("device", "desired", "reported", "refused at", "refusal")


def _pending(given: argparse.Namespace, shadows: Shadows) -> None:
    _page(given, shadows, ShadowService.pending, _STANDS, _stands)


def _drifted(given: argparse.Namespace, shadows: Shadows) -> None:
    _page(given, shadows, ShadowService.drifted, _STANDS, _stands)


def _refused(given: argparse.Namespace, shadows: Shadows) -> None:
    _page(given, shadows, ShadowService.refused, _REFUSES, _refuses)


def _page(
    given: argparse.Namespace,
    shadows: Shadows,
    read: Callable[..., list[Shadow]],
    headers: Sequence[str],
    row: Callable[[Shadow], Row],
) -> None:
    with shadows() as service:
        # One more than is shown says whether there are more.
        found = read(service, limit=given.limit + 1, after=given.after)
    page = found[: given.limit]
    if given.json:
        print_json(sys.stdout, [shadow.to_dict() for shadow in page])
    elif not page:
        behind = "" if given.after is None else f" behind {given.after!r}"
        say(sys.stdout, f"no device of tenant {given.tenant!r} is {given.command}{behind}")
    else:
        print_table(sys.stdout, headers, map(row, page), wide=1, cut=True)
        _say_more(len(found) > len(page), "--after", page[-1].device_id)


def _say_more(there_are: bool, option: str, last: object) -> None:  # noqa: FBT001 - of this module only
    if there_are:
        say(sys.stderr, f"there are more: {option} {shlex.quote(str(last))}")


def _stands(shadow: Shadow) -> Row:
    versions = (str(shadow.desired_version), str(shadow.reported_version))
    seen = moment(shadow.last_seen_at)
    return (shadow.device_id, shadow.sync_status().value, *versions, seen, compact(shadow.nested_delta))


def _refuses(shadow: Shadow) -> Row:
    versions = (str(shadow.desired_version), str(shadow.reported_version))
    return (shadow.device_id, *versions, moment(shadow.refused_at, "unknown"), shadow.refusal or "")


def _counts(given: argparse.Namespace, shadows: Shadows) -> None:
    with shadows() as service:
        statuses = {status.value: count for status, count in service.status_counts().items()}
        pending, refused = service.count_pending(), service.count_refused()
    if given.json:
        print_json(sys.stdout, {"status": statuses, "pending": pending, "refused": refused})
        return
    print_table(sys.stdout, ("status", "devices"), [(status, str(count)) for status, count in statuses.items()])
    say(sys.stdout, f"yet to acknowledge the newest version: {pending}; of these refuse it: {refused}")


def _history(given: argparse.Namespace, shadows: Shadows) -> None:
    with shadows() as service:
        # One more than is shown says whether there are more, and whether versions are missing before it.
        found = service.history(given.device, limit=given.limit + 1, before=given.before)
    page = found[: given.limit]
    if given.json:
        print_json(sys.stdout, [version.to_dict() for version in page])
    elif not page:
        before = "" if given.before is None else f" before {given.before}"
        say(sys.stdout, f"no version of {given.device!r}{before} is recorded")
    else:
        missing = {newer.version: _missing(older.version + 1, newer.version - 1) for newer, older in pairwise(found)}
        rows: list[Row] = []
        for version in page:
            rows += [_written(version), *missing.get(version.version, ())]
        headers = ("version", "written", "actor", "reason", "desired")
        print_table(sys.stdout, headers, rows, wide=2, cut=True)
        _say_more(len(found) > len(page), "--before", page[-1].version)


def _missing(first: int, last: int) -> list[str]:
    if first > last:
        return []
    return [
        f"version {first} is not recorded" if first == last else f"versions {first} to {last} are not recorded",
    ]


def _written(version: DesiredVersion) -> Row:
    desired = "(removed)" if version.desired is None else compact(version.desired)
    written = moment(version.written_at, "unknown")
    return (str(version.version), written, version.actor or "-", version.reason or "-", desired)


def _diff(given: argparse.Namespace, shadows: Shadows) -> None:
    with shadows() as service:
        old, new = (service.desired_at(given.device, version).desired for version in (given.v1, given.v2))
    changes = _changes(new or {}, old or {})  # a version that removed the device has no document
    if given.json:
        versions = {"device_id": given.device, "from": given.v1, "to": given.v2}
        print_json(sys.stdout, versions | changes.to_dict())
    elif rows := _rows(changes):
        print_table(sys.stdout, _CHANGE, rows, wide=2)
    else:
        say(sys.stdout, f"versions {given.v1} and {given.v2} of {given.device!r} are equal")


_CHANGE: Final = ("change", "at", "from", "to")


def _changes(new: Mapping[str, Any], old: Mapping[str, Any], place: Place = ()) -> twin.Comparison:
    """What `new` adds, removes and changes over `old`: leaf by leaf, by JSON Pointer. An array is one leaf."""
    here = twin.compare(new, old)
    added, removed, unchanged = _leaves(here.added, place), _leaves(here.removed, place), here.unchanged_count
    changed: dict[str, twin.Change] = {}
    for key, change in here.changed.items():
        if _is_object(change.old) and _is_object(change.new):
            inside = _changes(change.new, change.old, (place, key))
            added |= inside.added
            removed |= inside.removed
            changed |= inside.changed
            unchanged += inside.unchanged_count
        else:
            changed[pointer((place, key))] = change
    return twin.Comparison(added, removed, changed, unchanged)


def _leaves(document: Mapping[str, Any], place: Place) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in document.items():
        if _is_object(value) and value:
            leaves |= _leaves(value, (place, key))
        else:
            leaves[pointer((place, key))] = value
    return leaves


def _is_object(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


def _rows(changes: twin.Comparison) -> list[Row]:
    rows = [
        *(("changed", at, compact(change.old), compact(change.new)) for at, change in changes.changed.items()),
        *(("added", at, "", compact(value)) for at, value in changes.added.items()),
        *(("removed", at, compact(value), "") for at, value in changes.removed.items()),
    ]
    return [*sorted(rows, key=lambda row: row[1])]


def _restore(given: argparse.Namespace, shadows: Shadows) -> None:
    with shadows() as service:
        now, wanted = _now(service, given.device), service.desired_at(given.device, given.version).desired
    if wanted is None:
        raise ValueError(f"version {given.version} removed {given.device!r} and has no document: restore another one")
    _ask(given, now, wanted, f"restore version {given.version}:")
    with shadows() as service:
        written = service.restore_desired(given.device, given.version, **_guarded(given, now))
    _show_written(given, written, now)


def _patch(given: argparse.Namespace, shadows: Shadows) -> None:
    with shadows() as service:
        now = service.get(given.device)
    _ask(given, now, twin.merge_patch(now.desired, given.patch), "patch:")
    with shadows() as service:
        written = service.patch_desired(given.device, given.patch, **_guarded(given, now))
    _show_written(given, written, now)


def _register(given: argparse.Namespace, shadows: Shadows) -> None:
    with shadows() as service:
        try:
            say(sys.stderr, f"{service.get(given.device).explain()} It is there already, and stays as it is.")
        except DeviceNotFound:
            say(sys.stderr, f"{given.device!r} is not there: make it at site {given.site!r}.")
    _confirm(given)
    with shadows() as service:
        written = service.register(given.device, given.site)
    _show_written(given, written)


def _remove(given: argparse.Namespace, shadows: Shadows) -> None:
    with shadows() as service:
        now = _now(service, given.device)
    _ask(given, now, {}, "remove the device; its history stays:")
    with shadows() as service:
        service.remove(given.device, expected_version=_expected(given, now), reason=given.reason)
        (last,) = service.history(given.device, limit=1)
    if given.json:
        print_json(sys.stdout, last.to_dict())
    else:
        say(sys.stdout, f"{given.device!r} is removed: version {last.version} has no document.")


def _now(service: ShadowService, device_id: str) -> Shadow | None:
    """The device as it is; None if its row holds what is no shadow: a restore mends it, and it can be removed."""
    try:
        return service.get(device_id)
    except UnreadableShadow as error:
        say(sys.stderr, str(error))
        return None


def _guarded(given: argparse.Namespace, now: Shadow | None) -> dict[str, Any]:
    return {
        "expected_version": _expected(given, now),
        "reason": given.reason,
        "request_id": given.request_id,
    }


def _expected(given: argparse.Namespace, now: Shadow | None) -> int | None:
    """The version to write on top of: the one that was shown, so that what was confirmed is what is written."""
    if given.expected_version is not None:
        return int(given.expected_version)
    return None if now is None else now.desired_version


def _ask(given: argparse.Namespace, now: Shadow | None, wanted: Mapping[str, Any], what: str) -> None:
    """Show the device and what would change, and go on if the user wants it. On stderr: stdout has the result only."""
    if now is not None:
        say(sys.stderr, now.explain())
    say(sys.stderr, what)
    if rows := _rows(_changes(wanted, {} if now is None else now.desired)):
        print_table(sys.stderr, _CHANGE, rows, wide=2)
    else:
        say(sys.stderr, "nothing in the desired document differs")
    _confirm(given)


def _confirm(given: argparse.Namespace) -> None:
    if given.yes:
        return
    sys.stderr.write("Write this? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        raise _Declined


def _show_written(given: argparse.Namespace, shadow: Shadow, before: Shadow | None = None) -> None:
    if before is not None and shadow.desired_version == before.desired_version:
        say(sys.stderr, f"nothing is written: request {given.request_id!r} was done before")
    if given.json:
        print_json(sys.stdout, shadow.to_dict())
    else:
        say(sys.stdout, shadow.explain())


_COMMANDS: Final[Mapping[str, Callable[[argparse.Namespace, Shadows], None]]] = {
    "show": _show,
    "pending": _pending,
    "drifted": _drifted,
    "refused": _refused,
    "counts": _counts,
    "history": _history,
    "diff": _diff,
    "restore": _restore,
    "patch": _patch,
    "register": _register,
    "remove": _remove,
}
