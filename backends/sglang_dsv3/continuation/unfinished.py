"""The rest of a JSON object that broke off: a grammar of everything that may follow its beginning, as xgrammar's EBNF.

SGLang's grammars begin with the first token that is generated, whatever the prompt ends in; so the rest gets a grammar of its own.
"""

from __future__ import annotations

import re

# White space is bounded: any amount of it would be right, and a model that finds no end would write it.
_JSON = r"""
ws ::= [ \n\t\r]{0,16}
value ::= object | array | string | number | "true" | "false" | "null"
object ::= "{" ws (pair (ws "," ws pair)*)? ws "}"
pair ::= string ws ":" ws value
array ::= "[" ws (value (ws "," ws value)*)? ws "]"
string ::= "\"" char* "\""
char ::= [^\"\\\x00-\x1f] | "\\" escape
escape ::= [\"\\/bfnrt] | "u" hex hex hex hex
hex ::= [0-9a-fA-F]
number ::= "-"? int frac? exp?
int ::= "0" | [1-9] [0-9]*
frac ::= "." [0-9]+
exp ::= [eE] [+\-]? [0-9]+
"""
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*')
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{0,3}))?\Z")
_NUMBER = re.compile(r"-?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?(?:(?<=[0-9])[eE][+-]?[0-9]*)?)?")
_WORDS = ("true", "false", "null")
_SPACE = re.compile(r"[ \t\r\n]*")

# What may follow in a container, by where its text has got to.
_FIRST = {"{": 'ws (pair (ws "," ws pair)*)? ws "}"', "[": 'ws (value (ws "," ws value)*)? ws "]"'}
_NEXT = {"{": '(ws "," ws pair)* ws "}"', "[": '(ws "," ws value)* ws "]"'}
_AFTER_COMMA = {"{": "ws pair", "[": "ws value"}


class _BrokenOffError(Exception):
    """The text ends here; what the token it ends in lacks."""


class NotJSONError(ValueError):
    """No JSON object begins like this."""


def rest(text: str) -> str:
    """The grammar of what may follow; empty where nothing may. Raises NotJSONError."""
    lacks, open_containers = _read(text)
    if lacks is None:
        return ""
    parts = [lacks, *(_NEXT[container] for container in reversed(open_containers))]
    return "root ::= " + " ".join(part for part in parts if part) + _JSON


def _read(text: str) -> tuple[str | None, list[str]]:
    """What the innermost construct lacks before its container goes on, and the containers that are open; None for a whole object."""
    at, stack = _space(text, 0), list[str]()
    if at == len(text):
        return "ws object", stack
    if text[at] != "{":
        raise NotJSONError
    # What comes next: `first` thing of a container or its end, a `key`, a `colon`, a `value`, a comma or the end (`next`).
    state = "value"
    while True:
        at = _space(text, at)
        if at == len(text):
            return _lacking(state, stack)
        char = text[at]
        if state == "next" and not stack:
            raise NotJSONError
        if state in ("first", "next") and char in "}]":
            if stack.pop() + char not in ("{}", "[]"):
                raise NotJSONError
            at, state = at + 1, "next"
            if not stack and not text[at:].strip(" \t\r\n"):
                return None, stack
        elif state == "next":
            if char != ",":
                raise NotJSONError
            at, state = at + 1, "key" if stack[-1] == "{" else "value"
            if not text[at:].strip(" \t\r\n"):
                return _AFTER_COMMA[stack[-1]], stack
        elif state == "colon":
            if char != ":":
                raise NotJSONError
            at, state = at + 1, "value"
        elif state == "key" or (state == "first" and stack[-1] == "{"):
            if char != '"':
                raise NotJSONError
            try:
                at = _string(text, at)
            except _BrokenOffError as error:
                return f'{error} ws ":" ws value', stack
            state = "colon"
        elif char in "{[":
            stack.append(char)
            at, state = at + 1, "first"
        else:
            try:
                at = _scalar(text, at)
            except _BrokenOffError as error:
                return str(error), stack
            state = "next"


def _lacking(state: str, stack: list[str]) -> tuple[str, list[str]]:
    if state == "first":
        return _FIRST[stack.pop()], stack
    return {"next": "", "colon": 'ws ":" ws value', "value": "ws value", "key": "ws pair"}[state], stack


def _space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _string(text: str, at: int) -> int:
    found = _STRING.match(text, at)
    assert found is not None
    end = found.end()
    if end < len(text) and text[end] == '"':
        return end + 1
    if end == len(text):
        raise _BrokenOffError(r'char* "\""')
    escape = _ESCAPE.match(text, end)
    if escape is None:
        raise NotJSONError
    begun = "escape" if escape[1] is None else " ".join(["hex"] * (4 - len(escape[1])))
    raise _BrokenOffError(rf'{begun} char* "\""')


def _scalar(text: str, at: int) -> int:
    if text[at] == '"':
        return _string(text, at)
    for word in _WORDS:
        if text.startswith(word, at):
            return at + len(word)
        if word.startswith(text[at:]):
            raise _BrokenOffError(f'"{word[len(text) - at :]}"')
    found = _NUMBER.match(text, at)
    if found is None or not found[0]:
        raise NotJSONError
    if found.end() == len(text):
        raise _BrokenOffError(_number(found[0]))
    if not found[0][-1].isdigit():
        raise NotJSONError
    return found.end()


def _number(begun: str) -> str:
    """What a number may go on with; nothing at all, where it could end here."""
    before, exponent, digits = begun.lower().partition("e")
    if exponent:
        return "[0-9]*" if digits[-1:].isdigit() else "[0-9]+" if digits else r"[+\-]? [0-9]+"
    whole, point, _ = before.partition(".")
    if point:
        return "[0-9]* exp?" if before[-1].isdigit() else "[0-9]+ exp?"
    if whole == "-":
        return "int frac? exp?"
    return "frac? exp?" if whole in ("0", "-0") else "[0-9]* frac? exp?"
