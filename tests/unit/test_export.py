"""Executed notebooks as pages: figures are in them once and for all, and nothing is fetched."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import plotly.graph_objects as go
import pytest
from typer.testing import CliRunner

from hybridlab import cli, export, notebooks
from hybridlab.errors import NotebookError

HOSTILE = "<script>alert('hostile')</script>"


@pytest.fixture
def executed(tmp_path: Path) -> Path:
    """A notebook as JupyterLab saves it: figures as data alone, one of them twice, and text with markup in it."""
    figure = json.loads(go.Figure(go.Scatter(x=[1, 2], y=[3, 4], name="line")).to_json())
    outputs: list[Any] = [nbformat.v4.new_output("display_data", {export.FIGURE: figure}) for _ in range(2)]
    outputs.append(nbformat.v4.new_output("stream", name="stdout", text=HOSTILE))
    outputs.append(nbformat.v4.new_output("display_data", {
        "application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/plain": "Controls for a live run"}))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("figure", execution_count=1, outputs=outputs)])
    nbformat.write(notebook, tmp_path / "executed.ipynb")
    return tmp_path / "executed.ipynb"


def test_figures_are_in_the_page_with_one_library(executed: Path, tmp_path: Path) -> None:
    """Figures that are dropped without a word, or five megabytes of library with each."""
    before = executed.read_bytes()
    page = export.html(executed, tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert page.count('class="plotly-graph-div"') == 2
    assert len(re.findall(r"plotly\.js v\d", page)) == 1
    assert executed.read_bytes() == before


def test_nothing_is_fetched(executed: Path, tmp_path: Path) -> None:
    """A page that needs a server elsewhere is empty on a plane, and tells that server who reads it."""
    page = export.html(executed, tmp_path / "page.html").read_text(encoding="utf-8")
    assert re.findall(r"""(?:<script[^>]*\ssrc|<link[^>]*\shref|<img[^>]*\ssrc)\s*=\s*["'](?!data:)[^"']""", page) == []
    assert not re.findall(r"import\s*\(?['\"]https?:", page)


def test_text_stays_text(executed: Path, tmp_path: Path) -> None:
    """Output of a model that brings markup would run in the reader's page."""
    page = export.html(executed, tmp_path / "page.html").read_text(encoding="utf-8")
    assert HOSTILE not in page
    assert "alert(&#39;hostile&#39;)" in page or "alert('hostile')&lt;" in page
    assert "Controls for a live run" in page


@pytest.mark.parametrize("content", [None, "{}", "no json"])
def test_what_is_no_notebook_is_refused(content: str | None, tmp_path: Path) -> None:
    """A traceback of a library instead of the name of the file."""
    file = tmp_path / "x.ipynb"
    if content is not None:
        file.write_text(content)
    with pytest.raises(NotebookError, match=r"no notebook .*x\.ipynb|x\.ipynb' is no notebook"):
        export.html(file, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_run_writes_the_page_and_refuses_before_it_starts(executed: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Half an hour of measuring whose page cannot be written, because a package is missing."""
    started = []

    def run(*given: Any, **more: Any) -> SimpleNamespace:
        started.append(given)
        return SimpleNamespace(path=executed, run_path=tmp_path)

    monkeypatch.setattr(notebooks, "run", run)
    done = CliRunner().invoke(cli.app, ["run", "some.ipynb", "--html", str(tmp_path / "page.html")])
    assert (done.exit_code, done.stdout.strip()) == (0, str(tmp_path))
    assert (tmp_path / "page.html").stat().st_size > 1_000_000
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    refused = CliRunner().invoke(cli.app, ["run", "some.ipynb", "--html", str(tmp_path / "other.html")])
    assert refused.exit_code == 2
    assert len(started) == 1
