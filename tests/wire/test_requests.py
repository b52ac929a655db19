"""`penstock requests`: what is being answered, what went wrong and who waited, from a gateway that runs and from what Redis remembers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.access.keys import hashed
from tests.support import raw, redis
from tests.support.processes import ROOT, Gateway, Rehearsal, gateway, until
from tests.wire.test_command import penstock

CHAT = "/v1/chat/completions"
KEYS = [{"name": "ann", "hash": hashed("ann")}, {"name": "ben", "hash": hashed("ben"), "rpm": 1}]


@pytest.fixture(scope="module")
def running(scripted_sglang: Rehearsal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("requests"), {**scripted_sglang.backend(), "keys": KEYS}) as one:
        one.wait_all_hosts()
        yield one


def ask(running: Gateway, key: str, name: str, prompt: str = "hi", **more: Any) -> raw.Answer:
    return raw.call(running.port, "POST", CHAT, raw.chat(prompt, **more), {"authorization": f"Bearer {key}", "x-request-id": name})


def command(running: Gateway, *arguments: str) -> subprocess.CompletedProcess[str]:
    return penstock("requests", "--admin", running.admin_url, *arguments, folder=running.log.parent)


def rows(running: Gateway, *arguments: str) -> dict[str, dict[str, Any]]:
    """By the client's own id, in their order."""
    done = command(running, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return {row["request_id"]: row for row in json.loads(done.stdout)["requests"]}


def test_a_day_in_rows(running: Gateway, scripted_sglang: Rehearsal) -> None:
    assert ask(running, "ann", "well").status == 200
    assert ask(running, "ann", "streamed", "[[tokens 5]]", stream=True).status == 200
    assert ask(running, "ann", "waited", "[[tokens 20]] [[pace 0.03]]").status == 200
    assert ask(running, "ann", "broken", "[[refuse 500]]").status == 502
    assert [ask(running, "ben", f"ben-{number}").status for number in range(2)] == [200, 429]
    assert ask(running, "nobody", "unknown").status == 401
    found = rows(running)
    assert next(iter(found)) == "unknown", "the newest first"
    assert list(found)[-1] == "well"
    assert list(rows(running, "--failed")) == ["broken"]
    assert list(rows(running, "--refused")) == ["unknown", "ben-1"]
    assert next(iter(rows(running, "--slow"))) == "waited", "whose client has waited longest"
    assert list(rows(running, "--slow", "--last", "1")) == ["waited"]
    assert list(rows(running, "--key", "ben")) == ["ben-1", "ben-0"]
    assert list(rows(running, "--key", "ben", "--refused", "--since", "1h")) == ["ben-1"]
    assert rows(running, "--model", "nobody") == {}
    assert "broken" in rows(running, "--host", scripted_sglang.url.removeprefix("http://"))
    assert rows(running, "--open") == {}
    well = found["well"]
    assert (well["key"], well["model"], well["outcome"], well["status"]) == ("ann", "deepseek-v3", "ok", 200)
    assert well["host"] == scripted_sglang.url.removeprefix("http://")
    assert well["prompt_tokens"] > 0
    assert (found["unknown"]["id"], found["unknown"]["outcome"], found["unknown"]["status"]) == ("", "unauthorized", 401)
    # As people see it; an id leads to `explain`.
    lines = {line.split()[1]: line.split() for line in command(running).stdout.splitlines()}
    header = lines.pop("id")
    assert header[:7] == ["time", "id", "key", "model", "host", "outcome", "status"]
    of_well = lines[well["id"]]
    assert of_well[2:8] == ["ann", "deepseek-v3", well["host"], "ok", "200", "-"], "who has no stream saw no first token"
    assert float(lines[found["streamed"]["id"]][7].replace(",", "")) > 0
    assert lines["unknown"][2:6] == ["-", "-", "-", "unauthorized"]
    explained = penstock("explain", well["id"], "--admin", running.admin_url, folder=running.log.parent)
    assert explained.returncode == 0, explained.stderr


def test_what_is_being_answered_says_what_it_is_at(running: Gateway) -> None:
    head = {"authorization": "Bearer ann", "x-request-id": "under-way"}
    with raw.connect(running.port) as peer:
        body = json.dumps(raw.chat("[[tokens 9000]] [[pace 0.05]]", stream=True)).encode()
        peer.sendall(raw.request("POST", CHAT, body, head))
        assert peer.recv(1024)
        (row,) = rows(running, "--open").values()
        assert (row["request_id"], row["key"], row["outcome"], row["why"]) == ("under-way", "ann", "open", "engine: generating")
        assert 0 < row["first_event_ms"] <= row["ms"]
        assert "under-way" in rows(running)
        assert "under-way" not in rows(running, "--failed")
        (line,) = [line for line in command(running, "--open").stdout.splitlines() if row["id"] in line]
        assert "open: engine: generating" in line
    until("it has ended", lambda: rows(running).get("under-way", {}).get("outcome") == "client_gone")
    assert rows(running, "--open") == {}


def test_since_looks_back_from_the_end_of_a_request(running: Gateway) -> None:
    assert ask(running, "ann", "long", "[[tokens 25]] [[pace 0.1]]").status == 200
    assert "long" in rows(running, "--since", "2s"), "it began before that, and was open"
    until("it is too long ago", lambda: "long" not in rows(running, "--since", "1s"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--since", "1x"), "--since 1x: accepted is a whole number and s, m, h or d, such as 90s, 15m, 1h or 2d"),
        (("--open", "--slow"), "--open and --slow: only one of them at once"),
        (("--key", "anne"), "There is no key 'anne'; did you mean 'ann'?"),
    ],
)
def test_what_is_not_understood_gets_one_line(running: Gateway, arguments: tuple[str, ...], words: str) -> None:
    done = command(running, *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"penstock: {words}\n")


@pytest.mark.parametrize(("flag", "words"), [("--faild", "'--failed'"), ("--last=0", "1<=x<=500"), ("--last=x", "not a valid integer")])
def test_nor_does_a_flag_get_more(running: Gateway, flag: str, words: str) -> None:
    done = command(running, flag)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert line.startswith("penstock: ")
    assert words in line
    assert line.endswith(" requests --help says what it takes)")


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("sate=open", "Unknown parameter 'sate' (did you mean 'state'?); accepted: state, key, model, host, since, last, of."),
        ("state=opened", "'state' is open, failed, refused, slow, or left out (did you mean 'open'?)."),
        ("since=-1h", "'since' must be a whole number and s, m, h or d, such as 90s, 15m, 1h or 2d."),
        ("last=501", "'last' must be 1 to 500."),
        ("last=%C2%B2", "'last' must be 1 to 500."),
    ],
)
def test_nor_does_the_admin_api_take_it(running: Gateway, query: str, words: str) -> None:
    answer = running.admin(f"/admin/requests?{query}")
    assert (answer.status, answer.json()["error"]["message"]) == (400, words)


def test_redis_remembers_for_a_gateway_that_is_not_there(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with redis.server(tmp_path / "redis") as store:
        config = {**scripted_sglang.backend(), "keys": KEYS, "redis": {"url": store.url}}
        with gateway(tmp_path / "other", config) as one:
            one.wait_all_hosts()
            assert ask(one, "ann", "elsewhere").status == 200
            with gateway(tmp_path / "run", config) as running:
                running.wait_all_hosts()
                assert ask(running, "ann", "here").status == 200
                assert ask(running, "ann", "broken", "[[refuse 500]]").status == 502
                until("both gateways know all of it", lambda: set(rows(running)) == {"elsewhere", "here", "broken"})
                assert list(rows(running, "--failed")) == ["broken"], "those that both know are told once"
        file = tmp_path / "run" / "penstock.yaml"
        file.write_text(yaml.safe_dump({**config, "listen": {"admin": "127.0.0.1:9"}}))

        def offline(*arguments: str) -> subprocess.CompletedProcess[str]:
            return penstock("requests", "-c", str(file), *arguments, folder=tmp_path, PENSTOCK__LISTEN__ADMIN="127.0.0.1:9")

        done = offline("--failed", "--json")
        assert done.returncode == 0, done.stderr
        assert [row["request_id"] for row in json.loads(done.stdout)["requests"]] == ["broken"]
        assert (
            done.stderr
            == "penstock: no gateway answers at http://127.0.0.1:9: [Errno 111] Connection refused; this is what Redis remembers\n"
        )
        assert len(offline().stdout.splitlines()) == 4
        assert len(offline("--since", "1d", "--key", "ann", "--last", "2").stdout.splitlines()) == 3
        nobody = offline("--open")
        assert (nobody.returncode, nobody.stdout) == (1, "")
        assert nobody.stderr == "penstock: no gateway answers at http://127.0.0.1:9: [Errno 111] Connection refused\n"
    gone = offline("--failed")
    assert (gone.returncode, gone.stdout) == (1, "")
    assert "nor does Redis: " in gone.stderr
    assert len(gone.stderr.splitlines()) == 1
    file.write_text(yaml.safe_dump({**scripted_sglang.backend(), "listen": {"admin": "127.0.0.1:9"}}))
    alone = offline("--failed")
    assert (alone.returncode, alone.stdout) == (1, "")
    assert alone.stderr.endswith("Connection refused; without Redis nobody else remembers requests\n")


def test_the_day_of_the_page_needs_no_curl(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    """Each command of docs/operating.md's day, as it stands there but for the names of what is there."""
    page = (ROOT / "docs" / "operating.md").read_text().split("## A day")[1].split("```")[1]
    day = [line.removeprefix("$ penstock ").split("  #")[0].strip() for line in page.splitlines() if line.startswith("$ ")]
    assert len(day) > 10
    host = scripted_sglang.url.removeprefix("http://")
    with redis.server(tmp_path / "redis") as store:
        config = {**scripted_sglang.backend(), "redis": {"url": store.url}, "teams": [{"name": "blue", "rpm": 600}]}
        (tmp_path / "class.csv").write_text("name,rpm\nann,600\nben,60\n")
        with gateway(tmp_path, config) as running:
            running.wait_all_hosts()
            address = running.admin_url.removeprefix("http://")
            asked = ""
            for line in day:
                words, _, into = line.replace("10.0.0.2:30000", host).replace("req_b6d1...", asked).partition(" > ")
                done = penstock(*words.split(), folder=tmp_path, PENSTOCK__LISTEN__ADMIN=address)
                assert done.returncode == 0, f"penstock {line}: {done.stderr}"
                if into:
                    (tmp_path / into).write_text(done.stdout)
                    keys = dict(row.split(",") for row in done.stdout.splitlines() if row.startswith(("ann,", "ben,")))
                    assert set(keys) == {"ann", "ben"}
                    answer = ask(running, keys["ann"], "of-ann", "[[refuse 500]]")
                    assert answer.status == 502
                    until("it is known", lambda: "of-ann" in rows(running))
                if words.startswith("requests --failed"):
                    (row,) = [row.split() for row in done.stdout.splitlines() if "engine_error" in row]
                    asked = row[1]
                if words.startswith("explain"):
                    assert done.stdout.startswith("failed: the engine answered 500")
