"""THE backend contract: everything a third party needs to teach Penstock a new kind of engine.

A *plugin* is found through the entry-point group `penstock.backends`: a kind, a strict configuration struct, and what builds a *backend*,
whose life is

    build -> open -> (check) -> send, probe ... -> aclose        aclose is always called, also after a failed open

Of a backend only `endpoints`, `targets` and `send` have to be written; the rest has defaults.

The core owns balancing, retries, limits and tracing; a backend makes single attempts and says truthfully how they went. The core never
parses an engine's words, and a backend never sees a client's socket.
"""

from __future__ import annotations

import abc
import asyncio
import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from gateway import supervision
from gateway.errors import GatewayError, NotServed
from gateway.wire.body import Fields

if TYPE_CHECKING:
    import click

ENTRY_POINT_GROUP = "penstock.backends"

# What a target does of a call: all of it, or its part of a pair: computing the prompt, or going on from there.
Role = Literal["", "prefill", "decode"]


class Endpoint(enum.StrEnum):
    """What a client asks for; the value is the path. A new endpoint is a new row here, not a new code path."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    EMBEDDINGS = "/v1/embeddings"
    RESPONSES = "/v1/responses"
    INPUT_TOKENS = "/v1/responses/input_tokens"
    MESSAGES = "/v1/messages"
    COUNT_TOKENS = "/v1/messages/count_tokens"
    RERANK = "/v1/rerank"
    SCORE = "/v1/score"
    TOKENIZE = "/tokenize"


class Verdict(enum.Enum):
    """How an attempt speaks about its target. Busy is not broken, and a client's fault is nobody else's."""

    OK = "ok"
    CLIENT_FAULT = "client_fault"
    BUSY = "busy"
    SICK = "sick"


class AttemptFailed(Exception):
    """One attempt ended without a (whole) answer.

    `cause` and the error's `detail` are for metrics and logs; `error` is what the client is told when no other target can help; `verdict`
    says what it means for the target: OK where nothing is wrong with it, and another may have what it lacks. Raised by `Reply.begin` before
    the first event, and by `Reply.next` after it. `role`: of a pair, whose failure it is.
    """

    def __init__(
        self,
        cause: Literal["connect", "timeout", "refused", "busy", "broken", "cut", "aborted"],
        error: GatewayError,
        verdict: Verdict = Verdict.SICK,
        role: Role = "",
    ) -> None:
        super().__init__(f"{cause}: {error.detail}" if error.detail else cause)
        self.cause = cause
        self.error = error
        self.verdict = verdict
        self.role = role


# Parameters by which a client bounds an answer's tokens; the one that a bound of the core's is written to comes first.
BOUNDS: Mapping[Endpoint, tuple[str, ...]] = {
    Endpoint.CHAT: ("max_completion_tokens", "max_tokens"),
    Endpoint.COMPLETIONS: ("max_tokens",),
    Endpoint.RESPONSES: ("max_output_tokens",),
    Endpoint.MESSAGES: ("max_tokens",),
}


class Call(msgspec.Struct, frozen=True):
    """One request in the client's own words; nothing in it changes after it was parsed."""

    endpoint: Endpoint
    # The public id, which the answer must carry where its kind has one.
    id: str
    model: str
    # The client's own top-level JSON values, undecoded.
    fields: Fields
    stream: bool = False
    # Whether a streaming client asked for usage.
    show_usage: bool = False
    # How many choices must finish before the answer is whole: n for each of the prompts.
    choices: int = 1
    prompts: int = 1
    # Of a call that goes on with an answer that broke off: the backend's own, put there by `resume`.
    continues: Any = None


class Terms(msgspec.Struct, frozen=True):
    """What the core has decided about a call. The defaults are those of a call that nobody limits, counts or keeps."""

    # The most completion tokens of a choice, the client's own bound included; None leaves it to the engine.
    bound: int | None = None
    # Tokens of the prompt, as far as its size tells.
    prompt_tokens: int = 0
    # Keeps the caller's prompts apart in a prefix cache, where it is not empty.
    salt: str = ""
    # Whether somebody wants to know what an answer came to that nobody waited for: see `Reply.late`.
    metered: bool = False
    # Whether the answer may have to be continued elsewhere, and how: what it has used must then be known while it runs.
    keep: Literal["", "text", "exact"] = ""
    # The same for calls that go on with each other, 64 bits; None where nothing binds them. For a target that has several caches.
    affinity: int | None = None
    # The caller's class, 0 (first) to 9, for an engine that has classes of its own.
    priority: int = 0


class Usage(msgspec.Struct, frozen=True):
    """Token counts as the engine reported them; `cached_tokens` is None where it does not say. `estimated`: it did not report them, they
    were counted by the events that passed."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    estimated: bool = False


class Reply:
    """One attempt at an answer, from before it is sent until it is closed.

    `begin` sends it and waits until the answer has begun. Then `body` is the whole of a JSON answer; of a stream (`streams`) `next` gives
    block after block. `close` may be called at any time after the constructor, during `begin` too (whose task is cancelled then).
    """

    status = 200
    content_type: bytes = b"application/json"
    body: bytes = b""
    streams = False
    # When there was a connection to send the call on (monotonic seconds); 0 where that is not known.
    connected_at = 0.0
    # Why its choices ended, known once it is closed.
    finishes: Sequence[str] = ()
    # What it has used, as far as the engine has told.
    usage: Usage | None = None
    # Set by `close` where the call is metered and the engine may still tell what an answer came to that was given up: by how much its
    # usage differs from the one that `close` returned. None when nothing will be told.
    late: asyncio.Future[Usage | None] | None = None
    # Of a pair: set by the core before `begin`, called when the prefill target has done its part.
    prefilled: Callable[[], None] | None = None

    async def begin(self) -> None:
        """Send the call; return once the first event (or the whole body) is there. Raises AttemptFailed."""

    async def next(self) -> bytes:
        """The next block of whole, OpenAI-shaped events; empty after a true finish, and only then. Raises AttemptFailed."""
        return b""

    def close(self) -> Usage | None:
        """Give up the rest of the answer, if any: the engine stops generating. Synchronous, idempotent; what was used, if known."""
        return self.usage


class Gathering(abc.ABC):
    """A JSON answer that is asked for as a stream, so that it is known at once when its host dies: `call` is what is asked instead."""

    def __init__(self, call: Call) -> None:
        self.call = call

    @abc.abstractmethod
    def add(self, block: bytes) -> None:
        """Whole events of its answer, as `Reply.next` gives them. Raises AttemptFailed where they are none of a JSON answer's."""

    @abc.abstractmethod
    def whole(self) -> bytes:
        """All of them as the JSON answer that the engine would have given; asked for once they have ended."""


class Gpu(msgspec.Struct, frozen=True):
    """One GPU of a target's machine; None is what it does not tell."""

    index: int
    utilisation_ratio: float | None = None
    memory_used_ratio: float | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None
    ecc_uncorrected: int | None = None
    throttled: bool | None = None


class Stats(msgspec.Struct, frozen=True):
    """Numbers of a target's engine and of the machine below it, for metrics and people; None is what nobody knows."""

    # Whether the agent beside the engine says that it takes requests.
    ready: bool | None = None
    running_requests: float | None = None
    queued_requests: float | None = None
    max_running_requests: float | None = None
    kv_usage_ratio: float | None = None
    cache_hit_ratio: float | None = None
    generation_tokens_per_second: float | None = None
    # Running over possible requests, while any wait.
    batching_efficiency_ratio: float | None = None
    # Of engines that say what leaves their caches: whether all of it was heard, blocks that left, and messages that were missed.
    kv_events_precise: bool | None = None
    kv_events_evicted_blocks: float | None = None
    kv_events_missed: float | None = None
    memory_used_ratio: float | None = None
    swap_used_bytes: float | None = None
    disk_free_bytes: float | None = None
    gpus: tuple[Gpu, ...] = ()


# What a model may be able to do beyond text: call tools, think apart from its answer, see, hear.
ABILITIES = ("tools", "reasoning", "vision", "audio")


class Target(msgspec.Struct, frozen=True):
    """A snapshot of one place a call can be sent to."""

    id: str
    weight: float = 1.0
    ready: bool = True
    reason: str = ""
    # The best guess of when a target that is not ready will be.
    retry_after_s: float = 5.0
    # A tier, lower first; a higher one is used only when the lower has nobody.
    priority: int = 0
    # How many requests it works on at once; None for no bound.
    capacity: int | None = None
    # Whatever tells two models apart; an answer is continued only between equals.
    weights: str = ""
    stats: Stats | None = None
    # When these were told (monotonic seconds); the same numbers told again are news.
    stats_at: float = 0.0
    # What else is known of it, in the backend's own words, for people alone.
    details: dict[str, Any] = {}
    # Tokens of a prompt and its answer together; None where that is not known.
    context_length: int | None = None
    # What its model can do, as far as that is known: any of ABILITIES.
    abilities: Mapping[str, bool] = {}
    # With a role it is never asked alone for what is generated: one of each answers together. A backend has such targets alone, or none.
    role: Role = ""
    # What it has not used since then (monotonic seconds) is in its prefix cache no more, as its engine says; 0 where it says nothing.
    cache_since: float = 0.0


class ServiceState(msgspec.Struct, frozen=True):
    """What a service says of itself, one JSON object a line on the descriptor named by `PENSTOCK_STATUS_FD`.

    `eta_s`: seconds from the moment of this line until it expects to be ready.
    """

    state: Literal["starting", "loading", "ready", "restarting", "draining", "failed"] = "starting"
    detail: str = ""
    url: str = ""
    eta_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Service:
    """A process the parent runs for a backend, once, whatever the number of workers.

    It reports ServiceState lines, must end when its standard input ends (the parent died), drains on SIGTERM within `grace_s` seconds,
    and leaves nothing behind. The parent restarts it with back-off.
    """

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    grace_s: float = 20.0


class BackendEnv:
    """What a backend may use of its surroundings: the home folder, the live state of services, by name, how long (seconds) a connection may
    take to be made, and whether an operator insists on what a check would refuse for want of room (`force`)."""

    def __init__(self, home: Path, services: Mapping[str, ServiceState] | None = None, connect_s: float = 5.0, force: bool = False) -> None:
        self.home = home
        self.force = force
        self.services: Mapping[str, ServiceState] = services if services is not None else {}
        self.connect_s = connect_s
        # Counts failures of tasks; whoever has metrics puts them here.
        self.failed: supervision.Failed = supervision.uncounted

    def supervise(self, name: str, work: supervision.Work) -> asyncio.Task[None]:
        """Start a task that lives as long as the backend, which cancels it at its end: when it fails that is said, counted, and it is begun
        again."""
        return supervision.supervise(name, work, self.failed)


@dataclass(frozen=True, slots=True)
class CommandEnv:
    """What a plugin's command may use: the home folder, and every section of the plugin's kind in a configuration, checked, by name
    (raises ConfigError)."""

    home: Path
    sections: Callable[[Path, str], Mapping[str, Any]]


class Markup(msgspec.Struct, frozen=True):
    """What an engine's parsers take out of an answer before it is text, so that it is bad output where it is still there: what begins a
    call of a tool or stands in one, and what begins and what ends reasoning."""

    tools: tuple[str, ...] = ()
    opens: tuple[str, ...] = ()
    closes: tuple[str, ...] = ()


class Backend(abc.ABC):
    """A live backend. Every method runs in the worker's event loop; the first three are all that it needs."""

    # What must not be left in the text of its answers, for whoever looks at them.
    markup = Markup()

    @abc.abstractmethod
    def endpoints(self) -> frozenset[Endpoint]:
        """What it serves; everything else is a 404 that says so."""

    @abc.abstractmethod
    def targets(self) -> Sequence[Target]:
        """A snapshot of every target, ready or not."""

    @abc.abstractmethod
    def send(self, target: str, call: Call, terms: Terms, trace: Mapping[str, str]) -> Reply:
        """One attempt, never a retry, which does nothing before its `begin`. `trace`: headers that hand on the trace, for the engine."""

    def send_pair(
        self, prefill: str, target: str, call: Call, terms: Terms, traces: tuple[Mapping[str, str], Mapping[str, str]], again: bool
    ) -> Reply:
        """The same at a pair of targets with roles, whose reply is the decode target's; it gives up both together. `traces`: one for each.
        `again`: the decode target was asked by this call before, with another prefill target that failed."""
        raise NotImplementedError

    async def open(self) -> None:  # noqa: B027 - optional
        """Get ready; fast, and succeeds with every target down."""

    async def check(self) -> list[str]:
        """Problems an operator should know of before serving, one line each; may do I/O. Raises ConfigError where it cannot serve."""
        return []

    async def probe(self, target: str) -> bool | str:
        """Whether the target would take a request now: True, or False, or in words why not; cheap, and costs no token."""
        return True

    async def verify(self, target: str) -> bool:
        """Whether the target generates: may cost a token and half a minute, and is asked only on suspicion, a few times a minute."""
        return await self.probe(target) is True

    def resumable(self, call: Call) -> bool:
        """Whether an answer to this call could be continued on another target, as far as the call tells."""
        return False

    def resume(self, call: Call, terms: Terms, broken: Reply, delivered: bytes) -> Call | Reply | None:
        """How to go on with an answer that broke off (and is closed), of which the client has `delivered`, whole events.

        A call for another target, whose events follow what was delivered without a seam: same id, no role again, one usage with the totals.
        A reply, where only the closing events are missing. None where going on would not be sound.
        """
        return None

    def gather(self, call: Call) -> Gathering | None:
        """A call for JSON to be asked for as a stream; None where its answer could not be put together again."""
        return None

    async def recall(self, id: str, model: str, cancel: bool = False) -> bytes | None:
        """An answer that is kept under its public id, as JSON under that name of its model; with `cancel` it is stopped first, where it is
        still being made. None where nobody has it; raises GatewayError, NotServed where nothing is kept at all."""
        raise NotServed("Answers are not kept here.")

    async def aclose(self) -> None:  # noqa: B027 - optional
        """Let go of everything; called once, also after a failed open."""


def _no_services(name: str, config: Any, env: BackendEnv) -> Sequence[Service]:
    return ()


def _no_commands() -> Sequence[click.Command]:
    return ()


@dataclass(frozen=True, slots=True)
class Plugin:
    """What the entry point names."""

    kind: str
    # The strict struct of a section `backends.NAME` of this kind.
    config: type[msgspec.Struct]
    # A backend from its name and its checked configuration; does no I/O.
    build: Callable[[str, Any, BackendEnv], Backend]
    # Processes that the parent must run for it.
    services: Callable[[str, Any, BackendEnv], Sequence[Service]] = _no_services
    # Commands to mount under `penstock`; `click.Context.obj` is a CommandEnv.
    commands: Callable[[], Sequence[click.Command]] = _no_commands
