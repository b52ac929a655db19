"""Files that the `sglang_dsv3` section names: keys and certificates, read where the gateway runs."""

from __future__ import annotations

import re
import ssl
from pathlib import Path

from backends.sglang_dsv3.config import Config, Problems
from gateway.errors import ConfigError, ConfigErrors


def key_in(file: str, path: str) -> str:
    """An engine's key; raises ConfigError at `path` for a file that cannot be read, or that holds what no header may."""
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(path, f"cannot be read: {error}") from None
    if not re.fullmatch(r"[\x21-\x7e]{1,4096}", key):
        raise ConfigError(path, f"{file} must hold one key, in printable ASCII without spaces")
    return key


def verify_files(config: Config) -> None:
    """Raises ConfigErrors for every file of the section that cannot be used. It reads them, so it is asked where the gateway runs."""
    if found := list(_files(config)):
        raise ConfigErrors(found)


def _files(config: Config) -> Problems:
    here = any(host.launch is not None for host in config.hosts)
    for path, file in (("api_key_file", config.api_key_file), ("engine.api_key_file", config.engine.api_key_file if here else None)):
        if file is not None:
            try:
                key_in(file, path)
            except ConfigError as error:
                yield error
    if config.ca_file is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(config.ca_file)
        except (OSError, ValueError) as error:
            yield ConfigError("ca_file", f"cannot be read as PEM certificates: {error}")
    if config.client_cert_file is not None and config.client_key_file is not None:
        try:  # a pass phrase would be asked for at the terminal
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(config.client_cert_file, config.client_key_file, lambda: "")
        except (OSError, ValueError) as error:
            yield ConfigError("client_cert_file", f"and client_key_file are no PEM certificate and its unencrypted key: {error}")
