"""Looking at a launched engine from the side, past the gateway."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

import psutil

from tests.support.processes import Gateway, command, fetch, until


def sglang(running: Gateway) -> psutil.Process:
    """SGLang's main process."""

    def find() -> psutil.Process | None:
        for supervisor in running.supervisors():
            with contextlib.suppress(psutil.NoSuchProcess):  # it may be the one that a test has just killed
                for child in supervisor.children():
                    if "sglang.launch_server" in command(child):
                        return child
        return None

    found = until("SGLang runs", find)
    assert found is not None
    return found


def engine_urls(running: Gateway) -> list[str]:
    """Where each launched engine listens, in the order of the hosts."""
    found: dict[str, str] = {}
    for supervisor in running.supervisors():
        name = next(part for part in command(supervisor) if "/local-" in part)
        for child in supervisor.children():
            arguments = command(child)
            if "sglang.launch_server" in arguments:
                found[name] = f"http://127.0.0.1:{arguments[arguments.index('--port') + 1]}"
    return [found[name] for name in sorted(found)]


def engine_url(running: Gateway) -> str:
    arguments = sglang(running).cmdline()
    return f"http://127.0.0.1:{arguments[arguments.index('--port') + 1]}"


def loads(running: Gateway) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(fetch(f"{engine_url(running)}/v1/loads"))["loads"][0]
    return found


def busy(running: Gateway) -> int:
    """Requests the engine runs or has waiting."""
    load = loads(running)
    return int(load["num_running_reqs"]) + int(load["num_waiting_reqs"])


def metric(running: Gateway, name: str) -> float:
    """The sum of one series of the engine's own metrics."""
    text = fetch(f"{engine_url(running)}/metrics").decode()
    values = [float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)]
    return sum(values)
