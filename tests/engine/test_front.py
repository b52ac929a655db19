"""The page at `/` while the real engine loads, and a prompt typed into it that the real engine answers."""

from __future__ import annotations

from pathlib import Path

from tests.support.chromium import chromium
from tests.support.processes import gateway


def test_the_page_shows_the_engine_loading_and_streams_what_it_says(tmp_path: Path) -> None:
    with chromium(tmp_path) as page, gateway(tmp_path / "run") as running:
        page.open(f"{running.root}/")
        page.wait("document.querySelector('#state').textContent.startsWith('The engine is loading')")
        assert page.run("document.querySelector('#progress').hidden") is False
        page.wait("document.querySelector('#state').textContent === 'Ready'", 180)
        assert page.run("document.querySelector('#progress').hidden") is True
        page.wait("document.querySelector('#models').textContent.includes('deepseek-v3-tiny')")
        page.fill("max-tokens", "12")
        page.click("#send")
        page.wait("document.querySelector('#outcome').textContent.includes('ended by')", 120)
        assert page.text("#outcome").startswith("12 tokens, first after ")
        assert "ended by length" in page.text("#outcome")
        assert page.text("#text") + page.text("#thinking")
        assert page.failures == []
        assert page.violations() == []
