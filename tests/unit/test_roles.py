"""Hosts that answer in pairs: what a configuration may not say, in one line each, and what binds two bodies."""

from __future__ import annotations

import json
from typing import Any

import pytest

from backends.sglang_dsv3 import pair, roles
from backends.sglang_dsv3.config import Config, HostConfig
from backends.sglang_dsv3.host import EngineHost
from backends.sglang_dsv3.shapes import Load, ModelInfo
from gateway.config import problems

P = {"url": "http://p:1", "role": "prefill"}
D = {"url": "http://d:1", "role": "decode"}


def found(**section: Any) -> list[str]:
    return [f"{error.path}: {error.problem}" for error in problems(section, Config, "b")]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"hosts": [D]}, "b.hosts: no host has `role: prefill`, and those with `role: decode` answer nobody without one"),
        ({"hosts": [P]}, "b.hosts: no host has `role: decode`"),
        ({"hosts": [P, {"url": "http://x:1"}, D]}, "b.hosts.1.role: is missing, and other hosts have one: prefill or decode"),
        ({"hosts": [{**P, "role": "prefil"}, D]}, "b.hosts.0.role"),
        ({"hosts": [{"launch": "local", "role": "decode"}, P]}, "b.hosts.0.role: belongs to a host with a `url`"),
        ({"hosts": [{"url": "unix:///run/p", "role": "prefill"}, D]}, "b.hosts.0.role: a decode host finds its prefill host by name"),
        ({"hosts": [P, {**D, "bootstrap_port": 8998}]}, "b.hosts.1.bootstrap_port: belongs to a host with `role: prefill`"),
        ({"hosts": [{**P, "bootstrap_port": 0}, D]}, "b.hosts.0.bootstrap_port: 0 is out of range; accepted: 1 to 65535"),
        ({"hosts": [P, D], "endpoints": ["/v1/messages", "/v1/chat/completions"]}, "b.endpoints: /v1/messages: SGLang's prefill and"),
    ],
)
def test_a_wrong_role_is_one_line(section: dict[str, Any], words: str) -> None:
    (line,) = found(**section)
    assert words in line


def test_pairs_are_accepted() -> None:
    assert not found(hosts=[P, D])
    assert not found(hosts=[{**P, "bootstrap_port": 9000}, D, {**D, "url": "http://e:1"}], endpoints=["/v1/chat/completions"])
    assert not found(hosts=[{"url": "http://x:1"}])


@pytest.mark.parametrize(
    ("told", "role", "words"),
    [
        ("prefill", "prefill", ""),
        ("null", None, ""),
        (None, "decode", ""),
        ("decode", None, "its engine was started to decode (--disaggregation-mode decode), and it is here to answer alone"),
        ("null", "prefill", "its engine was started to answer alone (--disaggregation-mode null), and it is here to prefill"),
    ],
)
def test_an_engine_is_what_its_host_is_here_for(told: str | None, role: str | None, words: str) -> None:
    assert roles.mismatch(ModelInfo(disaggregation_mode=told), role) == words


def body(url: str, prompts: int = 1, rank: int | None = None, ranks: int = 0, bootstrap_port: int | None = None) -> dict[str, Any]:
    host = EngineHost("", 0, HostConfig(url=url, role="prefill", bootstrap_port=bootstrap_port), lambda name: None)
    host.ranks.saw([Load(dp_rank=number) for number in range(ranks)])
    members: dict[str, Any] = json.loads(b'{"a":1' + pair.bootstrap(host, prompts, rank))
    return members


def test_the_body_says_where_and_in_which_room() -> None:
    one = body("http://10.0.0.1:30000")
    assert (one["bootstrap_host"], one["bootstrap_port"]) == ("10.0.0.1", 8998)
    assert 0 <= one["bootstrap_room"] < 1 << 63
    assert one["bootstrap_room"] != body("http://10.0.0.1:30000")["bootstrap_room"]
    assert body("http://[fd00::1]:30000", bootstrap_port=7)["bootstrap_host"] == "[fd00::1]"
    several = body("http://p:1", prompts=3)
    assert several["bootstrap_host"] == ["p"] * 3
    assert several["bootstrap_port"] == [8998] * 3
    assert len(set(several["bootstrap_room"])) == 3


def test_a_room_leads_to_its_rank() -> None:
    for rank in range(4):
        assert {room % 4 for room in body("http://p:1", prompts=5, rank=rank, ranks=4)["bootstrap_room"]} == {rank}
