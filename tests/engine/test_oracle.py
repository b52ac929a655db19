"""The engine is the oracle: what SGLang's own request models take, we do not refuse, and we understand it as they do; what they break on
never reaches them. Generated bodies are shown to those models in the engine's environment; the known ones go to an engine that runs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from backends.sglang_dsv3 import breaking, translate
from backends.sglang_dsv3.translate import INTERNAL_FIELDS
from gateway.errors import InvalidRequest
from gateway.plugin import BOUNDS, Call, Endpoint
from gateway.serving import calls
from gateway.wire.spelling import Names
from tests.engine.test_plugin import run
from tests.support import raw
from tests.support.engine import engine_url
from tests.support.processes import Gateway

# Reads bodies, one a line with its endpoint, and says of each what the endpoint's model makes of it.
PROGRAM = """
import json, sys
from pydantic import ValidationError
import sglang.srt.entrypoints.openai.protocol as p
from sglang.srt.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
MODELS = {"/v1/chat/completions": p.ChatCompletionRequest, "/v1/completions": p.CompletionRequest, "/v1/embeddings": p.EmbeddingRequest,
          "/v1/responses": p.ResponsesRequest, "/v1/messages": AnthropicMessagesRequest, "/v1/rerank": p.V1RerankReqInput,
          "/v1/score": p.ScoringRequest, "/tokenize": p.TokenizeRequest, "/v1/messages/count_tokens": AnthropicCountTokensRequest}
def read(path, found):
    given = found.model_fields_set
    if path == "/v1/chat/completions":
        bound = found.max_completion_tokens or found.max_tokens or None
    elif path == "/v1/responses":
        bound = found.max_output_tokens
    else:
        bound = found.max_tokens if "max_tokens" in given else None
    prompt = getattr(found, "prompt", None)
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    options = getattr(found, "stream_options", None)
    usage = bool(options and options.include_usage)
    return {"stream": bool(found.stream), "choices": getattr(found, "n", 1) * prompts, "bound": bound, "usage": usage}
if sys.argv[1] == "names":
    print(json.dumps({path: sorted(model.model_fields) for path, model in MODELS.items()}))
else:
    answers = []
    for line in open(sys.argv[1], encoding="utf-8"):
        path, text = json.loads(line)
        try:
            found = MODELS[path].model_validate(json.loads(text))
            answers.append({"taken": read(path, found) if path in list(MODELS)[:2] + ["/v1/responses", "/v1/messages"] else {}})
        except ValidationError as error:
            answers.append({"refused": str(error)[:300]})
        except Exception as error:
            answers.append({"broken": repr(error)[:300]})
    json.dump(answers, open(sys.argv[2], "w"))
"""
COUNT = 6000
MESSAGES = [{"role": "user", "content": "hi"}]
VALID: dict[Endpoint, dict[str, Any]] = {
    Endpoint.CHAT: {"model": "m", "messages": MESSAGES},
    Endpoint.COMPLETIONS: {"model": "m", "prompt": "x"},
    Endpoint.EMBEDDINGS: {"model": "m", "input": "x"},
    Endpoint.RESPONSES: {"model": "m", "input": "x"},
    Endpoint.MESSAGES: {"model": "m", "messages": MESSAGES, "max_tokens": 5},
    Endpoint.COUNT_TOKENS: {"model": "m", "messages": MESSAGES},
    Endpoint.RERANK: {"model": "m", "query": "q", "documents": ["d"]},
    Endpoint.SCORE: {"model": "m", "query": "q", "items": ["i"]},
    Endpoint.TOKENIZE: {"model": "m", "prompt": "x"},
}
# What public bug reports say clients were refused for by gateways, though the engine takes it: issue by issue, one at a time.
KNOWN: list[tuple[Endpoint, dict[str, Any]]] = [
    (Endpoint.CHAT, {"stop": ["a", "b", "c", "d", "e"]}),
    (Endpoint.CHAT, {"max_tokens": 4.0}),
    (Endpoint.CHAT, {"max_tokens": "4"}),
    (Endpoint.CHAT, {"max_tokens": 0}),
    (Endpoint.CHAT, {"temperature": "0.7"}),
    (Endpoint.CHAT, {"temperature": 2.5}),
    (Endpoint.CHAT, {"stream": "false"}),
    (Endpoint.CHAT, {"metadata": {"a": ["b"]}}),
    (Endpoint.CHAT, {"logit_bias": {"5": "1"}}),
    (Endpoint.CHAT, {"functions": []}),
    (Endpoint.CHAT, {"tools": [{"function": {"name": "f"}}]}),
    (Endpoint.CHAT, {"tools": [{"type": "function", "function": {"name": "f", "parameters": True}}]}),
    (Endpoint.CHAT, {"verbosity": "loud"}),
    (Endpoint.CHAT, {"return_hidden_states": False}),
    (Endpoint.CHAT, {"cache_salt": None, "rid": None}),
    (Endpoint.COMPLETIONS, {"cache_salt": None, "rid": None}),
    (Endpoint.CHAT, {"temprature": 0.5}),
    (Endpoint.COMPLETIONS, {"logprobs": True}),
]
VALUES: list[Any] = [
    None, True, False, 0, 1, 2, -1, 4.0, 0.0, 0.7, 2.5, -0.5, 1e20, 10**30, 10**400, 129, "", "4", " 4 ", "4.0", "0", "1", "0.7", "true",
    "false", "Yes", "off", "maybe", "none", "auto", "low", "text", "x", [], {}, [1], ["x"], ["1", 2],
    ["a", "b", "c", "d", "e"], [[1], [2, 3]],
    ["a", "b"], [None], [[]], {"x": 1}, {"5": "1"}, {"5": 101}, {"a": ["b"]}, {"type": "text"}, {"type": "json_object"},
    {"type": "json_schema"},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}, {"type": "json_schema", "schema": {"type": "object"}},
    {"type": "json_schema", "schema": 5}, {"type": "json_schema", "schema": {"properties": None}},
    {"type": "json_schema", "schema": {"properties": {"strict": True}}}, {"type": "json_schema", "schema": {"properties": ["strict"]}},
    {"effort": "low"}, {"effort": 10**400}, {"effort": 0.5}, {"enabled": "yes"}, {"effort": []}, {"include_usage": "true"},
    {"include_usage": 1},
    {"include_usage": None}, {"include_usage": "maybe"}, {"include_usage": True, "continuous_usage_stats": "on"},
    [{"type": "function", "function": {"name": "f"}}], [{"function": {"name": "f", "parameters": True}}], [{"type": "custom"}], [5],
    [{"role": "user", "content": "x"}], [{"role": "USER", "content": "x"}], [{"role": "user"}], [{"role": "tool", "content": None}],
    [{"role": "system", "content": "x", "tools": 5}], {"type": "function", "function": {"name": "f"}}, {"type": "allowed_tools"},
    [{"type": "message", "role": "user", "content": [{"type": "input_image"}]}], [{"id": "x", "content": 5}],
]  # fmt: skip


def answers(folder: Path, bodies: list[tuple[Endpoint, str]]) -> list[dict[str, Any]]:
    asked, answered = folder / "asked", folder / "answered"
    asked.write_text("\n".join(json.dumps([endpoint.value, text]) for endpoint, text in bodies), encoding="utf-8")
    done = run(f"import sys; sys.argv = ['', {str(asked)!r}, {str(answered)!r}]\n{PROGRAM}", folder)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(answered.read_text())
    return found


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What each of the engine's models calls its parameters."""
    done = run(f"import sys; sys.argv = ['', 'names']\n{PROGRAM}", tmp_path_factory.mktemp("names"))
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def generated(names: dict[str, list[str]]) -> list[tuple[Endpoint, str]]:
    chance = random.Random(23)
    bodies: list[tuple[Endpoint, str]] = []
    for endpoint, valid in VALID.items():
        ours = set(calls.SPECS[endpoint].request.__struct_fields__)
        # Every parameter with every value, and then several at once.
        for name in sorted(ours | set(names[endpoint.value]) | {"reasoning", "never_heard_of"}):
            bodies += [(endpoint, json.dumps({**valid, name: value})) for value in VALUES]
        known = sorted(ours | set(names[endpoint.value]))
        for _ in range(COUNT // len(VALID)):
            more = {chance.choice(known): chance.choice(VALUES) for _ in range(chance.randint(2, 4))}
            bodies.append((endpoint, json.dumps({**valid, **more})))
    return bodies


def passes(call: Call) -> None:
    """The backend's part of the way to the engine."""
    translate.refuse_internal(call)
    breaking.refuse(call)


def allowed_to_differ(endpoint: Endpoint, sent: dict[str, Any], param: str | None) -> bool:
    """The refusals of ours that docs/compatibility.md names, with their reasons."""
    return (
        (param in INTERNAL_FIELDS)
        or param == "model"  # which is optional to the engine, and /v1/rerank does not look at it
        or (param in ("functions", "function_call") and endpoint is Endpoint.CHAT)
        or param in ("n", *BOUNDS.get(endpoint, ()))  # whose range is checked below
        or (param == "items" and endpoint is Endpoint.SCORE)  # refused by the engine where it looks
        or param == "prompt"
    )


@pytest.mark.slow
def test_whatever_the_engine_takes_we_take_and_understand_alike(tmp_path: Path, names: dict[str, list[str]]) -> None:
    bodies = generated(names)
    refused, different, broken = [], [], []
    for (endpoint, text), answer in zip(bodies, answers(tmp_path, bodies), strict=True):
        sent = json.loads(text)
        try:
            call = calls.parse(endpoint, text.encode())
            passes(call)
        except InvalidRequest as error:
            if "taken" in answer and not allowed_to_differ(endpoint, sent, error.param):
                refused.append((endpoint.value, text[:200], error.message))
            continue
        if "broken" in answer:
            broken.append((endpoint.value, text[:200], answer["broken"]))
        elif answer.get("taken"):
            ours = {"stream": call.stream, "choices": call.choices, "bound": calls.bound(call), "usage": call.show_usage}
            if ours != answer["taken"]:
                different.append((endpoint.value, text[:200], ours, answer["taken"]))
    assert not refused, refused[:20]
    assert not different, different[:20]
    assert not broken, broken[:20]


@pytest.mark.parametrize(("endpoint", "sent"), KNOWN)
def test_what_clients_were_refused_for_passes(endpoint: Endpoint, sent: dict[str, Any]) -> None:
    passes(calls.parse(endpoint, json.dumps({**VALID[endpoint], **sent}).encode()))


# A bound that leaves all parameters free that bound an answer.
SHORT = {"regex": "[a-z]{3}"}


@pytest.mark.parametrize(("endpoint", "sent"), KNOWN)
def test_what_bare_sglang_answers_it_answers_through_us(served: Gateway, endpoint: Endpoint, sent: dict[str, Any]) -> None:
    body = {**VALID[endpoint], **SHORT, "model": "deepseek-v3-tiny", **sent}
    bare, through = (raw.call(port, "POST", endpoint.value, body) for port in (bare_port(served), served.port))
    assert bare.status == 200, bare.body
    assert through.status == 200, through.body
    assert set(through.json()) == set(bare.json())
    warned = through.headers.get("x-penstock-warning")
    assert warned == ("unknown parameter 'temprature', did you mean 'temperature'?" if "temprature" in sent else None)


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES, Endpoint.MESSAGES])
def test_null_is_absent_for_every_parameter_of_the_engine(served: Gateway, names: dict[str, list[str]], endpoint: Endpoint) -> None:
    """Of SGLang 0.5.23's own models, all at once; by itself it refuses many of them."""
    short = {Endpoint.RESPONSES: {"max_output_tokens": 3}, Endpoint.MESSAGES: {}}.get(endpoint, SHORT)
    body = {**VALID[endpoint], **short, "model": "deepseek-v3-tiny"}
    nulls = {name: None for name in names[endpoint.value] if name not in body}
    assert len(nulls) > 10
    answer = raw.call(served.port, "POST", endpoint.value, {**body, **nulls})
    assert answer.status == 200, answer.body


def bare_port(running: Gateway) -> int:
    return int(engine_url(running).rsplit(":", 1)[1])


def test_no_parameter_of_the_engines_is_taken_for_a_slip(names: dict[str, list[str]]) -> None:
    for endpoint in VALID:
        known = set(calls.SPECS[endpoint].request.__struct_fields__)
        found = {name: Names(known).near(name) for name in names[endpoint.value] if name not in known}
        assert not {name: near for name, near in found.items() if near}, endpoint
