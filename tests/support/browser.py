"""A headless Chromium for tests and pictures of pages, by the DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_SECONDS = 60  # for whatever the browser is asked
_FLAGS = (
    "--headless",
    "--no-sandbox",  # it may run as root, in a container
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)


def find_chromium() -> str | None:
    """The path of a Chromium or Chrome, or None."""
    return next((path for name in NAMES if (path := shutil.which(name)) is not None), None)


class Browser:
    """A running browser with an empty profile."""

    def __init__(self, executable: str, profile: Path) -> None:
        command = [executable, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        # Its reports of crashes and its caches would lie in the user's folder, whatever the profile.
        places = dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"), str(profile))
        self._process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ, **places}
        )
        too_long = threading.Timer(_SECONDS, self._process.kill)
        too_long.start()
        lines = []
        assert self._process.stderr is not None
        for line in self._process.stderr:
            lines.append(line)
            if line.startswith("DevTools listening on "):
                break
        else:
            raise RuntimeError(f"the browser ended: {''.join(lines)}")
        too_long.cancel()
        # What it writes later is read, or it would wait for room in the pipe.
        threading.Thread(target=self._process.stderr.read, daemon=True).start()
        self._connection = ExitStack()
        address = lines[-1].split()[-1]
        self._socket = self._connection.enter_context(
            connect(address, max_size=None, proxy=None, open_timeout=_SECONDS)
        )
        self._numbers = count(1)
        self._listeners: dict[str, Callable[[str, dict[str, Any]], None]] = {}

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The result of a command; events that come before it go to their pages."""
        number = next(self._numbers)
        target = {} if session is None else {"sessionId": session}
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters, **target}))
        while True:
            message = json.loads(self._socket.recv(timeout=_SECONDS))
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                result: dict[str, Any] = message["result"]
                return result
            if "method" in message and message.get("sessionId") in self._listeners:
                self._listeners[message["sessionId"]](message["method"], message["params"])

    @contextmanager
    def page(self, *, width: int = 1200, height: int = 900, dark: bool = False) -> Iterator[Page]:
        """A new page; it is closed at the end."""
        context = self.send("Target.createBrowserContext")["browserContextId"]
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        self._listeners[session] = page._hear
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.resize(width, height)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        page.send("Emulation.setEmulatedMedia", features=scheme)
        try:
            yield page
        finally:
            del self._listeners[session]
            self.send("Target.disposeBrowserContext", browserContextId=context)

    def close(self) -> None:
        """End the browser."""
        self._socket.send(json.dumps({"id": 0, "method": "Browser.close"}))
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._connection.close()
        assert self._process.stderr is not None
        self._process.stderr.close()


class Page:
    """A page: what it shows, what went wrong on it, and which addresses it asked."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.problems: list[str] = []
        self.requests: list[str] = []

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the DevTools protocol."""
        return self._browser.send(method, self._session, **parameters)

    def _hear(self, method: str, event: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = event["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded" and event["entry"]["level"] == "error":
            self.problems.append(f"{event['entry']['text']} {event['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])

    def open(self, url: str) -> None:
        """Go to an address, and wait until the page is loaded."""
        failed = self.send("Page.navigate", url=url).get("errorText")
        assert failed is None, failed
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def js(self, expression: str) -> Any:
        """The value of an expression; a promise is awaited."""
        found = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise AssertionError(found["exceptionDetails"].get("exception", {}).get("description", found))
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = 50) -> None:
        """Wait until an expression is true on the page, which may be another one by then."""
        program = (
            "new Promise((done, fail) => { const end = Date.now() + %d; (function look() { let holds = false;"
            " try { holds = %s; } catch {} if (holds) done(true); else if (Date.now() > end) done(false);"
            " else setTimeout(look, 10); })(); })"
        )
        held = self.js(program % (int(seconds * 1000), condition))
        assert held, f"not within {seconds} s: {condition}; problems: {self.problems}"

    def settle(self) -> None:
        """Wait until the page asks for nothing and two more frames are drawn."""
        frames = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
        last = -1
        while last != (last := len(self.requests)):
            self.js("new Promise(done => setTimeout(() => done(true), 300))")
            self.js(frames)

    def write(self, selector: str, text: str) -> None:
        """Put a text into a field in place of its own, as if it was pasted.

        It is one program: between two commands a page may write into the field, and the second would add to that.
        """
        program = (
            "((e, text) => {{ e.focus(); e.select(); document.execCommand('delete');"
            " document.execCommand('insertText', false, text); }})(document.querySelector({}), {})"
        )
        self.js(program.format(json.dumps(selector), json.dumps(text)))

    def choose(self, selector: str, value: str) -> None:
        """Choose a value of a select or slider."""
        program = "(e => {{ e.value = {}; for (const n of ['input', 'change']) e.dispatchEvent(new Event(n)); }})({})"
        self.js(program.format(json.dumps(value), f"document.querySelector({json.dumps(selector)})"))

    def click(self, selector: str) -> None:
        """Click the first element that matches."""
        self.js(f"document.querySelector({json.dumps(selector)}).click()")

    def data(self, selector: str, name: str) -> list[str]:
        """A data attribute of each element that matches."""
        found: list[str] = self.js(
            f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.dataset.{name})"
        )
        return found

    def texts(self, selector: str) -> list[str]:
        """The text of each element that matches."""
        found: list[str] = self.js(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)")
        return found

    def resize(self, width: int, height: int) -> None:
        """Set the size of the window."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """Write a PNG of the page, by default of its whole height."""
        box = {}
        if whole:
            size = self.send("Page.getLayoutMetrics")["cssContentSize"]
            box = {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **box)["data"]
        path.write_bytes(base64.b64decode(shot))


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser that is found on this machine."""
    executable = find_chromium()
    if executable is None:
        raise RuntimeError(f"no browser is installed: {', '.join(NAMES)}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        running = Browser(executable, Path(profile))
        try:
            yield running
        finally:
            running.close()
