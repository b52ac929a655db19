"""Whether an unknown name is a known one with a slip in it: a letter left out, added, exchanged or swapped; or written another way."""

from __future__ import annotations

from collections.abc import Iterable

# Short names are one letter from each other by chance: top_p and top_k, n and a.
_SHORTEST, _SHORTEST_EXCHANGED = 4, 8
# No parameter is longer; what is costs nothing to refuse.
_LONGEST = 64


class Names:
    """Known names, and every string that is one of them with a letter left out; so that looking costs a handful of lookups and no cache."""

    def __init__(self, known: Iterable[str]) -> None:
        self._plain = {_plain(name): name for name in known if len(name) >= _SHORTEST}
        self._shorter = {left: plain for plain in self._plain for left in _shorter(plain)}

    def near(self, name: str) -> str:
        """The known name that was meant, or ""; never for a name that could not stand in a header."""
        if not _SHORTEST <= len(name) <= _LONGEST or not name.isascii() or not name.replace("-", "_").isidentifier():
            return ""
        plain = _plain(name)
        found = self._plain.get(plain)
        if found is not None:
            return found
        if plain in self._shorter:  # it lacks one letter
            return self._plain[self._shorter[plain]]
        for left in _shorter(plain):
            if left in self._plain:  # it has one too many
                return self._plain[left]
            meant = self._shorter.get(left, "")
            if len(meant) == len(plain) >= _SHORTEST_EXCHANGED:  # another one in its place, or two of them swapped
                return self._plain[meant]
        return ""


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _shorter(name: str) -> list[str]:
    return [name[:at] + name[at + 1 :] for at in range(len(name))]
