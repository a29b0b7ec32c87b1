"""One JupyterLab on the loopback and one headless Chromium for all browser tests, which end with the last of them;
without Chromium they say so."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
SETTINGS = {  # cells off screen are in the page too, and nothing asks a question
    "notebook-extension/tracker": {"windowingMode": "none", "autoStartDefaultKernel": True},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "docmanager-extension/plugin": {"autosave": False}}
STARTED_S, READY_S = 60, 120


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip where there is no Chromium: `make test` installs it on Debian as root, and on no other machine."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if CHROMIUM is None:
        for item in here:
            item.add_marker(pytest.mark.skip(reason="no Chromium found; Debian: apt install chromium"))


def until(true: Callable[[], Any], seconds: float, what: str) -> Any:
    """What `true` returns once it is true; fails when it is not within `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := true():
            return found
        time.sleep(0.1)
    pytest.fail(f"{what}: not within {seconds} s")


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: where it is, its secret, and the folder that it shows."""

    url: str
    token: str
    folder: Path
    pid: int

    def ask(self, path: str, method: str = "GET") -> Any:
        request = urllib.request.Request(f"{self.url}{path}", method=method,
                                         headers={"Authorization": f"token {self.token}"})
        with urllib.request.urlopen(request, timeout=5) as answer:
            body = answer.read()
        return json.loads(body) if body else None

    def up(self) -> bool:
        try:
            self.ask("/api/status")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False
        return True

    def idle(self) -> str:
        """The kernel's id once one session is idle with one page connected, else nothing."""
        kernels = [session["kernel"] for session in self.ask("/api/sessions")]
        ready = [k["id"] for k in kernels if k["execution_state"] == "idle" and k["connections"] == 1]
        return str(ready[0]) if len(kernels) == len(ready) == 1 else ""

    def wait_ready(self) -> str:
        """The id of a kernel that was idle at four looks in a row: a starting one is idle, and then busy again."""
        seen: list[str] = []

        def steady() -> str:
            seen.append(self.idle())
            return seen[-1] if len(seen) >= 4 and len(set(seen[-4:])) == 1 else ""

        return str(until(steady, READY_S, "a kernel that is ready"))


@pytest.fixture(scope="package")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """JupyterLab as `make lab` starts it, over a copy of the notebooks, with settings of its own; 00 measures less."""
    home = tmp_path_factory.mktemp("lab")
    folder = shutil.copytree(ROOT / "notebooks", home / "notebooks", ignore=shutil.ignore_patterns(".ipynb_*"))
    start = folder / "00_start_here.ipynb"
    text = start.read_text(encoding="utf-8").replace("warmup = 20 ", "warmup = 2  ")
    start.write_text(text.replace("lengths = [10, 100]", "lengths = [10, 60] "), encoding="utf-8")  # of one bucket
    for name, values in SETTINGS.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTER_RUNTIME_DIR": "runtime",
              "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython", "HYBRIDLAB_RUNS": "runs"}
    environment = {**os.environ, **{name: str(home / place) for name, place in places.items()}, "PYTHONPATH": str(ROOT),
                   "JUPYTER_TOKEN": token}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
               f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}",
               "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=home)
        try:
            found = Lab(f"http://127.0.0.1:{port}", token, folder, server.pid)
            until(found.up, STARTED_S, f"JupyterLab; see {log.name}")
            yield found
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def offline(browser: Any) -> Iterator[Any]:
    """A page without a network; an error in it, or a wish for anything beyond files, fails the test."""
    context, wrong = browser.new_context(viewport={"width": 1100, "height": 800}, offline=True), list[str]()
    opened = context.new_page()
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda sent: wrong.append(sent.url) if sent.url.startswith("http") else None)
    yield opened
    context.close()
    assert wrong == []


@pytest.fixture(scope="session")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go: $HYBRIDLAB_SHOTS, to look at them, else a folder of the test run."""
    found = Path(os.environ.get("HYBRIDLAB_SHOTS") or tmp_path_factory.mktemp("shots"))
    found.mkdir(parents=True, exist_ok=True)
    return found
