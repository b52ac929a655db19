"""The `sglang_dsv3` section of the configuration. docs/configuration.md is made from this file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from backends.sglang_dsv3 import environment, kv_events, origin, roles
from gateway.errors import ConfigError, ConfigErrors
from gateway.plugin import Endpoint
from gateway.wire import address
from gateway.wire.check import Check

# What SGLang 0.5.23 does with DeepSeek-V3 (tried with the real engine, 2026-11-24).
GENERATIVE = (
    Endpoint.CHAT,
    Endpoint.COMPLETIONS,
    Endpoint.RESPONSES,
    Endpoint.MESSAGES,
    Endpoint.COUNT_TOKENS,
    Endpoint.SCORE,
    Endpoint.TOKENIZE,
)

Seconds = Annotated[float, Meta(gt=0, le=86400)]
Count = Annotated[int, Meta(ge=1, le=(1 << 31) - 1, extra={"accepted": "1 or more"})]
Text = Annotated[str, Meta(min_length=1, max_length=1024)]
# A word of SGLang's own. Which there are is asked of the SGLang that is installed where the engine runs (`engine.known`).
Word = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z", extra={"accepted": "what the installed SGLang knows"})]
File = Annotated[str, Meta(min_length=1, max_length=4096)]
Problems = Iterator[ConfigError]


def _verify(problems: Problems) -> None:
    if found := list(problems):
        raise ConfigErrors(found)


def _host_name(value: str) -> None:
    if not address.is_host(value):
        raise ValueError("is no address and no host name")


def _dns_server(value: str) -> None:
    if not address.is_address(address.host_port(value)[0]) or "%" in value:
        raise ValueError("begins with no address")


def _host_url(value: str) -> None:
    address.check_url(value, ("http", "https", "unix"))


def _agent_url(value: str) -> None:
    address.check_url(value, ("http", "https"))


def _proxy_url(value: str) -> None:
    address.check_url(value, ("http", "https"), userinfo=True)


TcpUrl = Annotated[str, Check(kv_events.check_url, "tcp://HOST:PORT")]
HostPort = Annotated[str, Check(address.host_port, "HOST:PORT")]
HostUrl = Annotated[str, Check(_host_url, "http://HOST:PORT, https://HOST:PORT or unix:///PATH")]
AgentUrl = Annotated[str, Check(_agent_url, "http://HOST:PORT or https://HOST:PORT")]
ProxyUrl = Annotated[str, Check(_proxy_url, "http://HOST:PORT or https://HOST:PORT", quote=False)]


class Engine(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How SGLang is run: by `penstock engine` on a GPU host, or by the gateway for a host with `launch: local`. The defaults serve the tiny
    checkpoint on a CPU; what is left out is SGLang's to choose. Lengths and sizes are in tokens."""

    FORMER: ClassVar[Mapping[str, str]] = {**origin.FORMER, **origin.CHANGED}

    model_path: Annotated[File | None, Meta(description="the checkpoint's folder", extra={"default": "the tiny checkpoint"})] = None
    served_model_name: Annotated[Text | None, Meta(description="what the engine calls it", extra={"default": "the folder's name"})] = None
    weight_version: Annotated[Text | None, Meta(description="what tells these weights from others", extra={"default": "`default`"})] = None
    gpus: Annotated[
        list[Annotated[int, Meta(ge=0, le=1023)]], Meta(description="different indices of the GPUs of this host; none is the CPU")
    ] = []
    tp_size: Annotated[Count | None, Meta(description="tensor-parallel ranks, over all nodes", extra={"default": "one for each GPU"})] = (
        None
    )
    nnodes: Annotated[Count, Meta(description="hosts that hold it together")] = 1
    node_rank: Annotated[int, Meta(ge=0, le=(1 << 31) - 1, description="which of them this is; node 0 serves")] = 0
    dist_init_addr: Annotated[HostPort | None, Meta(description="`HOST:PORT` of node 0, the same on each")] = None
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        Meta(description="what it computes in", extra={"default": "SGLang's, `bfloat16` on the CPU"}),
    ] = None
    quantization: Annotated[
        Word | None, Meta(description="leave it out for the official FP8 checkpoint", extra={"default": "what the checkpoint says"})
    ] = None
    kv_cache_dtype: Annotated[
        Word | None,
        Meta(
            description="of the KV cache; `fp8_e4m3` halves it, at some accuracy; SGLang chooses for V3.2 and V4",
            extra={"default": "`auto`"},
        ),
    ] = None
    attention_backend: Annotated[
        Word | None,
        Meta(description="whose attention kernels; V3.2 takes `dsa` and V4 `dsv4` by themselves", extra={"default": "SGLang's"}),
    ] = None
    context_length: Annotated[
        Count | None, Meta(description="prompt and answer together", extra={"default": "the model's, 4096 on the CPU"})
    ] = None
    max_running_requests: Annotated[Count, Meta(description="how many are batched at once")] = 64
    max_total_tokens: Annotated[
        Count | None, Meta(description="tokens in the KV cache", extra={"default": "what fits, 65536 on the CPU"})
    ] = None
    memory_fraction: Annotated[
        Annotated[float, Meta(gt=0, lt=1)] | None,
        Meta(description="of a GPU's memory, for weights and KV cache together", extra={"default": "SGLang's"}),
    ] = None
    chunked_prefill_size: Annotated[Count | None, Meta(description="tokens of prompts in one step", extra={"default": "SGLang's"})] = None
    cpu_offload_gb: Annotated[
        Annotated[int, Meta(ge=0, le=1 << 20)] | None, Meta(description="weights kept in host memory; slow", extra={"default": "`0`"})
    ] = None
    stream_interval: Annotated[Count, Meta(description="tokens (not seconds) between two flushes of a stream")] = 1
    tool_call_parser: Annotated[
        Word | None, Meta(description="how the model writes tool calls: V3 `deepseekv3`, V3.1 `deepseekv31`, and so on")
    ] = None
    reasoning_parser: Annotated[
        Word | None,
        Meta(description="how the model writes what it thinks: R1 `deepseek-r1`, V3.1 and V3.2 `deepseek-v3`, V4 `deepseek-v4`"),
    ] = None
    speculative_algorithm: Annotated[
        Word | None,
        Meta(
            description="`EAGLE` drafts with the checkpoint's own MTP layer (V3, R1, V3.2, V4; V4.1: `DSPARK`): fewer steps a token for "
            "few requests, less throughput for many, and memory for the layer"
        ),
    ] = None
    speculative_num_steps: Annotated[
        Count | None, Meta(description="drafting steps; 3 for low latency, 1 for many requests", extra={"default": "SGLang's"})
    ] = None
    speculative_eagle_topk: Annotated[
        Count | None, Meta(description="branches of a draft; V4 takes 1 alone", extra={"default": "SGLang's"})
    ] = None
    speculative_num_draft_tokens: Annotated[
        Count | None, Meta(description="tokens verified at once; with one branch the steps and one", extra={"default": "SGLang's"})
    ] = None
    attn_dp_size: Annotated[
        Count | None,
        Meta(
            description="DP attention: so many groups of ranks with a KV cache each instead of the same one on all; for throughput with "
            "large batches, slower for few requests, and attention weights are held once a group",
            extra={"default": "off"},
        ),
    ] = None
    ep_size: Annotated[
        Count | None, Meta(description="expert parallelism: ranks that experts are spread over, whole", extra={"default": "off"})
    ] = None
    moe_a2a_backend: Annotated[
        Word | None,
        Meta(
            description="how tokens travel to experts: `deepep` (Hopper, Blackwell), `megamoe` (V4 on Blackwell)", extra={"default": "none"}
        ),
    ] = None
    moe_runner_backend: Annotated[
        Word | None,
        Meta(
            description="whose expert kernels; FP4 experts: `flashinfer_mxfp4` on Blackwell, `marlin` on Hopper",
            extra={"default": "SGLang's"},
        ),
    ] = None
    eplb: Annotated[
        bool, Meta(description="experts are moved between ranks by how much they are asked; needs `ep_size`; pauses while they move")
    ] = False
    ep_num_redundant_experts: Annotated[
        Count | None, Meta(description="copies of busy experts, in GPU memory; needs `ep_size`", extra={"default": "none"})
    ] = None
    hicache: Annotated[bool, Meta(description="prefixes that leave the GPU's cache are kept in host memory")] = False
    hicache_size: Annotated[
        Count | None, Meta(description="GB of host memory for each rank; needs `hicache`", extra={"default": "twice the GPU's cache"})
    ] = None
    hicache_write_policy: Annotated[
        Word | None, Meta(description="when they are written; needs `hicache`", extra={"default": "SGLang's"})
    ] = None
    hicache_storage_backend: Annotated[
        Word | None, Meta(description="where they go beyond host memory; needs `hicache`", extra={"default": "nowhere"})
    ] = None
    deterministic: Annotated[
        bool, Meta(description="the same answer whatever else is in the batch; slower, and not with every attention backend")
    ] = False
    priority_scheduling: Annotated[
        Literal["higher_first", "lower_first"] | None,
        Meta(
            description="SGLang's own queue goes by `priority` (`--enable-priority-scheduling`), which the gateway sends for each request: "
            "the class of its key, as this says which numbers are first; without it none is sent",
            extra={"default": "off"},
        ),
    ] = None
    env: Annotated[
        dict[str, str],
        Meta(description="further environment variables of SGLang, NCCL and their like; no secrets, and none that is set here"),
    ] = {}
    otlp_endpoint: Annotated[HostPort | None, Meta(description="`HOST:PORT` of an OTLP collector (gRPC) for SGLang's own spans")] = None
    host: Annotated[str, Meta(description="where SGLang listens"), Check(_host_name)] = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535, description="its port; a host with `launch: local` takes any free one")] = 30000
    api_key_file: Annotated[File | None, Meta(description="a file with the engine's key")] = None
    agent: Annotated[HostPort, Meta(description="where `penstock engine` says how it is")] = "127.0.0.1:30001"
    followers: Annotated[list[AgentUrl], Meta(description="on node 0: the agents' URLs of the others")] = []
    notice_s: Annotated[float, Meta(ge=0, le=600, description="how long the agent says that it goes before SGLang is told")] = 3.0
    grace_s: Annotated[Seconds, Meta(description="how long open answers may then take")] = 20.0
    extra_args: Annotated[
        list[str],
        Meta(
            description="further arguments for SGLang, as they are; a key belongs into `api_key_file`, since any user of the host "
            "can read a command line"
        ),
    ] = []

    def __post_init__(self) -> None:
        _verify(self._problems())

    def _problems(self) -> Problems:
        if len(set(self.gpus)) != len(self.gpus):
            yield ConfigError("gpus", f"must be different indices from 0 on, are {self.gpus}")
        elif self.gpus and self.tp_size is not None and self.tp_size != len(self.gpus) * self.nnodes:
            yield ConfigError("tp_size", f"is {self.tp_size}, but {self.nnodes} x {len(self.gpus)} GPUs are given; leave it out")
        if self.node_rank >= self.nnodes:
            yield ConfigError("node_rank", f"must be 0 to {self.nnodes - 1} with nnodes {self.nnodes}, is {self.node_rank}")
        if self.nnodes > 1 and self.dist_init_addr is None:
            yield ConfigError("dist_init_addr", "is missing: several nodes need it, HOST:PORT of node 0, the same on each")
        yield from self._together()
        yield from environment.problems(self.env)

    def _together(self) -> Problems:
        """Settings that mean nothing, or another thing, without another."""
        for needed, names in (
            ("speculative_algorithm", ("speculative_num_steps", "speculative_eagle_topk", "speculative_num_draft_tokens")),
            ("ep_size", ("eplb", "ep_num_redundant_experts")),
            ("hicache", ("hicache_size", "hicache_write_policy", "hicache_storage_backend")),
        ):
            for name in names:
                if getattr(self, name) and not getattr(self, needed):
                    yield ConfigError(name, f"does nothing without {needed}")
        for name in ("attn_dp_size", "ep_size"):
            if (size := getattr(self, name)) is not None and self.ranks % size:
                yield ConfigError(name, f"is {size}, which does not divide the {self.ranks} ranks (tp_size)")

    @property
    def ranks(self) -> int:
        """Tensor-parallel ranks over all nodes."""
        return self.tp_size or max(1, len(self.gpus) * self.nnodes)


class HostConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One SGLang server: either its `url`, or `launch: local` for one that the gateway runs itself."""

    url: Annotated[HostUrl | None, Meta(description="where it is; `unix://` is a socket")] = None
    launch: Annotated[Literal["local"] | None, Meta(description="the gateway runs it, as the `engine` section says")] = None
    agent: Annotated[
        HostUrl | None, Meta(description="URL of the `penstock engine` beside it, which is then asked in its place how it is")
    ] = None
    resolve: Annotated[
        Literal["a", "srv"] | None,
        Meta(
            description="the URL's name stands for all its addresses (`a`), or for what its SRV records name (`srv`), weights and "
            "priorities included"
        ),
    ] = None
    role: Annotated[
        Literal["prefill", "decode"] | None,
        Meta(
            description="of SGLang's disaggregated serving: every request gets one host of each; see "
            "[failover](failover.md#prefill-and-decode)",
            extra={"default": "it answers alone"},
        ),
    ] = None
    bootstrap_port: Annotated[
        Annotated[int, Meta(ge=1, le=65535)] | None,
        Meta(description="of a prefill host, its `--disaggregation-bootstrap-port`", extra={"default": "`8998`, SGLang's"}),
    ] = None
    kv_events: Annotated[
        TcpUrl | None,
        Meta(
            description="where its engine says what its cache stores and evicts (`--kv-events-config`); see "
            "[routing](routing.md#what-an-engine-says-of-its-cache)",
            extra={"default": "its answers alone tell"},
        ),
    ] = None
    kv_replay: Annotated[TcpUrl | None, Meta(description="where it says again what was missed (`replay_endpoint`)")] = None
    weight: Annotated[float, Meta(gt=0, le=1e6, description="its share among the hosts that are eligible")] = 1.0
    priority: Annotated[
        int, Meta(ge=-1000, le=1000, description="its tier, lower first; a higher one is used when the lower has nobody")
    ] = 0
    max_in_flight: Annotated[
        Count | None,
        Meta(
            description="requests at once, shared out among the workers",
            extra={"default": "what the engine says (`max_running_requests`)"},
        ),
    ] = None

    def __post_init__(self) -> None:
        _verify(self._problems())

    def _problems(self) -> Problems:
        if (self.url is None) == (self.launch is None):
            yield ConfigError("", "a host has either `url` or `launch: local`")
        if self.agent is not None and (self.url is None or self.resolve is not None):
            yield ConfigError("agent", "belongs to a host with a `url` of its own")
        if self.resolve is not None and (self.url is None or not self.url.startswith("http://")):
            yield ConfigError("resolve", "needs an http:// URL with a name (a certificate is not for an address)")
        yield from kv_events.problems(self.kv_events, self.kv_replay, self.resolve)
        yield from roles.of_host(self.role, self.url, self.bootstrap_port)


class Config(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Hosts that serve the same weights."""

    FORMER: ClassVar[Mapping[str, str]] = {key: f"{words} (below `engine`)" for key, words in origin.FORMER.items()}

    hosts: Annotated[list[HostConfig], Meta(min_length=1, description="where the engines are", extra={"accepted": "at least one"})]
    endpoints: Annotated[
        list[Endpoint],
        Meta(
            min_length=1,
            description="what the model behind them can do; an embedding model: `/v1/embeddings`, `/v1/rerank`",
            extra={"default": "what a DeepSeek-V3 can do", "accepted": "at least one"},
        ),
    ] = msgspec.field(default_factory=lambda: list(GENERATIVE))
    allow_parameters: Annotated[list[str], Meta(description="parameters internal to the engine that clients may set all the same")] = []
    engine: Engine = Engine()
    api_key_file: Annotated[File | None, Meta(description="a file with the engines' own key; a client's key never reaches an engine")] = (
        None
    )
    ca_file: Annotated[File | None, Meta(description="a file of certificates to trust for `https://` hosts, beside the system's")] = None
    client_cert_file: Annotated[
        File | None, Meta(description="a PEM certificate that is shown to `https://` hosts that want one; with `client_key_file`")
    ] = None
    client_key_file: Annotated[File | None, Meta(description="its private key")] = None
    proxy: Annotated[ProxyUrl | None, Meta(description="URL of an HTTP proxy through which every host is reached")] = None
    canary: Annotated[
        dict[str, Annotated[float, Meta(gt=0, le=1)]],
        Meta(description="`{WEIGHT_VERSION: SHARE}`: hosts that serve this version get that share of their weight"),
    ] = {}
    dns_server: Annotated[
        str | None,
        Meta(description="whom to ask for hosts with `resolve`", extra={"default": "the system's"}),
        Check(_dns_server, "ADDRESS:PORT"),
    ] = None
    dns_refresh_s: Annotated[Seconds, Meta(description="how often; while nobody answers the hosts last known stay")] = 10.0

    def __post_init__(self) -> None:
        _verify(self._problems())

    def _problems(self) -> Problems:
        if (self.client_cert_file is None) != (self.client_key_file is None):
            missing = "client_key_file" if self.client_key_file is None else "client_cert_file"
            yield ConfigError(missing, "is missing: client_cert_file and client_key_file belong together, give both or none")
        seen: set[str] = set()
        for index, url in enumerate(host.url.rstrip("/") if host.url is not None else "" for host in self.hosts):
            if url and url in seen:
                yield ConfigError(f"hosts.{index}.url", f"'{url}' is listed twice")
            seen.add(url)
        asked = [] if self.endpoints == list(GENERATIVE) else self.endpoints
        yield from roles.together([host.role for host in self.hosts], asked)

    @property
    def paired(self) -> bool:
        """Whether a request takes two hosts."""
        return any(host.role is not None for host in self.hosts)
