"""Anthropic's and OpenAI's families by their own SDKs, in front of the real engine: what it counts, what it can do, what it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.support import raw
from tests.support.engine import busy
from tests.support.processes import Gateway, gateway, until

MODEL = "deepseek-v3-tiny"
USER: list[Any] = [{"role": "user", "content": "How many tokens is this?"}]


@pytest.fixture
def claude(served: Gateway) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.root, api_key="none", max_retries=0) as found:
        yield found


def test_counted_tokens_are_those_that_the_prompt_takes(claude: anthropic.Anthropic) -> None:
    tools: Any = [
        {"name": "look", "description": "Look it up.", "input_schema": {"type": "object", "properties": {"q": {"type": "string"}}}}
    ]
    for more in ({}, {"system": "Be brief."}, {"tools": tools}):
        counted = claude.messages.count_tokens(model=MODEL, messages=USER, **more).input_tokens
        used = claude.messages.create(model=MODEL, messages=USER, max_tokens=1, **more).usage
        assert counted == used.input_tokens + (used.cache_read_input_tokens or 0) > 5


def test_the_engines_refusals_are_anthropics(claude: anthropic.Anthropic) -> None:
    bad: Any = [{"role": "alien", "content": "x"}]
    for work in (
        lambda: claude.messages.count_tokens(model=MODEL, messages=bad),
        lambda: claude.messages.create(model=MODEL, messages=bad, max_tokens=1),
        lambda: claude.messages.create(model=MODEL, messages=[{"role": "user", "content": "word " * 6000}], max_tokens=1),
    ):
        with pytest.raises(anthropic.BadRequestError) as refused:
            work()
        body: Any = refused.value.body
        assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
        assert body["request_id"] == refused.value.request_id
        assert "site-packages" not in str(body)


def test_models_say_what_the_engine_says(served: Gateway, claude: anthropic.Anthropic) -> None:
    def known() -> Any:
        found = raw.call(served.port, "GET", f"/v1/models/{MODEL}").json()
        return found if "max_model_len" in found else None

    found = until("it is known", known)
    assert (found["max_model_len"], found["context_length"]) == (4096, 4096)
    assert found["capabilities"] == {"tools": False, "reasoning": False, "vision": False, "audio": False}
    model = claude.models.retrieve(MODEL)
    assert (model.id, model.max_input_tokens) == (MODEL, 4096)
    assert [one.id for one in claude.models.list()] == [MODEL]


def test_tools_that_are_no_functions_are_refused_by_name(served: Gateway) -> None:
    """The engine's chat takes functions alone, its responses custom tools too."""
    with openai.OpenAI(base_url=served.base_url, api_key="none", max_retries=0) as client:
        custom: Any = {"type": "custom", "custom": {"name": "shout", "description": "Shout."}}
        function: Any = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
        with pytest.raises(openai.BadRequestError, match="tools of type 'function' in a chat, got 'custom'") as refused:
            client.chat.completions.create(model=MODEL, messages=USER, max_tokens=1, tools=[function, custom])
        assert (refused.value.param, refused.value.code) == ("tools[1].type", "unsupported_value")
        nameless: Any = {"type": "function"}
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=MODEL, messages=USER, max_tokens=1, tools=[nameless])
        assert refused.value.param == "tools[0].function", "a function that is missing is another matter"
        taken: Any = {"type": "custom", "name": "shout", "description": "Shout."}
        assert client.responses.create(model=MODEL, input="x", max_output_tokens=2, tools=[taken]).id


def test_without_a_store_the_engine_keeps_nothing(served: Gateway) -> None:
    with openai.OpenAI(base_url=served.base_url, api_key="none", max_retries=0) as client:
        made = client.responses.create(model=MODEL, input="x", max_output_tokens=2).id
        for work in (client.responses.retrieve, client.responses.cancel):
            with pytest.raises(openai.NotFoundError, match="--enable-response-store"):
                work(made)
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model=MODEL, input="x", max_output_tokens=2, previous_response_id=made)
        assert refused.value.param == "previous_response_id"
        with pytest.raises(openai.NotFoundError, match="no backend here serves it"):
            client.responses.input_tokens.count(model=MODEL, input="x")


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """An engine that keeps responses, and writes tool calls and thoughts apart: one start."""
    engine = {"extra_args": ["--enable-response-store"], "tool_call_parser": "deepseekv3", "reasoning_parser": "deepseek-r1"}
    section = {"kind": "sglang_dsv3", "hosts": [{"launch": "local"}], "engine": engine}
    config = {"models": {"kept": {"backend": "dsv3"}}, "backends": {"dsv3": section}}
    with gateway(tmp_path_factory.mktemp("keeping"), config) as running:
        running.wait_ready()
        yield running


def test_what_the_engine_keeps_is_retrieved_continued_and_cancelled(keeping: Gateway) -> None:
    with openai.OpenAI(base_url=keeping.base_url, api_key="none", max_retries=0) as client:
        made = client.responses.create(model="kept", input="Hello", max_output_tokens=4)
        again = client.responses.retrieve(made.id)
        assert (again.id, again.model, again.output) == (made.id, "kept", made.output)
        assert client.responses.cancel(made.id).status == again.status, "it is done: nothing to cancel"
        streamed: list[Any] = list(client.responses.create(model="kept", input="Hello", max_output_tokens=4, stream=True))
        assert client.responses.retrieve(streamed[-1].response.id).model == "kept"
        more = client.responses.create(model="kept", input="And?", max_output_tokens=4, previous_response_id=made.id)
        assert more.usage is not None
        assert made.usage is not None
        assert more.usage.input_tokens > made.usage.input_tokens + made.usage.output_tokens, "what was said before is in its prompt"
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(client.responses.create(model="kept", input="x", max_output_tokens=4, store=False).id)
        slow = client.responses.create(
            model="kept", input="Hello", max_output_tokens=2000, background=True, extra_body={"ignore_eos": True}
        )
        assert slow.status == "queued"
        until("it is being made", lambda: client.responses.retrieve(slow.id).status == "in_progress")
        assert client.responses.cancel(slow.id).status == "cancelled"
        assert client.responses.retrieve(slow.id).status == "cancelled"
        until("the engine is idle", lambda: busy(keeping) == 0)


def test_abilities_are_those_it_was_started_with(keeping: Gateway) -> None:
    def known() -> Any:
        return raw.call(keeping.port, "GET", "/v1/models/kept").json().get("capabilities")

    assert until("they are known", known) == {"tools": True, "reasoning": True, "vision": False, "audio": False}
