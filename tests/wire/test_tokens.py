"""Tokens of an identity provider as a second way to be a caller: really signed, fetched from a real provider, through a real gateway."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import msgspec
import openai
import pytest
from cryptography.hazmat.primitives import serialization

from gateway import config
from gateway.access import tokens
from gateway.access.issuer import fetch
from gateway.access.keys import hashed
from gateway.access.tokens import Tokens
from gateway.errors import InvalidKey
from gateway.telemetry.metrics import Metrics
from tests.support import raw, redis
from tests.support.issuer import Issuer, issuer
from tests.support.otlp import Collector, collector
from tests.support.processes import Gateway, Rehearsal, gateway, until
from tests.wire.test_command import penstock
from tests.wire.test_reach import check, nobody

CHAT = "/v1/chat/completions"
LIMITS = {"groups": [{"name": "research", "rpm": 600, "team": "blue"}, {"name": "guests", "rpm": 2, "models": ["other"]}]}


def configuration(engine: Rehearsal, provider: Issuer, **more: Any) -> dict[str, Any]:
    settings = {**engine.backend(), "oidc": [provider.configured(**more)], "teams": [{"name": "blue", "tpm": 10_000_000}, {"name": "red"}]}
    settings["models"]["other"] = {"backend": "dsv3"}
    return settings


@dataclass
class Running:
    gateway: Gateway
    issuer: Issuer
    sink: Collector


@pytest.fixture(scope="module")
def running(scripted_sglang: Rehearsal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two models, a key in the file, and a provider with a key of each kind."""
    home = tmp_path_factory.mktemp("tokens")
    with issuer() as provider, collector() as sink:
        settings = configuration(scripted_sglang, provider, **LIMITS, team_claim="unit.team", models_claim="models", default={"rpm": 6000})
        settings["tracing"] = {"otlp_endpoint": sink.endpoint}
        settings["keys"] = [{"name": "alice", "hash": hashed("in-file")}]
        with gateway(home / "run", settings, PENSTOCK_HOME=str(home)) as served:
            served.wait_ready()
            yield Running(served, provider, sink)


def ask(to: Gateway, token: str, **more: Any) -> raw.Answer:
    return raw.call(to.port, "POST", CHAT, {**raw.chat("hi"), **more}, {"authorization": f"Bearer {token}"})


@pytest.mark.parametrize(("key", "algorithm"), [("rsa", "RS256"), ("ec", "ES256"), ("ed", "EdDSA")])
def test_a_token_is_as_good_as_a_key(running: Running, key: str, algorithm: str) -> None:
    token = running.issuer.token(key, algorithm, f"{algorithm}@example.com", groups=["all", "research"])
    client = openai.OpenAI(base_url=running.gateway.base_url, api_key=token, max_retries=0)
    answer = client.chat.completions.with_raw_response.create(model="deepseek-v3", messages=[{"role": "user", "content": "hi"}])
    assert answer.parse().choices[0].message.content
    assert answer.headers["x-ratelimit-limit-requests"] == "600"
    assert {model.id for model in client.models.list()} >= {"deepseek-v3", "other"}
    name = f"staff:{algorithm}@example.com"
    own = raw.call(running.gateway.port, "GET", "/v1/usage", headers={"authorization": f"Bearer {token}"}).json()
    assert (own["key"], own["team"]) == (name, "blue")
    until("the ledger has it", lambda: name in {row["key"] for row in running.gateway.admin("/admin/usage?by=key").json()["usage"]})
    told = running.gateway.admin(f"/admin/requests/{answer.headers['x-request-id']}").json()
    assert told["key"] == name
    assert f'key="{name}"' in running.gateway.admin("/metrics").body.decode()
    line = next(line for line in running.gateway.requests() if line.get("key") == name)
    assert line["status"] == 200
    assert token not in running.gateway.output()
    until("the trace has it", lambda: name in {span.attributes.get("penstock.key") for span in running.sink.spans})
    assert token not in repr(running.sink.spans)


def test_what_a_token_says_decides_what_its_holder_may(running: Running) -> None:
    served, token = running.gateway, running.issuer.token
    assert ask(served, token("rsa", sub="g", groups="guests")).error()["code"] == "model_not_found"
    guest = token("rsa", sub="g", groups="guests")
    assert [ask(served, guest, model="other").status for _ in range(3)] == [200, 200, 429]
    # Another token of the same holder has the same limits; another holder has others.
    again = token("ec", "ES256", sub="g", groups=["guests"])
    refused = ask(served, again, model="other")
    assert refused.status == 429
    assert "key 'staff:g'" in refused.error()["message"]
    assert ask(served, token("rsa", sub="h", groups="guests"), model="other").status == 200
    # Claims go before the group: nested ones too.
    both = token("rsa", sub="i", groups="guests", models=["deepseek-v3"], unit={"team": "red"})
    assert ask(served, both).status == 200
    own = raw.call(served.port, "GET", "/v1/usage", headers={"authorization": f"Bearer {both}"}).json()
    assert own["team"] == "red"
    # In no group: the default.
    assert ask(served, token("rsa", sub="j")).headers["x-ratelimit-limit-requests"] == "6000"


def test_no_token_can_take_the_name_of_a_key_or_of_another_holder(running: Running) -> None:
    names = set()
    for sub in ("alice", "alice/model/x", "alice\x1fx", "álice", "a b"):
        token = running.issuer.token("rsa", sub=sub)
        answer = raw.call(running.gateway.port, "GET", "/v1/usage", headers={"authorization": f"Bearer {token}"})
        names.add(answer.json()["key"])
    assert names == {"staff:alice", "staff:alice%2Fmodel%2Fx", "staff:alice%1Fx", "staff:%C3%A1lice", "staff:a%20b"}
    assert ask(running.gateway, "in-file").status == 200


def unsigned(header: dict[str, Any], claims: dict[str, Any]) -> str:
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in (header, claims))


def forged(provider: Issuer) -> dict[str, tuple[str, str]]:
    """Tokens that are not good, and what the operator is told of each."""
    now = int(time.time())
    claims = {"iss": provider.url, "aud": "penstock", "sub": "mallory", "exp": now + 600}
    public = provider.private["rsa"].public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    body = unsigned({"alg": "HS256", "kid": "rsa", "typ": "JWT"}, claims)
    mac = base64.urlsafe_b64encode(hmac.new(pem, body.encode(), hashlib.sha256).digest()).rstrip(b"=").decode()
    good = provider.token("rsa")
    head, payload, signature = good.split(".")
    other = unsigned({}, claims).split(".")[1]
    stranger = Issuer(provider.port)
    stranger.add("rsa", publish=False)
    return {
        "none": (unsigned({"alg": "none"}, claims) + ".", "signed with none"),
        "hmac with the public key": (f"{body}.{mac}", "signed with HS256"),
        "expired": (provider.token("rsa", exp=now - 60), "Signature has expired"),
        "not yet": (provider.token("rsa", nbf=now + 60), "not yet valid"),
        "without an end": (provider.token("rsa", exp=None), '"exp"'),
        "other audience": (provider.token("rsa", aud="payroll"), "Audience"),
        "no audience": (provider.token("rsa", aud=None), '"aud"'),
        "other issuer": (provider.token("rsa", iss="https://evil.example"), "not configured: https://evil.example"),
        "unknown key id": (provider.token("rsa", headers={"kid": "nobody"}), "the key id nobody"),
        "of another kind": (provider.token("ec", "ES256", headers={"kid": "rsa"}), "no such key for ES256"),
        "not allowed": (provider.token("rsa", "RS512"), "signed with RS512"),
        "another's key": (stranger.token("rsa"), "Signature verification failed"),
        "changed": (f"{head}.{other}.{signature}", "Signature verification failed"),
        "cut": (f"{head}.{payload}", "malformed"),
        "rubbish": ("eyJ!.!.!", "malformed"),
        "five parts": (f"{good}.a.b", "malformed"),
        "deep": ("eyJ" + "W" * 3000 + ".e30.e30", "malformed"),
        "too large": (provider.token("rsa", padding="x" * 20_000), "at most 16384 are read"),
        "no name": (provider.token("rsa", sub=None), "no text as 'sub'"),
        "a long name": (provider.token("rsa", sub="x" * 300), "too long"),
    }  # fmt: skip


def logged(served: Gateway, id: str) -> dict[str, Any]:
    return until("it is in the log", lambda: next((row for row in served.requests() if row["request_id"] == id), {}))


def test_whatever_is_not_good_gets_one_answer_and_the_log_says_why(running: Running) -> None:
    served = running.gateway
    unknown = ask(served, "sk-nobody")
    for what, (token, why) in forged(running.issuer).items():
        answer = ask(served, token)
        assert (answer.status, answer.error()) == (401, unknown.error()), what
        assert answer.headers["www-authenticate"] == "Bearer"
        sent = answer.headers["x-request-id"]
        line = logged(served, sent)
        assert why in line["cause"], (what, line)
        assert token not in served.output(), what
        assert not [part for part in token.split(".") if len(part) > 20 and part in served.output()], what
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=served.base_url, api_key=running.issuer.token("rsa", exp=1), max_retries=0).models.list()


def test_key_ids_that_nobody_knows_do_not_make_requests_to_the_provider(running: Running) -> None:
    before, began = running.issuer.asked["/keys"], time.monotonic()
    for number in range(100):
        assert ask(running.gateway, running.issuer.token("ed", "EdDSA", headers={"kid": f"kid-{number}"})).status == 401
    # One in five seconds, and what is fetched anyway.
    assert running.issuer.asked["/keys"] - before <= 2 + (time.monotonic() - began) / 5


def test_keys_are_rotated_while_the_gateway_runs(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with issuer() as provider, gateway(
        tmp_path / "run", configuration(scripted_sglang, provider, default={"rpm": 60000}), PENSTOCK_HOME=str(tmp_path)
    ) as served:  # fmt: skip
        served.wait_ready()
        old = provider.token("rsa")
        assert ask(served, old).status == 200
        provider.add("next")
        new = provider.token("next")
        until("the new key is fetched when a token names it", lambda: ask(served, new).status == 200)
        assert ask(served, old).status == 200
        # One that is withdrawn takes its tokens with it, also those that were checked before.
        provider.withdraw("rsa")
        provider.add("third")
        until("the keys are fetched again", lambda: ask(served, provider.token("third")).status == 200)
        assert ask(served, old).status == 401
        assert ask(served, new).status == 200


def test_a_provider_that_is_down_keeps_nobody_out(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with issuer() as provider, contextlib.ExitStack() as stack:
        settings = configuration(scripted_sglang, provider, jwks_url=f"{provider.url}/keys", refresh_s=10)
        served = stack.enter_context(gateway(tmp_path / "run", settings, PENSTOCK_HOME=str(tmp_path)))
        served.wait_ready()
        assert ask(served, provider.token("rsa")).status == 200
        provider.stop()
        assert ask(served, provider.token("rsa", sub="bob")).status == 200
        assert ask(served, provider.token("rsa", headers={"kid": "unknown"})).status == 401
        until("it is said", lambda: "its keys cannot be fetched" in served.output())
        until("it is counted", lambda: b'penstock_issuer_up{issuer="staff"} 0' in served.admin("/metrics").body)
        assert b'penstock_issuer_fetches_total{issuer="staff",result="failed"}' in served.admin("/metrics").body
        # A worker that begins now has them from the file.
        served.workers()[0].kill()
        until("another serves", lambda: ask_quietly(served, provider.token("rsa", sub="carol")) == 200)
        provider.start()
        until("it is back", lambda: b'penstock_issuer_up{issuer="staff"} 1' in served.admin("/metrics").body, 40)
        assert "its keys can be fetched again" in served.output()


def ask_quietly(to: Gateway, token: str) -> int:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return ask(to, token).status
    return 0


@pytest.mark.parametrize("how", ["down", "refuses", "redirects", "hangs", "says nonsense", "says too much", "is another"])
def test_without_any_keys_it_is_not_the_token_that_is_refused(scripted_sglang: Rehearsal, tmp_path: Path, how: str) -> None:
    with issuer() as provider:
        published, url = provider.published, provider.url
        if how == "down":
            provider.stop()
        elif how == "refuses":
            provider.status = 500
        elif how == "redirects":
            provider.location = f"{url}/keys"
        elif how == "hangs":
            provider.hangs_s = 8
        elif how == "says nonsense":
            provider.published = [{"kty": "oct", "k": "c2VjcmV0", "kid": "rsa"}]
        elif how == "says too much":
            provider.published = [{**published[0], "padding": "x" * (1 << 20)}]
        settings = configuration(scripted_sglang, provider)
        if how == "redirects":
            settings["oidc"][0]["jwks_url"] = f"{url}/moved"
        if how == "is another":
            settings["oidc"][0]["issuer"] += "/realm"
        with gateway(tmp_path / "run", settings, PENSTOCK_HOME=str(tmp_path)) as served:
            served.wait_ready()
            token = provider.token("rsa", iss=settings["oidc"][0]["issuer"])
            answer = ask(served, token)
            assert (answer.status, answer.error()["code"]) == (503, "identity_provider_unavailable")
            assert "The identity provider 'staff' does not answer" in answer.error()["message"]
            assert answer.headers["retry-after"] == "5"
            assert ask(served, provider.token("rsa", iss="https://evil.example")).status == 401
            if how in ("down", "says nonsense", "says too much"):
                provider.published = published
                if how == "down":
                    provider.start()
                until("it is there without a restart", lambda: ask(served, token).status == 200, 40)


def test_of_a_provider_with_too_many_keys_the_first_count() -> None:
    with issuer() as provider:
        provider.published = [{**provider.published[0], "kid": f"{number}"} for number in range(150)]
        found = asyncio.run(fetch(msgspec.convert(provider.configured(), config.Issuer)))
        assert [jwk["kid"] for jwk in found] == [f"{number}" for number in range(100)]


def test_who_is_in_no_group_may_be_refused(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with issuer() as provider:
        settings = configuration(scripted_sglang, provider, groups=[{"name": "/staff"}], groups_claim="realm.roles", require_group=True)
        with gateway(tmp_path / "run", settings, PENSTOCK_HOME=str(tmp_path)) as served:
            served.wait_ready()
            assert ask(served, provider.token("rsa", realm={"roles": ["/staff"]})).status == 200
            refused = ask(served, provider.token("rsa", realm={"roles": ["/guests"]}))
            assert (refused.status, refused.error()["code"]) == (403, "not_in_group")


def test_limits_and_teams_are_shared_with_keys_through_redis(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with issuer() as provider, redis.server(tmp_path / "redis") as store, contextlib.ExitStack() as stack:
        settings = configuration(scripted_sglang, provider, groups=[{"name": "research", "team": "blue"}])
        settings |= {"redis": {"url": store.url}, "keys": [{"name": "key", "hash": hashed("key"), "team": "blue"}]}
        settings["teams"] = [{"name": "blue", "rpm": 3}]
        pair = [stack.enter_context(gateway(tmp_path / f"{number}", settings, PENSTOCK_HOME=str(tmp_path))) for number in range(2)]
        for one in pair:
            one.wait_ready()
        token = provider.token("ed", "EdDSA", groups=["research"])
        assert [ask(pair[0], token).status, ask(pair[1], token).status, ask(pair[0], "key").status] == [200] * 3
        for one in pair:
            refused = ask(one, token)
            assert refused.status == 429
            assert "team 'blue'" in refused.error()["message"]


def test_settings_that_cannot_be_right_are_refused_in_one_line(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    def problem(**more: Any) -> str:
        settings = scripted_sglang.backend() | {
            "oidc": [{"name": "staff", "issuer": "https://login.example", "audience": ["penstock"]} | more]
        }
        (tmp_path / "p.yaml").write_text(json.dumps(settings))
        done = penstock("check", "-c", "p.yaml", folder=tmp_path)
        assert (done.returncode, len(done.stderr.splitlines())) in ((0, 0), (2, 1)), done.stderr
        return done.stderr

    assert problem() == ""
    for more, words in (
        ({"audience": []}, "oidc.0.audience: holds 0; accepted: one or more"),
        ({"algorithms": ["HS256"]}, "oidc.0.algorithms.0: 'HS256' is not accepted; one of: RS256"),
        ({"algorithms": ["none"]}, "oidc.0.algorithms.0: 'none' is not accepted"),
        ({"issuer": "login.example"}, "oidc.0.issuer: 'login.example' is no URL; accepted: a URL like https://"),
        ({"issuer": "http://login.example"}, "oidc.0.issuer: 'http://login.example' is plain HTTP"),
        ({"jwks_url": "http://10.0.0.1/keys"}, "oidc.0.jwks_url: 'http://10.0.0.1/keys' is plain HTTP"),
        ({"groups": [{"name": "a", "team": "blu"}]}, "oidc.0.groups.0.team: no team is called 'blu'"),
        ({"groups": [{"name": "a"}, {"name": "a"}]}, "oidc.0.groups.1.name: 'a' is used twice"),
        ({"default": {"models": ["deepseek-v4"]}}, "oidc.0.default.models: no model is called 'deepseek-v4'; did you mean 'deepseek-v3'?"),
        ({"require_group": True}, "oidc.0.require_group: nobody could ever call"),
        ({"leeway": 3}, "oidc.0.leeway: unknown key; did you mean 'leeway_s'?"),
    ):
        assert words in problem(**more), more
    assert problem(jwks_url="http://10.0.0.1/keys", allow_http=True) == ""


def test_reach_asks_the_provider(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with issuer() as provider:
        settings = configuration(scripted_sglang, provider)
        assert check(tmp_path, settings).returncode == 0
        provider.status = 404
        done = check(tmp_path, settings)
        assert done.returncode == 1
        assert f"not reached: oidc.0: {provider.url}/.well-known/openid-configuration answers with 404" in done.stderr
        settings["oidc"][0]["jwks_url"] = f"http://127.0.0.1:{nobody()}/keys"
        assert "not reached: oidc.0: 127.0.0.1:" in check(tmp_path, settings).stderr


def test_a_token_is_checked_once_and_known_while_it_is_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[object] = []
    decode = jwt.decode

    def counting(token: Any, *arguments: Any, **more: Any) -> Any:
        checked.append(token)
        return decode(token, *arguments, **more)

    monkeypatch.setattr(jwt, "decode", counting)
    monkeypatch.setattr(tokens, "_KNOWN", 3)

    async def work() -> None:
        settings = config.load(environment={}, overrides={"oidc": [provider.configured(leeway_s=0)]}).settings
        known = Tokens(settings, tmp_path, Metrics())
        known.open()
        try:
            token = provider.token("rsa").encode()
            assert len({id(await known.find(token)) for _ in range(100)}) == 1
            assert len(checked) == 1
            # Its holder is the same with another token, and told of once.
            assert await known.find(provider.token("ec", "ES256").encode()) is await known.find(token)
            assert [caller.name for caller in known.fresh()] == ["staff:alice"]
            assert known.fresh() == []
            # So many are known, and the first is forgotten, which costs another check and no more.
            for number in range(4):
                await known.find(provider.token("rsa", sub=f"{number}").encode())
            assert len(known._good) == 3
            assert (await known.find(token)).name == "staff:alice"
            ends_at = int(time.time()) + 3
            short = provider.token("rsa", exp=ends_at).encode()
            await known.find(short)
            while time.time() < ends_at:
                await asyncio.sleep(0.05)
            with pytest.raises(InvalidKey):
                await known.find(short)
        finally:
            await known.aclose()

    with issuer() as provider:
        asyncio.run(work())
