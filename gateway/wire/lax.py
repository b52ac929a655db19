"""Numbers and truth values as pydantic reads them in its lax mode, which is how SGLang reads a request: `"4"`, `4.0`, `true` are integers.

What the gateway itself needs to know of a request must mean the same to it and to the engine; so it is read this way, and written anew in
the plain form where it came in another (`fields`). Held against pydantic 2.14 by a test; it alone takes "0-1" for -1.
"""

from __future__ import annotations

import json
import re

# Longer ones bound nothing that exists.
_MAX_DIGITS = 100
# Zeros in front are skipped with any underscores between them.
_INTEGER = re.compile(r"([+-]?)(?:0[0_]*)?([0-9](?:_?[0-9])*)(?:\.0+)?")
# What Rust's `trim` takes away.
_SPACES = " \t\n\v\f\r\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
_TRUE = frozenset(["1", "on", "t", "true", "y", "yes"])
_FALSE = frozenset(["0", "off", "f", "false", "n", "no"])


def integer(value: bytes) -> int:
    """A JSON value as an integer; raises ValueError for what is none."""
    if len(value) > _MAX_DIGITS:
        raise ValueError("too long")
    found = json.loads(value)
    if isinstance(found, str):
        matched = _INTEGER.fullmatch(found.strip(_SPACES))
        if matched is None:
            raise ValueError("no integer")
        return int(matched[1] + matched[2])
    if isinstance(found, float):
        if not found.is_integer() or not -(2.0**63) < found < 2.0**63:
            raise ValueError("no integer")
        return int(found)
    if isinstance(found, int):
        return int(found)
    raise ValueError("no integer")


def boolean(value: bytes) -> bool:
    """A JSON value as a truth value; raises ValueError for what is none."""
    if len(value) > _MAX_DIGITS:
        raise ValueError("too long")
    found = json.loads(value)
    if isinstance(found, str):
        found = found.lower()
        if found in _TRUE:
            return True
        if found in _FALSE:
            return False
    elif isinstance(found, (int, float)) and found in (0, 1):
        return bool(found)
    raise ValueError("no truth value")
