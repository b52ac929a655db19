"""Every background task of ours is made to fail where it works, and goes on: said, counted, begun again."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from backends.sglang_dsv3.config import Engine
from backends.sglang_dsv3.engine import agent as agents
from backends.sglang_dsv3.engine.supervise import Supervisor
from backends.sglang_dsv3.kv_events import Subscription
from backends.sglang_dsv3.resolve import Resolver
from gateway import config, lifeline
from gateway.access.issuer import KeySet
from gateway.access.keys import KeyList, Keys
from gateway.access.tokens import Tokens
from gateway.lifecycle import Lifecycle
from gateway.plugin import BackendEnv, Service
from gateway.processes import alerts, callers, children, http, outages, parent, protocol, sentinel, services, tree, usage, worker
from gateway.serving import pool, registry, watch
from gateway.store import admin as store_admin
from gateway.store import keysync, pipeline, shared
from gateway.telemetry import observe
from gateway.telemetry.metrics import TASK_FAILURES, Metrics
from gateway.telemetry.record import Record
from tests.support.processes import ROOT


def broken() -> ValueError:
    return ValueError("rubbish")


class Breaking:
    """In the place of a function: raises twice, then does as the other would, or waits."""

    def __init__(self, instead: Any = None) -> None:
        self.calls = 0
        self._instead = instead

    def method(self) -> Any:
        def breaks(*arguments: Any, **more: Any) -> Any:
            self.calls += 1
            if self.calls <= 2:
                raise broken()
            return self._instead(*arguments, **more) if self._instead is not None else asyncio.Event().wait()

        return breaks


def settings(**more: Any) -> config.Settings:
    return config.load(environment={}, overrides=more).settings


def names_of_hosts() -> config.Settings:
    host = {"url": "http://engines.invalid:30000", "resolve": "a"}
    telling = {"url": "http://127.0.0.1:1", "kv_events": "tcp://127.0.0.1:1"}
    section = {"kind": "sglang_dsv3", "hosts": [host, telling], "dns_refresh_s": 0.1}
    return settings(models={"m": {"backend": "dsv3"}}, backends={"dsv3": section})


Counted = Callable[[str], float]


@asynccontextmanager
async def of_a_registry(tmp_path: Path) -> AsyncIterator[Counted]:
    counts = Metrics()
    env = BackendEnv(tmp_path)
    env.failed = counts.failed
    live = registry.Registry(names_of_hosts(), env)
    await live.open()
    try:
        yield lambda name: counted(counts, name)
    finally:
        await live.aclose()


@asynccontextmanager
async def of_a_provider(tmp_path: Path) -> AsyncIterator[Counted]:
    counts = Metrics()
    known = Tokens(settings(oidc=[{"name": "staff", "issuer": "http://127.0.0.1:1", "audience": ["us"]}]), tmp_path, counts)
    known.open()
    try:
        yield lambda name: counted(counts, name)
    finally:
        await known.aclose()


@asynccontextmanager
async def of_a_store(tmp_path: Path) -> AsyncIterator[Counted]:
    counts = Metrics()
    chosen = settings(redis={"url": "redis://127.0.0.1:1"})
    store = shared.Shared(chosen, Keys(chosen), counts)
    await store.open()

    def look(name: str) -> float:
        store.pipeline._wake.set()
        return counted(counts, name)

    try:
        yield look
    finally:
        await store.aclose()


@asynccontextmanager
async def of_the_parents_store(tmp_path: Path) -> AsyncIterator[Counted]:
    counts = Metrics()
    store = store_admin.AdminStore(settings(redis={"url": "redis://127.0.0.1:1"}), counts)
    store.open()
    try:
        yield lambda name: counted(counts, name)
    finally:
        await store.aclose()


@asynccontextmanager
async def of_the_parent(tmp_path: Path, services_too: bool = False) -> AsyncIterator[Counted]:
    loaded = config.load(environment={}, overrides={"limits": {"ledger_file": str(tmp_path / "usage.json")}})
    listeners = [parent.listen("127.0.0.1", 0, "listen") for _ in range(2)]

    async def load() -> tree.Plan:
        raise NotImplementedError

    plan = tree.Plan(loaded, [Service("engine", ["false"])] if services_too else [])
    process = parent.Parent(plan, tmp_path, listeners[0], listeners[1], load, lambda name, state: None)
    running = asyncio.get_running_loop().create_task(process.run())
    try:
        yield lambda name: counted(process._tree.counts.own, name)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for listener in (*listeners, process._tree.usage._lock):
            if listener is not None:
                listener.close()


def of_its_services(tmp_path: Path) -> AbstractAsyncContextManager[Counted]:
    return of_the_parent(tmp_path, services_too=True)


@asynccontextmanager
async def of_a_worker(tmp_path: Path) -> AsyncIterator[Counted]:
    ours, theirs = socket.socketpair()
    reader, writer = await protocol.streams(ours)
    _, other = await protocol.streams(theirs)
    one = worker.Worker(settings(), tmp_path, {}, KeyList(), {}, reader, writer)

    async def serve(sockets: Any) -> None:
        await asyncio.Event().wait()

    cast("Any", one._server).serve = serve
    running = asyncio.get_running_loop().create_task(one.serve(cast("Any", None)))

    def look(name: str) -> float:
        other.write(protocol.line(protocol.Drain([])))
        return counted(one._metrics, name)

    try:
        yield look
    finally:
        running.cancel()
        await asyncio.gather(running, *one._tasks, return_exceptions=True)
        other.close()


@asynccontextmanager
async def of_an_agent(tmp_path: Path) -> AsyncIterator[Counted]:
    engine = msgspec.convert({"agent": "127.0.0.1:0"}, Engine)
    one = agents.Agent(engine, tmp_path, lambda words: None, lambda: engine)
    running = asyncio.get_running_loop().create_task(one.run())
    try:
        yield lambda name: float(one._failures.get(name, 0))
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        for handler in one.supervisor._log.handlers:
            handler.close()


def counted(of: Metrics, name: str) -> float:
    found = of.snapshot().get(TASK_FAILURES.name, {}).get(name, [0.0])
    return found[0]


Start = Callable[[Path], AbstractAsyncContextManager[Counted]]
# The name of the task, who starts it, and what of its work is broken.
TASKS: list[tuple[str, Start, Any, str]] = [
    ("probe dsv3", of_a_registry, pool.Pool, "refresh"),
    ("names of hosts", of_a_registry, Resolver, "ask"),
    ("KV events of 127.0.0.1:1", of_a_registry, Subscription, "run"),
    ("store pipeline", of_a_store, pipeline.Pipeline, "work"),
    ("store heartbeat", of_a_store, shared.Shared, "_live"),
    ("stored keys", of_a_store, keysync.KeySync, "run"),
    ("stored keys", of_the_parents_store, keysync.KeySync, "run"),
    ("keys of staff", of_a_provider, KeySet, "_fetched"),
    ("budgets", of_the_parent, alerts.Alerts, "run"),
    ("callers", of_the_parent, callers.Callers, "write_forever"),
    ("ledger", of_the_parent, usage.Usage, "write_forever"),
    ("admin API", of_the_parent, http, "server"),
    ("outages", of_the_parent, outages.Outages, "look"),
    ("judge of answers", of_the_parent, sentinel.Sentinel, "judge_forever"),
    ("comparison of hosts", of_the_parent, sentinel.Sentinel, "look_forever"),
    ("worker", of_the_parent, children, "keep"),
    ("service engine", of_its_services, services.Services, "_ended"),
    ("report", of_a_worker, worker.Worker, "_report"),
    ("line to the parent", of_a_worker, protocol, "to_worker"),
    ("followers", of_an_agent, agents.Agent, "_watch_followers"),
]


@pytest.mark.pure
@pytest.mark.parametrize(("name", "start", "owner", "attribute"), TASKS, ids=[f"{name} {start.__name__}" for name, start, _, _ in TASKS])
def test_it_goes_on(
    name: str, start: Start, owner: Any, attribute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lifeline, "BACKOFF_FIRST_S", 0.01)
    monkeypatch.setattr(worker, "REPORT_INTERVAL_S", 0.01)
    monkeypatch.setattr(outages, "LOOK_S", 0.01)
    waits = Breaking()
    waits.calls = 2  # as if broken already: it only waits
    if start is of_the_parent:
        monkeypatch.setattr(children, "keep", waits.method())  # no processes
    if start is of_an_agent:
        monkeypatch.setattr(Supervisor, "run", waits.method())
    original = getattr(owner, attribute)
    instead = Breaking(original if attribute in ("look", "refresh", "server", "_report", "to_worker", "ask", "_ended") else None)
    monkeypatch.setattr(owner, attribute, instead.method())

    async def run() -> None:
        async with asyncio.timeout(60), start(tmp_path) as failures:
            while failures(name) < 2 or instead.calls < 3:
                await asyncio.sleep(0.01)

    logger = logging.getLogger("penstock.tasks")
    logger.addHandler(caplog.handler)
    try:
        asyncio.run(run())
    finally:
        logger.removeHandler(caplog.handler)
    assert f"the task '{name}' has failed (ValueError: rubbish)" in caplog.text


def test_every_supervised_task_is_in_this_list() -> None:
    known = {name for name, *_ in TASKS} | {
        "log of the engine",  # its work is the engine's process: tests/engine/test_agent.py
    }
    found = set[str]()
    for folder in ("gateway", "middleware", "backends"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call) or not node.args:
                    continue
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if called == "supervise" and path.name not in ("plugin.py", "supervision.py"):
                    found.add(_words(node.args[0], path.read_text()))
    found.discard("")
    assert {name for name in found if not any(one == name or one.startswith(name) for one in known)} == set()


def _words(node: ast.expr, text: str) -> str:
    """The name of a task as far as it is written down; of the store's three, which stand in a table, nothing."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
        return str(node.values[0].value)
    return ""


# What is no task and must go on all the same.


@pytest.mark.pure
def test_one_request_that_cannot_be_looked_at_keeps_no_other_from_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    watches = watch.Watches()
    failures = list[dict[str, Any]]()

    class Broken:
        until = 0.0

        def look(self, now: float) -> None:
            raise broken()

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))
        one: Any = Broken()
        watches.add(one)
        await asyncio.sleep(3 * watch.TICK_S)
        watches.discard(one)
        with pytest.raises(asyncio.CancelledError), watch.Watch(watches, None, cast("Any", asyncio.Event().wait)) as looked_at:
            looked_at.begin_by(0.0)
            await asyncio.sleep(30)
        assert looked_at.reason == "too late"

    with contextlib.suppress(TypeError):
        asyncio.run(asyncio.wait_for(run(), 20))
    assert failures
    assert isinstance(failures[0]["exception"], ValueError)


def test_one_record_that_cannot_be_observed_takes_no_other_with_it() -> None:
    class Tracer:
        def finish(self, record: Record) -> None:
            if record.call_id == "bad":
                raise broken()

    observer = observe.Observer(False, Tracer())
    records = []
    for id in ("good-1", "bad", "good-2"):
        record = Record({"type": "http", "method": "POST", "path": "/", "raw_path": b"/", "headers": [], "client": ("127.0.0.1", 1)})
        record.model, record.call_id = "m", id
        records.append(record)

    async def run() -> None:
        for record in records:
            observer.ended(record)
        observer.flush()

    asyncio.run(run())
    assert observer.ring.find("good-1") is not None
    assert observer.ring.find("good-2") is not None
    assert counted(observer.metrics, "requests that have ended") == 1


def test_a_look_at_connections_that_fails_does_not_end_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = Metrics()

    async def nothing(scope: Any, receive: Any, send: Any) -> None:
        pass

    server = http.server(nothing, settings(), Lifecycle(), lambda accepting: None, counts.failed, lifespan="off")
    monkeypatch.setattr(server, "_look", Breaking().method())
    assert asyncio.run(server.on_tick(0)) is False
    assert counted(counts, "connections") == 1


def test_what_a_parent_that_stands_still_does_not_read_does_not_gather(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "REPORT_INTERVAL_S", 0.0)
    monkeypatch.setattr(worker, "MAX_UNREAD", 100_000)

    async def run() -> None:
        ours, theirs = socket.socketpair()
        reader, writer = await protocol.streams(ours)
        one = worker.Worker(settings(), tmp_path, {}, KeyList(), {}, reader, writer)
        reports = 0
        report = one._report

        def counting() -> None:
            nonlocal reports
            reports += 1
            report()

        monkeypatch.setattr(one, "_report", counting)
        running = asyncio.get_running_loop().create_task(one._report_forever())
        before = -1
        async with asyncio.timeout(60):
            while reports != before or not reports:  # until it falls silent
                before = reports
                await asyncio.sleep(0.5)
        unread = writer.transport.get_write_buffer_size()
        assert 100_000 <= unread < 200_000
        theirs.setblocking(False)
        with contextlib.suppress(BlockingIOError):  # the parent goes on
            while theirs.recv(1 << 20):
                await asyncio.sleep(0)
        async with asyncio.timeout(60):
            while reports == before:
                await asyncio.sleep(0.05)
                with contextlib.suppress(BlockingIOError):
                    theirs.recv(1 << 20)
        running.cancel()
        writer.close()
        theirs.close()

    asyncio.run(run())
