"""`penstock sentinel`: how hosts' answers keep to the rules, who is under alert, and what bad answers say."""

from __future__ import annotations

import click
import msgspec

from gateway.admin.client import Client
from gateway.admin.commands import asks
from gateway.terminal import say, say_json, say_table


@click.command()
@click.option("--examples", is_flag=True, help="The bad answers that are kept, newest first; for an admin key that may do everything.")
@click.option("--json", "as_json", is_flag=True, help="As the gateway gives it.")
@asks
def sentinel(client: Client, examples: bool, as_json: bool) -> None:
    """How many answers of each host break which rule, and who is under alert for it."""
    content = client.ask("GET", "/admin/sentinel")
    found = msgspec.json.decode(content)
    if as_json:
        say_json(content)
        return
    if examples:
        for one in reversed(found["examples"]):
            broken = "; ".join(f"{rule}: {how}" for rule, how in one["broken"].items())
            say(f"{one['at']} {one['id']} {one['host']}  {broken}")
            if one["prompt"]:
                say(f"  asked: {one['prompt']}")
            say(f"  said: {one['said']}")
        return
    under = {(row["backend"], row["weights"], row["host"], row["rule"]) for row in found["alerts"]}
    say_table(
        ("host", "backend", "weights", "rule", "answers", "bad", "share", ""),
        [
            (
                host["host"], host["backend"], host["weights"], rule, of["answers"], of["bad"], f"{of['bad'] / of['answers']:.1%}",
                "alert" if (host["backend"], host["weights"], host["host"], rule) in under else "",
            )
            for host in found["hosts"]
            for rule in found["rules"]
            if (of := host["rules"].get(rule)) is not None
        ],
    )  # fmt: skip
    for row in found["alerts"]:
        say(f"since {row['since']}: host {row['host']} gives {row['why']}")
