"""Commands that ask a running gateway's admin API, so that they and `/admin` always agree."""

from __future__ import annotations

import functools
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import msgspec

from gateway.admin import cost, keytable
from gateway.admin.client import KEY_VARIABLE, Client, refuse
from gateway.admin.keytable import Made
from gateway.admin.used import Used
from gateway.errors import ConfigError
from gateway.terminal import say, say_json, say_lines, say_table

# The gateway reads 64 kB of a request; this leaves room for what is around the keys.
_MAX_CONTENT = 60 << 10


def segment(text: str) -> str:
    """As one segment of a path, whatever bytes it was typed with."""
    return urllib.parse.quote(text, safe="", errors="surrogateescape")


def asks(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say which gateway is asked and with which key; the command gets the `client`."""

    @click.option("--admin", "url", help="Where the admin API is, such as http://127.0.0.1:9464; by default as the configuration says.")
    @click.option("-c", "--config", "path", type=click.Path(path_type=Path), help="The configuration that says where the admin API is.")
    @click.option("--admin-key-file", type=click.Path(path_type=Path), help=f"A file with the admin key (or {KEY_VARIABLE}).")
    @functools.wraps(command)
    def with_client(url: str | None, path: Path | None, admin_key_file: Path | None, **more: Any) -> None:
        command(client=Client(url, path, admin_key_file), **more)

    return with_client


@click.group()
def keys() -> None:
    """Make, list, change, rotate and revoke clients' keys (with Redis)."""


def _limits(command: Callable[..., None]) -> Callable[..., None]:
    """Options for what a key may; the command gets them as `wanted`, fields of a key."""

    @click.option("--rpm", type=float, help="Requests a minute.")
    @click.option("--tpm", type=float, help="Tokens a minute.")
    @click.option("--max-in-flight", type=int, help="Requests at once.")
    @click.option("--tokens-per-day", type=int, help="Tokens a calendar day.")
    @click.option("--team", help="One of the configuration's teams, whose limits it shares.")
    @click.option("--model", "models", multiple=True, help="A model it may use; all without it. May be repeated.")
    @click.option("--expires", help="ISO 8601 date and time.")
    @click.option("--priority", type=int, help="Class in the queue, 0 (first) to 9.")
    @click.option("--weight", type=float, help="Share of the places in its class, or its team (1).")
    @click.option("--set", "more", multiple=True, metavar="NAME=JSON", help="Any other field of a key, such as budget='{\"amount\": 50}'.")
    @functools.wraps(command)
    def with_limits(
        rpm: float | None, tpm: float | None, max_in_flight: int | None, tokens_per_day: int | None, models: tuple[str, ...],
        team: str | None, expires: str | None, priority: int | None, weight: float | None, more: tuple[str, ...], **others: Any,
    ) -> None:  # fmt: skip
        given = {
            "rpm": rpm, "tpm": tpm, "max_in_flight": max_in_flight, "tokens_per_day": tokens_per_day, "models": list(models) or None,
            "team": team, "expires": expires, "priority": priority, "weight": weight,
        }  # fmt: skip
        wanted: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
        for pair in more:
            field, _, value = pair.partition("=")
            try:
                wanted[field] = msgspec.json.decode(value)
            except msgspec.DecodeError:
                wanted[field] = value
        command(wanted=wanted, **others)

    return with_limits


@keys.command("create")
@click.argument("name")
@_limits
@asks
def create(client: Client, name: str, wanted: dict[str, Any]) -> None:
    """Make a key. It is shown this once, and good at once."""
    made = msgspec.json.decode(client.ask("POST", "/admin/keys", {"name": name, **wanted}))
    _once(made["key"])


@keys.command("edit")
@click.argument("name")
@_limits
@click.option(
    "--unset", multiple=True, metavar="FIELD", help="A field to take away, such as rpm: then there is no such limit. May be repeated."
)
@asks
def edit(client: Client, name: str, wanted: dict[str, Any], unset: tuple[str, ...]) -> None:
    """Change what a key may; the key itself stays as it is, and what is not named too."""
    change = {**wanted, **{field.replace("-", "_"): None for field in unset}}
    if not change:
        refuse("nothing is to be changed: --rpm, --tpm and so on say what, --unset takes a limit away")
    row = msgspec.json.decode(client.ask("PATCH", f"/admin/keys/{segment(name)}", change))
    say(f"penstock: '{name}' is changed: {'  '.join(f'{field}={value}' for field, value in _fields(row)) or 'no limits'}")


@keys.command("list")
@click.option("--json", "as_json", is_flag=True, help="As the gateway gives them.")
@asks
def list_keys(client: Client, as_json: bool) -> None:
    """Every key, when it was used last, what it used today, how much of its limits that is, and what it may; never the key itself."""
    content = client.ask("GET", "/admin/keys")
    if as_json:
        say_json(content)
        return
    used = Used(client)
    say_table(
        ("key", "origin", "last use", "requests", "limited", "tokens", "cost", "share", "today; may"),
        [
            (
                row["name"], row["origin"], row.get("last_used") or used.last(row["name"]), *used.today(row["name"]), used.share(row),
                "  ".join(f"{name}={value}" for name, value in _fields(row)),
            )
            for row in msgspec.json.decode(content)["keys"]
        ],
    )  # fmt: skip


@keys.command("show")
@click.argument("name")
@asks
def show_key(client: Client, name: str) -> None:
    """One key: what it may, when it was used last, what it used today and how much of its limits that is."""
    row = next((row for row in msgspec.json.decode(client.ask("GET", "/admin/keys"))["keys"] if row["name"] == name), None)
    if row is None:
        refuse(f"There is no key '{name}'.")
    used = Used(client)
    requests, limited, tokens, cost = used.today(name)
    today = f"{requests} requests, {limited} refused by limits, {tokens} tokens, cost {cost:.4f}"
    rows = [
        ("name", name),
        ("origin", row["origin"]),
        *_fields(row),
        ("last use", row.get("last_used") or used.last(name) or "-"),
        ("today", today),
    ]
    for field, value in [*rows, *used.shares(row)]:
        say(f"{field:<18} {value}")


def _fields(row: dict[str, Any]) -> list[tuple[str, str]]:
    """What there is to say of a key beside its name, as JSON."""
    return [
        (field, msgspec.json.encode(value).decode())
        for field, value in row.items()
        if field not in ("name", "origin", "created", "last_used") and value != 0 and (field, value) != ("weight", 1)
    ]


@keys.command("rotate")
@click.argument("name")
@click.option("--overlap", type=float, help="Seconds for which the former key goes on working (3600).")
@asks
def rotate(client: Client, name: str, overlap: float | None) -> None:
    """Make a new key under the same name."""
    wanted = {} if overlap is None else {"overlap_s": overlap}
    made = client.ask("POST", f"/admin/keys/{segment(name)}/rotate", wanted)
    _once(msgspec.json.decode(made)["key"])


@keys.command("revoke")
@click.argument("name")
@asks
def revoke(client: Client, name: str) -> None:
    """End a key; every gateway refuses it within two seconds."""
    client.ask("DELETE", f"/admin/keys/{segment(name)}")
    say(f"penstock: '{name}' is revoked")


@keys.command("export")
@asks
def export(client: Client) -> None:
    """Every stored key as JSON, with its hash: for a safe place, and for `import`. The keys themselves are not in it."""
    say_json(msgspec.json.format(client.ask("GET", "/admin/stored-keys")))


@keys.command("import")
@click.argument("file", type=click.File("rb"))
@asks
def take(client: Client, file: Any) -> None:
    """Store keys that were exported, or make one for each line of a table (FILE.csv, columns as the fields of a key), which are shown this
    once. All are looked at before the first is stored; those that are there already stay as they are."""
    content = file.read()
    made: list[Made] = []
    try:
        if file.name.endswith(".csv"):
            made = keytable.read(content.decode("utf-8-sig").splitlines(), file.name)
        rows = [key.entry for key in made] or msgspec.json.decode(content, type=dict[str, list[Any]])["keys"]
    except ConfigError as error:
        refuse(str(error))
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError) as error:
        refuse(f"{file.name} is not what `penstock keys export` writes, nor a table that is called .csv: {error}")
    secrets = {key.entry["name"]: key.secret for key in made}
    done = {"imported": 0, "kept": 0}
    for check in (True, False):
        start = 0
        for some in _in_parts(rows):
            found = _stored(client, some, check, [f"{file.name}:{key.line}" for key in made[start : start + len(some)]])
            start += len(some)
            if check:
                continue
            for what, names in found.items():
                done[what] += len(names)
            for name in found["imported"]:
                if name in secrets:
                    say(f"{name},{secrets[name]}")
    say(f"penstock: {done['imported']} keys were imported, {done['kept']} were there already", error=bool(made))


def _stored(client: Client, rows: list[Any], check: bool, lines: list[str]) -> dict[str, list[str]]:
    """What became of some keys. Where they are from a table a refusal names its line."""
    answer = client.ask("POST", "/admin/stored-keys", {"keys": rows, "check": check}, (400,))
    found: dict[str, Any] = msgspec.json.decode(answer)
    if "error" in found:
        message = str(found["error"]["message"])
        index, _, rest = message.removeprefix("keys.").partition(".")
        refuse(f"{lines[int(index)]}: {rest}" if lines and index.isdecimal() else message)
    return found


def _in_parts(rows: list[Any]) -> Iterator[list[Any]]:
    """As many at once as the gateway takes in one request."""
    part: list[Any] = []
    size = 0
    for row in rows:
        length = len(msgspec.json.encode(row)) + 1
        if part and size + length > _MAX_CONTENT:
            yield part
            part, size = [], 0
        part.append(row)
        size += length
    yield part


@keys.command("restore")
@click.option("--discard", is_flag=True, help="Give up what is lost, at every gateway, instead.")
@asks
def restore(client: Client, discard: bool) -> None:
    """Put back the keys that Redis has lost and that this gateway still knows."""
    answer = client.ask("POST", "/admin/stored-keys/restore", {"discard": discard})
    ((what, names),) = msgspec.json.decode(answer, type=dict[str, list[str]]).items()
    say(f"penstock: {len(names)} keys were {what}{': ' if names else ''}{', '.join(names)}")


def _once(secret: str) -> None:
    """The key alone on standard output, for a script; the words beside it."""
    say("penstock: this is shown once; keep it:", error=True)
    say(secret)


@click.command()
@click.argument("request_id")
@click.option("--json", "as_json", is_flag=True, help="As the gateway gives it.")
@asks
def explain(client: Client, request_id: str, as_json: bool) -> None:
    """What happened to a request: hosts, waits, limits, attempts, phases, tokens. By the answer's id or its x-request-id."""
    query = "" if as_json else "?format=text"
    content = client.ask("GET", f"/admin/requests/{segment(request_id)}{query}")
    if as_json:
        say_json(content)
    else:
        say_lines(content.decode().rstrip("\n"))


@click.command()
@click.option("--from", "first", help="First day, such as 2026-11-01; today without it.")
@click.option("--to", "last", help="Last day.")
@click.option("--by", help="What to tell apart: key, model, day, team, separated by commas.")
@click.option("--csv", "as_csv", is_flag=True, help="A table for a spreadsheet.")
@click.option("--cost-per-token", is_flag=True, help="What a million tokens cost, from --gpus, --hours and --gpu-price.")
@click.option("--gpus", type=click.IntRange(1), help="GPUs that were paid for.")
@click.option("--hours", type=click.FloatRange(0, min_open=True), help="For so long, as the days that are asked for.")
@click.option("--gpu-price", type=click.FloatRange(0), help="Of one GPU for an hour.")
@click.option("--list-price", type=click.FloatRange(0), help="An API's, for a million tokens of answers, to compare with.")
@click.option("--list-prompt-price", type=click.FloatRange(0), help="The same for prompts.")
@asks
def usage(
    client: Client, first: str | None, last: str | None, by: str | None, as_csv: bool, cost_per_token: bool, gpus: int | None,
    hours: float | None, gpu_price: float | None, list_price: float | None, list_prompt_price: float | None,
) -> None:  # fmt: skip
    """What was used, by key, model, day and team; what a token cost."""
    prices = {"--gpus": gpus, "--hours": hours, "--gpu-price": gpu_price}
    if cost_per_token and (missing := [name for name, value in prices.items() if value is None]):
        raise click.UsageError(f"--cost-per-token: {', '.join(missing)} is missing; accepted: --gpus 8 --hours 24 --gpu-price 2.5")
    if not cost_per_token and (given := [name for name, value in {**prices, "--list-price": list_price}.items() if value is not None]):
        raise click.UsageError(f"{given[0]}: says nothing without --cost-per-token")
    if list_prompt_price is not None and list_price is None:
        raise click.UsageError("--list-prompt-price: says nothing without --list-price")
    query = {"from": first, "to": last, "by": by, "format": "csv" if as_csv else None}
    asked = urllib.parse.urlencode({name: value for name, value in query.items() if value is not None})
    content = client.ask("GET", f"/admin/usage?{asked}")
    if as_csv:
        say_lines(content.decode().rstrip("\n"))
        return
    if cost_per_token:
        for line in cost.lines(
            msgspec.json.decode(content)["usage"], cost.Prices(gpus or 0, hours or 0.0, gpu_price or 0.0, list_price, list_prompt_price)
        ):
            say(line)
        return
    shown = ("day", "team", "key", "model") if "team" in (by or "").split(",") else ("day", "key", "model")
    say_table(
        (*shown, "requests", "limited", "prompt", "cached", "delivered", "wasted", "cost"),
        [
            (
                *(row[place] for place in shown), row["requests"], row["limited"], row["prompt_tokens"], row["cached_tokens"],
                row["delivered_tokens"], row["wasted_client_tokens"] + row["wasted_host_tokens"], f"{row['cost']:.4f}",
            )
            for row in msgspec.json.decode(content)["usage"]
        ],
    )  # fmt: skip
