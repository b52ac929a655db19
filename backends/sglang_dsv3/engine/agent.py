"""`penstock engine` on a GPU host: one SGLang kept running, the machine beside it watched, and a small listener that says how both are.

    GET /ready      200 while it takes requests; 503 while it loads, drains or has failed
    GET /status     everything, as JSON          GET /          the same for people
    GET /metrics    the machine and the engine's state, for Prometheus

Told to stop (SIGTERM) or to read its configuration again (SIGHUP), it turns `/ready` to 503 first and waits until every gateway has asked
(`notice_s`), then lets SGLang finish what it has (`grace_s`). No gateway's key lies on a GPU host, and nothing here changes anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import json
import logging
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import ClientError, ClientSession, ClientTimeout, web

from backends.sglang_dsv3.config import Engine
from backends.sglang_dsv3.engine import checkpoint, family, monitor
from backends.sglang_dsv3.engine.known import Known
from backends.sglang_dsv3.engine.monitor import Machine, Monitor
from backends.sglang_dsv3.engine.plan import start
from backends.sglang_dsv3.engine.plan.start import Expected
from backends.sglang_dsv3.engine.reported import Reported, reported
from backends.sglang_dsv3.engine.supervise import Supervisor, served_name
from backends.sglang_dsv3.files import key_in
from gateway.errors import ConfigError
from gateway.plugin import ServiceState
from gateway.supervision import listen, once, supervise

log = logging.getLogger("penstock.engine")

FOLLOWER_TIMEOUT_S = 2.0
_STATES = ("starting", "loading", "ready", "restarting", "draining", "failed")


class Status(msgspec.Struct, frozen=True):
    """What `/status` says. `plan` is what arithmetic expects of the engine's memory, `engine` what a ready one says of it."""

    state: str
    detail: str
    for_s: float
    eta_s: float
    model_path: str
    served_model_name: str
    weight_version: str
    node_rank: int
    nnodes: int
    restarts: int
    last_end: str
    advice: str
    followers: dict[str, str]
    machine: Machine
    plan: Expected | None
    engine: Reported | None


class Agent:
    """The supervisor, the monitor and the listener of one host."""

    def __init__(self, config: Engine, home: Path, say: Callable[[str], None], load: Callable[[], Engine]) -> None:
        self._config = config
        self._say = say
        self._load = load
        self._since = time.monotonic()
        self._going = False
        self._changing: asyncio.Task[None] | None = None
        self._followers: dict[str, str] = {}
        self._failures: dict[str, int] = {}
        self._plan: Expected | None = None
        self._reported: Reported | None = None
        self._home = home
        self.monitor = Monitor(config.gpus, Path(config.model_path) if config.model_path is not None else home)
        self.supervisor = Supervisor(f"engine-{config.port}", config, home, self._heard, config.port)

    def _heard(self, state: ServiceState) -> None:
        self._since = time.monotonic()
        self._reported = None
        self._say(f"{state.state}{f', {state.detail}' if state.detail else ''}")

    def _failed(self, task: str) -> None:
        self._failures[task] = self._failures.get(task, 0) + 1

    async def run(self) -> int:
        """Until SIGTERM or SIGINT; SIGHUP reads the configuration again."""
        loop = asyncio.get_running_loop()
        listen(self._failed)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, lambda: self._begin(self._leave()))
        loop.add_signal_handler(signal.SIGHUP, lambda: self._begin(self._reload()))
        app = web.Application()
        app.add_routes(
            [web.get("/ready", self._ready), web.get("/status", self._show), web.get("/metrics", self._metrics), web.get("/", self._page)]
        )
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        host, _, port = self._config.agent.rpartition(":")
        await web.TCPSite(runner, host.strip("[]"), int(port)).start()
        self._say(f"its status on http://{self._config.agent}")
        if self.monitor.note:
            self._say(f"{self.monitor.note}; the GPUs are not watched")
        watching = [
            supervise(name, work, self._failed) for name, work in (("followers", self._watch_followers), ("plan", self._watch_plan))
        ]
        try:
            return await self.supervisor.run()
        finally:
            for task in watching:
                task.cancel()
            await runner.cleanup()

    def _begin(self, work: Any) -> None:
        if self._changing is not None and not self._changing.done():
            work.close()
            self.supervisor.stop()  # asked twice: no more patience
            return
        self._changing = once("change", work, self._failed)

    async def _notice(self) -> None:
        """Gateways ask `/ready` every second or so: let each of them hear that we go before anything ends."""
        self._going = True
        if self.supervisor.state.state == "ready":
            self._say(f"draining: no new requests from now on; SGLang goes on for {self._config.notice_s:g} s")
            await asyncio.sleep(self._config.notice_s)

    async def _leave(self) -> None:
        await self._notice()
        self.supervisor.stop()

    async def _reload(self) -> None:
        try:
            config = self._load()
        except ConfigError as error:
            log.error("the new configuration is refused, nothing has changed: %s", "; ".join(str(error).splitlines()))
            return
        if (config.port, config.agent) != (self._config.port, self._config.agent):
            log.error("port and agent cannot change while it runs; nothing has changed")
            return
        await self._notice()
        self._config = config
        self.supervisor.change(config)
        self._going = False

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return self.supervisor.state.state == "ready" and not self._going and all(state == "ready" for state in self._followers.values())

    async def _watch_followers(self) -> None:
        async with ClientSession(timeout=ClientTimeout(total=FOLLOWER_TIMEOUT_S)) as session:
            while True:
                for url in self._config.followers:
                    try:
                        async with session.get(f"{url.rstrip('/')}/status") as answer:
                            self._followers[url] = str((await answer.json())["state"])
                    except (ClientError, TimeoutError, KeyError, ValueError) as error:
                        self._followers[url] = f"does not answer: {type(error).__name__}"
                await asyncio.sleep(1.0)

    async def _watch_plan(self) -> None:
        """What is expected of the engine's memory, and once it is ready what it says."""
        planned: Engine | None = None
        async with ClientSession(timeout=ClientTimeout(total=FOLLOWER_TIMEOUT_S)) as session:
            while True:
                config, state = self._config, self.supervisor.state
                if planned is not config and state.state == "ready":  # its checkpoint is there by then, and whole
                    planned, self._plan = config, await asyncio.to_thread(start.expected, config, self._home)
                if self._reported is None and state.state == "ready" and config.node_rank == 0:
                    with contextlib.suppress(ClientError, TimeoutError, ConfigError, msgspec.DecodeError, IndexError):
                        file = config.api_key_file
                        key = await asyncio.to_thread(key_in, file, "api_key_file") if file is not None else None
                        self._reported = await reported(session, state.url, key)
                await asyncio.sleep(1.0)

    def status(self) -> Status:
        """Everything, as it is now."""
        state, end, config = self.supervisor.state, self.supervisor.last_end, self._config
        for_s = time.monotonic() - self._since
        shown = "draining" if self._going and state.state == "ready" else state.state
        return Status(
            shown, state.detail, round(for_s, 1), max(0.0, round(state.eta_s - for_s, 1)), config.model_path or "the tiny checkpoint",
            served_name(config), config.weight_version or "default", config.node_rank, config.nnodes, self.supervisor.restarts,
            end.how if end is not None else "", end.advice if end is not None else "", dict(self._followers), self.monitor.look(),
            self._plan, self._reported,
        )  # fmt: skip

    async def _ready(self, request: web.Request) -> web.Response:
        status = self.status()
        headers = {} if self.ready else {"retry-after": str(max(1, round(status.eta_s)))}
        body = {"state": status.state, "detail": status.detail, "eta_s": status.eta_s}
        return web.json_response(body, status=200 if self.ready else 503, headers=headers)

    async def _show(self, request: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(self.status()), content_type="application/json")

    async def _metrics(self, request: web.Request) -> web.Response:
        status = self.status()
        lines: list[str] = []
        seen: set[str] = set()

        def add(name: str, help: str, labels: dict[str, str], value: float) -> None:
            if name not in seen:
                seen.add(name)
                lines.extend([f"# HELP {name} {help}", f"# TYPE {name} gauge"])
            pairs = ",".join(f'{key}="{text}"' for key, text in labels.items())
            lines.append(f"{name}{{{pairs}}} {value:.17g}" if pairs else f"{name} {value:.17g}")

        for state in _STATES:
            add("penstock_engine_state", "Which state the engine is in.", {"state": state}, float(state == status.state))
        add("penstock_engine_restarts", "How often it ended by itself.", {}, float(status.restarts))
        for task, count in self._failures.items():
            add("penstock_engine_task_failures", "Background tasks of the agent that failed.", {"task": task}, float(count))
        for row in monitor.series(status.machine):
            add(*row)
        return web.Response(text="\n".join(lines) + "\n", content_type="text/plain")

    async def _page(self, request: web.Request) -> web.Response:
        shown = json.dumps(msgspec.to_builtins(self.status()), indent=2)
        page = f'<!doctype html><meta http-equiv="refresh" content="5"><title>penstock engine</title><pre>{html.escape(shown)}</pre>'
        return web.Response(text=page, content_type="text/html")


def prepare(config: Engine, path: str, show: Callable[[int, int], None], known: Known | None = None, force: bool = False) -> list[str]:
    """What can be known before anything is started; raises ConfigError with the setting. What an operator should know is returned, and with
    `force` what else would have been refused for want of memory."""
    notes: list[str] = []
    watch = Monitor(config.gpus, Path("/"))
    count = watch.count()
    if config.gpus and count is None and not Path("/dev/kfd").exists():
        raise ConfigError(f"{path}.gpus", f"this machine has no GPU that could be asked ({watch.note}); leave gpus out for the CPU")
    if count is not None and (absent := [index for index in config.gpus if index >= count]):
        there = f"0 to {count - 1}" if count else "none"
        raise ConfigError(f"{path}.gpus", f"there is no GPU {absent[0]}; this machine has {count} ({there})")
    if config.model_path is not None:
        usable(config, path, show, known)
        notes = start.verify(config, path, known, force)
    host, _, agent_port = config.agent.rpartition(":")
    wanted = [("port", config.host, config.port), ("agent", host.strip("[]"), int(agent_port))]
    for name, address, port in wanted if config.node_rank == 0 else wanted[1:]:
        with contextlib.closing(socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError as error:
                raise ConfigError(f"{path}.{name}", f"cannot listen on {address}:{port}: {error.strerror}") from None
    return notes


def usable(config: Engine, path: str, show: Callable[[int, int], None], known: Known | None) -> None:
    """Whether the section's checkpoint is whole; raises ConfigError."""
    try:
        checkpoint.verify(Path(config.model_path or ""), show, known, cpu=not config.gpus)
    except checkpoint.Unusable as problem:
        raise ConfigError(f"{path}.model_path", str(problem)) from None


def run(config: Engine, home: Path, say: Callable[[str], None], load: Callable[[], Engine]) -> int:
    """The agent's whole life; nothing of it is left afterwards, whatever the signal."""
    family.adopt()
    return asyncio.run(Agent(config, home, say, load).run())
