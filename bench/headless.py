"""A headless Chromium that a benchmark drives: pages opened, JavaScript evaluated, pictures taken.

It speaks the Chrome DevTools Protocol (chromedevtools.github.io/devtools-protocol) over a pair of
pipes, so that nothing but the browser is needed: apt install chromium.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from inkling.cli import UserError

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Chromium:
    """A browser with one tab; use it in a `with`. requests: the addresses that pages have asked for.
    errors: what they have thrown and nobody has caught."""

    def __init__(self):
        program = next(filter(None, map(shutil.which, NAMES)), None)
        if not program:
            raise UserError("this needs Chromium: apt install chromium")
        self.profile = tempfile.TemporaryDirectory()
        from_browser, to_us = os.pipe()
        from_us, to_browser = os.pipe()
        # The browser reads from descriptor 3 and writes to 4.
        words = ["sh", "-c", f"exec \"$0\" \"$@\" 3<&{from_us} 4>&{to_us}", program, "--headless=new", "--no-sandbox",
                 "--disable-gpu", "--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={self.profile.name}"]
        self.process = subprocess.Popen(words, pass_fds=(from_us, to_us), stderr=subprocess.DEVNULL)
        os.close(from_us)
        os.close(to_us)
        self.reader = os.fdopen(from_browser, "rb")
        self.writer = os.fdopen(to_browser, "wb")
        self.unread = b""
        self.last = 0                   # the number of the latest call
        self.requests = []
        self.errors = []
        self.events = set()             # the names of those since the latest call of wait_for
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = None
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        self.reader.close()
        self.writer.close()
        self.profile.cleanup()

    def call(self, method: str, **params) -> dict:
        """One command of the protocol, and its result."""
        self.last += 1
        message = {"id": self.last, "method": method, "params": params}
        if getattr(self, "session", None):
            message["sessionId"] = self.session
        self.writer.write(json.dumps(message).encode() + b"\0")
        self.writer.flush()
        while True:
            answer = self.receive()
            if answer.get("id") == self.last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def receive(self) -> dict:
        """The next message, of which events are noted."""
        while b"\0" not in self.unread:
            block = os.read(self.reader.fileno(), 1 << 20)
            if not block:
                raise RuntimeError("the browser has ended")
            self.unread += block
        line, _, self.unread = self.unread.partition(b"\0")
        message = json.loads(line)
        method = message.get("method", "")
        self.events.add(method)
        if method == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"][:200])
        if method == "Runtime.exceptionThrown":
            self.errors.append(message["params"]["exceptionDetails"])
        return message

    def open(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False, language: str = "en-US"):
        """Load a file, with this size of the window."""
        self.call("Emulation.setScrollbarsHidden", hidden=True)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)
        scheme = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        agent = self.call("Runtime.evaluate", expression="navigator.userAgent")["result"]["value"]
        self.call("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=language)
        self.events.clear()
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        while "Page.loadEventFired" not in self.events:
            self.receive()

    def evaluate(self, expression: str):
        """The value of an expression of JavaScript, awaited if it is a promise."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return answer["result"].get("value")

    def wait_until(self, condition: str, seconds: float = 60):
        """Until an expression of the page is true."""
        self.evaluate(f"""new Promise((resolve, reject) => {{
            const until = performance.now() + {1000 * seconds};
            const look = () => {{
                if ({condition}) resolve();
                else if (performance.now() > until) reject(new Error("waited {seconds} s"));
                else setTimeout(look, 20);
            }};
            look();
        }})""")

    def picture(self, path: Path, whole: bool = False):
        """The window, or the whole page, as a PNG."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        Path(path).write_bytes(base64.b64decode(data))
