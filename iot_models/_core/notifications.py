"""The notification of a desired write: what `ShadowService(notify=True)` sends, and `bus.watch_pending` listens for.

It wakes those who wait and carries no data: PostgreSQL forgets a notification when nobody listens.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Final, NamedTuple
from weakref import ref

from sqlalchemy import Text, bindparam, cast, func, select

if TYPE_CHECKING:
    from typing import Any

    from sqlalchemy import Connection, Select, Transaction

CHANNEL: Final = "iot_models_desired"
_NOTIFIED: Final = "iot_models.notified"


def topic(tenant_id: str) -> str:
    """What a notification says of its tenant. Every role of a database may listen, and shall not learn tenants' ids."""
    return blake2b(tenant_id.encode(), digest_size=16).hexdigest()


class _Notified(NamedTuple):
    """The innermost transaction of a connection that has notified, and of which tenants."""

    innermost: ref[Transaction]
    tenants: set[str]


def is_notified(connection: Connection, tenant_id: str) -> bool:
    """Whether this transaction, or this savepoint, has notified of the tenant already; from now on it has.

    In AUTOCOMMIT mode each statement has to notify anew. So has one behind a savepoint that notified: it may have been
    rolled back, and the notification with it.
    """
    innermost = connection.get_nested_transaction() or connection.get_transaction()
    if innermost is None or connection.connection.autocommit:
        return False
    known: _Notified | None = connection.info.get(_NOTIFIED)
    if known is None or known.innermost() is not innermost:
        # A weak reference: the pool keeps this object as long as the connection.
        known = connection.info[_NOTIFIED] = _Notified(ref(innermost), set())
    was = tenant_id in known.tenants
    known.tenants.add(tenant_id)
    return was


def notify(tenant_id: str) -> Select[Any]:
    """Notify those who listen, when the transaction commits."""
    values = (cast(bindparam(None, value, type_=Text), Text) for value in (CHANNEL, topic(tenant_id)))
    return select(func.pg_catalog.pg_notify(*values))
