"""Whether a model fits its GPUs, why, and what else would."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import msgspec

from backends.sglang_dsv3.engine.plan import memory, published, question, weights
from backends.sglang_dsv3.engine.plan.gpus import CARDS, GIB, Card, Host
from backends.sglang_dsv3.engine.plan.memory import Layout
from backends.sglang_dsv3.engine.plan.question import Model, Question

Word = Literal["fits", "tight", "does not fit"]
# Less of a GPU than this for the KV cache is tight.
_AMPLE = 0.10
_SHORTEST = 1024


class Room(msgspec.Struct, frozen=True):
    """One GPU's memory in GiB, and what is left of it for the KV cache, in tokens of the whole engine. `limit`: for weights and KV cache
    together; `headroom`: what of it weights leave; `own`: where SGLang chooses the fraction; `smallest_fraction`: that holds one request of
    the context, and all of them."""

    gpu_gib: float
    weights_gib: float
    absorbed_gib: float
    fraction: float
    limit_gib: float
    headroom_gib: float
    free_gib: float
    outside_gib: float
    chunk: int | None
    kv_bytes_per_token: float | None
    kv_bytes_per_request: float
    kv_tokens: int | None
    requests: int | None
    own_fraction: float
    own_kv_tokens: int | None
    smallest_fraction: float
    smallest_fraction_all: float

    @property
    def holds(self) -> bool:
        """Whether one request of the context fits beside the weights."""
        return self.smallest_fraction <= self.limit_gib / self.gpu_gib


class Verdict(msgspec.Struct, frozen=True):
    """The word, its reasons, and what an operator should set or know."""

    word: Word
    why: list[str]
    notes: list[str]
    room: Room


class Alternative(msgspec.Struct, frozen=True):
    """What else would do: as it is asked for, and how it fits."""

    ask: str
    kind: str
    verdict: Word
    weights_gib: float
    gpu_gib: float
    kv_tokens: int | None


def room(asked: Question) -> Room:
    """The arithmetic of one GPU."""
    of, layout, gib = asked.model, asked.layout, asked.host.card.gib
    share = max(0.0, memory.weights(of.main, of.mtp, layout) / GIB - asked.offload_gib)
    limit = asked.fraction * gib if asked.fraction is not None else memory.most(gib)
    own = 1 - memory.reserved(gib, layout, asked.concurrency, asked.chunk) / gib
    absorbed, token, request = 0.0, None, 0.0
    if of.shape is not None:
        token, request = memory.cache(of.shape, asked.kv_type, layout.drafts)
        absorbed = memory.absorbed(of.shape, layout) / GIB

    def tokens(free_gib: float) -> int | None:
        # V4's windows are kept for each of the requests that may run at once.
        left = free_gib * GIB - request * math.ceil(asked.concurrency / layout.dp)
        return max(0, int(left / token)) * layout.dp if token is not None else None

    one = ((token or 0.0) * asked.context + request) / GIB
    group = math.ceil(asked.concurrency / layout.dp)
    found, own_found = tokens(limit - share), tokens(own * gib - share)
    return Room(
        gib, share, absorbed, limit / gib, limit, limit - share, gib - share, gib - limit,
        memory.fitting_chunk(gib, layout, asked.concurrency, gib - limit), token, request, found,
        found // asked.context if found is not None else None, own, own_found, (share + one) / gib, (share + one * group) / gib,
    )  # fmt: skip


def unable(card: Card, of: Model) -> str | None:
    """Why a GPU cannot compute with what a model is stored in; None where it can, or nobody says that it cannot."""
    how = of.scheme
    if how is None or (card.bf16 is None and card.capability is None):
        return None
    if card.capability is None:
        return None if card.name in how.rocm else f"{card.name} does not run {how.title}: {_able(how)} do"
    if how.capability is None or card.capability >= how.capability:
        return None
    return f"{card.name} has no arithmetic for {how.title} (compute capability {card.capability / 10:.1f}): {_able(how)} do"


def _able(how: weights.Scheme) -> str:
    able = [card.name for card in CARDS if (card.capability or 0) >= (how.capability or 0) and card.capability is not None]
    return ", ".join(dict.fromkeys([*able, *how.rocm]))


def judge(asked: Question) -> Verdict:
    """The word and its reasons."""
    found, card = room(asked), asked.host.card
    why: list[str] = []
    if (problem := unable(card, asked.model)) is not None:
        why.append(problem)
    if found.headroom_gib <= 0:
        why.append(
            f"weights take {found.weights_gib:.1f} GiB of each GPU, which has {found.gpu_gib:.1f}; {found.limit_gib:.1f} "
            f"({found.fraction:.2f}) can be theirs and the KV cache's, so {-found.headroom_gib:.1f} are missing"
        )
    elif not found.holds:
        why.append(
            f"weights leave {found.headroom_gib:.1f} GiB of each GPU for the KV cache, and one request of {asked.context:,} tokens takes "
            f"{(found.smallest_fraction * found.gpu_gib) - found.weights_gib:.1f}"
        )
    if why:
        return Verdict("does not fit", why, [], found)
    if found.headroom_gib < _AMPLE * found.gpu_gib:
        why.append(f"only {found.headroom_gib:.1f} GiB of each GPU ({found.headroom_gib / found.gpu_gib:.0%}) are left for the KV cache")
    if asked.fraction is None and found.smallest_fraction > found.own_fraction:
        smaller = (
            f" and chunked_prefill_size {found.chunk}" if found.chunk is not None and found.chunk < memory.chunk(found.gpu_gib) else ""
        )
        why.append(f"SGLang's own fraction ({found.own_fraction:.3f}) does not hold it: set memory_fraction {found.fraction:.2f}{smaller}")
    if asked.fraction is not None and found.limit_gib > memory.most(found.gpu_gib):
        why.append(f"memory_fraction {asked.fraction} leaves {found.outside_gib:.1f} GiB for activations, graphs and NCCL")
    notes = list(asked.model.notes)
    if found.requests is not None and found.requests < asked.concurrency:
        notes.append(
            f"of {asked.concurrency} requests at once {found.requests} can be {asked.context:,} tokens long; more wait, or are shorter"
        )
    return Verdict("tight" if why else "fits", why or [_fine(found)], notes, found)


def _fine(found: Room) -> str:
    return f"{found.headroom_gib:.1f} GiB of each GPU ({found.headroom_gib / found.gpu_gib:.0%}) are left for the KV cache"


def alternatives(asked: Question) -> list[Alternative]:
    """What fits in the place of a question that does not, or fits better than one that is tight."""
    tight = judge(asked).word == "tight"
    found: list[Alternative] = []
    for ask, kind, other in _others(asked):
        said = judge(other)
        if said.word == "does not fit" or (tight and said.word == "tight"):
            continue
        found.append(Alternative(ask, kind, said.word, said.room.weights_gib, said.room.gpu_gib, said.room.kv_tokens))
    return sorted(found, key=lambda each: each.verdict != "fits")


def _others(asked: Question) -> Iterator[tuple[str, str, Question]]:
    """Questions near this one, each as it would be asked."""
    of, host = asked.model, asked.host
    for card in CARDS:
        for count in (4, 8):
            other = Host(1, count, card)
            if (other.spec, count) == (host.spec, host.total):
                continue
            variant = _on(asked, other)
            if variant is not None and judge(variant).word != "does not fit":
                yield f"--gpus {other.spec}", "another node", variant
                break
    for nodes, each in ((2, host.each), (2, 8), (4, 8)):
        variant = _on(asked, Host(nodes, each, host.card)) if nodes * each > host.total else None
        if variant is not None and judge(variant).word != "does not fit":
            yield f"--gpus {variant.host.spec}", "more nodes of the same", variant
            break
    if of.shape is None:
        return
    cannot = unable(host.card, of) is not None
    for how in weights.SCHEMES if of.shape.compress_ratios is None and of.scheme is not None else ():
        # V3 in MXFP4 is AMD's alone.
        if how == of.scheme or (how.name == "mxfp4" and host.card.capability is not None):
            continue
        main, mtp = weights.computed(of.shape, how)
        stored = msgspec.structs.replace(of, scheme=how, stored=how.title, main=main, mtp=mtp)
        if (cannot or main.total < of.main.total) and (variant := _of(asked, stored)) is not None:
            yield f"--quantization {how.name}", "another checkpoint of it", variant
    if of.shape.compress_ratios is None and memory.KV_TYPES[asked.kv_type] > 1:
        yield "--kv-cache-dtype fp8_e4m3", "a smaller KV cache", msgspec.structs.replace(asked, kv_type="fp8_e4m3")
    if not room(asked).holds:
        length = 1 << (asked.context - 1).bit_length() - 1
        while length >= _SHORTEST:
            variant = msgspec.structs.replace(asked, context=length)
            if room(variant).holds:
                yield f"--context {length}", "shorter requests", variant
                break
            length //= 2
    for known, scheme in ((published.model("V4-Flash"), "mxfp4"), (published.model("V4-Flash"), "fp8")):
        if of.main.total > 1.1 * weights.computed(known.shape, weights.scheme(scheme))[0].total:
            other_model = question.named(known, scheme)
            short = min(asked.context, known.shape.max_position_embeddings)
            variant = _of(msgspec.structs.replace(asked, context=short), other_model)
            if variant is not None:
                yield f"{known.name} --quantization {scheme}", "another model of the family", variant


def _on(asked: Question, host: Host) -> Question | None:
    """The same model on other GPUs, plainly spread; None where that cannot be."""
    try:
        layout: Layout = question.spread(host, asked.model, drafts=asked.layout.drafts)
    except ValueError:
        return None
    return msgspec.structs.replace(asked, host=host, layout=layout, fraction=None, offload_gib=0, chunk=None)


def _of(asked: Question, model: Model) -> Question | None:
    """Another model on the same GPUs; None where that cannot be."""
    try:
        layout = question.layout(asked.host, model.shape, model.scheme, asked.layout)
    except ValueError:
        return None
    return msgspec.structs.replace(asked, model=model, layout=layout)
