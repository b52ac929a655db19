"""The supervisor of one SGLang engine: start, watch, restart, drain, and never leave an orphan.

It is a process between the gateway's parent and SGLang:

    parent --stdin--> supervisor --SIGKILL on death--> sglang --SIGKILL on death--> scheduler, detokenizer
           <-status--            <--- subreaper for every descendant ---

- The parent dies, by whatever signal: our standard input ends, and everything below us is killed.
- We die, by whatever signal: the kernel kills SGLang (PR_SET_PDEATHSIG), and SGLang's children ask the same of the kernel themselves.
- SGLang dies: its children are ours now (PR_SET_CHILD_SUBREAPER); they are killed, and it is started again with back-off.

Linux only. Needs nothing but the standard library and the gateway's own package.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import logging
import logging.handlers
import os
import re
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from backends.sglang_dsv3.config import Engine
from backends.sglang_dsv3.engine import TINY_MODEL, checkpoint, environment_folder, family, launch, symptoms
from backends.sglang_dsv3.engine.symptoms import End
from gateway import lifeline
from gateway.home import private, state_folder
from gateway.lifeline import Backoff
from gateway.plugin import ServiceState
from gateway.supervision import supervise, uncounted

# A start took 22 to 30 s (2026-11-23, 2 shared cores); the last one's own duration is better and is remembered.
USUAL_START_S = 30.0
# A tiny one; 640 GiB from a slow disk take half an hour.
START_LIMIT_S, LARGE_START_LIMIT_S = 600.0, 5400.0
LOG_BYTES, LOG_FILES = 8 << 20, 3

_ALLOCATED = "memory is allocated"
# What SGLang's log says while it starts, as a person would put it.
_PROGRESS = (
    (re.compile(r"Init torch distributed begin"), "joining its ranks"),
    (re.compile(r"Load weight begin"), "loading weights"),
    # Every tenth percent, and no more: a line for each shard of 163 would be too many.
    *((re.compile(rf"checkpoint shards:\s+{tens}\d%"), f"loading weights, {tens}0 %") for tens in range(1, 10)),
    (re.compile(r"Load weight end"), "weights are loaded"),
    (re.compile(r"KV Cache is allocated|Memory pool end"), _ALLOCATED),
    (re.compile(r"Uvicorn running|Application startup complete"), "warming up"),
)


def tell_parent(state: ServiceState) -> None:
    """One line on the descriptor the parent gave us; a parent that is gone is noticed elsewhere."""
    with contextlib.suppress(OSError):
        os.write(int(os.environ.get("PENSTOCK_STATUS_FD", "1")), msgspec.json.encode(state) + b"\n")


class Progress:
    """Milestones in the log of an engine that starts, each told once. Once it is ready the log has no more say: a line that only looks
    like a milestone must not take a serving engine out."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._told: set[str] = set()
        self._ended = False
        self.allocated = False

    def hear(self, line: str) -> None:
        """One line of the log."""
        for pattern, words in _PROGRESS:
            if not self._ended and words not in self._told and pattern.search(line):
                self._told.add(words)
                self.allocated = self.allocated or words == _ALLOCATED
                self._tell(words)

    def end(self) -> None:
        """The engine is ready."""
        self._ended = True


class Supervisor:
    """Keeps one engine running until it is told to stop. `port`: None for any free one; `tell` hears every change."""

    def __init__(self, name: str, config: Engine, home: Path, tell: Callable[[ServiceState], None], port: int | None = None) -> None:
        self.config = config
        self.state = ServiceState()
        self.restarts = 0
        self.last_end: End | None = None
        self._home = home
        self._tell_all = tell
        self._port = port
        self._name = name.replace("/", "-")
        self._state = state_folder(home)
        self._state_file = self._state / f"{self._name}.json"
        self._log = _engine_log(self._state / f"{self._name}.log")
        self._stop = asyncio.Event()
        self._change = asyncio.Event()
        self._nccl_log: Path | None = None
        self._tail: list[str] = []

    def stop(self) -> None:
        """Let it finish what it has, and end."""
        self._stop.set()

    def change(self, config: Engine) -> None:
        """Let it finish what it has, and start again with this."""
        self.config = config
        self._change.set()

    def _tell(self, state: str, detail: str = "", url: str = "", eta_s: float = 0.0) -> None:
        self.state = msgspec.convert({"state": state, "detail": detail, "url": url, "eta_s": round(eta_s, 1)}, ServiceState)
        self._tell_all(self.state)

    async def run(self) -> int:
        """Start, watch, restart; returns the exit code."""
        backoff = Backoff()
        while not self._stop.is_set():
            self._change.clear()
            problem = self._unprepared()
            if problem:
                self._tell("failed", problem)
                await self._told()
                continue
            started = time.monotonic()
            end = await self._one_life()
            if self._stop.is_set():
                break
            if self._change.is_set():
                continue
            self.restarts += 1
            self.last_end = end
            words = f"{end.how}{f'; {end.advice}' if end.advice else ''}"
            if not end.retry:
                self._tell("failed", words)
                await self._told()
                continue
            # The first time, the next start writes down what NCCL says; after that the log is there.
            self._nccl_log = self._state / f"{self._name}.nccl.log" if end.kind == "NCCL" and self._nccl_log is None else None
            delay_s = backoff.next(time.monotonic() - started)
            self._tell("restarting", f"{words}; next start in {delay_s:g} s", eta_s=delay_s + self._usual_start_s())
            await self._told(delay_s)
        return 2 if self.state.state == "failed" else 0

    async def _told(self, limit_s: float | None = None) -> None:
        """Wait for the operator's word, or so long."""
        waits = [asyncio.create_task(self._stop.wait()), asyncio.create_task(self._change.wait())]
        await asyncio.wait(waits, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()

    def _unprepared(self) -> str:
        if not (environment_folder(self._home) / "bin" / "python").exists():
            return "its environment is not installed: run `penstock engine install`"
        if self.config.model_path is None:
            return ""
        try:
            checkpoint.verify(Path(self.config.model_path))
        except checkpoint.Unusable as problem:
            return str(problem)
        return ""

    async def _one_life(self) -> End:
        """From start to end of one SGLang; says how it ended."""
        self._tail.clear()
        model = await self._checkpoint()
        if model is None:
            return End("the tiny checkpoint could not be built")
        port = self._port or _free_port()
        url = f"http://{self.config.host}:{port}"
        usual_s = self._usual_start_s()
        self._tell("loading", "starting SGLang", url, remaining_s(usual_s, 0.0))
        started = time.monotonic()
        process = await self._spawn(launch.command(self.config, self._home, model, served_name(self.config), port, self._secrets()))
        progress = Progress(lambda words: self._tell("loading", words, url, remaining_s(usual_s, time.monotonic() - started)))
        # An engine whose log nobody reads stands still when the pipe is full.
        reading = supervise("log of the engine", partial(self._follow_log, process, progress.hear), uncounted)
        ready = asyncio.create_task(self._until_ready(url, started, progress))
        stop = asyncio.create_task(self._told())
        exited = asyncio.create_task(process.wait())
        try:
            await asyncio.wait({ready, stop, exited}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done() and not exited.done():
                if not ready.result():
                    return End(f"it was not ready after {self._start_limit_s():g} s")
                progress.end()
                self._remember_start(time.monotonic() - started)
                self._tell("ready", f"in {time.monotonic() - started:.0f} s", url)
                await asyncio.wait({stop, exited}, return_when=asyncio.FIRST_COMPLETED)
            if stop.done():
                await self._drain(process, exited, url)
            else:
                with contextlib.suppress(TimeoutError):  # its last words
                    await asyncio.wait_for(asyncio.shield(reading), 2.0)
            return symptoms.classify(process.returncode, self._tail)
        finally:
            for task in (ready, stop, exited):
                task.cancel()
            await family.end(own_child=process.pid)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reading, 2.0)

    async def _drain(self, process: asyncio.subprocess.Process, exited: asyncio.Task[int], url: str) -> None:
        """SIGTERM lets SGLang finish what runs; what is left after the grace is killed with everything else."""
        self._tell("draining", url=url)
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await asyncio.wait({exited}, timeout=self.config.grace_s)

    async def _checkpoint(self) -> Path | None:
        """The folder of the weights; the tiny ones are built on first use."""
        if self.config.model_path is not None:
            return Path(self.config.model_path)
        folder = self._home / "checkpoints" / TINY_MODEL
        if (folder / "config.json").exists():
            return folder
        self._tell("loading", "building the tiny checkpoint", eta_s=self._usual_start_s() + 5.0)
        builder = Path(__file__).parent / "tiny" / "build.py"
        process = await self._spawn([str(environment_folder(self._home) / "bin" / "python"), str(builder), str(folder)])
        await self._follow_log(process, lambda line: None)
        return folder if await process.wait() == 0 else None

    def _secrets(self) -> Path | None:
        """A file that only we can read, with the engine's key as SGLang's `--config` has it."""
        if self.config.api_key_file is None:
            return None
        path = self._state / f"{self._name}.secrets.yaml"
        with open(path, "w", opener=private) as file:
            file.write(f"api-key: {json.dumps(Path(self.config.api_key_file).read_text(encoding='utf-8').strip())}\n")
        return path

    async def _spawn(self, argv: list[str]) -> asyncio.subprocess.Process:
        me = os.getpid()
        nccl = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": str(self._nccl_log)} if self._nccl_log is not None else {}
        return await asyncio.create_subprocess_exec(
            *argv,
            env={**launch.environment(self.config, os.environ), **nccl},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=1 << 20,
            preexec_fn=lambda: lifeline.die_with(me, signal.SIGKILL),
        )

    async def _follow_log(self, process: asyncio.subprocess.Process, hear: Callable[[str], None]) -> None:
        """Everything the engine says goes into a bounded log, and to whoever listens."""
        assert process.stdout is not None
        while True:
            try:
                raw = await process.stdout.readline()
            except ValueError:  # a line over the limit; its rest is read as the next one
                continue
            if not raw:
                return
            line = raw.decode("utf-8", "replace").rstrip()
            self._log.info(line)
            self._tail = [*self._tail[-39:], line]
            hear(line)

    async def _until_ready(self, url: str, started: float, progress: Progress) -> bool:
        """Node 0 answers for all; the others serve no HTTP and are ready when they have their weights and memory."""
        while time.monotonic() - started < self._start_limit_s():
            if progress.allocated if self.config.node_rank > 0 else await asyncio.to_thread(_answers, url + "/ready"):
                return True
            await asyncio.sleep(0.2)
        return False

    def _start_limit_s(self) -> float:
        return LARGE_START_LIMIT_S if self.config.gpus else START_LIMIT_S

    def _usual_start_s(self) -> float:
        try:
            known = json.loads(self._state_file.read_text())["start_s"]
            return float(min(max(known, 1.0), self._start_limit_s()))
        except (OSError, ValueError, KeyError, TypeError):
            return USUAL_START_S

    def _remember_start(self, seconds: float) -> None:
        with contextlib.suppress(OSError), open(self._state_file, "w", opener=private) as file:
            json.dump({"start_s": round(seconds, 1)}, file)


def remaining_s(usual_s: float, elapsed_s: float) -> float:
    """How long a start will still take: a quarter more than usual, so that who waits exactly so long finds it ready, and for one that is
    overdue a quarter of what it has taken."""
    return max(1.25 * usual_s - elapsed_s, elapsed_s / 4)


class _PrivateLog(logging.handlers.RotatingFileHandler):
    said = False

    def _open(self) -> io.TextIOWrapper:
        return open(self.baseFilename, "a", encoding=self.encoding, opener=private)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        """A full disk is said once, and keeps nobody from serving."""
        if not self.said:
            self.said = True
            print(f"penstock: {self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)


def _engine_log(path: Path) -> logging.Logger:
    handler = _PrivateLog(path, maxBytes=LOG_BYTES, backupCount=LOG_FILES - 1, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.Logger(str(path))
    logger.addHandler(handler)
    return logger


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def served_name(config: Engine) -> str:
    """What the engine calls its model."""
    if config.served_model_name is not None:
        return config.served_model_name
    return TINY_MODEL if config.model_path is None else Path(config.model_path).name


async def _parent_gone() -> None:
    """Returns when our standard input ends. On a terminal nobody holds a lifeline, so nothing ends."""
    if sys.stdin is None or sys.stdin.isatty():
        await asyncio.Event().wait()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while await reader.read(4096):
        pass


def kill_everything_and_exit() -> None:
    """Nobody is left to answer to: leave nobody behind."""
    while family.kill():
        time.sleep(0.02)
    os._exit(1)


def main(arguments: list[str] | None = None) -> None:
    """`python -m backends.sglang_dsv3.engine.supervise --name N --home H --engine JSON`; started by the gateway's parent."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--name", required=True)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--engine", required=True)
    options: Any = parser.parse_args(arguments)
    family.adopt()
    config = msgspec.json.decode(options.engine, type=Engine)
    sys.exit(asyncio.run(_serve(Supervisor(options.name, config, options.home, tell_parent))))


async def _serve(supervisor: Supervisor) -> int:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.stop)
    watch = asyncio.create_task(_parent_gone())
    watch.add_done_callback(lambda _: kill_everything_and_exit())
    return await supervisor.run()


if __name__ == "__main__":
    main()
