"""What may be shown: names from the database, which a stranger may have chosen, and words of a command line."""

from __future__ import annotations

import re
from typing import Final

# The URL of a database, also behind jdbc: or a blank; any URL with a password; a connection string of libpq.
_SECRET: Final = re.compile(r"postgres(ql)?(\+\w+)?:?//|://[^/\s]*@|pass(word|wd)\s*=", re.IGNORECASE)
# Characters that steer a terminal: control characters, and those that order the text or cannot be seen.
_STEERING: Final = (
    "{[0,32),[127,160),[173,174),[1564,1565),[6158,6159),[8203,8208),[8232,8239),[8288,8304),[65279,65280),"
    "[65529,65532),[917504,917632)}"
)


def looks_like_a_secret(word: str) -> bool:
    """Whether a word of a command line may be a URL or a password in the wrong place, which nothing may repeat."""
    return _SECRET.search(word) is not None


def escaped(sentence: str) -> str:
    """A sentence with names from the database, as a terminal may show it: a stranger's name can hold any character."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in sentence)


def escaped_in_sql(sentence: str) -> str:
    """SQL of the same, for SQL that is printed: `sentence` is an expression of type text.

    It calls the catalog's functions and operators only.
    """
    return f"""(
      SELECT pg_catalog.string_agg(
               CASE WHEN CAST('{_STEERING}' AS pg_catalog.int4multirange) OPERATOR(pg_catalog.@>) pg_catalog.ascii(one)
               THEN pg_catalog.concat(pg_catalog.chr(92), 'u',
                                      pg_catalog.lpad(pg_catalog.to_hex(pg_catalog.ascii(one)), 4, '0'))
               ELSE one END, '' ORDER BY place)
        FROM pg_catalog.regexp_split_to_table({sentence}, '') WITH ORDINALITY AS split (one, place))"""  # noqa: S608 - our own text
