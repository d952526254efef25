"""Drives headless Chromium for the tests by chromedriver's WebDriver protocol: JSON over HTTP on 127.0.0.1.

Needs Debian's packages chromium and chromium-driver and, in Python, nothing but requests.
"""
import re
import shutil
import subprocess
import tempfile
import time

import requests

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1400,1000")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name for a reference to an element
TIMEOUT = 60  # seconds for one answer


def missing_browser():
    """Why there is no browser test on this machine, or None."""
    for name in ("chromium", "chromedriver"):
        if shutil.which(name) is None:
            return f"no {name} on this machine (Debian: apt-get install chromium chromium-driver)"
    return None


class Browser:
    """One window. A context manager: leaving it ends chromedriver and with it Chromium."""

    LEFT, RIGHT, ESCAPE = "\ue012", "\ue014", "\ue00c"

    def __enter__(self):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], text=True,
                                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.http = requests.Session()
        self.http.trust_env = False  # no proxy for 127.0.0.1
        for line in self.driver.stdout:
            started = re.search(r"started successfully on port (\d+)", line)
            if started:
                break
        else:
            raise RuntimeError("chromedriver ended before it was ready")
        self.url = f"http://127.0.0.1:{started.group(1)}/session"
        options = {"binary": shutil.which("chromium"), "args": [*FLAGS, f"--user-data-dir={self.profile.name}"]}
        try:
            session = self._post("", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})
        except BaseException:
            self._end_driver()
            raise
        self.url += f"/{session['sessionId']}"
        return self

    def __exit__(self, *error):
        self.http.delete(self.url, timeout=TIMEOUT)
        self._end_driver()

    def _end_driver(self):
        self.driver.terminate()
        self.driver.communicate()
        self.profile.cleanup()

    def _post(self, path, body):
        answer = self.http.post(self.url + path, json=body, timeout=TIMEOUT).json()["value"]
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(f"{path}: {answer['error']}: {answer['message'].splitlines()[0]}")
        return answer

    def open(self, path):
        """Load a local file in a window of 1400 x 1000."""
        self.resize(1400, 1000)
        self._post("/url", {"url": path.as_uri()})

    def resize(self, width, height):
        self._post("/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}})

    def run(self, script, *arguments):
        """What the JavaScript function body `script` returns."""
        return self._post("/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script):
        """Until `script` returns something true; 10 seconds at most."""
        end = time.monotonic() + 10
        while not self.run(script):
            if time.monotonic() > end:
                raise TimeoutError(script)
            time.sleep(0.02)

    def click(self, selector):
        element = self._post("/element", {"using": "css selector", "value": selector})[ELEMENT]
        self._post(f"/element/{element}/click", {})

    def keys(self, text):
        """Press and release one key after the other, wherever the focus is."""
        pressed = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        self._post("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": pressed}]})
