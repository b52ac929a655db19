"""Tokens per second of the real engine through the gateway: one stream against 32, alternated, medians.

    make bench            its second part, under a minute; writes bench/results/tokens.json and tokens.svg

The load runs on the same machine as the engine and the gateway, which is why the ratio is worth more than either figure.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openai

from bench.peers import machine
from tests.support.engine import metric
from tests.support.processes import Gateway, gateway

RESULTS = Path(__file__).parent / "results"
TOKENS = 128
STREAMS = (1, 32)
ROUNDS = 3


async def one_stream(client: openai.AsyncOpenAI, prompt: str) -> tuple[int, float]:
    """Completion tokens and seconds to the first event."""
    started = time.perf_counter()
    stream = await client.chat.completions.create(
        model="deepseek-v3-tiny", messages=[{"role": "user", "content": prompt}], max_tokens=TOKENS, stream=True,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    )  # fmt: skip
    first_s, tokens = 0.0, 0
    async for chunk in stream:
        first_s = first_s or time.perf_counter() - started
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return tokens, first_s


async def round_of(running: Gateway, streams: int, number: int) -> dict[str, float]:
    """One measurement: `streams` at once, every prompt another one so that nothing but its beginning is in the prefix cache."""
    most = 0.0
    async with openai.AsyncOpenAI(base_url=running.base_url, api_key="none", max_retries=0) as client:
        started = time.perf_counter()
        work = asyncio.gather(*(one_stream(client, f"{number}.{index} " + "tell me more " * 10) for index in range(streams)))
        while not work.done():
            most = max(most, await asyncio.to_thread(metric, running, "sglang:num_running_reqs"))
            await asyncio.wait({work}, timeout=0.5)
        elapsed_s = time.perf_counter() - started
        answers = await work
    tokens = sum(count for count, _ in answers)
    return {"tokens_per_s": tokens / elapsed_s, "first_event_ms": statistics.median(first for _, first in answers) * 1e3, "running": most}


def measure() -> dict[str, Any]:
    """All rounds, alternated, and their medians."""
    rounds: dict[int, list[dict[str, float]]] = {streams: [] for streams in STREAMS}
    with tempfile.TemporaryDirectory() as folder, gateway(Path(folder)) as running:
        print("starting the engine ...", flush=True)
        running.wait_ready()
        asyncio.run(round_of(running, 2, -1))  # warm
        for number in range(ROUNDS):
            for streams in STREAMS:
                found = asyncio.run(round_of(running, streams, number * 100 + streams))
                rounds[streams].append(found)
                print(
                    f"{streams:3d} streams: {found['tokens_per_s']:7.1f} tokens/s, first event {found['first_event_ms']:.0f} ms", flush=True
                )
    median = {streams: {name: statistics.median(entry[name] for entry in found) for name in found[0]} for streams, found in rounds.items()}
    few, many = STREAMS
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "command": "make bench",
        "tokens_per_stream": TOKENS,
        "median": {str(streams): {name: round(value, 1) for name, value in found.items()} for streams, found in median.items()},
        "ratio": round(median[many]["tokens_per_s"] / median[few]["tokens_per_s"], 1),
    }


def draw(result: dict[str, Any]) -> str:
    """Two bars."""
    rates = {streams: entry["tokens_per_s"] for streams, entry in result["median"].items()}
    scale = 420 / max(rates.values())
    rows = []
    for index, (streams, rate) in enumerate(rates.items()):
        y = 46 + index * 44
        rows.append(f'<text x="10" y="{y + 20}">{streams} stream{"s" if streams != "1" else ""}</text>')
        rows.append(f'<rect x="100" y="{y}" width="{rate * scale:.0f}" height="30" rx="3" fill="#2a7de1"/>')
        rows.append(f'<text x="{108 + rate * scale:.0f}" y="{y + 20}">{rate:.0f} tokens/s</text>')
    title = f"Continuous batching: 32 streams give {result['ratio']} times the tokens of one"
    foot = f"{result['date']}, {result['machine']}; tiny FP8 checkpoint on the CPU, make bench"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 660 170" font-family="sans-serif" font-size="14">'
        '<rect width="660" height="170" fill="white"/>'
        f'<text x="10" y="26" font-weight="bold">{title}</text>{"".join(rows)}'
        f'<text x="10" y="156" font-size="11" fill="#555">{foot}</text></svg>\n'
    )


def main() -> None:
    """Measure, print, write."""
    result = measure()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "tokens.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "tokens.svg").write_text(draw(result))
    print(json.dumps(result, indent=2))
    print(f"32 streams give {result['ratio']} times the tokens of one stream; drawn in {RESULTS / 'tokens.svg'}")


if __name__ == "__main__":
    main()
