"""Both built-in backends hold the contract that is shipped for everybody else's."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.conformance import BackendConformance, begun, chat
from gateway.plugin import AttemptFailed, Backend
from tests.support.processes import Rehearsal


class TestScripted(BackendConformance):
    kind = "scripted"
    provoke = {"busy": "[[fail busy]]", "client": "[[fail client]]", "sick": "[[fail sick]]", "cut": "[[cut 1]] a b"}  # noqa: RUF012

    @pytest.fixture
    def section(self) -> dict[str, Any]:
        return {"targets": 2}


class TestSGLang(BackendConformance):
    kind = "sglang_dsv3"
    provoke = {"busy": "[[refuse 503]]", "client": "[[refuse 400]]", "sick": "[[refuse 500]]", "cut": "[[die 2]]"}  # noqa: RUF012

    @pytest.fixture
    def section(self, scripted_sglang: Rehearsal) -> dict[str, Any]:
        return {"hosts": [{"url": scripted_sglang.url}]}

    def test_open_succeeds_and_send_fails_honestly_with_every_host_down(self) -> None:
        async def work(backend: Backend, target: str) -> None:
            assert not await backend.probe(target)
            assert "does not answer" in (await backend.check())[0]
            with pytest.raises(AttemptFailed) as failed:
                await begun(backend, target, chat("hi"))
            assert (failed.value.cause, failed.value.error.status) == ("connect", 503)

        self.drive({"hosts": [{"url": "http://127.0.0.1:9"}]}, work)
