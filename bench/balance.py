"""What a decision of the balancer costs, in microseconds of CPU: pick, begin and end, for every policy, with 3 hosts and with 100.

python -m bench.balance       a few seconds; part of `make bench`; writes bench/results/balance.json
"""

from __future__ import annotations

import json
import random
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

from bench.peers import machine
from gateway.plugin import Target, Verdict
from gateway.serving.balance import policies
from gateway.serving.balance.affinity import PREFIX, Affinity
from gateway.serving.balance.hosts import Host, Hosts
from gateway.serving.balance.settings import Health

RESULTS = Path(__file__).parent / "results"
PICKS, ROUNDS = 5000, 9


def cost_us(name: str, count: int) -> float:
    """The median over several rounds."""
    chance = random.Random(1)
    hosts, policy = Hosts(Health(), chance), policies.make(name, chance)
    hosts.update([Target(f"10.0.0.{number}:30000", 1 + number % 5, capacity=1000) for number in range(count)], 0.0)
    # Conversations of four messages, none of them known yet.
    sizes = [200, 400, 600, 800]
    keys = [Affinity(PREFIX, chance.getrandbits(64), [chance.getrandbits(62) for _ in sizes], sizes, 2) for _ in range(PICKS)]
    flying: list[Host] = []
    took = []
    for _ in range(ROUNDS):
        began = time.process_time()
        for key in keys:
            host = hosts.choose(policy, key, (), 100.0)
            assert isinstance(host, Host)
            hosts.begin(host, 100.0)
            flying.append(host)
            if len(flying) > 64:
                hosts.end(flying.pop(0), Verdict.OK, 100.0)
        took.append((time.process_time() - began) * 1e6 / PICKS)
    return round(statistics.median(took), 1)


def main() -> None:
    """Measure, print, write."""
    found = {name: {str(count): cost_us(name, count) for count in (3, 100)} for name in policies.NAMES}
    result = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "machine": machine(), "command": "make bench", "cpu_us_per_request": found}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "balance.json").write_text(json.dumps(result, indent=2) + "\n")
    for name, by in found.items():
        print(f"{name:22s}  3 hosts {by['3']:5.1f} us   100 hosts {by['100']:5.1f} us")


if __name__ == "__main__":
    main()
