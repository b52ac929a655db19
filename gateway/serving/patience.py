"""How long a client waits for its answer before it gives up, by its own word: what SDKs send anyway, or a header of ours.

Looked at only where a request has to wait for a place.
"""

from __future__ import annotations

import re

from gateway.errors import Headers
from gateway.serving.balance.queue import Ticket

# The first one that makes sense counts; in seconds each. OpenAI's and Anthropic's SDKs send the second (Python: the longest silence) or the
# third (Node: until the answer's headers, in whole seconds, so that less than one is 0, which says nothing).
HEADERS = ((b"x-request-timeout-ms", 1e-3), (b"x-stainless-read-timeout", 1.0), (b"x-stainless-timeout", 1.0))
_NUMBER = re.compile(rb"[0-9]{1,12}(\.[0-9]{1,18})?")
# So long before its client gives up it is told that there was no place: a tenth of the time, and no more than this.
_ANSWER_S = 0.5


def heed(ticket: Ticket, headers: Headers, began_at: float) -> None:
    """Let a ticket wait no longer than its client does, which began to wait at that time (monotonic seconds). Headers that make no sense
    are noted, and otherwise ignored."""
    ignored: list[str] = []
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        found.setdefault(name, value)
    for name, unit in HEADERS:
        if name not in found:
            continue
        value = found[name]
        waits_s = float(value) * unit if _NUMBER.fullmatch(value) else 0.0
        if not waits_s:
            ignored.append(name.decode())
            continue
        deadline = began_at + waits_s - min(_ANSWER_S, waits_s / 10)
        if deadline < ticket.deadline:
            ticket.deadline, ticket.patience_s, ticket.named_by = deadline, waits_s, name.decode()
        break
    if ignored:
        ticket.ignored = tuple(ignored)
