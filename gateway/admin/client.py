"""The admin API of a running gateway, asked over HTTP; what goes wrong ends the command."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Container
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from gateway import config
from gateway.admin import secret
from gateway.errors import ConfigError
from gateway.home import home
from gateway.terminal import say

_TIMEOUT_S = 30.0
# Of an answer: a ledger of years is a few megabytes.
MAX_ANSWER_BYTES = 64 << 20
KEY_VARIABLE = "PENSTOCK_ADMIN_KEY"


class NoGatewayError(Exception):
    """Nobody answers where the admin API should be."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The key goes nowhere but where it was sent."""

    def redirect_request(self, *about: Any) -> None:
        """Follow none."""


# No proxy from the environment either: what is asked for is on this machine, or on the operator's own network.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)


class Client:
    """The admin API at `url`, or where the configuration in `path` says. The key: from `key_file`, from the environment, or the one that a
    gateway on this machine has made; the last is sent to this machine alone. `origin`: where the key is from, or what to do, in words."""

    def __init__(self, url: str | None, path: Path | None, key_file: Path | None) -> None:
        try:
            self.path = path
            self.url = url.rstrip("/") if url is not None else _configured(path)
            elsewhere = url is not None and not config.is_loopback(urllib.parse.urlsplit(url).hostname or "")
            self._key, self.origin = _find_key(key_file, elsewhere)
        except (ConfigError, OSError, ValueError) as error:
            refuse(str(error))

    @property
    def has_key(self) -> bool:
        """Whether one was found."""
        return bool(self._key)

    def ask(self, method: str, path: str, content: Any = None, accept: Container[int] = ()) -> bytes:
        """Its answer's body; anything but success (or a status in `accept`) ends the command with what the gateway says."""
        try:
            return self.try_to_ask(method, path, content, accept)
        except NoGatewayError as error:
            refuse(str(error))

    def try_to_ask(self, method: str, path: str, content: Any = None, accept: Container[int] = ()) -> bytes:
        """The same, for whoever knows what to do without a gateway; raises NoGatewayError."""
        data = msgspec.json.encode(content) if content is not None else None
        headers = {"content-type": "application/json", **({"authorization": f"Bearer {self._key}"} if self._key else {})}
        request = urllib.request.Request(self.url + path, data, headers, method=method)  # noqa: S310 - the operator's own URL
        try:
            with _opener.open(request, timeout=_TIMEOUT_S) as answer:
                found: bytes = answer.read(MAX_ANSWER_BYTES + 1)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(MAX_ANSWER_BYTES)
            if error.code in accept:
                return said
            reason = _reason(said) or f"{error.code} {error.reason}"
            if error.code == 401:
                wrong = f"the admin key {self.origin} is not that of the gateway at {self.url}"
                reason = wrong if self._key else f"the gateway at {self.url} wants its admin key: {self.origin}"
            refuse(reason)
        except (OSError, ValueError) as error:
            raise NoGatewayError(f"no gateway answers at {self.url}: {getattr(error, 'reason', error)}") from None
        if len(found) > MAX_ANSWER_BYTES:
            refuse(f"what answers at {self.url} sends more than {MAX_ANSWER_BYTES >> 20} MB: that is no gateway")
        return found


def _find_key(key_file: Path | None, elsewhere: bool) -> tuple[str, str]:
    """The key and where it is from, in words; or no key, and what to do."""
    if key_file is not None:
        return key_file.read_text(encoding="utf-8").strip(), f"in {key_file}"
    if key := os.environ.get(KEY_VARIABLE):
        return key, f"in {KEY_VARIABLE}"
    others = f"--admin-key-file or {KEY_VARIABLE}"
    if elsewhere:
        return "", f"name it with {others}"
    made = secret.path(home())
    try:
        return secret.read(made), f"in {made}"
    except FileNotFoundError:
        return "", f"it is not in {made} (PENSTOCK_HOME says where to look); name it with {others}"
    except PermissionError:
        return "", f"{made} is for the gateway's user alone: run this as that user or as root, or name the key with {others}"


def _configured(path: Path | None) -> str:
    address = config.admin_address(config.load(path).settings.listen)
    if address is None:
        raise ConfigError("listen.admin", "is off: there is no admin API to ask")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0])  # noqa: S104 - what listens everywhere listens here
    return f"http://{f'[{host}]' if ':' in host else host}:{address[1]}"


def _reason(content: bytes) -> str:
    try:
        return str(msgspec.json.decode(content)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return ""


def refuse(problem: str) -> NoReturn:
    """End the command."""
    say(f"penstock: {problem}", error=True)
    sys.exit(1)
