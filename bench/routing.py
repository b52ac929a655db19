"""What each policy makes of the engines' prefix caches: the gateway's own decisions over simulated hosts, on made traces.

python -m bench.routing            two or three minutes; writes bench/results/routing.json, .svg, the table in docs/routing.md
python -m bench.routing --quick    a tenth of it, to see that it runs

Real are the parsing of each body, what binds it, the pick, the bounded load and the index with its corrections. Simulated is the clock, and
four hosts: a cache of 400,000 tokens that throws out what was used longest ago, prefill of 10,000 tokens a second one prompt after the
other, 25 ms for every token of an answer. Those are assumptions, not measurements; what is compared is one policy with another.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from backends.sglang_dsv3.rehearsal.cache import PrefixCache
from bench.peers import machine
from bench.traces import TRACES, Conversation, text
from gateway.plugin import Endpoint, Target, Verdict
from gateway.serving import calls
from gateway.serving.affinity import Affinities
from gateway.serving.balance import policies
from gateway.serving.balance.affinity import Affinity
from gateway.serving.balance.cached import Placement
from gateway.serving.balance.hosts import Host, Hosts
from gateway.serving.balance.policies import Affine
from gateway.serving.balance.settings import Health

RESULTS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parents[1] / "docs" / "routing.md"
HOSTS, CACHE_TOKENS, PREFILL_PER_S, TOKEN_S = 4, 400_000, 10_000.0, 0.025
LENGTH_S = 900.0
# The last one is the policy without its index of what is cached: a ring with bounded load and nothing else.
POLICIES = ("weighted_round_robin", "two_choices", "ring alone", "affinity")


class Request:
    """One turn on its way."""

    def __init__(self, of: Conversation, turn: int, asked_s: float, host: Host, placement: Placement | None) -> None:
        self.of = of
        self.turn = turn
        self.asked_s = asked_s
        self.host = host
        self.placement = placement
        self.counted = (0, 0)


class Engine:
    """A simulated host."""

    def __init__(self) -> None:
        self.cache = PrefixCache(CACHE_TOKENS)
        self.waiting: deque[Request] = deque()
        self.busy = False
        self.busy_s = 0.0


class Simulation:
    """One trace under one policy."""

    def __init__(self, policy: str, conversations: list[Conversation], seed: int) -> None:
        self._chance = random.Random(seed)
        self._blind = policy == "ring alone"
        self._balance = "affinity" if self._blind else policy
        self._policy = policies.make(self._balance, self._chance)
        self._hosts = Hosts(Health(slow_start_s=0), self._chance)
        self._hosts.update([Target(f"host-{number}") for number in range(HOSTS)], 0.0)
        self._engines = {host.target.id: Engine() for host in self._hosts}
        self._affinities = Affinities(())
        self._events: list[tuple[float, int, str, Any]] = []
        self._order = 0
        self.first_token_s: list[float] = []
        self.prompt = self.cached = self.expected = self.moves = self.paid = 0
        for conversation in conversations:
            conversation.messages = [{"role": "system", "content": conversation.system}]
            self._at(conversation.at_s, "ask", (conversation, 0))

    def _at(self, when: float, what: str, which: Any) -> None:
        self._order += 1
        heapq.heappush(self._events, (when, self._order, what, which))

    def run(self) -> None:
        while self._events:
            now, _, what, which = heapq.heappop(self._events)
            if what == "ask":
                self._ask(now, *which)
            elif what == "prefilled":
                self._prefilled(now, which)
            else:
                self._answered(now, which)

    def _ask(self, now: float, of: Conversation, turn: int) -> None:
        of.messages.append({"role": "user", "content": of.turns[turn][0]})
        raw = json.dumps({"model": "m", "messages": of.messages, **of.more}, separators=(",", ":")).encode()
        bound = self._affinities.of(calls.parse(Endpoint.CHAT, raw), (), "", "", self._balance, [])
        if self._blind:
            bound = Affinity(bound.source, bound.point)
        host = self._hosts.choose(self._policy, bound, (), now)
        assert isinstance(host, Host)
        self._hosts.begin(host, now)
        placement = self._policy.place(bound, host.target.id) if isinstance(self._policy, Affine) else None
        engine = self._engines[host.target.id]
        engine.waiting.append(Request(of, turn, now, host, placement))
        if not engine.busy:
            self._prefill(now, engine)

    def _prefill(self, now: float, engine: Engine) -> None:
        request = engine.waiting.popleft()
        prompt, cached = request.counted = engine.cache.ask(None, request.of.messages)
        took_s = 0.01 + (prompt - cached) / PREFILL_PER_S
        engine.busy = True
        engine.busy_s += took_s
        self.prompt += prompt
        self.cached += cached
        self._at(now + took_s, "prefilled", request)

    def _prefilled(self, now: float, request: Request) -> None:
        self.first_token_s.append(now - request.asked_s)
        if request.placement is not None:
            request.placement.begun()
        self._at(now + request.of.turns[request.turn][1] * TOKEN_S, "answered", request)
        engine = self._engines[request.host.target.id]
        engine.busy = False
        if engine.waiting:
            self._prefill(now, engine)

    def _answered(self, now: float, request: Request) -> None:
        of, placement = request.of, request.placement
        if placement is not None:
            placement.ended(*request.counted)
            self.expected += placement.expected_tokens
            self.moves += bool(placement.moved_from)
            self.paid += placement.moved_tokens
        self._hosts.end(request.host, Verdict.OK, now)
        of.messages.append({"role": "assistant", "content": text(self._chance, of.turns[request.turn][1])})
        self._engines[request.host.target.id].cache.ask(None, of.messages)
        if request.turn + 1 < len(of.turns):
            self._at(now + of.pause_s[request.turn + 1], "ask", (of, request.turn + 1))

    def found(self) -> dict[str, Any]:
        """What came of it."""
        busy = [engine.busy_s for engine in self._engines.values()]
        cuts = statistics.quantiles(self.first_token_s, n=100)
        return {
            "requests": len(self.first_token_s),
            "hit_rate": round(self.cached / self.prompt, 3),
            "expected_rate": round(self.expected / self.prompt, 3),
            "imbalance": round(max(busy) * len(busy) / sum(busy), 3),
            "first_token_p50_s": round(cuts[49], 3),
            "first_token_p99_s": round(cuts[98], 3),
            "prefill_s": round(sum(busy)),
            "moves": self.moves,
            "moved_tokens": self.paid,
        }


def measure(length_s: float = LENGTH_S, seed: int = 1) -> dict[str, Any]:
    """Every trace under every policy."""
    found: dict[str, Any] = {}
    for name, (make, rate) in TRACES.items():
        found[name] = {}
        for policy in POLICIES:
            simulation = Simulation(policy, make(random.Random(seed), rate, length_s), seed)
            simulation.run()
            found[name][policy] = simulation.found()
            print(f"{name:10s} {policy:22s} {found[name][policy]}", flush=True)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "command": "python -m bench.routing",
        "length_s": length_s,
        "traces": found,
    }


_PANELS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("hit_rate", "prompt tokens found in the cache (more is better)", lambda value: f"{value * 100:.0f} %"),
    ("imbalance", "busiest host's prefill over the mean (1 is even)", lambda value: f"{value:.2f}"),
    ("first_token_p99_s", "time to first token, p99 (less is better)", lambda value: f"{value:.2f} s"),
)


def draw(result: dict[str, Any]) -> str:
    """A row for each figure, a panel for each trace, a bar for each policy."""
    traces = result["traces"]
    row, width, high = 22, 330, 46 + 22 * len(POLICIES)
    height = 44 + high * len(_PANELS) + 24
    parts = ['<text x="10" y="24" font-size="16" font-weight="bold">Where the prefixes are: policies over four simulated hosts</text>']
    for line, (key, title, words) in enumerate(_PANELS):
        top = 50 + line * high
        parts.append(f'<text x="10" y="{top}" font-weight="bold">{title}</text>')
        most = {name: max(by[policy][key] for policy in POLICIES) for name, by in traces.items()}
        for column, (name, by) in enumerate(traces.items()):
            left = 10 + column * width
            parts.append(f'<text x="{left}" y="{top + 16}" fill="#555">{name}</text>')
            for place, policy in enumerate(POLICIES):
                y = top + 22 + place * row
                size = max(by[policy][key] / most[name] * 120, 1) if most[name] else 1
                color = "#2a7de1" if policy == "affinity" else "#b8c4d0"
                parts.append(f'<text x="{left}" y="{y + 13}" font-size="11">{policy}</text>')
                parts.append(f'<rect x="{left + 125}" y="{y}" width="{size:.0f}" height="16" rx="2" fill="{color}"/>')
                parts.append(f'<text x="{left + 130 + size:.0f}" y="{y + 13}" font-size="11">{words(by[policy][key])}</text>')
    say = f"{result['date']}, {result['machine']}; {result['command']}; {result['length_s']:.0f} s of made traces, simulated hosts"
    parts.append(f'<text x="10" y="{height - 10}" font-size="10" fill="#555">{say}</text>')
    wide = 20 + width * len(traces)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {height}" font-family="sans-serif" font-size="13">'
    return f'{head}<rect width="{wide}" height="{height}" fill="white"/>{"".join(parts)}</svg>\n'


def table(result: dict[str, Any]) -> str:
    """The same in words, with where, when and how."""
    lines = [
        "| trace | policy | found in the cache | expected | busiest / mean | first token p50, p99 | prefill, s | moved |",
        "|---" * 8 + "|",
    ]
    for name, by in result["traces"].items():
        for policy, row in by.items():
            expected = f"{row['expected_rate']:.1%}" if policy == "affinity" else ""
            moved = f"{row['moves']} conversations, {row['moved_tokens']:,d} tokens" if policy == "affinity" else ""
            first = f"{row['first_token_p50_s'] * 1e3:.0f}, {row['first_token_p99_s'] * 1e3:.0f} ms"
            shown = f"**`{policy}`**" if policy == "affinity" else f"`{policy}`" if policy in policies.NAMES else policy
            cells = (name, shown, f"{row['hit_rate']:.1%}", expected, f"{row['imbalance']:.2f}", first, str(row["prefill_s"]), moved)
            lines.append("| " + " | ".join(cells) + " |")
    counts = ", ".join(f"{by['affinity']['requests']:,d} requests of {name}" for name, by in result["traces"].items())
    lines += ["", f"{result['date']}, {result['machine']}; `{result['command']}`; {counts}."]
    return "\n".join(lines)


def main() -> None:
    """Simulate, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of it, and nothing is written")
    options = parser.parse_args()
    result = measure(LENGTH_S / 10 if options.quick else LENGTH_S)
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "routing.json").write_text(json.dumps(result, indent=2) + "\n")
        (RESULTS / "routing.svg").write_text(draw(result))
        before, _, rest = DOCUMENT.read_text().partition("<!-- routing:table -->\n")
        DOCUMENT.write_text(f"{before}<!-- routing:table -->\n{table(result)}\n<!-- routing -->{rest.partition('<!-- routing -->')[2]}")


if __name__ == "__main__":
    main()
