"""The `sglang_dsv3` section of the configuration."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

import msgspec

from gateway.plugin import Endpoint

# What SGLang 0.5.23 does with DeepSeek-V3 (tried with the real engine, 2026-11-24).
GENERATIVE = (Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES, Endpoint.MESSAGES, Endpoint.SCORE, Endpoint.TOKENIZE)


class Engine(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How SGLang is run: by `penstock engine` on a GPU host, or by the gateway for a host with `launch: local`. The defaults serve the tiny
    checkpoint on a CPU. Lengths and sizes are in tokens.

    `gpus`: indices on this host (none: the CPU). `tp_size`: ranks over all nodes, without it as many as there are GPUs. What is None is
    left to SGLang. `stream_interval`: tokens between two flushes of a stream (tokens, not seconds). `memory_fraction`: of a GPU's memory,
    for weights and KV cache together. `grace_s`: how long open answers may take when the engine is told to stop; before that a host with an
    agent says for `notice_s` that it goes. `agent`: `HOST:PORT` of the agent's own listener. `followers`: the agents of the other nodes.
    """

    model_path: str | None = None
    served_model_name: str | None = None
    weight_version: str | None = None
    gpus: list[int] = []
    tp_size: int | None = None
    nnodes: int = 1
    node_rank: int = 0
    dist_init_addr: str | None = None
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    quantization: Literal["fp8", "w8a8_int8", "w8a8_fp8", "w4afp8", "modelopt_fp4", "mxfp4", "awq", "quark"] | None = None
    kv_cache_dtype: Literal["auto", "fp8_e5m2", "fp8_e4m3", "bf16"] | None = None
    context_length: int | None = None
    max_running_requests: int = 64
    max_total_tokens: int | None = None
    memory_fraction: float | None = None
    chunked_prefill_size: int | None = None
    cpu_offload_gb: int | None = None
    stream_interval: int = 1
    tool_call_parser: Literal["deepseekv3", "deepseekv31", "deepseekv32"] | None = None
    reasoning_parser: Literal["deepseek-r1", "deepseek-v3"] | None = None
    otlp_endpoint: str | None = None
    host: str = "127.0.0.1"
    port: int = 30000
    api_key_file: str | None = None
    agent: str = "127.0.0.1:30001"
    followers: list[str] = []
    notice_s: float = 3.0
    grace_s: float = 20.0
    extra_args: list[str] = []

    def __post_init__(self) -> None:
        least_one = (
            "tp_size",
            "nnodes",
            "context_length",
            "max_running_requests",
            "max_total_tokens",
            "chunked_prefill_size",
            "stream_interval",
        )
        for name in least_one:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, is {value}")
        if self.cpu_offload_gb is not None and self.cpu_offload_gb < 0:
            raise ValueError(f"cpu_offload_gb must be at least 0, is {self.cpu_offload_gb}")
        if self.memory_fraction is not None and not 0 < self.memory_fraction < 1:
            raise ValueError(f"memory_fraction must be above 0 and below 1, is {self.memory_fraction:g}")
        if len(set(self.gpus)) != len(self.gpus) or any(index < 0 for index in self.gpus):
            raise ValueError(f"gpus must be different indices from 0 on, are {self.gpus}")
        if self.gpus and self.tp_size is not None and self.tp_size != len(self.gpus) * self.nnodes:
            raise ValueError(f"tp_size is {self.tp_size}, but {self.nnodes} x {len(self.gpus)} GPUs are given; leave it out")
        if not 0 <= self.node_rank < self.nnodes:
            raise ValueError(f"node_rank must be 0 to {self.nnodes - 1} with nnodes {self.nnodes}, is {self.node_rank}")
        if self.nnodes > 1 and (self.dist_init_addr is None or not self.dist_init_addr.rpartition(":")[2].isdigit()):
            raise ValueError("several nodes need dist_init_addr, HOST:PORT of node 0, the same on each")
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port must be 1 to 65535, is {self.port}")
        if not self.agent.rpartition(":")[2].isdigit() or not self.agent.rpartition(":")[0]:
            raise ValueError(f"agent must be HOST:PORT, is '{self.agent}'")
        if not 0 <= self.notice_s <= 600 or not 0 < self.grace_s <= 86400:
            raise ValueError("notice_s must be 0 to 600, grace_s above 0 and up to 86400 seconds")

    @property
    def ranks(self) -> int:
        """Tensor-parallel ranks over all nodes."""
        return self.tp_size or max(1, len(self.gpus) * self.nnodes)


class HostConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One SGLang server: either its `url`, or `launch: local` for one that the gateway runs itself.

    `agent`: URL of the `penstock engine` beside it, which knows more of it than SGLang does: its probes go there.
    `resolve`: the URL's name stands for all of its addresses (`a`), or for what its SRV records name (`srv`), asked again every
    `dns_refresh_s`. `priority`: its tier, lower first. `max_in_flight`: requests at once, without it what the engine itself says
    (max_running_requests).
    """

    url: str | None = None
    launch: Literal["local"] | None = None
    agent: str | None = None
    resolve: Literal["a", "srv"] | None = None
    weight: float = 1.0
    priority: int = 0
    max_in_flight: int | None = None

    def __post_init__(self) -> None:
        if (self.url is None) == (self.launch is None):
            raise ValueError("a host has either `url` or `launch: local`")
        if self.url is not None:
            _check_url(self.url)
        if self.agent is not None and (self.url is None or self.resolve is not None):
            raise ValueError("an agent belongs to a host with a `url` of its own")
        if self.agent is not None:
            _check_url(self.agent)
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
    internal to the engine that clients may set all the same. `ca_file`: certificates to trust for https, beside the system's.
    `client_cert_file` and `client_key_file`: the certificate and key that the gateway shows to hosts that want one. `proxy`: an
    HTTP proxy through which every host is reached. `canary`: for hosts of a weight version, which share of their weight they get.
    `dns_server`: `ADDRESS:PORT` to ask instead of the system's, for hosts with `resolve`.
    """

    hosts: list[HostConfig]
    endpoints: list[Endpoint] = msgspec.field(default_factory=lambda: list(GENERATIVE))
    allow_parameters: list[str] = []
    engine: Engine = Engine()
    api_key_file: str | None = None
    ca_file: str | None = None
    client_cert_file: str | None = None
    client_key_file: str | None = None
    proxy: str | None = None
    canary: dict[str, float] = {}
    dns_server: str | None = None
    dns_refresh_s: float = 10.0

    def __post_init__(self) -> None:
        if not self.hosts:
            raise ValueError("hosts must name at least one")
        if not self.endpoints:
            raise ValueError("endpoints must name at least one")
        if (self.client_cert_file is None) != (self.client_key_file is None):
            raise ValueError("client_cert_file and client_key_file belong together: give both or none")
        if self.proxy is not None and urlsplit(self.proxy).scheme not in ("http", "https"):
            raise ValueError(f"proxy '{self.proxy}' is no URL like http://HOST:PORT")
        if self.dns_server is not None and not self.dns_server.rpartition(":")[2].isdigit():
            raise ValueError(f"dns_server '{self.dns_server}' must be ADDRESS:PORT")
        for version, share in self.canary.items():
            if not 0 < share <= 1:
                raise ValueError(f"canary.{version} must be above 0 and at most 1, is {share:g}")
        if not self.dns_refresh_s > 0:
            raise ValueError(f"dns_refresh_s must be above 0, is {self.dns_refresh_s:g}")
        urls = [host.url.rstrip("/") for host in self.hosts if host.url is not None]
        twice = sorted({url for url in urls if urls.count(url) > 1})
        if twice:
            raise ValueError(f"{twice[0]} is listed twice")
