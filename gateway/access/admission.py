"""One decision, one place: every limit of a request at once after its body was read, and one settlement when its answer has ended."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

from gateway.access import ledger
from gateway.access.keys import Caller
from gateway.access.ledger import Days
from gateway.access.limits import rules
from gateway.access.limits.estimate import Estimator
from gateway.access.limits.rules import QUOTA, RATE, Ask, Decision, Lease, Limit, Row, State, Store, StoreFailed, Unit
from gateway.config import Settings
from gateway.errors import Headers, InvalidRequest, LimitReached, Unavailable
from gateway.plugin import Call, Endpoint, Usage
from gateway.serving import calls
from gateway.telemetry.metrics import LIMITED, Metrics
from gateway.telemetry.record import Record

log = logging.getLogger("penstock.limits")

# How long after an answer's end its backend may take to learn what a generation that nobody waited for had come to.
TAILS_S = 2.0
# Endpoints that generate; of all others only the prompt is counted.
_GENERATES = frozenset([Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES, Endpoint.MESSAGES])
_GRAMMARS = ("response_format", "regex", "ebnf", "json_schema", "structural_tag", "text")
_UNITS = {
    Unit.REQUESTS: "requests per minute (rpm)",
    Unit.TOKENS: "tokens per minute (tpm)",
    Unit.IN_FLIGHT: "requests in flight (max_in_flight)",
    Unit.DAY: "tokens per day (tokens_per_day)",
}

_REQUESTS, _TOKENS, _DAY = Unit.REQUESTS, Unit.TOKENS, Unit.DAY
_REQUEST_HEADERS, _TOKEN_HEADERS = (
    tuple(b"x-ratelimit-%s-%s" % (what, of) for what in (b"limit", b"remaining", b"reset")) for of in (b"requests", b"tokens")
)


class Held:
    """What one request holds from its admission to its settlement."""

    __slots__ = ("choices", "cost", "lease", "model", "size", "states", "tails")

    def __init__(self, call: Call, model: str, size: int, lease: Lease, states: Sequence[State]) -> None:
        # Not the call itself: a record outlives its answer, a prompt must not.
        self.choices, self.tails = call.choices, call.tails
        self.model = model
        self.size = size
        self.lease = lease
        # How the limits stood after it was admitted; what it costs is known when it is settled.
        self.states = states
        self.cost = 0.0


def verify(settings: Settings) -> None:
    """Raises ConfigError for a tokenizer that cannot be used."""
    for model, entry in settings.models.items():
        if entry.tokenizer is not None:
            Estimator(Path(entry.tokenizer), f"models.{model}.tokenizer")


class Admission:
    """Admits and settles, over whatever store is configured."""

    def __init__(self, settings: Settings, store: Store, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics
        self._days = Days(settings.limits.timezone)
        self._prices = {model: entry.price for model, entry in settings.models.items()}
        self._estimators = {
            model: Estimator(Path(entry.tokenizer) if entry.tokenizer is not None else None, f"models.{model}.tokenizer")
            for model, entry in settings.models.items()
        }
        # Only then does anybody want to know what an answer came to that nobody waited for.
        self._metered = bool(settings.keys_required() or settings.limited())
        self._settling: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """See `Store`."""
        await self._store.open()

    async def aclose(self) -> None:
        """Settle what is still to be settled."""
        if self._settling:
            await asyncio.wait(self._settling, timeout=TAILS_S)
        await self._store.aclose()

    async def admit(self, call: Call, model: str, record: Record) -> None:
        """Let a request pass, and note what it holds in its record; raises LimitReached, or InvalidRequest for what its key may not ask."""
        caller: Caller = record.caller
        size, prompt = await self._estimators[model].prompt(call.fields)
        call.prompt_tokens = prompt
        bound = calls.bound(call)
        _refuse_excess(call, caller, size, bound)
        call.metered = self._metered
        call.salt = caller.salt
        completion = self._estimators[model].completion(call.choices, bound) if call.endpoint in _GENERATES else 0
        asks = [Ask(limit.key, limit, 1.0) if limit.each else self._ask(limit, model, prompt, completion) for limit in caller.limits(model)]
        lease = Lease(call.id, caller.name, model, asks)
        try:
            decision = await self._store.admit(lease)
        except StoreFailed:
            raise Unavailable("The store that keeps the limits does not answer.", code="limits_unavailable", retry_after_s=1) from None
        if decision.states:
            record.headers += headers(asks, decision.states)
        if decision.refused is not None:
            self._metrics.add(LIMITED, (decision.refused.unit, model))
            raise _refusal(decision.refused, decision, asks)
        record.held = Held(call, model, size, lease, decision.states)

    def _ask(self, limit: Limit, model: str, prompt: int, completion: int) -> Ask:
        if limit.kind == RATE:
            if prompt > limit.burst:
                raise LimitReached(
                    f"Request too large for {limit.whose} on {_UNITS[limit.unit]}: at most {limit.burst:.0f} at once, "
                    f"and the prompt has about {prompt}.",
                    type="tokens",
                    should_retry=False,
                )
            return Ask(limit.key, limit, min(float(prompt + completion), limit.burst))
        now = time.time()
        name, end = self._days.at(now)[limit.period]
        money = limit.unit is Unit.MONEY
        cost = ledger.cost(self._prices[model], prompt, 0, completion) if money else prompt + completion
        return Ask(f"{limit.key}/{name}", limit, float(cost), end - now)

    def settle(self, record: Record) -> None:
        """The answer has ended: charge what it really took. Where that is not known yet, in the background."""
        held: Held = record.held
        if held.tails:
            task = asyncio.get_running_loop().create_task(self._settle_later(record, held))
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)
        else:
            self._settle(record, held, ())

    async def _settle_later(self, record: Record, held: Held) -> None:
        done, late = await asyncio.wait(held.tails, timeout=TAILS_S)
        for tail in late:
            tail.cancel()
        self._settle(record, held, [tail.result() for tail in done if not tail.cancelled() and tail.exception() is None])

    def _settle(self, record: Record, held: Held, given_up: Sequence[Usage | None]) -> None:
        usage, model = record.usage, held.model
        record.delivered = usage.completion_tokens if usage is not None else 0
        generated, estimated = _generated(usage, given_up)
        if usage is not None and not record.outcome and not usage.estimated:
            self._estimators[model].learn(held.size, usage.prompt_tokens, usage.completion_tokens // held.choices)
        prompt = max([found.prompt_tokens for found in (usage, *given_up) if found is not None], default=0)
        row = ledger.counts(record, generated, estimated, self._prices[model])
        tokens = prompt + generated
        held.cost = row.get("cost", 0) / rules.NANO
        costs = [
            1.0 if ask.limit.each else float(row.get("cost", 0) if ask.limit.unit is Unit.MONEY else tokens) for ask in held.lease.asks
        ]
        self._store.settle(held.lease, costs, Row(self._days.at(time.time())["day"][0], held.lease.key, model, row))
        self._metrics.used(held.lease.key, model, row)


def _generated(usage: Usage | None, given_up: Sequence[Usage | None]) -> tuple[int, int]:
    """Completion tokens that engines made for this request, and how many of them are our own estimate."""
    generated = usage.completion_tokens if usage is not None else 0
    estimated = generated if usage is not None and usage.estimated else 0
    for tail in given_up:
        if tail is not None:  # what it says comes on top of what the reply said, and corrects it
            generated += tail.completion_tokens
            estimated = estimated + tail.completion_tokens if tail.estimated else 0
    return max(0, generated), max(0, estimated)


def _refuse_excess(call: Call, caller: Caller, size: int, bound: int | None) -> None:
    """What a key may never ask for in one request."""
    if caller.max_n is not None and call.choices > caller.max_n * call.prompts:
        raise InvalidRequest(f"'n' is over what your key may ask for: at most {caller.max_n}.", param="n", code="invalid_value")
    if caller.max_tokens is not None:
        if bound is None:
            calls.limit(call, caller.max_tokens)
        elif bound > caller.max_tokens:
            name = calls.bounding(call)
            raise InvalidRequest(
                f"'{name}' is over what your key may ask for: at most {caller.max_tokens}.", param=name, code="invalid_value"
            )
    if caller.max_prompt_bytes is not None and size > caller.max_prompt_bytes:
        raise InvalidRequest(f"The prompt has {size} bytes; your key may send at most {caller.max_prompt_bytes}.", code="prompt_too_large")
    if caller.max_grammar_bytes is not None:
        for name in _GRAMMARS:
            if name in call.fields and len(memoryview(call.fields[name])) > caller.max_grammar_bytes:
                raise InvalidRequest(
                    f"'{name}' is larger than your key may send: at most {caller.max_grammar_bytes} bytes.",
                    param=name,
                    code="grammar_too_large",
                )


def _refusal(limit: Limit, decision: Decision, asks: Sequence[Ask]) -> LimitReached:
    if limit.kind == QUOTA:
        ends_s = next(ask.ends_s for ask in asks if ask.limit is limit)
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + ends_s + 1))
        what = (
            f"budget of {limit.amount / rules.NANO:g} a {limit.period}"
            if limit.unit is Unit.MONEY
            else f"{limit.amount:.0f} {_UNITS[limit.unit]}"
        )
        return LimitReached(
            f"You exceeded your current quota: {limit.whose}, {what}. It is renewed at {at}.",
            type="insufficient_quota",
            code="insufficient_quota",
            should_retry=False,
        )
    # The SDKs wait whole milliseconds; a fraction less would be refused again.
    wait_ms = math.ceil(decision.wait / 1000)
    return LimitReached(
        f"Rate limit reached for {limit.whose} on {_UNITS[limit.unit]}: limit {limit.amount:.0f}. Please try again in {duration(wait_ms)}.",
        type="tokens" if limit.unit is Unit.TOKENS else "requests",
        retry_after_s=wait_ms / 1000,
    )


def headers(asks: Sequence[Ask], states: Sequence[State]) -> Headers:
    """`x-ratelimit-*` for requests and for tokens: of several limits the one with the least left."""
    requests: tuple[float, float, Limit] | None = None
    tokens: tuple[float, float, Limit] | None = None
    for ask, (remaining, reset) in zip(asks, states, strict=True):
        unit = ask.limit.unit
        if unit is _REQUESTS:
            if requests is None or remaining < requests[0]:
                requests = (remaining, reset, ask.limit)
        elif (unit is _TOKENS or unit is _DAY) and (tokens is None or remaining < tokens[0]):
            tokens = (remaining, reset, ask.limit)
    result: Headers = []
    for found, (limit, left, again) in ((requests, _REQUEST_HEADERS), (tokens, _TOKEN_HEADERS)):
        if found is not None:
            remaining = found[0] if found[0] > 0 else 0
            result += [(limit, b"%d" % found[2].amount), (left, b"%d" % remaining), (again, duration(found[1] / 1000).encode())]
    return result


def duration(milliseconds: float) -> str:
    """As OpenAI writes it, which is as Go does: `12ms`, `1s`, `6m0s`, `1m30.5s`."""
    whole = math.ceil(milliseconds)
    if whole < 1000:
        return f"{max(0, whole)}ms"
    minutes, whole = divmod(whole, 60_000)
    hours, minutes = divmod(minutes, 60)
    rest = f"{whole / 1000:.3f}".rstrip("0").rstrip(".")
    return f"{f'{hours}h' if hours else ''}{f'{minutes}m' if hours or minutes else ''}{rest}s"
