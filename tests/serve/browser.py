"""Chromium without a window, told what to do over a pipe in its DevTools protocol: nothing to install beside it."""
import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time

import pytest

# pip packages that hold a browser are not asked for: these names are what distributions install.
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# The browser reads from 3 and writes to 4.
START = """import fcntl, os, sys
ends = [fcntl.fcntl(int(i), fcntl.F_DUPFD, 10) for i in sys.argv[1:3]]
for i, end in zip((3, 4), ends):
    os.dup2(end, i)
os.execv(sys.argv[3], sys.argv[3:])"""
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9}


class Page:
    """One tab. `errors`: what went wrong in its scripts, or was forbidden by the policy of the page."""

    def __init__(self, to, back):
        self.to = to
        self.back = back
        self.numbers = itertools.count(1)
        self.session = None
        self.errors = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method, **params):
        """Call a method of the protocol."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.to.write(json.dumps(message).encode() + b"\0")
        self.to.flush()
        while True:
            got = self.next()
            if got.get("id") == number:
                assert "error" not in got, got
                return got["result"]
            if got.get("method") == "Runtime.exceptionThrown" or (
                    got.get("method") == "Log.entryAdded" and got["params"]["entry"]["level"] == "error"):
                self.errors.append(got["params"])

    def next(self):
        """The next message."""
        data = bytearray()
        while (byte := self.back.read(1)) != b"\0":
            assert byte, "the browser has ended"
            data += byte
        return json.loads(data)

    def js(self, code):
        """The value of an expression; promises are waited for."""
        got = self("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    def wait(self, code, seconds=20):
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.js(code):
                return value
            time.sleep(0.02)
        pytest.fail(f"never so: {code}; errors: {self.errors}")

    def open(self, url):
        self("Page.navigate", url=url)
        loaded = "performance.getEntriesByType('navigation')[0]?.loadEventEnd > 0"
        self.wait(f"location.href == {json.dumps(url)} && {loaded}")

    def key(self, name, **more):
        """Press a key; modifiers=8: with Shift."""
        key = {"key": name, "code": name, "windowsVirtualKeyCode": KEYS[name], **more}
        text = {"text": "\r"} if name == "Enter" else {}
        self("Input.dispatchKeyEvent", type="keyDown", **key, **text)
        self("Input.dispatchKeyEvent", type="keyUp", **key)

    def type(self, words):
        self("Input.insertText", text=words)

    def drop(self, *paths):
        """Drop files on the middle of the page."""
        data = {"items": [], "files": [os.path.abspath(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self("Input.dispatchDragEvent", type=kind, x=200, y=200, data=data)

    def look(self, width, height, dark=False):
        """Give the window a size, and people a wish."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def picture(self):
        """A PNG of what is seen."""
        return base64.b64decode(self("Page.captureScreenshot", format="png")["data"])


@contextlib.contextmanager
def browser(folder):
    """A tab of a browser that is started for it; skips where there is none."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if not path:
        pytest.skip("no Chromium is installed")
    read_ours, write_theirs = os.pipe()
    read_theirs, write_ours = os.pipe()
    options = ("--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --hide-scrollbars "
               f"--remote-debugging-pipe --user-data-dir={folder}").split()
    process = subprocess.Popen([sys.executable, "-c", START, str(read_theirs), str(write_theirs), path, *options],
                               pass_fds=(read_theirs, write_theirs), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    os.close(read_theirs)
    os.close(write_theirs)
    with open(write_ours, "wb") as to, open(read_ours, "rb") as back:
        try:
            page = Page(to, back)
            yield page
            page.session = None
            page("Browser.close")
            process.wait(20)
        finally:
            process.kill()
            process.wait()
