"""Keys as values: what may be stored, what can be read, and that one that cannot never stops the others."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import config
from gateway.access import keys
from gateway.access.keys import KeyList, Keys, StoredKey, hashed
from gateway.access.limits.memory import Memory
from gateway.access.limits.rules import SECOND, Ask, StoreFailed
from gateway.errors import ConfigError
from gateway.store.connect import Client
from gateway.store.keysync import KeySync, stored_keys

SETTINGS = config.load(
    environment={},
    overrides={
        "models": {"m": {"backend": "b", "price": {"prompt": 1}}, "other": {"backend": "b"}},
        "backends": {"b": {"kind": "scripted"}},
        "redis": {"url": "redis://127.0.0.1:1"},
    },
).settings
GOOD: dict[str, Any] = {"name": "good", "hash": hashed("good")}

# One value each that no gateway can use, whoever has written it.
BAD: list[dict[str, Any]] = [
    {"expires": "0001-01-01"},
    {"expires": "tomorrow"},
    {"expires": "9999-12-31T23:59:59+99:00"},
    {"hash": "sha256:short"},
    {"hash": "sha256:" + "g" * 64},
    {"old_hash": "nothing"},
    {"rpm": 0},
    {"rpm": 1e-300},
    {"tpm": 1e300},
    {"max_in_flight": 10**30},
    {"max_tokens": 10**400},
    {"priority": 10},
    {"budget": {"amount": -1}},
    {"budget": {"amount": 1e300}},
    {"per_model": {"m": {"rpm": -1}}},
    {"models": "m"},
    {"metadata": {"a": 1}},
    {"field_of_a_later_version": True},
]


@pytest.mark.parametrize("value", BAD, ids=str)
def test_a_bad_value_is_neither_stored_nor_read_nor_taken_from_the_file(value: dict[str, Any]) -> None:
    tree = {**GOOD, **value}
    with pytest.raises(ConfigError):
        keys.checked(config.convert(tree, StoredKey, ""), SETTINGS)
    with pytest.raises(ConfigError):
        keys.read("good", msgspec.json.encode(tree))
    if "old_hash" not in value:
        with pytest.raises(ConfigError):
            config.load(environment={}, overrides={"keys": [tree], "models": {"m": {"backend": "dsv3"}}})


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"\xff\xfe", b'{"name": "\xff"}', b"[" * 100_000, msgspec.json.encode({**GOOD, "name": "another"})],
)
def test_what_is_no_key_at_all_is_not_read(content: bytes) -> None:
    with pytest.raises(ConfigError):
        keys.read("good", content)


def test_one_that_cannot_be_read_is_named_and_the_others_are_learnt() -> None:
    good = msgspec.json.encode(GOOD)
    found = [b"good", good]
    for number, value in enumerate(BAD):
        found += [b"bad-%d" % number, msgspec.json.encode({**GOOD, "name": f"bad-{number}", **value})]
    readable, unreadable = stored_keys([*found, b"\xff\x00", good])
    assert list(readable) == ["good"]
    assert set(unreadable) == {f"bad-{number}" for number in range(len(BAD))} | {"\\xff\x00"}
    assert "expires: '0001-01-01' is before the year 1970" in unreadable["bad-0"]
    known = Keys(SETTINGS)
    known.learn(readable)
    assert known.find(b"good") is not None


def test_a_fault_of_ours_with_one_key_is_that_keys_alone(caplog: pytest.LogCaptureFixture) -> None:
    known = Keys(SETTINGS)
    odd = StoredKey(name="odd", hash="sha256:odd")  # which nobody has checked
    known.learn({"odd": odd, "good": StoredKey(**GOOD)})
    assert known.find(b"good") is not None
    assert known.find(b"odd") is None
    known.learn({})
    assert known.find(b"good") is None, "a revoked key is refused whatever else was wrong"
    assert "the stored key 'odd' cannot be used" in caplog.text


def test_a_day_is_a_day_of_utc_wherever_the_gateway_runs() -> None:
    assert config.instant("2027-01-31") == config.instant("2027-01-31T00:00:00Z") == 1801353600
    assert config.instant("2027-01-31T02:00:00+02:00") == 1801353600


numbers = st.one_of(st.none(), st.integers(-(10**30), 10**30), st.floats(allow_nan=False), st.sampled_from([1e-6, 1e12, 1, 60]))
entries = st.fixed_dictionaries(
    {"name": st.just("k"), "hash": st.just(hashed("k"))},
    optional={
        **dict.fromkeys(("rpm", "tpm", "max_in_flight", "tokens_per_day", "max_n", "max_tokens", "priority", "created"), numbers),
        "models": st.none() | st.lists(st.text(max_size=8)),
        "per_model": st.dictionaries(st.sampled_from(["m", "x"]), st.fixed_dictionaries({}, optional={"rpm": numbers, "tpm": numbers})),
        "budget": st.none() | st.fixed_dictionaries({"amount": numbers}, optional={"per": st.sampled_from(["day", "month", "year"])}),
        "expires": st.none() | st.text(max_size=12) | st.datetimes().map(lambda at: at.isoformat()) | st.dates().map(str),
        "old_hash": st.none() | st.text(max_size=8) | st.just(hashed("old")),
        "old_until": numbers,
        "metadata": st.dictionaries(st.text(max_size=4), st.text(max_size=4)),
    },
)


@settings(max_examples=500, deadline=None)
@given(entries)
def test_whatever_can_be_read_can_be_used(tree: dict[str, Any]) -> None:
    try:
        entry = keys.read("k", msgspec.json.encode(tree))
    except ConfigError:
        return
    known = Keys(SETTINGS)
    known.learn({"k": entry})
    caller = known.find(b"k")
    if caller is None:  # it has expired
        assert entry.expires is not None
        return
    for model in SETTINGS.models:
        asks = [Ask(limit.key, limit, 1.0 if limit.each else min(1000.0, limit.burst or 1000.0), 60.0) for limit in caller.limits(model)]
        decision = Memory(now=lambda: SECOND).decide(asks)
        assert all(math.isfinite(value) for state in decision.states for value in state)


def test_however_many_unknown_keys_come_the_store_is_asked_a_few_times_a_second_and_after_each_of_them() -> None:
    """Whoever comes while a reading is under way may have been made after it began, so that the next one is waited for."""

    class Counted(KeySync):
        begun = ended = 0

        async def read(self) -> None:
            self.begun += 1
            await asyncio.sleep(0.01)
            self.ended += 1
            if self.begun % 2:
                raise StoreFailed("which is nobody's matter here")

    async def work() -> None:
        sync = Counted(Client(SETTINGS.redis), lambda keys: None, lambda lost: None, KeyList())

        async def one(number: int) -> None:
            await asyncio.sleep(number / 2000)
            came = sync.begun
            await sync.fresh()
            assert sync.ended > came, "what was read began after it came"

        began = asyncio.get_running_loop().time()
        await asyncio.gather(*(one(number) for number in range(400)))
        passed_s = asyncio.get_running_loop().time() - began
        assert sync.begun <= passed_s / 0.1 + 2

    asyncio.run(work())
