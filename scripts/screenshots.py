#!/usr/bin/env python3
"""Write the pictures of docs/: the console, one request in it, the page at `/` (WebP), and `penstock top` (SVG), of a gateway before three
scripted hosts with some load on it. `python -m scripts.screenshots`, with the tests' environment and a Chromium."""

from __future__ import annotations

import contextlib
import html
import itertools
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gateway.access.keys import hashed
from tests.support import raw
from tests.support.chromium import Browser, chromium
from tests.support.processes import Gateway, environment, gateway, rehearsal

DOCS = Path(__file__).resolve().parents[1] / "docs"
CHAT = "/v1/chat/completions"
# A picture is looked at in a repository: so large may one be.
LARGEST_BYTES = 150 << 10
# What clients ask in turn, and with which key: chats of several lengths, one whose first host fails, one beyond its limit.
LOAD = (
    ("research", "[[tokens 120]] [[pace 0.02]]"), ("research", "[[tokens 40]] [[pace 0.02]]"), ("shop", "[[tokens 60]] [[pace 0.03]]"),
    ("shop", "[[die 20]] [[times 1]] [[tokens 80]] [[pace 0.02]]"), ("batch", "[[tokens 200]] [[pace 0.01]]"), ("intern", "hi"),
)  # fmt: skip


def main() -> None:
    """All of them."""
    with tempfile.TemporaryDirectory() as name, chromium(Path(name)) as page, _served(Path(name)) as (running, failed):
        page.size(1180, 1100, 1.25)
        page.send("Emulation.setScrollbarsHidden", hidden=True)
        page.open(f"{running.admin_url}/console")
        page.fill("key", running.admin_key())
        page.press("Enter")
        page.wait("document.querySelectorAll('#requests tbody tr').length >= 12")
        page.wait("[...document.querySelectorAll('#keys td[data-label=\"tokens/s\"]')].some((cell) => Number(cell.textContent) > 0)")
        page.run("document.activeElement.blur()")
        _write("console.webp", page.picture())
        page.run(f"location.hash = 'request={failed}'")
        page.wait("document.querySelectorAll('#story .track').length > 1")
        page.run("document.activeElement.blur(), document.querySelector('#explained').scrollIntoView()")
        page.size(1180, 760, 1.25)
        _write("console-request.webp", page.picture())
        _front(page, running)
        done = subprocess.run(
            [sys.executable, "-m", "gateway", "top", "--once", "--admin", running.admin_url],
            capture_output=True, text=True, check=True, env=environment(COLUMNS="120"),
        )  # fmt: skip
        _write("top.svg", _terminal(["$ penstock top", *done.stdout.replace(running.admin_url, "http://127.0.0.1:9464").splitlines()]))


def _front(page: Browser, running: Gateway) -> None:
    page.size(900, 1330, 1.25)
    page.open(f"{running.root}/")
    page.wait("!document.querySelector('#key-form').hidden")
    page.fill("key", "research")
    page.press("Enter")
    page.wait("document.querySelectorAll('#models li').length")
    page.fill("prompt", "Why is the sky blue?")
    page.click("#send")
    page.wait("document.querySelector('#outcome').textContent.includes('ended by')")
    page.run("document.activeElement.blur(), scrollTo(0, 0)")
    _write("page.webp", page.picture())


@contextlib.contextmanager
def _served(folder: Path) -> Iterator[tuple[Gateway, str]]:
    """A gateway under load, and the id of a request whose first host failed."""
    with contextlib.ExitStack() as stack:
        hosts = [stack.enter_context(rehearsal()).url for _ in range(3)]
        limits: dict[str, dict[str, Any]] = {
            "research": {"rpm": 600, "tpm": 400_000},
            "shop": {"rpm": 1200, "tpm": 100_000},
            "batch": {"max_in_flight": 8},
            "intern": {"rpm": 6},
        }
        config = {
            "models": {"deepseek-v3": {"backend": "dsv3", "aliases": ["gpt-4o"]}},
            "backends": {
                "dsv3": {
                    "kind": "sglang_dsv3",
                    "hosts": [{"url": url, "weight": weight} for url, weight in zip(hosts, (5, 3, 2), strict=True)],
                }
            },
            "keys": [{"name": key, "hash": hashed(key), **more} for key, more in limits.items()],
        }
        running = stack.enter_context(gateway(folder / "gateway", config))
        running.wait_all_hosts()
        stop = threading.Event()
        clients = [threading.Thread(target=_client, args=(running, place, stop)) for place in range(8)]
        for client in clients:
            client.start()
        try:
            yield running, _failed_over(running)
        finally:
            stop.set()
            for client in clients:
                client.join()


def _failed_over(running: Gateway) -> str:
    """The id of an answer that went on at another host: the first of some."""
    for turn in range(50):
        answer = _ask(running, "research", f"[[die 25]] [[times 1]] [[late 0.3]] [[tokens 60]] [[pace 0.02]] {turn}")
        found = running.admin(f"/admin/requests/{answer.headers['x-request-id']}").json()
        if found["outcome"] == "ok" and len(found["attempts"]) > 1:
            return str(found["id"])
    raise SystemExit("no answer went on at another host")


def _client(running: Gateway, place: int, stop: threading.Event) -> None:
    for turn in itertools.count(place):
        if stop.wait(0.3):
            return
        key, prompt = LOAD[turn % len(LOAD)]
        _ask(running, key, f"{prompt} {place} {turn}")


def _ask(running: Gateway, key: str, prompt: str) -> raw.Answer:
    return raw.call(running.port, "POST", CHAT, raw.chat(prompt, stream=True), {"authorization": f"Bearer {key}"})


def _terminal(lines: list[str]) -> bytes:
    """Lines as a terminal shows them."""
    width, height = 8.4 * max(map(len, lines)) + 32, 18 * len(lines) + 28
    rows = "".join(f'<text x="16" y="{18 * place + 28}">{_fixed(line)}</text>\n' for place, line in enumerate(lines))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" height="{height}">\n'
        f"<title>penstock top</title>\n"
        '<rect width="100%" height="100%" rx="8" fill="#10151b"/>\n'
        f'<g font-family="monospace" font-size="14" fill="#e6ebf0">\n{rows}</g>\n</svg>\n'
    ).encode()


def _fixed(line: str) -> str:
    """With spaces that no viewer of SVG takes together."""
    return html.escape(line).replace(" ", "\u00a0")


def _write(name: str, content: bytes) -> None:
    if len(content) > LARGEST_BYTES:
        raise SystemExit(f"{name} would have {len(content) >> 10} kB: {LARGEST_BYTES >> 10} are the most")
    (DOCS / name).write_bytes(content)
    print(f"docs/{name}: {len(content) / 1024:.0f} kB")


if __name__ == "__main__":
    main()
