"""Rate limits, budgets and the ledger, around everything that is done for a request once its body was read.

What a request may take can only be said when it is known what it asks for. So this wraps the answer and not the connection:
`async with rate_limit.admitted(...)` takes every limit of the request at once, or refuses it; gives the terms on which it is served; and
settles at its exit, however that came about, once, by what engines really made of it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from gateway.access import ledger
from gateway.access.keys import Caller
from gateway.access.ledger import Days
from gateway.access.limits import rules
from gateway.access.limits.estimate import Estimator, prompt_bytes
from gateway.access.limits.rules import QUOTA, RATE, Ask, Decision, Lease, Limit, Row, State, Store, StoreFailed, Unit
from gateway.config import Settings
from gateway.errors import Headers, InvalidRequest, LimitReached, Unavailable
from gateway.plugin import BOUNDS, Call, Terms, Usage
from gateway.serving import calls
from gateway.serving.registry import Served
from gateway.supervision import once
from gateway.telemetry.metrics import LIMITED, Metrics
from gateway.telemetry.record import Record

# How long after an answer's end its backend may take to learn what a generation that nobody waited for had come to.
LATE_S = 2.0
_GRAMMARS = ("response_format", "regex", "ebnf", "json_schema", "structural_tag", "text")
_UNITS = {
    Unit.REQUESTS: "requests per minute (rpm)",
    Unit.TOKENS: "tokens per minute (tpm)",
    Unit.IN_FLIGHT: "requests in flight (max_in_flight)",
    Unit.DAY: "tokens per day (tokens_per_day)",
}

_REQUESTS: Final = Unit.REQUESTS
_TOKENS: Final = Unit.TOKENS
_DAY: Final = Unit.DAY
_MONEY: Final = Unit.MONEY
_REQUEST_HEADERS: Final = (b"x-ratelimit-limit-requests", b"x-ratelimit-remaining-requests", b"x-ratelimit-reset-requests")
_TOKEN_HEADERS: Final = (b"x-ratelimit-limit-tokens", b"x-ratelimit-remaining-tokens", b"x-ratelimit-reset-tokens")


def verify(settings: Settings) -> None:
    """Raises ConfigError for a tokenizer that cannot be used."""
    for model, entry in settings.models.items():
        if entry.tokenizer is not None:
            Estimator(Path(entry.tokenizer), f"models.{model}.tokenizer")


class RateLimit:
    """Admits and settles, over whatever store is configured."""

    def __init__(self, settings: Settings, store: Store, metrics: Metrics) -> None:
        self.store = store
        self.metrics = metrics
        self.days = Days(settings.limits.timezone)
        self.prices = {model: entry.price for model, entry in settings.models.items()}
        self.estimators = {
            model: Estimator(Path(entry.tokenizer) if entry.tokenizer is not None else None, f"models.{model}.tokenizer")
            for model, entry in settings.models.items()
        }
        # Only then does anybody want to know what an answer came to that nobody waited for.
        self.metered = bool(settings.keys_required() or settings.limited())
        self.continuations = settings.retry.max_continuations > 0
        # Since somebody last took note of it: when callers have called, and which quotas refused a request.
        self.called: dict[str, float] = {}
        self.exhausted: set[str] = set()
        self._settling: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """See `Store`."""
        await self.store.open()

    async def aclose(self) -> None:
        """Settle what is still to be settled."""
        if self._settling:
            await asyncio.wait(self._settling, timeout=LATE_S)
        await self.store.aclose()

    def admitted(self, call: Call, served: Served, record: Record) -> Admitted:
        """`async with` it: gives the Terms; raises LimitReached, Unavailable, or InvalidRequest for what its key may not ask."""
        return Admitted(self, call, served, record)

    def later(self, admitted: Admitted) -> asyncio.Task[None]:
        """Settle when late usage was told, or not in time."""
        task = once("settlement", admitted.settle_late(), self.metrics.failed)
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        return task


class Admitted:
    """One request's passage: what it holds from its admission to its settlement."""

    __slots__ = ("_call", "_choices", "_lease", "_limits", "_model", "_prompt_tokens", "_record", "_served", "_size")

    def __init__(self, limits: RateLimit, call: Call, served: Served, record: Record) -> None:
        self._limits = limits
        self._call: Call | None = call
        self._served = served
        self._record = record
        self._model = served.name
        self._choices = call.choices
        self._size = self._prompt_tokens = 0
        self._lease: Lease | None = None

    async def __aenter__(self) -> Terms:
        limits, call, record, model = self._limits, self._call, self._record, self._model
        assert call is not None
        self._call = None  # a prompt must not outlive its answer
        caller: Caller = record.caller
        estimator, spec = limits.estimators[model], calls.SPECS[call.endpoint]
        size, prompt = prompt_bytes(call.fields, spec.prompt), 0
        self._size = size
        if spec.computes:
            prompt = await estimator.count(call.fields, spec.prompt, size) if estimator.counts else estimator.guess(size)
        self._prompt_tokens = prompt
        bound: int | None = None
        completion = 0
        if call.endpoint in BOUNDS:
            bound = _bound(call, caller, self._served.entry.default_max_tokens)
            completion = estimator.completion(call.choices, bound)
        _refuse_excess(call, caller, size)
        asks = [Ask(limit.key, limit, 1.0) if limit.each else self._ask(limit, prompt, completion) for limit in caller.limits(model)]
        lease = Lease(call.id, caller.name, model, asks)
        try:
            decision = await limits.store.admit(lease)
        except StoreFailed:
            raise Unavailable("The store that keeps the limits does not answer.", code="limits_unavailable", retry_after_s=1) from None
        states, refused = decision.states, decision.refused
        if states:  # none where limits are open
            record.headers += headers(asks, states)
            record.limits = [(ask.limit, ask.cost, states[number]) for number, ask in enumerate(asks)]
        if refused is not None:
            raise self._refused(refused, _refusal(refused, decision, asks))
        self._lease = lease
        mode = self._served.entry.continuation
        kept = call.stream and mode != "off" and limits.continuations and self._served.pool.backend.resumable(call)
        return Terms(bound, prompt, caller.salt, limits.metered, mode if kept and mode != "off" else "", record.point, caller.priority)

    def _ask(self, limit: Limit, prompt: int, completion: int) -> Ask:
        if limit.kind == RATE:
            if prompt > limit.burst:
                too_large = (
                    f"Request too large for {limit.whose} on {_UNITS[limit.unit]}: at most {limit.burst:.0f} at once, "
                    f"and the prompt has about {prompt}."
                )
                raise self._refused(limit, LimitReached(too_large, type="tokens", should_retry=False))
            return Ask(limit.key, limit, min(float(prompt + completion), limit.burst))
        now = time.time()
        name, end = self._limits.days.at(now)[limit.period]
        money = limit.unit is Unit.MONEY
        cost = ledger.cost(self._limits.prices[self._model], prompt, 0, completion) if money else prompt + completion
        return Ask(f"{limit.key}/{name}", limit, float(cost), end - now)

    def _refused(self, limit: Limit, error: LimitReached) -> LimitReached:
        """Count it, and note which limit it was."""
        limits, record = self._limits, self._record
        key = record.caller.name
        record.refused_by = limit
        now = time.time()
        periods = limits.days.at(now)
        limits.called[key] = now
        if limit.kind == QUOTA:
            limits.exhausted.add(f"{limit.key}/{periods[limit.period][0]}")
        limits.metrics.add(LIMITED, (limit.unit, self._model, key))
        limits.store.count(Row(periods["day"][0], key, self._model, ledger.LIMITED))
        return error

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """The answer has ended: charge what it really took. Where that is not known yet, in the background."""
        record = self._record
        record.end(error)
        if record.late:
            record.settling = self._limits.later(self)
        else:
            self._settle(())

    async def settle_late(self) -> None:
        """When the engines have told what the generations came to that nobody waited for, or have not in time."""
        done, missing = await asyncio.wait(self._record.late, timeout=LATE_S)
        for future in missing:
            future.cancel()
        self._settle([future.result() for future in done if not future.cancelled() and future.exception() is None])

    def _settle(self, late: Sequence[Usage | None]) -> None:
        limits, record, model, lease = self._limits, self._record, self._model, self._lease
        assert lease is not None
        usage = record.usage
        record.delivered = usage.completion_tokens if usage is not None else 0
        generated, estimated = _generated(usage, late)
        if usage is not None and record.outcome == "ok" and not usage.estimated:
            limits.estimators[model].learn(self._size, usage.prompt_tokens, usage.completion_tokens // self._choices)
        if (wasted := record.wasted) is not None:
            generated += wasted.completion_tokens
            estimated += wasted.completion_tokens if wasted.estimated else 0
        prompt = usage.prompt_tokens if usage is not None else 0
        for found in late:
            if found is not None and found.prompt_tokens > prompt:
                prompt = found.prompt_tokens
        if not prompt and record.prefilled:
            prompt = self._prompt_tokens  # no engine said how many, but one has worked on them
        row = ledger.counts(record, prompt, generated, estimated, limits.prices[model])
        tokens = prompt + generated
        money = row.get("cost", 0)
        record.cost = money / rules.NANO
        costs = [1.0 if ask.limit.each else float(money if ask.limit.unit is _MONEY else tokens) for ask in lease.asks]
        now = time.time()
        limits.called[lease.key] = now
        limits.store.settle(lease, costs, Row(limits.days.at(now)["day"][0], lease.key, model, row))
        limits.metrics.used(lease.key, model, row)


def _generated(usage: Usage | None, late: Sequence[Usage | None]) -> tuple[int, int]:
    """Completion tokens that engines made for this request, and how many of them are our own estimate."""
    generated = usage.completion_tokens if usage is not None else 0
    estimated = generated if usage is not None and usage.estimated else 0
    for more in late:
        if more is not None:  # what it says comes on top of what the reply said, and corrects it
            generated += more.completion_tokens
            estimated = estimated + more.completion_tokens if more.estimated else 0
    return max(0, generated), max(0, estimated)


def _bound(call: Call, caller: Caller, default: int | None) -> int | None:
    """The most tokens that a choice may have: the client's own word, or else the smaller of what its model and its key say."""
    own = calls.bound(call)
    most = caller.max_tokens
    if own is not None:
        if most is not None and own > most:
            name = calls.bounding(call)
            raise InvalidRequest(f"'{name}' is over what your key may ask for: at most {most}.", param=name, code="invalid_value")
        return own
    if default is None or most is None:
        return most if default is None else default
    return min(default, most)


def _refuse_excess(call: Call, caller: Caller, size: int) -> None:
    """What a key may never ask for in one request."""
    if caller.max_n is not None and call.choices > caller.max_n * call.prompts:
        raise InvalidRequest(f"'n' is over what your key may ask for: at most {caller.max_n}.", param="n", code="invalid_value")
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
    of_requests: Limit | None = None
    of_tokens: Limit | None = None
    requests_left = requests_reset = tokens_left = tokens_reset = 0.0
    for number, ask in enumerate(asks):
        limit = ask.limit
        unit = limit.unit
        left, reset = states[number]
        if unit is _REQUESTS:
            if of_requests is None or left < requests_left:
                of_requests, requests_left, requests_reset = limit, left, reset
        elif (unit is _TOKENS or unit is _DAY) and (of_tokens is None or left < tokens_left):
            of_tokens, tokens_left, tokens_reset = limit, left, reset
    result: Headers = []
    if of_requests is not None:
        result += _told(_REQUEST_HEADERS, of_requests, requests_left, requests_reset)
    if of_tokens is not None:
        result += _told(_TOKEN_HEADERS, of_tokens, tokens_left, tokens_reset)
    return result


def _told(names: tuple[bytes, bytes, bytes], limit: Limit, left: float, reset: float) -> Headers:
    remaining = str(int(left) if left > 0 else 0)
    return [(names[0], limit.amount_shown), (names[1], remaining.encode()), (names[2], duration(reset / 1000).encode())]


def duration(milliseconds: float) -> str:
    """As OpenAI writes it, which is as Go does: `12ms`, `1s`, `6m0s`, `1m30.5s`."""
    whole = math.ceil(milliseconds)
    if whole < 1000:
        return f"{max(0, whole)}ms"
    minutes, hours = whole // 60_000 % 60, whole // 3_600_000
    seconds, rest = whole // 1000 % 60, whole % 1000
    more = f".{rest:03d}".rstrip("0") if rest else ""
    return f"{f'{hours}h' if hours else ''}{f'{minutes}m' if hours or minutes else ''}{seconds}{more}s"
