"""Continuous batching is the engine's, and the gateway lets it happen: 32 streams run together, seen by the engine's own metric."""

from __future__ import annotations

import asyncio

import openai

from tests.support.engine import metric
from tests.support.processes import Gateway

STREAMS = 32
TOKENS = 96


def test_thirty_two_streams_are_batched_together_and_all_finish(served: Gateway) -> None:
    async def one(client: openai.AsyncOpenAI, number: int) -> tuple[int, str | None]:
        stream = await client.chat.completions.create(
            model="deepseek-v3-tiny", messages=[{"role": "user", "content": f"Story {number}"}], max_tokens=TOKENS, stream=True,
            stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
        )  # fmt: skip
        tokens, finish = 0, None
        async for chunk in stream:
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
            finish = chunk.choices[0].finish_reason or finish if chunk.choices else finish
        return tokens, finish

    async def run() -> tuple[list[tuple[int, str | None]], float]:
        most = 0.0
        async with openai.AsyncOpenAI(base_url=served.base_url, api_key="none", max_retries=0) as client:
            work = asyncio.gather(*(one(client, number) for number in range(STREAMS)))
            while not work.done():
                most = max(most, await asyncio.to_thread(metric, served, "sglang:num_running_reqs"))
                await asyncio.sleep(0.05)
            return await work, most

    answers, most = asyncio.run(run())
    assert answers == [(TOKENS, "length")] * STREAMS
    assert most > 16, f"the engine never ran more than {most:g} requests at once"
