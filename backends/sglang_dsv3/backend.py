"""The backend: hosts that run SGLang, one attempt at a time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from backends.sglang_dsv3 import gather, recall, roles
from backends.sglang_dsv3.abandon import Abandoned
from backends.sglang_dsv3.config import Config
from backends.sglang_dsv3.continuation import choices, named, resume
from backends.sglang_dsv3.continuation.choices import Choices, Parts
from backends.sglang_dsv3.continuation.counting import Counting
from backends.sglang_dsv3.continuation.exact import Progress
from backends.sglang_dsv3.continuation.named import Going
from backends.sglang_dsv3.continuation.named.reply import NamedReply
from backends.sglang_dsv3.files import key_in, verify_files
from backends.sglang_dsv3.host import PROBE_TIMEOUT_S, EngineHost
from backends.sglang_dsv3.markup import MARKUP
from backends.sglang_dsv3.pair import PairReply
from backends.sglang_dsv3.reply import Nowhere, SGLangReply
from backends.sglang_dsv3.shapes import Parsers
from backends.sglang_dsv3.transport import ConnectFailed, ConnectionLost, Options, tls
from gateway.errors import ConfigError
from gateway.plugin import Backend, BackendEnv, Call, Endpoint, Gathering, Reply, Target, Terms, Usage

if TYPE_CHECKING:
    from backends.sglang_dsv3.resolve import Resolver

log = logging.getLogger("penstock.engine")

# SGLang gives a generation 20 s to prove it alive (SGLANG_HEALTH_CHECK_TIMEOUT) before it answers 503.
VERIFY_TIMEOUT_S = 25.0


class SGLang(Backend):
    """SGLang servers behind one configuration section."""

    def __init__(self, name: str, config: Config, env: BackendEnv) -> None:
        self.markup = MARKUP
        self._config = config
        fixed = [
            EngineHost(name, index, host, env.services.get, config.canary)
            for index, host in enumerate(config.hosts)
            if host.resolve is None
        ]
        self._fixed = {host.id: host for host in fixed}
        self._hosts = dict(self._fixed)
        self._resolvers = _resolvers(config)
        self._resolving: asyncio.Task[None] | None = None
        self._listening: list[asyncio.Task[None]] = []
        self._options = Options()
        self._abandoned = Abandoned(env.failed)
        self._allowed = frozenset(config.allow_parameters)
        self._order = config.engine.priority_scheduling
        self._env = env
        self._connect_s = env.connect_s

    async def open(self) -> None:
        """Read the engines' key, try the certificates, hold the settings of an engine of ours against what SGLang has told; no host is
        contacted. Raises ConfigErrors."""
        config = self._config
        verify_files(config)
        await self._verify_engine(False)
        headers = {"content-type": "application/json"}
        if config.api_key_file is not None:
            headers["authorization"] = f"Bearer {key_in(config.api_key_file, 'api_key_file')}"
        self._options = Options(headers, tls(config.ca_file, config.client_cert_file, config.client_key_file), config.proxy)
        for host in self._hosts.values():
            host.options = self._options
        self._listening = [
            self._env.supervise(f"KV events of {host.id}", host.events.run) for host in self._fixed.values() if host.events is not None
        ]
        if self._resolvers:
            self._resolving = self._env.supervise("names of hosts", self._resolve_forever)

    async def _verify_engine(self, ask: bool) -> None:
        """Where the gateway runs SGLang: whether the installed one knows what it will be given. `ask`: it is asked where it never was,
        which takes as long as importing it. Raises ConfigErrors."""
        if all(host.launch is None for host in self._config.hosts):
            return
        from backends.sglang_dsv3.engine import known  # which only a gateway with an engine of its own has to spend time on

        kept = known.kept_at(self._env.home)
        if kept is None or not (ask or kept.exists()):
            return
        try:
            found = await asyncio.to_thread(known.known, self._env.home, log.info)
            known.verify(self._config.engine, found)
        except ConfigError as error:
            raise error.below("engine") from None

    async def _fits(self) -> list[str]:
        """What the plan says of the `engine` section, where its weights and GPUs are on this machine. Raises ConfigErrors."""
        if not self._config.engine.gpus:
            return []
        from backends.sglang_dsv3.engine.plan import start

        return await asyncio.to_thread(start.verify, self._config.engine, "engine", None, self._env.force)

    async def _resolve_forever(self) -> None:
        while True:
            asked = await asyncio.gather(*(resolver.ask() for resolver in self._resolvers), return_exceptions=True)
            before, self._hosts = self._hosts, dict(self._fixed)
            for config in (config for resolver in self._resolvers for config in resolver.hosts):
                host = EngineHost("", 0, config, lambda name: None, self._config.canary)
                known = before.pop(host.id, None)
                if known is None or known.config != config:
                    known, host.options = host, self._options
                self._hosts.setdefault(host.id, known)
            for gone in before.values():
                if gone.id not in self._hosts:
                    await gone.aclose()  # what is under way on it goes on
            for problem in asked:
                if problem is not None:  # which is ours, and no reason to leave out the other names
                    raise problem
            await asyncio.sleep(self._config.dns_refresh_s)

    async def aclose(self) -> None:
        """Finish what was begun for clients that left (a second or so), then close every connection."""
        await self._abandoned.aclose()
        if self._resolving is not None:
            self._resolving.cancel()
            await asyncio.gather(self._resolving, return_exceptions=True)
        for task in self._listening:
            task.cancel()
        await asyncio.gather(*self._listening, return_exceptions=True)
        for host in self._hosts.values():
            await host.aclose()

    async def recall(self, id: str, model: str, cancel: bool = False) -> bytes | None:
        """See `recall`."""
        return await recall.recall(self._hosts.values(), id, model, cancel)

    async def check(self) -> list[str]:
        """Hosts that cannot be reached or serve another architecture, and agents that do not answer. Raises ConfigErrors for what the
        installed SGLang does not know, and for weights on this machine that cannot fit its GPUs."""
        await self._verify_engine(True)
        findings = await self._fits()
        for host in self._hosts.values():
            if host.config.agent is not None:
                try:
                    await host.agent("/status")
                except (ConnectFailed, ConnectionLost, TimeoutError) as error:
                    findings.append(f"the agent of {host.id} does not answer at {host.config.agent}: {error or type(error).__name__}")
            if not host.url:
                continue
            try:
                info = await host.model_info()
            except (ConnectFailed, ConnectionLost, TimeoutError, msgspec.DecodeError) as error:
                findings.append(f"{host.id} does not answer /model_info: {error or type(error).__name__}")
                continue
            if wrong := roles.mismatch(info, host.config.role):
                findings.append(f"{host.id}: {wrong}")
            if "DeepseekV3ForCausalLM" not in (info.architectures or []):
                findings.append(f"{host.id} serves {info.architectures}, not DeepseekV3ForCausalLM")
        return findings

    def endpoints(self) -> frozenset[Endpoint]:
        """As configured: what the hosts' model can do is the operator's knowledge; of pairs, what SGLang's can."""
        endpoints = frozenset(self._config.endpoints)
        return endpoints - roles.NOT_PAIRED if self._config.paired else endpoints

    def targets(self) -> Sequence[Target]:
        """Every host, launched, named or resolved; a name that stands for nobody is one that is not ready."""
        found = [host.target() for host in self._hosts.values()]
        return found or [Target("unresolved", ready=False, reason=resolver.problem) for resolver in self._resolvers]

    async def probe(self, target: str) -> bool | str:
        """`GET /ready`: flags only, costs no token; 503 while starting or draining."""
        host = self._hosts.get(target)
        if host is None:
            return "it is gone"
        try:
            up = await host.ready()
        except TimeoutError:
            host.lost()
            return f"no answer to its probe within {PROBE_TIMEOUT_S:g} s"
        except (ConnectFailed, ConnectionLost, msgspec.DecodeError) as error:
            host.lost()
            return str(error)
        with contextlib.suppress(ConnectFailed, ConnectionLost, TimeoutError, msgspec.DecodeError):
            await host.look()
        if up:
            return host.mismatch or True
        return "its engine says that it takes no requests" if host.config.agent is None else "its agent says that it takes no requests"

    async def verify(self, target: str) -> bool:
        """`GET /health_generate`: generates a token, and is the only question that a hung scheduler does not answer."""
        host = self._hosts.get(target)
        if host is None:
            return False
        try:
            return (await host.get("/health_generate", VERIFY_TIMEOUT_S))[0] == 200
        except (ConnectFailed, ConnectionLost, TimeoutError):
            return False

    def send(self, target: str, call: Call, terms: Terms, trace: Mapping[str, str]) -> Reply:
        """One attempt; see `reply`."""
        host = self._hosts.get(target)
        if host is None:
            return Nowhere(target)
        if call.continues is not None and isinstance(call.continues, Going | Parts):
            counting = Counting(host, trace, self._connect_s)
            return _rest(call.continues, counting, lambda rest: self.send(target, rest, terms, trace))
        return SGLangReply(host, call, terms, trace, self._abandoned, self._allowed, self._connect_s, self._order)

    def send_pair(
        self, prefill: str, target: str, call: Call, terms: Terms, traces: tuple[Mapping[str, str], Mapping[str, str]], again: bool
    ) -> Reply:
        """One attempt at two hosts; see `pair`."""
        first, second = self._hosts.get(prefill), self._hosts.get(target)
        if first is None or second is None:
            return Nowhere(prefill if first is None else target, "prefill" if first is None else "decode")
        if call.continues is not None and isinstance(call.continues, Going):
            counting = Counting(second, traces[1], self._connect_s)
            return _rest(call.continues, counting, lambda rest: self.send_pair(prefill, target, rest, terms, traces, again))
        reached = self._abandoned, self._allowed, self._connect_s
        return PairReply((first, second), call, terms, traces, *reached, again, self._env.failed, self._order)

    def resumable(self, call: Call) -> bool:
        """See `resume`, `named` for streams whose events have names, and `choices` for those of several."""
        if call.endpoint is Endpoint.CHAT and call.choices == 1:  # which most are, and no call more is made for it
            return resume.resumable(call)
        if named.speaks(call):
            return named.resumable(call)
        return choices.resumable(call) if choices.several(call) else resume.resumable(call)

    def resume(self, call: Call, terms: Terms, broken: Reply, delivered: bytes) -> Call | Reply | None:
        """Over its token ids where it was answered so, else with the delivered text as the beginning of the assistant's message."""
        if isinstance(broken, named.Written) and broken.chat is not None:
            broken = broken.chat

        def again(one: Call, said: bytes, usage: Usage | None) -> Call | Reply | None:
            return self._go_on(one, terms, broken, said, usage)

        usage = None if broken.usage is None or broken.usage.estimated else broken.usage
        if named.speaks(call):
            return named.resume_named(call, terms, usage, delivered, again)
        if choices.several(call):
            return None if isinstance(broken, PairReply) else choices.resume_several(call, terms, delivered, again)
        return again(call, delivered, usage)

    def gather(self, call: Call) -> Gathering | None:
        """See `gather`."""
        return gather.gather(call)

    def _go_on(self, call: Call, terms: Terms, broken: Reply, delivered: bytes, usage: Usage | None) -> Call | Reply | None:
        half = broken.decode if isinstance(broken, PairReply) else broken
        progress = half.progress if isinstance(half, SGLangReply) else None
        if progress is not None:
            return _from(progress, call, terms, delivered)
        parsers = half.parsers if isinstance(half, SGLangReply) else Parsers()
        return resume.resume(call, terms, delivered, usage, parsers)


def _rest(going: Going | Parts, counting: Counting, send: Callable[[Call], Reply]) -> Reply:
    return NamedReply(going, counting, send) if isinstance(going, Going) else Choices(going, counting, send)


def _from(progress: Progress, call: Call, terms: Terms, delivered: bytes) -> Call | Reply:
    limit = resume.limit_of(call, terms)
    if resume.read(delivered).finished or (limit is not None and len(progress.output_ids) >= limit):
        thought = progress.thought_before + progress.thought_since
        return resume.closing(call, delivered, Usage(len(progress.prompt_ids), len(progress.output_ids), reasoning_tokens=thought))
    return msgspec.structs.replace(call, continues=progress)


def _resolvers(config: Config) -> list[Resolver]:
    named = [host for host in config.hosts if host.resolve is not None]
    if not named:
        return []
    from backends.sglang_dsv3.resolve import Resolver  # 0.05 s that only hosts from DNS have to spend

    return [Resolver(host, config.dns_server) for host in named]
