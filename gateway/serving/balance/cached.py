"""Which prefixes are in which host's cache, as far as can be told from outside: a tree over messages, corrected by every answer.

A node stands for a prompt's first messages and is found by their hash (`Affinity.chain`), so going down the tree is looking up one hash
after the other. A prefix is entered at a host when the host has prefilled it, which its first event says. How many tokens it had in its
cache the engine says with the usage; where that is clearly less than what was expected, it has thrown out what was used longest ago, and
nothing older than the prefix that was missing counts any more at that host (engines evict by last use). An engine that tells what leaves
its cache says so at once (`told`).

Bounded: nodes are kept in two generations, and when the younger one is full the older one is forgotten.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection

from gateway.serving.balance.affinity import Affinity

# Nodes of a generation: two of these take 13 MB of a worker, for each model, where a prefix is at one host (tracemalloc, 2026-11-28).
MAX_NODES = 20_000
# An engine caches whole pages (SGLang's DeepSeek backends: 64 tokens), and its template adds some tokens of its own.
PAGE_TOKENS = 64
# A count of ours that was estimated by bytes is off by more than this only where the text is unusual.
TOLERANCE = 0.8
# Bytes of a request's JSON for a token, until the first answers have told: English prose in DeepSeek's tokenizer.
BYTES_PER_TOKEN = 4.4
_LEARNED = 0.05
# A beginning from which more conversations than this have started, for each host that has it, is worth having everywhere: it leads nobody
# any more. Else all that begin with the same system message would fill one host's cache while the others' are empty.
SHARED_BY = 8


class _Node:
    """`tokens` of the prompt up to here, as an engine counted them (0: nobody has yet); when each host last used it; how many different
    messages came next."""

    __slots__ = ("at", "branches", "tokens")

    def __init__(self) -> None:
        self.tokens = self.branches = 0
        self.at: dict[str, float] = {}


class Placement:
    """One attempt as the index sees it: what its host was expected to have, and what it had."""

    __slots__ = (
        "_affinity",
        "_index",
        "_lost_at",
        "cached_tokens",
        "evicted",
        "expected_tokens",
        "host",
        "known_tokens",
        "moved_from",
        "prompt_tokens",
    )

    def __init__(self, index: Prefixes | None, affinity: Affinity, host: str) -> None:
        # Let go of at the end: a record is kept for long.
        self._index = index
        self._affinity: Affinity | None = affinity
        self._lost_at = 0.0
        self.host = host
        # Tokens of the prompt that are in the host's cache, as far as we know, and those that the conversation had when it was last seen.
        self.expected_tokens = 0
        self.known_tokens = 0
        # Whether the host had something of it that has left its cache since, as its engine has told.
        self.evicted = False
        # Where the conversation was before, if that is elsewhere.
        self.moved_from = ""
        # As the engine says; None where it does not.
        self.prompt_tokens = 0
        self.cached_tokens: int | None = None

    @property
    def moved_tokens(self) -> int:
        """What the move has cost: tokens that are prefilled again."""
        if not self.moved_from:
            return 0
        return max(0, self.known_tokens - (self.expected_tokens if self.cached_tokens is None else self.cached_tokens))

    def begun(self) -> None:
        """The host has prefilled the prompt."""
        if self._index is not None and self._affinity is not None:
            self._index.enter(self._affinity, self.host)

    def ended(self, prompt_tokens: int, cached_tokens: int | None) -> None:
        """What the engine says of it; `prompt_tokens` 0: nothing."""
        index, affinity = self._index, self._affinity
        self._index = self._affinity = None
        if index is None or affinity is None or not prompt_tokens:
            return
        index.counted(affinity, prompt_tokens)
        if self.host in index.telling:  # an engine's own last use of a prompt is the answer's end
            index.enter(affinity, self.host)
        if cached_tokens is None:
            return
        self.prompt_tokens, self.cached_tokens = prompt_tokens, cached_tokens
        if cached_tokens < TOLERANCE * self.expected_tokens - PAGE_TOKENS:
            index.lost(self.host, self._lost_at)

    def failed(self) -> None:
        """The host has not answered: nothing went on there."""
        self.moved_from = ""
        self.given_up()

    def given_up(self) -> None:
        """It will not be told."""
        self._index = self._affinity = None


class Prefixes:
    """Of one model, in one worker."""

    def __init__(self, most_nodes: int = MAX_NODES) -> None:
        self._most = most_nodes
        self._young: dict[int, _Node] = {}
        self._old: dict[int, _Node] = {}
        # Host -> what it used last before then (monotonic seconds) is in its cache no more, and the same as far as its engine has told.
        self._gone: defaultdict[str, float] = defaultdict(float)
        self.telling: dict[str, float] = {}
        self._bytes_per_token = BYTES_PER_TOKEN

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def held(self, affinity: Affinity, hosts: Collection[str], least_bytes: float) -> dict[str, int]:
        """Of those hosts which have the prompt's beginning in their caches, and how many bytes of it; only from `least_bytes` on, and not
        what is everybody's beginning."""
        found: dict[str, int] = {}
        young, old, gone, sizes = self._young, self._old, self._gone, affinity.sizes
        step = len(affinity.chain)
        for link in reversed(affinity.chain):
            step -= 1
            size = sizes[step]
            if size < least_bytes:
                break
            node = young[link] if link in young else old.get(link)
            if node is None or (step + 1 < affinity.lead and node.branches > SHARED_BY * len(node.at)):
                continue
            for host, at in node.at.items():
                if host not in found and host in hosts and at > gone[host]:
                    found[host] = size
            if len(found) == len(hosts):
                break
        return found

    def place(self, affinity: Affinity, host: str) -> Placement:
        """A request goes to that host."""
        placement = Placement(self, affinity, host)
        young, old = self._young, self._old
        gone = self._gone[host]
        told = self.telling.get(host, 0.0)
        step, last = len(affinity.chain), len(affinity.chain) - 1
        deepest = True
        for link in reversed(affinity.chain):
            step -= 1
            node = young[link] if link in young else old.get(link)
            if node is None or not node.at:
                continue
            tokens = node.tokens or int(affinity.sizes[step] / self._bytes_per_token)
            at = node.at.get(host, 0.0)
            # More than its first message is known: it is a conversation that goes on.
            if deepest and affinity.lead <= step + 1 <= last and at <= gone:
                placement.moved_from, placement.known_tokens = self._last(node), tokens
            deepest = False
            if 0.0 < at <= told:
                placement.evicted = True
            if at > gone:
                placement.expected_tokens, placement._lost_at = tokens, at
                break
        return placement

    def _last(self, node: _Node) -> str:
        host, latest = "", 0.0
        for name, at in node.at.items():
            if at > latest and at > self._gone[name]:
                host, latest = name, at
        return host

    def enter(self, affinity: Affinity, host: str) -> None:
        """That host has all of the prompt in its cache."""
        now, young, old = time.monotonic(), self._young, self._old
        before: _Node | None = None
        for link in affinity.chain:
            if link in young:
                node = young[link]
            else:
                if link in old:
                    node = old[link]
                    del old[link]
                else:
                    node = _Node()
                    if before is not None:
                        before.branches += 1
                young[link] = node
            node.at[host] = now
            before = node
        if len(young) >= self._most:
            self._old, self._young = young, {}

    def counted(self, affinity: Affinity, prompt_tokens: int) -> None:
        """So many tokens the whole prompt has."""
        if not affinity.chain:
            return
        link = affinity.chain[-1]
        node = self._young[link] if link in self._young else self._old.get(link)
        if node is not None:
            node.tokens = prompt_tokens
        self._bytes_per_token += _LEARNED * (affinity.sizes[-1] / prompt_tokens - self._bytes_per_token)

    def lost(self, host: str, at: float) -> None:
        """What it used at that time is not in its cache any more, and so is nothing older."""
        if at > self._gone[host]:
            self._gone[host] = at

    def told(self, host: str, since: float) -> None:
        """Its engine says what leaves its cache: nothing is in it that it has not used since then."""
        self.telling[host] = since
        self.lost(host, since)
