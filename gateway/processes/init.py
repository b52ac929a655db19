"""Being process 1, in a container without an init: the kernel hands every orphan to it, and its signals have no defaults.

The gateway itself moves into a child; what stays behind passes signals on and buries the dead. Linux only.
"""

from __future__ import annotations

import os
import signal
import sys

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def step_aside() -> None:
    """Return in a child if we are process 1, and at once if we are not. Process 1 ends with the child's exit code."""
    if os.getpid() != 1:
        return
    # Blocked before the fork, so that no signal falls between.
    signal.pthread_sigmask(signal.SIG_BLOCK, {*_PASSED_ON, signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*_PASSED_ON, signal.SIGCHLD})
        return
    while True:
        number = signal.sigwait({*_PASSED_ON, signal.SIGCHLD})
        if number != signal.SIGCHLD:
            os.kill(child, number)
            continue
        while True:
            try:
                dead, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if dead == 0:
                break
            if dead == child:
                # The rest of the namespace ends with us.
                sys.stdout.flush()
                os._exit(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))
