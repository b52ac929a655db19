"""What `penstock top` makes of two looks at a gateway."""

from __future__ import annotations

from typing import Any

from gateway.admin.top import Sample, screen

WORKERS = [
    {"pid": 1, "generation": 2, "state": "serving", "up_s": 9.0, "open": 3, "oldest_s": 1.5, "resident_bytes": 60 << 20, "waiting": ""},
    {"pid": 2, "generation": 2, "state": "starting", "up_s": 0.1, "open": 0, "oldest_s": 0.0, "resident_bytes": 0, "waiting": ""},
]
HOSTS = [
    {"id": "a:1", "backend": "dsv3", "state": "ok", "why": "", "in_flight": 3, "capacity": 32},
    {"id": "b:1", "backend": "dsv3", "state": "down", "why": "refused\x1b[2J", "in_flight": 0, "capacity": None},
]
METRICS = """# HELP penstock_queue_waiting x
penstock_queue_waiting{backend="dsv3"} 4
penstock_engine_kv_usage_ratio{backend="dsv3",host="a:1"} 0.425
penstock_engine_generation_tokens_per_second{backend="dsv3",host="a:1"} 811.6
penstock_engine_running_requests{backend="dsv3",host="a:1"} 3
"""


def sample(at: float, *used: tuple[str, int, int], keys: list[dict[str, Any]] | None = None) -> Sample:
    usage = [{"key": key, "requests": count, "prompt_tokens": tokens, "generated_tokens": 0, "cost": 0.5} for key, count, tokens in used]
    return Sample(at, "", WORKERS, HOSTS, keys or [], usage, METRICS)


def rows(lines: list[str]) -> dict[str, list[str]]:
    return {line.split()[0]: line.split() for line in lines if line}


def test_hosts_with_what_their_engines_say() -> None:
    lines = screen(sample(2.0), sample(0.0), "http://127.0.0.1:9464")
    assert lines[0] == "penstock at http://127.0.0.1:9464   ready"
    assert lines[1] == "workers  1 serving, 1 starting, generation 2; 3 open, the oldest for 1.5 s; 60 MB; 4 waiting for a host"
    assert rows(lines)["a:1"] == ["a:1", "ok", "3", "32", "3", "-", "42%", "812"]
    assert rows(lines)["b:1"] == ["b:1", "down", "0", "-", "-", "-", "-", "-", r"refused\x1b[2J"]
    assert "key" not in rows(lines), "nobody has used anything, and there are no keys"


def test_rates_are_what_came_in_between_and_shares_are_of_the_limits() -> None:
    keys: list[dict[str, Any]] = [{"name": "a", "rpm": 600.0, "tpm": 1200.0}, {"name": "b"}, {"name": "c"}]
    before = sample(10.0, ("a", 10, 1000), ("b", 5, 50), ("gone", 1, 1))
    now = sample(12.0, ("a", 20, 1020), ("b", 5, 50), ("c", 2, 400), ("gone", 1, 1), keys=keys)
    found = rows(screen(now, before, "x"))
    assert found["a"] == ["a", "5", "10", "50%", "50%", "20", "1,020", "0.5"]
    assert found["c"][1:4] == ["1", "200", "-"]
    assert found["b"][1:3] == ["0", "0"]
    names = [name for name in found if name in ("a", "b", "c", "gone")]
    assert names == ["c", "a", "b", "gone"], "the busiest first, then by what they used today"


def test_a_day_that_begins_is_no_negative_rate() -> None:
    found = rows(screen(sample(12.0, ("a", 1, 10)), sample(10.0, ("a", 900, 90_000)), "x"))
    assert found["a"][1:3] == ["0", "0"]
