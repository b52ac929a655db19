"""What binds a call to a host, from what clients send anyway.

In this order: a header that names a session (`affinity.headers`), `prompt_cache_key` (OpenAI), `session_id` (OpenRouter) within its `user`,
`previous_response_id`, and else the leading messages, up to the first one of the user. What a client says is scoped by its key, so that
nobody can tell by its speed what another one's session is called. A session's name is a text of at most MAX_BYTES; any other is ignored,
and counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from operator import xor

import msgspec

from gateway.plugin import BOUNDS, Call, Endpoint
from gateway.serving.balance import affinity
from gateway.serving.balance.affinity import PREFIX, UNBOUND, Affinity

MAX_BYTES = 256
# Prompts larger than this are found by their beginning alone: no DeepSeek model has a context that holds them.
MAX_PROMPT_BYTES = 1 << 20
# Of a long message so much from its beginning and its end stands for it, with its length.
_HEAD, _TAIL = 1024, 256
# Of a longer conversation only so many messages are told apart.
_MAX_LINKS = 256
# A prompt that is no list of messages is taken in pieces.
_PIECE = 2048

# What the engine puts before the messages, and what changes how it writes them.
_BEFORE = ("tools", "system", "instructions", "chat_template_kwargs")
_LISTS = {Endpoint.CHAT: "messages", Endpoint.MESSAGES: "messages", Endpoint.RESPONSES: "input", Endpoint.COMPLETIONS: "prompt"}
_SOURCES = ("prompt_cache_key", "session_id", "previous_response_id")
_BRACKET = ord("[")
# Our own id of an answer (`calls.owned`): random digits, its place on the ring, and whose it is.
_OURS = re.compile(rb"resp_[0-9a-f]{16}([0-9a-f]{16})[0-9a-f]{16}")

# Of mypy's: a type with parameters is no callable that `map` takes.
_view: Callable[[msgspec.Raw], memoryview] = memoryview
_messages = msgspec.json.Decoder(list[msgspec.Raw])
_text = msgspec.json.Decoder(str)


class Affinities:
    """Finds what binds a call."""

    def __init__(self, headers: Sequence[str]) -> None:
        # The first of the list counts, wherever it stands in the request.
        self._headers = {name.lower().encode(): number for number, name in enumerate(headers)}

    def of(self, call: Call, headers: Iterable[tuple[bytes, bytes]], key: str, salt: str, balance: str, ignored: list[str]) -> Affinity:
        """What binds it under that policy, for the caller with that key and salt; to `ignored` go the names of what would have bound it,
        if it held a session's name."""
        if call.endpoint not in BOUNDS or (balance != "affinity" and balance != "prefix_affinity"):
            return UNBOUND
        found = Affinity(PREFIX)
        name = _chain(call, salt, found)
        if balance == "affinity":
            session = self._header(headers, ignored)
            if session is not None:
                found.source, name = session[0].decode(), session[1]
            else:
                for source in _SOURCES:
                    if source in call.fields and (value := _session(call, source, ignored)) is not None:
                        found.source, name = source, value
                        break
            if found.source == "previous_response_id" and (ours := _OURS.fullmatch(name)):
                found.point = int(ours[1], 16)
                return found
        found.point = affinity.point(b"%b\0%b" % (key.encode(), name))
        return found

    def _header(self, headers: Iterable[tuple[bytes, bytes]], ignored: list[str]) -> tuple[bytes, bytes] | None:
        wanted = self._headers
        best: tuple[bytes, bytes] | None = None
        for header in headers:
            name, value = header
            if name in wanted and value and (best is None or wanted[name] < wanted[best[0]]):
                if len(value) > MAX_BYTES or not _is_text(value):
                    ignored.append(name.decode())
                else:
                    best = header
        return best


def marked(call: Call, bound: Affinity) -> Call:
    """A call of `/v1/responses` whose id leads whoever goes on from its answer (`previous_response_id`) to the same place on the ring: half
    of its random digits are exchanged for that, and 64 random bits are left. No gateway has to remember it."""
    if call.endpoint is not Endpoint.RESPONSES or bound.source == affinity.NONE:
        return call
    return msgspec.structs.replace(call, id=f"{call.id[:-16]}{bound.point:016x}")


def _is_text(value: bytes) -> bool:
    try:
        return value.decode().isprintable()
    except UnicodeDecodeError:
        return False


def _session(call: Call, name: str, ignored: list[str]) -> bytes | None:
    value = memoryview(call.fields[name])
    if len(value) <= 6 * MAX_BYTES + 2:  # as JSON, with every character escaped
        try:
            found = _text.decode(value).encode()
        except (msgspec.DecodeError, UnicodeEncodeError):
            found = b"\0"
        if not found:
            return None
        if len(found) <= MAX_BYTES and found != b"\0":
            user = bytes(call.fields["user"])[:MAX_BYTES] if name == "session_id" and "user" in call.fields else b""
            return found + b"\0" + user if user else found
    ignored.append(name)
    return None


def _chain(call: Call, salt: str, found: Affinity) -> bytes:
    """Fills in the prompt's chain of hashes; what stands for its leading messages."""
    fields = call.fields
    value = memoryview(fields[_LISTS[call.endpoint]])
    before = salt.encode()
    for field in _BEFORE:
        if field in fields:
            before = b"%b\0%b" % (before, bytes(fields[field]))
    size = len(value)
    if size > MAX_PROMPT_BYTES:
        return before[:_HEAD] + bytes(value[:_HEAD])
    if value[0] == _BRACKET and call.endpoint is not Endpoint.COMPLETIONS:
        views: list[memoryview] = list(map(_view, _messages.decode(value)[:_MAX_LINKS]))
    else:  # a text, without the quote that ends it, or tokens
        views = [value[at : min(at + _PIECE, size - 1)] for at in range(0, min(size - 1, _MAX_LINKS * _PIECE), _PIECE)]
    if not views:
        return before
    pieces = list(map(bytes, views)) if size <= _HEAD + _TAIL else [_bounded(view) for view in views]
    found.lead = len(pieces)
    for number, piece in enumerate(pieces):
        if b'"user"' in piece:
            found.lead = number + 1
            break
    name = before[:_HEAD] + b"\0".join(pieces[: found.lead])
    # Numbers that depend on their place too; the first one holds what comes before the messages.
    pieces[0] = before + pieces[0]
    found.chain = list(accumulate(map(hash, enumerate(pieces)), xor))
    found.sizes = list(accumulate(map(len, views), initial=len(before)))[1:]
    return name


def _bounded(view: memoryview) -> bytes:
    size = len(view)
    return bytes(view) if size <= _HEAD + _TAIL else b"%d\0%b%b" % (size, bytes(view[:_HEAD]), bytes(view[-_TAIL:]))
