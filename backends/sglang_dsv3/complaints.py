"""What an engine's validation found wrong with a request, out of its dumps: which parameter, and why.

Pydantic complains once for every branch of every union, in terms of the engine's own classes. Of these the one that the client meant is
told, by the discriminator (`role`, `type`) that fits it; else those that go deepest.
"""

from __future__ import annotations

import re
from typing import Final

Step = str | int
Place = tuple[Step, ...]
# Kind, place and reason of one complaint.
Complaint = tuple[str, Place, str]

_TEXT = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
# As FastAPI prints them: "2 validation errors:\n  {'type': 'missing', 'loc': ('body', 'messages', 0, 'role'), 'msg': 'Field required', ..."
_DUMPED = re.compile(rf"\{{'type': '(\w+)', 'loc': [(\[](.{{0,1500}}?)[)\]], 'msg': ({_TEXT})")
_DUMPED_STEP = re.compile(rf"({_TEXT})|(\d+)")
# As pydantic does: "1 validation error for ChatCompletionRequest\nmessages.0.role\n  Input should be ... [type=literal_error, ...".
_PRINTED = re.compile(r"validation errors? for \w+\n")
_PRINTED_ONE = re.compile(r"^(\S.*)\n  (.+?)(?: \[type=(\w+)|$)", re.MULTILINE)
# As SGLang's /v1/messages does: "messages.0.content: Field required; tools.0.custom.name: Field required".
_LISTED = re.compile(r"(?:^|; )([a-z_]+(?:\.[^:;]+)?): ((?:Field required|Input |Value error, |Extra inputs)[^;]*)")
# Steps are separated by dots, but not within a class's brackets.
_DOTTED_STEP = re.compile(r"(?:[^.\[(]|\[(?:[^\[\]]|\[[^\]]*\])*\]|\([^)]*\))+")
# Steps that are the engine's own: classes, validators, branches of a union.
_INNER = re.compile(r"[^a-z0-9_]|^(?:str|int|float|bool|dict|list)$")
# Branches without a discriminator.
_PLAIN = re.compile(r"(?:str|int|float|bool|dict|list|literal|constrained|none)\b")
_DISCRIMINATORS: Final = ("role", "type")
_MISMATCHES: Final = ("literal_error", "value_error", "enum")
_WORDS: Final = {
    "Input should be a valid dictionary or object to extract fields from": "Input should be an object",
    "Input should be a valid list": "Input should be an array",
    "Input should be a valid dictionary": "Input should be an object",
}
# So many reasons of one place are told, and so much of a dump is read: SGLang's hold everything twice.
_MOST: Final = 6
_MOST_TEXT: Final = 32 << 10


def explained(message: str) -> tuple[str, str] | None:
    """The parameter (empty for the whole request) and what is wrong with it; None where the message is no such dump."""
    found = _meant(list(dict.fromkeys(_complaints(message[:_MOST_TEXT]))))
    if not found:
        return None
    named = [(named_place(place), reason) for _, place, reason in found]
    deepest = max((name for name, _ in named), key=lambda name: name.count(".") + name.count("["))
    reasons = dict.fromkeys(_in_words(reason) for name, reason in named if name == deepest)
    return deepest, ", or ".join(list(reasons)[:_MOST])


def named_place(place: Place) -> str:
    """A place as OpenAI writes it: `messages[0].role`."""
    name = ""
    for step in place:
        if isinstance(step, int):
            name += f"[{step}]" if name else ""
        elif step != "body" and not _inner(step):
            name += f".{step}" if name else step
    return name


def _complaints(message: str) -> list[Complaint]:
    if "'loc': " in message:
        return [
            (kind, tuple(_step(text, number) for text, number in _DUMPED_STEP.findall(place)), reason[1:-1].replace("\\'", "'"))
            for kind, place, reason in _DUMPED.findall(message)
        ]
    printed = _PRINTED.search(message)
    if printed is not None:
        return [(kind, _dotted(place), reason) for place, reason, kind in _PRINTED_ONE.findall(message[printed.end() :])]
    return [("", _dotted(place), reason) for place, reason in _LISTED.findall(message)]


def _step(text: str, number: str) -> Step:
    return int(number) if number else text[1:-1]


def _dotted(place: str) -> Place:
    return tuple(int(step) if step.isdigit() else step for step in _DOTTED_STEP.findall(place[:1500]))


def _meant(complaints: list[Complaint]) -> list[Complaint]:
    """Without those about branches of unions that the client did not mean: their discriminator does not fit, and another's does. Where
    nobody's fits it is the discriminator that is wrong."""
    told = {each for each in complaints if each[0] in _MISMATCHES and len(each[1]) > 1 and _names_a_branch(each[1])}
    unfit = {place[:-1] for _, place, _ in told}
    # A union whose branches are all unfit is an unfit branch itself, where it is one.
    grown = True
    while grown:
        unions = {branch[:-1] for branch in unfit if len(branch) > 1 and _inner(branch[-2]) and _siblings(branch, complaints) <= unfit}
        grown = not unions <= unfit
        unfit |= unions
    left = complaints
    for branch in unfit:
        nobody_fits = _siblings(branch, complaints) <= unfit
        left = [each for each in left if each[1][: len(branch)] != branch or (nobody_fits and each in told)]
    return left


def _siblings(branch: Place, complaints: list[Complaint]) -> set[Place]:
    """All branches of the union that this is one of which have a discriminator, as far as anybody complained."""
    union, length = branch[:-1], len(branch)
    of_it = {place[:length] for _, place, _ in complaints if place[: length - 1] == union and len(place) >= length}
    return {each for each in of_it if not _PLAIN.match(str(each[-1]))}


def _names_a_branch(place: Place) -> bool:
    return place[-1] in _DISCRIMINATORS and _inner(place[-2])


def _inner(step: Step) -> bool:
    return isinstance(step, str) and _INNER.search(step) is not None


def _in_words(reason: str) -> str:
    reason = reason.removeprefix("Value error, ").rstrip(".")
    return _WORDS.get(reason, reason)
