"""Innermost: what a request was admitted with is settled once, when its body has ended, however it ended.

The decision itself comes later, when the body has been read (`gateway/access/admission.py`); the `x-ratelimit-*` headers stand in the
record, from where every answer to it gets them, refusals and failures included.
"""

from __future__ import annotations

from gateway.config import Settings
from gateway.errors import ClientGone, as_gateway_error
from gateway.life import Life
from gateway.telemetry.record import Record
from gateway.wire.asgi import App, Receive, Scope, Send


class RateLimit:
    """Owns a lease's life around the request."""

    def __init__(self, app: App, settings: Settings, life: Life) -> None:
        self._app = app
        self._life = life

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = Record.of(scope)
        try:
            await self._app(scope, receive, send)
        except BaseException as raised:
            # The ledger asks how it ended; who renders the error comes after us.
            if not record.outcome:
                record.outcome = "ClientGone" if isinstance(raised, ClientGone) else _code(raised)
            raise
        finally:
            if record.held is not None and self._life.admission is not None:
                self._life.admission.settle(record)


def _code(raised: BaseException) -> str:
    error = as_gateway_error(raised)
    return error.code or type(error).__name__
