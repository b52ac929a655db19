"""Bad output is noticed: each rule at a real gateway whose hosts break it on command, and a host that breaks one more often than its equals."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backends.sglang_dsv3.rehearsal.bad import RULES
from tests.support import raw
from tests.support.processes import Gateway, Rehearsal, gateway, rehearsal, until

CHAT = "/v1/chat/completions"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
TOOLS = {
    CHAT: [TOOL],
    "/v1/messages": [{"name": "get_weather", "input_schema": PARAMETERS}],
    "/v1/responses": [{"type": "function", "name": "get_weather", "parameters": PARAMETERS}],
}
# What raw text has to do with parsers: nothing.
RAW = frozenset(["empty", "loop", "utf8"])


def body(path: str, prompt: str, stream: bool) -> dict[str, Any]:
    said: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
    if path == "/v1/responses":
        said = {"input": prompt}
    elif path == "/v1/completions":
        said = {"prompt": prompt}
    tools = {"tools": TOOLS[path]} if path in TOOLS else {}
    return {"model": "deepseek-v3", "max_tokens": 900, **said, **tools, **({"stream": True} if stream else {})} | (
        {"max_output_tokens": 900} if path == "/v1/responses" else {}
    )


def ask(served: Gateway, prompt: str, path: str = CHAT, stream: bool = False) -> raw.Answer:
    asked = body(path, prompt, stream)
    if path == "/v1/responses":
        del asked["max_tokens"]
    return raw.call(served.port, "POST", path, asked)


def counted(served: Gateway) -> dict[tuple[str, str, str], float]:
    """(host, rule, result) -> answers."""
    found: dict[tuple[str, str, str], float] = {}
    for labels, value in re.findall(
        r"^penstock_sentinel_answers_total\{(.*)\} (\S+)$", served.admin("/metrics").body.decode(), re.MULTILINE
    ):
        of = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        found[of["host"], of["rule"], of["result"]] = float(value)
    return found


@pytest.fixture
def engine() -> Iterator[Rehearsal]:
    with rehearsal() as found:
        yield found


def settings(*engines: Rehearsal, **sentinel: Any) -> dict[str, Any]:
    found = engines[0].backend()
    found["backends"]["dsv3"]["hosts"] = [{"url": one.url} for one in engines]
    found["backends"]["dsv3"]["endpoints"] = [CHAT, "/v1/completions", "/v1/messages", "/v1/responses"]
    return {**found, "sentinel": {"per_second": 1000, "cpu_share": 1, **sentinel}}


def test_each_rule_on_each_endpoint(engine: Rehearsal, tmp_path: Path) -> None:
    with gateway(tmp_path, settings(engine)) as served:
        served.wait_all_hosts()
        asked = []
        for path in (CHAT, "/v1/messages", "/v1/responses", "/v1/completions"):
            for stream in (False, True):
                for rule in ("none", *RULES):
                    if path == "/v1/completions" and rule not in RAW and rule != "none":
                        continue
                    answer = ask(served, f"[[bad {rule}]] {path} {stream}", path, stream)
                    assert answer.status == 200, answer.body.decode()
                    asked.append((path, stream, rule, answer.headers["x-request-id"]))

        def judged() -> bool:
            every = counted(served)
            return sum(value for (_, rule, _), value in every.items() if rule == "utf8") == len(asked)

        until("all are judged", judged, 60)
        for path, stream, rule, request in asked:
            found = served.admin(f"/admin/requests/{request}").json().get("bad_output", {})
            assert list(found) == ([] if rule == "none" else [rule]), (path, stream, rule, found)
        text = served.admin("/metrics").body.decode()
        assert 'penstock_sentinel_finish_reasons_total{backend="dsv3"' in text
