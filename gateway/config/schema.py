"""The settings as a JSON schema, for editors: what there is, of which type and range, and what it means. What concerns several settings is
said by `penstock check` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from gateway.config.tree import Settings

_REF = "#/$defs/{name}"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SECTION = "Backend"


def schema(sections: Mapping[str, type[msgspec.Struct]], health: type[msgspec.Struct]) -> dict[str, Any]:
    """Draft 2020-12. `sections`: what `backends.NAME` holds, by its `kind`, beside the core's own `health`."""
    roots, found = msgspec.json.schema_components([Settings, health, *sections.values()], ref_template=_REF)
    definitions: dict[str, Any] = dict(sorted(found.items()))
    settings = definitions.pop(Settings.__name__)
    rules: list[dict[str, Any]] = []
    for kind, root in zip(sections, roots[2:], strict=True):
        own = definitions.pop(root["$ref"].rpartition("/")[2])
        own["title"] = f"kind: {kind}"
        own["properties"] = {"kind": {"const": kind}, **own["properties"], "health": roots[1]}
        definitions[f"Backend_{kind}"] = own
        rules.append({"if": {"properties": {"kind": {"const": kind}}}, "then": {"$ref": _REF.format(name=f"Backend_{kind}")}})
    definitions[_SECTION] = {"type": "object", "required": ["kind"], "properties": {"kind": {"enum": sorted(sections)}}, "allOf": rules}
    settings["properties"]["backends"]["additionalProperties"] = {"$ref": _REF.format(name=_SECTION)}
    return {"$schema": DIALECT, "title": "penstock.yaml",
            **_ecma({key: value for key, value in settings.items() if key != "title"}), "$defs": _ecma(definitions)}  # fmt: skip


def _ecma(value: Any) -> Any:
    """Without what Python's expressions have and JavaScript's need not: its `$` lets no line end pass."""
    if isinstance(value, dict):
        return {key: below.replace("$(?!\n)", "$") if key == "pattern" and isinstance(below, str) else _ecma(below)
                for key, below in value.items()}  # fmt: skip
    return [_ecma(below) for below in value] if isinstance(value, list) else value
