"""JSON answers that are asked for as streams (`retry.hedge_json`): a host that dies or falls silent is noticed at once.

What breaks is continued on another host where that can be done; else it is begun anew on another one, since nothing has reached the client:
a retry like any other, out of the budget.
"""

from __future__ import annotations

import asyncio
import time

from gateway.plugin import AttemptFailed, Gathering, Reply, Usage, Verdict
from gateway.serving.dispatch import Dispatcher, Exchange, reason
from gateway.serving.kept import Kept
from gateway.serving.relay import MAX_KEPT_BYTES, log
from gateway.serving.watch import Watch
from gateway.telemetry.log import about
from gateway.telemetry.record import ANSWER, CLIENT, Attempt, Record
from gateway.wire.asgi import Send


async def whole(exchange: Exchange, gathering: Gathering, dispatcher: Dispatcher, silence_s: float, send: Send) -> None:
    """From the first attempt to the answer's end; raises GatewayError."""
    record, watch = exchange.record, exchange.watch
    attempt: Attempt | None = None
    told = False
    try:
        attempt = await dispatcher.begin(exchange)
        body: bytes | None = None
        gathered = _Gathered(gathering, bool(exchange.terms.keep))
        while body is None:
            reply = attempt.reply
            assert reply is not None
            record.enter(ANSWER)
            try:
                await gathered.listen(attempt, reply, watch, silence_s)
                body = gathering.whole()
                attempt.end(Verdict.OK)
            except (AttemptFailed, asyncio.CancelledError) as error:
                failure = watch.as_failure(error, "The engine stopped sending in the middle of the answer.")
                watch.to_client()
                attempt = await _another(exchange, dispatcher, attempt, reply, gathered, failure)
                if not attempt.continues:
                    again = exchange.served.pool.backend.gather(record.call) if record.call is not None else None
                    assert again is not None, "it was one before"
                    gathering, gathered = again, _Gathered(again, bool(exchange.terms.keep))
        record.enter(CLIENT)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        told = True
        watch.end()
        if record.sampled:
            record.answer = body
        await send({"type": "http.response.body", "body": body})
    finally:
        if attempt is not None:
            attempt.end(None, "given up")
        if not told:
            _nobody_has_it(record)


class _Gathered:
    """What came of one answer so far: put together, and as it came while it may have to be continued."""

    def __init__(self, gathering: Gathering, keep: bool) -> None:
        self._gathering = gathering
        self.kept = Kept() if keep else None

    async def listen(self, attempt: Attempt, reply: Reply, watch: Watch, silence_s: float) -> None:
        """To the end of the reply; raises AttemptFailed."""
        host = attempt.host
        held, attempt.held = attempt.held, b""  # which was read before it was sure that the answer is wanted
        while True:
            watch.to_engine(time.monotonic() + silence_s)
            block = held or await reply.next()
            held = b""
            watch.to_client()
            if not block:
                return
            if host is not None:
                host.last_event_at = time.monotonic()
            self._gathering.add(block)
            kept = self.kept
            if kept is not None:
                kept.fresh.append(block)
                if len(kept.fresh) > 16:
                    kept.pack()
                    if kept.size > MAX_KEPT_BYTES:
                        self.kept = None


async def _another(
    exchange: Exchange, dispatcher: Dispatcher, broken: Attempt, reply: Reply, gathered: _Gathered, failure: AttemptFailed
) -> Attempt:
    """Whoever goes on with an answer that broke, or begins it anew; raises GatewayError."""
    record, host, why = exchange.record, broken.host, reason(failure, broken.target)
    broken.end(failure.verdict, failure.cause, why)
    resumed = await dispatcher.resume(exchange, broken, reply, gathered.kept.whole()) if gathered.kept is not None else None
    if resumed is None:
        if host is not None:
            host.broke += 1
        _nobody_has_it(record)
        exchange.tried = {attempt.target for attempt in record.attempts}
        attempt = await dispatcher.begin(exchange, failure)
        log.info("%s is begun anew at %s: %s", record.request_id, attempt.target, why, extra=about(record, attempt.target, why))
        return attempt
    if resumed.host is not None:
        if host is not None:
            host.moved += 1
        log.info("%s goes on at %s: %s", record.request_id, resumed.target, why, extra=about(record, resumed.target, why))
    return resumed


def _nobody_has_it(record: Record) -> None:
    """What was generated counts, but none of it has reached the client."""
    if record.usage is None:
        return
    wasted: asyncio.Future[Usage | None] = asyncio.get_running_loop().create_future()
    wasted.set_result(record.usage)
    record.late.append(wasted)
    record.usage = None
