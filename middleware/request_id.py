"""Outermost: the request's context, `x-request-id` on every answer, and one log line when the body has ended."""

from __future__ import annotations

from gateway import context, log
from gateway.config import Settings
from gateway.wire.asgi import App, Message, Receive, Scope, Send


class RequestId:
    """Makes the RequestContext; nothing below may be without it."""

    def __init__(self, app: App, settings: Settings) -> None:
        self._app = app
        self._log_requests = settings.log.requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = scope[context.KEY] = context.RequestContext(scope)
        header = (b"x-request-id", record.request_id.encode("latin-1"))

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], header]
                record.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            if self._log_requests:
                log.request(record)
