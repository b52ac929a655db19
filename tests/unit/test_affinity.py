"""What binds a call to a host: where it is looked for, what is no session's name, and that nothing else changes it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.plugin import Call, Endpoint
from gateway.serving import calls
from gateway.serving.affinity import MAX_PROMPT_BYTES, Affinities, marked
from gateway.serving.balance.affinity import Affinity
from gateway.serving.balance.settings import SESSION_HEADERS

HELLO = [{"role": "system", "content": "You are kind."}, {"role": "user", "content": "hello"}]
MORE = [*HELLO, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "and now?"}]
Headers = list[tuple[bytes, bytes]]


def call(messages: Any = None, endpoint: Endpoint = Endpoint.CHAT, compact: bool = True, **more: Any) -> Call:
    body: dict[str, Any] = {"model": "m", **more}
    if endpoint in (Endpoint.CHAT, Endpoint.MESSAGES):
        body["messages"] = HELLO if messages is None else messages
    return calls.parse(endpoint, json.dumps(body, separators=(",", ":") if compact else None).encode())


def of(asked: Call, headers: Headers | None = None, key: str = "", salt: str = "", balance: str = "affinity") -> Affinity:
    ignored: list[str] = []
    found = Affinities(SESSION_HEADERS).of(asked, headers or [], key, salt, balance, ignored)
    assert not ignored
    return found


def test_sources_in_their_order() -> None:
    everything: dict[str, Any] = {"prompt_cache_key": "k", "session_id": "s", "previous_response_id": "r"}
    headers = [(b"accept", b"*/*"), (b"session_id", b"codex"), (b"x-session-id", b"mine")]
    assert of(call(**everything), headers).source == "x-session-id", "the first of the list, wherever it stands"
    assert of(call(**everything), headers[:2]).source == "session_id"
    assert of(call(**everything)).source == "prompt_cache_key"
    del everything["prompt_cache_key"]
    assert of(call(**everything)).source == "session_id"
    assert of(call(previous_response_id="r")).source == "previous_response_id"
    assert of(call()).source == "prefix"
    assert of(call(prompt_cache_key="")).source == "prefix", "an empty one names nothing"
    assert of(call(prompt_cache_key=None)).source == "prefix"
    assert Affinities(["X-Mine"]).of(call(), [(b"x-mine", b"1"), (b"x-session-id", b"2")], "", "", "affinity", []).source == "x-mine"


@pytest.mark.parametrize("balance", ["two_choices", "weighted_round_robin"])
def test_other_policies_do_not_ask(balance: str) -> None:
    found = of(call(prompt_cache_key="k"), [(b"x-session-id", b"1")], balance=balance)
    assert (found.source, found.chain) == ("none", ())
    assert of(call(prompt_cache_key="k"), balance="prefix_affinity").source == "prefix"
    assert of(calls.parse(Endpoint.EMBEDDINGS, b'{"model":"m","input":"x"}')).source == "none", "nothing is cached of those"


def test_a_session_is_where_its_name_says_and_not_where_its_prompt_does() -> None:
    one, other = of(call(prompt_cache_key="k")), of(call(MORE[1:], prompt_cache_key="k"))
    assert one.point == other.point
    assert one.point != of(call(prompt_cache_key="l")).point
    assert of(call(), [(b"x-session-id", b"k")]).point == of(call(MORE[1:]), [(b"x-session-id", b"k")]).point


def test_names_are_a_keys_own_and_a_session_ids_also_its_users() -> None:
    assert of(call(prompt_cache_key="k"), key="a").point != of(call(prompt_cache_key="k"), key="b").point
    assert of(call(session_id="k", user="a")).point != of(call(session_id="k", user="b")).point
    assert of(call(session_id="k", user="a")).point == of(call(MORE, session_id="k", user="a")).point
    assert of(call(), salt="a").point != of(call(), salt="b").point, "whose caches are apart need not meet"


@pytest.mark.parametrize("wrong", ["x" * 257, "\u00e9" * 129, 7, ["k"], {"k": 1}, "x" * 5000, "\ud800"], ids=repr)
def test_what_is_no_text_of_256_bytes_is_ignored_and_named(wrong: Any) -> None:
    ignored: list[str] = []
    if wrong == "\ud800":  # half a pair is no character, and a body that holds one is refused before it comes here
        return
    found = Affinities(SESSION_HEADERS).of(call(prompt_cache_key=wrong, session_id="s"), [], "", "", "affinity", ignored)
    assert (found.source, ignored) == ("session_id", ["prompt_cache_key"])
    assert of(call(prompt_cache_key="\u00e9" * 128)).source == "prompt_cache_key", "256 bytes are allowed"


@pytest.mark.parametrize("wrong", [b"x" * 257, b"\xff\xfe", b"a\x01b"], ids=repr)
def test_the_same_of_headers(wrong: bytes) -> None:
    ignored: list[str] = []
    found = Affinities(SESSION_HEADERS).of(call(), [(b"x-session-id", wrong), (b"session-id", b"s")], "", "", "affinity", ignored)
    assert (found.source, ignored) == ("session-id", ["x-session-id"])


def test_a_conversation_keeps_its_place_and_its_chain_grows() -> None:
    one, two = of(call()), of(call(MORE))
    assert (one.point, one.lead) == (two.point, two.lead)
    assert (len(one.chain), one.lead) == (2, 2)
    assert list(two.chain[:2]) == list(one.chain)
    assert len(two.chain) == len(two.sizes) == 4
    assert list(two.sizes) == sorted(two.sizes)
    other = of(call([HELLO[0], {"role": "user", "content": "bye"}]))
    assert other.point != one.point
    assert (other.chain[0], other.chain[1] == one.chain[1]) == (one.chain[0], False)
    pretty = of(call(compact=False)), of(call(MORE, compact=False))
    assert list(pretty[1].chain[:2]) == list(pretty[0].chain), "spaces between messages are no matter"


def test_what_stands_before_the_messages_is_part_of_the_prompt() -> None:
    plain = of(call())
    tools = [{"type": "function", "function": {"name": "f"}}]
    for other in (of(call(tools=tools)), of(call(), salt="s"), of(call(chat_template_kwargs={"thinking": True}))):
        assert not set(plain.chain) & set(other.chain)


def test_long_messages_are_told_apart_by_their_ends_and_their_length() -> None:
    def chain(text: str) -> list[int]:
        return list(of(call([{"role": "user", "content": text}])).chain)

    long = "a" * 5000
    assert chain(long) == chain(long)
    assert len({tuple(chain(text)) for text in (long, long + "a", "b" + long[1:], long[1:] + "b")}) == 4


def test_other_shapes_of_a_prompt() -> None:
    """A text grows in pieces, a response's input is a list of messages, and what is larger than any context has no chain."""
    text = "".join(f"{number} " for number in range(4000))
    one = of(calls.parse(Endpoint.COMPLETIONS, json.dumps({"model": "m", "prompt": text}).encode()))
    two = of(calls.parse(Endpoint.COMPLETIONS, json.dumps({"model": "m", "prompt": text + "more"}).encode()))
    assert len(one.chain) > 5
    assert list(two.chain[: len(one.chain) - 1]) == list(one.chain[:-1])
    tokens = of(calls.parse(Endpoint.COMPLETIONS, json.dumps({"model": "m", "prompt": list(range(5000))}).encode()))
    assert len(tokens.chain) > 5
    listed = of(calls.parse(Endpoint.RESPONSES, json.dumps({"model": "m", "input": MORE}).encode()))
    assert (len(listed.chain), listed.lead) == (4, 2)
    huge = of(call([{"role": "user", "content": "x" * MAX_PROMPT_BYTES}]))
    assert (huge.source, huge.chain) == ("prefix", ())
    assert of(call([])).chain == ()


def test_an_answers_id_leads_to_its_place_in_every_gateway() -> None:
    first = calls.parse(Endpoint.RESPONSES, json.dumps({"model": "m", "input": "hello"}).encode())
    bound = of(first)
    placed = marked(first, bound)
    assert placed.id.startswith(first.id[:21])
    assert len(placed.id) == len(first.id)
    answered = calls.owned(placed, "key").id
    again = of(calls.parse(Endpoint.RESPONSES, json.dumps({"model": "m", "input": "more", "previous_response_id": answered}).encode()))
    assert (again.source, again.point) == ("previous_response_id", bound.point)
    foreign = of(calls.parse(Endpoint.RESPONSES, json.dumps({"model": "m", "input": "more", "previous_response_id": "resp_1"}).encode()))
    assert (foreign.source, foreign.point == bound.point) == ("previous_response_id", False)
    plain = call()
    assert marked(plain, of(plain)) is plain


def test_every_process_finds_the_same_point() -> None:
    """Workers and gateways must agree, whatever their hash seeds."""
    script = (
        "from gateway.serving.affinity import Affinities; from gateway.serving import calls; from gateway.plugin import Endpoint\n"
        'call = calls.parse(Endpoint.CHAT, b\'{"model":"m","messages":[{"role":"user","content":"hello"}]}\')\n'
        "print(Affinities(()).of(call, [], 'key', 'salt', 'affinity', []).point)"
    )
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout for _ in range(2)]
    assert runs[0] == runs[1]


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=40)), min_size=1, max_size=12), st.data())
@settings(deadline=None)
def test_chains_agree_exactly_as_far_as_the_messages_do(turns: list[tuple[str, str]], data: st.DataObject) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    cut = data.draw(st.integers(1, len(messages)))
    other = [*messages[:cut], {"role": "user", "content": data.draw(st.text(max_size=40))}]
    one, two = of(call(messages)), of(call(other))
    same = next((n for n, pair in enumerate(zip(messages, other, strict=False)) if pair[0] != pair[1]), min(len(messages), len(other)))
    assert list(one.chain[:same]) == list(two.chain[:same])
    assert not set(one.chain[same:]) & set(two.chain[same:])


def test_long_conversations_are_told_apart_up_to_a_number() -> None:
    messages = [{"role": "user", "content": str(number)} for number in range(400)]
    found = of(call(messages))
    assert len(found.chain) == len(found.sizes) == 256
    assert list(found.chain) == list(of(call(messages[:300])).chain)
