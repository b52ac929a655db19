"""One signed POST to whoever the operator wants told."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ssl
import time
from pathlib import Path

from gateway import __version__
from gateway.config import Alerts

SIGNATURE = "x-penstock-signature"


def signature(secret: bytes, at: int, body: bytes) -> str:
    """HMAC-SHA256 over the time (seconds since 1970), a full stop and the body: whoever keeps an old one cannot send it again as new."""
    return f"t={at},v1={hmac.new(secret, b'%d.' % at + body, hashlib.sha256).hexdigest()}"


async def post(settings: Alerts, body: bytes) -> str:
    """What was wrong, or "". Redirects are not followed: whoever answers for the receiver does not choose where we go. Nothing of the
    answer is read but its status."""
    import aiohttp  # 0.1 s that only a gateway with somebody to tell has to spend

    assert settings.webhook is not None
    assert settings.secret_file is not None
    try:
        secret = (await asyncio.to_thread(Path(settings.secret_file).read_bytes)).strip()  # each time, so that it can be changed
        context = ssl.create_default_context(cafile=settings.ca_file)
        headers = {
            "content-type": "application/json",
            "user-agent": f"penstock/{__version__}",
            SIGNATURE: signature(secret, int(time.time()), body),
        }
        timeout = aiohttp.ClientTimeout(total=settings.timeout_s)
        connector = aiohttp.TCPConnector(ssl=context, force_close=True)
        async with (
            aiohttp.ClientSession(timeout=timeout, connector=connector) as session,
            session.post(settings.webhook, data=body, headers=headers, allow_redirects=False) as answer,
        ):
            return "" if 200 <= answer.status < 300 else f"it answers with {answer.status}"
    except TimeoutError:
        return f"it does not answer within {settings.timeout_s:g} s"
    except (aiohttp.ClientError, OSError) as error:
        return str(error) or type(error).__name__
