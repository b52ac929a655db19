"""The exchanges whose instructions bench/stages.py counts: the whole gateway with everything on, in one event loop without sockets.

python -m bench.played SPEC       SPEC is a JSON object; run under callgrind with bench/marks.c loaded, by bench/stages.py alone
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

from bench.peers import KEY, everything_on
from gateway.telemetry import log
from tests.support.memory_net import Gateway, Loop

WARM, INHERITED = 40, -1
# Until as many records are kept as ever are, so that each request also takes the place of an older one.
FILLING = 2100
HARNESS = "harness"
# Exchanges that are observed together: what gathers in 5 ms at 5,000 requests a second.
BATCH = {"json": 25, "stream": 25, "few": 2, "many": 2}
EVENTS = {"few": 10, "many": 60}
BURST = 32


def _chunk(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(body), body)


def _event(choices: str, more: str = "") -> bytes:
    head = '"id":"chatcmpl-0","object":"chat.completion.chunk","created":1,"model":"deepseek-v3"'
    return _chunk(f'data: {{{head},"choices":[{choices}]{more}}}\n\n'.encode())


TOKEN = _event('{"index":0,"delta":{"reasoning_content":null,"content":" hello"},"logprobs":null,"finish_reason":null,"matched_stop":null}')
FINISH = _event('{"index":0,"delta":{"reasoning_content":null},"logprobs":null,"finish_reason":"stop","matched_stop":null}')
USAGE = _event("", ',"usage":{"prompt_tokens":9,"total_tokens":15,"completion_tokens":6,"prompt_tokens_details":null,"reasoning_tokens":0}')
ENDING = FINISH + USAGE + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
WHOLE = json.dumps(
    {
        "id": "x", "object": "chat.completion", "created": 1, "model": "deepseek-v3",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello " * 40}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 40, "total_tokens": 49},
    }
).encode()  # fmt: skip
ANSWERS = {
    "json": [b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(WHOLE) + WHOLE],
    "stream": [HEAD + TOKEN * BURST + ENDING],
    **{name: [HEAD, *[TOKEN] * events, ENDING] for name, events in EVENTS.items()},
}


def request(stream: bool) -> bytes:
    """As wrk sends it in the bench."""
    messages = [{"role": "user", "content": "Explain quantum computing. " * 20}]
    tree = {"model": "deepseek-v3", "messages": messages, "max_tokens": 64, **({"stream": True} if stream else {})}
    body = json.dumps(tree, separators=(",", ":")).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nContent-Type: application/json\r\nAuthorization: Bearer %s\r\n"
    return head % KEY.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


class Still(Loop):
    """A loop whose clock stands still: no timer ever fires, however slowly all this runs while it is counted."""

    def time(self) -> float:
        return 1000.0


class Marks:
    """bench/marks.c, and the numbers it knows stages by."""

    def __init__(self, library: str, stage_of: Callable[[str], str]) -> None:
        self._library = ctypes.PyDLL(library)
        self._stage_of = stage_of
        self.names: list[str] = [HARNESS]
        self._resolve = self._number  # kept alive for the library
        self._library.marks_install(ctypes.py_object(self._resolve))

    def _number(self, met: CodeType | str) -> int:
        name = self._stage_of(met if isinstance(met, str) else f"{met.co_filename}:{met.co_name}")
        if not name:
            return INHERITED
        if name not in self.names:
            self.names.append(name)
        return self.names.index(name)

    def begin(self) -> None:
        """From here on valgrind counts, which takes its time."""
        self._library.marks_begin()

    def count(self, stage: str, work: Callable[[], None], label: str) -> None:
        """Do the work, and write under the label what the stage took of it."""
        self._library.marks_count(self.names.index(stage))
        work()
        self._library.marks_write(label.encode())

    def count_all(self, work: Callable[[], None], label: str) -> None:
        """Do the work, and write what all of it took, the harness included, without the price of telling stages apart."""
        self._library.marks_off()
        work()
        self._library.marks_on()
        self._library.marks_write(label.encode())


def rules(spec: dict[str, Any]) -> Callable[[str], str]:
    """A stage by where code lies: a module's own file, or the symbol that mypyc gave a function. Empty is its caller's."""
    roots: list[str] = spec["roots"]
    compiled: dict[str, str] = spec["compiled"]

    def of(met: str) -> str:
        if met.startswith("/") or ":" in met or met.endswith(">"):
            file, _, function = met.rpartition(":")
            return _of_file(file, function)
        _, _, rest = met.partition("_")  # CPyDef_body___read, CPyPy_...
        longest = max((suffix for suffix in compiled if met.startswith("CPy") and rest.startswith(f"{suffix}___")), key=len, default="")
        return compiled.get(longest, "")

    def _of_file(file: str, function: str) -> str:
        if file.endswith(("/bench/played.py", "/tests/support/memory_net.py")):
            return HARNESS
        if file.endswith(("/asyncio/base_events.py", "/asyncio/runners.py")) and function in (
            "_run_once",
            "run_forever",
            "run_until_complete",
        ):
            return "asyncio"
        for root in roots:
            if file.startswith(root):
                return file.removeprefix(root).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        return ""  # the standard library's is its caller's

    return of


def main() -> None:
    spec: dict[str, Any] = json.loads(sys.argv[1])
    quiet = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
    spoken, sys.stderr = sys.stderr, quiet
    log.setup("info", "json")
    logging.getLogger("penstock").setLevel(logging.INFO)
    sys.stderr = spoken
    loop = Still()
    hosts = [f"http://10.0.0.{number}:30000" for number in (1, 2, 3)]
    tree = everything_on(hosts, "http://127.0.0.1:1", Path(spec["folder"]))
    # Nothing is exported, so that no thread runs beside; a request that is not sampled does the same in any case.
    tree["tracing"] = {"otlp_endpoint": "http://127.0.0.1:1", "protocol": "http/protobuf", "sample_ratio": 1e-12}
    gateway = Gateway(loop, tree)
    marks = Marks(spec["library"], rules(spec))
    endings = {name: pieces[-1][-16:] for name, pieces in ANSWERS.items()}

    def play(name: str, times: int) -> None:
        loop.answer = lambda sent: ANSWERS[name] if sent.startswith(b"POST /v1/chat") else ()
        asked = request(stream=name != "json")
        for _ in range(times):
            got = gateway.exchange(asked, endings[name], observed=False)
            assert got.startswith(b"HTTP/1.1 200"), got[:500]
        gateway.observe()

    play("json", FILLING)
    for name in ANSWERS:
        play(name, WARM)
    marks.begin()
    gc.collect()
    gc.disable()
    for name, batch in BATCH.items():
        work = partial(play, name, batch)
        marks.count_all(work, "warm:")
        marks.count_all(work, f"{name}:")
        for stage in marks.names:
            marks.count(stage, work, f"{name}:{stage}")
    print(json.dumps({"batch": BATCH}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
