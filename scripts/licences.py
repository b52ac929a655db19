"""What the gateway's dependencies are licensed under: `python -m scripts.licences` names each whose licence nobody has said yes to.

Reads the lock file and the metadata of what is installed; nothing is asked over the network.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

LOCK = Path(__file__).parents[1] / "requirements" / "gateway.txt"
# Words of licences that may be linked with and passed on together with Apache-2.0.
ACCEPTED = re.compile(
    r"^(Apache(-| |$)|BSD|3-Clause BSD|MIT|ISC|PSF|Python Software|0BSD|MPL[- ]2|Mozilla Public License 2|Unlicense|Zlib|CC0)",
    re.IGNORECASE,
)
# Packages whose metadata say it in no words that can be compared, and what their licence file says.
READ_BY_HAND: dict[str, str] = {}


def licence(name: str) -> str:
    """In the package's own words: the SPDX expression, else its classifiers, else its free text."""
    told = metadata.metadata(name)
    expression = told.get("License-Expression")
    if expression:
        return str(expression)
    named = [line.rpartition(" :: ")[2] for line in told.get_all("Classifier") or () if line.startswith("License :: OSI Approved ::")]
    return " AND ".join(named) or (told.get("License") or "").strip().partition("\n")[0]


def problems(lock: str) -> Iterator[str]:
    """One line for each package that is not installed, or whose licence is not among those accepted."""
    for name in re.findall(r"^([A-Za-z0-9._-]+)==", lock, re.MULTILINE):
        try:
            found = READ_BY_HAND.get(name) or licence(name)
        except metadata.PackageNotFoundError:
            yield f"{name} is locked and not installed"
            continue
        # Of an OR any will do, of an AND all have to.
        parts = re.split(r"\s+AND\s+", found.replace("(", "").replace(")", ""))
        if not found or not all(any(ACCEPTED.match(one.strip()) for one in re.split(r"\s+OR\s+", part)) for part in parts):
            yield f"{name}: nobody has said yes to the licence {found!r} (scripts/licences.py)"


def main() -> int:
    """The exit code."""
    found = list(problems(LOCK.read_text(encoding="utf-8")))
    print("\n".join(found) or "every dependency's licence is accepted")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
