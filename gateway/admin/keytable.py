"""Keys as a table (CSV): one line a key, its columns the fields of a key; an empty cell is as if the column were not there."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from gateway import config
from gateway.access import keys
from gateway.access.keys import StoredKey
from gateway.config import KeyEntry
from gateway.errors import ConfigError

COLUMNS = tuple(name for name in KeyEntry.__struct_fields__ if name != "hash")
# Cells that are texts, whatever they look like.
_TEXTS = frozenset({"name", "expires"})


class Made(NamedTuple):
    """A key that a line of a table asks for: the line's number, the key itself, and what is stored of it."""

    line: int
    secret: str
    entry: dict[str, Any]


def read(lines: Iterable[str], source: str) -> list[Made]:
    """Keys for every line; raises ConfigError with where it is and what is wrong, before any of them is of use to anybody."""
    reader = csv.DictReader(lines, strict=True, skipinitialspace=True)
    try:
        _refuse_columns(reader.fieldnames or (), source)
        made = [_made(row, reader.line_num, source) for row in reader]
    except csv.Error as error:
        raise ConfigError("", f"is no table: {error}", f"{source}:{reader.line_num}") from None
    there: dict[str, int] = {}
    for line, _, entry in made:
        first = there.setdefault(entry["name"], line)
        if first != line:
            raise ConfigError("name", f"'{entry['name']}' stands in line {first} already", f"{source}:{line}")
    return made


def _refuse_columns(names: Iterable[str], source: str) -> None:
    seen = list(names)
    if "name" not in seen:
        raise ConfigError("", f"has no column 'name'; columns: {', '.join(COLUMNS)}", f"{source}:1")
    for name in seen:
        if name not in COLUMNS:
            near = difflib.get_close_matches(str(name), COLUMNS, n=1)
            raise ConfigError("", f"there is no column '{name}'{f'; did you mean {near[0]!r}?' if near else ''}", f"{source}:1")
        if seen.count(name) > 1:
            raise ConfigError("", f"there are two columns '{name}'", f"{source}:1")


def _made(row: dict[str, Any], line: int, source: str) -> Made:
    if None in row or None in row.values():
        raise ConfigError("", f"has {'more' if None in row else 'fewer'} cells than there are columns", f"{source}:{line}")
    secret, digest = keys.new_secret()
    entry = {name: _cell(name, cell.strip()) for name, cell in row.items() if cell.strip()} | {"hash": digest}
    try:
        config.convert(entry, StoredKey, "")
    except ConfigError as error:
        first = error.errors[0]
        raise ConfigError(first.path, first.problem, f"{source}:{line}") from None
    return Made(line, secret, entry)


def _cell(name: str, cell: str) -> Any:
    """What a cell says: `a; b` are models, `50` or `50/day` is a budget, else JSON where it is some."""
    if name in _TEXTS:
        return cell
    if name == "models":
        return [part.strip() for part in cell.split(";")]
    try:
        value = msgspec.json.decode(cell)
    except msgspec.DecodeError:
        amount, slash, per = cell.partition("/")
        return {"amount": _cell("", amount.strip()), "per": per.strip()} if name == "budget" and slash else cell
    return {"amount": value} if name == "budget" and isinstance(value, int | float) else value
