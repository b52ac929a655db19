"""The admin API of a running gateway, asked over HTTP; what goes wrong ends the command."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NoReturn

import click
import msgspec

from gateway import config
from gateway.errors import ConfigError

_TIMEOUT_S = 30.0
KEY_VARIABLE = "PENSTOCK_ADMIN_KEY"


class Client:
    """The admin API at `url`, or where the configuration in `path` says."""

    def __init__(self, url: str | None, path: Path | None, admin_key_file: Path | None) -> None:
        try:
            self._url = url.rstrip("/") if url is not None else _configured(path)
            self._key = (
                admin_key_file.read_text(encoding="utf-8").strip() if admin_key_file is not None else os.environ.get(KEY_VARIABLE, "")
            )
        except (ConfigError, OSError) as error:
            refuse(str(error))

    def ask(self, method: str, path: str, content: Any = None) -> bytes:
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
        raise ConfigError("listen.admin", "is off: there is no admin API to ask")
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
