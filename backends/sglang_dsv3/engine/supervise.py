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
from pathlib import Path
from typing import Any

import msgspec

from backends.sglang_dsv3.config import Engine
from backends.sglang_dsv3.engine import GRACE_S, TINY_MODEL, environment_folder, family, launch
from gateway import lifeline
from gateway.lifeline import Backoff

# A start took 22 to 30 s (2026-11-23, 2 shared cores); the last one's own duration is better and is remembered.
USUAL_START_S = 30.0
START_LIMIT_S = 600.0
LOG_BYTES, LOG_FILES = 8 << 20, 3

# What SGLang's log says while it starts, as a person would put it.
_PROGRESS = (
    (re.compile(r"Init torch distributed begin"), "joining its ranks"),
    (re.compile(r"Load weight begin"), "loading weights"),
    (re.compile(r"Load weight end"), "weights are loaded"),
    (re.compile(r"KV Cache is allocated|Memory pool end"), "memory is allocated"),
    (re.compile(r"Uvicorn running|Application startup complete"), "warming up"),
)


class Reporter:
    """Writes ServiceState lines to the descriptor the parent gave us, or to standard output when there is none."""

    def __init__(self) -> None:
        self._fd = int(os.environ.get("PENSTOCK_STATUS_FD", "1"))

    def tell(self, state: str, detail: str = "", url: str = "", eta_s: float = 0.0) -> None:
        """One line; a parent that is gone is noticed elsewhere."""
        line = json.dumps({"state": state, "detail": detail, "url": url, "eta_s": round(eta_s, 1)}) + "\n"
        with contextlib.suppress(OSError):
            os.write(self._fd, line.encode())


class Progress:
    """Milestones in the log of an engine that starts, each told once. Once it is ready the log has no more say: a line that only looks
    like a milestone must not take a serving engine out."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._told: set[str] = set()
        self._ended = False

    def hear(self, line: str) -> None:
        """One line of the log."""
        for pattern, words in _PROGRESS:
            if not self._ended and words not in self._told and pattern.search(line):
                self._told.add(words)
                self._tell(words)

    def end(self) -> None:
        """The engine is ready."""
        self._ended = True


class Supervisor:
    """Keeps one engine running until it is told to stop."""

    def __init__(self, name: str, config: Engine, home: Path) -> None:
        self._config = config
        self._home = home
        self._reporter = Reporter()
        self._state_file = home / "state" / f"{name.replace('/', '-')}.json"
        self._log = _engine_log(home / "state" / f"{name.replace('/', '-')}.log")
        self._stop = asyncio.Event()
        self._tail: list[str] = []

    async def run(self) -> int:
        """Start, watch, restart; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        lifeline = asyncio.create_task(_parent_gone())
        lifeline.add_done_callback(lambda _: _kill_everything_and_exit())
        backoff = Backoff()
        while not self._stop.is_set():
            problem = self._unprepared()
            if problem:
                self._reporter.tell("failed", problem)
                await self._stop.wait()
                return 2
            started = time.monotonic()
            how = await self._one_life()
            if self._stop.is_set():
                break
            delay_s = backoff.next(time.monotonic() - started)
            self._reporter.tell("restarting", f"{how}; next start in {delay_s:g} s", eta_s=delay_s + self._usual_start_s())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), delay_s)
        return 0

    def _unprepared(self) -> str:
        if not (environment_folder(self._home) / "bin" / "python").exists():
            return "its environment is not installed: run `penstock engine install`"
        return ""

    async def _one_life(self) -> str:
        """From start to end of one SGLang; says how it ended."""
        self._tail.clear()
        model = await self._checkpoint()
        if model is None:
            return "the tiny checkpoint could not be built"
        port = _free_port()
        url = f"http://127.0.0.1:{port}"
        usual_s = self._usual_start_s()
        self._reporter.tell("loading", "starting SGLang", url, remaining_s(usual_s, 0.0))
        started = time.monotonic()
        served = TINY_MODEL if self._config.model_path is None else model.name
        process = await self._spawn(launch.command(self._config, self._home, model, served, port))
        progress = Progress(lambda words: self._reporter.tell("loading", words, url, remaining_s(usual_s, time.monotonic() - started)))
        reading = asyncio.create_task(self._follow_log(process, progress.hear))
        ready = asyncio.create_task(self._until_ready(url, started))
        stop = asyncio.create_task(self._stop.wait())
        exited = asyncio.create_task(process.wait())
        try:
            await asyncio.wait({ready, stop, exited}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done() and not exited.done():
                if not ready.result():
                    return f"it was not ready after {START_LIMIT_S:g} s"
                progress.end()
                self._remember_start(time.monotonic() - started)
                self._reporter.tell("ready", f"in {time.monotonic() - started:.0f} s", url)
                await asyncio.wait({stop, exited}, return_when=asyncio.FIRST_COMPLETED)
            if stop.done():
                await self._drain(process, exited)
            return _how(process.returncode, self._tail)
        finally:
            for task in (ready, stop, exited):
                task.cancel()
            await family.end(own_child=process.pid)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reading, 2.0)

    async def _drain(self, process: asyncio.subprocess.Process, exited: asyncio.Task[int]) -> None:
        """SIGTERM lets SGLang finish what runs; what is left after the grace is killed with everything else."""
        self._reporter.tell("draining")
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await asyncio.wait({exited}, timeout=GRACE_S)

    async def _checkpoint(self) -> Path | None:
        """The folder of the weights; the tiny ones are built on first use."""
        if self._config.model_path is not None:
            return Path(self._config.model_path)
        folder = self._home / "checkpoints" / TINY_MODEL
        if (folder / "config.json").exists():
            return folder
        self._reporter.tell("loading", "building the tiny checkpoint", eta_s=self._usual_start_s() + 5.0)
        builder = Path(__file__).parent / "tiny" / "build.py"
        process = await self._spawn([str(environment_folder(self._home) / "bin" / "python"), str(builder), str(folder)])
        await self._follow_log(process, lambda line: None)
        return folder if await process.wait() == 0 else None

    async def _spawn(self, argv: list[str]) -> asyncio.subprocess.Process:
        me = os.getpid()
        return await asyncio.create_subprocess_exec(
            *argv,
            env=launch.environment(self._config, os.environ),
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

    async def _until_ready(self, url: str, started: float) -> bool:
        while time.monotonic() - started < START_LIMIT_S:
            if await asyncio.to_thread(_answers, url + "/ready"):
                return True
            await asyncio.sleep(0.2)
        return False

    def _usual_start_s(self) -> float:
        try:
            known = json.loads(self._state_file.read_text())["start_s"]
            return float(min(max(known, 1.0), START_LIMIT_S))
        except (OSError, ValueError, KeyError, TypeError):
            return USUAL_START_S

    def _remember_start(self, seconds: float) -> None:
        with contextlib.suppress(OSError):
            self._state_file.write_text(json.dumps({"start_s": round(seconds, 1)}))


def remaining_s(usual_s: float, elapsed_s: float) -> float:
    """How long a start will still take: a quarter more than usual, so that who waits exactly so long finds it ready, and for one that is
    overdue a quarter of what it has taken."""
    return max(1.25 * usual_s - elapsed_s, elapsed_s / 4)


def _engine_log(path: Path) -> logging.Logger:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=LOG_FILES - 1, encoding="utf-8")
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


def _how(code: int | None, tail: list[str]) -> str:
    """An end in words: the signal, or the exit code with the last line that names an error."""
    if code is not None and code < 0:
        return f"SGLang was ended by {signal.Signals(-code).name}"
    said = next((line for line in reversed(tail) if re.search(r"\w*(Error|Exception|error):", line)), tail[-1] if tail else "")
    return f"SGLang ended with exit code {code}{f': {said[-200:]}' if said else ''}"


async def _parent_gone() -> None:
    """Returns when our standard input ends. On a terminal nobody holds a lifeline, so nothing ends."""
    if sys.stdin is None or sys.stdin.isatty():
        await asyncio.Event().wait()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while await reader.read(4096):
        pass


def _kill_everything_and_exit() -> None:
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
    sys.exit(asyncio.run(Supervisor(options.name, config, options.home).run()))


if __name__ == "__main__":
    main()
