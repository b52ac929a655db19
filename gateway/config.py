"""The one settings tree: defaults < file < environment < command line, strict, with the origin of every value.

An unknown key is refused with its path and the nearest known key. Environment variables are `PENSTOCK__SECTION__KEY`, their values YAML.
Secrets are hashes or come from files; `masked` hides what is left before anything is printed.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import yaml

from gateway.errors import ConfigError

ENV_PREFIX = "PENSTOCK__"
_SECRET = re.compile(r"(^|_)(key|hash|secret|token|password)$")
_KEY_HASH = re.compile(r"^sha256:[0-9a-f]{64}$")
_ORIGIN = re.compile(r"^[a-z][a-z0-9+.-]*://[^/\s,]+$")
T = TypeVar("T")


class Listen(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Where the public listener binds, how many worker processes serve it, and where the operator's door is (`HOST:PORT`, or `off`)."""

    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    admin: str | bool = "127.0.0.1:9464"  # a bare `off` is false in YAML


class Admin(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Who may use the operator's door: SHA-256 of a key for all of it, and of one that only reads `/metrics`."""

    key_hash: str | None = None
    metrics_key_hash: str | None = None


class ModelEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A model name clients may use, and the backend that serves it. `default_max_tokens`: for requests that name no limit; without it
    the engine's own rule holds (SGLang: up to the end of the context). `balance`: which host is next; `continuation`: how an answer goes on
    whose host died."""

    backend: str
    aliases: list[str] = []
    default_max_tokens: int | None = None
    balance: Literal["two_choices", "weighted_round_robin", "prefix_affinity"] = "two_choices"
    continuation: Literal["text", "exact", "off"] = "text"


class Timeouts(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Seconds. `first_token_s` and `request_s` end at the first event of a stream; after it only `between_tokens_s` counts.

    Told to stop, the gateway serves on for `grace_s` while load balancers take notice, then open answers have `drain_s`. The
    client has `head_s` to send a request's head, `body_s` for its body, and may leave an answer unread for `client_s`.
    """

    head_s: float = 20.0
    body_s: float = 60.0
    client_s: float = 120.0
    connect_s: float = 5.0
    queue_s: float = 30.0
    first_token_s: float = 300.0
    between_tokens_s: float = 120.0
    request_s: float = 600.0
    grace_s: float = 5.0
    drain_s: float = 30.0


class Retry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What retries may cost, in prompt tokens: a share (`budget_share`) of those of the last 10 s, and in quiet times `reserve_tokens`.
    `max_continuations`: how often an answer that has begun may move to another host."""

    budget_share: float = 0.2
    reserve_tokens: int = 20_000
    max_continuations: int = 2


class Admission(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How many requests may wait, in each worker and for each backend, while every host is full."""

    max_queue: int = 1000


class KeyEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A client's key: its name, and the SHA-256 of what the client sends."""

    name: str
    hash: str


class Log(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`format: auto` is readable on a terminal and JSON in a pipe."""

    level: str = "info"
    format: str = "auto"
    requests: bool = True


class Cors(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Which web pages may call the gateway: `origins` as browsers send them (`https://app.example`), or `*` for all."""

    origins: list[str] = []
    max_age_s: int = 600


class Security(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Bounds on what a client may send, and whose word counts. `trusted_proxies`: addresses and networks whose `x-forwarded-for` and
    `x-forwarded-proto` are believed."""

    body_limit_mb: int = 32
    trusted_proxies: list[str] = []
    cors: Cors = Cors()


class Settings(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The whole tree. A backend's section is checked by the plugin that its `kind` names."""

    listen: Listen = Listen()
    admin: Admin = Admin()
    models: dict[str, ModelEntry] = msgspec.field(default_factory=lambda: {"deepseek-v3-tiny": ModelEntry(backend="dsv3")})
    backends: dict[str, dict[str, Any]] = msgspec.field(
        default_factory=lambda: {"dsv3": {"kind": "sglang_dsv3", "hosts": [{"launch": "local"}]}}
    )
    timeouts: Timeouts = Timeouts()
    retry: Retry = Retry()
    admission: Admission = Admission()
    keys: list[KeyEntry] = []
    log: Log = Log()
    security: Security = Security()


class Loaded(msgspec.Struct, frozen=True):
    """Settings and, for every leaf's dotted path that was not left at its default, where its value came from."""

    settings: Settings
    origins: dict[str, str]


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key written twice in one mapping, where plain YAML keeps the last one silently."""


def _no_duplicates(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            mark = key_node.start_mark
            raise ConfigError(f"line {mark.line + 1}", f"the key '{key}' is written twice")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _no_duplicates)


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line}", f"not valid YAML: {getattr(error, 'problem', error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}, {error.path}", error.problem) from None


def load(
    path: Path | None = None,
    environment: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Loaded:
    """Settings from all layers. `overrides` maps dotted paths to values (the command line). Raises ConfigError."""
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(str(path), f"cannot be read: {error}") from None
        content = _yaml(text, str(path))
        if content is not None and not isinstance(content, dict):
            raise ConfigError(str(path), f"must be a mapping of sections, is a {type(content).__name__}")
        tree = content or {}
        origins = {leaf: f"file {path}" for leaf, _ in leaves(tree)}
    for name, text in sorted((os.environ if environment is None else environment).items()):
        if name.startswith(ENV_PREFIX):
            _put(tree, name[len(ENV_PREFIX) :].lower().split("__"), _yaml(text, name), f"environment {name}", origins)
    for dotted, value in (overrides or {}).items():
        _put(tree, dotted.split("."), value, "command line", origins)
    if "models" not in tree and isinstance(tree.get("backends"), dict) and "dsv3" not in tree["backends"]:
        raise ConfigError("models", f"is missing: name the models that {', '.join(map(str, tree['backends']))} serves")
    settings = convert(tree, Settings, "")
    _verify(settings)
    return Loaded(settings, origins)


def _put(tree: dict[str, Any], keys: list[str], value: Any, origin: str, origins: dict[str, str]) -> None:
    here = tree
    for depth, key in enumerate(keys[:-1]):
        below = here.setdefault(key, {})
        if not isinstance(below, dict):
            raise ConfigError(".".join(keys[: depth + 1]), f"is no section, so {origin} cannot set '{keys[-1]}' in it")
        here = below
    here[keys[-1]] = value
    prefix = ".".join(keys)
    for leaf, _ in leaves({prefix: value}):
        origins[leaf] = origin


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


def convert(value: Any, kind: type[T], path: str) -> T:
    """`value` as the strict struct `kind`; raises ConfigError with the full path and, for a typo, the nearest known key."""
    _refuse_unknown(value, kind, path)
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        text, _, inner = str(error).partition(" - at `$")
        inner = inner.rstrip("`").replace("[...]", "").replace("[", ".").replace("]", "").lstrip(".")
        raise ConfigError(".".join(part for part in (path, inner) if part), text[0].lower() + text[1:]) from None


def _refuse_unknown(value: Any, kind: Any, path: str) -> None:
    """Walk the value beside its type, so that a typo is named with its whole path, list index and all."""
    info = msgspec.inspect.type_info(kind) if not isinstance(kind, msgspec.inspect.Type) else kind
    if isinstance(info, msgspec.inspect.UnionType):
        for option in info.types:
            if isinstance(option, msgspec.inspect.StructType | msgspec.inspect.ListType | msgspec.inspect.DictType):
                _refuse_unknown(value, option, path)
    elif isinstance(info, msgspec.inspect.StructType) and isinstance(value, dict):
        known = {field.encode_name: field.type for field in info.fields}
        for key, below in value.items():
            here = f"{path}.{key}" if path else str(key)
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(sorted(known))}"
                raise ConfigError(here, f"unknown key{hint}")
            _refuse_unknown(below, known[key], here)
    elif isinstance(info, msgspec.inspect.DictType) and isinstance(value, dict):
        for key, below in value.items():
            _refuse_unknown(below, info.value_type, f"{path}.{key}")
    elif isinstance(info, msgspec.inspect.ListType) and isinstance(value, list):
        for index, below in enumerate(value):
            _refuse_unknown(below, info.item_type, f"{path}.{index}")


def _verify(settings: Settings) -> None:
    """Rules that types cannot say; raises ConfigError."""
    listen = settings.listen
    if not 0 <= listen.port <= 65535:
        raise ConfigError("listen.port", f"{listen.port} is no port; accepted: 0 (any free one) to 65535")
    if not 1 <= listen.workers <= 64:
        raise ConfigError("listen.workers", f"{listen.workers} is out of range; accepted: 1 to 64")
    for name, seconds in msgspec.structs.asdict(settings.timeouts).items():
        if not (0 < seconds <= 86400 or (name == "grace_s" and seconds == 0)):
            raise ConfigError(f"timeouts.{name}", f"{seconds} is out of range; accepted: above 0, up to 86400 seconds")
    for field, value, accepted in (
        ("level", settings.log.level, ("debug", "info", "warning", "error")),
        ("format", settings.log.format, ("auto", "json", "text")),
    ):
        if value not in accepted:
            raise ConfigError(f"log.{field}", f"'{value}' is not accepted; one of: {', '.join(accepted)}")
    if not 0 <= settings.retry.budget_share <= 1:
        raise ConfigError("retry.budget_share", f"{settings.retry.budget_share:g} is out of range; accepted: 0 to 1")
    if settings.retry.reserve_tokens < 0:
        raise ConfigError("retry.reserve_tokens", f"{settings.retry.reserve_tokens} is out of range; accepted: 0 or more")
    if not 0 <= settings.retry.max_continuations <= 10:
        raise ConfigError("retry.max_continuations", f"{settings.retry.max_continuations} is out of range; accepted: 0 to 10")
    if not 0 <= settings.admission.max_queue <= 100_000:
        raise ConfigError("admission.max_queue", f"{settings.admission.max_queue} is out of range; accepted: 0 to 100000")
    _verify_security(settings.security)
    _verify_keys(settings)
    _verify_admin(settings)
    taken: dict[str, str] = {}
    if not settings.models:
        raise ConfigError("models", "no model is configured, so nothing could be served")
    for model, entry in settings.models.items():
        if entry.default_max_tokens is not None and not 1 <= entry.default_max_tokens < 1 << 31:
            raise ConfigError(f"models.{model}.default_max_tokens", f"{entry.default_max_tokens} is out of range; accepted: 1 or more")
        for alias in (model, *entry.aliases):
            if alias in taken:
                raise ConfigError(f"models.{model}", f"the name '{alias}' is already taken by models.{taken[alias]}")
            taken[alias] = model


def _verify_security(security: Security) -> None:
    if not 1 <= security.body_limit_mb <= 1024:
        raise ConfigError("security.body_limit_mb", f"{security.body_limit_mb} is out of range; accepted: 1 to 1024")
    for index, proxy in enumerate(security.trusted_proxies):
        try:
            ipaddress.ip_network(proxy)
        except ValueError:
            raise ConfigError(f"security.trusted_proxies.{index}", f"'{proxy}' is no address and no network like 10.0.0.0/8") from None
    for index, origin in enumerate(security.cors.origins):
        if origin != "*" and not _ORIGIN.match(origin):
            raise ConfigError(f"security.cors.origins.{index}", f"'{origin}' is no origin like https://app.example, nor '*'")
    if not 0 <= security.cors.max_age_s <= 86400:
        raise ConfigError("security.cors.max_age_s", f"{security.cors.max_age_s} is out of range; accepted: 0 to 86400")


def _verify_keys(settings: Settings) -> None:
    names: set[str] = set()
    for index, key in enumerate(settings.keys):
        if not _KEY_HASH.match(key.hash):
            raise ConfigError(f"keys.{index}.hash", "must be 'sha256:' and 64 hex digits (the key itself never stands in the file)")
        if key.name in names:
            raise ConfigError(f"keys.{index}.name", f"'{key.name}' is used twice")
        names.add(key.name)
    if not settings.keys and not is_loopback(settings.listen.host):
        raise ConfigError(
            "listen.host",
            f"without keys the gateway serves on loopback only, not on {settings.listen.host}; configure `keys` first",
        )


def admin_address(listen: Listen) -> tuple[str, int] | None:
    """Where the operator's door is; None when it is off. Raises ConfigError."""
    if listen.admin in ("off", False):
        return None
    host, _, port = str(listen.admin).rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError("listen.admin", f"'{listen.admin}' is no address; accepted: HOST:PORT, or off")
    return host.strip("[]"), int(port)


def _verify_admin(settings: Settings) -> None:
    for name in ("key_hash", "metrics_key_hash"):
        digest = getattr(settings.admin, name)
        if digest is not None and not _KEY_HASH.match(digest):
            raise ConfigError(f"admin.{name}", "must be 'sha256:' and 64 hex digits (the key itself never stands in the file)")
    address = admin_address(settings.listen)
    if address is None:
        return
    if address == (settings.listen.host, settings.listen.port) and address[1] != 0:
        raise ConfigError("listen.admin", "must differ from the public address")
    if settings.admin.key_hash is None and not is_loopback(address[0]):
        raise ConfigError("listen.admin", f"without admin.key_hash the operator's door opens on loopback only, not on {address[0]}")


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def masked(path: str, value: Any) -> Any:
    """The value as it may be printed: what looks like a secret becomes stars."""
    leaf = path.rsplit(".", 1)[-1]
    return "********" if isinstance(value, str) and value and _SECRET.search(leaf) else value
