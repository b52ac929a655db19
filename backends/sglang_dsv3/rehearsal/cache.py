"""A prefix cache as an engine's looks from outside: how many tokens of a prompt it has seen before, and what it has thrown out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import msgspec

# Bytes of a message's JSON for a token.
BYTES_PER_TOKEN = 4


class PrefixCache:
    """Of `most` tokens; what was used longest ago goes first, and of one prompt its end before its beginning."""

    def __init__(self, most: int = 1 << 30) -> None:
        self.most = most
        # The first messages of a prompt -> tokens of the last of them.
        self._known: OrderedDict[int, int] = OrderedDict()
        self._held = 0

    def forget(self, most: int) -> None:
        """Nothing is in it any more, and so much may be."""
        self._known.clear()
        self.most, self._held = most, 0

    def ask(self, before: Any, messages: Sequence[Any]) -> tuple[int, int]:
        """A prompt's tokens, and how many of them were there already; from now on all of them are."""
        known = self._known
        total = cached = 0
        whole = True
        prefix = hash(msgspec.json.encode(before))
        used = []
        for message in messages:
            content = msgspec.json.encode(message)
            prefix = hash((prefix, content))
            size = -(-len(content) // BYTES_PER_TOKEN)
            total += size
            whole = whole and prefix in known
            if whole:
                cached += size
            elif prefix not in known:
                self._held += size
                known[prefix] = size
            used.append(prefix)
        for prefix in reversed(used):
            known.move_to_end(prefix)
        while self._held > self.most:
            self._held -= known.popitem(last=False)[1]
        return total, cached
