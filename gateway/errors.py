"""Every error the gateway raises, and the one function that turns it into OpenAI's shape.

A `GatewayError` says what the client is told: status, type, code, parameter, message. What only the operator may know (an engine's
own words, a path, a traceback) goes into `detail`, which is logged and never rendered.
"""

from __future__ import annotations

import msgspec

Headers = list[tuple[bytes, bytes]]

# The OpenAI SDKs ignore (node) or give up on (python, above 120 s) a longer retry-after.
RETRY_AFTER_MAX_S = 60


class GatewayError(Exception):
    """A failure with a status and an OpenAI error body.

    `retry_after_s` is a promise to the client, in seconds; `should_retry` overrides the SDKs' own rule when it is not None.
    """

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        type: str | None = None,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        should_retry: bool | None = None,
        headers: Headers | None = None,
        detail: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status or self.status
        self.type = type or self.type
        self.code = code or self.code
        self.param = param
        self.retry_after_s = retry_after_s
        self.should_retry = should_retry
        self.headers: Headers = headers or []
        self.detail = detail


class InvalidRequest(GatewayError):
    """The request cannot be served as it stands; sending it again changes nothing."""

    status = 400
    type = "invalid_request_error"


class InvalidKey(InvalidRequest):
    """Missing, malformed or unknown key: one answer for all, so that nothing can be learnt from it."""

    status = 401
    code = "invalid_api_key"

    def __init__(self) -> None:
        super().__init__(
            "Incorrect API key provided. Send the key you were given as 'Authorization: Bearer KEY'.",
            headers=[(b"www-authenticate", b"Bearer")],
        )


class UnknownUrl(InvalidRequest):
    """No such route; nothing is ever proxied by default."""

    status = 404
    code = "unknown_url"

    def __init__(self, method: str, path: str) -> None:
        super().__init__(f"Unknown request URL: {method} {path}. Please check the URL for typos.")


class MethodNotAllowed(InvalidRequest):
    """The path exists, the method does not; `Allow` names those that do."""

    status = 405
    code = "method_not_supported"

    def __init__(self, method: str, path: str, allowed: list[str]) -> None:
        names = ", ".join(allowed)
        super().__init__(f"Not allowed to {method} on {path} (allowed: {names}).", headers=[(b"allow", names.encode("latin-1"))])


class UnknownModel(InvalidRequest):
    """The model is not in the configuration (or not for this key: the two are not told apart)."""

    status = 404
    code = "model_not_found"

    def __init__(self, model: str, known: list[str]) -> None:
        served = ", ".join(f"'{name}'" for name in known[:10])
        super().__init__(f"The model '{model}' does not exist. Served here: {served or 'none'}.", param="model")


class BodyTooLarge(InvalidRequest):
    """The request body is over `security.body_limit_mb`."""

    status = 413
    code = "request_too_large"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"The request body is larger than the limit of {limit_bytes // (1 << 20)} MB.")


class ClientGone(GatewayError):
    """The client closed its connection; never counted against an engine. 499 is NGINX's number for it."""

    status = 499

    def __init__(self) -> None:
        super().__init__("The client closed the connection.")


class Unavailable(GatewayError):
    """No engine can take the request now; another try after `retry_after_s` is honest advice."""

    status = 503
    type = "service_unavailable"


class BadGateway(GatewayError):
    """The engine died, refused us or answered nonsense."""

    status = 502
    code = "engine_error"


class GatewayTimeout(GatewayError):
    """The engine kept silent for longer than the configured bound."""

    status = 504
    code = "engine_timeout"


class ConfigError(Exception):
    """A configuration that must not start: `path` says where, the text what is wrong and what is accepted."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}" if path else problem)
        self.path = path
        self.problem = problem


class _Body(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class _Envelope(msgspec.Struct):
    error: _Body


_encoder = msgspec.json.Encoder()


def body(error: GatewayError, request_id: str = "") -> bytes:
    """`{"error": {message, type, param, code}}` as JSON bytes; a 5xx carries the request id so that a report can be traced."""
    message = error.message
    if request_id and error.status >= 500:
        message = f"{message} (request id: {request_id})"
    return _encoder.encode(_Envelope(_Body(message, error.type, error.param, error.code)))


def render(error: GatewayError, request_id: str = "") -> tuple[int, Headers, bytes]:
    """Status, headers and JSON body of an answer that has not begun yet."""
    content = body(error, request_id)
    headers: Headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(content)),
        *error.headers,
    ]
    if error.retry_after_s is not None:
        seconds = min(max(error.retry_after_s, 0.0), RETRY_AFTER_MAX_S)
        headers.append((b"retry-after", b"%d" % max(1, round(seconds))))
    if error.should_retry is not None:
        headers.append((b"x-should-retry", b"true" if error.should_retry else b"false"))
    return error.status, headers, content


def event(error: GatewayError, request_id: str = "") -> bytes:
    """The same body as one server-sent event, for a stream that has begun; both SDKs raise APIError on it."""
    return b"data: " + body(error, request_id) + b"\n\n"


def as_gateway_error(error: BaseException) -> GatewayError:
    """Any exception as something a client may see: foreign ones become a 500 without their words."""
    if isinstance(error, GatewayError):
        return error
    return GatewayError("The gateway failed to serve this request.", detail=f"{type(error).__name__}: {error}")
