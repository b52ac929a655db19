"""`penstock explain` of what was refused, what went on elsewhere and what took its time: it begins with a verdict, and what it says is
so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.access.keys import hashed
from tests.support import raw, redis
from tests.support.processes import Gateway, Rehearsal, gateway, rehearsal, until

CHAT = "/v1/chat/completions"
KEYS = [
    {"name": "research", "hash": hashed("research"), "rpm": 2, "tokens_per_day": 100_000, "max_in_flight": 5},
    {"name": "small", "hash": hashed("small"), "tpm": 10},
    {"name": "gone", "hash": hashed("gone"), "expires": "2026-01-01T00:00:00Z"},
    {"name": "free", "hash": hashed("free")},
]


@pytest.fixture(params=["memory", "redis"], scope="module")
def limited(request: pytest.FixtureRequest, scripted_sglang: Rehearsal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("limited")
    with contextlib.ExitStack() as stack:
        config = {**scripted_sglang.backend(), "keys": KEYS}
        if request.param == "redis":
            config["redis"] = {"url": stack.enter_context(redis.server(folder / "redis")).url}
        running = stack.enter_context(gateway(folder / "run", config))
        running.wait_all_hosts()
        yield running


def ask(running: Gateway, key: str, name: str, prompt: str = "hi", **more: Any) -> raw.Answer:
    return raw.call(running.port, "POST", CHAT, raw.chat(prompt, **more), {"authorization": f"Bearer {key}", "x-request-id": name})


def explained(running: Gateway, name: str) -> tuple[dict[str, Any], list[str]]:
    """As JSON, and as the lines that people read."""
    until("it is known", lambda: running.admin(f"/admin/requests/{name}").status == 200)
    return running.admin(f"/admin/requests/{name}").json(), running.admin(f"/admin/requests/{name}?format=text").body.decode().splitlines()


def test_a_429_says_which_limit_how_full_and_when_it_is_renewed(limited: Gateway) -> None:
    answers = [ask(limited, "research", f"limited-{number}") for number in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    found, lines = explained(limited, "limited-2")
    assert lines[0] == found["verdict"]
    assert found["verdict"].startswith("refused by a limit: Rate limit reached for key 'research' on requests per minute (rpm): limit 2.")
    rows = {row["limit"]: row for row in found["limits"]}
    assert set(rows) == {f"key 'research': {unit}" for unit in ("rpm", "max_in_flight", "tokens_per_day")}
    assert [limit for limit, row in rows.items() if row["refused"]] == ["key 'research': rpm"]
    full = rows["key 'research': rpm"]
    assert (full["most"], full["left"], full["full"]) == (2, 0, 1)
    assert 30 < full["renewed_s"] <= 60
    day = rows["key 'research': tokens_per_day"]
    assert 0 < day["full"] < 0.01
    assert 0 < day["renewed_s"] <= 86_400
    (line,) = [line for line in lines if "refused, " in line and "rpm" in line]
    assert "100% full, unused again in " in line
    # One that passed says the same of its limits.
    found, lines = explained(limited, "limited-0")
    assert found["verdict"].endswith(" of the time")
    assert not any(row["refused"] for row in found["limits"])
    assert any("key 'research': rpm" in line and "took 1, 1 left of 2, 50% full" in line for line in lines)


def test_refusals_are_counted_by_key_in_the_metrics_and_in_the_ledger(limited: Gateway) -> None:
    before = usage(limited).get("small", {"limited": 0, "requests": 0})["limited"]
    for number in range(2):
        refused = ask(limited, "small", f"large-{number}", "word " * 50)
        assert (refused.status, refused.headers["x-should-retry"]) == (429, "false")
    until("the ledger has them", lambda: usage(limited).get("small", {}).get("limited") == before + 2)
    row = usage(limited)["small"]
    assert (row["requests"], row["prompt_tokens"], row["cost"]) == (0, 0, 0.0), "they are none of those that were served"
    counted = f'penstock_limited_total{{limit="tpm",model="deepseek-v3",key="small"}} {before + 2}'
    assert counted in limited.admin("/metrics").body.decode().splitlines()
    found, _ = explained(limited, "large-1")
    assert found["verdict"].startswith(
        "refused by a limit: Request too large for key 'small' on tokens per minute (tpm): at most 10 at once"
    )


def usage(running: Gateway) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in running.admin("/admin/usage?by=key").json()["usage"]}


def test_a_401_says_to_the_operator_and_to_nobody_else_why(limited: Gateway) -> None:
    answers = {name: ask(limited, name, f"of-{name}") for name in ("gone", "never-was")}
    assert answers["gone"].body == answers["never-was"].body
    assert {answer.status for answer in answers.values()} == {401}
    assert explained(limited, "of-gone")[1][0] == "refused: the key 'gone' has expired"
    verdict = explained(limited, "of-never-was")[1][0]
    assert verdict == f"refused: no key is known whose SHA-256 begins with {hashed('never-was')[7:15]}"
    assert raw.call(limited.port, "POST", CHAT, raw.chat("hi"), {"x-request-id": "of-nobody"}).status == 401
    found, _ = explained(limited, "of-nobody")
    assert (found["status"], found["outcome"], found["verdict"]) == (401, "unauthorized", "refused: no key was sent")
    assert "never-was" not in limited.output().replace("of-never-was", ""), "no key is in the log"


def test_whoever_is_refused_in_a_loop_pushes_out_nothing_else(limited: Gateway) -> None:
    assert ask(limited, "free", "kept").status == 200
    explained(limited, "kept")
    for number in range(600):
        assert raw.call(limited.port, "GET", "/v1/models", headers={"x-request-id": f"loop-{number}"}).status == 401
    assert explained(limited, "loop-599")[0]["status"] == 401
    assert limited.admin("/admin/requests/loop-0").status == 404
    assert explained(limited, "kept")[0]["status"] == 200


def test_the_verdict_names_whose_the_time_was(limited: Gateway) -> None:
    assert ask(limited, "free", "slow", "[[tokens 20]] [[pace 0.05]]").status == 200
    found, lines = explained(limited, "slow")
    whose, share = lines[0].removesuffix("% of the time").split(": ")
    assert (whose, int(share) > 80) == ("the engine", True)
    assert any("engine: the whole answer" in line for line in lines)
    assert "generate" not in found["phases_ms"]
    assert ask(limited, "free", "failed", "[[refuse 500]]").status == 502
    assert explained(limited, "failed")[1][0].startswith("failed: the engine answered 500: ")


def test_continued_is_said_where_it_was_and_nowhere_else(tmp_path: Path) -> None:
    with rehearsal() as one, rehearsal() as other:
        config = one.backend()
        config["backends"]["dsv3"]["hosts"].append({"url": other.url})
        with gateway(tmp_path, config) as running:
            running.wait_all_hosts()

            def stream(name: str, prompt: str, **more: Any) -> tuple[bytes, dict[str, Any], str]:
                body = raw.call(running.port, "POST", CHAT, raw.chat(prompt, stream=True, **more), {"x-request-id": name}).body
                found, lines = explained(running, name)
                return body, found, "\n".join(lines)

            body, found, text = stream("moved", "[[cut 3]] [[times 1]]")
            assert b"data: [DONE]" in body
            assert found["continuations"] == 1
            assert "continued on another host\n" in text
            assert "goes on at" in text
            # The answer had all its tokens: nothing but closing words was missing, which take no host.
            body, found, text = stream("closed", "[[cut 9]] [[times 1]]", max_tokens=8)
            assert b"data: [DONE]" in body
            assert b"continued" not in body
            assert (found["continuations"], len(found["attempts"])) == (0, 1)
            assert "continued" not in text
            # There is nobody to go on with it.
            assert running.admin(f"/admin/hosts/{other.url[7:]}/drain", "POST").status == 200
            body, found, text = stream("ended", "[[cut 3]]")
            assert b"[DONE]" not in body
            assert found["continuations"] == 0
            assert "continued" not in text
            assert found["verdict"].startswith("failed: cut: ")
            assert "goes on at" not in "\n".join(line for line in running.output().splitlines() if "closed" in line)
