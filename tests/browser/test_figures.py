"""Figures written as pages: they open from disk without a network, and answer the pointer and their switch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hybridlab import kernelviews, plots
from hybridlab.kernellab import KernelResult

from .conftest import ROOT, until

RUN = ROOT / "data" / "runs" / "h200" / "20261124-082824-4268"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_figure_opens_from_disk_and_responds(theme: str, offline: Any, tmp_path: Path, shots: Path) -> None:
    """A page that shows a picture, whose switch and hover text died with the kernel."""
    result = KernelResult.open(RUN)
    (page,) = plots.write(kernelviews.operations(result.rows, result.caption), tmp_path / "operations", ["html"], theme)
    offline.goto(page.as_uri())
    offline.locator(".js-plotly-plot .scatterlayer .point").first.wait_for()
    title = offline.locator(".js-plotly-plot .gtitle-subtitle")
    before = title.text_content()
    offline.locator(".updatemenu-button").first.click()
    until(lambda: title.text_content() != before, 20, "another context")
    offline.locator(".js-plotly-plot .scatterlayer .point").first.wait_for()
    box = offline.locator(".js-plotly-plot .scatterlayer .point").first.bounding_box()
    offline.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    offline.locator(".hoverlayer .hovertext").first.wait_for()
    assert "µs" in offline.locator(".hoverlayer .hovertext").first.text_content()
    offline.screenshot(path=shots / f"operations_{theme}.png")
