"""Whether a call's arguments keep to the schema that the client sent with its tools.

A schema is a stranger's, so it is given to a validator whose patterns take linear time, whose recursion is bounded, and which fetches
nothing. One that it cannot read says nothing about the answer.
"""

from __future__ import annotations

from typing import Any

import jsonschema_rs
import msgspec

# What a pattern may take once it is compiled.
_PATTERNS = jsonschema_rs.RegexOptions(size_limit=1 << 20, dfa_size_limit=1 << 20)
_MAX_ERROR = 200


def parameters(tools: bytes) -> dict[str, Any]:
    """Of each tool that has a name its schema, or None; `tools` as any of the endpoints has it."""
    try:
        listed = msgspec.json.decode(tools)
    except (msgspec.DecodeError, RecursionError):
        return {}
    found: dict[str, Any] = {}
    for tool in listed if isinstance(listed, list) else ():
        of = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(of, dict) and isinstance(name := of.get("name"), str):
            found[name] = of.get("parameters", of.get("input_schema"))
    return found


def broken(schema: Any, arguments: Any) -> str:
    """How the arguments break it, by the part of the schema that they break; "" where they do not, or nobody can tell."""
    try:
        validator = jsonschema_rs.validator_for(schema, pattern_options=_PATTERNS, retriever=_nothing)
        error = next(iter(validator.iter_errors(arguments)), None)
    except Exception:  # whatever the library says of a schema that it cannot use
        return ""
    if error is None:
        return ""
    return f"against {'/'.join(map(str, error.schema_path))}"[:_MAX_ERROR]


def _nothing(uri: str) -> Any:
    raise ValueError(f"{uri} is not fetched")
