"""Requests on which SGLang's models break with a 500 are refused as the client's fault; what they take or refuse themselves passes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from backends.sglang_dsv3 import breaking
from gateway.errors import InvalidRequest
from gateway.plugin import Endpoint
from gateway.serving import calls


def refuse(**fields: Any) -> None:
    sent = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    breaking.refuse(calls.parse(Endpoint.CHAT, json.dumps(sent).encode()))


def by_its_old_name(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "schema": schema}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": [1]}, "response_format"),
        (by_its_old_name(5), "response_format.schema"),
        (by_its_old_name({"properties": None}), "response_format.schema.properties"),
        (by_its_old_name({"properties": ["strict"]}), "response_format.schema.properties"),
        (by_its_old_name({"properties": {"strict": True}}), "response_format.schema.properties.strict"),
        ({"reasoning": {"effort": 10**400}}, "reasoning.effort"),
        ({"reasoning": {"reasoning_effort": -(10**400)}}, "reasoning.effort"),
    ],
)
def test_what_breaks_the_engine_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        refuse(**fields)
    assert (refused.value.status, refused.value.param) == (400, param)


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {}},
        {"response_format": {"type": "text", "schema": 5}},
        {"response_format": {"type": 5}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}, "schema": 5}},
        by_its_old_name({}),
        by_its_old_name({"type": "object"}),
        by_its_old_name({"properties": {"a": {"type": "string"}, "strict": {"type": "boolean"}}}),
        by_its_old_name({"properties": {"strict": False}}),
        {"reasoning": {"effort": "low", "enabled": True}},
        {"reasoning": {"effort": 10**30}},
        {"reasoning": "low"},
    ],
)
def test_everything_else_is_the_engines_to_judge(fields: dict[str, Any]) -> None:
    refuse(**fields)
