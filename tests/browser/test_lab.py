"""Notebook 00 in a real JupyterLab and a real browser: all cells, a live run, its controls, and a restarted kernel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from .conftest import Lab, until

NOTEBOOK = "00_start_here.ipynb"
LONG = 120_000  # ms; a loaded machine imports torch in half a minute
EXECUTED = """() => {
    const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].map(prompt => prompt.innerText);
    return prompts.length > 5 && prompts.every(prompt => /\\[\\d+\\]/.test(prompt)); }"""
CONTROLS = ".jp-OutputArea-output:has(.hl-lanes)"
WRONG = ", ".join(f'[data-mime-type="application/vnd.jupyter.{kind}"]' for kind in ("error", "stderr"))


def measuring(lab: Lab) -> list[psutil.Process]:
    """Processes that measure for a kernel of this server, wherever they hang in the tree of processes."""
    return [process for process in psutil.process_iter(["cmdline", "environ"])
            if "hybridlab.liveprocess" in (process.info["cmdline"] or ()) and process.status() != psutil.STATUS_ZOMBIE
            and (process.info["environ"] or {}).get("JUPYTER_TOKEN") == lab.token]


def run_all(page: Any, lab: Lab) -> None:
    lab.wait_ready()
    page.click('li.lm-MenuBar-item:has-text("Run")')
    page.click('li.lm-Menu-item[data-command="runmenu:run-all"]')
    page.wait_for_function(EXECUTED, timeout=2 * LONG)
    page.wait_for_selector(f"{CONTROLS} .js-plotly-plot .main-svg", timeout=LONG)


def button(page: Any, name: str) -> Any:
    return page.locator(f'{CONTROLS} .jupyter-button:has-text("{name}")')


def gaps(page: Any) -> str:
    """Everything that is drawn in the Explorer's figure, as markup."""
    return str(page.locator(f"{CONTROLS} .js-plotly-plot .main-svg").first.inner_html())


@pytest.fixture(scope="module")
def notebook(lab: Lab, browser: Any) -> Iterator[Any]:
    """Notebook 00 after Run All, with its own defaults but fewer warm-up rounds."""
    page = browser.new_page(viewport={"width": 1400, "height": 5200})
    page.broken = []
    page.on("pageerror", lambda error: page.broken.append(str(error)))
    page.goto(f"{lab.url}/lab/tree/{NOTEBOOK}?token={lab.token}", wait_until="domcontentloaded")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=LONG)
    run_all(page, lab)
    yield page
    page.close()


@pytest.fixture(autouse=True)
def sound(notebook: Any) -> Iterator[None]:
    """No test may leave an error in the page's scripts, or one or a warning under a cell."""
    yield
    assert notebook.broken == []
    assert notebook.locator(WRONG).all_inner_texts() == []


@pytest.fixture(scope="module")
def live(notebook: Any) -> Any:
    """The same page after a short live run of all that the Explorer shows at first."""
    notebook.locator(f'{CONTROLS} .widget-checkbox:has-text("limit") input').uncheck()
    button(notebook, "Run").click()
    notebook.wait_for_selector(".hl-token", timeout=LONG)
    notebook.wait_for_selector(f"{CONTROLS} .widget-html:has-text('done')", timeout=LONG)
    return notebook


def test_all_cells_run_without_an_error(notebook: Any, shots: Path) -> None:
    """A notebook that fails its first reader, or fills the page with warnings."""
    assert notebook.locator(WRONG).all_inner_texts() == []
    assert notebook.locator(".js-plotly-plot .main-svg").count() >= 2
    notebook.screenshot(path=shots / "notebook.png", full_page=True)


def test_a_live_run_shows_tokens_coloured_by_path(live: Any, shots: Path) -> None:
    """A page that shows no tokens, or all of them in one colour."""
    for path, colour in (("eager", "rgb(77, 77, 77)"), ("graph", "rgb(0, 114, 178)")):
        token = live.locator(f".hl-token[data-path={path}]").first
        assert token.evaluate("element => getComputedStyle(element).borderBottomColor") == colour
    lanes = live.locator(".hl-lane:has(.hl-token)")
    assert lanes.count() == 2
    texts = [lane.locator(".hl-text").inner_text() for lane in lanes.all()]
    assert texts[0] == texts[1] != ""
    until(lambda: live.locator(f"{CONTROLS} .js-plotly-plot .scatterlayer .point").count() > 100, 60, "points")
    live.screenshot(path=shots / "live.png", full_page=True)


def test_a_click_on_a_token_shows_its_reason(live: Any) -> None:
    """A colour says which path, and only the reason says why."""
    live.locator(".hl-token[data-path=graph]").nth(3).click()
    live.wait_for_selector(f"{CONTROLS} .widget-html:has-text('token 4'):has-text('replayed')", timeout=LONG)
    live.locator(".hl-token[data-path=eager]").nth(5).click()
    live.wait_for_selector(f"{CONTROLS} .widget-html:has-text('token 6'):has-text('from Python')", timeout=LONG)


def test_a_click_on_a_point_shows_its_reason(live: Any) -> None:
    """A slow point is what one wants explained; it must not need counting tokens."""
    points = live.locator(f"{CONTROLS} .js-plotly-plot .scatterlayer .trace").first.locator(".point")
    box = points.nth(points.count() - 1).bounding_box()
    live.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    live.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    live.wait_for_selector(f"{CONTROLS} .widget-html:has-text('request'):has-text('position')", timeout=LONG)


def test_a_slider_moves_the_figure(live: Any) -> None:
    """A slider whose message is lost between page and kernel."""
    before = gaps(live)
    handle = live.locator(f'{CONTROLS} .widget-slider:has-text("percentile") .noUi-handle')
    handle.focus()
    for _ in range(15):
        live.keyboard.press("ArrowLeft")
    live.wait_for_function("""() => [...document.querySelectorAll('.js-plotly-plot .annotation-text')].some(
        text => text.textContent.includes('p75'))""", timeout=LONG)
    assert gaps(live) != before


def test_the_saved_notebook_becomes_a_page_that_opens_from_disk(live: Any, lab: Lab, offline: Any, tmp_path: Path,
                                                                shots: Path) -> None:
    """An exported notebook without its figures, or with figures that need a network."""
    from hybridlab import export

    file = lab.folder / NOTEBOOK
    live.click('li.lm-MenuBar-item:has-text("File")')
    live.click('li.lm-Menu-item[data-command="docmanager:save"]')
    until(lambda: file.stat().st_size > 100_000 and file.read_text().endswith("}\n"), 120, "the saved notebook")
    offline.goto(export.html(file, tmp_path / "page.html").as_uri())
    figure = offline.locator(".js-plotly-plot").first
    figure.locator(".scatterlayer .point").first.wait_for(timeout=LONG)
    lines = figure.locator(".scatterlayer .trace").count()
    figure.locator(".legendtoggle").first.click()
    until(lambda: figure.locator(".scatterlayer .trace").count() < lines, 20, "a line that the legend hides")
    offline.screenshot(path=shots / "page.png", full_page=True)


def test_stop_ends_a_run_and_its_process(live: Any, lab: Lab) -> None:
    """A Stop that stops the page and not the process, which goes on measuring for nobody."""
    button(live, "Run").click()
    until(lambda: measuring(lab), 120, "a measuring process")
    button(live, "Stop").click()
    live.wait_for_selector(f"{CONTROLS} .widget-html:has-text('stopped')", timeout=20_000)
    assert measuring(lab) == []
    until(lambda: button(live, "Run").is_enabled(), 20, "a Run that can be pressed again")


def test_a_restarted_kernel_leaves_no_process_and_serves_again(live: Any, lab: Lab) -> None:
    """A restart in the middle of a run must leave neither its process nor controls that no longer answer."""
    button(live, "Run").click()
    until(lambda: measuring(lab), 120, "a measuring process")
    live.click('li.lm-MenuBar-item:has-text("Kernel")')
    live.click('li.lm-Menu-item[data-command="kernelmenu:restart"]')
    live.click('.jp-Dialog button:has-text("Restart")')
    until(lambda: not measuring(lab), 120, "the end of the measuring process")
    lab.wait_ready()
    for cell in ("model = ", "import hybridlab", "explorer = "):
        live.locator(f'.jp-CodeCell:has(.jp-InputArea-editor:has-text("{cell}")) .jp-InputArea-editor').first.click()
        live.keyboard.press("Control+Enter")
    live.wait_for_selector(f"{CONTROLS} .widget-html:has-text('ready')", timeout=LONG)
    live.locator(f'{CONTROLS} .widget-checkbox:has-text("limit") input').uncheck()
    live.locator(f'{CONTROLS} .widget-slider:has-text("requests") .noUi-handle').press("End")  # else it is over at once
    assert live.locator(f"{CONTROLS} .hl-token").count() == 0
    button(live, "Run").click()
    until(lambda: measuring(lab), 120, "a measuring process")
    live.wait_for_selector(f"{CONTROLS} .hl-token", timeout=LONG)
    button(live, "Stop").click()
    live.wait_for_selector(f"{CONTROLS} .widget-html:has-text('stopped')", timeout=LONG)
    assert measuring(lab) == []
