"""What may be shown of a text that may hold a secret: one rule, for configuration, refusals and log lines.

By position: what stands before the `@` of a URL, and the values of its query. By name: the value of whatever is called a key, hash, secret,
token, password or credential, in a tree, in `name=value`, in JSON, in a header, and after a command line's `--name`.
"""

from __future__ import annotations

import re
from typing import Any

STARS = "********"
_MOST = 1000
# The last word of a name whose value is a secret, and names of collections of secrets.
_SECRET = frozenset(
    {
        "key",
        "apikey",
        "hash",
        "secret",
        "token",
        "password",
        "passwd",
        "passphrase",
        "pass",
        "pwd",
        "credential",
        "credentials",
        "auth",
        "authorization",
        "bearer",
        "cookie",
    }
)
_SECRETS = frozenset({"secrets", "passwords", "credentials"})
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# In running text a name is told from prose by what follows it; `key` and its like alone are everyday words. Everything is bounded, so
# that a line costs no more than its length.
_NAME = (
    r"(?:[\w.-]{0,64}(?:password|passwd|passphrase|secret|token|credentials?|authorization|apikey)|[\w.-]{0,64}[_.-](?:key|hash|auth|pwd))"
)
_VALUE = r"\"(?:[^\"\\]|\\.){0,4096}\"|'(?:[^'\\]|\\.){0,4096}'|[\"']?[^\s,;&\"']+"
_ASSIGNED = re.compile(rf"(?i)(\b{_NAME}=|[\"']{_NAME}[\"']\s{{0,8}}[:=]\s{{0,8}}|--{_NAME}(?:=|\s{{1,8}}))({_VALUE})")
_SCHEME = re.compile(r"(?i)\b(bearer|basic)(\s{1,8})[\w.~+/=-]{6,}")
# Without one of these there is nothing for the two above to find, and most lines have none.
_WORDS = ("pass", "secret", "token", "key", "hash", "auth", "pwd", "credential", "bearer", "basic")
# Of a URL, also of one that was taken for a path and has lost a slash.
_SCHEME_END = ":/"
_TOKEN = re.compile(r"\S+")
_QUERY = re.compile(r"[?#][^\"'<>]*")


def without_secrets(text: str) -> str:
    """A line as it may be written: any text of ours or of a library's, with whatever looks like a secret replaced by stars."""
    if _SCHEME_END in text:
        text = _TOKEN.sub(lambda found: _url(found[0]), text)
    lowered = text.lower()
    for word in _WORDS:
        if word in lowered:
            return _SCHEME.sub(rf"\1\2{STARS}", _ASSIGNED.sub(_starred, text))
    return text


def _url(text: str) -> str:
    """Text that may hold a URL, without what stands before its last `@` (a password may hold one, or a slash) and its query's values."""
    before, separator, rest = text.partition(_SCHEME_END)
    if not separator:
        return text
    user, at, place = rest.rpartition("@")
    slash = "/" if rest.startswith("/") else ""
    return f"{before}:/{slash}{STARS if user else ''}{at}{_QUERY.sub(_query, place if at else place[len(slash) :], count=1)}"


def _query(found: re.Match[str]) -> str:
    parts = [part for part in re.split("([?&#;])", found[0]) if part]
    return "".join(part if part in "?&#;" else f"{part.partition('=')[0]}={STARS}" if "=" in part else STARS for part in parts)


def _starred(found: re.Match[str]) -> str:
    value = found[2]
    quote = value[0] if value[0] in "\"'" else ""
    return f"{found[1]}{quote}{STARS}{quote if value.endswith(quote) else ''}"


def secret_name(name: str) -> bool:
    """Whether what is called this is a secret: `api_key`, `--api-key`, `apiKey`, but not `api_key_file`, `max_tokens` or `keyboard`."""
    words = [word.lower() for word in _WORD.findall(name)]
    return bool(words) and words[-1] in _SECRET


def masked(path: str, value: Any) -> Any:
    """A value of the configuration, or a whole tree of them, as it may be shown. `path` is where it stands, dotted."""
    if isinstance(value, dict):
        return {masked("", str(key)): masked(f"{path}.{key}", below) for key, below in value.items()}
    if isinstance(value, list):
        return [
            STARS if index and _announced(value[index - 1], below) else masked(f"{path}.{index}", below)
            for index, below in enumerate(value)
        ]
    names = [name for name in path.split(".") if not name.isdigit()]
    if value not in (None, "") and not isinstance(value, bool) and names and (secret_name(names[-1]) or not _SECRETS.isdisjoint(names)):
        return STARS
    return without_secrets(_url(value)) if isinstance(value, str) else value


def _announced(before: Any, value: Any) -> bool:
    """Whether an argument of a command line is the value of a flag that is called like a secret."""
    flag = isinstance(before, str) and before.startswith("-") and "=" not in before and secret_name(before)
    return flag and not str(value).startswith("--")


def shown(path: str, value: Any) -> str:
    """A value for a refusal: masked, on one line, and not for ever."""
    text = str(masked(path, value))
    return one_line(text if len(text) <= 80 else f"{text[:77]}...")


def one_line(text: str) -> str:
    """Text with its control characters made visible, and no longer than a screen."""
    text = text if len(text) <= _MOST else f"{text[: _MOST - 3]}..."
    return text if text.isprintable() else "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
