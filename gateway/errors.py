"""Every error the gateway raises, and the one function that turns it into the shape an endpoint's clients parse (OpenAI's, mostly).

A `GatewayError` says what the client is told: status, type, code, parameter, message. What only the operator may know (an engine's
own words, a path, a traceback) goes into `detail`, which is logged and never rendered.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

from gateway.masking import masked, one_line, without_secrets
from gateway.wire.error import AnthropicError, AnthropicErrorDetail, Error, ErrorDetail, ResponsesErrorEvent, Shape
from gateway.wire.visible import visible

Headers = list[tuple[bytes, bytes]]

# Characters of a text that somebody else wrote, where it stands inside a message of ours; and of a whole message.
MAX_QUOTED = 256
MAX_MESSAGE = 2000

# The OpenAI SDKs ignore (node) or give up on (python, above 120 s) a longer retry-after.
RETRY_AFTER_MAX_S = 60


def shortened(text: str, limit: int = MAX_QUOTED) -> str:
    """A text of somebody else's as it may stand in a message: visible, at most so many characters, and where it was longer it says so."""
    return visible(text) if len(text) <= limit else f"{visible(text[:limit])}... ({len(text)} characters)"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


class GatewayError(Exception):
    """A failure with a status and an OpenAI error body.

    `retry_after_s` is a promise to the client, in seconds; `should_retry` overrides the SDKs' own rule when it is not None. No message and
    no detail is longer than MAX_MESSAGE, no name of a parameter than MAX_QUOTED, whatever they were made of.
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
        self.message = _cut(message, MAX_MESSAGE)
        super().__init__(self.message)
        self.status = status or self.status
        self.type = type or self.type
        self.code = code or self.code
        self.param = None if param is None else _cut(param, MAX_QUOTED)
        self.retry_after_s = retry_after_s
        self.should_retry = should_retry
        self.headers: Headers = headers or []
        # It may quote a library that quotes a URL.
        self.detail = None if detail is None else without_secrets(_cut(detail, MAX_MESSAGE))


class InvalidRequest(GatewayError):
    """The request cannot be served as it stands; sending it again changes nothing."""

    status = 400
    type = "invalid_request_error"


class InvalidKey(InvalidRequest):
    """No key (`sent` is False), or one that is malformed, unknown, revoked or expired: one answer for all these, so that nothing can be
    learnt from it. `why` is for the operator."""

    status = 401
    code = "invalid_api_key"

    def __init__(self, why: str | None = None, sent: bool = True) -> None:
        super().__init__(
            f"{'Incorrect API key' if sent else 'No API key'} provided. Send the key you were given as 'Authorization: Bearer KEY' "
            "or 'x-api-key: KEY'.",
            code=None if sent else "missing_api_key",
            headers=[(b"www-authenticate", b"Bearer")],
            detail=why,
        )


class UnknownUrl(InvalidRequest):
    """No such route; nothing is ever proxied by default. `hint`: what to do about it, a sentence."""

    status = 404
    code = "unknown_url"

    def __init__(self, method: str, path: str, hint: str = "") -> None:
        super().__init__(f"Unknown request URL: {shortened(method)} {shortened(path)}. {hint or 'Please check the URL for typos.'}")


class MethodNotAllowed(InvalidRequest):
    """The path exists, the method does not; `Allow` names those that do."""

    status = 405
    code = "method_not_supported"

    def __init__(self, method: str, path: str, allowed: list[str]) -> None:
        names = ", ".join(allowed)
        super().__init__(
            f"Not allowed to {shortened(method)} on {shortened(path)} (allowed: {names}).", headers=[(b"allow", names.encode("latin-1"))]
        )


class UnknownModel(InvalidRequest):
    """The model is not in the configuration (or not for this key: the two are not told apart)."""

    status = 404
    code = "model_not_found"

    def __init__(self, model: str, known: list[str]) -> None:
        served = ", ".join(f"'{name}'" for name in known[:10])
        super().__init__(f"The model '{shortened(model)}' does not exist. Served here: {served or 'none'}.", param="model")


class BodyTooLarge(InvalidRequest):
    """The request body is over `security.body_limit_mb`."""

    status = 413
    code = "request_too_large"

    def __init__(self, limit_bytes: int) -> None:
        limit = f"{limit_bytes >> 20} MB" if limit_bytes >= 1 << 20 else f"{limit_bytes >> 10} kB"
        super().__init__(f"The request body is larger than the limit of {limit}.", headers=[(b"connection", b"close")])


class UnsupportedEncoding(InvalidRequest):
    """The body is compressed in a way that is not known; `Accept-Encoding` names those that are."""

    status = 415
    code = "unsupported_content_encoding"

    def __init__(self, accepted: bytes) -> None:
        super().__init__(
            f"The content encoding of the request body is not supported; accepted: {accepted.decode()}.",
            param="content-encoding",
            headers=[(b"accept-encoding", accepted)],
        )


class NoSuchResponse(InvalidRequest):
    """No answer is kept under this id, or it is another key's: the two are not told apart."""

    status = 404
    code = "response_not_found"

    def __init__(self, id: str, param: str = "response_id") -> None:
        super().__init__(f"Response with id '{shortened(id)}' not found: it was not kept, or was not made for you.", param=param)


class NotServed(InvalidRequest):
    """The endpoint exists, but not for this model."""

    status = 404
    code = "unknown_url"


class BodyTooSlow(InvalidRequest):
    """The request body did not arrive in time; the SDKs try a 408 again."""

    status = 408
    code = "request_timeout"

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"The request body did not arrive within {limit_s:g} s.", headers=[(b"connection", b"close")])


class ClientGone(GatewayError):
    """The client closed its connection; never counted against an engine. 499 is NGINX's number for it."""

    status = 499

    def __init__(self) -> None:
        super().__init__("The client closed the connection.")


class LimitReached(InvalidRequest):
    """The key's limits or budget are used up. `type` is what OpenAI calls the kind of limit."""

    status = 429
    code = "rate_limit_exceeded"


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
    """A configuration that must not start: `path` says where, the text what is wrong and what is accepted, `source` which file and line (or
    environment variable) it came from. Each of them is one line that holds no secret, whatever it was made of."""

    def __init__(self, path: str, problem: str, source: str = "") -> None:
        self.path, self.problem, self.source = one_line(masked("", path)), one_line(without_secrets(problem)), one_line(source)
        super().__init__(": ".join(part for part in (self.source, self.path, self.problem) if part))

    @property
    def errors(self) -> tuple[ConfigError, ...]:
        """Everything that is wrong, one by one."""
        return (self,)

    def below(self, path: str) -> ConfigError:
        """The same of a section that stands at `path`."""
        return ConfigErrors(ConfigError(".".join(part for part in (path, e.path) if part), e.problem, e.source) for e in self.errors)


class ConfigErrors(ConfigError):
    """Several at once, one line each; path, problem and source are those of the first."""

    # A file of another kind has a problem in every line.
    SHOWN = 100

    def __init__(self, errors: Iterable[ConfigError]) -> None:
        self._errors = tuple(single for error in errors for single in error.errors)
        first = self._errors[0]
        super().__init__(first.path, first.problem, first.source)

    @property
    def errors(self) -> tuple[ConfigError, ...]:
        """See `ConfigError`."""
        return self._errors

    def __str__(self) -> str:
        more = len(self._errors) - self.SHOWN
        lines = [ConfigError.__str__(error) for error in self._errors[: self.SHOWN]]
        return "\n".join(lines if more <= 0 else [*lines, f"... and {more} more"])


# Anthropic's error types by status (its API reference); what is not listed is `invalid_request_error` below 500 and `api_error` above.
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    503: "overloaded_error",
}


_encoder = msgspec.json.Encoder()


def _body(error: GatewayError, request_id: str) -> ErrorDetail:
    message = error.message
    if request_id and error.status >= 500:
        message = f"{message} (request id: {request_id})"  # so that a report can be traced
    return ErrorDetail(message, error.type, error.param, error.code)


def _anthropic(error: GatewayError, request_id: str) -> AnthropicError:
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return AnthropicError(AnthropicErrorDetail(kind, _body(error, request_id).message), request_id)


def render(error: GatewayError, request_id: str = "", shape: Shape = Shape.OPENAI) -> tuple[int, Headers, bytes]:
    """Status, headers and JSON body of an answer that has not begun yet: `{"error": {message, type, param, code}}` but for Anthropic."""
    content = _encoder.encode(_anthropic(error, request_id) if shape is Shape.ANTHROPIC else Error(_body(error, request_id)))
    headers: Headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(content)),
        *error.headers,
    ]
    if error.retry_after_s is not None:
        seconds = min(max(error.retry_after_s, 0.0), RETRY_AFTER_MAX_S)
        # Rounded up: who comes a little too early is refused again. The SDKs read the milliseconds where there are any.
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(seconds))))
        headers.append((b"retry-after-ms", b"%d" % math.ceil(seconds * 1000)))
    if error.should_retry is not None:
        headers.append((b"x-should-retry", b"true" if error.should_retry else b"false"))
    return error.status, headers, content


def event(error: GatewayError, request_id: str = "", shape: Shape = Shape.OPENAI, number: int = 0) -> bytes:
    """The same as one server-sent event, for a stream that has begun: every SDK raises on it.

    `number` is the event's place in a stream of `/v1/responses`.
    """
    body = _body(error, request_id)
    if shape is Shape.RESPONSES:
        named = ResponsesErrorEvent(body.code, body.message, body.param, number, body)
        return b"event: error\ndata: " + _encoder.encode(named) + b"\n\n"
    if shape is Shape.ANTHROPIC:
        return b"event: error\ndata: " + _encoder.encode(_anthropic(error, request_id)) + b"\n\n"
    return b"data: " + _encoder.encode(Error(body)) + b"\n\n"


def as_gateway_error(error: BaseException) -> GatewayError:
    """Any exception as something a client may see: foreign ones become a 500 without their words."""
    if isinstance(error, GatewayError):
        return error
    return GatewayError("The gateway failed to serve this request.", detail=f"{type(error).__name__}: {error}")
