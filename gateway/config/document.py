"""A YAML text as plain values, and the line of each: what JSON knows and nothing else, so that it can be written down again anywhere.

Keys are text, whatever they look like. Dates stay text. What a number or a text cannot be (not finite, over 64 bits, a control character,
half a surrogate pair), a key that is written twice, and an alias that unfolds without end are refused here, once for all settings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

# The settings travel to each worker on one line of at most 8 MB.
MAX_BYTES = 1 << 20
MAX_VALUES = 100_000
MAX_DEPTH = 50
_MERGE = "tag:yaml.org,2002:merge"
_TAG = "has a tag that is not accepted (a text that begins with '!' needs quotes)"
Pairs = dict[str, tuple[int, yaml.Node]]
_SCALARS = ("null", "bool", "int", "float", "str")
_ODD = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]")
# What a YAML text quotes may be part of a password that was not put into quotes.
_QUOTED = re.compile(r"'(?!<)[^']{2,}'|\"(?!<)[^\"]{2,}\"")


class _Loader(yaml.SafeLoader):
    """Only what JSON has, too: a date is a text, and any other tag is refused."""

    yaml_constructors = {  # noqa: RUF012 - PyYAML's own way
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or str(tag).removeprefix("tag:yaml.org,2002:") in _SCALARS
    }
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in rules if tag.rpartition(":")[2] in (*_SCALARS, "merge")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class Document:
    """What a text says: `value`, the line of everything in it by dotted path, and `problems`: path, words, line (0 where it has none).

    What has a problem stands as None in the value; `broken` says that there is no value at all.
    """

    def __init__(self, text: str) -> None:
        self.value: Any = None
        self.broken = False
        self.lines: dict[str, int] = {}
        self.problems: list[tuple[str, str, int]] = []
        self._count = 0
        self._open: set[int] = set()
        self._pairs_of: dict[int, Pairs] = {}
        try:
            self._loader = _Loader(text)
            node = self._loader.get_single_node()
            if node is not None:
                self.value = self._plain(node, "")
        except yaml.YAMLError as error:
            self._refuse("", _words(error), _line(error))
            self.broken = True
        except RecursionError:
            self._refuse("", f"is nested more than {MAX_DEPTH} deep", 0)
            self.broken = True

    def _refuse(self, path: str, problem: str, line: int) -> None:
        self.problems.append((path, problem, line))

    def _plain(self, node: yaml.Node, path: str) -> Any:
        self._count += 1
        if self._count > MAX_VALUES:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_VALUES} values, aliases unfolded", problem_mark=node.start_mark)
        if len(self._open) > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested more than {MAX_DEPTH} deep", problem_mark=node.start_mark)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path, node.start_mark.line + 1)
        if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            self._refuse(path, _TAG, node.start_mark.line + 1)
            return None
        self._enter(node)
        try:
            return self._mapping(node, path) if isinstance(node, yaml.MappingNode) else self._sequence(node, path)
        finally:
            self._open.discard(id(node))

    def _enter(self, node: yaml.Node) -> None:
        if id(node) in self._open:
            raise yaml.MarkedYAMLError(problem="an alias stands inside of what it stands for", problem_mark=node.start_mark)
        self._open.add(id(node))

    def _sequence(self, node: yaml.Node, path: str) -> list[Any]:
        values = []
        for index, below in enumerate(node.value):
            here = f"{path}.{index}" if path else str(index)
            self.lines[here] = below.start_mark.line + 1
            values.append(self._plain(below, here))
        return values

    def _mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, (line, below) in self._pairs(node, path).items():
            here = f"{path}.{key}" if path else key
            self.lines[here] = line
            values[key] = self._plain(below, here)
        return values

    def _pairs(self, node: yaml.MappingNode, path: str) -> Pairs:
        """Line and value by key, those of `<<` included: an own key goes before a merged one, an earlier merged one before a later."""
        if id(node) in self._pairs_of:
            return self._pairs_of[id(node)]
        merged: Pairs = {}
        own: Pairs = {}
        for key_node, below in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == _MERGE:
                for source in below.value if isinstance(below, yaml.SequenceNode) else [below]:
                    merged = {**self._merge(source, path, line), **merged}
            elif not isinstance(key_node, yaml.ScalarNode):
                self._refuse(path, "has a key that is no text", line)
            elif problem := unsound(key_node.value):
                self._refuse(f"{path}.{key_node.value}" if path else key_node.value, problem, line)
            else:
                if key_node.value in own:
                    self._refuse(f"{path}.{key_node.value}" if path else key_node.value, "is written twice", line)
                own[key_node.value] = line, below
        return self._pairs_of.setdefault(id(node), {**merged, **own})

    def _merge(self, source: yaml.Node, path: str, line: int) -> Pairs:
        if not isinstance(source, yaml.MappingNode):
            self._refuse(path, "merges (`<<`) what is no mapping", line)
            return {}
        if id(source) in self._pairs_of:
            return self._pairs_of[id(source)]
        self._enter(source)
        try:
            return self._pairs(source, path)
        finally:
            self._open.discard(id(source))

    def _scalar(self, node: yaml.ScalarNode, path: str, line: int) -> Any:
        try:
            value = self._loader.construct_object(node)
        except yaml.YAMLError:
            self._refuse(path, _TAG, line)
            return None
        except (ValueError, KeyError, IndexError, OverflowError):
            self._refuse(path, f"is no {node.tag.rpartition(':')[2]}", line)
            return None
        if problem := unsound(value):
            self._refuse(path, problem, line)
            return None
        return value


def unsound(value: Any) -> str:
    """What is wrong with a plain value wherever it stands; nothing with most."""
    if isinstance(value, str) and (odd := _ODD.search(value)):
        return f"holds a control character ({ascii(odd[0])[1:-1]})"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is no finite number"
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        return "is a number of more than 64 bits"
    return ""


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every leaf, lists by index."""
    items: Iterator[tuple[str, Any]]
    if isinstance(tree, dict) and tree:
        items = ((str(key), value) for key, value in tree.items())
    elif isinstance(tree, list) and tree:
        items = ((str(index), value) for index, value in enumerate(tree))
    else:
        yield prefix, tree
        return
    for key, value in items:
        yield from leaves(value, f"{prefix}.{key}" if prefix else key)


def _line(error: yaml.YAMLError) -> int:
    mark = getattr(error, "problem_mark", None)
    return mark.line + 1 if mark is not None else 0


def _words(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
    if "undefined alias" in problem:
        return "not valid YAML: an alias that stands for nothing (a text that begins with '*' needs quotes)"
    if "cannot start any token" in problem:
        problem += " (a text that begins with it needs quotes)"
    return f"not valid YAML: {_QUOTED.sub('...', problem)}"
