"""An answer of the real engine that goes on elsewhere: two SGLang engines in float32, greedy, so that any change of a token shows.

Cut at a place of our choosing by a proxy in front of one of them, and at last by killing it in the middle of an answer.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.support import raw
from tests.support.cutting import Cutting, cutting
from tests.support.engine import engine_urls
from tests.support.processes import Gateway, command, gateway

CHAT = "/v1/chat/completions"
MODELS = {mode: {"backend": "dsv3", "continuation": mode, "balance": "weighted_round_robin"} for mode in ("exact", "text", "off")}
HEALTH = {"max_ejected_share": 0, "slow_start_s": 0}
TOKENS = 48


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with two engines of its own."""
    section = {"kind": "sglang_dsv3", "hosts": [{"launch": "local"}, {"launch": "local"}], "engine": {"dtype": "float32"}, "health": HEALTH}
    with gateway(tmp_path_factory.mktemp("two"), {"models": MODELS, "backends": {"dsv3": section}}) as running:
        running.wait_ready(300)
        running.wait_all_hosts(300)
        yield running


@pytest.fixture(scope="module")
def dying(two: Gateway) -> Iterator[Cutting]:
    with cutting(engine_urls(two)[0]) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def cut(two: Gateway, dying: Cutting, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway in front of the same two engines, the first one behind the proxy that cuts; nearly every request goes there first."""
    hosts = [{"url": dying.url, "weight": 1000}, {"url": engine_urls(two)[1], "weight": 1}]
    section = {"kind": "sglang_dsv3", "hosts": hosts, "health": HEALTH}
    with gateway(tmp_path_factory.mktemp("cut"), {"models": MODELS, "backends": {"dsv3": section}}) as running:
        running.wait_ready()
        running.wait_all_hosts()
        yield running


def body(model: str, prompt: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {
        "model": model, "messages": messages, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True}, **more,
    }  # fmt: skip


class Heard:
    """A stream as a client has it: text, what came before the seam, and the rest of what it may rely on."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        before, self.continued, _ = content.partition(b": continued on another host\n\n")
        self.before = self._text(before)
        self.text = self._text(content)
        chunks = self._chunks(content)
        self.ids = {chunk["id"] for chunk in chunks}
        self.created = {chunk["created"] for chunk in chunks}
        self.roles = sum("role" in choice["delta"] for chunk in chunks for choice in chunk["choices"])
        self.finishes = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
        self.usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]

    @staticmethod
    def _chunks(content: bytes) -> list[dict[str, Any]]:
        events = [event for event in content.split(b"\n\n") if event.startswith(b"data: {")]
        return [json.loads(event[6:]) for event in events]

    def _text(self, content: bytes) -> str:
        return "".join(choice["delta"].get("content") or "" for chunk in self._chunks(content) for choice in chunk["choices"])

    def assert_seamless(self, prompt_tokens: int) -> None:
        assert self.content.endswith(b"data: [DONE]\n\n")
        assert (len(self.ids), len(self.created), self.roles, self.finishes) == (1, 1, 1, ["length"])
        assert len(self.usages) == 1
        assert (self.usages[0]["prompt_tokens"], self.usages[0]["completion_tokens"]) == (prompt_tokens, TOKENS)


def ask(running: Gateway, model: str, prompt: str, **more: Any) -> Heard:
    answer = raw.call(running.port, "POST", CHAT, body(model, prompt, **more))
    assert answer.status == 200, answer.body
    return Heard(answer.body)


def engine(url: str, path: str, content: dict[str, Any]) -> Any:
    request = urllib.request.Request(url + path, json.dumps(content).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())


@pytest.mark.parametrize("after", [1, 2, 7, 20, TOKENS - 1, TOKENS])
def test_exactly_the_undisturbed_text_wherever_it_is_cut(cut: Gateway, dying: Cutting, after: int) -> None:
    prompt = f"Tell me a story about {after} tokens"
    dying.after = None
    undisturbed = ask(cut, "exact", prompt)
    assert not undisturbed.continued
    prompt_tokens = undisturbed.usages[0]["prompt_tokens"]
    undisturbed.assert_seamless(prompt_tokens)
    disturbed = dying.cut_after(after, lambda: ask(cut, "exact", prompt))
    assert bool(disturbed.continued) == (after < TOKENS), "closing words alone are no continuation: no other host gives them"
    disturbed.assert_seamless(prompt_tokens)
    assert disturbed.text == undisturbed.text
    plain = ask(cut, "off", prompt) if after == TOKENS else undisturbed
    assert plain.text == undisturbed.text, "and the same that chat itself gives"


def test_text_goes_on_identically_where_it_tokenises_back(two: Gateway, cut: Gateway, dying: Cutting) -> None:
    """And where it does not, it goes on all the same: one answer, whole, its first part as it was."""
    url, kinds = engine_urls(two)[1], {True: 0, False: 0}
    for number in range(12):
        prompt = f"What is {number} good for?"
        asked = {**body("x", prompt), "stream": False, "return_token_ids": True, "return_prompt_token_ids": True}
        asked.pop("stream_options")
        whole = engine(url, CHAT, asked)["choices"][0]
        dying.after = 6 + number
        heard = ask(cut, "text", prompt)
        assert heard.continued
        heard.assert_seamless(len(whole["prompt_token_ids"]))
        assert whole["message"]["content"].startswith(heard.before)
        back = engine(url, "/tokenize", {"model": "x", "prompt": heard.before, "add_special_tokens": False})["tokens"]
        same = back == whole["response_token_ids"][: len(back)]
        kinds[same] += 1
        if same:
            assert heard.text == whole["message"]["content"], f"cut after {heard.before!r}"
        else:
            assert heard.text.startswith(heard.before)
    assert kinds[True], "a case that tokenises back"
    assert kinds[False], "a case that does not"


def test_what_cannot_go_on_without_a_seam_ends_honestly(cut: Gateway, dying: Cutting) -> None:
    dying.after = 5
    for model, more in (("off", {}), ("text", {"logprobs": True}), ("text", {"regex": "[a-z]{40}", "max_tokens": 40})):
        answer = raw.call(cut.port, "POST", CHAT, body(model, "Hello", **more))
        assert answer.status == 200
        assert b'data: {"error":{' in answer.body
        assert b"[DONE]" not in answer.body
        assert b": continued" not in answer.body


def test_a_killed_engine_is_not_noticed(two: Gateway) -> None:
    """kill -9 of the engine that is answering, in the middle of it; both modes at once."""
    undisturbed = {mode: ask(two, "exact", f"Hello {mode}") for mode in ("exact", "text")}
    peers = {mode: raw.connect(two.port) for mode in undisturbed}
    for mode, peer in peers.items():
        peer.sendall(raw.request("POST", CHAT, json.dumps(body(mode, f"Hello {mode}")).encode()))
    heads = {mode: peer.recv(4096) for mode, peer in peers.items()}
    busy = [row["id"] for row in two.admin("/admin/hosts").json()["hosts"] if row["in_flight"]]
    victim = next(
        child for supervisor in two.supervisors() if f"dsv3/local-{busy[0][-1]}" in " ".join(command(supervisor))
        for child in supervisor.children() if "sglang.launch_server" in " ".join(command(child))
    )  # fmt: skip
    victim.kill()
    for mode, peer in peers.items():
        with peer:
            got = heads[mode]
            while part := peer.recv(65536):
                got += part
        head, _, chunked = got.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        heard = Heard(raw.unchunk(chunked))
        heard.assert_seamless(undisturbed[mode].usages[0]["prompt_tokens"])
        if mode == "exact":
            assert heard.text == undisturbed[mode].text
    psutil.wait_procs([victim], timeout=10)
