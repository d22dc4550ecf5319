"""Break the code on purpose, one guarantee at a time, and demand that a test notices.

    python .ci/breaks.py                 all of them
    python .ci/breaks.py lock tenant     those whose name holds one of these words
    python .ci/breaks.py --by FILE ...   caught by these test files, not by those that each break names

Each break is made in a copy of the checkout (the files that git tracks or would add, as they are now). Its tests must
pass there unbroken, and one of them must fail within two minutes with the break. A text to break that is not there
exactly once is an error: this list cannot rot.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
SECONDS = 120


@dataclass(frozen=True)
class Break:
    """What goes wrong; the file, the text that keeps it from going wrong, and what stands there instead."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


DESIRED = "tests/service/test_desired.py"
REPORTED = "tests/service/test_reported.py"
BATCHES = "tests/service/test_batches.py"
REPORTS = "tests/service/test_batch_reports.py"
READS = "tests/service/test_reads.py"
FLEET = "tests/service/test_fleet.py"
CONCURRENCY = "tests/service/test_concurrency.py"
SESSION = "tests/service/test_in_a_session.py"
ORM = "tests/service/test_orm_guard.py"
GUARD = "tests/service/test_the_version_that_guards.py"
HISTORIES = "tests/guarantees/test_orm_histories.py"
EXTENDED = "tests/integration/test_classes_that_extend_device_state.py"
CONVERGED = "tests/service/test_ack_if_converged.py"
UNREADABLE = "tests/service/test_unreadable_rows.py"
OBSTACLES = "tests/migrations/test_obstacles.py"
ROLLBACK = "tests/migrations/test_rollback.py"
TWIN = "tests/unit/test_twin.py"
BESIDE = "tests/migrations/test_beside_another_history.py"
HISTORY = "tests/service/test_history.py"
REQUESTS = "tests/service/test_requests.py"
REFUSALS = "tests/service/test_refusals.py"
LIFE = "tests/service/test_life.py"
CHANGES = "tests/service/test_changes.py"
PARKED_TOO = "tests/migrations/test_history_and_refusals.py"
WAYS_AROUND = "tests/security/test_ways_around.py"
OUR_TABLES = "tests/security/test_tables_of_ours.py"
IN_AN_ENV = "tests/migrations/test_in_a_teams_env.py"

BREAKS = [
    # Versions
    Break(
        "expected_version guards no write",
        "iot_models/_core/desired_statements.py",
        'guard = [LOCKED.c.desired_version == bindparam("expected", type_=BigInteger)] if guarded else []',
        "guard = []",
        (DESIRED,),
    ),
    Break(
        "a write that changes nothing does not raise the version",
        "iot_models/_core/desired_statements.py",
        "    version = func.greatest(found.c.desired_version, found.c.newest) + 1\n    request",
        "    version = func.greatest(found.c.desired_version, found.c.newest) + func.num_nonnulls("
        "func.nullif(found.c.desired_state, document))\n    request",
        (DESIRED,),
    ),
    Break(
        "a late report overwrites newer state",
        "iot_models/_core/statements.py",
        "guard.append(conditions.accepted(version, _C))",
        "guard.append(version <= _C.desired_version)",
        (REPORTED,),
    ),
    Break(
        "a late report of a batch overwrites newer state",
        "iot_models/_core/report_rules.py",
        "acked_version < versions.reported:",
        "acked_version < 0:",
        (REPORTS,),
    ),
    Break(
        "a late report of a batch is written by its first statement",
        "iot_models/_core/statements.py",
        "| conditions.accepted(locked.c.acked, locked.c)",
        "| (locked.c.acked <= locked.c.desired_version)",
        (REPORTS,),
    ),
    Break(
        "a version that was never asked is acknowledged",
        "iot_models/_core/statements.py",
        "guard.append(conditions.accepted(version, _C))",
        "guard.append(version >= _C.reported_version)",
        (REPORTED,),
    ),
    Break(
        "LEAST swapped for GREATEST: acknowledging one version acknowledges the newest",
        "iot_models/_core/statements.py",
        "func.least(version, _C.desired_version)",
        "func.greatest(version, _C.desired_version)",
        (REPORTED,),
    ),
    Break(
        "a report without a version acknowledges the newest",
        "iot_models/_core/statements.py",
        '{"reported_state": document, "last_seen_at": not_before(_C.last_seen_at)}',
        '{"reported_state": document, "last_seen_at": func.now(), "reported_version": _C.desired_version}',
        (REPORTED,),
    ),
    Break(
        "a write that a savepoint took back stays in the loaded object",
        "iot_models/_core/loaded_objects.py",
        "if ended.nested:",
        "if not ended.nested:",
        (SESSION,),
    ),
    # Batches
    Break(
        "a batch writes its valid documents before it rejects the invalid ones",
        "iot_models/_core/batches.py",
        "rows = [] if errors else _write_desired(execute, tenant_id, texts, expected, author)",
        "rows = _write_desired(execute, tenant_id, texts, expected, author) if texts else []\n"
        "        rows = [] if errors else rows",
        (BATCHES,),
    ),
    Break(
        "a batch of desired documents writes whom it can",
        "iot_models/_core/desired_statements.py",
        "_write(found, found.c.document, where=all_locked)",
        "_write(found, found.c.document)",
        (BATCHES,),
    ),
    Break(
        "batches lock their rows in no order",
        "iot_models/_core/statements.py",
        "        .order_by(LOCKED.c.device_id)\n",
        "",
        (BATCHES,),
    ),
    Break(
        "who is refused in a batch of reports is not locked in order with the others",
        "iot_models/_core/statements.py",
        "locked = locked_rows(\n        new, carrying=",
        "late = [] if decided else [new.c.acked.is_(None) | new.c.acked.between(LOCKED.c.reported_version,"
        " LOCKED.c.desired_version)]\n    locked = locked_rows(\n        new, *late, carrying=",
        (REPORTS,),
    ),
    Break(
        "an invalid report stops those behind it",
        "iot_models/_core/batches.py",
        "decided, to_write = fold(left.values(),",
        "left = dict(list(left.items())[: next((n for n, r in left.items() if r.document is None), len(left))])\n"
        "        decided, to_write = fold(left.values(),",
        (REPORTS,),
    ),
    Break(
        "a batch of reports writes over what was written since it looked",
        "iot_models/_core/statements.py",
        "(locked.c.desired_version == locked.c.desired) & (locked.c.reported_version == locked.c.reported)",
        "locked.c.device_id == locked.c.device_id",
        (REPORTS,),
    ),
    # Patches
    Break(
        "a patch takes no lock",
        "iot_models/_core/statements.py",
        "        .where(OF_TENANT, OF_DEVICE)\n        .with_for_update(key_share=True)\n",
        "        .where(OF_TENANT, OF_DEVICE)\n",
        (CONCURRENCY,),
    ),
    Break(
        "a patch of desired writes over what was written since it read",
        "iot_models/service.py",
        "guarded=True, recorded=self._records",
        "guarded=False, recorded=self._records",
        (CONCURRENCY,),
    ),
    Break(
        "a patch of reported writes over what was written since it read",
        "iot_models/service.py",
        "if_converged=ack_if_converged, unchanged=True)",
        "if_converged=ack_if_converged, unchanged=False)",
        (CONCURRENCY,),
    ),
    # Tenants
    Break(
        "a report reaches the other tenants' devices of that id",
        "iot_models/_core/statements.py",
        "update(TABLE).where(OF_TENANT, OF_DEVICE, *guard).values(values)",
        "update(TABLE).where(OF_DEVICE, *guard).values(values)",
        (REPORTED,),
    ),
    Break(
        "a batch reaches the other tenants' devices of those ids",
        "iot_models/_core/desired_statements.py",
        ".where(OF_TENANT, _C.device_id == newest.c.device_id)",
        ".where(_C.device_id == newest.c.device_id)",
        (BATCHES,),
    ),
    Break(
        "a patch of many merges with the documents of other tenants",
        "iot_models/_core/statements.py",
        "_C.reported_version, *texts)\n        .where(OF_TENANT, OF_DEVICES)",
        "_C.reported_version, *texts)\n        .where(OF_DEVICES)",
        (BATCHES,),
    ),
    Break(
        "all tenants' devices are counted",
        "iot_models/_core/statements.py",
        'func.count().label("devices")).where(OF_TENANT)',
        'func.count().label("devices"))',
        (FLEET,),
    ),
    # Documents
    Break(
        "documents are not checked before they are sent",
        "iot_models/_core/documents.py",
        "    written_out = _weigh(content, limits)\n",
        "    written_out = 0\n",
        (SESSION, "tests/unit/test_documents.py"),
    ),
    Break(
        "true is equal to 1",
        "iot_models/_core/equality.py",
        "    if isinstance(left, bool) or isinstance(right, bool):\n        return False\n",
        "",
        (TWIN,),
    ),
    Break(
        "a device is converged where @> says so, which takes arrays for sets",
        "iot_models/_core/conditions.py",
        """  WHEN NOT {desired} @? 'strict $.** ? (@.type() == "array")'::jsonpath THEN""",
        "  WHEN true THEN",
        (FLEET,),
    ),
    Break(
        "a device is converged only where each object that it reports is as it was asked",
        "iot_models/shadow.py",
        "return not self.nested_delta",
        "return not self.delta",
        (FLEET,),
    ),
    # Devices that send no version
    Break(
        "a report acknowledges the newest version, whatever it reports",
        "iot_models/_core/statements.py",
        "case((judged.c.is_converged, _C.desired_version), else_=otherwise)",
        "_C.desired_version",
        (CONVERGED,),
    ),
    Break(
        "in a batch a report acknowledges the newest version, whatever it reports",
        "iot_models/_core/statements.py",
        "is_converged = case((where, is_converged), else_=false())",
        "is_converged = where",
        (CONVERGED,),
    ),
    Break(
        "where a device reports twice, one that is not converged is acknowledged",
        "iot_models/_core/report_rules.py",
        "if report.if_converged and _converged(",
        "if report.if_converged or _converged(",
        (CONVERGED, REPORTS),
    ),
    Break(
        "a batch of patches overwrites what another report wrote since it was read",
        "iot_models/_core/statements.py",
        "guard &= _C.reported_state == cast(locked.c.seen, JSONB)",
        "pass",
        ("tests/service/test_batch_patches.py",),
    ),
    Break(
        "a merge patch is made where a null would be lost",
        "iot_models/twin.py",
        "if value is None and not in_array:",
        "if False:",
        (TWIN,),
    ),
    Break(
        "a float that jsonb stored as a long integer is read as an integer",
        "iot_models/_core/stored_json.py",
        "return as_float if Decimal(repr(as_float)) == value else value",
        "return value",
        ("tests/integration/test_long_numbers.py",),
    ),
    # Objects
    Break(
        "an object's write is not guarded by the version that it was read at",
        "iot_models/_core/version_guard.py",
        "statements.write_desired(guarded=True),",
        "statements.write_desired(guarded=False),",
        (ORM,),
    ),
    Break(
        "the version that guards an object's write is the one that the object shows at the flush",
        "iot_models/_core/version_guard.py",
        "read_at: int | None = state.info.get(READ_AT)",
        "read_at: int | None = device.desired_version",
        (HISTORIES,),
    ),
    Break(
        "a write of the service moves the version that guards a change that is not flushed",
        "iot_models/_core/loaded_objects.py",
        """                    if name == "desired_state":
                        state.info[READ_AT] = row.desired_version
""",
        "                state.info[READ_AT] = row.desired_version\n",
        (GUARD,),
    ),
    Break(
        "what merge copies is guarded by the version that the row was just read at",
        "iot_models/_core/version_guard.py",
        "        state.info[READ_AT] = source.info.get(READ_AT)\n",
        "        pass\n",
        (GUARD,),
    ),
    Break(
        "a list that heapq changed is not noticed",
        "iot_models/_core/tracked_documents.py",
        "len(container) == len(container.seen) and all(map(operator.is_, container, container.seen))",
        "True",
        (GUARD,),
    ),
    Break(
        "the service does not find objects of a class that extends DeviceState",
        "iot_models/_core/loaded_objects.py",
        "mappers = DeviceState.__mapper__.self_and_descendants",
        "mappers = [DeviceState.__mapper__]",
        (EXTENDED,),
    ),
    # Rows that others wrote
    Break(
        "a row without a shadow fails its page",
        "iot_models/service.py",
        """            except UnreadableShadow as error:
                log.warning("left out: %s", error)
""",
        """            except UnreadableShadow:
                raise
""",
        (UNREADABLE,),
    ),
    Break(
        "a section that is no object fails what is asked about the tenant in SQL",
        "iot_models/_core/conditions.py",
        "        readable(device),\n        ~converged(",
        "        ~converged(",
        (UNREADABLE,),
    ),
    Break(
        "a write that took effect ends in an error where the other section is no document",
        "iot_models/service.py",
        "            desired, reported = ({} if why_no_document(section) else section for section in sections)\n",
        "            desired, reported = sections\n            raise\n",
        (UNREADABLE,),
    ),
    Break(
        "a time is read by the driver, in the session's time zone",
        "iot_models/_core/column_types.py",
        'return type_coerce(case((readable_time(column), extract("epoch", column - _EPOCH_IN_SQL))), self)',
        "return type_coerce(column, self)",
        (UNREADABLE,),
    ),
    Break(
        "a reported version ahead stays ahead",
        "iot_models/_core/desired_statements.py",
        '        "reported_version": func.least(_C.reported_version, _C.desired_version),\n',
        "",
        (UNREADABLE,),
    ),
    Break(
        "the time of a write falls behind the row's",
        "iot_models/_core/statements.py",
        "return func.greatest(func.least(known, now + literal_column(\"INTERVAL '1 minute'\", Interval)), now)",
        "return now",
        (UNREADABLE,),
    ),
    Break(
        "a number weighs what Python writes of it",
        "iot_models/_core/documents.py",
        "return weight.written_out",
        "return 0",
        ("tests/unit/test_documents.py",),
    ),
    Break(
        "a row is locked so that a foreign key to it waits",
        "iot_models/_core/statements.py",
        """        select(cast(_C[section], Text).label("document"), _C.desired_version, _C.reported_version)
        .where(OF_TENANT, OF_DEVICE)
        .with_for_update(key_share=True)
""",
        """        select(cast(_C[section], Text).label("document"), _C.desired_version, _C.reported_version)
        .where(OF_TENANT, OF_DEVICE)
        .with_for_update()
""",
        (CONCURRENCY,),
    ),
    Break(
        "a change deep inside a loaded document is not noticed",
        "iot_models/_core/tracked_documents.py",
        "        return _Object(value, self) if isinstance(value, dict) else _Array(value, self)",
        "        return value",
        (ORM,),
    ),
    # Pages
    Break(
        "the pages of pending follow another order than their keys",
        "iot_models/_core/statements.py",
        "condition, *behind).order_by(_C.device_id)",
        "condition, *behind).order_by(_C.device_id.desc())",
        (READS, FLEET),
    ),
    Break(
        "iter_pending ends with the first full page",
        "iot_models/service.py",
        "if len(page) < size:",
        "if len(page) <= size:",
        (FLEET,),
    ),
    # Migrations
    Break(
        "the downgrade parks no shadows",
        "alembic/versions/076_device_shadow.py",
        '_move(op.get_bind(), PARK, "parked")',
        "pass",
        (ROLLBACK,),
    ),
    Break(
        "the upgrade puts no shadows back",
        "alembic/versions/076_device_shadow.py",
        "            _put_back(op.get_bind())\n",
        "            pass\n",
        (ROLLBACK,),
    ),
    # What would stop a migration
    Break(
        "what would stop a migration is found half-way",
        "iot_models/_migrations/environment.py",
        "        refuse(found)\n",
        "        pass\n",
        (OBSTACLES,),
    ),
    Break(
        "a shadow outlives its device in a rollback",
        "alembic/versions/076_device_shadow.py",
        "ON DELETE CASCADE ON UPDATE CASCADE;",
        "ON DELETE NO ACTION NOT VALID;",
        (ROLLBACK,),
    ),
    # What an attacker tries
    Break(
        "an id is bound as varchar, and a stranger's operator is the best match",
        "iot_models/_core/column_types.py",
        "        return cast(bindparam, Text)",
        "        return bindparam",
        ("tests/security/test_statements.py",),
    ),
    Break(
        "nobody looks for a stranger's objects",
        "iot_models/_migrations/obstacles.py",
        "    if found := strangers(connection, *besides):",
        "    if found := []:",
        ("tests/security/test_migrations.py",),
    ),
    Break(
        "the function of a downgrade serves any table",
        "alembic/versions/076_device_shadow.py",
        "IF TG_RELID <> CAST({table.id} AS oid) AND NOT EXISTS (",
        "IF FALSE AND NOT EXISTS (",
        ("tests/security/test_migrations.py",),
    ),
    Break(
        "a constraint's error shows the row",
        "iot_models/_core/database_errors.py",
        'return None if about_a_row and not _KEY.match(detail or "") else detail',
        "return detail",
        ("tests/security/test_secrets.py",),
    ),
    Break(
        "a migration's error shows the row",
        "iot_models/_migrations/targets.py",
        '    event.listen(engine, "handle_error", hide_row)\n',
        "",
        ("tests/security/test_secrets.py",),
    ),
    Break(
        "a stranger's name moves the cursor",
        "iot_models/_core/shown_names.py",
        "one if one.isprintable() else",
        "one if True else",
        ("tests/security/test_migrations.py",),
    ),
    Break(
        "a guard makes its folder under a name that everybody reads before",
        "iot_models/testing/throwaway.py",
        '[sys.executable, "-I", __file__, str(folder.parent)]',
        '[sys.executable, "-I", __file__, str(folder.parent), str(folder)]',
        ("tests/integration/test_throwaway_server.py",),
    ),
    Break(
        "a URL is shown with all that it holds",
        "alembic/env.py",
        "cannot reach {shown(target.url)}",
        "cannot reach {target.url.render_as_string(hide_password=False)}",
        ("tests/security/test_secrets.py", "tests/migrations/test_command.py"),
    ),
    Break(
        "whoever made the table is trusted",
        "iot_models/_migrations/strangers.py",
        "FROM written JOIN pg_catalog.pg_class c ON c.oid {=} written.oid",
        "FROM written JOIN pg_catalog.pg_class c ON c.oid {=} written.oid WHERE false",
        ("tests/security/test_migrations.py",),
    ),
    Break(
        "a function with a default argument is not seen, which is called in the place of a column",
        "iot_models/_migrations/strangers.py",
        "p.pronargs OPERATOR(pg_catalog.-) p.pronargdefaults",
        "p.pronargs",
        ("tests/security/test_migrations.py",),
    ),
    Break(
        "a look under a lock asks something for each function that there is",
        "iot_models/_migrations/strangers.py",
        "WHERE p.proname {=} ANY (SELECT b.proname",
        "WHERE p.oid {=} CAST(0 AS oid) OR p.proname {=} ANY (SELECT b.proname",
        ("tests/security/test_migrations.py",),
    ),
    Break(
        "a question about rights compares what only a stranger's operator compares",
        "iot_models/_migrations/obstacles.py",
        "FROM pg_class c WHERE c.oid = ANY (CAST(CAST(CAST(:tables AS text[]) AS regclass[]) AS oid[]))",
        "FROM pg_class c WHERE c.oid = ANY (CAST(CAST(:tables AS text[]) AS regclass[]))",
        ("tests/security/test_statements.py",),
    ),
    Break(
        "printed SQL joins a number and a text, as only a stranger's operator does exactly",
        "alembic/versions/076_device_shadow.py",
        "(SELECT count(*) FROM {PARKED}), ' parked shadows stay",
        "(SELECT count(*) FROM {PARKED}) || ' parked shadows stay",
        ("tests/security/test_statements.py",),
    ),
    Break(
        "printed SQL waits for a lock without an end once an index is built",
        "iot_models/_migrations/indexes.py",
        """f"SET lock_timeout = '{given.get('lock_timeout', LOCK_TIMEOUT)}'\"""",
        '"RESET lock_timeout"',
        ("tests/migrations/test_offline.py",),
    ),
    Break(
        "printed SQL puts shadows back row by row, before it has the lock for the table that it drops",
        "alembic/versions/076_device_shadow.py",
        'op.iot_models_lock_table("device_state", "ACCESS EXCLUSIVE", where_exists=PARKED)',
        "pass",
        ("tests/migrations/test_offline.py",),
    ),
    Break(
        "nobody looks again after a wait",
        "iot_models/_migrations/obstacles.py",
        "if looking or failed or time.monotonic() - last < _FRESH_SECONDS:",
        "if True:",
        ("tests/security/test_migrations.py",),
    ),
    Break(
        "isolation is promised for a role with REPLICATION",
        "iot_models/_core/ways_around.py",
        "WHERE rolreplication AND NOT rolsuper",
        "WHERE false",
        ("tests/integration/test_tenancy_refused_roles.py",),
    ),
    Break(
        "isolation is promised where the schema is somebody else's",
        "iot_models/_core/ways_around.py",
        "JOIN role ON role.oid = nspowner",
        "JOIN role ON false",
        ("tests/integration/test_tenancy_refused_roles.py",),
    ),
    Break(
        "isolation is promised where a cascade runs the role's code",
        "iot_models/_core/ways_around.py",
        "AND (CAST(confdeltype AS text) IN ('c', 'n', 'd') OR CAST(confupdtype AS text) IN ('c', 'n', 'd'))",
        "AND false",
        ("tests/security/test_ways_around.py",),
    ),
    Break(
        "isolation is promised where ANALYZE runs the role's code",
        "iot_models/_core/ways_around.py",
        "pg_attrdef,pg_policy,pg_statistic_ext}'",
        "pg_attrdef,pg_policy}'",
        ("tests/security/test_ways_around.py",),
    ),
    Break(
        "isolation is promised for who may drop what the table needs",
        "iot_models/_core/ways_around.py",
        "AND CAST(s.deptype AS text) = 'o'",
        "AND CAST(s.deptype AS text) = 'x'",
        ("tests/security/test_ways_around.py",),
    ),
    Break(
        "isolation is promised where another table's rule changes the rows",
        "iot_models/_core/ways_around.py",
        "AND refobjid = cause.oid\n",
        "AND false\n",
        ("tests/security/test_ways_around.py",),
    ),
    Break(
        "a rule of a stranger's keeps every role from being enabled",
        "iot_models/_core/ways_around.py",
        "AND (is_callers OR has_table",
        "AND (true OR has_table",
        (f"{WAYS_AROUND}::test_a_rule_of_somebody_who_has_no_right_on_the_table_is_no_reason_to_refuse",),
    ),
    Break(
        "a tenant is set beforehand, and nobody says so",
        "iot_models/_core/ways_around.py",
        "starts_with(lower(setting), CAST(:setting AS text) || '=')",
        "false",
        ("tests/integration/test_tenancy_refused_roles.py",),
    ),
    Break(
        "the policy of tenants allows a tenant that is not bound",
        "iot_models/tenancy.py",
        "((tenant_id = current_setting('{SETTING}'::text, true)) AND (tenant_id <> ''::text))",
        "((tenant_id = current_setting('{SETTING}'::text, true)) OR (tenant_id <> ''::text))",
        ("tests/security/test_tenants.py",),
    ),
    Break(
        "arrays and objects are not counted",
        "iot_models/_core/documents.py",
        "if weight.containers_left < 0:",
        "if False:",
        ("tests/security/test_dear_documents.py", "tests/unit/test_documents.py"),
    ),
    Break(
        "a foreign key to the revision runs a stranger's trigger",
        "iot_models/_migrations/strangers.py",
        "JOIN alone ON alone.oid {=} k.confrelid",
        "JOIN alone ON false",
        (OUR_TABLES,),
    ),
    Break(
        "the rights of others on the parked history stay",
        "iot_models/_migrations/strangers.py",
        "(VERSION_TABLE, PARKED, PARKED_REFUSALS, PARKED_HISTORY)",
        "(VERSION_TABLE, PARKED, PARKED_REFUSALS)",
        (OUR_TABLES,),
    ),
    Break(
        "the copy of a policy calls whatever function matches",
        "alembic/versions/078_shadow_history.py",
        "    op.iot_models_look_again()  # the text",
        "    pass  # the text",
        (OUR_TABLES,),
    ),
    Break(
        "a trigger on a child of the table may be made while shadows are put back",
        "iot_models/_migrations/obstacles.py",
        "FROM family JOIN pg_inherits i ON i.inhparent = family.oid)",
        "FROM family JOIN pg_inherits i ON false)",
        (OUR_TABLES,),
    ),
    Break(
        "isolation is promised where the role may create in the path of a function with the owner's rights",
        "iot_models/_core/ways_around.py",
        "WHERE CASE WHEN named.oid IS NOT NULL THEN",
        "WHERE false AND CASE WHEN named.oid IS NOT NULL THEN",
        ("tests/security/test_ways_around.py",),
    ),
    Break(
        "an error of asyncpg quotes the parameter",
        "iot_models/_core/database_errors.py",
        'kept = argument.group(), f"{argument.group(1)}: its value does not fit"',
        "kept = argument.group(), argument.group()",
        ("tests/security/test_secrets.py",),
    ),
    Break(
        "a view with an index's name is taken for no obstacle",
        "iot_models/_migrations/expectations.py",
        "FROM pg_class c LEFT JOIN pg_index i",
        "FROM pg_class c JOIN pg_index i",
        ("tests/migrations/test_names.py",),
    ),
    # In somebody else's house
    Break(
        "the version table of the application is taken for ours",
        "iot_models/_migrations/version_table.py",
        "    return _adds(scripts[:end]) <= there and not _adds(scripts[end:]) & there\n",
        "    return True\n",
        (BESIDE,),
    ),
    Break(
        "the rest of the search path is searched for our objects",
        "iot_models/_migrations/search_path.py",
        "                  AND NOT EXISTS (SELECT FROM taken WHERE taken.oid {{=}} path.oid)) AS s",
        "                  ) AS s",
        (BESIDE,),
    ),
    Break(
        "our revisions run in an env.py that keeps none of their promises",
        "iot_models/_migrations/environment.py",
        "        raise CommandError(begin.needs)\n",
        "        pass\n",
        (IN_AN_ENV,),
    ),
    Break(
        "a team's env.py looks at nothing before our first revision",
        "iot_models/_migrations/environment.py",
        "    stays_or_rises = look_ahead(migration, options)\n",
        "    stays_or_rises = False\n",
        (IN_AN_ENV,),
    ),
    Break(
        "a connection of the caller's keeps our settings",
        "iot_models/_migrations/environment.py",
        "WHERE pg_catalog.current_setting(was.name) <> was.value",
        "WHERE false",
        (IN_AN_ENV,),
    ),
    Break(
        "autogenerate proposes to drop what is ours",
        "iot_models/_migrations/autogenerate.py",
        "        return name not in _ALONE and (not _is_ours(object) or compare_to is not None)\n",
        "        return name not in _ALONE\n",
        (IN_AN_ENV,),
    ),
    Break(
        "Alembic's own statements find the operators of strangers",
        "iot_models/_migrations/search_path.py",
        '            connection.connection.cursor().execute(f"SET search_path = {where}")\n',
        "            pass\n",
        ("tests/security/test_statements.py",),
    ),
    Break(
        "isolation is enabled in the schema of the search path, and not in the engine's",
        "iot_models/_core/ways_around.py",
        "    schema = connection.schema_for_object(TABLE)\n",
        "    schema = None\n",
        ("tests/integration/test_other_schemas.py",),
    ),
    # History, requests, refusals, a device's life
    Break(
        "a flush leaves no version",
        "iot_models/_core/version_guard.py",
        "desired_statements.write_desired(guarded=True)",
        "desired_statements.write_desired(guarded=True, recorded=False)",
        (HISTORY,),
    ),
    Break(
        "a batch leaves no versions",
        "iot_models/_core/batches.py",
        "write_desired_many(recorded=author is not None)",
        "write_desired_many(recorded=False)",
        (HISTORY,),
    ),
    Break(
        "the state before the first recorded write is lost",
        "iot_models/_core/desired_statements.py",
        "is_lacking = or_(found.c.newest.is_(None), found.c.newest < found.c.desired_version)",
        "is_lacking = found.c.newest < found.c.desired_version",
        (HISTORY,),
    ),
    Break(
        "a restore has another tenant's document",
        "iot_models/_core/desired_statements.py",
        "kept = select(_H.desired_state).where(of_tenant(HISTORY), of_version).scalar_subquery()",
        "kept = select(func.max(cast(_H.desired_state, Text)).cast(JSONB)).where(of_version).scalar_subquery()",
        (HISTORY,),
    ),
    Break(
        "a request is done twice",
        "iot_models/_core/desired_statements.py",
        "    request = _REQUEST if once else _NOBODY\n",
        "    request, once = _NOBODY, False\n",
        (REQUESTS,),
    ),
    Break(
        "a request with other content passes as done",
        "iot_models/service.py",
        "        if not is_same(done):\n",
        "        if False:\n",
        (REQUESTS,),
    ),
    Break(
        "a repeat is a conflict where its version is overtaken",
        "iot_models/service.py",
        'if "request" in binds and (done :=',
        'if "request" in binds and binds["expected"] is None and (done :=',
        (REQUESTS,),
    ),
    Break(
        "a late refusal is accepted",
        "iot_models/_core/conditions.py",
        "newest: ColumnElement[bool] = version == device.desired_version",
        "newest: ColumnElement[bool] = version <= device.desired_version",
        (REFUSALS,),
    ),
    Break(
        "a late refusal of a batch is accepted",
        "iot_models/_core/report_rules.py",
        "not (refused_version == versions.desired > versions.reported)",
        "not (refused_version <= versions.desired)",
        (REFUSALS,),
    ),
    Break(
        "a desired write leaves the refusal of the version before",
        "iot_models/_core/desired_statements.py",
        '        "refused_version": None,\n        "refusal": None,\n        "refused_at": None,\n',
        "",
        (REFUSALS,),
    ),
    Break(
        "a device that is registered again starts at 0",
        "iot_models/_core/desired_statements.py",
        "version = func.coalesce(_resume_of(new.c.devices), 0)",
        'version = literal_column("0")',
        (LIFE,),
    ),
    Break(
        "an object that is added again starts at 0",
        "iot_models/_core/version_guard.py",
        "        if behind:\n",
        "        if False:\n",
        (LIFE,),
    ),
    Break(
        "a device that is written while it is registered skips a version",
        "iot_models/_core/desired_statements.py",
        "    return (_C.desired_version == inserted) & is_earlier\n",
        "    return (_C.desired_version >= inserted) & is_earlier\n",
        (LIFE,),
    ),
    Break(
        "a device that is registered while it is removed starts at 0",
        "iot_models/_core/desired_statements.py",
        "version, version).where(~is_there)",
        "version, version)",
        (LIFE,),
    ),
    Break(
        "a row that SQL by hand made again takes the versions of its earlier life",
        "iot_models/_core/desired_statements.py",
        "    version = func.greatest(found.c.desired_version, found.c.newest) + 1\n    request",
        "    version = found.c.desired_version + 1\n    request",
        (LIFE,),
    ),
    Break(
        "a removal looks like a desired write",
        "iot_models/_core/desired_statements.py",
        "        cast(null(), JSONB(none_as_null=True)),\n",
        "        found.c.desired_state,\n",
        (LIFE,),
    ),
    Break(
        "pruning deletes the newest version",
        "iot_models/_core/history_statements.py",
        "return wanted.where(_OLD.c.desired_version < last_kept)",
        "return wanted.where(_OLD.c.desired_version <= last_kept)",
        (HISTORY,),
    ),
    Break(
        "what an open transaction might precede is read before it, and that one is missed",
        "iot_models/_core/history_statements.py",
        "rows = _changes(_H.transaction_id < _XMIN,",
        "rows = _changes(_H.transaction_id < _XMAX,",
        (CHANGES,),
    ),
    Break(
        "a reader has read what its own transaction has not committed",
        "iot_models/_core/history_statements.py",
        "rows = _changes(_H.transaction_id < _XMIN,",
        "rows = _changes(_H.transaction_id <= _XMIN,",
        (CHANGES,),
    ),
    Break(
        "changes come in the order of their times, which are those at which transactions began",
        "iot_models/_core/history_statements.py",
        "    return rows.order_by(_H.transaction_id, _H.device_id, _H.desired_version).limit(_limit())",
        "    return rows.order_by(_H.written_at, _H.device_id, _H.desired_version).limit(_limit())",
        (CHANGES,),
    ),
    Break(
        "a pruning leaves no mark: versions are missed without a word",
        "iot_models/_core/history_statements.py",
        ".where(_is_version(gone)).add_cte(left)",
        ".where(_is_version(gone))",
        (CHANGES,),
    ),
    Break(
        "a pruning hides that others pruned what is newer",
        "iot_models/_core/history_statements.py",
        "_is_mark(mark), mark.c.transaction_id <= pruned)",
        "_is_mark(mark), mark.c.transaction_id >= func.coalesce(pruned, 0) * 0)",
        (CHANGES,),
    ),
    Break(
        "a cursor whose version was lost in a failover goes on",
        "iot_models/_core/change_cursors.py",
        "    elif place is not None and not any(",
        "    elif place is not None and not place and not any(",
        (CHANGES,),
    ),
    Break(
        "versions of a dump of another cluster are not read",
        "iot_models/_core/history_statements.py",
        "both = union_all(select(*first.c), select(*then.c)).subquery",
        "both = union_all(select(*first.c).where(false()), select(*then.c)).subquery",
        (CHANGES,),
    ),
    Break(
        "a rollback drops the history",
        "alembic/versions/078_shadow_history.py",
        "            ALTER TABLE {HISTORY} RENAME TO {PARKED};\n",
        "            DROP TABLE {HISTORY};\n",
        (PARKED_TOO,),
    ),
    Break(
        "a refusal of an earlier life comes back",
        "alembic/versions/079_shadow_refusal.py",
        '    "AND d.shadow_updated_at IS NOT DISTINCT FROM p.shadow_updated_at"\n',
        '    "AND d.refused_at IS NULL"\n',
        (f"{PARKED_TOO}::test_a_device_that_is_removed_and_made_again_during_the_rollback_has_refused_nothing",),
    ),
    Break(
        "the stream of events takes the first of two tenants",
        "examples/shadow_stream.py",
        'ONCE = ("X-Tenant-Id",)',
        "ONCE: tuple[str, ...] = ()",
        (
            "tests/bus/test_shadow_stream.py::test_a_browser_whose_proxy_adds_a_tenant_to_the_one_that_was_sent_follows_nothing",
        ),
    ),
    Break(
        "pytest shows a piece of a password where it cuts a text",
        "pytest_iot_models.py",
        "return _without_pieces(said, passwords)",
        "return said",
        ("tests/security/test_secrets.py::test_what_is_left_of_a_password_where_pytest_cuts_a_text_is_not_shown",),
    ),
    Break(
        "pytest shows a piece of a password at the end of a line",
        "pytest_iot_models.py",
        "    found += _at_the_ends(line, passwords, pieces)\n",
        "",
        ("tests/security/test_secrets.py::test_no_line_of_a_report_begins_or_ends_with_a_piece_of_the_password",),
    ),
    Break(
        "what a test records shows a password",
        "pytest_iot_models.py",
        "(hidden(name), value if (shown := hidden(said := str(value))) == said else shown)",
        "(name, value)",
        ("tests/security/test_secrets.py::test_a_property_that_a_test_records_does_not_show_the_password",),
    ),
    Break(
        "enable does not look again when it has the lock",
        "iot_models/tenancy.py",
        "    _lock(connection)\n    _refuse_ways_around(connection, role)",
        "    _lock(connection)\n    #",
        (WAYS_AROUND,),
    ),
    Break(
        "a function in an expression of a cascaded table may use the caller's search path",
        "iot_models/_core/ways_around.py",
        "AND fires AND NOT runs.runner = CAST(0 AS oid)",
        "AND fires AND NOT runs.runner = CAST(0 AS oid)\n"
        "          AND user_class = CAST(CAST('pg_trigger' AS regclass) AS oid)",
        (WAYS_AROUND,),
    ),
    Break(
        "a trigger for rows that move to another partition may use the caller's search path",
        "iot_models/_core/ways_around.py",
        "CAST(relkind AS text) = 'p' OR 'd' IN (",
        "'d' IN (",
        (WAYS_AROUND,),
    ),
    Break(
        "of a group's schemas, those that the role itself may not create in are taken for no danger",
        "iot_models/_core/ways_around.py",
        "WHERE NOT rolsuper AND NOT role.oid = target.relowner),",
        "WHERE NOT rolsuper AND NOT role.oid = target.relowner AND subject = 'it'),",
        (f"{WAYS_AROUND}::test_what_reaches_another_tenants_rows_is_found_before_it_is_used",),
    ),
    Break(
        "a function with an empty search path is taken for safe from temporary tables",
        "iot_models/_core/ways_around.py",
        "WHERE setting LIKE 'search_path=%, pg_temp')",
        "WHERE setting IN ('search_path=\"\"', 'search_path=pg_catalog')\n"
        "                   OR setting LIKE 'search_path=%, pg_temp')",
        (WAYS_AROUND,),
    ),
    Break(
        "a rollback brings back a policy that was dropped meanwhile",
        "alembic/versions/078_shadow_history.py",
        "            EXECUTE 'DROP POLICY ' || policy.name || ' ON {PARKED}';\n",
        "            PERFORM policy.name;\n",
        (f"{OUR_TABLES}::test_a_policy_that_was_dropped_during_a_rollback_does_not_come_back_with_the_history",),
    ),
    Break(
        "the history of all tenants is open to who has default privileges",
        "alembic/versions/078_shadow_history.py",
        "    _give_to_the_owner()\n    _revoke_all(HISTORY)\n",
        "    _give_to_the_owner()\n",
        (f"{PARKED_TOO}::test_who_has_a_right_on_the_shadows_has_it_on_their_history_and_nobody_else_has",),
    ),
]


class BrokenListError(Exception):
    """This file, or the tests without any break, must be mended first; the message says where."""


def copy_checkout(to: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT, check=True, capture_output=True, text=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, listed):
        source, target = CHECKOUT / name, to / name
        if source.is_file():  # one that is deleted and not committed yet is listed too
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())


def python(copy: Path, *arguments: str, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run in the copy, so that its modules come before those of the installed checkout."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=copy,
        # No .pyc: two versions of a file may be as long and as old.
        env=os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def pytest(copy: Path, tests: tuple[str, ...], seconds: float) -> subprocess.CompletedProcess[str]:
    return python(
        copy, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:randomly", *tests,
        seconds=seconds,
    )  # fmt: skip


def check_list(copy: Path) -> None:
    """Every text is where it is said to be, once, and it is the copy's code that runs.

    Raises:
        BrokenListError: If not.
    """
    for one in BREAKS:
        found = (copy / one.file).read_text().count(one.old)
        if found != 1:
            raise BrokenListError(f"{one.name}: {found} times in {one.file}, not once:\n{one.old}")
    imported = python(copy, "-c", "import iot_models; print(iot_models.__file__)", seconds=30).stdout.strip()
    if imported != str(copy / "iot_models/__init__.py"):
        raise BrokenListError(f"the tests of the copy in {copy} would import {imported}")


def caught_by(copy: Path, one: Break, tests: tuple[str, ...]) -> str | None:
    """The test that failed with the break; None if none did."""
    path = copy / one.file
    text = path.read_text()
    path.write_text(text.replace(one.old, one.new))
    try:
        done = pytest(copy, tests, SECONDS)
    except subprocess.TimeoutExpired:
        return None
    finally:
        path.write_text(text)
    failed = re.search(r"^FAILED (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    # A collection or a fixture that breaks down is no test that notices.
    return failed[1] if done.returncode == 1 and failed else None


def main() -> int:
    parser = argparse.ArgumentParser(description="Break the code on purpose and demand that a test notices.")
    parser.add_argument("words", nargs="*", help="only breaks whose name holds one of these")
    parser.add_argument("--by", nargs="+", metavar="FILE", help="the test files that have to notice")
    given = parser.parse_args()
    chosen = [one for one in BREAKS if not given.words or any(word in one.name for word in given.words)]
    survivors = []
    # Resolved: where the temporary folder is a symbolic link, __file__ would name another path.
    with tempfile.TemporaryDirectory(prefix="iot_models_breaks_") as folder:
        copy = Path(folder).resolve()
        copy_checkout(copy)
        check_list(copy)
        print(f"{len(chosen)} breaks. First the same tests without any.", flush=True)
        needed = tuple(given.by or dict.fromkeys(test for one in chosen for test in one.tests))
        began = time.monotonic()
        if (done := pytest(copy, needed, SECONDS * 5)).returncode:
            raise BrokenListError(f"without any break the tests fail:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
        print(f"pass in {time.monotonic() - began:.0f} s\n", flush=True)
        for number, one in enumerate(chosen, 1):
            print(f"{number:2} {one.name} ...", flush=True)
            began = time.monotonic()
            test = caught_by(copy, one, tuple(given.by or one.tests))
            if test is None:
                survivors.append(one.name)
            print(f"   {time.monotonic() - began:5.1f} s  {test or 'NOT CAUGHT'}", flush=True)
    print(f"\n{len(chosen) - len(survivors)} of {len(chosen)} breaks caught, each in less than {SECONDS} s")
    for name in survivors:
        print(f"NOT CAUGHT: {name}")
    return 1 if survivors else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenListError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
