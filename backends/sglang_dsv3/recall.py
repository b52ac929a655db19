"""Answers of `/v1/responses` that an engine keeps (SGLang's `--enable-response-store`), asked for again.

Which host made one is not written down anywhere: each is asked, and the one that has it says so. That holds for every worker and gateway,
and after their restarts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from backends.sglang_dsv3 import failures
from backends.sglang_dsv3.abandon import MAX_JSON_BYTES
from backends.sglang_dsv3.answer import renaming
from backends.sglang_dsv3.host import EngineHost
from backends.sglang_dsv3.transport import ConnectionLost, request
from gateway.errors import NotServed, Unavailable

# How long a host may take to say whether it has an answer, and to send it.
ANSWER_S = 10.0
_DISABLED = "store is disabled"


class _NotHere(Exception):
    """This host does not have it."""


class _KeepsNone(_NotHere):
    """This host keeps no answers at all."""


async def recall(hosts: Iterable[EngineHost], id: str, model: str, cancel: bool) -> bytes | None:
    """See `Backend.recall`."""
    path = f"/v1/responses/{id}"
    asked = [_ask(host, "POST" if cancel else "GET", f"{path}/cancel" if cancel else path, model) for host in hosts]
    found = await asyncio.gather(*asked, return_exceptions=True)
    for answer in found:
        if isinstance(answer, bytes):
            return answer
    for failure in found:
        if not isinstance(failure, _NotHere):
            message = "A host that may keep this response cannot be asked."
            raise Unavailable(message, code="engine_unavailable", retry_after_s=5, detail=repr(failure))
    if all(isinstance(failure, _KeepsNone) for failure in found):
        raise NotServed("Responses are not kept: no engine here runs with --enable-response-store.")
    return None


async def _ask(host: EngineHost, method: str, path: str, model: str) -> bytes:
    async with asyncio.timeout(ANSWER_S):
        served_name = await host.served_name()
        response = await request(host.transport(), method, path)
        try:
            content = bytearray()
            while part := await response.read():
                content += part
                if len(content) > MAX_JSON_BYTES:
                    raise ConnectionLost(f"{host.id}: more than {MAX_JSON_BYTES} bytes")
        finally:
            response.close()
    if response.status == 200:
        return renaming(served_name, model)(bytes(content))
    if response.status == 404:
        raise _NotHere
    said = failures.words(bytes(content))
    if response.status == 400 and _DISABLED in said:
        raise _KeepsNone
    raise ConnectionLost(f"{host.id} answered {response.status}: {said[:200]}")
