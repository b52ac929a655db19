"""The page at `/`, in a real Chromium: what it shows to whom, the playground, and that it keeps, loads and runs nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.access.keys import hashed
from gateway.pages import POLICY
from tests.support import raw
from tests.support.chromium import Browser, chromium
from tests.support.processes import Gateway, Rehearsal, gateway

HTML = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
# What would run if it became markup. A model's name may be any text.
EVIL = "<img src=x onerror='window.ran=1'>"
STORES = "[localStorage.length, sessionStorage.length, document.cookie.length]"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.fixture
def page(browser: Browser) -> Iterator[Browser]:
    """The browser; at the end nothing has gone wrong in it, and nothing was stopped by the page's policy."""
    browser.failures.clear()
    yield browser
    assert browser.failures == []
    assert browser.violations() == []


@pytest.fixture(scope="module")
def keyed(scripted_sglang: Rehearsal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    config = scripted_sglang.backend()
    config["models"]["a-model-of-others"] = {"backend": "dsv3"}
    config["keys"] = [{"name": "ann", "hash": hashed("anns-key"), "models": ["deepseek-v3"]}]
    with gateway(tmp_path_factory.mktemp("keyed"), config) as running:
        running.wait_ready()
        yield running


def test_browsers_get_a_page_and_other_clients_what_they_got_before(wired: Gateway, keyed: Gateway) -> None:
    for running in (wired, keyed):
        page = raw.call(running.port, "GET", "/", headers=HTML)
        assert (page.status, page.headers["content-type"], page.headers["vary"]) == (200, "text/html; charset=utf-8", "accept")
        assert raw.call(running.port, "HEAD", "/", headers=HTML).status == 200
        for method, headers in (("GET", {}), ("GET", {"accept": "application/json"}), ("GET", {"accept": "*/*"}), ("POST", HTML)):
            answer = raw.call(running.port, method, "/", headers=headers)
            assert answer.status == 404
            assert "The API is below http://127.0.0.1/v1: set base_url to that." in answer.error()["message"]
    for name in ("console", "console/console.js", "page/console.js", "page/../README.md", "page/%2e%2e/__init__.py", "page/"):
        assert raw.call(wired.port, "GET", f"/{name}").status == 404


def test_every_file_is_sent_with_the_policy_and_nothing_is_from_elsewhere(wired: Gateway) -> None:
    page = raw.call(wired.port, "GET", "/", headers=HTML)
    files = re.findall(r'(?:src|href)="(page/[^"]+)"', page.body.decode())
    assert len(files) == 4
    for answer in [page, *(raw.call(wired.port, "GET", f"/{name}") for name in [*files, "page/common.js"])]:
        assert answer.status == 200
        assert answer.headers["content-security-policy"].encode() == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert b"http://" not in answer.body.replace(b"http://www.w3.org/2000/svg", b"")
        assert b"https://" not in answer.body
    for directive in ("default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "frame-ancestors 'none'"):
        assert directive.encode() in POLICY
    assert b"unsafe" not in POLICY
    assert raw.call(wired.port, "POST", "/page/front.js").status == 405


def test_the_policy_is_obeyed(browser: Browser, wired: Gateway) -> None:
    """What would be an injection does not work, and is reported: a page that is said to run clean does."""
    browser.open(f"{wired.root}/")
    for attempt in (
        "document.body.innerHTML = '<b>'",
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran=1'}))",
        "document.body.setAttribute('onclick', 'window.ran=1')",
    ):
        assert browser.run(f"(() => {{ try {{ {attempt}; }} catch (error) {{ return error.name }} }})()") == "TypeError", attempt
    browser.run("document.body.setAttribute('style', 'color: red')")
    browser.run("new Image().src = 'http://127.0.0.1:1/x'")
    browser.run("fetch('http://127.0.0.1:1/').catch(() => 0)")
    assert browser.run("window.ran") is None
    wanted = {"require-trusted-types-for", "style-src-attr", "img-src", "connect-src"}
    browser.wait(f"{json.dumps(sorted(wanted))}.every((name) => violations.some((found) => found.startsWith(name)))")


def test_it_says_loading_with_percent_and_then_ready(page: Browser, wired: Gateway) -> None:
    """What `/readyz` says is given by hand here; tests/engine/test_front.py has a real engine that loads."""
    said = [json.dumps({"error": {"message": "The engine is loading (loading weights, 30 %).", "code": "engine_unavailable"}})]
    page.send("Fetch.enable", patterns=[{"urlPattern": "*/readyz"}])
    page.answers = lambda: (503, said[0]) if said else None
    try:
        page.open(f"{wired.root}/")
        page.wait("document.querySelector('#state').textContent.includes('loading weights, 30 %')")
        assert page.run("[document.querySelector('#progress').hidden, document.querySelector('#progress').value]") == [False, 30]
        said.clear()
        page.wait("document.querySelector('#state').textContent === 'Ready'")
        assert page.run("document.querySelector('#progress').hidden") is True
    finally:
        page.send("Fetch.disable")
        page.answers = None


def test_an_open_gateway_is_tried_without_a_key(page: Browser, wired: Gateway) -> None:
    page.open(f"{wired.root}/")
    page.wait("document.querySelectorAll('#models li').length === 2")
    assert page.run("document.querySelector('#key-form').hidden") is True
    for example in ("curl", "python"):
        assert f"{wired.root}/v1" in page.text(f"#{example}"), "the address that the browser used"
        assert '"deepseek-v3"' in page.text(f"#{example}")
    page.fill("prompt", "[[tokens 30]] [[pace 0.05]]")
    page.click("#send")
    page.wait("document.querySelector('#text').textContent.includes('token 2')")
    assert "token 29" not in page.text("#text"), "it comes as it is written"
    page.wait("document.querySelector('#outcome').textContent.includes('ended by stop')")
    assert "token 29" in page.text("#text")
    request = re.search(r"request (\S+)", page.text("#outcome"))
    assert request is not None
    assert page.text("#outcome").startswith("30 tokens, first after ")
    assert wired.admin(f"/admin/requests/{request[1]}").json()["completion_tokens"] == 30
    page.fill("prompt", "[[tokens 500]] [[pace 0.05]]")
    page.click("#send")
    page.wait("document.querySelector('#text').textContent.includes('token 2')")
    page.click("#stop")
    page.wait("document.querySelector('#outcome').textContent === 'Stopped.'")
    page.fill("prompt", "[[refuse 500]]")
    page.click("#send")
    page.wait("document.querySelector('#outcome').className === 'bad'")
    page.fill("prompt", "[[mid-error 3]]")
    page.click("#send")
    page.wait("document.querySelector('#outcome').textContent.includes('(request ') && document.querySelector('#text').textContent")


def test_the_examples_work_as_they_stand(page: Browser, wired: Gateway, tmp_path: Path) -> None:
    import subprocess
    import sys

    page.open(f"{wired.root}/")
    page.wait("document.querySelectorAll('#models li').length === 2")
    said = subprocess.run(["bash", "-c", page.text("#curl")], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(said.stdout)["object"] == "chat.completion"
    said = subprocess.run([sys.executable, "-c", page.text("#python")], capture_output=True, text=True, timeout=120, check=True)
    assert "token 0" in said.stdout


def test_with_keys_on_models_are_shown_to_a_key_and_the_key_is_kept_nowhere(page: Browser, keyed: Gateway) -> None:
    page.open(f"{keyed.root}/")
    page.wait("!document.querySelector('#key-form').hidden")
    assert page.run("document.querySelectorAll('#models li').length") == 0
    assert "deepseek" not in page.text()
    page.fill("key", "not-a-key")
    page.press("Enter")
    page.wait("document.querySelector('#key-problem').textContent")
    page.fill("key", "anns-key")
    page.press("Enter")
    page.wait("document.querySelectorAll('#models li').length === 2")
    assert page.run("[...document.querySelectorAll('#models code')].map((found) => found.textContent)") == ["deepseek-v3", "org/deepseek"]
    assert "a-model-of-others" not in page.text()
    page.fill("prompt", "[[tokens 4]]")
    page.press("Tab")
    page.press("Enter")
    page.wait("document.querySelector('#outcome').textContent.includes('ended by stop')")
    assert "YOUR_KEY" in page.text("#curl")
    assert "anns-key" not in page.text()
    assert page.run("document.querySelector('#key').type") == "password"
    assert page.run(STORES) == [0, 0, 0]
    assert page.run("indexedDB.databases().then((found) => found.length)") == 0
    assert "anns-key" not in page.run("location.href + history.length + JSON.stringify(history.state)")
    page.reload()
    page.wait("!document.querySelector('#key-form').hidden")
    assert page.run("document.querySelector('#key').value") == ""
    assert page.run("document.querySelectorAll('#models li').length") == 0
    assert "anns-key" not in keyed.output()


def test_what_is_html_stays_text(page: Browser, tmp_path: Path) -> None:
    config = {"models": {EVIL: {"backend": "echo"}}, "backends": {"echo": {"kind": "scripted"}}}
    with gateway(tmp_path, config) as running:
        running.wait_ready()
        page.open(f"{running.root}/")
        page.wait("document.querySelectorAll('#models li').length === 1")
        assert page.text("#models code") == EVIL
        prompt = f"{EVIL} </pre><script>window.ran=1</script> <svg/onload=window.ran=1>"
        page.fill("prompt", prompt)
        page.click("#send")
        page.wait("document.querySelector('#outcome').textContent.includes('ended by')")
        assert page.text("#text").strip() == prompt
        assert page.run("document.querySelectorAll('main img, main svg, main script').length") == 0
        assert page.run("window.ran") is None
        # In a shell and in Python it is text as well.
        assert "'\\''" in page.text("#curl")
        compile(page.text("#python"), "example", "exec")


def test_it_can_be_used_by_keyboard_in_the_dark_and_on_a_phone(page: Browser, wired: Gateway) -> None:
    page.size(360, 740)
    page.dark(True)
    try:
        page.open(f"{wired.root}/")
        page.wait("document.querySelectorAll('#models li').length === 2")
        assert too_wide(page) == []
        dark = colours(page)
        page.dark(False)
        light = colours(page)
        assert dark[1] != light[1]
        for text, ground in (dark, light):
            assert contrast(text, ground) >= 7
        page.run("document.querySelector('#prompt').focus()")
        page.press("Tab")
        assert page.run("document.activeElement.id") == "send"
        assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid", "where one is can be seen"
        page.press("Enter")
        page.wait("document.querySelector('#outcome').textContent.includes('ended by stop')")
        assert names_missing(page) == []
    finally:
        page.send("Emulation.clearDeviceMetricsOverride")


def colours(page: Browser) -> tuple[list[int], list[int]]:
    """Of the text and of the ground."""
    found: list[list[int]] = page.run(
        "['color', 'backgroundColor'].map((name) => getComputedStyle(document.body)[name].match(/\\d+/g).map(Number))"
    )
    return found[0], found[1]


def contrast(one: list[int], other: list[int]) -> float:
    """By WCAG 2.2."""

    def light(colour: list[int]) -> float:
        parts = [part / 255 for part in colour[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lighter, darker = sorted((light(one), light(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def too_wide(page: Browser) -> list[str]:
    """What ends beyond the right edge, so that one would have to scroll sideways."""
    found: list[str] = page.run(
        "document.documentElement.scrollWidth <= innerWidth ? [] : [...document.querySelectorAll('main *')]"
        ".filter((found) => found.getBoundingClientRect().right > innerWidth).map((found) => found.outerHTML.slice(0, 200))"
    )
    return found


def names_missing(page: Browser) -> list[str]:
    """What one can act on and that a screen reader could not name, as the browser's own accessibility tree has it."""
    acted_on = {"button", "textbox", "combobox", "checkbox", "link", "spinbutton", "table", "progressbar", "image"}
    nodes: list[dict[str, Any]] = page.send("Accessibility.getFullAXTree")["nodes"]
    return [
        node["role"]["value"]
        for node in nodes
        if not node.get("ignored") and node["role"]["value"] in acted_on and not node.get("name", {}).get("value")
    ]
