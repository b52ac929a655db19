"""Secrets that stand in a configuration, planted everywhere one could stand, are in nothing that is printed, answered or logged."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import signal
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import raw
from tests.support.processes import gateway, until
from tests.wire.test_command import penstock

# Each is found by a search for what all of them have in common.
MARK = "5ecr3t"
ADMIN, CLIENT = f"sk-admin-{MARK}", f"sk-client-{MARK}"
ARGS = ["--api-key", f"{MARK}-a", f"--hf-token={MARK}-b", "--loader", f'{{"api_key": "{MARK}-c"}}', "--env", f"HF_TOKEN={MARK}-d"]


def digest(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


@contextlib.contextmanager
def suspicious_proxy() -> Iterator[int]:
    """A proxy that wants another password, and says what it was sent."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while line := self.rfile.readline().strip():
                self.wfile.flush() if line else None
            body = b"who are you"
            self.wfile.write(b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def planted(folder: Path, proxy: int) -> dict[str, Any]:
    """A configuration that is accepted."""
    (folder / "engine.key").write_text(f"sk-engine-{MARK}")
    (folder / "redis.password").write_text(f"{MARK}-redis")
    backend = {
        "kind": "sglang_dsv3",
        "api_key_file": str(folder / "engine.key"),
        "proxy": f"http://u:{MARK}@127.0.0.1:{proxy}",
        "engine": {"extra_args": ARGS},
    }
    return {
        "admin": {"key_hash": digest(ADMIN)},
        "keys": [
            {"name": "k", "hash": digest(CLIENT), "metadata": {"api_token": f"{MARK}-e", "crm": f"https://u:{MARK}@crm/x?key={MARK}"}}
        ],
        "redis": {"url": f"redis://u:p%40{MARK}@127.0.0.1:9/0?password={MARK}", "password_file": str(folder / "redis.password")},
        "tracing": {"otlp_endpoint": f"http://u:{MARK}@127.0.0.1:9/?key={MARK}", "protocol": "http/protobuf", "sample_ratio": 1},
        "log": {"level": "debug"},
        "models": {"m": {"backend": "d"}, "n": {"backend": "e"}},
        "backends": {
            "d": {**backend, "hosts": [{"url": "http://127.0.0.1:9"}]},
            "e": {**backend, "hosts": [{"url": "https://127.0.0.1:9"}]},
        },
    }


# What is refused, each for a reason that has to do with the secret in it.
REFUSED: dict[str, dict[str, Any]] = {
    "userinfo of a host": {"backends": {"d": {"kind": "sglang_dsv3", "hosts": [{"url": f"http://user:{MARK}@h"}]}}},
    "a proxy without an at sign": {"backends": {"d": {"kind": "sglang_dsv3", "hosts": [{"url": "http://h"}], "proxy": f"http://u:{MARK}"}}},
    "a password with a slash": {"redis": {"url": f"redis://:a/{MARK}@h:6379"}},
    "a password with a hash sign": {"redis": {"url": f"redis://:a#{MARK}@h:6379"}},
    "a password with a space": {"redis": {"url": f"redis://:a {MARK}@h:6379"}},
    "a password and no host": {"redis": {"url": f"redis://:{MARK}"}},
    "another scheme": {"redis": {"url": f"http://:{MARK}@h"}},
    "an unknown option": {"redis": {"url": f"redis://h?pasword={MARK}"}},
    "a key in place of its hash": {"keys": [{"name": "k", "hash": f"sk-{MARK}"}]},
    "a password of the wrong type": {"redis": {"password": f"{MARK}"}},
    "a URL as a name": {"models": {f"redis://u:{MARK}@h": {"backend": "none"}}},
    "a URL as a file": {"redis": {"url": "redis://h", "password_file": f"redis://u:{MARK}@h"}},
    "a URL as a key file": {
        "backends": {"d": {"kind": "sglang_dsv3", "hosts": [{"url": "http://h"}], "api_key_file": f"http://u:{MARK}@h"}}
    },
    "a URL as an address": {"listen": {"host": f"http://u:{MARK}@h"}},
    "a URL as a sentinel": {"redis": {"url": "redis://h", "sentinels": [f"redis://u:{MARK}@h"]}},
    "a URL as an endpoint": {"tracing": {"otlp_endpoint": f"ftp://u:{MARK}@h"}},
    "a word": {"log": {"level": f"http://u:{MARK}@h"}},
    "a kind": {"backends": {"d": {"kind": f"http://u:{MARK}@h"}}},
}
UNQUOTED = [
    f"redis: {{username: *{MARK}}}",
    f"redis: {{username: !{MARK} x}}",
    f"redis: {{username: '{MARK}",
    f'redis: {{username: "{MARK}\\q"}}',
]


def test_check_shows_none_of_what_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(planted(tmp_path, 9)))
    for more in ((), ("--json",)):
        done = penstock("check", "-c", "p.yaml", *more, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert MARK not in done.stdout + done.stderr
        assert done.stdout.count("********") > 9
        assert "redis://********@127.0.0.1:9/0?password=********" in done.stdout


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("command", ["check", "serve"])
def test_a_refusal_does_not_quote_it(tmp_path: Path, command: str, case: str) -> None:
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(REFUSED[case]))
    done = penstock(command, "-c", "p.yaml", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("penstock: ")
    assert MARK not in done.stdout + done.stderr


@pytest.mark.parametrize("text", UNQUOTED)
def test_neither_does_the_refusal_of_a_text_that_is_no_yaml(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    done = penstock("check", "-c", "p.yaml", folder=tmp_path)
    assert done.returncode == 2
    assert MARK not in done.stdout + done.stderr


def test_a_gateway_that_serves_reloads_and_fails_says_none_of_it(tmp_path: Path) -> None:
    with suspicious_proxy() as proxy:
        config = planted(tmp_path, proxy)
        with gateway(tmp_path, config, OTEL_BSP_SCHEDULE_DELAY="50", OTEL_EXPORTER_OTLP_TIMEOUT="1") as running:
            asked = {"authorization": f"Bearer {ADMIN}"}
            key = {"authorization": f"Bearer {CLIENT}"}
            bodies = [
                {"model": model, "stream": stream, "messages": [{"role": "user", "content": "hello"}]}
                for model in "mn"
                for stream in (False, True)
            ]
            heard = [raw.call(running.port, "POST", "/v1/chat/completions", body, key) for body in bodies]
            assert all(answer.status >= 400 for answer in heard)
            requests = [f"requests/{answer.headers['x-request-id']}{query}" for answer in heard for query in ("", "?format=text")]
            paths = ("config", "hosts", "workers", "keys", "usage", *requests)
            heard += [running.admin(f"/admin/{path}", headers=asked) for path in paths]
            heard.append(running.admin("/metrics", headers=asked))
            assert b"********" in heard[4].body
            refused = 0
            for wrong in REFUSED.values():
                (tmp_path / "penstock.yaml").write_text(yaml.safe_dump({**config, **wrong}))
                answer = running.admin("/admin/reload", "POST", asked)
                heard.append(answer)
                refused += answer.status == 400
            assert refused == len(REFUSED)
            running.process.send_signal(signal.SIGHUP)
            until("the log says so", lambda: running.output().count("refused, nothing has changed") > len(REFUSED))
            until("so does the tracer", lambda: "traces cannot be sent to" in running.output())
            output = running.output()
        found = [*(answer.body.decode() for answer in heard), output, running.output()]
        assert all("Traceback" not in text for text in found)
        for text in found:
            for secret in (MARK, base64.b64encode(f"u:{MARK}".encode()).decode()):
                where = text.find(secret)
                assert where < 0, text[max(0, where - 300) : where + 100]


def test_what_the_masks_know(tmp_path: Path) -> None:
    """The rule itself, case by case: by position and by name."""
    from gateway.masking import masked, without_secrets

    for text, shown in (
        ("redis://:p@ss@h:1/0?password=x&db=1", "redis://********@h:1/0?password=********&db=********"),
        ("rediss://TOKEN@h", "rediss://********@h"),
        ("cannot reach 'http://u:p@h:1/x?k=v' now", "cannot reach 'http://********@h:1/x?k=********' now"),
        ("Authorization: Bearer abcdefgh", "Authorization: Bearer ********"),
        ("{'Authorization': 'x', \"api_key\": \"a\\\"b\", 'n': 1}", "{'Authorization': '********', \"api_key\": \"********\", 'n': 1}"),
        ("HF_TOKEN=abc password=abc, next", "HF_TOKEN=******** password=********, next"),
        ("sglang --api-key abc --port 1 --token=x", "sglang --api-key ******** --port 1 --token=********"),
        ("max_tokens=5 key=alice unknown key; token: x", "max_tokens=5 key=alice unknown key; token: x"),
    ):
        assert without_secrets(text) == shown
        assert without_secrets(shown) == shown
    tree = {"api_key": "a", "apiKey": "a", "key_file": "f", "max_tokens": 5, "passwords": {"x": "a"}, "args": ["--key", "a", "--n", "1"]}
    assert masked("", tree) == {
        "api_key": "********", "apiKey": "********", "key_file": "f", "max_tokens": 5, "passwords": {"x": "********"},
        "args": ["--key", "********", "--n", "1"],
    }  # fmt: skip
    assert json.dumps(masked("", {"key": None, "hash": "", "token": True})) == '{"key": null, "hash": "", "token": true}'
