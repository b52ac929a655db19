"""What clients read of an engine's errors: the parameter that is wrong and why, and nothing of the engine's inside.

`data/errors/sglang-0.5.23.json` holds answers of SGLang's own request models behind its own error handler.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from backends.sglang_dsv3 import complaints, failures
from backends.sglang_dsv3.cleaning import Cleaned, without_keys
from gateway.errors import InvalidRequest
from gateway.plugin import Call, Endpoint, Verdict
from gateway.wire import body
from tests.support.processes import ROOT

RECORDED: dict[str, Any] = {each["case"]: each for each in json.loads((ROOT / "tests/data/errors/sglang-0.5.23.json").read_text())}
# What the parameter is that a client must mend, and a word of what it is told.
MEANT = {
    "messages no content": ("messages[0].content", "Missing required parameter"),
    "messages bad role": ("messages[0].role", "'user', 'assistant' or 'system'"),
    "messages bad block": ("messages[0].content[0]", "'magic'"),
    "messages no max_tokens": ("max_tokens", "Missing required parameter"),
    "messages tools": ("tools[0].custom.name", "Missing required parameter"),
    "messages system": ("system", "a valid string, or Input should be an array"),
    "prompt list of both": ("prompt[0]", "a valid integer"),
    "no content": ("messages[0].content", "Missing required parameter"),
    "null content": ("messages[0].content", "a valid string, or Input should be an array"),
    "no role": ("messages[0].role", "Missing required parameter"),
    "bad role": ("messages[0].role", "must be one of 'system', 'assistant'"),
    "content number": ("messages[0].content", "a valid string, or Input should be an array"),
    "bad part": ("messages[0].content[0].type", "Input should be 'text', or Input should be"),
    "part no text": ("messages[0].content[0].text", "Missing required parameter"),
    "no messages": ("messages", "Missing required parameter"),
    "temperature word": ("temperature", "a valid number"),
    "max_tokens frac": ("max_tokens", "a fractional part"),
    "n null": ("n", "a valid integer"),
    "tools noname": ("tools[0].function.name", "Missing required parameter"),
    "tool_choice word": ("tool_choice", "'auto', 'required' or 'none'"),
    "response_format": ("response_format.type", "'text', 'json_object' or 'json_schema'"),
    "stop list": ("stop[1]", "a valid string"),
    "logit_bias": ("logit_bias.a", "a valid number"),
    "stream_options": ("stream_options.include_usage", "a valid boolean"),
    "reasoning_effort": ("reasoning_effort", "'none', 'minimal', 'low'"),
    "tool call args": ("messages[0].tool_calls[0].function.name", "a valid string"),
    "message string": ("messages[0]", "an object"),
    "prompt missing": ("prompt", "Missing required parameter"),
    "responses none": ("input", "Missing required parameter"),
    "responses tools": ("tools[0].type", "'function', 'web_search'"),
}


def asked(endpoint: Endpoint = Endpoint.CHAT, **fields: Any) -> Call:
    return Call(endpoint, "chatcmpl-1", "m", {name: body.encode(value) for name, value in {"model": "m", "messages": [], **fields}.items()})


def told(message: str, call: Call | None = None, status: int = 400) -> InvalidRequest:
    answer = {"object": "error", "message": message, "type": "BadRequestError", "param": None, "code": status}
    failure = failures.failure(status, json.dumps(answer).encode(), call or asked())
    assert failure.verdict is Verdict.CLIENT_FAULT
    assert isinstance(failure.error, InvalidRequest)
    return failure.error


def test_every_recorded_error_is_tried() -> None:
    assert set(RECORDED) == set(MEANT)


@pytest.mark.parametrize("case", MEANT)
def test_a_validation_dump_becomes_the_parameter_that_is_wrong(case: str) -> None:
    recorded = RECORDED[case]
    call = Call(Endpoint(recorded["path"]), "id", "m", {name: body.encode(value) for name, value in recorded["body"].items()})
    failure = failures.failure(400, json.dumps(recorded["answer"]).encode(), call)
    param, words = MEANT[case]
    assert failure.error.param == param
    assert words in failure.error.message
    assert failure.error.detail is None, "a dump quotes the prompt"
    for inside in ("ChatCompletionMessage", "function-after", "list[", "http_server", "sgl-workspace", "'input':", "body", "union", "["):
        assert inside not in failure.error.message.replace(f"'{param}'", ""), inside


CONTENT = "messages[0].content"
PRINTED = """3 validation errors for ChatCompletionRequest
messages.0.ChatCompletionMessageGenericParam.role
  Input should be 'system', 'assistant' or 'tool' [type=literal_error, input_value='user', input_type=str]
    For further information visit https://errors.pydantic.dev/2.10/v/literal_error
messages.0.ChatCompletionMessageUserParam.content.str
  Input should be a valid string [type=string_type, input_value=5, input_type=int]
    For further information visit https://errors.pydantic.dev/2.10/v/string_type
messages.0.ChatCompletionMessageUserParam.content.list[union[Text,Image]]
  Input should be a valid list [type=list_type, input_value=5, input_type=int]
    For further information visit https://errors.pydantic.dev/2.10/v/list_type"""
VLLM_DUMP = (
    "[{'type': 'value_error', 'loc': ('body',), 'msg': 'Value error, When using `tool_choice`, `tools` must be set.', 'input': "
    "{'messages': [{'role': 'user', 'content': 'a secret'}], 'tools': None, 'tool_choice': 'auto'}, 'ctx': {'error': "
    "ValueError('When using `tool_choice`, `tools` must be set.')}}]"
)
FASTAPI_DETAIL = "[{'type': 'missing', 'loc': ['body', 'messages', 0, 'content'], 'msg': 'Field required', 'input': {'role': 'user'}}]"


@pytest.mark.parametrize(
    ("dump", "param", "message"),
    [
        (
            PRINTED,
            "messages[0].content",
            "Invalid value for 'messages[0].content': Input should be a valid string, or Input should be an array.",
        ),
        (VLLM_DUMP, "tool_choice", "When using `tool_choice`, `tools` must be set."),
        (FASTAPI_DETAIL, CONTENT, f"Missing required parameter: '{CONTENT}'."),
    ],
    ids=["as pydantic prints it", "vLLM's", "FastAPI's"],
)
def test_other_dumps_are_read_too(dump: str, param: str, message: str) -> None:
    error = told(dump, asked(tool_choice="auto"))
    assert (error.param, error.message) == (param, message)


def test_the_union_whose_discriminator_fits_is_the_one_that_was_meant() -> None:
    """A dictionary where a word or an object may stand: both complain, and neither is dropped for the other."""
    dump = (
        "[{'type': 'literal_error', 'loc': ('body', 'tool_choice', \"literal['auto','none']\"), 'msg': \"Input should be 'auto'\"},"
        " {'type': 'literal_error', 'loc': ('body', 'tool_choice', 'ToolChoice', 'type'), 'msg': \"Input should be 'function'\"},"
        " {'type': 'missing', 'loc': ('body', 'tool_choice', 'ToolChoice', 'function'), 'msg': 'Field required'}]"
    )
    assert complaints.explained(dump) == ("tool_choice.type", "Input should be 'function'")


# Texts of SGLang 0.5.23 and vLLM 0.6 to 0.15 that a client needs as they are, and the parameter they speak of.
KEPT: list[tuple[str, str | None]] = [
    ("temperature must be a non-negative finite number, got -1.", "temperature"),
    ("top_p must be in (0, 1], got 1.5.", "top_p"),
    ("top_k must be -1 (disable) or at least 1, got -2.", "top_k"),
    ("frequency_penalty must be in [-2, 2], got 3.0.", "frequency_penalty"),
    ("logit_bias must has keys in [0, 129279], got 999999.", "logit_bias"),
    ("at most 16 stop strings are allowed, got 17", "stop"),
    ("Only one of json_schema, regex, ebnf, or structural_tag can be set.", "json_schema"),
    ("token_ids_logprob contains out-of-vocabulary token id 900000; valid range is [0, 129280).", None),
    ("Tool 'get_weather' is not declared in tools", None),
    ("image input is not supported for this model", None),
    ("Assistant tool call function.arguments must be valid JSON.", None),
    ("max_tokens must be at least 1, got -186.", "max_tokens"),
    ('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set', None),
    ("Failed to compile json_schema grammar: Cannot find field a.b in #/properties/a/properties/b/items", "response_format"),
    ("max_tokens:4096 exceeds what is left: tokens:2048", "max_tokens"),
    ("use /v1/completions for a base model", None),
    ("The media type image/png or text/plain is expected, either/or", None),
    ("response_format.json_schema.schema is required for json_schema response format request.", "response_format"),
    ("Unterminated string starting at: line 1 column 9 (char 8)", None),
    ("The model `deepseek-ai/DeepSeek-V3.1-Base` does not do that.", None),
    ("got 3.14159 where 1.5 or 2.75 may stand, e.g. a list, i.e. [1, 2, 3]", None),
]


@pytest.mark.parametrize(("text", "param"), KEPT)
def test_what_a_client_needs_stays_as_it_is(text: str, param: str | None) -> None:
    names = ["temperature", "top_p", "top_k", "frequency_penalty", "logit_bias", "stop", "json_schema", "max_tokens", "response_format"]
    fields: dict[str, Any] = dict.fromkeys(names, 1)
    error = told(text, asked(**fields))
    assert (error.message, error.param, error.detail) == (text, param, None)


@pytest.mark.parametrize(
    ("text", "fields", "told_as"),
    [
        ("max_new_tokens must be at least 0, got -1.", {"max_tokens": -1}, ("max_tokens must be at least 0, got -1.", "max_tokens")),
        ("max_new_tokens must be at least 0, got -1.", {"max_completion_tokens": -1},
         ("max_completion_tokens must be at least 0, got -1.", "max_completion_tokens")),
        ("sampling_seed must be an integer, got str.", {"seed": "x"}, ("seed must be an integer, got str.", "seed")),
        ("min_new_tokens must be in [0, max_new_tokens(5)], got 9.", {"min_tokens": 9, "max_tokens": 5},
         ("min_tokens must be in [0, max_tokens(5)], got 9.", "min_tokens")),
    ],
)  # fmt: skip
def test_parameters_are_called_what_the_client_calls_them(text: str, fields: dict[str, Any], told_as: tuple[str, str]) -> None:
    error = told(text, asked(**fields))
    assert (error.message, error.param) == told_as


def test_the_engines_own_word_for_the_parameter_is_kept() -> None:
    answer = {"error": {"message": "Shell tools are not supported by this model", "type": "invalid_request_error", "param": "tools"}}
    error = failures.failure(400, json.dumps(answer).encode(), asked(Endpoint.RESPONSES)).error
    assert (error.param, error.message) == ("tools", "Shell tools are not supported by this model")


TRACEBACK = """Traceback (most recent call last):
  File "/sgl/srt/x.py", line 1, in f
    raise ValueError(x)
ValueError: temperature must be positive
"""
# Texts with what is none of a client's business: what is left, what must not be told, and what the log is told.
CLEANED: list[tuple[str, str, list[str]]] = [
    ("upstream 10.1.2.3:30001 refused: Invalid parameter", "upstream [removed] refused: Invalid parameter", ["10.1.2.3:30001"]),
    ("Cannot reach worker sglang-3.prod.svc.cluster.local:30000 to score", "Cannot reach worker [removed] to score", ["sglang-3.prod"]),
    ("connect to [fd00::12]:30001 failed for the prefill server", "connect to [removed] failed for the prefill server", ["fd00::12"]),
    ("node1:30000 is down, sorry about that", "[removed] is down, sorry about that", ["node1:30000"]),
    ("the host gpu7.dc1.example.com is full today", "the host [removed] is full today", ["gpu7.dc1.example.com"]),
    ("ask minio.internal for the file instead", "ask [removed] for the file instead", ["minio.internal"]),
    ("Failed to fetch http://minio:9000/x.png?X-Amz-Signature=abc again", "Failed to fetch [removed] again", ["X-Amz-Signature"]),
    ("Invalid key sk-abc123DEF was given to the engine", "Invalid key [removed] was given to the engine", []),
    ("Authorization: Bearer abcdef123 is not what is expected", "[removed] is not what is expected", []),
    ("bad token in /home/ann/.cache/huggingface/hub/tokenizer.json found", "bad token in [removed] found", ["/home/ann"]),
    ("sglang/srt/managers/io_struct.py:123 says that it is wrong", "[removed] says that it is wrong", ["io_struct.py"]),
    ("chat_template.jinja cannot do that for you", "[removed] cannot do that for you", ["chat_template.jinja"]),
    ("request failed (pid=4242), try another one", "request failed ([removed]), try another one", ["pid=4242"]),
    ("scheduler_TP0 did not like this request", "[removed] did not like this request", ["scheduler_TP0"]),
    ("<sglang.srt.io_struct.GenerateReqInput object at 0x7f1234567890> is not valid", "[removed] is not valid", ["GenerateReqInput"]),
    ("sglang.srt.sampling.SamplingParams got an unexpected keyword argument 'foo'", "[removed] got an unexpected keyword argument 'foo'",
     ["SamplingParams"]),
    ('File "/sgl/srt/x.py", line 12, in f: the value is wrong', "[removed]: the value is wrong", ["/sgl/srt/x.py"]),
    (TRACEBACK, "temperature must be positive", ["a traceback"]),
    ("[17:33:11] /project/cpp/json_schema_converter.cc:4175: Unsupported type in the grammar", "Unsupported type in the grammar", []),
    ("All loaded adapters: dict_keys(['/models/lora/a'])", "All loaded adapters: dict_keys(['[removed]'])", ["/models/lora/a"]),
]  # fmt: skip


@pytest.mark.parametrize("status", [400, 409, 413, 415, 422])
@pytest.mark.parametrize(("text", "left", "logged"), CLEANED)
def test_what_is_none_of_a_clients_business_goes_to_the_log(text: str, left: str, logged: list[str], status: int) -> None:
    error = told(text, status=status)
    assert error.message == left
    for piece in logged:
        assert piece not in error.message
        assert piece in (error.detail or "")
    assert not re.search("sk-abc|abcdef123", f"{error.message}{error.detail}"), "a key is not logged either"


@pytest.mark.parametrize("text", ["10.1.2.3:30001", "See https://10.0.0.1/x", "/usr/lib/python3/x.py", "", "sk-abc123DEF"])
def test_where_nothing_is_left_a_sentence_of_ours_stands(text: str) -> None:
    assert told(text).message == "The engine refused this request as invalid."


@pytest.mark.parametrize("status", [401, 403, 404, 408, 429, 500, 503])
def test_other_statuses_tell_nothing_of_the_engines_words_and_no_key_to_anybody(status: int) -> None:
    answer = json.dumps({"error": {"message": "Invalid key sk-abc123DEF at 10.1.2.3:30001, /srv/x/y.py"}}).encode()
    failure = failures.failure(status, answer, asked())
    assert failure.verdict is not Verdict.CLIENT_FAULT
    for secret in ("sk-abc123DEF", "10.1.2.3", "/srv"):
        assert secret not in failure.error.message
    assert "sk-abc123DEF" not in (failure.error.detail or "")
    assert "10.1.2.3" in (failure.error.detail or "")


def test_half_a_surrogate_pair_is_called_that_whatever_the_engine_calls_it() -> None:
    """Its tokenizer raises an error that is none of the client's by its status."""
    for status, text in (
        (500, "Internal server error: TextEncodeInput must be Union[TextInputSequence, Tuple[InputSequence, InputSequence]]"),
        (500, "Internal server error: TextInputSequence must be str"),
        (400, "'utf-8' codec can't encode character '\\ud83d' in position 2: surrogates not allowed"),
    ):
        assert told(text, status=status).message == "The request holds half of a surrogate pair, which is no character."


@pytest.mark.parametrize(
    ("tools", "param", "message"),
    [
        (
            [{"type": "custom", "custom": {"name": "x"}}],
            "tools[0].type",
            "the engine takes tools of type 'function' in a chat, got 'custom'.",
        ),
        ([{"type": "web_search"}], "tools[0].type", "got 'web_search'."),
        ([{"type": "\u001b[2J" + "x" * 999}], "tools[0].type", "... (1003 characters)'."),
        ([{"type": "function"}], "tools[0].function", "Missing required parameter: 'tools[0].function'."),
        ([{"name": "x"}], "tools[0].function", "Missing required parameter: 'tools[0].function'."),
        ([], "tools[0].function", "Missing required parameter: 'tools[0].function'."),
        (5, "tools[0].function", "Missing required parameter: 'tools[0].function'."),
    ],
)
def test_a_tool_that_is_no_function_is_refused_by_its_type(tools: Any, param: str, message: str) -> None:
    """What SGLang says of one is that its function is missing."""
    dump = "1 validation error:\n  {'type': 'missing', 'loc': ('body', 'tools', 0, 'function'), 'msg': 'Field required', 'input': {}}"
    content = json.dumps({"object": "error", "message": dump, "type": "Bad Request", "param": None, "code": 400}).encode()
    refused = failures.failure(400, content, asked(tools=tools)).error
    assert refused.param == param
    assert refused.message.endswith(message)
    assert "\x1b" not in refused.message


def test_a_response_that_this_host_does_not_know_is_nobodys_fault() -> None:
    """Another host may; only where none was named is a 404 an engine without the endpoint."""
    content = (
        b'{"error":{"message":"Response with id \'resp_1\' not found.","type":"invalid_request_error","param":"response_id","code":404}}'
    )
    failed = failures.failure(404, content, asked(Endpoint.RESPONSES, previous_response_id="resp_1"))
    assert (failed.verdict, failed.error.status, failed.error.param) == (Verdict.OK, 404, "previous_response_id")
    for call in (asked(Endpoint.RESPONSES), asked(previous_response_id="resp_1")):
        assert failures.failure(404, content, call).verdict is Verdict.SICK
    unknown = b'{"error":{"message":"The model \'x\' does not exist","code":404}}'
    assert failures.failure(404, unknown, asked(Endpoint.RESPONSES, previous_response_id="resp_1")).verdict is Verdict.SICK


def test_vllms_context_error_is_one_too() -> None:
    error = told(
        "This model's maximum context length is 32768 tokens. However, you requested 41648 tokens (37552 in the messages, 4096 in the "
        "completion). Please reduce the length of the messages or completion. None"
    )
    assert (error.code, error.param) == ("context_length_exceeded", "messages")
    assert error.message.endswith("or completion. (context_length_exceeded)")


NASTY = [
    "a.",
    "[",
    "[[",
    "::",
    "[:",
    "/a",
    "<a ",
    "{'type': 'a', 'loc': (",
    "validation error for X\n",
    "a: Input ",
    "((",
    "sk-",
    "1.",
    "http://",
]


@pytest.mark.parametrize("piece", NASTY)
def test_no_text_takes_long(piece: str) -> None:
    """A pattern that went back and forth over one of these would run into the time limit of tests."""
    text = (piece * (64 << 10))[: 64 << 10]
    complaints.explained(text)
    complaints.explained("1 validation error for X\n" + text)
    Cleaned(text)
    without_keys(text)
