"""The settings as structs: every key, its type, its range and what it means. docs/configuration.md is made from this file.

A range stands in `Meta`, a choice of words in `Literal`. `extra` holds what a range cannot say in a refusal (`accepted`), and what a
default of None stands for (`default`). What a range cannot say at all is a `Check`. What concerns several settings is in `rules`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from gateway.config import checks
from gateway.config.access import Alerts, Allowance, Issuer, KeyEntry, Limits, Team
from gateway.config.sentinel import Sentinel
from gateway.config.vocabulary import END, Count, File, HostPort, KeyHash, ModelName, Money, Name, Seconds, Section, Share
from gateway.serving.balance.settings import Admission, Affinity
from gateway.wire.check import Check


class Tls(Section, frozen=True):
    """TLS on the public listener. The files are PEM, and tried whenever the configuration is checked."""

    cert_file: Annotated[File, Meta(description="the certificate, with those between it and its authority")]
    key_file: Annotated[File, Meta(description="its private key, without a pass phrase")]
    client_ca_file: Annotated[
        File | None, Meta(description="clients must show a certificate that one of the authorities in this file has signed")
    ] = None


class Listen(Section, frozen=True):
    """Where the gateway listens, and how many worker processes serve."""

    host: Annotated[str, Meta(description="address; without keys only loopback is accepted"), Check(checks.host)] = "127.0.0.1"
    port: Annotated[
        int, Meta(ge=0, le=65535, description="port; 0 takes any free one", extra={"accepted": "0 (any free one) to 65535"})
    ] = 8000
    workers: Annotated[int, Meta(ge=1, le=64, description="worker processes; with limits, more than one need Redis")] = 1
    # A bare `off` is false in YAML.
    admin: Annotated[str | bool, Meta(description="of the admin API"), Check(checks.admin, "HOST:PORT, or off")] = "127.0.0.1:9464"
    tls: Annotated[Tls | None, Meta(description="the public listener speaks TLS; plain HTTP without it")] = None


class OperatorKey(Section, frozen=True):
    """An operator's own key."""

    name: Annotated[Name, Meta(description="what the audit calls its owner")]
    hash: Annotated[KeyHash, Meta(description="SHA-256 of the key")]
    role: Annotated[Literal["read", "keys", "all"], Meta(description="what it may: read, change clients' keys as well, or everything")] = (
        "read"
    )


class Admin(Section, frozen=True):
    """Who may use the admin API."""

    key_hash: Annotated[
        KeyHash | None, Meta(description="SHA-256 of the admin key; without one the gateway makes one and keeps it in `state/admin.key`")
    ] = None
    metrics_key_hash: Annotated[KeyHash | None, Meta(description="SHA-256 of a key that reads `/metrics` and nothing else")] = None
    keys: Annotated[list[OperatorKey], Meta(description="operators' own keys")] = []


class Price(Section, frozen=True):
    """What a million tokens cost."""

    prompt: Annotated[Money, Meta(description="of prompts")] = 0.0
    completion: Annotated[Money, Meta(description="of answers")] = 0.0
    cached: Annotated[Money | None, Meta(description="of prompts that the engine had in its cache", extra={"default": "as `prompt`"})] = (
        None
    )


class ModelEntry(Section, frozen=True):
    """A model name that clients may use."""

    backend: Annotated[str, Meta(description="which backend serves it")]
    aliases: Annotated[list[ModelName], Meta(description="further names for it")] = []
    default_max_tokens: Annotated[
        Count | None,
        Meta(
            description="the bound on an answer whose request names none; without it the engine's own rule holds (SGLang: up to the end of "
            "the context)"
        ),
    ] = None
    balance: Annotated[
        Literal["affinity", "two_choices", "weighted_round_robin", "prefix_affinity"], Meta(description="which host is next")
    ] = "affinity"
    continuation: Annotated[Literal["text", "exact", "off"], Meta(description="how an answer goes on whose host died")] = "text"
    limits: Annotated[Limits, Meta(description="for all keys together")] = Limits()
    price: Annotated[Price | None, Meta(description="what a million tokens cost")] = None
    tokenizer: Annotated[
        File | None,
        Meta(
            description="a `tokenizer.json` or its folder, to count prompts before they are admitted; needs `pip install "
            "'penstock[tokenizer]'`"
        ),
    ] = None


class Timeouts(Section, frozen=True):
    """How long what may take, in seconds. `first_token_s` and `request_s` end at the first event of a stream; after it only
    `between_tokens_s` counts."""

    head_s: Annotated[Seconds, Meta(description="a client's request line and headers (64 kB at most); then 408")] = 20.0
    body_s: Annotated[Seconds, Meta(description="a client's request body; then 408")] = 60.0
    client_s: Annotated[
        Seconds,
        Meta(description="how long a client may leave what it was sent unread; then its connection is cut and its generation stopped"),
    ] = 120.0
    connect_s: Annotated[Seconds, Meta(description="connecting to a host")] = 5.0
    queue_s: Annotated[Seconds, Meta(description="waiting for a host while every host is full")] = 30.0
    first_token_s: Annotated[
        Seconds,
        Meta(
            description="of a stream: to the first event, for each attempt, and a second more for every 1,000 tokens of its prompt; then "
            "another host is tried, unless all others are full"
        ),
    ] = 300.0
    between_tokens_s: Annotated[
        Seconds,
        Meta(description="of a stream: the engine's silence between two events; time spent waiting for a slow client does not count"),
    ] = 120.0
    keepalive_s: Annotated[
        Seconds | None,
        Meta(
            description="of a stream: an SSE comment every so often while the engine is silent before the first event; the first comment "
            "commits the 200, so what goes wrong after it is an error event, which no client tries again by itself"
        ),
    ] = None
    request_s: Annotated[
        Seconds, Meta(description="all attempts together: of a JSON answer, all of it; of a stream, until its first event")
    ] = 600.0
    grace_s: Annotated[
        float,
        Meta(ge=0, le=86400, description="when stopping: how long the gateway goes on accepting while `/readyz` already says 503"),
    ] = 5.0
    drain_s: Annotated[Seconds, Meta(description="after that: how long open answers may still take")] = 30.0


class Retry(Section, frozen=True):
    """What further attempts may cost."""

    budget_share: Annotated[Share, Meta(description="in prompt tokens, as a share of those of the last 10 s ...")] = 0.2
    reserve_tokens: Annotated[int, Meta(ge=0, le=10**12, description="... and in quiet times, in tokens")] = 20_000
    max_continuations: Annotated[
        int, Meta(ge=0, le=10, description="how often an answer that has begun may move to another host; 0 is never")
    ] = 2
    hedge_json: Annotated[
        bool, Meta(description="ask for JSON as streams: [who dies or is silent is noticed at once](failover.md#json-answers)")
    ] = False


class LimitRules(Section, frozen=True):
    """How limits are kept, and the ledger."""

    burst_s: Annotated[float, Meta(ge=1, le=3600, description="what of a rate may come at once, in seconds of it")] = 60.0
    timezone: Annotated[
        str, Meta(description="whose calendar days and months quotas run by"), Check(checks.time_zone, "one like UTC or Europe/Berlin")
    ] = "UTC"
    keep_days: Annotated[int, Meta(ge=1, le=4000, description="for how many days the ledger is kept")] = 400
    ledger_file: Annotated[
        File | None,
        Meta(
            description="where, without Redis; of two gateways with one file the second keeps its ledger in memory and says so",
            extra={"default": "`state/usage.json` in the home folder"},
        ),
    ] = None
    isolate_prefix_cache: Annotated[bool, Meta(description="keys do not share the engines' prefix cache")] = True


class Redis(Section, frozen=True):
    """Where several workers and gateways keep what they share: limits, keys, the ledger."""

    # Not shown when it is refused: what is wrong with it may be that its password is not percent-encoded.
    url: Annotated[
        str | None,
        Meta(description="where it is; a password belongs into `password_file`, or stands here percent-encoded"),
        Check(checks.redis_url, "redis://HOST:PORT/DB, rediss://HOST:PORT/DB or unix:///PATH", quote=False),
    ] = None
    username: Annotated[str | None, Meta(description="of a Redis user (ACL)")] = None
    password_file: Annotated[File | None, Meta(description="a file with the password")] = None
    ca_file: Annotated[File | None, Meta(description="a file of certificates to trust for `rediss://`")] = None
    sentinels: Annotated[
        list[HostPort], Meta(description="`HOST:PORT` of each sentinel; `url` then gives only scheme, user and database")
    ] = []
    service: Annotated[Name, Meta(description="what the sentinels call the master")] = "mymaster"
    cluster: Annotated[bool, Meta(description="`url` is a node of a Redis Cluster")] = False
    prefix: Annotated[Name, Meta(description="keeps deployments apart: every key begins with `penstock:{PREFIX}:`")] = "default"
    store_timeout_ms: Annotated[float, Meta(ge=1, le=10_000, description="no request waits longer for Redis")] = 50.0
    on_store_failure: Annotated[Literal["local", "open", "closed"], Meta(description="what holds while Redis is gone")] = "local"


class Tracing(Section, frozen=True):
    """Where traces go, and which."""

    otlp_endpoint: Annotated[
        str | None,
        Meta(description="a collector", extra={"default": "OTEL_EXPORTER_OTLP_ENDPOINT, or none"}),
        Check(checks.otlp_url, "a URL like http://jaeger:4317"),
    ] = None
    protocol: Annotated[Literal["grpc", "http/protobuf"], Meta(description="what it is spoken to in")] = "grpc"
    sample_ratio: Annotated[
        Share | None,
        Meta(
            description="which share of the requests that come without a trace is recorded",
            extra={"default": "OTEL_TRACES_SAMPLER_ARG, or `1`"},
        ),
    ] = None
    keep_errors: Annotated[bool, Meta(description="those that fail are recorded in any case")] = True
    slow_s: Annotated[Seconds | None, Meta(description="and those that take longer")] = None
    capture_content: Annotated[bool, Meta(description="prompts are recorded too")] = False
    service_name: Annotated[
        str, Meta(min_length=1, max_length=256, description="what traces call the gateway; OTEL_SERVICE_NAME goes before it")
    ] = "penstock"

    def on(self) -> bool:
        """Whether there is a collector."""
        if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
            return False
        return bool(
            self.otlp_endpoint or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        )


class Log(Section, frozen=True):
    """The log, on standard error."""

    level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="from which level on")] = "info"
    format: Annotated[Literal["auto", "json", "text"], Meta(description="`auto`: text on a terminal, else a JSON object a line")] = "auto"
    requests: Annotated[bool, Meta(description="one line a request")] = True


class Cors(Section, frozen=True):
    """Which web pages may call the gateway."""

    origins: Annotated[
        list[
            Annotated[
                str,
                Meta(
                    pattern=f"^([a-z][a-z0-9+.-]*://[^/\\s,]+|\\*){END}", extra={"accepted": "an origin like https://app.example, or '*'"}
                ),
            ]
        ],
        Meta(description="origins as browsers send them (`https://app.example`), or `*` for all"),
    ] = []
    max_age_s: Annotated[int, Meta(ge=0, le=86400, description="how long a browser may remember that")] = 600


class Security(Section, frozen=True):
    """Bounds on what a client may send, and whose word counts."""

    body_limit_mb: Annotated[int, Meta(ge=1, le=1024, description="larger requests are refused with 413")] = 32
    body_memory_mb: Annotated[
        int,
        Meta(
            ge=1,
            le=1 << 20,
            description="the request bodies that one worker is reading or parsing, all together; at least `security.body_limit_mb`",
        ),
    ] = 256
    strict_parameters: Annotated[bool, Meta(description="OpenAI's own rules for parameters, where they are stricter than the engine's")] = (
        False
    )
    require_keys: Annotated[
        bool | None,
        Meta(
            description="whether clients need a key; beyond loopback they always do",
            extra={"default": "`true` where there are keys or `oidc` in the file, or Redis is configured"},
        ),
    ] = None
    trusted_proxies: Annotated[
        list[Annotated[str, Check(checks.network, "one like 10.0.0.1 or 10.0.0.0/8")]],
        Meta(description="addresses and networks whose `x-forwarded-for` and `x-forwarded-proto` are believed"),
    ] = []
    cors: Cors = Cors()


class Settings(Section, frozen=True):
    """The whole tree. A backend's section is checked by the plugin that its `kind` names."""

    FORMER: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("model", "inference", "resource"), "of a file for `SGLangEngine`, which `penstock engine import FILE` converts"
    )

    listen: Listen = Listen()
    admin: Admin = Admin()
    models: dict[ModelName, ModelEntry] = msgspec.field(default_factory=lambda: {"deepseek-v3-tiny": ModelEntry(backend="dsv3")})
    backends: dict[Name, dict[str, Any]] = msgspec.field(
        default_factory=lambda: {"dsv3": {"kind": "sglang_dsv3", "hosts": [{"launch": "local"}]}}
    )
    timeouts: Timeouts = Timeouts()
    retry: Retry = Retry()
    admission: Admission = Admission()
    affinity: Affinity = Affinity()
    keys: list[KeyEntry] = []
    teams: list[Team] = []
    oidc: list[Issuer] = []
    alerts: Alerts = Alerts()
    sentinel: Sentinel = Sentinel()
    limits: LimitRules = LimitRules()
    redis: Redis = Redis()
    tracing: Tracing = Tracing()
    log: Log = Log()
    security: Security = Security()

    def keys_required(self) -> bool:
        """Whether a request without a key is refused."""
        chosen = self.security.require_keys
        return bool(self.keys or self.oidc or self.redis.url) if chosen is None else chosen

    def limited(self) -> bool:
        """Whether there is any limit or budget."""
        callers: list[Allowance] = [*self.keys, *(each for issuer in self.oidc for each in (issuer.default, *issuer.groups))]
        by_model = [own for caller in callers for own in caller.per_model.values()]
        every: list[Limits] = [*callers, *self.teams, *(model.limits for model in self.models.values()), *by_model]
        return any(
            value is not None for limits in every for value in (limits.rpm, limits.tpm, limits.max_in_flight, limits.tokens_per_day)
        ) or any(budget is not None for budget in [*(caller.budget for caller in callers), *(team.budget for team in self.teams)])
