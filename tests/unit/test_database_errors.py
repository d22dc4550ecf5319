"""What is added to an error of a driver, so that whoever reads it knows what to do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sqlalchemy.exc import IntegrityError, OperationalError

from iot_models._core.database_errors import explained, hide_row, is_of_the_data


@pytest.mark.parametrize(
    ("error", "way_out"),
    [
        (ConnectionRefusedError(111, "Connect call failed"), "PostgreSQL cannot be reached"),
        (UnicodeEncodeError("ascii", "ä", 0, 1, "ordinal not in range"), "client_encoding is UTF8"),
    ],
)
def test_an_error_that_a_driver_raises_itself_says_what_to_do(error: Exception, way_out: str) -> None:
    with pytest.raises(type(error)) as raised, explained():
        raise error

    assert raised.value is error
    assert [way_out in note for note in error.__notes__] == [True]


def test_a_text_that_the_encoding_cannot_express_is_of_the_data_and_a_closed_port_is_not() -> None:
    assert is_of_the_data(UnicodeEncodeError("latin-1", "\u20ac", 0, 1, "ordinal not in range"))
    assert not is_of_the_data(ConnectionRefusedError())


def test_an_error_without_a_message_stays_without_one() -> None:
    original = Exception()
    original.diag = SimpleNamespace(  # type: ignore[attr-defined]
        message_primary="", message_detail="secret", message_hint=None, sqlstate="23505"
    )
    error = IntegrityError("UPDATE", {}, original)
    before = str(error)

    hide_row(SimpleNamespace(sqlalchemy_exception=error, original_exception=original))  # type: ignore[arg-type]

    assert (str(original), str(error)) == ("", before)


@pytest.mark.parametrize("state", ["08006", "08001", "57P01", "XX000"])
def test_a_node_of_a_cluster_that_is_lost_is_named_with_what_to_repeat(state: str) -> None:
    original = Exception("could not commit transaction on worker")
    original.sqlstate = state  # type: ignore[attr-defined]

    with pytest.raises(OperationalError) as raised, explained():
        raise OperationalError("COMMIT", {}, original)

    assert "repeat a desired write with the same request_id" in str(raised.value)


@pytest.mark.parametrize(
    ("detail", "stays"),
    [
        ("Key (tenant_id, device_id)=(acme, t-1) already exists.", True),
        ("Schlüssel »(tenant_id, device_id)=(acme, t-1)« existiert bereits.", True),
        ('Key (site_id)=(s) is not present in table "sites".', True),
        ("Key ((desired_state ->> 'wifi_password'::text))=(hunter2) already exists.", False),
        ('Key (tenant_id, desired_state)=(acme, {"a": 1}) already exists.', False),
        ('Fehlgeschlagene Zeile enthält (acme, t-1, {"a": 1}).', False),
    ],
)
def test_of_a_constraints_detail_a_key_of_plain_columns_stays_in_any_language(detail: str, *, stays: bool) -> None:
    original = Exception(f"violated\nDÉTAIL :  {detail}")
    original.diag = SimpleNamespace(  # type: ignore[attr-defined]
        message_primary="violated", message_detail=detail, message_hint=None, sqlstate="23505"
    )
    error = IntegrityError("UPDATE", {}, original)

    hide_row(SimpleNamespace(sqlalchemy_exception=error, original_exception=original))  # type: ignore[arg-type]

    assert (detail in str(error)) is stays
    assert (detail in str(original)) is stays
    assert "violated" in str(error)
