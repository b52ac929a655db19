"""Commands that show a running gateway and change what it does: `hosts`, `requests`, `status`, `reload`, `audit`."""

from __future__ import annotations

import asyncio
import sys
import time
import urllib.parse
from typing import Any

import click
import msgspec

from gateway import config
from gateway.access.limits.rules import StoreFailed
from gateway.admin.audit import MAX_SHOWN
from gateway.admin.client import Client, NoGatewayError, refuse
from gateway.admin.commands import asks, segment
from gateway.admin.requests import SPANS, seconds
from gateway.errors import ConfigError
from gateway.pages import CONSOLE
from gateway.telemetry.listing import FAILED, MAX_LISTED, OPEN, REFUSED, SLOW, Row, Sought
from gateway.telemetry.metrics import Metrics
from gateway.terminal import say, say_json, say_table

# How often `drain --wait` looks.
_LOOK_S = 1.0


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="As the gateway gives them.")
@asks
@click.pass_context
def hosts(context: click.Context, client: Client, as_json: bool) -> None:
    """Every host: how it is, and why. With `drain` and `undrain`: take one out, and put it back."""
    if context.invoked_subcommand is not None:
        return
    content = client.ask("GET", "/admin/hosts")
    if as_json:
        say_json(content)
    else:
        _show(msgspec.json.decode(content)["hosts"])


def _show(rows: list[dict[str, Any]]) -> None:
    columns = ["id", "backend", "state", "weight", "priority", "in_flight", "capacity", "why"]
    if any(row.get("role") for row in rows):
        columns.insert(2, "role")
    names = {"id": "host", "priority": "tier", "in_flight": "in flight", "capacity": "of"}
    say_table([names.get(column, column) for column in columns], [[row[column] for column in columns] for row in rows])


@hosts.command("drain")
@click.argument("host")
@click.option("--wait", is_flag=True, help="Return when it works on nothing any more.")
@asks
def drain(client: Client, host: str, wait: bool) -> None:
    """No new requests for HOST; what it is working on goes on. Holds until `undrain` or a restart of the gateway."""
    row = _change(client, host, "drain")
    while wait and row["in_flight"]:
        say(f"penstock: {host} is {row['state']}, {row['in_flight']} requests in flight", error=True)
        time.sleep(_LOOK_S)
        row = _row(msgspec.json.decode(client.ask("GET", "/admin/hosts")), host)
    say(f"penstock: {host} is {row['state']}, {row['in_flight']} requests in flight")


@hosts.command("undrain")
@click.argument("host")
@asks
def undrain(client: Client, host: str) -> None:
    """HOST gets requests again."""
    say(f"penstock: {host} is {_change(client, host, 'undrain')['state']}")


def _change(client: Client, host: str, verb: str) -> dict[str, Any]:
    return _row(msgspec.json.decode(client.ask("POST", f"/admin/hosts/{segment(host)}/{verb}")), host)


def _row(found: dict[str, Any], host: str) -> dict[str, Any]:
    row: dict[str, Any] | None = next((row for row in found["hosts"] if row["id"] == host), None)
    if row is None:
        refuse(f"the host '{host}' is gone")
    return row


@click.command()
@asks
def reload(client: Client) -> None:
    """Read the configuration again; a wrong one changes nothing, and says why."""
    done = msgspec.json.decode(client.ask("POST", "/admin/reload", accept=(400,)))
    if not done.get("ok"):
        refuse(f"refused, generation {done['generation']} goes on: {done['problem']}")
    say(f"penstock: generation {done['generation']} serves")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
@asks
def status(client: Client, as_json: bool) -> None:
    """Whether it can serve, its workers and its hosts in a few lines. The exit code is 0 when it can."""
    ready = msgspec.json.decode(client.ask("GET", "/readyz", accept=(503,)))
    workers = msgspec.json.decode(client.ask("GET", "/admin/workers"))["workers"]
    rows = msgspec.json.decode(client.ask("GET", "/admin/hosts"))["hosts"]
    problem = ready["error"]["message"] if "error" in ready else ""
    if as_json:
        say_json(msgspec.json.encode({"ready": not problem, "problem": problem, "workers": workers, "hosts": rows}))
    else:
        say(f"ready    {problem or 'yes'}")
        say(f"workers  {workers_in_words(workers)}")
        say(f"hosts    {sum(row['state'] in ('ok', 'full') for row in rows)} of {len(rows)} take requests")
        for row in rows:
            if row["state"] != "ok":
                say(f"         {row['id']} is {row['state']}: {row['why']}")
    sys.exit(1 if problem else 0)


@click.command()
@click.option(f"--{OPEN}", is_flag=True, help="Those that are being answered.")
@click.option(f"--{FAILED}", is_flag=True, help="Those that somebody else than the client is to blame for.")
@click.option(f"--{REFUSED}", is_flag=True, help="Those that were the client's own fault, or its limits'.")
@click.option(f"--{SLOW}", is_flag=True, help="Those first whose clients have waited longest, for the first event or the next.")
@click.option("--key", help="Of this key alone.")
@click.option("--model", help="Of this model alone.")
@click.option("--host", help="That were at this host.")
@click.option("--since", help=f"Those that were open in the last so long: {SPANS}.")
@click.option("--last", type=click.IntRange(1, MAX_LISTED), default=Sought().last, show_default=True, help="How many.")
@click.option("--json", "as_json", is_flag=True, help="As the gateway gives them.")
@asks
def requests(
    client: Client, key: str | None, model: str | None, host: str | None, since: str | None, last: int, as_json: bool, **states: bool
) -> None:
    """The last requests and how they went, newest first. Where no gateway answers, what Redis remembers of them."""
    chosen = [name for name, given in states.items() if given]
    if len(chosen) > 1:
        refuse(f"{' and '.join(f'--{name}' for name in chosen)}: only one of them at once")
    state = chosen[0] if chosen else ""
    try:
        since_s = None if since is None else seconds(since)
    except ValueError:
        refuse(f"--since {since}: accepted is {SPANS}")
    query = {"state": state or None, "key": key, "model": model, "host": host, "since": since, "last": str(last)}
    asked = urllib.parse.urlencode({name: value for name, value in query.items() if value is not None}, errors="surrogateescape")
    try:
        content = client.try_to_ask("GET", f"/admin/requests?{asked}")
    except NoGatewayError as error:
        content = _remembered(client, str(error), Sought(state, key, since_s, last, model, host))
    if as_json:
        say_json(content)
        return
    rows = msgspec.json.decode(content)["requests"]
    waited = ("longest wait ms",) if state == SLOW else ()
    say_table(
        ("time", "id", "key", "model", "host", "outcome", "status", "first token ms", *waited, "total ms", "prompt", "completion"),
        [
            (
                row["at"], row["id"] or row["request_id"], row["key"] or None, row["model"] or None, row["host"] or None,
                f"open: {row['why']}" if row["outcome"] == OPEN else row["outcome"], row["status"] or None,
                row["first_event_ms"] if row["stream"] else None, *([row["longest_wait_ms"]] if waited else []), row["ms"],
                row["prompt_tokens"], row["completion_tokens"],
            )
            for row in rows
        ],
    )  # fmt: skip


def _remembered(client: Client, problem: str, sought: Sought) -> bytes:
    """What Redis knows of requests; ends the command where there is none, or where a gateway alone could tell."""
    if sought.state == OPEN:
        refuse(problem)
    try:
        settings = config.load(client.path).settings
    except (ConfigError, OSError) as error:
        refuse(str(error))
    if settings.redis.url is None:
        refuse(f"{problem}; without Redis nobody else remembers requests")
    from gateway.store.admin import AdminStore  # as in the parent: not for who does not need it

    async def ask() -> list[Row]:
        store = AdminStore(settings, Metrics())
        try:
            return await store.requests(sought)
        finally:
            await store.aclose()

    try:
        rows = asyncio.run(ask())
    except StoreFailed as error:
        refuse(f"{problem}; nor does Redis: {config.without_secrets(str(error))}")
    say(f"penstock: {problem}; this is what Redis remembers", error=True)
    return msgspec.json.encode({"requests": rows})


def workers_in_words(rows: list[dict[str, Any]]) -> str:
    """All of them in a line."""
    states = {state: sum(row["state"] == state for row in rows) for state in ("serving", "starting", "retiring")}
    counted = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    generation = max((row["generation"] for row in rows), default=0)
    megabytes = sum(row["resident_bytes"] for row in rows) >> 20
    oldest_s = max((row["oldest_s"] for row in rows), default=0.0)
    open = sum(row["open"] for row in rows)
    return f"{counted or 'none'}, generation {generation}; {open} open, the oldest for {oldest_s:.1f} s; {megabytes} MB"


@click.command()
@asks
def console(client: Client) -> None:
    """Where the console is, for a browser, and which key it takes."""
    say(f"{client.url}{CONSOLE}")
    if sys.stdout.isatty():
        say(f"penstock: it asks for an admin key{', such as the one' if client.has_key else ':'} {client.origin}", error=True)


@click.command("audit")
@click.option("--last", type=click.IntRange(1, MAX_SHOWN), default=50, show_default=True, help="How many.")
@click.option("--json", "as_json", is_flag=True, help="As the gateway gives them.")
@asks
def show_audit(client: Client, last: int, as_json: bool) -> None:
    """Who changed what at this gateway, newest first: what it was before, and after."""
    content = client.ask("GET", f"/admin/audit?last={last}")
    if as_json:
        say_json(content)
        return
    say_table(
        ("when", "who", "from", "status", "what", "before", "after"),
        [
            (row["at"], row["who"], row["client"], row["status"], row["what"], _short(row.get("before")), _short(row.get("after")))
            for row in msgspec.json.decode(content)["audit"]
        ],
    )


def _short(value: Any) -> str:
    return msgspec.json.encode(value).decode() if value else "-"
