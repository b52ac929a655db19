"""Any exception becomes one OpenAI-shaped answer; what only the operator may know goes into the log."""

from __future__ import annotations

import logging

from gateway.config import Settings
from gateway.errors import ClientGone, as_gateway_error, render
from gateway.life import Life
from gateway.telemetry.record import Record
from gateway.wire.asgi import App, Receive, Scope, Send

log = logging.getLogger("penstock.errors")


class Errors:
    """Answers for whatever was raised before the response began; afterwards the relay has told the client already."""

    def __init__(self, app: App, settings: Settings, life: Life) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except Exception as raised:
            record = Record.of(scope)
            error = as_gateway_error(raised)
            record.outcome = error.code or type(error).__name__
            if isinstance(error, ClientGone):
                record.status = error.status
                return
            if error is not raised:
                log.error("%s: unforeseen", record.request_id, exc_info=raised)
            elif error.detail:
                log.warning("%s: %s", record.request_id, error.detail)
            if not record.status:
                status, headers, content = render(error, record.request_id, record.shape)
                await send({"type": "http.response.start", "status": status, "headers": headers})
                await send({"type": "http.response.body", "body": content})
