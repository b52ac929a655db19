"""For whoever runs a process that must not outlive its parent and must come back when it dies: the parent, and a backend's supervisor."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None, use_errno=True)

_PAGE: Final = os.sysconf("SC_PAGE_SIZE")

BACKOFF_FIRST_S = 1.0
BACKOFF_MAX_S = 30.0
# A child that lived this long was healthy: the next failure starts from the beginning of the back-off again.
BACKOFF_RESET_S = 60.0


class Backoff:
    """Delays of 1, 2, 4 ... 30 s between restarts; a run of a minute resets them."""

    def __init__(self) -> None:
        self._delay_s = 0.0

    def next(self, lived_s: float) -> float:
        """Seconds to wait after a run of `lived_s`."""
        if lived_s >= BACKOFF_RESET_S:
            self._delay_s = 0.0
        self._delay_s = min(max(self._delay_s * 2, BACKOFF_FIRST_S), BACKOFF_MAX_S)
        return self._delay_s


def resident_bytes() -> int:
    """Resident memory of this process."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE


def tell_manager(state: str) -> None:
    """Tell systemd (`Type=notify`) how we are: `READY=1`, `RELOADING=1`, `STOPPING=1`. Nobody is told where nobody asked."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
            peer.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def die_with(parent: int, death_signal: int) -> None:
    """Ask the kernel to send this process `death_signal` when `parent` dies; for the moment between fork and exec. Linux only."""
    _libc.prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)
