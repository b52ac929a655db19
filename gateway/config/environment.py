"""Variables of the environment that look like ours and are none: a setting that is spelled `PENSTOCK_LISTEN_PORT` would change nothing, in
silence."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping

import msgspec

from gateway.config.tree import Settings

# Those that are no settings: docs/configuration.md says what each does.
KNOWN = frozenset({"PENSTOCK_HOME", "PENSTOCK_ADMIN_KEY", "PENSTOCK_STATUS_FD", "PENSTOCK_FORM", "PENSTOCK_COMPILED"})
_OURS, _SETTING = "PENSTOCK_", "PENSTOCK__"
# What Kubernetes sets for every service beside a pod; one may well be called penstock.
_OF_KUBERNETES = re.compile(r"PENSTOCK_(\w+_)?(SERVICE_HOST|SERVICE_PORT\w*|PORT(_\w+)?)")


def strangers(environment: Mapping[str, str]) -> Iterator[str]:
    """Each variable that is not understood, with what was probably meant, in a line."""
    settings = [f"{_SETTING}{'__'.join(path)}".upper() for path in _paths(Settings)]
    for name in sorted(environment):
        if not name.startswith(_OURS) or name.startswith(_SETTING) or name in KNOWN:
            continue
        if "KUBERNETES_SERVICE_HOST" in environment and _OF_KUBERNETES.fullmatch(name):
            continue
        near = difflib.get_close_matches(name, [*settings, *KNOWN], n=1, cutoff=0.8)
        yield f"environment {name}: is not understood{f'; did you mean {near[0]}?' if near else ''}"


def _paths(struct: type[msgspec.Struct]) -> Iterator[tuple[str, ...]]:
    for field in msgspec.structs.fields(struct):
        default = field.default if isinstance(field.default, msgspec.Struct) else None
        if default is None:
            yield (field.encode_name,)
        else:
            yield from ((field.encode_name, *below) for below in _paths(type(default)))
