"""What a client may send beside a request's body, which the application bounds, and for how long."""

from __future__ import annotations

from typing import Final

# A request's line and headers together; the SDKs send about 1 kB.
MAX_HEAD_BYTES: Final = 64 << 10
# Envoy's and Apache's bound, too.
MAX_HEADERS: Final = 100
# What a chunked body may hold beside its content (sizes, extensions, trailers), and so much more for each chunk: Go's rule.
MAX_FRAMING_BYTES: Final = 16 << 10
FRAMING_BYTES_PER_CHUNK: Final = 16
# Requests that may wait behind the one that is being answered; then the connection is not read any further.
MAX_PIPELINED: Final = 16
# How much of a body may wait for the application before the socket is left alone.
HIGH_WATER: Final = 64 << 10
# Of a body that nobody wants so much is read to keep the connection; with more to come it is closed after the answer.
MAX_UNWANTED_BYTES: Final = 64 << 10
# A connection that is closed while its client still sends is read on for so long, unheard: a client that is reset in the middle of its
# request never sees the answer to it. In bytes, what fits into that time on a fast line.
LINGER_S: Final = 5.0
MAX_LINGER_BYTES: Final = 32 << 20
# A client's idle connection is kept open for so many seconds. Longer than the OpenAI SDKs' pools keep theirs idle (5 s).
KEEP_ALIVE_S: Final = 75.0
# File descriptors that are left for what is no client: listeners, the parent, Redis, name servers, traces.
SPARE_DESCRIPTORS: Final = 32
