"""Layers become settings: defaults < file < environment < command line. All that is wrong is said at once, each with where it came from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from gateway.config import strict
from gateway.config.document import MAX_BYTES, Document, leaves, unsound
from gateway.config.rules import RULES
from gateway.config.tree import Settings
from gateway.errors import ConfigError, ConfigErrors

ENV_PREFIX = "PENSTOCK__"
_FILE = "file "


class Loaded(msgspec.Struct, frozen=True):
    """Settings and, for everything that was not left at its default, by dotted path where it came from: `file p.yaml:3`,
    `environment NAME`, `command line`."""

    settings: Settings
    origins: dict[str, str]

    def located(self, error: ConfigError) -> ConfigErrors:
        """The same refusal with where each of its settings came from."""
        return _all(error.errors, self.origins)


def load(
    path: Path | None = None,
    environment: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    further: Callable[[Settings], object] | None = None,
) -> Loaded:
    """Settings from all layers; raises ConfigErrors with everything that is wrong.

    `overrides` maps dotted paths to values (the command line). `further` is asked for what only others know, such as the backends'
    sections, and raises ConfigError.
    """
    layers = _Layers()
    if path is not None:
        layers.file(path)
        if layers.problems and not layers.tree:  # nothing of it could be read, so nothing can be said of the rest
            raise ConfigErrors(layers.problems)
    for name, text in sorted((os.environ if environment is None else environment).items()):
        if name.startswith(ENV_PREFIX):
            layers.variable(name, text)
    for dotted, value in (overrides or {}).items():
        layers.put(dotted.split("."), value, "command line")
    settings = _settings(layers, further)
    if layers.problems:
        raise _all(layers.problems, layers.origins)
    return Loaded(settings, layers.origins)


def _all(errors: Iterable[ConfigError], origins: Mapping[str, str]) -> ConfigErrors:
    """Each with where it came from, those of the file in its order first."""

    def order(error: ConfigError) -> tuple[bool, int]:
        line = error.source.rpartition(":")[2]
        return not line.isdigit(), int(line) if line.isdigit() else 0

    return ConfigErrors(sorted((_located(error, origins) for error in errors), key=order))


def _located(error: ConfigError, origins: Mapping[str, str]) -> ConfigError:
    """With the origin of the setting, or of what it stands in."""
    here = error.path
    while here and not error.source:
        if here in origins:
            return ConfigError(error.path, error.problem, origins[here].removeprefix(_FILE))
        here = here.rpartition(".")[0]
    return error


class _Layers:
    """The tree as it grows, and what was wrong on the way."""

    def __init__(self) -> None:
        self.tree: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.problems: list[ConfigError] = []

    def file(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                content = file.read(MAX_BYTES + 1)
            text = content.decode()
        except (OSError, ValueError) as error:
            self.problems.append(ConfigError(str(path), f"cannot be read: {error}"))
            return
        if len(content) > MAX_BYTES:
            self.problems.append(ConfigError(str(path), f"is larger than {MAX_BYTES >> 20} MB"))
            return
        document = Document(text)
        for where, problem, line in document.problems:
            self.problems.append(ConfigError(where, problem, f"{path}:{line}" if line else str(path)))
        if document.broken or document.value is None:
            return
        if not isinstance(document.value, dict):
            self.problems.append(ConfigError("", f"must be a mapping of sections, is a {type(document.value).__name__}", str(path)))
            return
        self.tree = document.value
        self.origins = {where: f"{_FILE}{path}:{line}" for where, line in document.lines.items()}

    def variable(self, name: str, text: str) -> None:
        origin = f"environment {name}"
        keys = name[len(ENV_PREFIX) :].lower().split("__")
        if not all(keys):
            self.problems.append(ConfigError("", "names no setting; accepted: PENSTOCK__SECTION__KEY", origin))
            return
        document = Document(text)
        for where, problem, _ in document.problems:
            self.problems.append(ConfigError(".".join([*keys, *([where] if where else [])]), problem, origin))
        if not document.problems:
            self.put(keys, document.value, origin)

    def put(self, keys: list[str], value: Any, origin: str) -> None:
        """One value over whatever stands there."""
        if problem := unsound(value):
            self.problems.append(ConfigError(".".join(keys), problem, origin))
            return
        here = self.tree
        for depth, key in enumerate(keys[:-1]):
            below = here.setdefault(key, _default(keys) if depth == 0 else {})
            if not isinstance(below, dict):
                problem = f"is no section, so '{keys[-1]}' cannot be set in it"
                self.problems.append(ConfigError(".".join(keys[: depth + 1]), problem, origin))
                return
            here = below
        here[keys[-1]] = value
        prefix = ".".join(keys)
        for known in [known for known in self.origins if known == prefix or known.startswith(f"{prefix}.")]:
            del self.origins[known]
        self.origins[prefix] = origin
        self.origins.update((leaf, origin) for leaf, _ in leaves({prefix: value}))


def _default(keys: list[str]) -> dict[str, Any]:
    """What a single value is put into where nothing else was said of its section: the backend or model that is there by default stays."""
    section: dict[str, Any] = msgspec.to_builtins(getattr(Settings(), keys[0])) if keys[0] in ("backends", "models") else {}
    return section if keys[1] in section else {}


def _settings(layers: _Layers, further: Callable[[Settings], object] | None) -> Settings:
    """The settings as far as they are right; what is not is added to the problems, each setting once."""
    tree, refused = layers.tree, {error.path for error in layers.problems}
    found = [error for error in strict.problems(tree, Settings, "") if error.path not in refused]
    wrong = {error.path.partition(".")[0] for error in [*layers.problems, *found]}
    known = set(Settings.__struct_fields__)
    if "models" not in tree and isinstance(tree.get("backends"), dict) and "dsv3" not in tree["backends"] and "backends" not in wrong:
        found.append(ConfigError("models", f"is missing: name the models that {', '.join(map(str, tree['backends']))} serves"))
        wrong.add("models")
    settings = msgspec.convert({name: value for name, value in tree.items() if name in known - wrong}, Settings)
    found += _beyond_types(settings, wrong, further)
    layers.problems += found
    return settings


def _beyond_types(settings: Settings, wrong: set[str], further: Callable[[Settings], object] | None) -> Iterator[ConfigError]:
    for rule in RULES:
        if wrong.isdisjoint(rule.reads):
            yield from rule.problems(settings)
    if further is not None and "backends" not in wrong:
        try:
            further(settings)
        except ConfigError as error:
            yield from (single for single in error.errors if single.path.partition(".")[0] not in wrong)
