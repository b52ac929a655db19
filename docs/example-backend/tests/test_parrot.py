"""The contract's own tests, and how to make a parrot misbehave."""

from typing import Any, ClassVar

import pytest

from gateway.conformance import BackendConformance


class TestParrot(BackendConformance):
    kind = "parrot"
    provoke: ClassVar = {"busy": "sing", "client": "fly", "sick": "sleep", "cut": "well squawk"}

    @pytest.fixture
    def section(self) -> dict[str, Any]:
        return {"delay_s": 0.001}
