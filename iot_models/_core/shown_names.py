"""How names from the database are shown: a stranger may have chosen them."""

from __future__ import annotations


def escaped(sentence: str) -> str:
    """A sentence with names from the database, as a terminal may show it: a stranger's name can hold any character."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in sentence)
