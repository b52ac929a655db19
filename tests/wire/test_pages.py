"""A page of somebody else's in the browser of somebody who runs a gateway: what it can do there, which must be nothing.

The browser is a real one. Its pages send what pages can send without asking: forms, beacons, images, `fetch` in mode `no-cors`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.access.keys import hashed
from tests.support import raw
from tests.support.browser import STRANGER, Page
from tests.support.processes import Gateway, Rehearsal, gateway, until

CHAT = "/v1/chat/completions"

# Every way in which a page can send a request without being asked for its leave first (and one with, which a preflight stops).
ATTACK = """
const said = [];
async function attempt(name, work) {
  try { const answer = await work(); said.push([name, answer === undefined ? "sent" : answer.type + " " + answer.status]); }
  catch (error) { said.push([name, String(error)]); }
}
function form(url, enctype, fields) {
  return new Promise(done => {
    const frame = document.createElement("iframe");
    frame.name = "f" + Math.random();
    document.body.append(frame);
    const form = document.createElement("form");
    Object.assign(form, {method: "POST", action: url, enctype: enctype, target: frame.name});
    for (const [name, value] of Object.entries(fields)) {
      const input = document.createElement("input");
      Object.assign(input, {type: "hidden", name: name, value: value});
      form.append(input);
    }
    document.body.append(form);
    frame.onload = () => { if (form.sent) done(); };
    form.sent = true;
    form.submit();
    setTimeout(done, 5000);
  });
}
function load(tag, url) {
  return new Promise(done => {
    const element = document.createElement(tag);
    element.onload = element.onerror = () => done();
    element.src = url;
    document.body.append(element);
    setTimeout(done, 5000);
  });
}
async function attack() {
  for (const [url, body] of TARGETS) {
    await attempt("no-cors " + url, () => fetch(url, {method: "POST", mode: "no-cors", body: body}));
    await attempt("bytes without a type " + url, () => fetch(url, {method: "POST", mode: "no-cors", body: new TextEncoder().encode(body)}));
    const typed = {"content-type": "application/x-www-form-urlencoded"};
    await attempt("json called a form " + url, () => fetch(url, {method: "POST", mode: "no-cors", body: body, headers: typed}));
    await attempt("no-cors with cookies " + url, () => fetch(url, {method: "POST", mode: "no-cors", body: body, credentials: "include"}));
    await attempt("json " + url, () => fetch(url, {method: "POST", body: body, headers: {"content-type": "application/json"}}));
    await attempt("beacon " + url, async () => { navigator.sendBeacon(url, body); });
    const half = body.slice(0, -1) + ', "x": "';
    await attempt("beacon of bytes " + url, async () => { navigator.sendBeacon(url, new Blob([body])); });
    await attempt("form text " + url, () => form(url, "text/plain", {[half]: '"}'}));
    await attempt("form " + url, () => form(url, "application/x-www-form-urlencoded", {a: "b"}));
    await attempt("get " + url, () => fetch(url, {mode: "no-cors"}));
    await attempt("image " + url, () => load("img", url));
    await attempt("script " + url, () => load("script", url));
    await attempt("frame " + url, () => load("iframe", url));
    await attempt("delete " + url, () => fetch(url, {method: "DELETE"}));
  }
  await fetch("/done", {method: "POST", body: JSON.stringify(said)});
}
attack();
"""


def attack(*targets: tuple[str, dict[str, Any]]) -> str:
    return f"const TARGETS = {json.dumps([[url, json.dumps(body)] for url, body in targets])};{ATTACK}"


@pytest.fixture
def fresh(scripted_sglang: Rehearsal, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway as it comes: open on loopback, and whatever the admin API is by default."""
    with gateway(tmp_path / "gateway", scripted_sglang.backend()) as running:
        running.wait_ready()
        yield running


def audited(running: Gateway) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in running.output().splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("audit")]


@pytest.mark.parametrize("host", [STRANGER, "127.0.0.1"], ids=["another site", "another port of the same host"])
def test_a_page_cannot_drive_the_admin_api(fresh: Gateway, scripted_sglang: Rehearsal, tmp_path: Path, host: str) -> None:
    engine = scripted_sglang.url.removeprefix("http://")
    targets = [
        (f"{fresh.admin_url}/admin/hosts/{engine}/drain", {}),
        (f"{fresh.admin_url}/admin/reload", {}),
        (f"{fresh.admin_url}/admin/keys", {"name": "theirs"}),
    ]
    with Page(attack(*targets)).served() as page:
        said = page.visit(tmp_path / "profile", host)
    assert len(said) == 14 * len(targets)
    of_the_page = until("it has tried", lambda: [line["message"] for line in audited(fresh) if line["message"].startswith("POST")])
    assert not [line for line in of_the_page if not line.endswith("403")]
    assert fresh.admin("/admin/hosts").json()["hosts"][0]["state"] == "ok", "nothing was drained"
    assert {worker["generation"] for worker in fresh.admin("/admin/workers").json()["workers"]} == {1}, "nothing was reloaded"


@pytest.mark.parametrize("host", [STRANGER, "127.0.0.1"], ids=["another site", "another port of the same host"])
def test_a_page_cannot_use_engines_through_an_open_gateway(fresh: Gateway, scripted_sglang: Rehearsal, tmp_path: Path, host: str) -> None:
    with Page(attack((f"{fresh.root}{CHAT}", raw.chat("burn")))).served() as page:
        page.visit(tmp_path / "profile", host)
    until("it has tried", lambda: [line for line in fresh.requests() if line["message"].startswith(f"POST {CHAT}")])
    assert not [line for line in fresh.requests() if line["message"].startswith("POST") and line["status"] < 400]
    assert "penstock_attempts_total{" not in fresh.admin("/metrics").body.decode(), "no engine was asked"


def test_a_name_that_was_rebound_gets_nothing(fresh: Gateway, tmp_path: Path) -> None:
    """The page's own name points at the gateway now, so that to the browser its requests are of the same origin."""
    script = """
    const said = {};
    async function attempt(name, path, options) {
      const answer = await fetch(path, options);
      said[name] = [answer.status, await answer.text()];
    }
    const json = {method: "POST", headers: {"content-type": "application/json"}};
    (async () => {
      await attempt("metrics", "/metrics", {});
      await attempt("config", "/admin/config", {});
      await attempt("reload", "/admin/reload", {...json, body: "{}"});
      await attempt("chat", "%s", {...json, body: %s});
      await fetch("/done", {method: "POST", body: JSON.stringify(said)});
    })();
    """
    chat = json.dumps(json.dumps(raw.chat("burn")))
    with Page(script % (CHAT, chat), behind=int(fresh.admin_url.rsplit(":", 1)[1])).served() as page:
        of_admin = page.visit(tmp_path / "admin")
    with Page(script % (CHAT, chat), behind=fresh.port).served() as page:
        of_public = page.visit(tmp_path / "public")
    assert {name: status for name, (status, _) in of_admin.items() if name != "chat"} == {"metrics": 403, "config": 401, "reload": 401}
    assert of_public["chat"][0] == 403
    assert json.loads(of_public["chat"][1])["error"]["code"] == "cross_site"


def test_pages_that_may_and_clients_that_are_none_are_served(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    app = {"origin": "https://app.example", "sec-fetch-site": "cross-site"}
    other = {"origin": "https://evil.example", "sec-fetch-site": "cross-site"}
    config = {**scripted_sglang.backend(), "security": {"cors": {"origins": ["https://app.example"]}}}
    with gateway(tmp_path / "open", config) as running:
        running.wait_ready()
        assert raw.call(running.port, "POST", CHAT, raw.chat("hi"), app).status == 200
        refused = raw.call(running.port, "POST", CHAT, raw.chat("hi"), other)
        assert (refused.status, refused.error()["code"]) == (403, "cross_site")
        assert "security.cors.origins" in refused.error()["message"]
        assert raw.call(running.port, "GET", "/v1/models", headers=other).status == 200, "reading uses no engine"
        assert raw.call(running.port, "POST", CHAT, raw.chat("hi"), {"host": "llm.example"}).status == 200, "behind a proxy"
        ours = {"host": "localhost:1", "origin": "http://localhost:1", "sec-fetch-site": "same-origin"}
        assert raw.call(running.port, "POST", CHAT, raw.chat("hi"), ours).status == 200, "/docs, through a tunnel"
    with gateway(tmp_path / "keyed", {**scripted_sglang.backend(), "keys": [{"name": "x", "hash": hashed("x")}]}) as running:
        until("it is ready", lambda: raw.call(running.port, "GET", "/readyz").status == 200)
        keyed = {**other, "authorization": "Bearer x"}
        assert raw.call(running.port, "POST", CHAT, raw.chat("hi"), keyed).status == 200, "who has a key may"
        assert raw.call(running.port, "POST", CHAT, raw.chat("hi"), other).status == 401
