"""Which form of the gateway runs: compiled by mypyc, or pure Python (docs/performance.md)."""

from __future__ import annotations

from typing import Final, Literal

from gateway.wire import body

# A wheel holds every module of pyproject.toml's list compiled, or none (scripts/compile.py): one of them speaks for all.
FORM: Final[Literal["compiled", "pure Python"]] = "pure Python" if str(body.__file__).endswith(".py") else "compiled"
