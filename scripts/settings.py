#!/usr/bin/env python3
"""Write the tables of docs/configuration.md and deploy/penstock.schema.json from the structs that hold the settings, or with --check say
whether they are what it makes."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import msgspec

from gateway import config
from gateway.config import strict
from gateway.serving import registry
from gateway.serving.balance.hosts import Health

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs" / "configuration.md"
SCHEMA = ROOT / "deploy" / "penstock.schema.json"
_HEAD = ("| key | default | accepted | meaning |", "|---|---|---|---|")
Row = tuple[str, str, str, str]


def core() -> Iterator[str]:
    """Every section of the core, one table each."""
    for field in msgspec.structs.fields(config.Settings):
        yield from ("", f"### `{field.encode_name}`", "")
        if field.encode_name == "backends":
            yield "Hosts that serve the same model, behind one plugin. The rest of a section is the plugin's own, below."
            rows: list[Row] = [("backends.NAME.kind", "required", ", ".join(f"`{kind}`" for kind in sorted(BUILT_IN)), "the plugin")]
            yield from table([*rows, *_fields(Health, "backends.NAME.health.")])
            continue
        struct = _struct(field.type)
        assert struct is not None
        plural = {"models": "models.NAME.", "keys": "keys.N.", "teams": "teams.N.", "oidc": "oidc.N."}
        yield _sentence(struct)
        yield from table(_fields(struct, plural.get(field.encode_name, f"{field.encode_name}.")))


def plugins() -> Iterator[str]:
    """Every built-in plugin's section."""
    for kind in sorted(BUILT_IN, reverse=True):
        struct = registry.plugins()[kind].config
        yield from ("", f"## `kind: {kind}`", "", _sentence(struct))
        nested = [field.encode_name for field in msgspec.structs.fields(struct) if _nested(field.type)]
        own, below = [], []
        for row in _fields(struct, ""):
            (below if row[0].partition(".")[0] in nested and "." in row[0] else own).append(row)
        yield from table(own)
        for name in nested:
            inner = _struct(next(field.type for field in msgspec.structs.fields(struct) if field.encode_name == name))
            assert inner is not None
            yield from ("", f"### `{name}` of `{kind}`", "", _sentence(inner))
            yield from table(row for row in below if row[0].startswith(f"{name}."))


def table(rows: Iterator[Row] | list[Row]) -> Iterator[str]:
    """Rows as Markdown."""
    yield from ("", *_HEAD)
    for key, default, accepted, meaning in rows:
        yield f"| `{key}` | {default} | {accepted} | {meaning} |"


def _fields(struct: type[msgspec.Struct], prefix: str) -> Iterator[Row]:
    for field in msgspec.structs.fields(struct):
        name = f"{prefix}{field.encode_name}"
        inner = _struct(field.type)
        if inner is None or strict.metas(field.type):
            meaning = next((meta.description for meta in strict.metas(field.type) if meta.description), None)
            if meaning is None:
                raise SystemExit(f"{struct.__name__}.{field.name} has no description")
            yield name, _default(field), _accepted(field.type), meaning.replace("|", "\\|")
        if inner is not None:
            yield from _fields(inner, f"{name}{_index(field.type)}.")


def _default(field: msgspec.structs.FieldInfo) -> str:
    said = next((meta.extra["default"] for meta in strict.metas(field.type) if meta.extra and "default" in meta.extra), None)
    if said is not None:
        return str(said)
    if field.required:
        return "required"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"`{value:g}`"
    if isinstance(value, msgspec.Struct):
        return "`{}`"
    return f"`{value}`" if isinstance(value, str) and value else f"`{msgspec.json.encode(value).decode()}`"


def _accepted(kind: Any) -> str:
    if words := strict.choices(kind):
        return ", ".join(f"`{word}`" for word in words)
    bare = _bare(kind)
    if (found := [check.accepted for check in strict.checks(kind) if check.accepted]) and bare in (str, bool):
        return found[0]
    names = {bool: "`true`, `false`", str: "text", list: "list", dict: "mapping"}
    own = [meta for meta in strict.metas(kind) if meta.extra is None or "accepted" in meta.extra or "default" in meta.extra]
    if bare in (int, float) or (bare is str and any(meta.pattern for meta in own)):
        return strict.accepted_words(own) or ("whole number" if bare is int else "number")
    return names.get(get_origin(bare) or bare, "mapping")


def _bare(kind: Any) -> Any:
    """The type without annotations and without None; of several the first."""
    if get_origin(kind) is Annotated:
        return _bare(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return next(_bare(option) for option in get_args(kind) if option is not type(None))
    return kind


def _struct(kind: Any) -> type[msgspec.Struct] | None:
    """The struct that a setting is, or is a list or mapping of."""
    bare = _bare(kind)
    if get_origin(bare) in (list, dict):
        return _struct(get_args(bare)[-1])
    return bare if isinstance(bare, type) and issubclass(bare, msgspec.Struct) else None


def _nested(kind: Any) -> bool:
    return _struct(kind) is not None


def _index(kind: Any) -> str:
    return {list: ".N", dict: ".NAME"}.get(get_origin(_bare(kind)), "")


def _sentence(struct: type[msgspec.Struct]) -> str:
    return " ".join((struct.__doc__ or "").split())


BUILT_IN = ("sglang_dsv3", "scripted")
SECTIONS = {"settings": core, "plugins": plugins}


def render() -> str:
    """The document as it should be."""
    text = FILE.read_text()
    for name, lines in SECTIONS.items():
        block = f"<!-- {name} -->\n" + "\n".join(lines()).lstrip("\n") + f"\n<!-- end of {name} -->"
        text, found = re.subn(rf"<!-- {name} -->.*?<!-- end of {name} -->", lambda _, block=block: block, text, flags=re.DOTALL)
        if not found:
            raise SystemExit(f"docs/configuration.md has no place for {name}")
    return text


def main() -> int:
    """Write, or check."""
    built_in = {kind: registry.plugins()[kind].config for kind in sorted(BUILT_IN)}
    schema = msgspec.json.format(msgspec.json.encode(config.schema(built_in, Health))).decode() + "\n"
    made = {FILE: render(), SCHEMA: schema}
    if "--check" in sys.argv[1:]:
        old = [file for file, text in made.items() if not file.exists() or file.read_text() != text]
        for file in old:
            print(f"{file.relative_to(ROOT)} is old: run `make fix`")
        return 1 if old else 0
    for file, text in made.items():
        file.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
