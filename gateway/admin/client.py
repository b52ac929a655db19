"""Commands that ask a running gateway through the operator's door, so that they and `/admin` always agree."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import click
import msgspec

from gateway import config
from gateway.errors import ConfigError

_TIMEOUT_S = 30.0
# The gateway reads 64 kB of a request; this leaves room for what is around the keys.
_MAX_CONTENT = 60 << 10
KEY_VARIABLE = "PENSTOCK_ADMIN_KEY"

_door = click.option("--admin", "url", help="The operator's door, such as http://127.0.0.1:9464; by default that of the configuration.")
_file = click.option("-c", "--config", "path", type=click.Path(path_type=Path), help="The configuration that says where the door is.")
_key = click.option("--admin-key-file", type=click.Path(path_type=Path), help=f"A file with the operator's key (or {KEY_VARIABLE}).")


def _asks(command: Any) -> Any:
    return _door(_file(_key(command)))


class Door:
    """The door of a running gateway."""

    def __init__(self, url: str | None, path: Path | None, admin_key_file: Path | None) -> None:
        try:
            self._url = url.rstrip("/") if url is not None else _configured(path)
            self._key = (
                admin_key_file.read_text(encoding="utf-8").strip() if admin_key_file is not None else os.environ.get(KEY_VARIABLE, "")
            )
        except (ConfigError, OSError) as error:
            refuse(str(error))

    def ask(self, method: str, path: str, content: Any = None, accept: int = 200) -> bytes:
        """Its answer's body; anything but success ends the command with what the gateway says."""
        data = msgspec.json.encode(content) if content is not None else None
        headers = {"content-type": "application/json", **({"authorization": f"Bearer {self._key}"} if self._key else {})}
        request = urllib.request.Request(self._url + path, data, headers, method=method)  # noqa: S310 - the operator's own URL
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310
                found: bytes = answer.read()
                return found
        except urllib.error.HTTPError as error:
            with error:
                refuse(_reason(error.read()) or f"{error.code} {error.reason}")
        except OSError as error:
            refuse(f"no gateway answers at {self._url}: {getattr(error, 'reason', error)}")


def _configured(path: Path | None) -> str:
    address = config.admin_address(config.load(path).settings.listen)
    if address is None:
        raise ConfigError("listen.admin", "is off: there is no door to ask at")
    return f"http://{f'[{address[0]}]' if ':' in address[0] else address[0]}:{address[1]}"


def _reason(content: bytes) -> str:
    try:
        return str(msgspec.json.decode(content)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return ""


def refuse(problem: str) -> NoReturn:
    """End the command."""
    click.echo(f"penstock: {problem}", err=True)
    sys.exit(1)


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
    made = msgspec.json.decode(Door(url, path, admin_key_file).ask("POST", "/admin/keys", wanted))
    _once(made["key"])


@keys.command("list")
@click.option("--json", "as_json", is_flag=True, help="As the gateway gives them.")
@_asks
def show(as_json: bool, url: str | None, path: Path | None, admin_key_file: Path | None) -> None:
    """Every key, and what it may; never the key itself."""
    content = Door(url, path, admin_key_file).ask("GET", "/admin/keys")
    if as_json:
        click.echo(content)
        return
    for row in msgspec.json.decode(content)["keys"]:
        name, origin = row.pop("name"), row.pop("origin")
        row.pop("created", None)
        may = "  ".join(f"{field}={msgspec.json.encode(value).decode()}" for field, value in row.items() if value != 0)
        click.echo(f"{name:<24} {origin:<7} {may}")


@keys.command("rotate")
@click.argument("name")
@click.option("--overlap", type=float, help="Seconds for which the former key goes on working (3600).")
@_asks
def rotate(name: str, overlap: float | None, url: str | None, path: Path | None, admin_key_file: Path | None) -> None:
    """Make a new key under the same name."""
    wanted = {} if overlap is None else {"overlap_s": overlap}
    made = Door(url, path, admin_key_file).ask("POST", f"/admin/keys/{urllib.parse.quote(name, safe='')}/rotate", wanted)
    _once(msgspec.json.decode(made)["key"])


@keys.command("revoke")
@click.argument("name")
@_asks
def revoke(name: str, url: str | None, path: Path | None, admin_key_file: Path | None) -> None:
    """End a key; every gateway refuses it within two seconds."""
    Door(url, path, admin_key_file).ask("DELETE", f"/admin/keys/{urllib.parse.quote(name, safe='')}")
    click.echo(f"penstock: '{name}' is revoked")


@keys.command("export")
@_asks
def export(url: str | None, path: Path | None, admin_key_file: Path | None) -> None:
    """Every stored key as JSON, with its hash: for a safe place, and for `import`. The keys themselves are not in it."""
    click.echo(msgspec.json.format(Door(url, path, admin_key_file).ask("GET", "/admin/stored-keys")))


@keys.command("import")
@click.argument("file", type=click.File("rb"))
@_asks
def take(file: Any, url: str | None, path: Path | None, admin_key_file: Path | None) -> None:
    """Store keys that were exported. All are looked at before the first is stored; those that are there already stay as they are."""
    try:
        rows = msgspec.json.decode(file.read(), type=dict[str, list[Any]])["keys"]
    except (msgspec.DecodeError, KeyError) as error:
        refuse(f"{file.name} is not what `penstock keys export` writes: {error}")
    door, done = Door(url, path, admin_key_file), dict[str, int]()
    for check in (True, False):
        for some in _in_parts(rows):
            answer = door.ask("POST", "/admin/stored-keys", {"keys": some, "check": check})
            found = msgspec.json.decode(answer, type=dict[str, list[str]])
            if not check:
                done = {what: done.get(what, 0) + len(names) for what, names in found.items()}
    click.echo(f"penstock: {done.get('imported', 0)} keys were imported, {done.get('kept', 0)} were there already")


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
@_asks
def restore(discard: bool, url: str | None, path: Path | None, admin_key_file: Path | None) -> None:
    """Put back the keys that Redis has lost and that this gateway still knows."""
    answer = Door(url, path, admin_key_file).ask("POST", "/admin/stored-keys/restore", {"discard": discard})
    ((what, names),) = msgspec.json.decode(answer, type=dict[str, list[str]]).items()
    click.echo(f"penstock: {len(names)} keys were {what}{': ' if names else ''}{', '.join(names)}")


def _once(secret: str) -> None:
    """The key alone on standard output, for a script; the words beside it."""
    click.echo("penstock: this is shown once; keep it:", err=True)
    click.echo(secret)


@click.command()
@click.argument("request_id")
@click.option("--json", "as_json", is_flag=True, help="As the gateway gives it.")
@_asks
def explain(request_id: str, as_json: bool, url: str | None, path: Path | None, admin_key_file: Path | None) -> None:
    """What happened to a request: hosts, waits, limits, attempts, phases, tokens. By the answer's id or its x-request-id."""
    query = "" if as_json else "?format=text"
    content = Door(url, path, admin_key_file).ask("GET", f"/admin/requests/{urllib.parse.quote(request_id, safe='')}{query}")
    click.echo(content, nl=as_json)


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
    content = Door(url, path, admin_key_file).ask("GET", f"/admin/usage?{asked}")
    if as_csv:
        click.echo(content, nl=False)
        return
    rows = msgspec.json.decode(content)["usage"]
    click.echo(f"{'day':<11}{'key':<20}{'model':<22}{'requests':>9}{'prompt':>12}{'cached':>12}{'delivered':>12}{'wasted':>10}{'cost':>12}")
    for row in rows:
        wasted = row["wasted_client_tokens"] + row["wasted_host_tokens"]
        click.echo(
            f"{row['day']:<11}{row['key']:<20}{row['model']:<22}{row['requests']:>9}{row['prompt_tokens']:>12}{row['cached_tokens']:>12}"
            f"{row['delivered_tokens']:>12}{wasted:>10}{row['cost']:>12.4f}"
        )
