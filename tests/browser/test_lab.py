"""Notebook 00 in a real JupyterLab and a real browser: cells, a live run, its tokens, Stop, and a restarted kernel."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from .conftest import Lab, until

SHOTS = Path("/tmp/shots")


def children_of(lab: Lab) -> list[int]:
    """Processes that measure, below this server's kernels; they have sessions of their own, but not other parents."""
    return [process.pid for process in psutil.Process(lab.pid).children(recursive=True)
            if "hybridlab.live" in process.cmdline()]


@pytest.fixture(scope="module")
def notebook(lab: Lab, browser: Any) -> Iterator[Any]:
    """Notebook 00 after Run All, with nothing but its own defaults."""
    t0=time.time()
    import os, json
    if os.environ.get("HL_FAST"):
        f=lab.folder/"00_start_here.ipynb"; nb=json.loads(f.read_text()); nb["cells"]=[c for c in nb["cells"] if c["id"] in ("parameters","import","try","explorer")]; f.write_text(json.dumps(nb))
    page = browser.new_page(viewport={"width": 1400, "height": 6000})
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(f"{lab.url}/lab/tree/00_start_here.ipynb?token={lab.token}", wait_until="domcontentloaded")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    print("open", time.time()-t0)
    lab.wait_ready()
    print("ready", time.time()-t0)
    page.click('li.lm-MenuBar-item:has-text("Run")')
    page.click('li.lm-Menu-item[data-command="runmenu:run-all"]')
    page.wait_for_function("""() => {
        const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].map(e => e.innerText);
        return prompts.length > 1 && prompts.every(p => /\\[\\d+\\]/.test(p)); }""", timeout=240_000)
    print("all", time.time()-t0)
    page.wait_for_selector(".hl-lanes", timeout=60_000)
    yield page
    page.close()


def test_all_cells_run(notebook: Any) -> None:
    """A notebook that fails for its first reader, or fills the page with warnings."""
    page = notebook
    page.screenshot(path=SHOTS / "all.png", full_page=True)
    bad = page.locator('[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]')
    assert bad.all_inner_texts() == []
    assert page.locator(".js-plotly-plot .main-svg").count() >= 2
    assert page.errors == []


def test_a_live_run(lab: Lab, notebook: Any) -> None:
    """x"""
    page = notebook
    t0 = time.time()
    page.locator('.jupyter-button:has-text("Run")').click()
    page.wait_for_selector(".hl-token", timeout=120_000)
    print("tokens", time.time()-t0)
    page.wait_for_selector(".hl-token[data-path=graph]", timeout=120_000)
    page.wait_for_selector(".widget-html-content:has-text('done')", timeout=120_000)
    print("done", time.time()-t0)
    page.locator(".hl-token[data-path=graph]").nth(3).click()
    page.wait_for_selector(".widget-html-content:has-text('replayed')", timeout=10_000)
    page.screenshot(path=SHOTS / "live.png", full_page=True)
