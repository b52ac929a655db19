"""From plain values to a strict struct, and all that is wrong on the way: each with its path, what is accepted, and the nearest word."""

from __future__ import annotations

import difflib
import enum
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Meta

from gateway.errors import ConfigError, ConfigErrors
from gateway.masking import STARS, shown
from gateway.wire.check import Check

T = TypeVar("T")
# What msgspec calls things, in YAML's words.
_WORDS = {"object": "mapping", "array": "list", "null": "nothing"}
_OUT_OF_RANGE = re.compile(r"Expected `\w+` (?:[<>]=? |matching regex|of length|that's a multiple)")


def convert(value: Any, kind: type[T], path: str) -> T:
    """`value` as the strict struct `kind`; raises ConfigErrors with all that is wrong, each with its full path below `path`."""
    wrong = list(problems(value, kind, path))
    if wrong:
        raise ConfigErrors(wrong)
    return msgspec.convert(value, kind)


def problems(value: Any, kind: Any, path: str) -> Iterator[ConfigError]:
    """What keeps `value` from being a `kind`: of its parts, or, where they are all right, of the whole."""
    found = False
    for problem in _within(value, _one(kind, value), path):
        found = True
        yield problem
    if found:
        return
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        yield _refusal(str(error), value, kind, path)
    except ConfigError as error:  # of a struct that checks several of its fields together
        yield from error.below(path).errors
    else:
        if value is not None:
            yield from _checked(value, kind, path)


def _checked(value: Any, kind: Any, path: str) -> Iterator[ConfigError]:
    for check in checks(kind):
        try:
            check.test(value)
        except ValueError as error:
            accepted = f"; accepted: {check.accepted}" if check.accepted else ""
            yield ConfigError(path, f"{_quoted(path, value) if check.quote else ''}{error}{accepted}")


def _quoted(path: str, value: Any) -> str:
    """A value before what is wrong with it; nothing for one that nobody may see."""
    text = shown(path, value)
    return "" if text == STARS else f"'{text}' "


def _within(value: Any, kind: Any, path: str) -> Iterator[ConfigError]:
    """Problems of a container's parts."""
    origin = get_origin(kind) or kind
    if isinstance(value, dict) and isinstance(origin, type) and issubclass(origin, msgspec.Struct):
        yield from _fields(value, kind, path)
    elif isinstance(value, dict) and origin is dict:
        key_kind, below_kind = get_args(kind) or (str, Any)
        for key, below in value.items():
            yield from problems(key, key_kind, f"{path}.{key}")
            yield from problems(below, below_kind, f"{path}.{key}")
    elif isinstance(value, list) and origin is list:
        (below_kind,) = get_args(kind) or (Any,)
        for index, below in enumerate(value):
            yield from problems(below, below_kind, f"{path}.{index}")


def _fields(value: dict[str, Any], kind: Any, path: str) -> Iterator[ConfigError]:
    config = getattr(get_origin(kind) or kind, "__struct_config__")  # noqa: B009 - msgspec's stubs do not have it on a class
    known = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    # What a section says of keys that it once had, or that once took something else.
    former: Mapping[str, str] = getattr(get_origin(kind) or kind, "FORMER", {})
    for key, below in value.items():
        here = f"{path}.{key}" if path else str(key)
        words = f"; {former[key]}" if key in former else ""
        if key in known:
            for problem in problems(below, known[key].type, here):
                yield ConfigError(problem.path, f"{problem.problem}{words}") if words else problem
        elif config.forbid_unknown_fields and key != config.tag_field:
            hint = words or _nearest(str(key), known) or f"; known: {', '.join(sorted(known))}"
            yield ConfigError(here, f"unknown key{hint}")
    for name, field in known.items():
        if field.required and name not in value:
            yield ConfigError(path, f"`{name}` is missing")


def _one(kind: Any, value: Any) -> Any:
    """The type without its annotations; of several that may stand there, the only container that the value could be."""
    bare = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if get_origin(bare) not in (Union, types.UnionType):
        return bare
    wanted: tuple[type, ...] = (dict, msgspec.Struct) if isinstance(value, dict) else (list,) if isinstance(value, list) else ()
    fitting = [option for option in (_one(each, value) for each in get_args(bare)) if _is(option, wanted)]
    return fitting[0] if len(fitting) == 1 else Any


def _is(kind: Any, wanted: tuple[type, ...]) -> bool:
    origin = get_origin(kind) or kind
    return isinstance(origin, type) and issubclass(origin, wanted)


def _refusal(text: str, value: Any, kind: Any, path: str) -> ConfigError:
    """msgspec's words in ours."""
    text, _, inner = text.partition(" - at `")
    if inner.startswith("$"):  # inside a type that was not walked through, such as a union of structs
        parts = re.findall(r"[^.\[\]`$]+", inner)
        path = ".".join(part for part in (path, *parts) if part and part != "...")
    if text.startswith("Invalid enum value"):
        accepted = choices(kind)
        return ConfigError(path, f"{_quoted(path, value)}is not accepted; one of: {', '.join(accepted)}{_nearest(str(value), accepted)}")
    if _OUT_OF_RANGE.match(text):
        return ConfigError(path, _out_of_range(value, metas(kind), path))
    text = re.sub(r"`(\w+( \| \w+)*)`", lambda found: f"`{_plain(found[1])}`", text)
    return ConfigError(path, text[0].lower() + text[1:])


def _plain(names: str) -> str:
    return " | ".join(_WORDS.get(name, name) for name in names.split(" | "))


def _out_of_range(value: Any, metas: list[Meta], path: str) -> str:
    accepted = accepted_words(metas)
    if isinstance(value, int | float):
        given = shown(path, f"{value:g}" if isinstance(value, float) else value)
        return f"{given} is out of range; accepted: {accepted}"
    if isinstance(value, str):
        return f"{_quoted(path, value)}is not accepted; accepted: {accepted}" if value else f"is empty; accepted: {accepted}"
    return f"holds {len(value)}; accepted: {accepted}"


def accepted_words(metas: Iterable[Meta]) -> str:
    """The range of a setting in words: `1 to 64`, `above 0, up to 86400`, or its own."""
    said: dict[str, Any] = {}
    for meta in metas:
        if meta.extra and "accepted" in meta.extra:
            return str(meta.extra["accepted"])
        for name in ("gt", "ge", "lt", "le", "min_length", "max_length", "pattern"):
            if getattr(meta, name) is not None:
                said[name] = _number(getattr(meta, name))
    if "pattern" in said:
        return f"what matches {said['pattern']}"
    unit = " long" if "min_length" in said or "max_length" in said else ""
    low, above = said.get("ge", said.get("min_length")), said.get("gt")
    high, below = said.get("le", said.get("max_length")), said.get("lt")
    if low is not None and high is not None:
        return f"{low} to {high}{unit}"
    parts = []
    if above is not None:
        parts.append(f"above {above}")
    elif low is not None:
        parts.append(f"{low}{unit} or more")
    if high is not None or below is not None:
        parts.append(f"up to {high}{unit}" if high is not None else f"below {below}")
    return ", ".join(parts)


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _notes(kind: Any) -> Iterator[Any]:
    """Every annotation on a type, those on what may stand there included."""
    if get_origin(kind) is Annotated:
        bare, *notes = get_args(kind)
        yield from notes
        yield from _notes(bare)
    elif get_origin(kind) in (Union, types.UnionType):
        for option in get_args(kind):
            yield from _notes(option)


def metas(kind: Any) -> list[Meta]:
    """What is said of a setting: its ranges and descriptions."""
    return [note for note in _notes(kind) if isinstance(note, Meta)]


def checks(kind: Any) -> list[Check]:
    """What is asked of a setting beyond its range."""
    return [note for note in _notes(kind) if isinstance(note, Check)]


def _choices(kind: Any) -> Iterator[str]:
    """The words that a setting takes, where it takes one of a few."""
    if get_origin(kind) is Literal:
        yield from map(str, get_args(kind))
    elif isinstance(kind, type) and issubclass(kind, enum.Enum):
        yield from (str(member.value) for member in kind)
    elif get_origin(kind) in (Union, types.UnionType, Annotated):
        for option in get_args(kind):
            yield from _choices(option)


def choices(kind: Any) -> list[str]:
    """The same as a list, for whoever documents a setting."""
    return list(_choices(kind))


def _nearest(given: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
