"""What a token cost, by the ledger of a real gateway and prices that an operator gives."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner

from gateway import cli
from gateway.admin.cost import Prices, lines
from tests.support import raw
from tests.support.processes import Gateway, until

CHAT = "/v1/chat/completions"


def test_a_tokens_cost_is_the_ledgers_tokens_and_the_gpus_price(wired: Gateway) -> None:
    answer = raw.call(wired.port, "POST", CHAT, raw.chat("What does it cost?"))
    assert answer.json()["usage"]["completion_tokens"] > 0
    asked = ["--cost-per-token", "--gpus", "8", "--hours", "24", "--gpu-price", "2", "--list-price", "1.1", "--list-prompt-price", "0.27"]
    words = ["usage", "--admin", wired.admin_url, *asked]

    def delivered() -> tuple[int, int, list[str]] | None:
        rows = wired.admin("/admin/usage").json()["usage"]
        done = CliRunner().invoke(cli.main, words)
        assert done.exit_code == 0, done.output
        count, prompts = (sum(int(row[name]) for row in rows) for name in ("delivered_tokens", "prompt_tokens"))
        return (count, prompts, done.stdout.splitlines()) if count and f" {count:,} tokens delivered" in done.stdout else None

    found = until("the ledger has it", delivered, 10)
    assert found is not None
    count, prompts, shown = found
    assert shown[0].startswith(f"measured (the ledger): {count:,} tokens delivered, {prompts:,} of prompts, ")
    assert shown[1] == "as asked: 8 GPUs for 24 hours at 2 each: 384.00"
    assert shown[2] == f"computed: {384 / count * 1e6:,.2f} for a million tokens delivered, their prompts included"
    bill = (count * 1.1 + prompts * 0.27) / 1e6
    assert re.match(rf"computed: at 1.1 .* and 0.27 .* the same costs {bill:,.2f}; these GPUs cost [\d,]+ times as much$", shown[3])


ROW = {"delivered_tokens": 400_000_000, "prompt_tokens": 1_000_000_000, "wasted_client_tokens": 5, "wasted_host_tokens": 7}


@pytest.mark.parametrize(
    ("price", "says"), [(1.0, "52% less"), (4.0, "92% more"), (0.0, "100% less"), (40.0, "19 times as much")]
)  # 400 M at 1 are 400
def test_more_and_less_than_a_list_price(price: float, says: str) -> None:
    said = list(lines([ROW], Prices(8, 24, price, 1.0, None)))
    assert said[-1] == f"computed: at 1 for a million tokens the same costs 400.00; these GPUs cost {says}"


def test_nothing_delivered_has_no_price() -> None:
    assert list(lines([], Prices(8, 24, 2.0, 1.0, None)))[-1] == "computed: no token was delivered, so there is no price of one"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--cost-per-token", "--gpus", "8"],
            "--cost-per-token: --hours, --gpu-price is missing; accepted: --gpus 8 --hours 24 --gpu-price 2.5",
        ),
        (["--gpu-price", "2"], "--gpu-price: says nothing without --cost-per-token"),
        (["--cost-per-token", "--gpus", "0"], "0 is not in the range x>=1"),
        (
            ["--cost-per-token", "--gpus", "8", "--hours", "1", "--gpu-price", "2", "--list-prompt-price", "1"],
            "--list-prompt-price: says nothing without --list-price",
        ),
    ],
)
def test_what_is_missing_is_said_in_one_line(words: list[str], said: str) -> None:
    done = CliRunner().invoke(cli.main, ["usage", "--admin", "http://127.0.0.1:1", *words])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert said in done.stderr
