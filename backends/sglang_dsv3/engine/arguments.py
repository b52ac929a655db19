"""Words for SGLang's command line, held against what its own parser takes: flags, how many values each has, and which."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from gateway.errors import ConfigError

# A value, and no flag, though it begins with a dash.
_NUMBER = re.compile(r"-\.?\d")
_READ = {"int": (int, "a whole number"), "float": (float, "a number")}
# So many of a long list are shown.
_SHOWN = 12
Takes = Mapping[str, tuple[int, int | None, str]]


def problems(given: Sequence[str], flags: Mapping[str, Collection[str]], takes: Takes, version: str) -> Iterator[ConfigError]:
    """What SGLang would refuse of `extra_args`, each at its index. `flags` have the words that they accept, or none where any will do."""
    index = 0
    while index < len(given):
        at, word = f"extra_args.{index}", given[index]
        index += 1
        flag, equals, value = word.partition("=")
        if not _is_flag(word):
            yield ConfigError(at, f"'{word}' belongs to no flag: SGLang takes none without")
            continue
        values = [value] if equals else []
        while not equals and index < len(given) and not _is_flag(given[index]):
            values.append(given[index])
            index += 1
        if flag not in flags and len(whole := [each for each in flags if each.startswith(flag)]) == 1:
            (flag,) = whole  # argparse takes a beginning that is no other flag's
        if flag not in flags or flag not in takes:
            near = difflib.get_close_matches(flag, list(flags), 1)
            yield ConfigError(at, f"SGLang {version} has no {flag}" + (f"; did you mean '{near[0]}'?" if near else ""))
            continue
        least, most, kind = takes[flag]
        if len(values) < least or (most is not None and len(values) > most):
            yield ConfigError(at, f"{flag} takes {_count(least, most)}, and is given {len(values) or 'none'}")
            continue
        for value in values:
            if flags[flag] and value not in flags[flag]:
                yield ConfigError(at, f"{flag}: {refused(value, flags[flag], version)}")
            elif kind in _READ and not _reads(value, kind):
                yield ConfigError(at, f"{flag} takes {_READ[kind][1]}, not '{value}'")


def refused(given: str, accepted: Collection[str], version: str) -> str:
    """That SGLang does not know a word, with the nearest that it does; those of DeepSeek first where there are many."""
    near = difflib.get_close_matches(given, list(accepted), 1)
    shown = [each for each in accepted if "deepseek" in each.lower()] or list(accepted)[:_SHOWN]
    rest = ", ..." if len(shown) < len(accepted) else ""
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"'{given}' is not known to SGLang {version}; one of: {', '.join(shown)}{rest}{hint}"


def _is_flag(word: str) -> bool:
    return word.startswith("-") and word != "-" and not _NUMBER.match(word)


def _reads(value: str, kind: str) -> bool:
    try:
        _READ[kind][0](value)
    except ValueError:
        return False
    return True


def _count(least: int, most: int | None) -> str:
    if most is None:
        return f"{least or 'any number of'} value{'s' if least != 1 else ''}{' or more' if least else ''}"
    if least == most:
        return f"{least or 'no'} value{'s' if least != 1 else ''}"
    return f"{least} to {most} values"
