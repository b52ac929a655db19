"""What is wrong with a body, in words a client can act on: which parameter, and what would be accepted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from msgspec import inspect

from gateway.errors import MAX_QUOTED, InvalidRequest
from gateway.wire.visible import visible

_MAX_PROBLEM = 3 * MAX_QUOTED
_PLACE = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`\$(?P<path>.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"missing required field `(.*)`")
_KIND = re.compile(r"`([^`]*)`")
_WORDS = {"int": "integer", "str": "string", "float": "number", "bool": "boolean"}


def explain(problem: str, kind: Any, inside: str = "") -> InvalidRequest:
    """msgspec's words about a value that should have been a `kind`, as the refusal a client gets.

    `inside`: the parameter it is the value of, where it is no whole body.
    """
    if len(problem) > _MAX_PROBLEM:  # it quotes what it was given; the place stands at its end
        problem = f"{problem[:MAX_QUOTED]}...{problem[-MAX_QUOTED:]}"
    found = _PLACE.match(visible(problem))
    assert found is not None
    within = (found["path"] or "").replace("[...]", "")
    path = (inside + within).removeprefix(".")
    what = found["what"]
    missing = _MISSING.search(what)
    if missing:
        param = f"{path}.{missing[1]}" if path else missing[1]
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    if what.startswith("Invalid enum value"):
        accepted = ", ".join(f"'{value}'" for value in _accepted(inspect.type_info(kind), within))
        return InvalidRequest(
            f"{what.replace('enum value', 'value')} for '{path}'. Accepted: {accepted}.", param=path, code="invalid_value"
        )
    words = _KIND.sub(lambda match: " or ".join(_WORDS.get(name, name) for name in match[1].split(" | ")), what)
    code = "invalid_type" if ", got " in what else "invalid_value"
    noun = "type" if code == "invalid_type" else "value"
    return InvalidRequest(f"Invalid {noun} for '{path}': {words[0].lower()}{words[1:]}.", param=path or None, code=code)


def _accepted(kind: inspect.Type, path: str) -> list[Any]:
    """The values a place accepts, read from the types on the way there."""
    here = [kind]
    for step in re.findall(r"[^.\[\]]+", path):
        here = [below for found in here for below in _below(found, step)]
    return [value for found in here for option in _options(found) if isinstance(option, inspect.LiteralType) for value in option.values]


def _options(kind: inspect.Type) -> Iterator[inspect.Type]:
    if isinstance(kind, inspect.Metadata):
        yield from _options(kind.type)
    elif isinstance(kind, inspect.UnionType):
        for option in kind.types:
            yield from _options(option)
    else:
        yield kind


def _below(kind: inspect.Type, step: str) -> Iterator[inspect.Type]:
    for option in _options(kind):
        if isinstance(option, inspect.StructType):
            yield from (field.type for field in option.fields if field.encode_name == step)
        elif isinstance(option, inspect.ListType) and step.isdigit():
            yield option.item_type
