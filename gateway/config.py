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
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar
from zoneinfo import ZoneInfo

import msgspec
import yaml

from gateway.errors import ConfigError

ENV_PREFIX = "PENSTOCK__"
_SECRET = re.compile(r"(^|_)(key|hash|secret|token|password)$")
_KEY_HASH = re.compile(r"^sha256:[0-9a-f]{64}$")
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")
_USERINFO = re.compile(r"(://[^/@:]*:)[^/@]*@")
_ORIGIN = re.compile(r"^[a-z][a-z0-9+.-]*://[^/\s,]+$")
T = TypeVar("T")


class Listen(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Where the public listener binds, how many worker processes serve it, and where the admin API listens (`HOST:PORT`, or `off`)."""

    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    admin: str | bool = "127.0.0.1:9464"  # a bare `off` is false in YAML


class OperatorKey(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """An operator's own key: its name in the audit, its SHA-256, and what it may: read, change clients' keys as well, or everything."""

    name: str
    hash: str
    role: Literal["read", "keys", "all"] = "read"


class Admin(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Who may use the admin API: SHA-256 of a key for all of it, of one that only reads `/metrics`, and operators' own keys."""

    key_hash: str | None = None
    metrics_key_hash: str | None = None
    keys: list[OperatorKey] = []


class Limits(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Requests and tokens (of prompt and completion) a minute, requests at once, tokens a calendar day."""

    rpm: float | None = None
    tpm: float | None = None
    max_in_flight: int | None = None
    tokens_per_day: int | None = None


class Price(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What a million tokens cost; of prompts that the engine had in its cache `cached`, where that is another price."""

    prompt: float = 0.0
    completion: float = 0.0
    cached: float | None = None


class ModelEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A model name clients may use, and the backend that serves it. `default_max_tokens`: for requests that name no limit; without it
    the engine's own rule holds (SGLang: up to the end of the context). `balance`: which host is next; `continuation`: how an answer goes on
    whose host died. `limits`: for all keys together. `tokenizer`: counts prompts before they are admitted."""

    backend: str
    aliases: list[str] = []
    default_max_tokens: int | None = None
    balance: Literal["two_choices", "weighted_round_robin", "prefix_affinity"] = "two_choices"
    continuation: Literal["text", "exact", "off"] = "text"
    limits: Limits = Limits()
    price: Price | None = None
    tokenizer: str | None = None


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


class Budget(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Money a key may spend by calendar day or month, in the unit of the prices."""

    amount: float
    per: Literal["day", "month"] = "month"


class KeyEntry(Limits, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A client's key: its name, the SHA-256 of what the client sends, and what it may. `models`: names it may use, all without it;
    `per_model`: limits on one model beside those of the key; `max_*`: the most a single request may ask for; `priority`: its class in the
    queue, lower is first; `expires`: an ISO 8601 date and time; `metadata`: the operator's own words."""

    name: str
    hash: str
    models: list[str] | None = None
    per_model: dict[str, Limits] = {}
    max_n: int | None = None
    max_tokens: int | None = None
    max_prompt_bytes: int | None = None
    max_grammar_bytes: int | None = None
    priority: int = 0
    budget: Budget | None = None
    expires: str | None = None
    metadata: dict[str, str] = {}


class LimitRules(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How limits are kept: what may come at once, in seconds of a rate; whose calendar days; for how many days usage is remembered;
    where, without Redis (`state/usage.json` in the home folder); whether keys share the engines' prefix cache."""

    burst_s: float = 60.0
    timezone: str = "UTC"
    keep_days: int = 400
    ledger_file: str | None = None
    isolate_prefix_cache: bool = True


class Redis(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Where several workers or gateways keep what they share. `url`: `redis://`, `rediss://` or `unix://`; with `sentinels` (a list of
    `HOST:PORT`) the master called `service` is used, with `cluster` any node of a Redis Cluster. `on_store_failure`: what holds while it
    is gone."""

    url: str | None = None
    username: str | None = None
    password_file: str | None = None
    ca_file: str | None = None
    sentinels: list[str] = []
    service: str = "mymaster"
    cluster: bool = False
    prefix: str = "default"
    store_timeout_ms: float = 50.0
    on_store_failure: Literal["local", "open", "closed"] = "local"


class Tracing(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Where traces go: `otlp_endpoint` (or OTEL_EXPORTER_OTLP_ENDPOINT), none without it. `sample_ratio`: of requests that come without a
    trace; `keep_errors` and `slow_s`: those that fail or take longer are recorded in any case. `capture_content`: prompts too."""

    otlp_endpoint: str | None = None
    protocol: Literal["grpc", "http/protobuf"] = "grpc"
    sample_ratio: float | None = None
    keep_errors: bool = True
    slow_s: float | None = None
    capture_content: bool = False
    service_name: str = "penstock"

    def on(self) -> bool:
        """Whether there is a collector."""
        if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
            return False
        return bool(
            self.otlp_endpoint or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        )


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
    """Bounds on what a client may send, and whose word counts. `require_keys`: whether clients need one (by default where there are keys or
    Redis, and always beyond loopback). `trusted_proxies`: addresses and networks whose `x-forwarded-for` and
    `x-forwarded-proto` are believed."""

    body_limit_mb: int = 32
    require_keys: bool | None = None
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
    limits: LimitRules = LimitRules()
    redis: Redis = Redis()
    tracing: Tracing = Tracing()
    log: Log = Log()
    security: Security = Security()

    def keys_required(self) -> bool:
        """Whether a request without a key is refused."""
        chosen = self.security.require_keys
        return bool(self.keys or self.redis.url) if chosen is None else chosen

    def limited(self) -> bool:
        """Whether there is any limit or budget."""
        every = [
            *self.keys,
            *(model.limits for model in self.models.values()),
            *(own for key in self.keys for own in key.per_model.values()),
        ]
        return any(
            value is not None for limits in every for value in (limits.rpm, limits.tpm, limits.max_in_flight, limits.tokens_per_day)
        ) or any(key.budget is not None for key in self.keys)


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
        inner = inner.rstrip("`").replace("[...]", ".*").replace("[", ".").replace("]", "").lstrip(".")
        parts = [part for part in inner.split(".") if part]
        place = ".".join(part for part in (path, *parts) if part and part != "*")
        accepted = _literals(msgspec.inspect.type_info(kind), parts)
        if accepted and text.startswith("Invalid enum value"):
            given = text.removeprefix("Invalid enum value ").strip("'")
            near = difflib.get_close_matches(given, accepted, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ConfigError(place, f"'{given}' is not accepted; one of: {', '.join(accepted)}{hint}") from None
        raise ConfigError(place, text[0].lower() + text[1:]) from None


def _literals(info: msgspec.inspect.Type, parts: list[str]) -> list[str]:
    """The words that a setting takes, where it takes one of a few."""
    if isinstance(info, msgspec.inspect.UnionType):
        return [word for option in info.types for word in _literals(option, parts)]
    if not parts:
        return [str(value) for value in info.values] if isinstance(info, msgspec.inspect.LiteralType) else []
    if isinstance(info, msgspec.inspect.StructType):
        return next((_literals(field.type, parts[1:]) for field in info.fields if field.encode_name == parts[0]), [])
    if isinstance(info, msgspec.inspect.ListType):
        return _literals(info.item_type, parts[1:])
    return _literals(info.value_type, parts[1:]) if isinstance(info, msgspec.inspect.DictType) else []


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
    _verify_limits(settings)
    _verify_redis(settings.redis)
    _verify_tracing(settings.tracing)
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
        verify_key(key, f"keys.{index}", settings)
        if key.name in names:
            raise ConfigError(f"keys.{index}.name", f"'{key.name}' is used twice")
        names.add(key.name)
    if not settings.keys_required() and not is_loopback(settings.listen.host):
        raise ConfigError(
            "listen.host",
            f"without keys the gateway serves on loopback only, not on {settings.listen.host}; configure `keys` first",
        )


def verify_key(key: KeyEntry, path: str, settings: Settings) -> None:
    """Raises ConfigError for what a key's types cannot say; for keys in the file, and for those that are made while the gateway runs."""
    if not _KEY_HASH.match(key.hash):
        raise ConfigError(f"{path}.hash", "must be 'sha256:' and 64 hex digits (the key itself never stands in the file)")
    if not _NAME.match(key.name):
        raise ConfigError(
            f"{path}.name", f"'{key.name}' is no name: up to 64 letters, digits and . _ @ -, beginning with a letter or digit"
        )
    known = {name for model, entry in settings.models.items() for name in (model, *entry.aliases)}
    for where, names in (("models", key.models or []), ("per_model", list(key.per_model))):
        for name in names:
            if name not in (known if where == "models" else settings.models):
                near = difflib.get_close_matches(name, known, n=1)
                raise ConfigError(f"{path}.{where}", f"no model is called '{name}'" + (f"; did you mean '{near[0]}'?" if near else ""))
    for name in ("max_n", "max_tokens", "max_prompt_bytes", "max_grammar_bytes"):
        if (value := getattr(key, name)) is not None and value < 1:
            raise ConfigError(f"{path}.{name}", f"{value} is out of range; accepted: 1 or more")
    if not 0 <= key.priority <= 9:
        raise ConfigError(f"{path}.priority", f"{key.priority} is out of range; accepted: 0 (first) to 9")
    if key.budget is not None:
        if key.budget.amount <= 0:
            raise ConfigError(f"{path}.budget.amount", f"{key.budget.amount:g} is out of range; accepted: above 0")
        if all(model.price is None for model in settings.models.values()):
            raise ConfigError(f"{path}.budget", "no model has a price, so nothing would ever be spent: set models.NAME.price")
    if key.expires is not None:
        try:
            datetime.fromisoformat(key.expires)
        except ValueError:
            raise ConfigError(f"{path}.expires", f"'{key.expires}' is no date and time like 2027-01-31T18:00:00Z") from None
    _verify_amounts(key, path)
    for model, limits in key.per_model.items():
        _verify_amounts(limits, f"{path}.per_model.{model}")


def _verify_amounts(limits: Limits, path: str) -> None:
    for name in ("rpm", "tpm", "max_in_flight", "tokens_per_day"):
        value = getattr(limits, name)
        if value is not None and not 0 < value <= 1e12:
            raise ConfigError(f"{path}.{name}", f"{value:g} is out of range; accepted: above 0 (leave it out for no limit)")


def _verify_limits(settings: Settings) -> None:
    limits = settings.limits
    if not 1 <= limits.burst_s <= 3600:
        raise ConfigError("limits.burst_s", f"{limits.burst_s:g} is out of range; accepted: 1 to 3600 seconds")
    if not 1 <= limits.keep_days <= 4000:
        raise ConfigError("limits.keep_days", f"{limits.keep_days} is out of range; accepted: 1 to 4000")
    try:
        ZoneInfo(limits.timezone)
    except (KeyError, ValueError, OSError):
        raise ConfigError("limits.timezone", f"'{limits.timezone}' is no time zone like UTC or Europe/Berlin") from None
    for model, entry in settings.models.items():
        _verify_amounts(entry.limits, f"models.{model}.limits")
        price = entry.price
        if price is not None and min(price.prompt, price.completion, price.cached or 0.0) < 0:
            raise ConfigError(f"models.{model}.price", "is below 0")
    if settings.limited() and settings.listen.workers > 1 and settings.redis.url is None:
        raise ConfigError(
            "listen.workers",
            f"{settings.listen.workers} workers cannot keep limits together without Redis: set redis.url, or listen.workers to 1",
        )


def _verify_tracing(tracing: Tracing) -> None:
    if tracing.sample_ratio is not None and not 0 <= tracing.sample_ratio <= 1:
        raise ConfigError("tracing.sample_ratio", f"{tracing.sample_ratio:g} is out of range; accepted: 0 to 1")
    if tracing.slow_s is not None and not 0 < tracing.slow_s <= 86400:
        raise ConfigError("tracing.slow_s", f"{tracing.slow_s:g} is out of range; accepted: above 0, up to 86400 seconds")
    if tracing.otlp_endpoint is not None and not tracing.otlp_endpoint.startswith(("http://", "https://")):
        raise ConfigError("tracing.otlp_endpoint", f"'{tracing.otlp_endpoint}' is no URL like http://jaeger:4317")


def _verify_redis(redis: Redis) -> None:
    if redis.url is None:
        return
    if not redis.url.startswith(("redis://", "rediss://", "unix://")):
        raise ConfigError("redis.url", "must begin with redis://, rediss:// or unix://")
    if redis.cluster and redis.sentinels:
        raise ConfigError("redis.sentinels", "a Redis Cluster has no sentinels: use one of the two")
    for index, place in enumerate(redis.sentinels):
        host, _, port = place.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"redis.sentinels.{index}", f"'{place}' is no HOST:PORT")
    if not _NAME.match(redis.prefix):
        raise ConfigError("redis.prefix", f"'{redis.prefix}' is no name: letters, digits and . _ @ -")
    if not 1 <= redis.store_timeout_ms <= 10_000:
        raise ConfigError("redis.store_timeout_ms", f"{redis.store_timeout_ms:g} is out of range; accepted: 1 to 10000")


def admin_address(listen: Listen) -> tuple[str, int] | None:
    """Where the admin API listens; None when it is off. Raises ConfigError."""
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
    names = {"admin", "local"}  # what the keys are called that have no name
    for index, key in enumerate(settings.admin.keys):
        if not _KEY_HASH.match(key.hash):
            raise ConfigError(f"admin.keys.{index}.hash", "must be 'sha256:' and 64 hex digits (the key itself never stands in the file)")
        if not _NAME.match(key.name) or key.name in names:
            raise ConfigError(f"admin.keys.{index}.name", f"'{key.name}' is taken, or no name: letters, digits and . _ @ -, each once")
        names.add(key.name)
    address = admin_address(settings.listen)
    if address is None:
        return
    if address == (settings.listen.host, settings.listen.port) and address[1] != 0:
        raise ConfigError("listen.admin", "must differ from the public address")


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
    if isinstance(value, str) and value and _SECRET.search(leaf):
        return "********"
    return _USERINFO.sub(r"\1********@", value) if isinstance(value, str) and "://" in value else value
