"""An engine's words without what is none of a client's business: addresses, hosts, paths, keys, processes, tracebacks.

What a client needs to mend its request stays: names of parameters, numbers, JSON pointers, what would be accepted.
"""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Final

REMOVED: Final = "[removed]"
# More than this is no message for people.
_MOST: Final = 8000
_TRACEBACK = re.compile(r"Traceback \(most recent call last\):.*", re.DOTALL)
_RAISED = re.compile(r"^[\w.]*(?:Error|Exception|Exit|Interrupt|Warning)\b(?:: (.*))?$")
# Before a message of the grammar compiler: "[17:33:11] /project/cpp/json_schema_converter.cc:4175: Unsupported type".
_SOURCE = re.compile(r"(?:\[[\d:]+\] )?/\S{1,300}?:\d+: ")
_KEY = re.compile(
    r"\b(?:sk|pk|rk)-[\w-]{3,}|\bhf_\w{6,}|\bAKIA[0-9A-Z]{8,}|\beyJ[\w-]{8,}\.[\w.-]+"
    r"|\b[Bb]earer\s+[\w.~+/=-]{3,}|(?i:\b(?:api[_-]?key|password|secret|authorization)\b\s*[=:]\s*(?:bearer\s+|basic\s+)?\S+)"
)
_URL = re.compile(r"\b[a-zA-Z][a-zA-Z0-9+.-]{1,20}://[^\s'\"<>)\]}]+")
_ADDRESS = re.compile(
    r"\[(?=[^\]]{0,40}:[^\]]{0,40}:)[0-9a-fA-F:.]{2,45}(?:%\w{1,15})?\](?::\d+)?"  # [fe80::1]:30000
    r"|(?<![\w.:])(?:[0-9a-fA-F]{1,4}:){2,7}(?:[0-9a-fA-F]{1,4}|:[0-9a-fA-F]{0,4})(?![\w:])|(?<![\w:])::1\b"
    r"|(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?(?![\w.]*\d)"
)
_HOST_PORT = re.compile(r"(?<![\w./-])([A-Za-z](?:[A-Za-z0-9.-]*[A-Za-z0-9])?):(\d{4,5})(?!\d)")
# Words that counts are told after: `tokens:4096` is no host.
_COUNTED: Final = frozenset(
    ["tokens", "token", "length", "max", "min", "limit", "got", "size", "count", "index", "id", "ids", "line", "char", "column", "is", "of"]
)
_HOST = re.compile(r"(?<![\w./@-])(?:[A-Za-z0-9](?:[\w-]*[A-Za-z0-9])?\.)+[A-Za-z]{2,}(?![\w-])")
# Ends of names of two parts that are hosts.
_TOP: Final = re.compile(
    r"com|net|org|io|ai|dev|cloud|cn|eu|local|localdomain|internal|lan|svc|cluster|corp|home|intra|consul|arpa|test|example", re.IGNORECASE
)
_FILE_AT = re.compile(r"File \"[^\"]*\"(?:, line \d+)?(?:, in \w+)?")
_PATH = re.compile(r"(?<![\w.#/:$~<-])~?/(?:[\w.@+~=-]+/)+[\w.@+~=-]*(?::\d+)?")
_CODE = re.compile(r"(?<![\w./-])[\w./-]*\w\.(?:py|pyc|cc|cpp|cu|cuh|so|jinja|safetensors|sock)\b(?:[.:]\d+)?")
_OBJECT = re.compile(r"<[^<>]{0,200} at 0x[0-9a-fA-F]+>|\b0x[0-9a-fA-F]{6,}\b")
_PROCESS = re.compile(r"(?i:\b(?:pid|ppid|tid|process id|thread id)\b)[ =:#]*\d+|\bProcess-\d+\b|\b\w+_(?:TP|DP|PP|EP)\d+\b")
_GAPS = re.compile(rf"{re.escape(REMOVED)}(?:[\s,;:]*{re.escape(REMOVED)})+")
_WORD = re.compile(r"[^\W\d_]{2,}")


def without_keys(text: str) -> str:
    """For logs: everything but keys."""
    return _KEY.sub("***", text)


class Cleaned:
    """A message as a client may read it, and what was taken out of it (keys as stars)."""

    def __init__(self, text: str, own: Container[str] = ()) -> None:
        self.removed: list[str] = []
        self._own = own
        text = _SOURCE.sub("", _TRACEBACK.sub(self._raised, text[:_MOST]))
        text = _KEY.sub(self._key, text)
        for pattern in (_URL, _OBJECT, _FILE_AT):
            text = pattern.sub(self._gone, text)
        text = _PATH.sub(self._path, text)
        text = _CODE.sub(self._gone, text)
        text = _ADDRESS.sub(self._gone, text)
        text = _HOST_PORT.sub(self._host_port, text)
        text = _HOST.sub(self._host, text)
        text = _PROCESS.sub(self._gone, text)
        self.text = _GAPS.sub(REMOVED, text).strip()

    @property
    def says_something(self) -> bool:
        """Whether words are left."""
        return len(_WORD.findall(self.text.replace(REMOVED, ""))) >= 2

    def _gone(self, found: re.Match[str]) -> str:
        self.removed.append(found[0])
        return REMOVED

    def _key(self, found: re.Match[str]) -> str:
        self.removed.append("***")
        return REMOVED

    def _raised(self, found: re.Match[str]) -> str:
        """Of a traceback the last line's message."""
        self.removed.append("a traceback")
        last = _RAISED.match(found[0].strip().rpartition("\n")[2].strip())
        return (last[1] or "") if last is not None else ""

    def _path(self, found: re.Match[str]) -> str:
        return found[0] if found[0].startswith("/v1/") else self._gone(found)

    def _host_port(self, found: re.Match[str]) -> str:
        return found[0] if found[1] in _COUNTED else self._gone(found)

    def _host(self, found: re.Match[str]) -> str:
        """A name with dots, unless it is the path of a parameter of the client's."""
        labels = found[0].split(".")
        if labels[0] in self._own or (len(labels) == 2 and not _TOP.fullmatch(labels[1])):
            return found[0]
        return self._gone(found)
