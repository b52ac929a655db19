"""THE backend contract: everything a third party needs to teach Penstock a new kind of engine.

A *plugin* is found through the entry-point group `penstock.backends`. It has a `kind`, a strict `Config` struct and `build()`, which does
no I/O. What it builds is a *backend*, whose life is

    build -> open -> (check) -> send, probe ... -> aclose        aclose is always called, also after a failed open

The core owns balancing, retries, limits and tracing; a backend makes single attempts and says truthfully how they went. The core never
parses an engine's words, and a backend never sees a client's socket.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import msgspec

from gateway.errors import GatewayError
from gateway.wire.body import Fields

if TYPE_CHECKING:
    import click

ENTRY_POINT_GROUP = "penstock.backends"


class Endpoint(enum.StrEnum):
    """What a client asks for; the value is the path. A new endpoint is a new row here, not a new code path."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    EMBEDDINGS = "/v1/embeddings"
    RESPONSES = "/v1/responses"
    MESSAGES = "/v1/messages"
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

    `cause` and the error's `detail` are for metrics and logs; `error` is what the client is told when no other target can help.
    Raised by `send` before the first event, and by `Reply.events` after it.
    """

    def __init__(
        self,
        cause: Literal["connect", "timeout", "refused", "busy", "broken", "cut", "aborted"],
        error: GatewayError,
        verdict: Verdict = Verdict.SICK,
    ) -> None:
        super().__init__(f"{cause}: {error.detail}" if error.detail else cause)
        self.cause = cause
        self.error = error
        self.verdict = verdict


@dataclass(slots=True)
class Call:
    """One request as the core hands it to a backend.

    `fields` are the client's own top-level JSON values, undecoded; `id` is the public id the answer must carry where its kind has one;
    `choices` is how many choices must finish before the answer is whole (n × prompts); `show_usage` says whether a streaming client
    asked for usage; `headers` are all that may go to the engine beside its own key: the trace this attempt belongs to; `prompt_tokens` is
    an estimate from the prompt's size. `keep` says that the answer may have to be continued elsewhere, and how (what it has used must then
    be known while it runs); `continues` is the backend's own, put there by `send` or `resume`. `salt` keeps the caller's prompts apart in
    a cache, where it is not empty. `metered` says that somebody wants to know what an answer came to that nobody waited for: a backend that
    learns it only later puts a future of it into `tails`: of what a reply's usage did not say, so that the two add up.
    """

    endpoint: Endpoint
    id: str
    model: str
    fields: Fields
    stream: bool = False
    show_usage: bool = False
    choices: int = 1
    prompts: int = 1
    connect_s: float = 5.0
    headers: Mapping[str, str] = field(default_factory=dict)
    prompt_tokens: int = 0
    keep: Literal["", "text", "exact"] = ""
    continues: Any = None
    salt: str = ""
    metered: bool = False
    tails: list[asyncio.Future[Usage | None]] = field(default_factory=list)


class Usage(msgspec.Struct, frozen=True):
    """Token counts as the engine reported them; `cached_tokens` is None where it does not say. `estimated`: it did not report them, they
    were counted by the events that passed."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    estimated: bool = False


class Reply:
    """An answer that has begun: `body` for JSON (whole), `events` for a stream (the first event is already there).

    `events` yields blocks of whole OpenAI-shaped events as bytes, ends only after a true finish, and raises AttemptFailed otherwise.
    `close()` is synchronous and idempotent; closing before the end stops the engine's generation. `usage` is known once it was called (of
    an answer that broke off: as far as the engine had told), as are `finishes`, why its choices ended. `connected_at`: when there was a
    connection to send the call on (monotonic seconds), 0 where that is not known.
    """

    def __init__(
        self,
        *,
        status: int = 200,
        content_type: bytes = b"application/json",
        body: bytes = b"",
        events: AsyncIterator[bytes] | None = None,
        usage: Usage | None = None,
    ) -> None:
        self.status = status
        self.content_type = content_type
        self.body = body
        self.events = events
        self.usage = usage
        self.connected_at = 0.0
        self.finishes: Sequence[str] = ()

    def close(self) -> None:
        """Give up the rest of the answer."""


class Model(msgspec.Struct, frozen=True):
    """A model as `/v1/models` shows it."""

    id: str
    created: int
    owned_by: str = "penstock"
    object: str = "model"


class Target(msgspec.Struct, frozen=True):
    """A snapshot of one place a call can be sent to.

    `priority`: a tier, lower first; a higher one is used only when the lower has nobody. `capacity`: how many requests it works on at once,
    None for no bound. `weights`: whatever tells two models apart; an answer is continued only between equals. `retry_after_s` is the best
    guess of when a target that is not ready will be. `details`: what else is known of it, for people.
    """

    id: str
    weight: float = 1.0
    ready: bool = True
    reason: str = ""
    retry_after_s: float = 5.0
    priority: int = 0
    capacity: int | None = None
    weights: str = ""
    details: dict[str, Any] = {}


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
    """What a backend may use of its surroundings: the home folder and the live state of services, by name."""

    def __init__(self, home: Path, services: Mapping[str, ServiceState] | None = None) -> None:
        self.home = home
        self.services: Mapping[str, ServiceState] = services if services is not None else {}


@dataclass(frozen=True, slots=True)
class CommandEnv:
    """What a plugin's command may use: the home folder, and every section of the plugin's kind in a configuration, checked, by name
    (raises ConfigError)."""

    home: Path
    sections: Callable[[Path, str], Mapping[str, Any]]


@runtime_checkable
class Backend(Protocol):
    """A live backend. Every method but `build` runs in the worker's event loop."""

    async def open(self) -> None:
        """Get ready; fast, and succeeds with every host down."""

    async def check(self) -> list[str]:
        """Problems an operator should know of before serving, one line each; may do I/O."""

    def endpoints(self) -> frozenset[Endpoint]:
        """What it serves; everything else is a 404 that says so."""

    def targets(self) -> Sequence[Target]:
        """A snapshot of every target, ready or not."""

    async def send(self, target: str, call: Call) -> Reply:
        """One attempt, never a retry; returns once the first event (or the whole JSON body) is there, raises AttemptFailed."""

    def classify(self, outcome: Reply | BaseException) -> Verdict:
        """What an outcome says about its target; pure."""

    async def probe(self, target: str) -> bool:
        """Whether the target would take a request now; cheap, and costs no token."""

    async def verify(self, target: str) -> bool:
        """Whether the target generates: may cost a token and half a minute, and is asked only on suspicion, a few times a minute."""

    def resumable(self, call: Call) -> bool:
        """Whether an answer to this call could be continued on another target, as far as the call tells."""

    def resume(self, call: Call, delivered: bytes, usage: Usage | None) -> Call | Reply | None:
        """How to go on with an answer of which the client has `delivered` (whole events) and which has used `usage` so far.

        A call for another target, whose events follow what was delivered without a seam: same id, no role again, one usage with the totals.
        A reply, where only the closing events are missing. None where going on would not be sound.
        """

    async def aclose(self) -> None:
        """Let go of everything; called once, also after a failed open."""


class Plugin(Protocol):
    """What the entry point names."""

    kind: str
    Config: type[msgspec.Struct]

    def build(self, name: str, config: Any, env: BackendEnv) -> Backend:
        """A backend from its checked configuration; does no I/O."""

    def services(self, name: str, config: Any, env: BackendEnv) -> Sequence[Service]:
        """Processes the parent must run for this backend; usually none."""

    def commands(self) -> Sequence[click.Command]:
        """Commands to mount under `penstock`, usually none; `click.Context.obj` is a CommandEnv."""
