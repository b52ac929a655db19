"""TLS on the public listener. A worker reads the files when it starts, so a reload, which replaces the workers, reads them again."""

from __future__ import annotations

import ssl

from gateway.config import Tls


def context(tls: Tls | None) -> ssl.SSLContext | None:
    """What the listener needs to speak TLS 1.2 or later; raises OSError (ssl.SSLError) when the files are not what `verify_files` saw."""
    if tls is None:
        return None
    found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    found.minimum_version = ssl.TLSVersion.TLSv1_2
    found.options |= ssl.OP_NO_RENEGOTIATION
    found.set_alpn_protocols(["http/1.1"])
    found.load_cert_chain(tls.cert_file, tls.key_file, password=lambda: "")
    if tls.client_ca_file is not None:
        found.load_verify_locations(tls.client_ca_file)
        found.verify_mode = ssl.CERT_REQUIRED
    return found
