"""Whose a response is: the id says it, and nobody can make one that says otherwise of an answer that exists."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import InvalidRequest, NoSuchResponse
from gateway.plugin import Call, Endpoint
from gateway.serving import calls

NAMES = st.text(max_size=20)


def asked(**more: object) -> Call:
    return calls.parse(Endpoint.RESPONSES, json.dumps({"model": "m", "input": "x", **more}).encode())


@given(owner=NAMES, other=NAMES)
def test_an_id_is_its_owners_alone(owner: str, other: str) -> None:
    made = calls.owned(asked(), owner).id
    assert calls.is_owned(made, owner)
    assert calls.is_owned(made, other) is (owner == other)
    assert calls.owned(asked(previous_response_id=made), owner).fields["previous_response_id"]
    if owner != other:
        with pytest.raises(NoSuchResponse):
            calls.owned(asked(previous_response_id=made), other)


def test_what_random_part_and_name_are_run_together_is_told_apart() -> None:
    """No two pairs of id and owner are marked by the same words."""
    made = calls.owned(asked(), "b of a").id
    assert not calls.is_owned(made, "a")
    assert len({calls.owned(asked(), "a").id for _ in range(100)}) == 100


@pytest.mark.parametrize(
    "id",
    [
        "",
        "resp_",
        "resp_1",
        "resp_" + "0" * 32,
        "resp_" + "0" * 48,
        "resp_" + "0" * 48 + "\n",
        "resp_../../x",
        "msg_" + "0" * 48,
        "R" * 9999,
    ],
)
def test_what_is_no_id_of_ours_belongs_to_nobody(id: str) -> None:
    assert not calls.is_owned(id, "")
    with pytest.raises(InvalidRequest) as refused:
        calls.owned(asked(previous_response_id=id), "")
    assert refused.value.param == "previous_response_id"
    assert len(refused.value.message) < 500


@pytest.mark.parametrize("value", [5, [], {"id": "x"}, True])
def test_what_is_no_text_is_said_to_be_none(value: object) -> None:
    with pytest.raises(InvalidRequest, match="Invalid type for 'previous_response_id': expected string"):
        calls.owned(asked(previous_response_id=value), "")
