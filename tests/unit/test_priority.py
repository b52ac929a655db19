"""Which priority SGLang is sent: the class of the key in its own numbers, and what of a client's own word is heard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from backends.sglang_dsv3 import translate
from backends.sglang_dsv3.config import Engine
from backends.sglang_dsv3.continuation import exact
from backends.sglang_dsv3.continuation.splitter import Splitter
from backends.sglang_dsv3.engine.launch import command
from gateway.errors import InvalidRequest
from gateway.plugin import Endpoint, Terms
from gateway.serving import calls

ASKED: dict[Endpoint, dict[str, Any]] = {
    Endpoint.CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    Endpoint.COMPLETIONS: {"prompt": "hi"},
    Endpoint.RESPONSES: {"input": "hi"},
    Endpoint.EMBEDDINGS: {"input": "hi"},
    Endpoint.MESSAGES: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
    Endpoint.RERANK: {"query": "hi", "documents": ["a"]},
}


def sent(order: str | None, endpoint: Endpoint = Endpoint.CHAT, allowed: bool = False, **more: Any) -> Any:
    call = calls.parse(endpoint, json.dumps({"model": "m", **ASKED[endpoint], **more}).encode())
    body = translate.engine_body(call, Terms(priority=3), None, ("priority",) if allowed else (), order)
    return json.loads(body).get("priority")


@pytest.mark.parametrize("endpoint", [*ASKED])
def test_it_is_the_class_where_the_engine_has_such_a_field_and_it_is_turned_on(endpoint: Endpoint) -> None:
    has = endpoint not in (Endpoint.MESSAGES, Endpoint.RERANK)
    assert sent("higher_first", endpoint) == (6 if has else None)
    assert sent("lower_first", endpoint) == (3 if has else None)
    assert sent(None, endpoint) is None


@pytest.mark.parametrize(
    ("order", "own", "found"),
    [
        ("higher_first", 100, 6), ("higher_first", 7, 6), ("higher_first", 6, 6), ("higher_first", 2, 2), ("higher_first", -100, 0),
        ("lower_first", -100, 3), ("lower_first", 2, 3), ("lower_first", 3, 3), ("lower_first", 7, 7), ("lower_first", 100, 9),
    ],
)  # fmt: skip
def test_a_client_is_heard_only_where_it_is_allowed_and_never_goes_before_its_class(order: str, own: int, found: int) -> None:
    assert sent(order, allowed=True, priority=own) == found
    assert sent(order, priority=own) == (6 if order == "higher_first" else 3)
    assert sent(None, priority=own) is None


def test_what_is_no_number_is_refused_where_it_is_heard() -> None:
    with pytest.raises(InvalidRequest) as refused:
        sent("higher_first", allowed=True, priority="urgent")
    assert refused.value.param == "priority"
    assert sent("higher_first", priority="urgent") == 6


def test_an_exact_answer_has_it_too() -> None:
    call = calls.parse(Endpoint.CHAT, json.dumps({"model": "m", **ASKED[Endpoint.CHAT], "max_tokens": 4}).encode())
    for order, found in (("higher_first", 6), ("lower_first", 3), (None, None)):
        assert (
            json.loads(exact.generate_body(call, Terms(priority=3), exact.Progress([1], Splitter("", "", False)), None, order)).get(
                "priority"
            )
            == found
        )


def test_a_launched_engine_is_told_so() -> None:
    def flags(order: Any) -> list[str]:
        return [part for part in command(Engine(priority_scheduling=order), Path("h"), Path("m"), "m", 1) if "priority" in part]

    assert flags(None) == []
    assert flags("higher_first") == ["--enable-priority-scheduling"]
    assert flags("lower_first") == ["--enable-priority-scheduling", "--schedule-low-priority-values-first"]
