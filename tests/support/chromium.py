"""A real browser that a test drives: over its DevTools protocol, on a pair of pipes, so that no port is open and no library is needed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support.browser import FLAGS
from tests.support.processes import until

# How long the browser may take for one command on a machine that is busy.
_LIMIT_S = 60.0
# What a key press is made of: code and, where it writes something, its text.
_KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), "Space": (32, " "), "Escape": (27, ""), "ArrowDown": (40, "")}
# Told of before any script of the page runs.
_WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => violations.push(`${event.violatedDirective} ${event.blockedURI}`));
"""


class Browser:
    """Chromium with one page in it. `failures`: what went wrong on the page: exceptions, error lines of the console."""

    def __init__(self, to: int, of: int) -> None:
        self._to, self._of = to, of
        self._kept = b""
        self._number = 0
        self._session: str | None = None
        self.failures: list[str] = []
        self.accept_dialogs = True
        self.dialogs: list[str] = []
        # What requests are answered with that were stopped by `Fetch.enable`: status and JSON, or None to let them go on.
        self.answers: Callable[[], tuple[int, str] | None] | None = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        self.send("Page.addScriptToEvaluateOnNewDocument", source=_WATCH)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """A command, and its answer."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params, **({"sessionId": self._session} if self._session else {})}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _LIMIT_S
        while True:
            found = self._read(deadline)
            if found.get("id") == number:
                assert "error" not in found, (method, found["error"])
                result: dict[str, Any] = found["result"]
                return result

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._kept:
            ready, _, _ = select.select([self._of], [], [], max(deadline - time.monotonic(), 0.0))
            assert ready, "the browser does not answer"
            data = os.read(self._of, 1 << 20)
            assert data, "the browser has ended"
            self._kept += data
        line, _, self._kept = self._kept.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        self._heard(message.get("method", ""), message.get("params", {}))
        return message

    def _heard(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.failures.append(json.dumps(params["exceptionDetails"])[:2000])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            entry = params["entry"]
            # Whatever is refused by HTTP is a line too; tests say themselves which of these they expect.
            if entry.get("source") != "network":
                self.failures.append(f"{entry['source']}: {entry['text']}")
        elif method == "Page.javascriptDialogOpening":
            self.dialogs.append(params["message"])
            self._tell("Page.handleJavaScriptDialog", accept=self.accept_dialogs)
        elif method == "Fetch.requestPaused":
            given = self.answers() if self.answers is not None else None
            if given is None:
                self._tell("Fetch.continueRequest", requestId=params["requestId"])
            else:
                body = base64.b64encode(given[1].encode()).decode()
                self._tell("Fetch.fulfillRequest", requestId=params["requestId"], responseCode=given[0], body=body)

    def _tell(self, method: str, **params: Any) -> None:
        """A command whose answer nobody waits for."""
        message = {"id": 0, "method": method, "params": params, "sessionId": self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")

    def open(self, url: str) -> None:
        """Load a page, and wait until it is there."""
        self.send("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def reload(self) -> None:
        self.run("window.old = true")
        self.send("Page.reload")
        self.wait("!window.old && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression on the page."""
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in found, (script, found["exceptionDetails"])
        return found["result"].get("value")

    def wait(self, script: str, timeout_s: float = 60.0) -> Any:
        """Until an expression on the page is true."""

        def probe() -> Any:
            with contextlib.suppress(AssertionError):  # between two pages there is nowhere to ask
                return self.run(script)

        try:
            return until(script, probe, timeout_s, 0.05)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.failures}\n{self.run('document.body.innerText')}") from None

    def text(self, selector: str = "body") -> str:
        return str(self.run(f"document.querySelector({json.dumps(selector)}).textContent"))

    def fill(self, id: str, text: str) -> None:
        """Type into a field, in place of what is there."""
        self.run(f"(document.getElementById({json.dumps(id)}).focus(), document.getElementById({json.dumps(id)}).select())")
        self.type(text)

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def press(self, key: str, times: int = 1) -> None:
        code, text = _KEYS[key]
        for _ in range(times):
            about = {"key": " " if key == "Space" else key, "code": key, "windowsVirtualKeyCode": code}
            self.send("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {}))
            self.send("Input.dispatchKeyEvent", type="keyUp", **about)

    def click(self, selector: str) -> None:
        """With the mouse, where the element is."""
        place = self.run(
            f"(() => {{ const found = document.querySelector({json.dumps(selector)}); found.scrollIntoView({{block: 'center'}});"
            " const box = found.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def size(self, width: int, height: int, scale: float = 1.0) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False)

    def dark(self, on: bool) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark" if on else "light"}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def picture(self, whole: bool = False, quality: int = 80) -> bytes:
        """WebP of what is seen, or of the whole page."""
        found = self.send("Page.captureScreenshot", format="webp", quality=quality, captureBeyondViewport=whole)
        return base64.b64decode(found["data"])

    def violations(self) -> list[str]:
        """Of the page's own policy."""
        found: list[str] = self.run("violations")
        return found


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A browser with a profile of its own in `folder`, which is gone with it."""
    profile, log = folder / "chromium", folder / "chromium.log"
    in_read, in_write = os.pipe()
    out_read, out_write = os.pipe()
    # The browser reads its orders from descriptor 3 and answers on 4.
    script = f'exec "$@" 3<&{in_read} 4>&{out_write}'
    command = ["bash", "-c", script, "-", "chromium", *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, pass_fds=(in_read, out_write), start_new_session=True)
    os.close(in_read)
    os.close(out_write)
    try:
        yield Browser(in_write, out_read)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(in_write)
        os.close(out_read)
        shutil.rmtree(profile, ignore_errors=True)
