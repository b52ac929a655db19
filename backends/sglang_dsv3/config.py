"""The `sglang_dsv3` section of the configuration."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

import msgspec

from gateway.plugin import Endpoint

# What SGLang 0.5.23 does with DeepSeek-V3 (tried with the real engine, 2026-11-24).
GENERATIVE = (Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES, Endpoint.MESSAGES, Endpoint.SCORE, Endpoint.TOKENIZE)


class Engine(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How a host that is launched here runs SGLang; the defaults serve the tiny checkpoint on a CPU.

    `context_length`, `max_total_tokens` in tokens; `model_path` None is the tiny checkpoint, built on first use.
    """

    model_path: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    tp_size: int = 1
    context_length: int = 4096
    max_running_requests: int = 64
    max_total_tokens: int = 65536
    extra_args: list[str] = []

    def __post_init__(self) -> None:
        for name in ("tp_size", "context_length", "max_running_requests", "max_total_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")


class Host(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One SGLang server: either its `url`, or `launch: local` for one that the gateway runs itself.

    `resolve`: the URL's name stands for all of its addresses (`a`), or for what its SRV records name (`srv`), asked again every
    `dns_refresh_s`. `priority`: its tier, lower first. `max_in_flight`: requests at once, without it what the engine itself says
    (max_running_requests).
    """

    url: str | None = None
    launch: Literal["local"] | None = None
    resolve: Literal["a", "srv"] | None = None
    weight: float = 1.0
    priority: int = 0
    max_in_flight: int | None = None

    def __post_init__(self) -> None:
        if (self.url is None) == (self.launch is None):
            raise ValueError("a host has either `url` or `launch: local`")
        if self.url is not None:
            _check_url(self.url)
        if self.resolve is not None and (self.url is None or urlsplit(self.url).scheme != "http"):
            raise ValueError("resolve needs an http:// URL with a name (a certificate is not for an address)")
        if not self.weight > 0:
            raise ValueError(f"the weight must be above 0, is {self.weight:g}")
        if self.max_in_flight is not None and self.max_in_flight < 1:
            raise ValueError(f"max_in_flight must be at least 1, is {self.max_in_flight}")


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme == "unix":
        if parts.netloc or not parts.path.startswith("/"):
            raise ValueError(f"'{url}' names no socket; accepted: unix:///PATH")
        return
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"'{url}' is no URL of a host; accepted: http://HOST:PORT, https://HOST:PORT or unix:///PATH")
    if parts.path.strip("/") or parts.query or parts.username:
        raise ValueError(f"'{url}' must end after the port")


class Config(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Hosts that serve the same weights. `api_key_file` holds the engines' own key, which no client ever sees.

    `endpoints`: what the model behind them can do (an embedding model: `/v1/embeddings`, `/v1/rerank`). `allow_parameters`: parameters
    internal to the engine that clients may set all the same. `ca_file`: certificates to trust for https, beside the system's. `proxy`: an
    HTTP proxy through which every host is reached. `dns_server`: `ADDRESS:PORT` to ask instead of the system's, for hosts with `resolve`.
    """

    hosts: list[Host]
    endpoints: list[Endpoint] = msgspec.field(default_factory=lambda: list(GENERATIVE))
    allow_parameters: list[str] = []
    engine: Engine = Engine()
    api_key_file: str | None = None
    ca_file: str | None = None
    proxy: str | None = None
    dns_server: str | None = None
    dns_refresh_s: float = 10.0

    def __post_init__(self) -> None:
        if not self.hosts:
            raise ValueError("hosts must name at least one")
        if not self.endpoints:
            raise ValueError("endpoints must name at least one")
        if self.proxy is not None and urlsplit(self.proxy).scheme not in ("http", "https"):
            raise ValueError(f"proxy '{self.proxy}' is no URL like http://HOST:PORT")
        if self.dns_server is not None and not self.dns_server.rpartition(":")[2].isdigit():
            raise ValueError(f"dns_server '{self.dns_server}' must be ADDRESS:PORT")
        if not self.dns_refresh_s > 0:
            raise ValueError(f"dns_refresh_s must be above 0, is {self.dns_refresh_s:g}")
        urls = [host.url.rstrip("/") for host in self.hosts if host.url is not None]
        twice = sorted({url for url in urls if urls.count(url) > 1})
        if twice:
            raise ValueError(f"{twice[0]} is listed twice")
