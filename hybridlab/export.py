"""An executed notebook as one HTML page that opens from disk, without a network, with figures that respond.

nbconvert by itself drops Plotly's figures, or leaves them to a server elsewhere.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import nbformat
import plotly.io as pio

from hybridlab.errors import NotebookError
from hybridlab.files import atomic_write
from hybridlab.parameters import opened

FIGURE = "application/vnd.plotly.v1+json"


def require() -> None:
    """Raises `NotebookError` where nothing here can write HTML."""
    if find_spec("nbconvert") is None:
        raise NotebookError("nbconvert is not installed", "it turns notebooks into HTML", "pip install nbconvert")


def html(notebook: Path, page: Path) -> Path:
    """Write the executed `notebook` to `page`. Its figures are those of its outputs, drawn by a copy of plotly.js in
    the page; no script, style or font is fetched. Raises `NotebookError` for what is no notebook."""
    require()
    from nbconvert import HTMLExporter

    found = opened(notebook)
    _embed(found)
    exporter = HTMLExporter(mathjax_url="", require_js_url="", jquery_url="", mermaid_js_url="", widget_renderer_url="",
                            embed_images=True)
    body, _ = exporter.from_notebook_node(found, {"metadata": {"name": notebook.stem}})
    page.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(page, body)
    return page


def _embed(notebook: nbformat.NotebookNode) -> None:
    """Give each figure the HTML that shows it, the first one with the library that all of them share."""
    library = True
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if FIGURE in data:
                figure = {name: data[FIGURE][name] for name in ("data", "layout")}
                data["text/html"] = pio.to_html(figure, include_plotlyjs=library, include_mathjax=False,
                                                full_html=False, validate=False)
                library = False
