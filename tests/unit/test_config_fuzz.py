"""No configuration may raise anything but its one-line refusals: seeded, over the whole tree and the sections of the built-in backends.

Whatever is accepted is put to use as far as that goes without a network: shown, sent to a worker, opened. FUZZ_EXAMPLES asks for more.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import msgspec
import pytest
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from backends import scripted
from backends.sglang_dsv3 import config as sglang
from backends.sglang_dsv3.transport import Options, to_host
from gateway import config
from gateway.access.keys import Keys
from gateway.config import strict
from gateway.errors import ConfigError
from gateway.plugin import BackendEnv
from gateway.serving import registry
from gateway.serving.balance.settings import Health
from gateway.store import connect

pytestmark = pytest.mark.once

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))
SECRET = "hunter2hunter2"
fuzzed = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))

BASE: dict[str, Any] = {
    "listen": {"tls": None},
    "models": {"m": {"backend": "d", "limits": {}, "price": {}}, "s": {"backend": "s"}},
    "backends": {
        "d": {"kind": "sglang_dsv3", "hosts": [{"url": "http://10.0.0.1:30000"}, {"launch": "local"}], "engine": {}, "health": {}},
        "s": {"kind": "scripted", "health": {}},
    },
    "keys": [{"name": "k", "hash": "sha256:" + "1" * 64, "budget": {"amount": 1}, "per_model": {"m": {}}}],
    "redis": {"url": "redis://127.0.0.1:9"},
    "security": {"cors": {}},
}


def fields(struct: type[msgspec.Struct], prefix: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    """The path of every setting."""
    for field in msgspec.structs.fields(struct):
        here = (*prefix, field.encode_name)
        yield here
        for inner, below in nested(field.type):
            yield from fields(inner, (*here, *below))


def nested(kind: Any) -> Iterator[tuple[type[msgspec.Struct], tuple[str | int, ...]]]:
    bare = strict._one(kind, {})
    if bare is Any:
        bare = strict._one(kind, [])
    origin, arguments = get_origin(bare) or bare, get_args(bare)
    if isinstance(origin, type) and issubclass(origin, msgspec.Struct):
        yield origin, ()
    elif origin in (list, dict):
        for inner, below in nested(arguments[-1]):
            yield inner, (0 if origin is list else "m", *below)


PATHS = [
    *fields(config.Settings, ()),
    ("backends", "d", "kind"),
    *fields(sglang.Config, ("backends", "d")),
    *fields(scripted.Config, ("backends", "s")),
    *fields(Health, ("backends", "d", "health")),
]
WORDS = [
    "", " ", "x", "off", "local", "a", "srv", "fp8", "text", "../../etc/passwd", "/", ".", "\\", "%00", "%", "-1", "0x_", "1e999", "é",
    "\u2028", "\x00", "\x1b[31m", "\n", "a\nb", "\t", "\ud800", "\udcff", "😀", "ﬀ", "a" * 300, "a." * 200, "-" * 100, "{", "]", "'", '"',
    "&a", "*a", "!x", "<<", "http://", "http://h", "http://h:abc", "http://h:300000", "http://10.0.0.1:30000 ", "http://[::1",
    "http://[::1]:80", "http://[fe80::1%25x]", "https://h", "http://h:80/p?q#f", "unix:///x", "unix://", "h:1", ":1", "h:", "[::1]:1",
    "::1",
    "0", "0.0.0.0", "localhost", "127.0.0.1:0", "1.2.3.4/33", "10.0.0.0/8", "redis://h", "rediss://h?ssl_cert_reqs=x", "redis://h/x",
    "redis://h?db=1&db=2", "redis://h?x=1", "redis://h:0", "unix:///x?db=1", "redis://[", "2027-01-01", "0001-01-01", "2027-13-01",
    "9999-12-31T23:59:59-23:59", "UTC", "Europe/Berlin", "Europe", "/etc/localtime", "sha256:" + "0" * 64, "/dev/null",
    "/v1/chat/completions", "m", "d", "s", "scripted", "sglang_dsv3", f"redis://:{SECRET}@h", f"rediss://{SECRET}@h",
    f"redis://:p@{SECRET}@h", f"redis://h?password={SECRET}", f"http://user:{SECRET}@h", f"redis://:a/{SECRET}@h",
    f"redis://:a b{SECRET}@h", f"redis://u:{SECRET}#x@h:1", f"redis://u:{SECRET}@[h",
]  # fmt: skip
NUMBERS = [0, 1, -1, 9, 65, 65536, 1 << 31, 1 << 62, 1 << 63, 1 << 64, -(1 << 63) - 1, 10**400, 0.0, -0.0, 0.5, 1e308, -1e308, 5e-324]
scalars = (
    st.sampled_from(WORDS)
    | st.text(max_size=20)
    | st.sampled_from(NUMBERS)
    | st.sampled_from([float("inf"), float("nan"), None, True, False])
    | st.integers()
    | st.floats()
)
names = st.sampled_from(WORDS) | st.text(max_size=8)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=8)
changes = st.lists(st.tuples(st.sampled_from(PATHS), scalars | values), min_size=1, max_size=4)


def put(tree: Any, path: tuple[str | int, ...], value: Any) -> None:
    """A value at its place; a container on the way that another change has replaced stays as it is."""
    for step in path[:-1]:
        if isinstance(step, int):
            if not (isinstance(tree, list) and len(tree) > step):
                return
            tree = tree[step]
        else:
            if not isinstance(tree, dict):
                return
            if tree.get(step) is None:
                tree[step] = {}
            tree = tree[step]
    if isinstance(tree, dict):
        tree[path[-1]] = value


def judge(folder: Path, content: bytes, environment: dict[str, str] | None = None) -> str:
    """What becomes of it: `accepted` or `refused`, and nothing else."""
    file = folder / "p.yaml"
    file.write_bytes(content)
    try:
        loaded = config.load(file, environment or {}, further=registry.configured)
        use(loaded, folder)
    except ConfigError as error:
        refused = error
    else:
        return "accepted"
    lines = str(refused).splitlines()
    assert lines
    assert all(line.isprintable() and 0 < len(line) < 2500 for line in lines), lines
    assert len(lines) == min(len(refused.errors), 100) + (len(refused.errors) > 100)
    assert SECRET not in str(refused)
    return "refused"


def use(loaded: config.Loaded, folder: Path) -> None:
    shown = msgspec.json.encode(registry.rows(loaded))
    assert SECRET.encode() not in shown
    there = msgspec.json.decode(msgspec.json.encode(msgspec.to_builtins(loaded.settings)))
    found = msgspec.convert(there, config.Settings)
    assert found == loaded.settings
    config.verify_files(found)
    Keys(found)
    for configured in registry.configured(found).values():
        if isinstance(configured.section, sglang.Config):
            for url in (url for host in configured.section.hosts for url in (host.url, host.agent) if url is not None):
                to_host(url, Options())
    asyncio.run(opened(found, folder))


async def opened(found: config.Settings, folder: Path) -> None:
    await registry.rehearse(found, BackendEnv(folder))
    if found.redis.url is not None:
        client = connect.Client(found.redis)
        if not found.redis.cluster and not found.redis.sentinels:
            client._client.connection_pool.make_connection()
        await client.aclose()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def test_the_base_is_accepted_and_every_setting_is_reached(place: Path) -> None:
    tree = copy.deepcopy(BASE)
    del tree["keys"][0]["budget"], tree["redis"], tree["listen"]
    assert judge(place, json.dumps(tree).encode()) == "accepted"
    assert len(PATHS) > 150
    assert ("listen", "tls", "cert_file") in PATHS
    assert ("backends", "d", "hosts", 0, "url") in PATHS
    assert ("keys", 0, "per_model", "m", "rpm") in PATHS


@seed(1)
@fuzzed
@given(changes=changes)
def test_values_of_any_kind_in_any_setting(place: Path, changes: list[tuple[tuple[str | int, ...], Any]]) -> None:
    tree = copy.deepcopy(BASE)
    for path, value in changes:
        put(tree, path, value)
    judge(place, json.dumps(tree).encode())


@seed(2)
@fuzzed
@given(path=st.sampled_from(PATHS), value=scalars)
def test_one_odd_value_in_a_configuration_that_is_otherwise_right(place: Path, path: tuple[str | int, ...], value: Any) -> None:
    tree = copy.deepcopy(BASE)
    tree["models"]["m"]["price"] = {"prompt": 1}
    put(tree, path, value)
    try:
        content = yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
    except yaml.YAMLError:
        content = json.dumps(tree).encode()
    judge(place, content)


@seed(3)
@fuzzed
@given(
    text=st.text(alphabet=st.sampled_from("{}[]:,-?!&*<>|'\"#%@` \n\tabclisten0123.~=_\\x00ü"), max_size=80),
    section=st.sampled_from([*config.Settings.__struct_fields__, ""]),
)  # fmt: skip
def test_text_of_any_kind_as_a_file_and_as_a_variable(place: Path, text: str, section: str) -> None:
    judge(place, f"{section}: {text}".encode() if section else text.encode())
    judge(place, b"", {f"PENSTOCK__{section.upper()}__X": text, f"PENSTOCK__{section.upper()}": text})


@seed(4)
@fuzzed
@given(content=st.binary(max_size=60))
def test_bytes_of_any_kind(place: Path, content: bytes) -> None:
    judge(place, content)
    judge(place, b"listen: " + content)
