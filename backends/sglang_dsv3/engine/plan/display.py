"""A plan for people, and for programs: every number says where it is from."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence

import msgspec

from backends.sglang_dsv3.engine.plan import fleet, gpus, models, roofline
from backends.sglang_dsv3.engine.plan.fleet import Fleet
from backends.sglang_dsv3.engine.plan.question import Question
from backends.sglang_dsv3.engine.plan.roofline import Step
from backends.sglang_dsv3.engine.plan.verdict import Alternative, Room, Verdict, Word
from gateway.terminal import table

# What a request has in the cache while a step is reckoned with, where its context allows so much.
TYPICAL = 4096
_BAR = 40


class Plan(msgspec.Struct, frozen=True):
    """All of it. `basis`: where each number is from, by its path, `*` for any part of one."""

    model: str
    family: str
    stored: str
    gpus: str
    tp: int
    dp: int
    ep: int
    nodes: int
    kv_cache_dtype: str
    context: int
    concurrency: int
    verdict: Word
    why: list[str]
    notes: list[str]
    room: Room
    cached_tokens_per_request: int
    steps: list[Step]
    alternatives: list[Alternative]
    basis: dict[str, str]
    fleet: list[Fleet] = []


def plan(asked: Question, said: Verdict, steps: list[Step], others: list[Alternative], sized: list[Fleet] | None = None) -> Plan:
    """A judged question as one thing."""
    of, layout = asked.model, asked.layout
    return Plan(
        of.name, of.family, of.stored, asked.host.spec, layout.tp, layout.dp, layout.ep, layout.nodes, asked.kv_type, asked.context,
        asked.concurrency, said.word, said.why, said.notes, said.room, typical(asked), steps, others, basis(asked), sized or [],
    )  # fmt: skip


def typical(asked: Question) -> int:
    """Tokens of each request in the cache, for the roofline."""
    return min(TYPICAL, asked.context)


def basis(asked: Question) -> dict[str, str]:
    """Where numbers are from, by their path; the first that fits holds."""
    memory = gpus.MEMORY_SOURCE
    if asked.host.measured:
        memory = f"measured (this machine's driver, {datetime.datetime.now(datetime.UTC):%Y-%m-%d})"
    given = "as asked"
    return {
        **dict.fromkeys(("tp", "dp", "ep", "nodes", "context", "concurrency", "cached_tokens_per_request"), given),
        "room.gpu_gib": memory,
        "room.weights_gib": asked.model.basis,
        "room.fraction": given if asked.fraction is not None else "computed (the most that is reckoned with)",
        "room.own_*": "computed, by SGLang 0.5.23's own rule",
        "room.chunk": "computed, by SGLang 0.5.23's own rule",
        "room.*": "computed",
        "steps.*": f"computed; bandwidth and arithmetic {gpus.SPEED_SOURCE}",
        "alternatives.*.gpu_gib": gpus.MEMORY_SOURCE,
        "alternatives.*": "computed",
        **{f"fleet.*.{name}": given for name in ("ttft_s", "tokens_per_s", "users", "prompt_tokens", "answer_tokens")},
        "fleet.*.reached_*": fleet.REACHED_SOURCE,
        "fleet.*": "computed",
    }


def lines(shown: Plan, checkpoint: bool = False) -> Iterator[str]:
    """For a terminal. `checkpoint`: a folder was planned for, whose family and parsers are said too."""
    groups = f", dp {shown.dp}" if shown.dp > 1 else ""
    experts = f", ep {shown.ep}" if shown.ep > 1 else ""
    yield f"{shown.model} ({shown.stored}) on {shown.gpus}, tp {shown.tp}{groups}{experts}: {shown.verdict}"
    yield from (f"  {reason}" for reason in shown.why)
    yield from (f"  {note}" for note in shown.notes)
    if checkpoint:
        yield f"  {shown.family}{_parsers(shown.family)}"
    yield ""
    yield from table(("each GPU, in GiB", "", "from"), list(_memory(shown)))
    if shown.room.kv_bytes_per_token is not None and shown.verdict != "does not fit":
        yield ""
        yield from _cache(shown)
    if shown.steps and shown.verdict != "does not fit":
        yield ""
        yield from _steps(shown)
    if shown.fleet:
        yield ""
        yield from _fleets(shown)
    if shown.alternatives:
        yield ""
        yield from _others(shown)
    elif shown.verdict == "does not fit":
        yield ""
        yield "nothing that is known here would hold it"


def _parsers(family: str) -> str:
    if family not in models.PARSERS:
        return ""
    tools, thoughts = models.PARSERS[family]
    return f"; tool_call_parser: {tools}; reasoning_parser: {thoughts}"


def _memory(shown: Plan) -> Iterator[Sequence[str | float | None]]:
    room, source = shown.room, shown.basis
    yield "memory", round(room.gpu_gib, 1), source["room.gpu_gib"]
    yield "weights", _short(room.weights_gib), source["room.weights_gib"]
    yield f"for the KV cache, at memory_fraction {room.fraction:.2f}", round(room.headroom_gib, 1), "computed"
    if room.absorbed_gib:
        yield "  of that at most, for MLA's absorbed matrices", _short(room.absorbed_gib), "computed"
    yield "left for activations, graphs, NCCL", round(room.outside_gib, 1), "computed"


def _short(value: float) -> float:
    """One decimal, and of small values what tells them from nothing."""
    return round(value, 1) if value >= 1 else float(f"{value:.2g}")


def _cache(shown: Plan) -> Iterator[str]:
    room, kind = shown.room, shown.kv_cache_dtype
    if kind == "auto":
        kind = "FP8, SGLang's choice" if room.kv_bytes_per_request else "BF16, SGLang's choice"
    ranks = "on every rank" if shown.tp > shown.dp else "on one rank"
    request = f" and {room.kv_bytes_per_request / 1e6:.1f} MB a request" if room.kv_bytes_per_request else ""
    own = f"{room.own_kv_tokens:,}" if room.own_kv_tokens else "none"
    yield f"KV cache ({kind}): {room.kv_bytes_per_token:,.0f} bytes a token{request}, {ranks}: computed"
    yield (
        f"  {room.kv_tokens:,} tokens, {room.requests:,} requests of {shown.context:,} at once; {own} at SGLang's own fraction, "
        f"{room.own_fraction:.3f}"
    )
    whole = f"{room.smallest_fraction_all:.3f}" if room.smallest_fraction_all < 1 else "more than there is"
    yield f"  smallest memory_fraction: {room.smallest_fraction:.3f} for one such request, {whole} for {shown.concurrency}"


def _steps(shown: Plan) -> Iterator[str]:
    yield (
        f"decoding at best, {shown.cached_tokens_per_request:,} tokens of each request in the cache: computed from published bandwidth and "
        "arithmetic; nothing of it was measured"
    )
    rows: list[Sequence[str | float | None]] = [
        (
            step.batch, round(step.experts, 1), _short(step.read_gb), float(f"{step.roof_ms:.3g}"), round(step.roof_tokens_per_s),
            float(f"{step.ms:.3g}"), round(step.tokens_per_s), round(step.per_request, 1), step.bound,
        )
        for step in shown.steps
    ]  # fmt: skip
    yield from table(("batch", "experts", "GB read", "roof ms", "roof tok/s", "ms", "tok/s", "each", "bound by"), rows)
    yield ""
    most = max(step.tokens_per_s for step in shown.steps)
    held = shown.room.kv_tokens or 0
    for step in shown.steps:
        beyond = "" if step.batch * shown.cached_tokens_per_request <= held else "  more than the cache holds"
        yield f"{step.batch:5}  {'█' * max(1, round(_BAR * step.tokens_per_s / most))} {step.tokens_per_s:,.0f} tok/s{beyond}"


def _fleets(shown: Plan) -> Iterator[str]:
    first = shown.fleet[0]
    yield (
        f"for {first.users:,} users, {first.tokens_per_s:g} tokens/s each, the first after {first.ttft_s:g} s, prompts of "
        f"{first.prompt_tokens:,} and answers of {first.answer_tokens:,} tokens, nothing cached: computed"
    )
    for found in shown.fleet:
        reached = f"at {found.reached_decode:.0%} of the roofline ({found.reached_prefill:.0%} for prompts)"
        if not found.engines:
            bounds = ((found.users_by_speed, "speed"), (found.users_by_memory, "KV cache"), (found.users_by_first_token, "first token"))
            yield f"  {reached} no number of such engines: not one user, by {', '.join(word for users, word in bounds if users == 0)}"
            continue
        yield f"  {reached} {found.engines:,} engines, {found.gpus:,} GPUs, {found.users_per_engine:,} users each"
        yield (
            f"    one engine: {found.users_by_speed:,} users by speed, {found.users_by_memory:,} by KV cache, "
            f"{found.users_by_first_token:,} by first token; expected {found.expected_tokens_per_s:.0f} tokens/s after "
            f"{found.expected_ttft_s:.2f} s"
        )
    yield f"  those shares: {fleet.REACHED_SOURCE}"


def _others(shown: Plan) -> Iterator[str]:
    yield "these would hold it" if shown.verdict == "does not fit" else "these would hold it better"
    rows: list[Sequence[str | float | None]] = [
        (f"  {each.ask}", each.kind, each.verdict, round(each.weights_gib, 1), round(each.gpu_gib, 1), each.kv_tokens)
        for each in shown.alternatives
    ]
    yield from table(("", "", "", "weights", "of GiB", "KV tokens"), rows)


def steps(asked: Question) -> list[Step]:
    """The roofline of a question; nothing where neither the model nor the card's speed is known."""
    of, card = asked.model, asked.host.card
    if of.shape is None or not card.tb_s:
        return []
    return roofline.steps(work(asked), typical(asked))


def work(asked: Question) -> roofline.Work:
    """What is decoded on what; `asked.model.shape` is known."""
    of = asked.model
    assert of.shape is not None
    four = of.scheme is not None and of.scheme.routed < 1
    return roofline.Work(of.shape, of.main, asked.layout, asked.host.card, asked.kv_type, four)
