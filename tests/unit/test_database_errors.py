"""What is added to an error of a driver, so that whoever reads it knows what to do."""

from __future__ import annotations

import pytest

from iot_models._core.database_errors import explained


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
