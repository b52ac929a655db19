"""The operator's console, in a real Chromium before a gateway with two hosts, keys in Redis and operators of two roles."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway.access.keys import hashed
from gateway.pages import POLICY
from tests.support import raw, redis
from tests.support.chromium import Browser, chromium
from tests.support.processes import Gateway, Rehearsal, environment, gateway, rehearsal, until
from tests.wire.test_command import penstock
from tests.wire.test_front import EVIL, colours, contrast, names_missing, too_wide

CHAT = "/v1/chat/completions"
ANN = {"authorization": "Bearer anns"}
BOSS = {"authorization": "Bearer bosses"}


@dataclass
class Set:
    """What the console is about."""

    running: Gateway
    store: redis.Server
    hosts: list[str]

    @property
    def console(self) -> str:
        return f"{self.running.admin_url}/console"

    def chat(self, prompt: str, **more: str) -> raw.Answer:
        return raw.call(self.running.port, "POST", CHAT, raw.chat(prompt), {**ANN, **more})


@pytest.fixture(scope="module")
def stage(scripted_sglang: Rehearsal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Set]:
    folder = tmp_path_factory.mktemp("stage")
    config = scripted_sglang.backend()
    with rehearsal() as other, redis.server(tmp_path_factory.mktemp("redis")) as store:
        config["backends"]["dsv3"]["hosts"].append({"url": other.url})
        config |= {
            "listen": {"workers": 2},
            "redis": {"url": store.url},
            "keys": [{"name": "ann", "hash": hashed("anns"), "rpm": 6000}, {"name": "poor", "hash": hashed("poor"), "rpm": 1}],
            "admin": {
                "key_hash": hashed("bosses"),
                "keys": [{"name": "looker", "hash": hashed("lookers"), "role": "read"}],
            },
        }
        with gateway(folder, config) as running:
            running.wait_ready()
            hosts = [url.removeprefix("http://") for url in (scripted_sglang.url, other.url)]
            yield Set(running, store, hosts)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.fixture
def page(browser: Browser, stage: Set) -> Iterator[Browser]:
    """The console before anybody has signed in; at the end nothing has gone wrong in it, and nothing was stopped by the page's policy."""
    browser.open("about:blank")
    browser.open(stage.console)
    browser.failures.clear()
    yield browser
    assert browser.failures == []
    assert browser.violations() == []


def sign_in(page: Browser, key: str = "bosses") -> None:
    page.wait("!document.querySelector('#login').hidden")
    page.fill("key", key)
    page.press("Enter")
    page.wait("document.querySelectorAll('#hosts tbody tr').length === 2")
    page.wait("document.querySelector('#live').textContent === 'live'")


def cell(page: Browser, table: str, first: str, title: str) -> str:
    """A cell by its row's first cell and its column's title."""
    found = page.run(
        f"(() => {{ const table = document.querySelector({json.dumps(f'#{table}')});"
        f" const row = [...table.tBodies[0].rows].find((row) => row.cells[0].textContent === {json.dumps(first)});"
        f" return row?.querySelector(`td[data-label={json.dumps(title)}]`)?.textContent ?? ''; }})()"
    )
    return str(found)


def test_it_is_on_the_admin_listener_alone_and_shows_nothing_without_a_key(page: Browser, stage: Set) -> None:
    running = stage.running
    for path in ("/console", "/console/console.js", "/console/common.css"):
        answer = raw.call(running.admin_port, "GET", path)
        assert answer.status == 200
        assert answer.headers["content-security-policy"].encode() == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        for host in stage.hosts:
            assert host.encode() not in answer.body
        assert raw.call(running.port, "GET", path, headers=ANN).status == 404
        foreign = raw.call(running.admin_port, "GET", path, headers={"sec-fetch-site": "cross-site"})
        assert (foreign.status, foreign.error()["code"]) == (403, "cross_site")
    assert raw.call(running.admin_port, "POST", "/console", headers={"content-type": "application/json"}).status in (403, 405)
    assert raw.call(running.admin_port, "GET", "/console/nothing").status == 404
    assert page.run("[document.querySelector('#console').hidden, document.querySelector('#login').hidden]") == [True, False]
    for wrong in ("nonsense", "anns", "schlüssel"):
        page.fill("key", wrong)
        page.press("Enter")
        page.wait("document.querySelector('#login-problem').textContent === 'This is not an admin key of this gateway.'")
        page.run("document.querySelector('#login-problem').textContent = ''")
    assert page.run("document.querySelector('#console').hidden") is True


def test_hosts_are_shown_and_a_change_is_seen_when_it_happens(page: Browser, stage: Set) -> None:
    sign_in(page)
    page.wait("document.querySelector('#state').textContent === 'ready'")
    for host in stage.hosts:
        until("it is well", lambda host=host: cell(page, "hosts", host, "state") == "ok")  # type: ignore[misc]
    one = stage.hosts[0]
    assert stage.running.admin(f"/admin/hosts/{one}/drain", "POST", BOSS).status == 200  # by somebody else
    until("it is seen", lambda: cell(page, "hosts", one, "state") == "drained")
    assert cell(page, "hosts", stage.hosts[1], "state") == "ok"
    assert stage.running.admin(f"/admin/hosts/{one}/undrain", "POST", BOSS).status == 200
    until("and that it is back", lambda: cell(page, "hosts", one, "state") == "ok")


def test_a_host_is_drained_by_its_button_which_keeps_the_focus_and_is_in_the_audit(page: Browser, stage: Set) -> None:
    sign_in(page)
    one, other = stage.hosts
    page.run(f"document.querySelector('button[aria-label=\"Drain {one}\"]').focus()")
    page.press("Enter")
    page.wait("document.querySelector('#done').textContent.includes('gets no new requests')")
    until("it is seen", lambda: cell(page, "hosts", one, "state") == "drained")
    assert page.run("document.activeElement.getAttribute('aria-label')") == f"Undrain {one}"
    entry = stage.running.admin("/admin/audit?last=1", headers=BOSS).json()["audit"][0]
    assert (entry["who"], entry["what"], entry["status"]) == ("admin", f"POST /admin/hosts/{one.replace(':', '%3A')}/drain", 200)
    assert (entry["before"], entry["after"]) == ({"state": "ok"}, {"state": "drained"})
    # The last one is asked about: no is no.
    page.dialogs.clear()
    page.accept_dialogs = False
    page.click(f"button[aria-label='Drain {other}']")
    until("it was asked", lambda: page.run("1") and page.dialogs)
    assert "the last host" in page.dialogs[0]
    page.accept_dialogs = True
    assert cell(page, "hosts", other, "state") == "ok"
    page.click(f"button[aria-label='Undrain {one}']")
    page.wait("document.querySelector('#done').textContent.includes('gets requests again')")
    until("it is seen", lambda: cell(page, "hosts", one, "state") == "ok")


def test_a_key_that_may_only_read_drains_nothing_and_is_told_so(page: Browser, stage: Set) -> None:
    sign_in(page, "lookers")
    assert page.text("#role") == "Signed in as 'looker', role 'read': everything is shown; draining hosts wants a key with the role 'all'."
    one = stage.hosts[0]
    button = f"button[aria-label='Drain {one}']"
    assert page.run(f"[document.querySelector({json.dumps(button)}).disabled, "
                    f"document.querySelector({json.dumps(button)}).getAttribute('aria-describedby')]") == [True, "role"]  # fmt: skip
    page.click(button)
    # Nor does it help to make the button work: the gateway refuses.
    page.run(f"document.querySelector({json.dumps(button)}).disabled = false, document.querySelector({json.dumps(button)}).click()")
    page.wait("document.querySelector('#done').textContent.includes(\"has the role 'read', which may not do this\")")
    assert cell(page, "hosts", one, "state") == "ok"


def test_requests_are_listed_as_they_come_and_one_is_explained_as_a_timeline(page: Browser, stage: Set) -> None:
    sign_in(page)
    failed = stage.chat("[[refuse 500]] what nobody may read", **{"x-request-id": "went-wrong"})
    assert failed.status == 502
    until("it is listed", lambda: "went-wrong" in page.text("#requests") or "engine_error" in page.text("#requests"))
    page.run("document.querySelector('#which').value = 'failed', document.querySelector('#which').dispatchEvent(new Event('change'))")
    page.wait("[...document.querySelectorAll('#requests tbody tr')].every((row) => !row.textContent.includes('ok:'))")
    page.wait("document.querySelectorAll('#requests tbody button').length")
    page.run("document.querySelector('#requests tbody button').focus()")
    page.press("Enter")
    page.wait("document.querySelectorAll('#story .track').length === 2")
    assert page.text("#verdict").startswith("failed: ")
    attempts = page.run("[...document.querySelectorAll('#story .track')].map((track) => track.getAttribute('aria-label'))")
    asked = {re.search(r" at (\S+): broken; ", words)[1] for words in attempts}  # type: ignore[index]
    assert asked == set(stage.hosts), "each host was tried once"
    widths = page.run("[...document.querySelectorAll('#story .bar')].map((bar) => bar.getBoundingClientRect().width)")
    assert len(widths) == 2
    assert all(width > 0 for width in widths)
    assert page.run("document.activeElement.id") == "explained-title"
    assert "what nobody may read" not in page.text()
    # Whoever waits for tokens: striped until the first, solid after it, and the phases add up.
    answer = stage.chat("[[tokens 20]] [[pace 0.02]]")
    page.fill("find", answer.json()["id"])
    page.press("Enter")
    page.wait("document.querySelectorAll('#story .track').length === 1")
    assert "the engine" in page.text("#verdict")
    shares = page.run("[...document.querySelectorAll('#story .phases td:nth-child(3)')].map((cell) => parseFloat(cell.textContent))")
    assert sum(shares) == pytest.approx(100, abs=2)
    assert page.run("location.hash") == f"#request={answer.json()['id']}"
    page.run("history.back()")
    page.wait("document.querySelectorAll('#story .track').length === 2")
    page.click("#close")
    page.wait("document.querySelector('#explained').hidden")
    page.fill("find", "nobody-knows-it")
    page.press("Enter")
    page.wait("document.querySelector('#story').textContent.startsWith(\"No request 'nobody-knows-it' is known\")")


def test_open_requests_and_refusals_are_shown_with_their_reasons(page: Browser, stage: Set) -> None:
    sign_in(page)
    choose = "document.querySelector('#which').value = '{0}', document.querySelector('#which').dispatchEvent(new Event('change'))"
    page.run(choose.format("open"))
    with raw.connect(stage.running.port) as peer:
        body = json.dumps(raw.chat("[[tokens 2000]] [[pace 0.1]]", stream=True)).encode()
        peer.sendall(raw.request("POST", CHAT, body, {**ANN, "content-length": str(len(body))}))
        page.wait("document.querySelector('#requests').textContent.includes('open: engine: generating')")
    page.wait("document.querySelector('#none').textContent === 'None.'")
    for status in (200, 429):
        assert raw.call(stage.running.port, "POST", CHAT, raw.chat("x"), {"authorization": "Bearer poor"}).status == status
    page.run(choose.format("refused"))
    page.wait("document.querySelector('#requests').textContent.includes('429 limited: refused by a limit')")
    until("the key's refusals are counted", lambda: cell(page, "keys", "poor", "refused by limits") == "1")
    assert cell(page, "keys", "poor", "requests today") == "1"
    assert "rpm 1" in cell(page, "keys", "poor", "may")


def test_what_is_html_stays_text(page: Browser, stage: Set) -> None:
    """A model's name from a client, a key's name that somebody wrote into Redis, the id of a request that is looked for, and a prompt."""
    sign_in(page)
    stage.store.client().hset("penstock:{default}:keys", EVIL, b"{}")
    stage.store.client().incr("penstock:{default}:keys:version")
    body = {"model": EVIL, "messages": [{"role": "user", "content": EVIL}]}
    assert raw.call(stage.running.port, "POST", CHAT, body, ANN).status == 404
    try:
        page.wait(f"[...document.querySelectorAll('#requests td')].some((cell) => cell.textContent === {json.dumps(EVIL)})")
        page.wait(f"[...document.querySelectorAll('#keys td')].some((cell) => cell.textContent === {json.dumps(EVIL)})")
        page.wait(f"[...document.querySelectorAll('#of-key option')].some((option) => option.textContent === {json.dumps(EVIL)})")
        page.fill("find", EVIL)
        page.press("Enter")
        page.wait("document.querySelector('#story').textContent.includes('is known')")
        assert page.text("#explained-title") == f"Request {EVIL}"
        row = f"[...document.querySelectorAll('#requests tr')].find((row) => row.textContent.includes({json.dumps(EVIL)}))"
        page.run(f"{row}.querySelector('button').click()")
        page.wait("document.querySelector('#verdict')?.textContent.startsWith('refused')")
        assert EVIL in page.text("#story")
        assert page.run("document.querySelectorAll('main img').length") == 0
        assert page.run("window.ran") is None
    finally:
        stage.store.client().hdel("penstock:{default}:keys", EVIL)
        stage.store.client().incr("penstock:{default}:keys:version")


def test_the_key_is_kept_nowhere_unless_it_is_asked_for_and_then_for_the_tab_alone(page: Browser, stage: Set) -> None:
    sign_in(page)
    stores = "[localStorage.length, sessionStorage.length, document.cookie.length]"
    assert page.run(stores) == [0, 0, 0]
    assert "bosses" not in page.text() + page.run("location.href")
    page.reload()
    page.wait("!document.querySelector('#login').hidden")
    assert page.run("document.querySelector('#key').value") == ""
    page.click("#keep")
    sign_in(page)
    assert page.run(stores) == [0, 1, 0]
    page.reload()
    page.wait("document.querySelectorAll('#hosts tbody tr').length === 2")
    page.click("#leave")
    page.wait("!document.querySelector('#login').hidden")
    assert page.run(stores) == [0, 0, 0]
    assert page.run("document.activeElement.id") == "key"


def test_a_tab_that_nobody_looks_at_asks_nothing(page: Browser, stage: Set) -> None:
    sign_in(page)
    define = "Object.defineProperty(document, 'hidden', {{value: {0}, configurable: true}})"
    hide = f"{define}, document.dispatchEvent(new Event('visibilitychange'))"
    page.run(hide.format("true"))
    page.wait("document.querySelector('#live').textContent === 'paused'")
    page.run("performance.clearResourceTimings()")
    one = stage.hosts[0]
    assert stage.running.admin(f"/admin/hosts/{one}/drain", "POST", BOSS).status == 200
    try:
        page.run("new Promise((done) => setTimeout(done, 2500))")
        assert page.run("performance.getEntriesByType('resource').length") == 0
        assert cell(page, "hosts", one, "state") == "ok"
        page.run(hide.format("false"))
        until("what has changed meanwhile is seen", lambda: cell(page, "hosts", one, "state") == "drained")
    finally:
        assert stage.running.admin(f"/admin/hosts/{one}/undrain", "POST", BOSS).status == 200


def test_it_can_be_used_by_keyboard_in_the_dark_and_on_a_phone(page: Browser, stage: Set) -> None:
    page.size(360, 740)
    try:
        sign_in(page)
        page.fill("find", stage.chat("hi").json()["id"])
        page.press("Enter")
        page.wait("document.querySelectorAll('#story .track').length")
        assert too_wide(page) == []
        seen = []
        for dark in (True, False):
            page.dark(dark)
            text, ground = colours(page)
            assert contrast(text, ground) >= 7
            seen.append(ground)
        assert seen[0] != seen[1]
        assert names_missing(page) == []
        page.run("document.activeElement.blur(), getSelection().removeAllRanges(), scrollTo(0, 0)")
        reached = []
        page.run("document.querySelector('#leave').focus()")
        for _ in range(4):
            page.press("Tab")
            reached.append(page.run("document.activeElement.getAttribute('aria-label') ?? document.activeElement.id"))
        assert reached == [*(f"Drain {host}" for host in stage.hosts), "which", "of-key"]
    finally:
        page.send("Emulation.clearDeviceMetricsOverride")


def test_a_gateway_that_is_gone_is_said_to_be_and_found_again(browser: Browser, scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    config = {**scripted_sglang.backend(), "admin": {"key_hash": hashed("bosses")}}
    address = f"127.0.0.1:{redis.free_port()}"
    with gateway(tmp_path / "1", config, PENSTOCK__LISTEN__ADMIN=address) as running:
        running.wait_ready()
        browser.open(f"{running.admin_url}/console")
        browser.wait("!document.querySelector('#login').hidden")
        browser.fill("key", "bosses")
        browser.press("Enter")
        browser.wait("document.querySelector('#live').textContent === 'live'")
    browser.wait("document.querySelector('#live').textContent !== 'live'")
    with gateway(tmp_path / "2", config, PENSTOCK__LISTEN__ADMIN=address):
        browser.wait("document.querySelector('#live').textContent === 'live'")
        browser.wait("document.querySelector('#state').textContent === 'ready'")
        config["admin"] = {"key_hash": hashed("others")}
    with gateway(tmp_path / "3", config, PENSTOCK__LISTEN__ADMIN=address):
        browser.wait("!document.querySelector('#login').hidden")
        assert "Incorrect admin key" in browser.text("#login-problem")


def test_a_command_says_where_it_is_and_at_a_terminal_which_key_it_takes(stage: Set, tmp_path: Path) -> None:
    done = penstock("console", "--admin", stage.running.admin_url, folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{stage.console}\n", "")
    (tmp_path / "key").write_text("bosses")
    for more, words in ((["--admin-key-file", "key"], "such as the one in key"), ([], "it is not in ")):
        said = at_a_terminal(["console", "--admin", stage.running.admin_url, *more], tmp_path)
        assert stage.console in said
        assert words in said
        assert "bosses" not in said


def at_a_terminal(arguments: list[str], folder: Path) -> str:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway", *arguments], stdout=follower, stderr=follower, cwd=folder,
        env=environment(PENSTOCK_HOME=str(folder)),
    )  # fmt: skip
    os.close(follower)
    parts: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(leader, 65536):
                parts.append(data)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    assert process.wait(60) == 0
    reader.join()
    os.close(leader)
    return b"".join(parts).decode()
