"""The judge of what needs no database: URLs, and what the twin helpers make of documents."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from iot_models import (
    InvalidDocument,
    Shadow,
    compare,
    compute_delta,
    compute_nested_delta,
    create_merge_patch,
    merge_patch,
)
from iot_models._core.documents import DocumentLimits, encode_document
from iot_models.engine import create_async_engine, create_engine, database_url, normalize_url
from tests.fuzz.corpus.hostile_types import SabotageError
from tests.fuzz.corpus.wire import SECRET
from tests.fuzz.judge.expected import sentinel
from tests.fuzz.judge.world import FindingError, check_error
from tests.reference import shadows
from tests.reference.documents import ORM_DEPTH, storable
from tests.reference.json_values import merge_patch as reference_merge_patch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

OTHER: Final = sentinel("acme", "thermostat-1")
# The fuzzer also makes URLs in which it has become something else.
_IS_THE_PASSWORD: Final = re.compile(f"://[^@/]*:{SECRET}@[^@]*$|password={SECRET}")
_TAKE_A_URL: Final[tuple[Callable[[Any], object], ...]] = (
    normalize_url,
    database_url,
    create_engine,
    create_async_engine,
)


def judge_url(url: object) -> str:
    """Pass a URL to each function that takes one; what it raises and what it gives must not show the password.

    Raises:
        FindingError: It does, or another error than ours came out.
    """
    became = "read"
    for point in _TAKE_A_URL:
        try:
            made = point(url)
            shown = f"{made} {made!r}"
            shown.encode()
        except (ValueError, ImportError) as error:
            became, shown = "refused", str(error)
            # ImportError: of an engine whose driver is not installed. One that SQLAlchemy does not know is no such case.
            if type(error) not in {ValueError, ImportError} or "postgresql" not in shown.lower():
                raise FindingError(f"{point.__name__} raises {type(error).__name__}: {shown[:200]}") from error
        except Exception as error:
            raise FindingError(f"{point.__name__} raises {type(error).__name__}: {str(error)[:200]}") from error
        if SECRET in shown and _IS_THE_PASSWORD.search(str(url)):
            raise FindingError(f"{point.__name__} shows the password: {shown[:200]}")
    return became


def judge_helpers(make: Callable[[], Any]) -> str:
    """Compute all that is computed without a database from a document, and compare with the reference.

    Raises:
        FindingError: It differs, or an error came out that no caller expects.
    """
    verdict = storable(make())
    try:
        encode_document(make(), DocumentLimits())
    except InvalidDocument as error:
        check_error(error)
        if verdict:
            raise FindingError(f"refuses it: {error}") from error
    except Exception as error:  # noqa: BLE001 - to be judged
        check_error(error, odd=verdict is None)
    else:
        if verdict is False:
            raise FindingError("encodes what no database stores")
    if verdict:
        _compute(make())
        return "stored"
    for one, other in ((make(), OTHER), (OTHER, make()), (make(), make())):
        for helper in (compute_delta, compute_nested_delta, compare, merge_patch, create_merge_patch):
            _survives(helper, one, other)
    return "refused"


def _compute(given: Any) -> None:
    document = dict(given) if isinstance(given, Mapping) and not isinstance(given, dict) else given
    before = json.dumps(document)
    now = datetime.now(UTC)
    shadow = Shadow("acme", "thermostat-1", document, OTHER, 7, 7, now, now)
    holds = {
        "is its own delta": not compute_delta(document, deepcopy(document)),
        "is its own nested delta": not compute_nested_delta(document, deepcopy(document)),
        "differs from itself": compare(document, deepcopy(document)).unchanged_count == len(document),
        "merges to another": json.dumps(merge_patch(OTHER, document))
        == json.dumps(reference_merge_patch(OTHER, document)),
        "has another delta": compute_delta(document, OTHER) == shadows.delta(document, OTHER),
        "has another nested delta": compute_nested_delta(document, OTHER) == shadows.nested_delta(document, OTHER),
        "is encoded as another": json.loads(encode_document(document, DocumentLimits())) == document,
        "is shown as another": json.loads(json.dumps(shadow.to_dict()))["desired"] == document,
        "is not explained": shadow.explain().startswith("thermostat-1 "),
        "was changed": json.dumps(document) == before,
    }
    if wrong := [what for what, right in holds.items() if not right]:
        raise FindingError(", ".join(wrong))


def _survives(helper: Callable[[Any, Any], object], one: object, other: object) -> None:
    try:
        helper(one, other)
    except (TypeError, SabotageError):
        pass
    except ValueError as error:
        if helper is not create_merge_patch:  # there is no patch, which the error says
            raise FindingError(f"{helper.__name__} raises {type(error).__name__}: {error}") from None
    except RecursionError as error:
        if not (_deep(one) or _deep(other)):  # documented
            raise FindingError(f"{helper.__name__} raises {type(error).__name__}: {error}") from None
    except RuntimeError as error:
        if "changed size during iteration" not in str(error):  # it did
            raise FindingError(f"{helper.__name__} raises {type(error).__name__}: {error}") from None


def _deep(value: object) -> bool:
    """Whether it nests deeper than any document that may be stored; tuples count too, which hide in keys."""
    level = [value]
    for _ in range(ORM_DEPTH):
        inside = [part for outer in level for part in _parts(outer)]
        level = list({id(part): part for part in inside}.values())  # what is shared, or contains itself, counts once
    return bool(level)


def _parts(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return [*dict.keys(value), *dict.values(value)]
    return value if isinstance(value, (list, tuple)) else ()
