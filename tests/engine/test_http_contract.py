"""SGLang's HTTP interface, as far as we rely on it, against the sources of the installed package."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from backends.sglang_dsv3 import shapes
from backends.sglang_dsv3.engine import environment_folder
from tests.engine import http_contract
from tests.support.processes import ROOT


@cache
def tree(file: str) -> ast.Module:
    package = next(environment_folder(ROOT).glob("lib/python3*/site-packages/sglang"))
    return ast.parse((package / file).read_text(encoding="utf-8"))


def strings(file: str) -> set[str]:
    return {node.value for node in ast.walk(tree(file)) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def fields(file: str, name: str) -> set[str]:
    """Annotated members, parameters of `__init__`, and those of bases in the same file."""
    owners = {node.name: node for node in tree(file).body if isinstance(node, ast.ClassDef)}
    owner = owners[name]
    found = {part.target.id for part in owner.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)}
    for part in owner.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            found |= {each.arg for each in (*part.args.args, *part.args.kwonlyargs)}
    for base in owner.bases:
        if isinstance(base, ast.Name) and base.id in owners:
            found |= fields(file, base.id)
    return found


def moved() -> list[str]:
    """What is not where it was, one line each."""
    lines = [f"{file}: no route {route}" for file, routes in http_contract.ROUTES.items() for route in routes if not _declared(file, route)]
    for (file, name), wanted in http_contract.FIELDS.items():
        try:
            there = fields(file, name)
        except KeyError:
            lines.append(f"{file}: no class {name}")
            continue
        lines += [f"{file}: {name} has no {each}" for each in wanted if each not in there]
    for file, words in http_contract.WORDS.items():
        lines += [f"{file}: does not say {each!r}" for each in sorted(set(words) - strings(file))]
    return lines


def _declared(file: str, route: str) -> bool:
    decorators = [
        each for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for each in node.decorator_list
    ]
    return any(isinstance(each, ast.Constant) and each.value == route for one in decorators for each in ast.walk(one))


def test_every_field_and_word_is_where_it_was() -> None:
    assert moved() == []


def test_what_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    file = "srt/entrypoints/openai/protocol.py"
    monkeypatch.setitem(http_contract.FIELDS, (file, "UsageInfo"), ["prompt_tokens", "prompt_tokenz"])
    monkeypatch.setitem(http_contract.FIELDS, (file, "UsageInformation"), ["prompt_tokens"])
    monkeypatch.setitem(http_contract.ROUTES, "srt/entrypoints/v1_loads.py", ["/v1/load"])
    assert moved() == [
        "srt/entrypoints/v1_loads.py: no route /v1/load",
        f"{file}: UsageInfo has no prompt_tokenz",
        f"{file}: no class UsageInformation",
    ]


def test_a_parameter_that_is_refused_as_internal_is_one() -> None:
    sources = [Path(file) for file in ("srt/entrypoints/openai/protocol.py", "srt/managers/io_struct.py")]
    there = {
        node.target.id
        for file in sources
        for node in ast.walk(tree(str(file)))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert sorted(set(http_contract.INTERNAL) - there) == []


@pytest.mark.parametrize(
    ("struct", "where"),
    [
        (shapes.Load, ["LoadSnapshot"]),
        (shapes.PromptDetails, ["PromptTokensDetails"]),
        (shapes.CompletionDetails, ["CompletionTokensDetails"]),
        (shapes.Delta, ["DeltaMessage"]),
        (shapes.Choice, ["ChatCompletionResponseStreamChoice", "CompletionResponseStreamChoice"]),
        (shapes.Chunk, ["ChatCompletionStreamResponse"]),
        (shapes.Tokens, ["TokenizeResponse"]),
    ],
)
def test_what_is_decoded_is_in_the_list(struct: type, where: list[str]) -> None:
    listed = {each for (_, name), wanted in http_contract.FIELDS.items() if name in where for each in wanted}
    assert set(struct.__struct_fields__) <= listed  # type: ignore[attr-defined]
    words = {word for each in http_contract.WORDS.values() for word in each}
    for one in (shapes.ModelInfo, shapes.GenerateEvent, shapes.Meta):
        assert set(one.__struct_fields__) <= words
