"""Commands that ask a running gateway's admin API, so that they and `/admin` always agree."""

from __future__ import annotations

import urllib.parse
from pathlib import Path
from typing import Any

import click
import msgspec

from gateway.admin.client import KEY_VARIABLE, Client
from gateway.terminal import say, say_json, say_lines

_url = click.option("--admin", "url", help="Where the admin API is, such as http://127.0.0.1:9464; by default as the configuration says.")
_file = click.option("-c", "--config", "path", type=click.Path(path_type=Path), help="The configuration that says where the admin API is.")
_key = click.option("--admin-key-file", type=click.Path(path_type=Path), help=f"A file with the admin key (or {KEY_VARIABLE}).")


def _segment(text: str) -> str:
    """As one segment of a path, whatever bytes it was typed with."""
    return urllib.parse.quote(text, safe="", errors="surrogateescape")


def _asks(command: Any) -> Any:
    return _url(_file(_key(command)))


@click.group()
def keys() -> None:
    """Make, list, rotate and revoke clients' keys (with Redis)."""


@keys.command("create")
@click.argument("name")
@click.option("--rpm", type=float, help="Requests a minute.")
@click.option("--tpm", type=float, help="Tokens a minute.")
@click.option("--max-in-flight", type=int, help="Requests at once.")
@click.option("--tokens-per-day", type=int, help="Tokens a calendar day.")
@click.option("--model", "models", multiple=True, help="A model it may use; all without it. May be repeated.")
@click.option("--expires", help="ISO 8601 date and time.")
@click.option("--priority", type=int, help="Class in the queue, 0 (first) to 9.")
@click.option("--set", "more", multiple=True, metavar="NAME=JSON", help="Any other field of a key, such as budget='{\"amount\": 50}'.")
@_asks
def create(
    name: str,
    models: tuple[str, ...],
    more: tuple[str, ...],
    url: str | None,
    path: Path | None,
    admin_key_file: Path | None,
    **fields: Any,
) -> None:
    """Make a key. It is shown this once."""
    wanted = {"name": name, **{field: value for field, value in fields.items() if value is not None}}
    if models:
        wanted["models"] = list(models)
    for pair in more:
        field, _, value = pair.partition("=")
        try:
            wanted[field] = msgspec.json.decode(value)
        except msgspec.DecodeError:
            wanted[field] = value
    made = msgspec.json.decode(Client(url, path, admin_key_file).ask("POST", "/admin/keys", wanted))
    _once(made["key"])


@keys.command("list")
@click.option("--json", "as_json", is_flag=True, help="As the gateway gives them.")
@_asks
def show(as_json: bool, url: str | None, path: Path | None, admin_key_file: Path | None) -> None:
    """Every key, and what it may; never the key itself."""
    content = Client(url, path, admin_key_file).ask("GET", "/admin/keys")
    if as_json:
        say_json(content)
        return
    for row in msgspec.json.decode(content)["keys"]:
        name, origin = row.pop("name"), row.pop("origin")
        row.pop("created", None)
        may = "  ".join(f"{field}={msgspec.json.encode(value).decode()}" for field, value in row.items() if value != 0)
        say(f"{name:<24} {origin:<7} {may}")


@keys.command("rotate")
@click.argument("name")
@click.option("--overlap", type=float, help="Seconds for which the former key goes on working (3600).")
@_asks
def rotate(name: str, overlap: float | None, url: str | None, path: Path | None, admin_key_file: Path | None) -> None:
    """Make a new key under the same name."""
    wanted = {} if overlap is None else {"overlap_s": overlap}
    made = Client(url, path, admin_key_file).ask("POST", f"/admin/keys/{_segment(name)}/rotate", wanted)
    _once(msgspec.json.decode(made)["key"])


@keys.command("revoke")
@click.argument("name")
@_asks
def revoke(name: str, url: str | None, path: Path | None, admin_key_file: Path | None) -> None:
    """End a key; every gateway refuses it within two seconds."""
    Client(url, path, admin_key_file).ask("DELETE", f"/admin/keys/{_segment(name)}")
    say(f"penstock: '{name}' is revoked")


def _once(secret: str) -> None:
    """The key alone on standard output, for a script; the words beside it."""
    say("penstock: this is shown once; keep it:", error=True)
    say(secret)


@click.command()
@click.argument("request_id")
@click.option("--json", "as_json", is_flag=True, help="As the gateway gives it.")
@_asks
def explain(request_id: str, as_json: bool, url: str | None, path: Path | None, admin_key_file: Path | None) -> None:
    """What happened to a request: hosts, waits, limits, attempts, phases, tokens. By the answer's id or its x-request-id."""
    query = "" if as_json else "?format=text"
    content = Client(url, path, admin_key_file).ask("GET", f"/admin/requests/{_segment(request_id)}{query}")
    if as_json:
        say_json(content)
    else:
        say_lines(content.decode().rstrip("\n"))


@click.command()
@click.option("--from", "first", help="First day, such as 2026-11-01; today without it.")
@click.option("--to", "last", help="Last day.")
@click.option("--by", help="What to tell apart: key, model, day, separated by commas.")
@click.option("--csv", "as_csv", is_flag=True, help="A table for a spreadsheet.")
@_asks
def usage(
    first: str | None, last: str | None, by: str | None, as_csv: bool, url: str | None, path: Path | None, admin_key_file: Path | None
) -> None:
    """What was used, by key, model and day."""
    query = {"from": first, "to": last, "by": by, "format": "csv" if as_csv else None}
    asked = urllib.parse.urlencode({name: value for name, value in query.items() if value is not None})
    content = Client(url, path, admin_key_file).ask("GET", f"/admin/usage?{asked}")
    if as_csv:
        say_lines(content.decode().rstrip("\n"))
        return
    rows = msgspec.json.decode(content)["usage"]
    say(f"{'day':<11}{'key':<20}{'model':<22}{'requests':>9}{'prompt':>12}{'cached':>12}{'delivered':>12}{'wasted':>10}{'cost':>12}")
    for row in rows:
        wasted = row["wasted_client_tokens"] + row["wasted_host_tokens"]
        say(
            f"{row['day']:<11}{row['key']:<20}{row['model']:<22}{row['requests']:>9}{row['prompt_tokens']:>12}{row['cached_tokens']:>12}"
            f"{row['delivered_tokens']:>12}{wasted:>10}{row['cost']:>12.4f}"
        )
