"""A scripted SGLang server: speaks SGLang 0.5.23's HTTP and replays faults on command. For rehearsals, never in place of the engine.

    python -m backends.sglang_dsv3.rehearsal [--port 0] [--golden FOLDER]

A command in the prompt decides what happens, else the words `token 0 token 1 ...` are generated (`[[tokens 32]]`, `[[pace 0.02]]`;
`[[late 1]]`: a stream begins after a second's silence; `[[wide 1000]]`: so many letters more with each):

    [[refuse 503]]       that status with SGLang's flat error          [[first-error 503]]  HTTP 200, error as first event
    [[die 3]]            the connection is reset after 3 events        [[cut 3]]            a clean end after 3 events, no finish
    [[stall 3]]          silence after 3 events                        [[false-done 3]]     `[DONE]` after 3 events, no finish
    [[abort 3]]          finish_reason abort after 3 events            [[mid-error 3]]      error event after 3 events
    [[garbage]]          neither SSE nor JSON                          [[endless]]          an event that never ends
    [[golden NAME]]      the recorded stream of that name, byte for byte, in pieces of `[[split 7]]` bytes

`[[times 1]]` beside a fault: only so often does the same prompt meet it; after that it is answered.

A request with the field `rehearsal_answer` is answered with that text, byte for byte. `GET /rehearsal` tells what was seen: requests,
how often each prompt was asked, aborted ids, open requests, and the last body. `POST /rehearsal/keeps` with `true`: responses are kept.
"""
