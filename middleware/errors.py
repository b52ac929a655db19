"""Any exception becomes one OpenAI-shaped answer; what only the operator may know goes into the record."""

from __future__ import annotations

import asyncio
import logging

from gateway.errors import ClientGone, Unavailable, as_gateway_error, render
from gateway.telemetry.log import about
from gateway.telemetry.record import Record
from gateway.wire.asgi import App, Receive, Scope, Send

log = logging.getLogger("penstock.errors")


class Errors:
    """Answers for whatever was raised before the response began; afterwards the relay has told the client already."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = Record.of(scope)
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError as raised:
            record.end(raised)
            if not record.status:
                stopping = Unavailable("The gateway is shutting down.", code="shutting_down", headers=[(b"connection", b"close")])
                await _answer(stopping, record, send)
        except Exception as raised:
            error = as_gateway_error(raised)
            record.end(raised)
            if isinstance(error, ClientGone):
                record.status = error.status
                return
            if error is not raised:  # of all else the request's own line says why
                log.error("%s: unforeseen", record.request_id, exc_info=raised, extra=about(record))
            if not record.status:
                await _answer(error, record, send)
        else:
            record.end(None)


async def _answer(error: Exception, record: Record, send: Send) -> None:
    status, headers, content = render(as_gateway_error(error), record.request_id, record.shape)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
