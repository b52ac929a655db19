"""`penstock check --reach`: what a configuration names is there, or is named, one line each, and the exit code says so."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
from pathlib import Path
from typing import Any

from tests.support import redis
from tests.support.otlp import collector
from tests.support.processes import Rehearsal
from tests.wire.test_command import penstock


def check(folder: Path, config: dict[str, Any], *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "p.yaml").write_text(json.dumps(config))
    return penstock("check", "--reach", *options, "-c", "p.yaml", folder=folder)


def nobody() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        port: int = one.getsockname()[1]
    return port


def test_all_of_it_is_there(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        store, sink = stack.enter_context(redis.server(tmp_path / "redis")), stack.enter_context(collector())
        config = {**scripted_sglang.backend(), "redis": {"url": store.url}, "tracing": {"otlp_endpoint": sink.endpoint}}
        done = check(tmp_path, config)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[-1] == "ok: p.yaml can be served, and all that it names is there"


def test_what_is_not_there_is_named_one_line_each(scripted_sglang: Rehearsal, tmp_path: Path) -> None:
    host, agent, store, sink = (f"127.0.0.1:{nobody()}" for _ in range(4))
    config = scripted_sglang.backend()
    config["backends"]["dsv3"]["hosts"] = [{"url": f"http://{host}"}, {"url": scripted_sglang.url, "agent": f"http://{agent}"}]
    config |= {"redis": {"url": f"redis://:secret@{store}"}, "tracing": {"otlp_endpoint": f"http://{sink}"}}
    done = check(tmp_path, config)
    assert done.returncode == 1
    missing = [line.removeprefix("penstock: not reached: ") for line in done.stderr.splitlines()]
    assert len(missing) == 4
    assert missing[0].startswith(f"backends.dsv3: {host} does not answer /model_info: ")
    well = scripted_sglang.url.removeprefix("http://")
    assert missing[1] == f"backends.dsv3: the agent of {well} does not answer at http://{agent}: Connection refused"
    assert missing[2].startswith("redis.url: does not answer: ")
    assert missing[3] == f"tracing.otlp_endpoint: nobody answers at {sink}: Connection refused"
    assert "secret" not in done.stdout + done.stderr
    assert "ok:" not in done.stdout
    found = json.loads(check(tmp_path, config, "--json").stdout)
    assert [line.partition(":")[0] for line in found["unreached"]] == [
        "backends.dsv3",
        "backends.dsv3",
        "redis.url",
        "tracing.otlp_endpoint",
    ]
