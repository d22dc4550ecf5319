"""The URL of a test's database, where pytest prints it."""

from __future__ import annotations

from iot_models.testing.servers import DatabaseURL


def test_the_repr_of_a_database_url_shows_where_it_leads_and_no_password() -> None:
    url = DatabaseURL("postgresql://anna:hunter2@db.example/shadows")

    assert "hunter2" not in repr(url)
    assert "shadows" in repr(url)
    assert str(url) == "postgresql://anna:hunter2@db.example/shadows"
