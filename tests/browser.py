"""A real browser for tests: headless Chromium, spoken to over its DevTools pipe. No driver, no package.

with Browser(program, proxy="http://127.0.0.1:8080") as browser:
    tab = browser.open("http://any.test/page.html", width_px=390, dark=True)
    tab.evaluate("document.title"), tab.requests, tab.complaints, tab.screenshot()
"""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import select
import shutil
import subprocess
import time
from collections import deque
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

TIMEOUT_S = 60.0
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    *("--disable-default-apps", "--disable-extensions", "--disable-client-side-phishing-detection"),
    "--remote-debugging-pipe",
)


def find_browser() -> str | None:
    """Chromium, under any of its names."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """Context manager. `proxy` gets every request for any host, this machine included; None: no proxy."""

    def __init__(self, program: str, *, proxy: str | None = None) -> None:
        self._command = [program, *_FLAGS]
        if proxy is not None:
            self._command += [f"--proxy-server={proxy}", "--proxy-bypass-list=<-loopback>"]
        self._id = 0
        self._left = b""
        self._messages: deque[dict[str, Any]] = deque()

    def __enter__(self) -> Browser:
        self._folder = TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        # The browser reads from its descriptor 3 and writes to 4; ours are kept out of their way.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (*os.pipe(), *os.pipe())]
        theirs_in, self._out, self._in, theirs_out = ends

        def place() -> None:
            os.dup2(theirs_in, 3)
            os.dup2(theirs_out, 4)

        self._process = subprocess.Popen(
            [*self._command, f"--user-data-dir={self._folder.name}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(3, 4),
            preexec_fn=place,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._folder.cleanup()

    def open(self, url: str, *, width_px: int = 1280, height_px: int = 900, dark: bool = False) -> Tab:
        """A page, once it is loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        tab.call(
            "Emulation.setDeviceMetricsOverride",
            width=width_px,
            height=height_px,
            deviceScaleFactor=1,
            mobile=width_px < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tab.call("Emulation.setEmulatedMedia", features=[scheme])
        tab.call("Page.navigate", url=url)
        self.wait_for(session, "Page.loadEventFired")
        return tab

    def call(self, method: str, session: str | None = None, /, **params: Any) -> dict[str, Any]:
        """One command and its result; RuntimeError with what the browser says against it."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": params}
        os.write(
            self._out, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0"
        )
        while True:
            answer = self._next()
            if answer.get("id") == self._id:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self._messages.append(answer)

    def wait_for(self, session: str, event: str) -> None:
        while not any(m.get("sessionId") == session and m["method"] == event for m in self._messages):
            self._messages.append(self._next())

    def events(self, session: str, method: str) -> list[dict[str, Any]]:
        """The parameters of those seen so far."""
        return [m["params"] for m in self._messages if (m.get("sessionId"), m["method"]) == (session, method)]

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._left:
            if not select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"the browser says nothing for {TIMEOUT_S:g} s")
            data = os.read(self._in, 1 << 16)
            if not data:
                raise RuntimeError(f"the browser ended with {self._process.wait()}")
            self._left += data
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)


@dataclass
class Tab:
    """One page in the browser."""

    browser: Browser = field(repr=False)
    session: str

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def evaluate(self, script: str) -> Any:
        """The value of an expression, as data."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    @property
    def requests(self) -> list[str]:
        """URLs that the page asked for, those that its policy then refused included; without data: URLs."""
        seen = self.browser.events(self.session, "Network.requestWillBeSent")
        return [one["request"]["url"] for one in seen if not one["request"]["url"].startswith("data:")]

    @property
    def complaints(self) -> list[str]:
        """What the console shows: errors, warnings, refusals of the policy."""
        logged = self.browser.events(self.session, "Log.entryAdded")
        thrown = self.browser.events(self.session, "Runtime.exceptionThrown")
        return [one["entry"]["text"] for one in logged] + [one["exceptionDetails"]["text"] for one in thrown]

    def screenshot(self, selector: str | None = None) -> Image.Image:
        """The whole page, or one element of it."""
        element = (
            f"document.querySelector({json.dumps(selector)})" if selector else "document.documentElement"
        )
        x, y, width, height = self.evaluate(
            f"(b => [b.x + scrollX, b.y + scrollY, b.width, b.height])({element}.getBoundingClientRect())"
        )
        clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        return Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
