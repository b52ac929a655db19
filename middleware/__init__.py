"""Plain ASGI around the app, so that 404 and 405 pass through it too (Litestar's own middleware list is not run on those).

The order, from the outside: every answer gets its id, pages from allowed origins may read it, every exception gets a shape that clients
parse, and nothing is served to strangers. `rate_limit` is no layer of these: it wraps what is done once a request's body was read.
"""
